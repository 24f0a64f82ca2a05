//! Attention on the matrix units (A.5). All heads share the rows they attend to, so a tile of heads is one side of a
//! product, a tile of rows the other. Rows are unpacked from FP8 on the way into shared memory, where they serve both
//! as keys and as values; no score leaves the cube.
//!
//! A softmax over tiles rescales its sums whenever the maximum grows. The sums lie in the matrix units' registers,
//! whose layout is not known, so here the reference is only moved when a score exceeds it by much: weights of up to
//! `e^8` are exact enough in f16. What a cube leaves are sums relative to its references; [`combine`] joins those of
//! the splits, adds the sink, and rotates back.

use super::attend::{AttendShape, Seen, rotate_four, seen, slot_of};
use super::cache::{ROW_SCALES, ROWS, WINDOW, WINDOW_SCALES, part_of};
use super::common::{Real, rms_scale, store_four};
use super::dot::{Eight, Four, Output, Quad, dot_four};
use super::hyper::{Mixing, post_comb_row};
use cubecl::prelude::*;
use half::f16;

type Two = Vector<f16, Const<2>>;

/// Units of a cube.
pub const UNITS: usize = 256;
/// How far scores may exceed the reference.
const SLACK: f32 = 8.0;

/// What the kernels are specialised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlashShape {
    /// Rows and their selection.
    pub attend: AttendShape,
    /// Query heads.
    pub heads: usize,
    /// Side of the matrix units' tiles: heads of a cube.
    pub side: usize,
    /// Stored rows of a tile.
    pub tile: usize,
    /// Planes of a cube.
    pub planes: usize,
    /// Whether the queries have yet to be normed and rotated.
    pub rotate: bool,
    /// Whether what is read is on its way early: for few rows, which wait for it; many want the registers.
    pub early: bool,
    /// Epsilon of that norm.
    pub eps: Real,
}

impl FlashShape {
    const fn width(&self) -> usize {
        self.attend.row.width
    }
    /// Eights from row to row in shared memory: one more than a row has, for the sake of banks.
    const fn pitch(&self) -> usize {
        self.width() / 8 + 1
    }
    /// Tiles of scores.
    const fn score_tiles(&self) -> usize {
        self.tile / self.side
    }
    /// Planes that share the depth of a tile of scores.
    const fn depths(&self) -> usize {
        self.planes / self.score_tiles()
    }
    /// Units that share a head's scores.
    const fn lanes(&self) -> usize {
        UNITS / self.side
    }
    /// Tiles of the output of a plane.
    const fn outputs(&self) -> usize {
        self.width() / self.side / self.planes
    }
    /// Units that share a row's channels, four each.
    pub const fn lanes_of_row(&self) -> usize {
        (self.width() / 4).next_multiple_of(32)
    }
    /// Bytes of shared memory.
    pub const fn shared_bytes(&self) -> usize {
        (self.side + self.tile) * self.pitch() * 16
            + self.planes * self.side * self.side * 4
            + self.side * (self.tile / 8 + 1) * 16
            + self.tile * 8
            + self.side * 8
    }
    /// Whether the shape divides into tiles for all planes.
    pub const fn fits(&self) -> bool {
        self.heads % self.side == 0
            && self.score_tiles() > 0
            && self.planes % self.score_tiles() == 0
            && self.width() % (self.side * self.planes) == 0
            && self.width() % (self.side * self.depths()) == 0
            && self.width() % (8 * self.lanes()) == 0
            && self.attend.row.codes() % 16 == 0
            && self.attend.row.rotary % 8 == 0
    }
}

/// Two FP8 codes, the lowest bytes of a word, as halves over 2^8.
#[cube]
fn halves(codes: u32) -> u32 {
    ((codes & 0x7f) << 7) | ((codes & 0x80) << 8) | ((codes & 0x7f00) << 15) | ((codes & 0x8000) << 16)
}

#[cube]
fn scaled(word: u32, scale: Two) -> u32 {
    u32::reinterpret(Two::reinterpret(word) * scale)
}

