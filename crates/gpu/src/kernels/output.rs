//! From attention's splits to the streams in one kernel, one row, on NVIDIA: splits are joined (A.5), both halves of the
//! output projection follow (A.6), and what they give is joined into the streams (A.3).
//!
//! A cube stays on each processor, and between steps cubes tell each other what they have made. A plane of each cube
//! asks for its rows of weights, those of the second matrix too, as places for them in shared memory become free: so
//! memory is read without a pause, whatever the cubes wait for.

use super::attend::rotate_four;
use super::common::bytes_of;
use super::copies::{arrive, begin, copy, expect, place_of, shared_float, shared_half, shared_quad, wait};
use super::dot::{Four, Quad, Weights, dot_bytes};
use super::exchange::{lay_two, receive, send};
use super::fetch::load_x;
use super::flash::{FlashShape, MOST_SPLITS, SPLIT_GROUPS as GROUPS, SPLITS_AHEAD as AHEAD, SplitSums};
use super::hyper::Hyper;
use super::join::{fetch, fetch_control, join_output, place_of_part};
use super::plane::{lane, plane, plane_total};
use super::tables::shared_address;
use cubecl::prelude::*;

/// Units of a plane.
const PLANE: usize = 32;
/// Planes that multiply.
const PLANES: usize = 16;
/// Units that multiply.
const MULTIPLY: usize = PLANES * PLANE;
/// Units of a cube: a further plane asks for weights.
pub const UNITS: usize = MULTIPLY + PLANE;

/// Bytes of weights that are asked for at once: whole rows side by side, a plane for each.
const PIECE: usize = 16 << 10;
/// The same with their scales.
const PIECE_BYTES: usize = PIECE + PIECE / 16;
/// Pieces of a cube that are on their way at once: enough for memory's latency. What cubes tell each other waits behind
/// them.
const ON_THE_WAY: u32 = 4;
/// Values of a row that the planes' unrolled loop takes.
const TURN: usize = 4096;
/// Fewest places for pieces that are worth it.
const FEWEST_PLACES: usize = 8;

/// Most rotary channels: a unit each fetches its angle.
const MOST_ANGLES: usize = 64;

/// What attention left of a row: see [`flash`](super::flash::flash).
#[derive(CubeType, CubeLaunch)]
pub struct Splits {
    /// `[splits, heads, width]`.
    pub partial: Box<[Four]>,
    /// `[splits, heads, 2]`.
    pub stats: Box<[f32]>,
    /// Of the heads.
    pub sinks: Box<[f32]>,
    /// Cosines and sines.
    pub angles: Box<[f32]>,
    /// The row's first angle.
    pub first_angle: u32,
    /// Splits.
    pub count: u32,
    /// Of attention.
    #[cube(comptime)]
    pub s: FlashShape,
}

/// How the work is shared: each cube has as many channels of the heads, rows of the first matrix, and rows of the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OutputShape {
    cubes: usize,
    /// Values of all heads, and groups of them that meet rows of the first matrix of their own.
    heads: usize,
    groups: usize,
    /// Rows of the first matrix, columns of the second.
    low: usize,
    /// Rows of the second.
    width: usize,
    /// Places for pieces in shared memory.
    places: usize,
}

impl OutputShape {
    /// For `cubes` cubes with `shared` bytes of shared memory each, of which the join needs `join`.
    pub fn new(
        cubes: usize,
        flash: FlashShape,
        (groups, low, width): (usize, usize, usize),
        (shared, join): (usize, usize),
    ) -> Option<Self> {
        let heads = flash.heads * flash.attend.row.width;
        let o = OutputShape { cubes, heads, groups, low, width, places: 0 }.with_room(shared, join);
        let fits = [heads, low, width].iter().all(|v| v.is_multiple_of(cubes))
            && cubes.is_multiple_of(groups)
            && flash.attend.row.width.is_multiple_of(o.channels())
            && o.channels().is_multiple_of(4 * PLANE)
            && o.channels() / 4 * GROUPS <= MULTIPLY
            && o.first_rows().is_multiple_of(32)
            && o.first_rows() <= 4 * PLANE
            && o.rows_fit(o.group(), o.first_rows())
            && o.rows_fit(low, o.last_rows())
            && (PIECE / o.group()).is_multiple_of(PIECE / low)
            && flash.attend.row.rotary <= MOST_ANGLES
            && o.places >= FEWEST_PLACES;
        fits.then_some(o)
    }

