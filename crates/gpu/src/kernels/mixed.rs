//! Products of the input of a sublayer, one row, on NVIDIA: each cube mixes that input itself, while its weights are on
//! their way (A.2 and A.3).
//!
//! A cube a processor, of which each takes every so many rows of all matrices: so mixing is made no more often than
//! needed, and all processors read as many bytes. All rows are asked for at once, by copies to shared memory: loads to
//! registers would keep units from mixing, since a unit's next instruction waits until memory has taken its load.

use super::common::store_four;
use super::copies::{begin, copy, expect, place_of, shared_half, shared_quad, value, wait};
use super::dot::{Eight, Four, Output, Quad, dot_bytes, dot_halves};
use super::fetch::load_x;
use super::hyper::{Hyper, MIX_UNITS, fetch_parts, fetch_pre, mix_four, mix_scale, pre_of, sum_parts};
use super::plane::{lane, plane, plane_total};
use super::project::Job;
use super::tables::{shared_address, stage_four, staged_bytes, staged_quads, staged_scales};
use crate::layout::Format;
use cubecl::prelude::*;
use half::f16;

/// Units of a plane.
const PLANE: usize = 32;
/// Planes of a cube.
const PLANES: usize = MIX_UNITS / PLANE;

/// What the input of a sublayer is mixed of.
#[derive(CubeType, CubeLaunch)]
pub struct Unmixed {
    /// The streams of the row.
    pub streams: Box<[Four]>,
    /// Parts of its numbers.
    pub partial: Box<[f32]>,
    /// Scales and offsets of the control numbers.
    pub control: Box<[f32]>,
    /// The norm's weight.
    pub norm: Box<[Four]>,
    /// Where the numbers go.
    pub totals: Box<[f32]>,
    /// The streams' shape.
    #[cube(comptime)]
    pub s: Hyper,
}

/// Vectors of weights of a lane for a row of int8; a row of f16 has twice as many.
const fn turns(width: usize) -> usize {
    width / (16 * PLANE)
}

/// Vectors of a unit that mixes.
const fn vectors(width: usize) -> usize {
    width / 4 / MIX_UNITS
}

/// Widths that these kernels take: whole turns, few enough for registers, and as many vectors for each unit.
pub const fn fits(width: usize) -> bool {
    width.is_multiple_of(4 * MIX_UNITS) && turns(width) <= 8
}

/// Bytes of shared memory for the input, with room to spare.
const fn input_bytes(width: usize) -> usize {
    4 * width + staged_bytes(1, width) + 16 * MIX_UNITS
}

/// The input in shared memory: int8 as [`stage_four`] lays it; f32, vectors of even places first.
#[derive(CubeType)]
struct Mixed {
    quants: Shared<[Quad]>,
    scales: Shared<[f32]>,
    values: Shared<[Four]>,
    /// The row's numbers.
    totals: Shared<[f32]>,
    #[cube(comptime)]
    width: usize,
}

/// A row of weights: where this lane's vectors begin.
#[derive(CubeType)]
struct Row {
    quads: u64,
    scales: u64,
    /// Its matrix; the number of matrices where there is no such row.
    job: u32,
    /// Which row of that.
    at: u32,
    half: bool,
}

/// A lane's vectors of a row of int8.
#[derive(CubeType)]
struct Held {
    quads: Array<Quad>,
    scales: Array<f16>,
    row: Row,
    valid: bool,
}

/// A unit's share of what the mix is made of, on its way.
#[derive(CubeType)]
struct Coming {
    parts: Array<f32>,
    streams: Array<Four>,
    norm: Array<Four>,
    control: Array<f32>,
}

/// The rows of a cube, those of f16 before all others, and how many of them find room in shared memory; each of the first
/// planes takes one of the rest to registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shares {
    /// Cubes.
    pub cubes: u32,
    /// Rows of each.
    items: u32,
    /// Those of f16.
    halves: u32,
    /// Those that find room.
    copied: u32,
    /// Width of the model.
    width: usize,
}

impl Shares {
    /// As many as `shared` bytes of shared memory have room for, if there are registers for the rest.
    pub fn new(cubes: u32, items: u32, halves: u32, width: usize, shared: usize) -> Option<Shares> {
        let least = halves.max(items.saturating_sub(PLANES as u32));
        let with = |copied| Shares { cubes, items, halves, copied, width };
        (least..=items).rev().map(with).find(|s| s.shared_bytes() <= shared)
    }