#[cube]
fn pair(a: f32, b: f32) -> u32 {
    let mut v = Two::empty();
    v.insert(0usize, f16::cast_from(a));
    v.insert(1usize, f16::cast_from(b));
    u32::reinterpret(v)
}

/// Unpacks a 16-byte vector of a stored row into shared memory: 16 codes, or 8 rotary channels.
#[cube]
fn unpack(
    quad: Quad,
    exponent: u32,
    k: usize,
    row: usize,
    kv: &mut Shared<[Eight]>,
    #[comptime] s: FlashShape,
) {
    let codes = comptime!(s.attend.row.codes() / 16);
    if k < codes {
        // The block's scale, and 2^8 for the difference of the biases.
        let scale = Two::new(f16::cast_from(f32::reinterpret((exponent + 8) << 23)));
        #[unroll]
        for i in 0..2usize {
            let mut out = Quad::empty();
            #[unroll]
            for j in 0..2usize {
                let word = quad.extract(comptime!(2 * i + j));
                out.insert(comptime!(2 * j), scaled(halves(word), scale));
                out.insert(comptime!(2 * j + 1), scaled(halves(word >> 16), scale));
            }
            kv[row * comptime!(s.pitch()) + 2 * k + i] = Eight::reinterpret(out);
        }
    } else {
        let mut out = Quad::empty();
        #[unroll]
        for i in 0..4usize {
            let word = quad.extract(i);
            out.insert(i, pair(f32::reinterpret(word << 16), f32::reinterpret(word & 0xffff_0000)));
        }
        kv[row * comptime!(s.pitch()) + 2 * codes + k - codes] = Eight::reinterpret(out);
    }
}

/// A unit's share of a tile of stored rows, on its way.
#[derive(CubeType)]
struct Coming {
    quads: Array<Quad>,
    exponents: Array<u32>,
}

/// Vectors of a tile.
const fn tile_quads(s: &FlashShape) -> usize {
    s.tile * s.attend.row.words / 4
}

/// All of a unit's loads are under way before the first is waited for. `data_at` and `scales_at`: where the rows are.
#[cube]
fn fetch_tile(
    coming: &mut Coming,
    arena: &[u32],
    arena_quads: &[Quad],
    data_at: &Shared<[u32]>,
    scales_at: &Shared<[u32]>,
    #[comptime] s: FlashShape,
) {
    let quads = comptime!(s.attend.row.words / 4);
    #[unroll]
    for i in 0..comptime!(tile_quads(&s).div_ceil(UNITS)) {
        // Units beyond the last vector repeat it, and rotary channels the last scale.
        let at = usize::min(UNIT_POS as usize + comptime!(i * UNITS), comptime!(tile_quads(&s) - 1));
        let (r, k) = (at / quads, at % quads);
        coming.quads[i] = arena_quads[data_at[r] as usize + k];
        let word = usize::min(k / 16, comptime!((s.attend.row.codes() / 16 - 1) / 16));
        coming.exponents[i] = (arena[scales_at[r] as usize + word] >> (k / 4 % 4 * 8) as u32) & 255;
    }
}

/// Unpacks what came into shared memory.
#[cube]
fn lay_tile(coming: &Coming, kv: &mut Shared<[Eight]>, #[comptime] s: FlashShape) {
    let quads_of_row = comptime!(s.attend.row.words / 4);
    #[unroll]
    for i in 0..comptime!(tile_quads(&s).div_ceil(UNITS)) {
        let at = UNIT_POS as usize + comptime!(i * UNITS);
        if at < comptime!(tile_quads(&s)) {
            unpack(coming.quads[i], coming.exponents[i], at % quads_of_row, at / quads_of_row, kv, s);
        }
    }
}

#[cube]
fn load_tile(
    shared: &Shared<[Eight]>,
    at: usize,
    #[comptime] end: usize,
    #[comptime] ident: cmma::MatrixIdent,
    #[comptime] layout: cmma::MatrixLayout,
    #[comptime] side: usize,
    #[comptime] stride: u32,
) -> cmma::Matrix<f16> {
    // SAFETY: it is filled before it is used.
    let mut tile = unsafe { cmma::Matrix::<f16>::uninitialized(ident, side, side, side, layout) };
    cmma::load(&mut tile, &shared[at..end], stride);
    tile
}