    /// The same with as many places as there is room for.
    pub fn with_room(self, shared: usize, join: usize) -> Self {
        let least = OutputShape { places: 0, ..self }.shared_bytes() + join;
        OutputShape { places: shared.saturating_sub(least) / (PIECE_BYTES + 16), ..self }
    }

    /// Whether a cube's `rows` rows of so many columns are whole pieces, and a piece has a plane for each of its rows.
    fn rows_fit(&self, columns: usize, rows: usize) -> bool {
        PIECE.is_multiple_of(columns)
            && columns.is_multiple_of(TURN)
            && PLANES.is_multiple_of(PIECE / columns)
            && rows.is_multiple_of(PIECE / columns)
    }

    /// Cubes.
    pub const fn cubes(&self) -> u32 {
        self.cubes as u32
    }
    /// Columns of the first matrix.
    const fn group(&self) -> usize {
        self.heads / self.groups
    }
    /// A cube's channels of a head.
    const fn channels(&self) -> usize {
        self.heads / self.cubes
    }
    const fn first_rows(&self) -> usize {
        self.low / self.cubes
    }
    const fn last_rows(&self) -> usize {
        self.width / self.cubes
    }
    /// Products of a cube that are held at once.
    const fn products(&self) -> usize {
        if self.first_rows() > self.last_rows() { self.first_rows() } else { self.last_rows() }
    }
    /// A cube's pieces of the first matrix.
    const fn first_pieces(&self) -> u32 {
        (self.first_rows() * self.group() / PIECE) as u32
    }
    /// Those of the second.
    const fn last_pieces(&self) -> u32 {
        (self.last_rows() * self.low / PIECE) as u32
    }
    /// Planes that multiply a piece, at the most.
    const fn arrivals(&self) -> u32 {
        (PIECE / self.group()) as u32
    }
    /// Where what is told of the second matrix's input begins, in vectors.
    const fn low_told(&self) -> usize {
        told_quads(self.heads)
    }
    /// Values of an input, at the most.
    const fn longest(&self) -> usize {
        if self.group() > self.low { self.group() } else { self.low }
    }
    const fn shared_bytes(&self) -> usize {
        let inputs = self.longest() + self.longest() / 8;
        let joined = 16 * GROUPS * self.channels() / 4 + 8 * MOST_SPLITS + 4 * (MOST_ANGLES + 1);
        // And something for alignment.
        self.places * (PIECE_BYTES + 16) + inputs + joined + 4 * self.products() + 256
    }
}

/// Vectors of a row of `values` values in int8 that cubes tell each other, with its scales.
const fn told_quads(values: usize) -> usize {
    values / 8 + values / 64
}

/// Bytes of what is told of heads of `heads` values and what the first matrix makes of them.
pub const fn told_bytes(heads: usize, low: usize) -> usize {
    16 * (told_quads(heads) + told_quads(low))
}

/// A row of int8 in shared memory: where its bytes begin, and its scales.
#[derive(CubeType)]
struct Row {
    bytes: u32,
    scales: u32,
}

/// Places for pieces of weights, which are filled and freed in turn.
#[derive(CubeType)]
struct Ring {
    pieces: u32,
    /// Barriers that tell of each whether it has come, and whether it is free again.
    full: u32,
    free: u32,
}