    /// Rows that find no room there.
    const fn held(&self) -> u32 {
        self.items - self.copied
    }
    /// Bytes of a row of int8 without its scales; one of f16 has twice as many.
    const fn row(&self) -> u32 {
        self.width as u32
    }
    /// Bytes of the scales.
    const fn scales(&self) -> u32 {
        self.width as u32 / 16
    }
    /// Where row `i` of those copied begins.
    const fn place(&self, i: u32) -> u32 {
        let halves = if i < self.halves { i } else { self.halves };
        halves * 2 * self.row() + (i - halves) * (self.row() + self.scales())
    }
    /// Bytes of shared memory in all, with those of the input.
    const fn shared_bytes(&self) -> usize {
        self.place(self.copied) as usize + 8 * self.copied as usize + input_bytes(self.width)
    }
}

/// `out = W x` for every job; `x`, which is filled, is the mix of the streams.
#[cube(launch_unchecked)]
pub fn project_mixed(mut mixed: Unmixed, mut x: Output, mut jobs: Sequence<Job>, #[comptime] shares: Shares) {
    let s = comptime!(mixed.s);
    // Few, and all wait for them: before the weights.
    let coming = fetch(&mixed);
    let copies = Copies::ask(&jobs, shares);
    let input = mix(&coming, s);
    // Rows for which there was no room.
    let held = hold_row(&jobs, shares);
    copies.multiply(&input, &mut jobs, shares);
    if held.valid {
        let mut sum = 0.0f32;
        #[unroll]
        for k in 0..comptime!(turns(s.d)) {
            sum += input.product(held.quads[k], held.scales[k], k);
        }
        store(&mut jobs, &held.row, sum);
    }
    // The first cube leaves for others what all have made.
    if CUBE_POS_X == 0 {
        if UNIT_POS < comptime!(s.numbers() as u32) {
            mixed.totals[UNIT_POS as usize] = input.totals[UNIT_POS as usize];
        }
        #[unroll]
        for v in 0..comptime!(vectors(s.d)) {
            let k = UNIT_POS as usize + comptime!(v * MIX_UNITS);
            store_four(&mut x, 0usize, k, input.values[k % 2 * comptime!(s.d / 8) + k / 2], true);
        }
    }
}

#[cube]
fn fetch(mixed: &Unmixed) -> Coming {
    let s = comptime!(mixed.s);
    let vectors = comptime!(vectors(s.d));
    let parts = fetch_parts(&mixed.partial, 0usize, s);
    let mut streams = Array::<Four>::new(comptime!(vectors * s.n));
    let mut norm = Array::<Four>::new(vectors);
    #[unroll]
    for v in 0..vectors {
        let k = UNIT_POS as usize + comptime!(v * MIX_UNITS);
        #[unroll]
        for i in 0..comptime!(s.n) {
            streams[comptime!(v * s.n + i)] = load_x(&mixed.streams, comptime!(i * s.d / 4) + k, true);
        }
        norm[v] = load_x(&mixed.norm, k, true);
    }
    Coming { parts, streams, norm, control: fetch_pre(&mixed.control, s) }
}

/// Rows on their way to shared memory.
#[derive(CubeType)]
struct Copies {
    /// Addresses there of the first, and of what counts their bytes.
    rows: u32,
    bars: u32,
    /// The first of this plane's.
    first: u32,
}

#[cube]
impl Copies {
    /// Asks for all of the cube's rows that find room.
    fn ask(jobs: &Sequence<Job>, #[comptime] shares: Shares) -> Copies {
        let (bytes, copied) = comptime!((shares.place(shares.copied) as usize, shares.copied as usize));
        let rows = Shared::<[Quad]>::new_slice(comptime!(usize::max(bytes / 16, 1)));
        let bars = Shared::<[u64]>::new_slice(comptime!(usize::max(copied, 1)));
        let (rows, bars) = (shared_address(&rows), shared_address(&bars));
        // The last planes begin: they have no row in registers.
        let first = comptime!(PLANES as u32 - 1) - plane() as u32;
        let mut i = first;
        while i < comptime!(shares.copied) {
            copy_row(jobs, i, rows, bars, shares);
            i += comptime!(PLANES as u32);
        }
        Copies { rows, bars, first }
    }