/// Largest value of the units that share a head.
#[cube]
fn head_max(value: f32, #[comptime] lanes: usize) -> f32 {
    let mut max = value;
    #[unroll]
    for i in 0..comptime!(lanes.ilog2() as usize) {
        max = f32::max(max, plane_shuffle_xor(max, comptime!(1u32 << i as u32)));
    }
    max
}

/// Sum over the units that share a head.
#[cube]
fn head_sum(value: f32, #[comptime] lanes: usize) -> f32 {
    let mut sum = value;
    #[unroll]
    for i in 0..comptime!(lanes.ilog2() as usize) {
        sum += plane_shuffle_xor(sum, comptime!(1u32 << i as u32));
    }
    sum
}

/// Where a session's rows begin.
#[derive(CubeType)]
struct Regions {
    window: u32,
    window_scales: u32,
    rows: u32,
    row_scales: u32,
}

/// Finds the rows of a tile, which the cube then meets to know; those beyond the last repeat it.
#[cube]
fn find_rows(
    tile: u32,
    row: usize,
    seen: &Seen,
    regions: &Regions,
    selection: &[u32],
    data_at: &mut Shared<[u32]>,
    scales_at: &mut Shared<[u32]>,
    #[comptime] s: FlashShape,
) {
    let unit = UNIT_POS as usize;
    if unit < comptime!(s.tile) {
        let i = u32::min(tile * comptime!(s.tile as u32) + UNIT_POS, seen.rows - 1);
        let slot = slot_of(i, seen, selection, row, comptime!(s.attend));
        let recent = i < seen.recent;
        let data = select(recent, regions.window, regions.rows);
        data_at[unit] = (data + slot * comptime!(s.attend.row.words as u32)) / 4;
        let scales = select(recent, regions.window_scales, regions.row_scales);
        scales_at[unit] = scales + slot * comptime!(s.attend.row.scale_words as u32);
    }
}

/// Attention of a tile of heads (x) of a row (y) over every `splits`th tile of its rows (z). Leaves sums
/// `partial [n, splits, heads, width]`, and `stats [n, splits, heads, 2]`: their reference and weight. A cube more along z
/// makes post and comb of the sublayer, if they wait.
#[cube(launch_unchecked)]
pub fn flash(
    q: &[Four],
    plan: &[u32],
    selection: &[u32],
    arena: &[u32],
    arena_quads: &[Quad],
    partial: &mut [f32],
    stats: &mut [f32],
    angles: &[f32],
    mut mixing: Sequence<Mixing>,
    layer: u32,
    first_row: u32,
    first_angle: u32,
    #[comptime] s: FlashShape,
) {
    let splits = CUBE_COUNT_Z - comptime!(mixing.len() as u32);
    if CUBE_POS_Z < splits {
        attend_split(
            q,
            plan,
            selection,
            arena,
            arena_quads,
            partial,
            stats,
            angles,
            layer,
            first_row,
            first_angle,
            splits,
            s,
        );
    } else if CUBE_POS_X == 0 {
        #[unroll]
        for i in 0..comptime!(mixing.len()) {
            post_comb_row(mixing.index_mut(i), (first_row + CUBE_POS_Y) as usize);
        }
    }
}