/// See above. `told` is for cubes to tell each other; `turn` counts launches.
#[cube(launch_unchecked)]
pub fn attention_output<E: Float>(
    splits: &Splits,
    first: &Weights,
    last: &Weights,
    told: &mut [Quad],
    turn: &mut [u32],
    streams: &mut [Four],
    mix: &[f32],
    control: &[Vector<E, Const<4>>],
    partial: &mut [f32],
    #[comptime] o: OutputShape,
    #[comptime] s: Hyper,
) {
    // Few, and all wait for them: before the weights.
    let turn_now = load_x(&*turn, 0usize, false) + 1u32;
    let coming_splits = fetch_splits(splits, o);
    let of_head = fetch_of_head(splits, head_of(o, splits.s));
    let place = place_of_part(1u32, s);
    let coming = fetch(&*streams, mix, &place, s, true);
    let coming_control = fetch_control(control, &place, s);
    let ring = Ring::new(o);
    let x = row_of(o);
    let (sums, end) = lay_of_head(&of_head, splits);
    let mut products = Shared::<[f32]>::new_slice(comptime!(o.products()));
    sync_cube();
    if plane() == PLANES {
        ring.fill(first, last, o);
    } else {
        join_splits(&coming_splits, splits, &sums, &end, &*told, turn_now, o);
        let group = CUBE_POS_X / comptime!((o.cubes / o.groups) as u32);
        // The same instructions for both halves: the second time they are at hand.
        for half in 0..2u32 {
            let h = Half::of(half, group, o);
            receive_row(&*told, &h, &x, turn_now);
            ring.multiply(&x, &h, &mut products, o);
            meet();
            if half == 0 {
                tell_low(&products, &*told, turn_now, o);
            }
        }
    }
    join_output(&coming, &coming_control, &products, streams, partial, &place, s);
    // Who has told this cube something has read it.
    if CUBE_POS_X == 0 && UNIT_POS == 0 {
        turn[0] = turn_now;
    }
}

/// Until all units that multiply are here: the plane that asks for weights never is.
#[cube]
fn meet() {
    gpu_asm!("bar.sync 1, {n};", n = const MULTIPLY);
}

#[cube]
fn row_of(#[comptime] o: OutputShape) -> Row {
    let bytes = Shared::<[Quad]>::new_slice(comptime!(o.longest() / 16));
    let scales = Shared::<[Quad]>::new_slice(comptime!(o.longest() / 128));
    Row { bytes: shared_address(&bytes), scales: shared_address(&scales) }
}

/// This cube's head, of which it has some channels.
#[cube]
fn head_of(#[comptime] o: OutputShape, #[comptime] s: FlashShape) -> usize {
    CUBE_POS_X as usize * comptime!(o.channels()) / comptime!(s.attend.row.width)
}

/// What a head's joined splits meet at last.
#[derive(CubeType)]
struct HeadEnd {
    sink: Shared<[f32]>,
    angles: Shared<[f32]>,
}

/// A unit's share of what is known of this cube's head, on its way.
#[derive(CubeType)]
struct OfHead {
    reference: f32,
    weight: f32,
    sink: f32,
    angle: f32,
}

/// All of it at once: each that is laid before the next is asked for would be waited for alone.
#[cube]
fn fetch_of_head(splits: &Splits, head: usize) -> OfHead {
    let unit = UNIT_POS as usize;
    let split = usize::min(unit, splits.count as usize - 1);
    let at = 2 * (split * comptime!(splits.s.heads) + head);
    let angle = usize::min(unit, comptime!(splits.s.attend.row.rotary - 1));
    OfHead {
        reference: load_x(&splits.stats, at, false),
        weight: load_x(&splits.stats, at + 1, false),
        sink: load_x(&splits.sinks, head, false),
        angle: load_x(&splits.angles, splits.first_angle as usize + angle, false),
    }
}

/// Lays it into shared memory; the cube has to meet.
#[cube]
fn lay_of_head(own: &OfHead, splits: &Splits) -> (SplitSums, HeadEnd) {
    let rotary = comptime!(splits.s.attend.row.rotary);
    let mut references = Shared::<[f32]>::new_slice(MOST_SPLITS);
    let mut weights = Shared::<[f32]>::new_slice(MOST_SPLITS);
    let mut sink = Shared::<[f32]>::new_slice(1usize);
    let mut angles = Shared::<[f32]>::new_slice(rotary);
    let unit = UNIT_POS as usize;
    if unit < splits.count as usize {
        references[unit] = own.reference;
        weights[unit] = own.weight;
    }
    if unit < rotary {
        angles[unit] = own.angle;
    }
    if unit == 0 {
        sink[0] = own.sink;
    }
    (SplitSums { references, weights }, HeadEnd { sink, angles })
}