    /// Multiplies them as they come.
    fn multiply(&self, input: &Mixed, jobs: &mut Sequence<Job>, #[comptime] shares: Shares) {
        let turns = comptime!(turns(shares.width));
        let mut i = self.first;
        while i < comptime!(shares.copied) {
            let row = find(&*jobs, i, shares.cubes);
            if row.job < comptime!(jobs.len() as u32) {
                wait(self.bars + 8 * i, 0u32);
                let place = self.rows + place_of_copy(i, shares);
                let at = place + 16 * lane() as u32;
                let mut sum = 0.0f32;
                if row.half {
                    #[unroll]
                    for k in 0..comptime!(2 * turns) {
                        sum += input.half_product(shared_quad(at, comptime!(16 * PLANE * k)), k);
                    }
                } else {
                    let scales = place + comptime!(shares.row()) + (lane() / 2 * 2) as u32;
                    #[unroll]
                    for k in 0..turns {
                        let quad = shared_quad(at, comptime!(16 * PLANE * k));
                        sum += input.product(quad, shared_half(scales, comptime!(PLANE * k)), k);
                    }
                }
                store(jobs, &row, sum);
            }
            i += comptime!(PLANES as u32);
        }
    }
}

/// A row in registers, for each of the first planes.
#[cube]
fn hold_row(jobs: &Sequence<Job>, #[comptime] shares: Shares) -> Held {
    let turns = comptime!(turns(shares.width));
    let own = plane() as u32;
    let row = find(jobs, shares.copied + own, shares.cubes);
    let valid = own < comptime!(shares.held()) && row.job < comptime!(jobs.len() as u32);
    let mut quads = Array::<Quad>::new(turns);
    let mut scales = Array::<f16>::new(turns);
    if valid {
        #[unroll]
        for k in 0..turns {
            quads[k] = load_quad(row.quads, comptime!(16 * PLANE * k));
            scales[k] = load_half(row.scales, comptime!(PLANE * k));
        }
        pin(row.quads);
    }
    Held { quads, scales, row, valid }
}

/// Stores what a plane's row gave.
#[cube]
fn store(jobs: &mut Sequence<Job>, row: &Row, sum: f32) {
    let total = plane_total(sum);
    #[unroll]
    for j in 0..comptime!(jobs.len()) {
        if row.job == comptime!(j as u32) && lane() == 0 {
            jobs.index_mut(j).out[row.at as usize] = total;
        }
    }
}

/// [`Shares::place`], on the device.
#[cube]
fn place_of_copy(i: u32, #[comptime] s: Shares) -> u32 {
    let halves = u32::min(i, s.halves);
    halves * comptime!(2 * s.row()) + (i - halves) * comptime!(s.row() + s.scales())
}

/// Asks for row `i`; the whole plane takes part.
#[cube]
fn copy_row(jobs: &Sequence<Job>, i: u32, rows: u32, bars: u32, #[comptime] s: Shares) {
    let row = find(jobs, i, s.cubes);
    if row.job < comptime!(jobs.len() as u32) && lane() == 0 {
        let bar = bars + 8 * i;
        let to = rows + place_of_copy(i, s);
        begin(bar, 1u32);
        if row.half {
            expect(bar, comptime!(2 * s.row()));
            copy(to, value(row.quads), comptime!(2 * s.row()), bar);
        } else {
            expect(bar, comptime!(s.row() + s.scales()));
            copy(to, value(row.quads), s.row(), bar);
            copy(to + comptime!(s.row()), value(row.scales), s.scales(), bar);
        }
    }
}

/// Row `item` of this cube's: of every matrix it takes each `cubes`th.
#[cube]
fn find(jobs: &Sequence<Job>, item: u32, #[comptime] cubes: u32) -> Row {
    let mut quads = 0u64;
    let mut scales = 0u64;
    let mut own = comptime!(jobs.len() as u32).runtime();
    let mut at = 0u32;
    let mut half = false.runtime();
    #[unroll]
    for j in 0..comptime!(jobs.len()) {
        let job = jobs.index(j);
        let row = (item - job.first) * cubes + CUBE_POS_X;
        if item >= job.first && row < comptime!(job.rows as u32) {
            let w = &job.weights;
            let from = row as usize * comptime!(w.input / w.format.unit()) + lane();
            own = comptime!(j as u32).runtime();
            at = row;
            if comptime!(w.format == Format::F16) {
                half = true.runtime();
                quads = place_of::<Eight>(w.halves.index(0usize), from);
            } else {
                half = false.runtime();
                quads = place_of::<Quad>(w.quants.index(0usize), from);
                scales = place_of::<f16>(w.scales.index(0usize), from / 2);
            }
        }
    }
    Row { quads, scales, job: own, at, half }
}