#[cube]
fn attend_split(
    q: &[Four],
    plan: &[u32],
    selection: &[u32],
    arena: &[u32],
    arena_quads: &[Quad],
    partial: &mut [f32],
    stats: &mut [f32],
    angles: &[f32],
    layer: u32,
    first_row: u32,
    first_angle: u32,
    splits: u32,
    #[comptime] s: FlashShape,
) {
    let unit = UNIT_POS as usize;
    let row = (first_row + CUBE_POS_Y) as usize;
    let first_head = CUBE_POS_X as usize * comptime!(s.side);
    let split = CUBE_POS_Z;
    let (position, base) = (plan[4 * row + 1], plan[4 * row + 2]);
    let (width, side, pitch) = (comptime!(s.width()), comptime!(s.side), comptime!(s.pitch()));

    let mut queries = Shared::<[Eight]>::new_slice(comptime!(s.side * s.pitch()));
    let mut kv = Shared::<[Eight]>::new_slice(comptime!(s.tile * s.pitch()));
    let mut scores = Shared::<[f32]>::new_slice(comptime!(s.planes * s.side * s.side));
    let mut weights = Shared::<[f16]>::new_slice(comptime!(s.side * (s.tile + 8)));
    let mut data_at = Shared::<[u32]>::new_slice(comptime!(s.tile));
    let mut scales_at = Shared::<[u32]>::new_slice(comptime!(s.tile));
    let mut shrinks = Shared::<[f32]>::new_slice(comptime!(s.side));
    let mut moved = Shared::<[u32]>::new_slice(comptime!(s.side));

    // The heads' queries, normed and rotated unless they are already, scaled, as f16. Units share a head.
    let (head, lane) = (unit / comptime!(s.lanes()), unit % comptime!(s.lanes()));
    let per_unit = comptime!(s.width() / 8 / s.lanes());
    let start = row * comptime!(s.attend.q_stride / 4) + (first_head + head) * comptime!(s.width() / 4);
    let mut held = Array::<Four>::new(comptime!(2 * per_unit));
    let mut squares = 0.0f32;
    #[unroll]
    for i in 0..comptime!(2 * per_unit) {
        let v = q[start + 2 * (lane + comptime!(i / 2 * s.lanes())) + comptime!(i % 2)];
        squares += dot_four(v, v);
        held[i] = v;
    }
    let seen = seen(position, comptime!(s.attend));
    let regions = Regions {
        window: part_of(arena, base, layer, comptime!(WINDOW)),
        window_scales: part_of(arena, base, layer, comptime!(WINDOW_SCALES)),
        rows: part_of(arena, base, layer, comptime!(ROWS)),
        row_scales: part_of(arena, base, layer, comptime!(ROW_SCALES)),
    };
    let mut coming = Coming {
        quads: Array::new(comptime!(tile_quads(&s).div_ceil(UNITS))),
        exponents: Array::new(comptime!(tile_quads(&s).div_ceil(UNITS))),
    };
    if comptime!(s.early) {
        // The first tile's rows come while the queries are prepared.
        find_rows(split, row, &seen, &regions, selection, &mut data_at, &mut scales_at, s);
        sync_cube();
        fetch_tile(&mut coming, arena, arena_quads, &data_at, &scales_at, s);
    }
    let mut factor = comptime!((s.width() as f32).powf(-0.5)).runtime();
    if comptime!(s.rotate) {
        factor *= rms_scale(head_sum(squares, s.lanes()), comptime!(s.width()), s.eps);
    }
    #[unroll]
    for i in 0..per_unit {
        let k = lane + comptime!(i * s.lanes());
        let mut out = Quad::empty();
        #[unroll]
        for j in 0..2usize {
            let mut v = held[comptime!(2 * i + j)] * Four::new(factor);
            if comptime!(s.rotate) {
                let four = 2 * k + j;
                if four >= comptime!(s.attend.row.codes() / 4) {
                    let at = first_angle as usize
                        + row * comptime!(s.attend.row.rotary)
                        + 4 * (four - comptime!(s.attend.row.codes() / 4));
                    v = rotate_four(v, angles, at, false);
                }
            }
            out.insert(comptime!(2 * j), pair(v.extract(0usize), v.extract(1usize)));
            out.insert(comptime!(2 * j + 1), pair(v.extract(2usize), v.extract(3usize)));
        }
        queries[head * pitch + k] = Eight::reinterpret(out);
    }

    let plane = PLANE_POS as usize;
    let (score_tile, depth) = (plane % comptime!(s.score_tiles()), plane / comptime!(s.score_tiles()));
    let out = ((CUBE_POS_Y * splits + split) as usize * comptime!(s.heads) + first_head) * width;
    let first_column = plane * comptime!(s.width() / s.planes);

    let mut sums = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(s.outputs()) {
        sums.push(cmma::Matrix::<f32>::from_value(
            cmma::MatrixIdent::Accumulator,
            side,
            side,
            side,
            cmma::MatrixLayout::Undefined,
            0.0f32,
        ));
    }
    let mut reference = comptime!(-1e30f32).runtime();
    let mut weight = 0.0f32;
    let tiles = (seen.rows + comptime!(s.tile as u32 - 1)) / comptime!(s.tile as u32);
    let mut tile = split;
    while tile < tiles {
        if comptime!(!s.early) {
            find_rows(tile, row, &seen, &regions, selection, &mut data_at, &mut scales_at, s);
            sync_cube();
            fetch_tile(&mut coming, arena, arena_quads, &data_at, &scales_at, s);
        }
        lay_tile(&coming, &mut kv, s);
        sync_cube();
        // Scores: each plane a part of the depth of one tile of them.
        let dots = cmma::Matrix::<f32>::from_value(
            cmma::MatrixIdent::Accumulator,
            side,
            side,
            side,
            cmma::MatrixLayout::Undefined,
            0.0f32,
        );
        #[unroll]
        for k in 0..comptime!(s.width() / s.side / s.depths()) {
            let at = depth * comptime!(s.width() / 8 / s.depths()) + comptime!(k * s.side / 8);
            let a = load_tile(
                &queries,
                at,
                comptime!(s.side * s.pitch()),
                cmma::MatrixIdent::A,
                cmma::MatrixLayout::RowMajor,
                s.side,
                comptime!(8 * s.pitch() as u32),
            );
            let b = load_tile(
                &kv,
                score_tile * comptime!(s.side * s.pitch()) + at,
                comptime!(s.tile * s.pitch()),
                cmma::MatrixIdent::B,
                cmma::MatrixLayout::ColMajor,
                s.side,
                comptime!(8 * s.pitch() as u32),
            );
            cmma::execute(&a, &b, &dots, &dots);
        }
        let area = comptime!(s.side * s.side);
        cmma::store(
            &mut scores[plane * area..plane * area + area],
            &dots,
            comptime!(s.side as u32),
            cmma::MatrixLayout::RowMajor,
        );
        sync_cube();
        // Weights: the units of a head share its scores.
        let per_unit = comptime!(s.tile.div_ceil(s.lanes()));
        let mut own = Array::<f32>::new(per_unit);
        let mut max = comptime!(-1e30f32).runtime();
        #[unroll]
        for i in 0..per_unit {
            let c = lane + comptime!(i * s.lanes());
            let mut score = comptime!(-1e30f32).runtime();
            if c < comptime!(s.tile) && tile * comptime!(s.tile as u32) + (c as u32) < seen.rows {
                let (t, within) = (c / side, head * side + c % side);
                score = 0.0f32;
                #[unroll]
                for d in 0..comptime!(s.depths()) {
                    score += scores[(t + comptime!(d * s.score_tiles())) * area + within];
                }
            }
            own[i] = score;
            max = f32::max(max, score);
        }
        max = head_max(max, s.lanes());
        let move_it = max > reference + SLACK;
        let next = select(move_it, max, reference);
        let shrink = f32::exp(reference - next);
        reference = next;
        weight *= shrink;
        #[unroll]
        for i in 0..per_unit {
            let c = lane + comptime!(i * s.lanes());
            let p = f16::cast_from(f32::exp(own[i] - reference));
            if c < comptime!(s.tile) {
                weights[head * comptime!(s.tile + 8) + c] = p;
                weight += f32::cast_from(p);
            }
        }
        if lane == 0 {
            shrinks[head] = shrink;
            moved[head] = select(move_it, 1u32, 0u32);
        }
        sync_cube();
        let mut any = 0u32;
        #[unroll]
        for h in 0..comptime!(s.side) {
            any |= moved[h];
        }
        // Nothing was summed before the first tile, so nothing needs to shrink.
        if any != 0 && tile != split {
            #[unroll]
            for o in 0..comptime!(s.outputs()) {
                let at = out + first_column + comptime!(o * s.side);
                let length = partial.len();
                cmma::store(
                    &mut partial[at..length],
                    sums.index(o),
                    comptime!(s.width() as u32),
                    cmma::MatrixLayout::RowMajor,
                );
                sync_plane();
                let mut i = UNIT_POS_PLANE as usize;
                while i < area {
                    let (r, c) = (i / side, i % side);
                    partial[at + r * width + c] = partial[at + r * width + c] * shrinks[r];
                    i += PLANE_DIM as usize;
                }
                sync_plane();
                let sum = sums.index_mut(o);
                cmma::load_with_layout(
                    sum,
                    &partial[at..length],
                    comptime!(s.width() as u32),
                    cmma::MatrixLayout::RowMajor,
                );
            }
        }
        #[unroll]
        for k in 0..comptime!(s.tile / s.side) {
            // SAFETY: it is filled before it is used.
            let mut p = unsafe {
                cmma::Matrix::<f16>::uninitialized(
                    cmma::MatrixIdent::A,
                    side,
                    side,
                    side,
                    cmma::MatrixLayout::RowMajor,
                )
            };
            cmma::load(
                &mut p,
                &weights[comptime!(k * s.side)..comptime!(s.side * (s.tile + 8))],
                comptime!(s.tile as u32 + 8),
            );
            #[unroll]
            for o in 0..comptime!(s.outputs()) {
                let at = comptime!(k * s.side * s.pitch() + o * s.side / 8) + first_column / 8;
                let v = load_tile(
                    &kv,
                    at,
                    comptime!(s.tile * s.pitch()),
                    cmma::MatrixIdent::B,
                    cmma::MatrixLayout::RowMajor,
                    s.side,
                    comptime!(8 * s.pitch() as u32),
                );
                let sum = sums.index(o);
                cmma::execute(&p, &v, sum, sum);
            }
        }
        sync_cube();
        tile += splits;
        if comptime!(s.early) && tile < tiles {
            find_rows(tile, row, &seen, &regions, selection, &mut data_at, &mut scales_at, s);
            sync_cube();
            fetch_tile(&mut coming, arena, arena_quads, &data_at, &scales_at, s);
        }
    }
    let length = partial.len();
    #[unroll]
    for o in 0..comptime!(s.outputs()) {
        let at = out + first_column + comptime!(o * s.side);
        cmma::store(
            &mut partial[at..length],
            sums.index(o),
            comptime!(s.width() as u32),
            cmma::MatrixLayout::RowMajor,
        );
    }
    let total = head_sum(weight, s.lanes());
    if lane == 0 {
        let at = 2 * ((CUBE_POS_Y * splits + split) as usize * comptime!(s.heads) + first_head + head);
        stats[at] = reference;
        stats[at + 1] = total;
    }
}