/// The first splits of this unit's four channels; those beyond the last repeat it.
#[cube]
fn fetch_splits(splits: &Splits, #[comptime] o: OutputShape) -> Array<Four> {
    let lanes = comptime!(o.channels() / 4);
    let (own, group) = (UNIT_POS as usize % lanes, UNIT_POS as usize / lanes);
    let mut coming = Array::<Four>::new(AHEAD);
    #[unroll]
    for i in 0..AHEAD {
        let split = usize::min(group + comptime!(i * GROUPS), splits.count as usize - 1);
        coming[i] =
            load_x(&splits.partial, split * comptime!(o.heads / 4) + CUBE_POS_X as usize * lanes + own, true);
    }
    coming
}

/// Joins the splits of this cube's channels with the sink, rotates them back, and tells what that gives.
#[cube]
fn join_splits(
    coming: &Array<Four>,
    splits: &Splits,
    sums: &SplitSums,
    end: &HeadEnd,
    told: &[Quad],
    turn: u32,
    #[comptime] o: OutputShape,
) {
    let s = comptime!(splits.s);
    let lanes = comptime!(o.channels() / 4);
    let count = splits.count as usize;
    let (k, group) = (UNIT_POS as usize % lanes, UNIT_POS as usize / lanes);
    let four = CUBE_POS_X as usize * lanes + k;
    let mut joined = Shared::<[Four]>::new_slice(comptime!(GROUPS * o.channels() / 4));
    let all = sums.join(count, end.sink[0]);
    if group < GROUPS {
        let mut sum = Four::new(0.0f32);
        #[unroll]
        for i in 0..AHEAD {
            let split = group + comptime!(i * GROUPS);
            if split < count {
                sum += coming[i] * Four::new(sums.factor(split, &all));
            }
        }
        let mut split = group + comptime!(AHEAD * GROUPS);
        while split < count {
            sum +=
                splits.partial[split * comptime!(o.heads / 4) + four] * Four::new(sums.factor(split, &all));
            split += GROUPS;
        }
        joined[UNIT_POS as usize] = sum;
    }
    meet();
    if UNIT_POS < comptime!(lanes as u32) {
        let mut sum = Four::new(0.0f32);
        #[unroll]
        for g in 0..GROUPS {
            sum += joined[comptime!(g * o.channels() / 4) + k];
        }
        let mut v = sum * Four::new(1.0f32 / all.total);
        let (in_head, codes) =
            (four % comptime!(s.attend.row.width / 4), comptime!(s.attend.row.codes() / 4));
        if in_head >= codes {
            v = rotate_four(v, &end.angles[0..comptime!(s.attend.row.rotary)], 4 * (in_head - codes), true);
        }
        tell_four(told, 0usize, four, v, true, turn, o.heads);
    }
}

/// Tells four values of a row of `values` values from vector `first` of `told` on, in int8; the whole plane takes part.
#[cube]
fn tell_four(
    told: &[Quad],
    #[comptime] first: usize,
    four: usize,
    value: Four,
    valid: bool,
    turn: u32,
    #[comptime] values: usize,
) {
    let bytes = bytes_of(value);
    if valid {
        send(told, first, four, bytes.word, turn);
        if four % 8 == 0 {
            send(told, comptime!(first + values / 8), four / 8, u32::reinterpret(bytes.scale), turn);
        }
    }
}

/// Tells what this cube has made of the first matrix.
#[cube]
fn tell_low(low: &Shared<[f32]>, told: &[Quad], turn: u32, #[comptime] o: OutputShape) {
    let fours = comptime!(o.first_rows() / 4);
    if plane() == 0 {
        let valid = lane() < fours;
        let k = usize::min(lane(), comptime!(o.first_rows() / 4 - 1));
        let mut v = Four::empty();
        #[unroll]
        for i in 0..4usize {
            v.insert(i, low[4 * k + i]);
        }
        tell_four(told, o.low_told(), CUBE_POS_X as usize * fours + k, v, valid, turn, o.low);
    }
}

/// One of the two products.
#[derive(CubeType)]
struct Half {
    /// Where its input, and the scales of that, are told of, in vectors.
    told: u32,
    scales: u32,
    /// Values of the input, in turns of a plane that are unrolled.
    turns: u32,
    /// Rows of a piece; pieces before, and those of this product.
    rows: u32,
    before: u32,
    pieces: u32,
}