/// Makes the mix; every cube does, for itself.
#[cube]
fn mix(coming: &Coming, #[comptime] s: Hyper) -> Mixed {
    let mut quants = Shared::<[Quad]>::new_slice(comptime!(staged_quads(s.d)));
    let mut scales = Shared::<[f32]>::new_slice(comptime!(staged_scales(s.d)));
    let mut values = Shared::<[Four]>::new_slice(comptime!(s.d / 4));
    let totals = sum_parts(&coming.parts, s);
    let pre = pre_of(&totals, &coming.control, s);
    let scale = mix_scale(&totals, &pre, s);
    #[unroll]
    for v in 0..comptime!(vectors(s.d)) {
        let k = UNIT_POS as usize + comptime!(v * MIX_UNITS);
        let four = mix_four(&coming.streams, &pre, coming.norm[v], scale, comptime!(v * s.n), s);
        stage_four(&mut quants, &mut scales, 0usize, k, four, s.d);
        values[k % 2 * comptime!(s.d / 8) + k / 2] = four;
    }
    sync_cube();
    Mixed { quants, scales, values, totals, width: comptime!(s.d) }
}

#[cube]
impl Mixed {
    /// Products with a lane's vector `k` of a row of int8.
    fn product(&self, quad: Quad, scale: f16, #[comptime] k: usize) -> f32 {
        let u = lane() + comptime!(k * PLANE);
        let scale = f32::cast_from(scale) * self.scales[u / 2 + u / 4];
        scale * f32::cast_from(dot_bytes(quad, self.quants[u + u / 4], 0i32))
    }

    /// The same of a row of f16.
    fn half_product(&self, quad: Quad, #[comptime] k: usize) -> f32 {
        let u = lane() + comptime!(k * PLANE);
        let odd = comptime!(self.width / 8);
        dot_halves(Eight::reinterpret(quad), self.values[u], self.values[odd + u])
    }
}

#[cube]
fn load_quad(from: u64, #[comptime] by: usize) -> Quad {
    let from = value(from);
    let out: Quad;
    gpu_asm!("ld.global.L1::no_allocate.v4.u32 {}, [{}+{by}];", out(_) out, in(_) from, by = const by, options(nomem));
    out
}

#[cube]
fn load_half(from: u64, #[comptime] by: usize) -> f16 {
    let from = value(from);
    let out: u16;
    gpu_asm!("ld.global.u16 {}, [{}+{by}];", out(_) out, in(_) from, by = const by, options(nomem));
    f16::reinterpret(out)
}

/// As the one of [`fetch`](super::fetch), for weights whose place is a number.
#[cube]
fn pin(at: u64) {
    let at = value(at);
    gpu_asm!("{{.reg .pred p; setp.eq.u64 p, {at}, 0; @p st.u32 [{at}], 0;}}", at = in(_) at);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of an H100's shared memory that a cube can have.
    const SHARED: usize = 227 << 10;

    #[test]
    fn rows_lie_side_by_side_in_shared_memory() {
        // Router and shared expert; a compressing layer; one that selects, whose last rows find no room.
        for (items, halves, copied) in [(34, 2, 34), (20, 8, 20), (33, 21, 27)] {
            let s = Shares::new(132, items, halves, 4096, SHARED).unwrap();
            assert_eq!(s.copied, copied);
            assert_eq!(s.place(0), 0);
            for i in 0..copied {
                let bytes = if i < halves { 2 * 4096 } else { 4096 + 256 };
                assert_eq!(s.place(i + 1) - s.place(i), bytes);
            }
            assert!(s.shared_bytes() <= SHARED);
        }
    }

    #[test]
    fn what_finds_no_room_is_for_others() {
        // Only rows of int8 are held, one for each plane.
        assert_eq!(Shares::new(132, 33, 30, 4096, SHARED), None);
        assert_eq!(Shares::new(132, 64, 0, 4096, SHARED), None);
        assert_eq!(Shares::new(132, 34, 2, 4096, 99 << 10), None);
    }
}