/// Splits of a unit whose sums are on their way at once.
pub const SPLITS_AHEAD: usize = 6;

/// Groups of units that take splits in turn, where there are several.
pub const SPLIT_GROUPS: usize = 4;

/// Most splits of a row's attention.
pub const MOST_SPLITS: usize = 256;

/// What the sums of a head's splits are relative to, and the weights in them.
#[derive(CubeType)]
pub struct SplitSums {
    /// Of each split.
    pub references: Shared<[f32]>,
    /// Of each split.
    pub weights: Shared<[f32]>,
}

/// What all splits of a head are joined relative to, and the weights in that.
#[derive(CubeType)]
pub struct JoinedSum {
    reference: f32,
    /// Sum of the weights.
    pub total: f32,
}

/// Those of `splits` splits, of which the first is number `first`, to shared memory; the cube has to meet.
#[cube]
pub fn fetch_sums(stats: &[f32], first: usize, splits: usize, #[comptime] heads: usize) -> SplitSums {
    let mut references = Shared::<[f32]>::new_slice(MOST_SPLITS);
    let mut weights = Shared::<[f32]>::new_slice(MOST_SPLITS);
    let mut i = UNIT_POS as usize;
    while i < splits {
        references[i] = stats[2 * (first + i * heads)];
        weights[i] = stats[2 * (first + i * heads) + 1];
        i += CUBE_DIM as usize;
    }
    SplitSums { references, weights }
}