#[cube]
impl Half {
    fn of(half: u32, group: u32, #[comptime] o: OutputShape) -> Half {
        let first = half == 0;
        let own = group * comptime!(o.group() as u32 / 64);
        let (low, scales) = comptime!((o.low_told() as u32, (o.low_told() + o.low / 8) as u32));
        Half {
            told: select(first, 8 * own, low),
            scales: select(first, comptime!(o.heads as u32 / 8) + own, scales),
            turns: select(first, comptime!((o.group() / TURN) as u32), comptime!((o.low / TURN) as u32)),
            rows: select(first, comptime!((PIECE / o.group()) as u32), comptime!((PIECE / o.low) as u32)),
            before: select(first, 0u32, o.first_pieces()),
            pieces: select(first, o.first_pieces(), o.last_pieces()),
        }
    }
}

/// Takes a row of int8, of which cubes tell, to shared memory, as it comes.
#[cube]
fn receive_row(told: &[Quad], h: &Half, x: &Row, turn: u32) {
    let mut at = UNIT_POS;
    while at < h.turns * comptime!(TURN as u32 / 64) {
        lay_two(x.scales + 8 * at, receive(told, (h.scales + at) as usize, turn));
        at += comptime!(MULTIPLY as u32);
    }
    let mut at = UNIT_POS;
    while at < h.turns * comptime!(TURN as u32 / 8) {
        lay_two(x.bytes + 8 * at, receive(told, (h.told + at) as usize, turn));
        at += comptime!(MULTIPLY as u32);
    }
    meet();
}

#[cube]
impl Ring {
    /// The cube has to meet before it is used.
    fn new(#[comptime] o: OutputShape) -> Ring {
        let pieces = Shared::<[Quad]>::new_slice(comptime!(o.places * PIECE_BYTES / 16));
        let full = Shared::<[u64]>::new_slice(o.places);
        let free = Shared::<[u64]>::new_slice(o.places);
        let ring = Ring {
            pieces: shared_address(&pieces),
            full: shared_address(&full),
            free: shared_address(&free),
        };
        if UNIT_POS < comptime!(o.places as u32) {
            begin(ring.full + 8 * UNIT_POS, 1u32);
            begin(ring.free + 8 * UNIT_POS, o.arrivals());
        }
        ring
    }

    /// Asks for all of the cube's pieces of both matrices in turn.
    fn fill(&self, first: &Weights, last: &Weights, #[comptime] o: OutputShape) {
        if lane() == 0 {
            self.fill_with(first, o.first_rows(), 0u32, o.first_pieces(), o);
            self.fill_with(last, o.last_rows(), o.first_pieces(), o.last_pieces(), o);
        }
    }

    /// Asks for `count` pieces of a matrix, of which the cube has `rows` rows, after `before` others.
    fn fill_with(
        &self,
        w: &Weights,
        #[comptime] rows: usize,
        #[comptime] before: u32,
        #[comptime] count: u32,
        #[comptime] o: OutputShape,
    ) {
        let places = comptime!(o.places as u32);
        let values = CUBE_POS_X as usize * comptime!(rows * w.input);
        let quants = place_of(w.quants.index(0usize), values / 16);
        let scales = place_of(w.scales.index(0usize), values / 32);
        let mut n = 0u32;
        while n < count {
            let piece = n + before;
            if piece >= ON_THE_WAY {
                let earlier = piece - ON_THE_WAY;
                wait(self.full + 8 * (earlier % places), earlier / places % 2);
            }
            let place = piece % places;
            if piece >= places {
                wait(self.free + 8 * place, (piece / places + 1) % 2);
            }
            let (bar, to) = (self.full + 8 * place, self.pieces + place * comptime!(PIECE_BYTES as u32));
            expect(bar, comptime!(PIECE_BYTES as u32));
            let at = n as usize * PIECE;
            copy(to, quants + at as u64, comptime!(PIECE as u32), bar);
            let from = scales + (at / 16) as u64;
            copy(to + comptime!(PIECE as u32), from, comptime!(PIECE as u32 / 16), bar);
            n += 1;
        }
    }

    /// Products of a cube's pieces with `x`.
    fn multiply(&self, x: &Row, h: &Half, out: &mut Shared<[f32]>, #[comptime] o: OutputShape) {
        let places = comptime!(o.places as u32);
        let (columns, plane) = (h.turns * comptime!(TURN as u32), plane() as u32);
        let row = plane % h.rows;
        let (own, pair) = (16 * lane() as u32, (lane() / 2) as u32);
        let mut n = plane / h.rows;
        while n < h.pieces {
            let piece = n + h.before;
            let place = piece % places;
            wait(self.full + 8 * place, piece / places % 2);
            let from = self.pieces + place * comptime!(PIECE_BYTES as u32);
            let quads = from + row * columns + own;
            let scales = from + comptime!(PIECE as u32) + row * (columns / 16) + 2 * pair;
            let mut sum = 0.0f32;
            for turn in 0..h.turns {
                let quads = quads + turn * comptime!(TURN as u32);
                let scales = scales + turn * comptime!(TURN as u32 / 16);
                let (bytes, floats) = (
                    x.bytes + own + turn * comptime!(TURN as u32),
                    x.scales + 4 * pair + turn * comptime!(TURN as u32 / 8),
                );
                #[unroll]
                for k in 0..comptime!(TURN / (16 * PLANE)) {
                    let scale = f32::cast_from(shared_half(scales, comptime!(PLANE * k)))
                        * shared_float(floats, comptime!(2 * PLANE * k));
                    let quad = shared_quad(quads, comptime!(16 * PLANE * k));
                    let dot = dot_bytes(quad, shared_quad(bytes, comptime!(16 * PLANE * k)), 0i32);
                    sum += scale * f32::cast_from(dot);
                }
            }
            let total = plane_total(sum);
            // As many as where each plane has a row.
            if lane() < (o.arrivals() / h.rows) as usize {
                arrive(self.free + 8 * place);
            }
            if lane() == 0 {
                out[(n * h.rows + row) as usize] = total;
            }
            n += comptime!(PLANES as u32) / h.rows;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::attend::AttendShape;
    use crate::kernels::cache::{Rounding, RowShape};
    use crate::kernels::common::Real;

    /// Bytes of an H100's shared memory that a cube can have.
    const SHARED: usize = 227 << 10;
    /// Those that the join needs, with control numbers in f16.
    const JOIN: usize = 6880;

    fn flash(heads: usize) -> FlashShape {
        let (keys, rounding, eps) = (false, Rounding::Packed, Real::new(1e-6));
        let row = RowShape { width: 512, rotary: 64, keys, rounding, words: 144, scale_words: 2, eps };
        let attend = AttendShape { row, ring: 128, window: 128, ratio: 0, top_k: 0, q_stride: 512 * heads };
        FlashShape { attend, heads, side: 16, tile: 32, planes: 8, rotate: true, early: true, eps }
    }

    #[test]
    fn work_of_flash_is_shared() {
        let o = OutputShape::new(128, flash(64), (8, 8192, 4096), (SHARED, JOIN)).unwrap();
        assert_eq!((o.places, o.first_pieces(), o.last_pieces()), (12, 16, 16));
        assert!(o.shared_bytes() + JOIN <= SHARED);
        // All rows of both matrices, once.
        let bytes = |pieces: u32| 128 * pieces as usize * PIECE;
        assert_eq!(bytes(o.first_pieces()), 8192 * o.group());
        assert_eq!(bytes(o.last_pieces()), 4096 * 8192);
        assert_eq!(told_bytes(o.heads, o.low), 16 * (o.low_told() + told_quads(o.low)));
    }

    #[test]
    fn what_does_not_divide_is_for_others() {
        let new = |cubes, heads, sizes, shared| {
            OutputShape::new(cubes, flash(heads), sizes, (shared, JOIN)).is_some()
        };
        assert!(new(128, 64, (8, 8192, 4096), SHARED));
        // Too little shared memory; a number of cubes that does not divide; rows of either matrix that are no whole turns.
        assert!(!new(128, 64, (8, 8192, 4096), 99 << 10));
        assert!(!new(100, 64, (8, 8192, 4096), SHARED));
        assert!(!new(128, 32, (8, 8192, 4096), SHARED));
        assert!(!new(128, 64, (8, 1024, 4096), SHARED));
    }
}