#[cube]
impl SplitSums {
    /// Of all splits and the sink.
    pub fn join(&self, splits: usize, sink: f32) -> JoinedSum {
        let mut max = sink;
        for i in 0..splits {
            max = f32::max(max, self.references[i]);
        }
        let mut total = f32::exp(sink - max);
        for i in 0..splits {
            total += self.weights[i] * f32::exp(self.references[i] - max);
        }
        JoinedSum { reference: max, total }
    }

    /// What a split's sums count.
    pub fn factor(&self, split: usize, all: &JoinedSum) -> f32 {
        f32::exp(self.references[split] - all.reference)
    }
}

/// Joins the splits of a head (x) of a row (y), with the sink; rotated back. Groups of units take splits in turn.
#[cube(launch_unchecked)]
pub fn combine(
    partial: &[Four],
    stats: &[f32],
    sinks: &[f32],
    angles: &[f32],
    mut out: Output,
    first_row: u32,
    first_angle: u32,
    splits: u32,
    #[comptime] s: FlashShape,
    #[comptime] groups: usize,
) {
    let head = CUBE_POS_X as usize;
    let splits = splits as usize;
    let row = (first_row + CUBE_POS_Y) as usize;
    let first = CUBE_POS_Y as usize * splits * comptime!(s.heads) + head;
    let sink = sinks[head];
    let (fours, lanes) = (comptime!(s.width() / 4), comptime!(s.lanes_of_row()));
    let (k, group) = (UNIT_POS as usize % lanes, UNIT_POS as usize / lanes);
    let own = usize::min(k, fours - 1);
    // The first splits are on their way while the weights are made; those beyond the last repeat it.
    let ahead = comptime!(if s.early { SPLITS_AHEAD } else { 0 });
    let mut coming = Array::<Four>::new(SPLITS_AHEAD);
    #[unroll]
    for i in 0..ahead {
        let split = usize::min(group + comptime!(i * groups), splits - 1);
        coming[i] = partial[(first + split * comptime!(s.heads)) * fours + own];
    }
    let sums = fetch_sums(stats, first, splits, comptime!(s.heads));
    sync_cube();
    let all = sums.join(splits, sink);
    let mut sum = Four::new(0.0f32);
    #[unroll]
    for i in 0..ahead {
        let split = group + comptime!(i * groups);
        if split < splits {
            sum += coming[i] * Four::new(sums.factor(split, &all));
        }
    }
    let mut i = group + comptime!(if s.early { SPLITS_AHEAD * groups } else { 0 });
    while i < splits {
        let at = first + i * comptime!(s.heads);
        sum += partial[at * fours + own] * Four::new(sums.factor(i, &all));
        i += groups;
    }
    if comptime!(groups > 1) {
        let mut sums = Shared::<[Four]>::new_slice(comptime!(groups * s.lanes_of_row()));
        sums[UNIT_POS as usize] = sum;
        sync_cube();
        sum = Four::new(0.0f32);
        #[unroll]
        for g in 0..groups {
            sum += sums[comptime!(g * s.lanes_of_row()) + k];
        }
    }
    let mut v = sum * Four::new(1.0f32 / all.total);
    let valid = k < fours && group == 0;
    if valid && k >= comptime!(s.attend.row.codes() / 4) {
        let at = first_angle as usize
            + row * comptime!(s.attend.row.rotary)
            + 4 * (k - comptime!(s.attend.row.codes() / 4));
        v = rotate_four(v, angles, at, true);
    }
    store_four(&mut out, row, head * fours + own, v, valid);
}
