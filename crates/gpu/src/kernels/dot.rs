//! Dot products of stored weight rows with activations: one function per format, each a plane's share.
//!
//! Lane `l` of a plane takes units `l, l + PLANE_DIM, ...` of a row, so that a plane reads consecutive
//! 16-byte vectors; the caller sums over the plane. A unit is one such vector of quants:
//!
//! | format | weights a unit | activations | bytes of a row besides quants |
//! |---|---:|---|---|
//! | F32 | 4 | f32 | |
//! | F16 | 8 | f32 | |
//! | Q8_0 | 16 | int8 per 32 | f16 scale per 32 |
//! | IQ2_XXS | 64 | int8 per 32 | f16 scale per 256, 8 nibbles |
//! | Q2_K | 64 | int8 per 32 | f16 scale and minimum per 256, 16 nibble pairs |
//! | Q4_K | 32 | int8 per 32 | f16 scale and minimum per 256, 8 scales and 8 minima of a byte |
//!
//! The order of every sum depends on the row alone, never on how many rows of activations there are.

use super::fetch::{Held, fetch_rows, load_x};
use super::plane::{lane, lanes};
use super::tables::{Staged, Tables};
use crate::layout::Format;
use cubecl::prelude::*;
use half::f16;

/// Four words: 16 bytes, the widest load.
pub type Quad = Vector<u32, Const<4>>;
/// Eight halves: 16 bytes too.
pub type Eight = Vector<f16, Const<8>>;
/// Four floats.
pub type Four = Vector<f32, Const<4>>;

/// A matrix on the device, see [`crate::layout`].
#[derive(CubeType, CubeLaunch)]
pub struct Weights {
    /// Quants or f32 values; absent where there are halves.
    pub quants: Sequence<Box<[Quad]>>,
    /// f16 values: of their own type, since not every compiler reinterprets words as halves.
    pub halves: Sequence<Box<[Eight]>>,
    /// Scales, if the format has any: a kernel binds no buffer that it does not need.
    pub scales: Sequence<Box<[f16]>>,
    /// Scales within blocks, bytes in words, if the format has any.
    pub sub: Sequence<Box<[u32]>>,
    /// How they are stored.
    #[cube(comptime)]
    pub format: Format,
    /// Values of a row, padded to whole units.
    #[cube(comptime)]
    pub input: usize,
    /// Units of a plane, where that is certain; else 0.
    #[cube(comptime)]
    pub plane: usize,
}

/// Units that a lane takes in a turn: two, so that the turns on their way need few registers and many planes find room.
pub const fn steps(format: Format, input: usize, plane: usize) -> usize {
    let units = input / format.unit();
    match plane {
        0 => 1,
        _ if units.is_multiple_of(2 * plane) => 2,
        _ => 1,
    }
}

/// Activations, in all forms that products want.
#[derive(CubeType, CubeLaunch)]
pub struct Input {
    /// `[n, stride]`.
    pub values: Box<[Four]>,
    /// The same, int8.
    pub quants: Box<[Quad]>,
    /// Its scales `[n, stride / 32]`.
    pub scales: Box<[f32]>,
    /// Sums of each 16 quants `[n, stride / 16]`.
    pub sums: Box<[i32]>,
    /// Values from row to row.
    #[cube(comptime)]
    pub stride: usize,
}

/// The same buffers, to be written.
#[derive(CubeType, CubeLaunch)]
pub struct Output {
    /// `[n, stride]`.
    pub values: Box<[Four]>,
    /// The same, int8, four a word.
    pub words: Box<[u32]>,
    /// Its scales `[n, stride / 32]`.
    pub scales: Box<[f32]>,
    /// Sums of each 16 quants `[n, stride / 16]`.
    pub sums: Box<[i32]>,
    /// The same, f16.
    pub halves: Box<[Vector<f16, Const<4>>]>,
    /// Values from row to row.
    #[cube(comptime)]
    pub stride: usize,
    /// Which of them are wanted.
    #[cube(comptime)]
    pub form: Form,
}

/// Forms of activations that a kernel fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// f32.
    Plain,
    /// f32, and int8 for products of few rows.
    Quantized,
    /// f16, for the matrix units.
    Halves,
    /// f16, and f32 for somebody who looks.
    Both,
}

/// Turns of a lane for a row, where all lanes have as many; else 0.
pub const fn turns(format: Format, input: usize, plane: usize) -> usize {
    let units = input / format.unit();
    if plane > 0 && units.is_multiple_of(plane) { units / plane / steps(format, input, plane) } else { 0 }
}

/// Turns on their way.
const AHEAD: usize = 2;

/// Most turns of a row whose loop is unrolled, so that the next turn's weights are on their way while one is multiplied.
const MOST_UNROLLED: usize = 8;

/// The first turns of `rows` rows of `w`, from `first` on, on their way, for [`dot_fetched`] with so many columns.
#[cube]
pub fn fetch_ahead(
    w: &Weights,
    first: usize,
    #[comptime] rows: usize,
    #[comptime] columns: usize,
) -> Sequence<Held> {
    let mut coming = Sequence::<Held>::new();
    let turns = comptime!(turns(w.format, w.input, w.plane));
    if comptime!(turns > 0 && turns <= MOST_UNROLLED && columns == 1) {
        let span = comptime!(steps(w.format, w.input, w.plane) * usize::max(w.plane, 1));
        #[unroll]
        for t in 0..comptime!(usize::min(AHEAD, turns)) {
            coming.push(fetch_rows(w, first, lane() + comptime!(t * span), rows));
        }
    }
    coming
}

/// Adds to `acc[row * columns + column]` this lane's share of the products of `rows` rows of `w`, from `first`
/// on, with `columns` rows of `x`: column `c` is row `index[c]` (of those staged, if there are any), from value `offset`
/// on.
#[cube]
pub fn dot_rows(
    w: &Weights,
    x: &Input,
    tables: &Tables,
    staged: &Staged,
    first: usize,
    index: &Array<u32>,
    offset: usize,
    acc: &mut Array<f32>,
    #[comptime] rows: usize,
    #[comptime] columns: usize,
) {
    let mut coming = fetch_ahead(w, first, rows, columns);
    dot_fetched(w, x, &mut coming, tables, staged, first, index, offset, acc, rows, columns);
}

/// [`dot_rows`] of rows whose first turns are on their way.
#[cube]
pub fn dot_fetched(
    w: &Weights,
    x: &Input,
    coming: &mut Sequence<Held>,
    tables: &Tables,
    staged: &Staged,
    first: usize,
    index: &Array<u32>,
    offset: usize,
    acc: &mut Array<f32>,
    #[comptime] rows: usize,
    #[comptime] columns: usize,
) {
    let (turns, span) = comptime!((
        turns(w.format, w.input, w.plane),
        steps(w.format, w.input, w.plane) * usize::max(w.plane, 1)
    ));
    if comptime!(turns > 0 && turns <= MOST_UNROLLED && columns == 1) {
        #[unroll]
        for t in 0..turns {
            if comptime!(t + AHEAD < turns) {
                coming.push(fetch_rows(w, first, lane() + comptime!((t + AHEAD) * span), rows));
            }
            let u = lane() + comptime!(t * span);
            dot_turn(w, coming.index(t), x, tables, staged, u, index, offset, acc, rows, columns);
        }
    } else {
        let mut begin = 0usize;
        while begin < comptime!(w.input / w.format.unit()) {
            let u = begin + lane();
            if takes_part(w, u) {
                let held = fetch_rows(w, first, u, rows);
                dot_turn(w, &held, x, tables, staged, u, index, offset, acc, rows, columns);
            }
            begin += comptime!(steps(w.format, w.input, w.plane)) * lanes();
        }
    }
}

/// Whether the lane whose unit is `u` has a turn: known beforehand where rows are whole turns, so that a plane goes one way.
#[cube]
fn takes_part(w: &Weights, u: usize) -> bool {
    let units = comptime!(w.input / w.format.unit());
    if comptime!(turns(w.format, w.input, w.plane) > 0) { true.runtime() } else { u < units }
}

/// [`dot_rows`] of one row and one row of activations.
#[cube]
pub fn dot_row(
    w: &Weights,
    x: &Input,
    tables: &Tables,
    staged: &Staged,
    row: usize,
    index: &Array<u32>,
) -> f32 {
    let mut acc = Array::<f32>::new(1usize);
    acc[0] = 0.0f32;
    dot_rows(w, x, tables, staged, row, index, 0usize, &mut acc, 1usize, 1usize);
    acc[0]
}

/// A turn, of units from `u` on.
#[cube]
pub fn dot_turn(
    w: &Weights,
    held: &Held,
    x: &Input,
    tables: &Tables,
    staged: &Staged,
    u: usize,
    index: &Array<u32>,
    offset: usize,
    acc: &mut Array<f32>,
    #[comptime] rows: usize,
    #[comptime] columns: usize,
) {
    #[unroll]
    for step in 0..comptime!(steps(w.format, w.input, w.plane)) {
        let (u, i) = (u + comptime!(step * w.plane), comptime!(step * rows));
        dot_unit(held, x, tables, staged, u, index, offset, acc, i, rows, columns, w.format);
    }
}

/// Unit `u` of `rows` rows, held from place `i` on.
#[cube]
pub fn dot_unit(
    held: &Held,
    x: &Input,
    tables: &Tables,
    staged: &Staged,
    u: usize,
    index: &Array<u32>,
    offset: usize,
    acc: &mut Array<f32>,
    #[comptime] i: usize,
    #[comptime] rows: usize,
    #[comptime] columns: usize,
    #[comptime] format: Format,
) {
    match comptime!(format) {
        Format::F32 => unit_f32(held, x, u, index, offset, acc, i, rows, columns),
        Format::F16 => unit_f16(held, x, u, index, offset, acc, i, rows, columns),
        Format::Q8 => unit_q8(held, x, staged, u, index, offset, acc, i, rows, columns),
        Format::Iq2 => unit_iq2(held, x, tables, staged, u, index, offset, acc, i, rows, columns),
        Format::Q2K => unit_q2k(held, x, staged, u, index, offset, acc, i, rows, columns),
        Format::Q4K => unit_q4k(held, x, u, index, offset, acc, i, rows, columns),
    }
}

/// Sum of the products of four pairs.
#[cube]
pub fn dot_four(a: Four, b: Four) -> f32 {
    let p = a * b;
    (p.extract(0usize) + p.extract(1usize)) + (p.extract(2usize) + p.extract(3usize))
}

#[cube]
fn unit_f32(
    held: &Held,
    x: &Input,
    u: usize,
    index: &Array<u32>,
    offset: usize,
    acc: &mut Array<f32>,
    #[comptime] first: usize,
    #[comptime] rows: usize,
    #[comptime] columns: usize,
) {
    #[unroll]
    for r in 0..rows {
        let q = Vector::<f32, Const<4>>::reinterpret(held.quads[comptime!(first + r)]);
        #[unroll]
        for c in 0..columns {
            let at = index[c] as usize * comptime!(x.stride / 4) + offset / 4 + u;
            let v = load_x(&x.values, at, true);
            acc[comptime!(r * columns + c)] += dot_four(q, v);
        }
    }
}

#[cube]
fn unit_f16(
    held: &Held,
    x: &Input,
    u: usize,
    index: &Array<u32>,
    offset: usize,
    acc: &mut Array<f32>,
    #[comptime] first: usize,
    #[comptime] rows: usize,
    #[comptime] columns: usize,
) {
    let mut lo = Array::<Four>::new(rows);
    let mut hi = Array::<Four>::new(rows);
    #[unroll]
    for r in 0..rows {
        let (l, h) = fours_of(held.halves[comptime!(first + r)]);
        lo[r] = l;
        hi[r] = h;
    }
    #[unroll]
    for c in 0..columns {
        let at = index[c] as usize * comptime!(x.stride / 4) + offset / 4 + 2 * u;
        let (a, b) = (load_x(&x.values, at, true), load_x(&x.values, at + 1, true));
        #[unroll]
        for r in 0..rows {
            acc[comptime!(r * columns + c)] += dot_four(lo[r], a) + dot_four(hi[r], b);
        }
    }
}

/// Eight values, four and four.
#[cube]
fn fours_of(halves: Eight) -> (Four, Four) {
    let q = Vector::<f32, Const<8>>::cast_from(halves);
    let mut lo = Four::empty();
    let mut hi = Four::empty();
    #[unroll]
    for i in 0..4usize {
        lo.insert(i, q.extract(i));
        hi.insert(i, q.extract(comptime!(i + 4)));
    }
    (lo, hi)
}

/// Sum of the products of eight values with four and four.
#[cube]
pub fn dot_halves(halves: Eight, a: Four, b: Four) -> f32 {
    let (lo, hi) = fours_of(halves);
    dot_four(lo, a) + dot_four(hi, b)
}

/// Sum of the products of 16 pairs of int8, and of `before`.
#[cube]
pub fn dot_bytes(a: Quad, b: Quad, before: i32) -> i32 {
    let mut sum = before;
    #[unroll]
    for i in 0..4usize {
        sum = dp4a(i32::reinterpret(a.extract(i)), i32::reinterpret(b.extract(i)), sum);
    }
    sum
}

#[cube]
fn unit_q8(
    held: &Held,
    x: &Input,
    staged: &Staged,
    u: usize,
    index: &Array<u32>,
    offset: usize,
    acc: &mut Array<f32>,
    #[comptime] first: usize,
    #[comptime] rows: usize,
    #[comptime] columns: usize,
) {
    #[unroll]
    for c in 0..columns {
        let row = index[c] as usize;
        let near = comptime!(staged.rows > 0);
        let q = if near {
            staged.quad(x, row, offset, u)
        } else {
            load_x(&x.quants, row * comptime!(x.stride / 16) + offset / 16 + u, true)
        };
        let d = if near {
            staged.scale(x, row, offset, u / 2)
        } else {
            load_x(&x.scales, row * comptime!(x.stride / 32) + offset / 32 + u / 2, false)
        };
        #[unroll]
        for r in 0..rows {
            let scale = f32::cast_from(held.scales[comptime!(2 * (first + r))]) * d;
            let dot = f32::cast_from(dot_bytes(held.quads[comptime!(first + r)], q, 0i32));
            acc[comptime!(r * columns + c)] += scale * dot;
        }
    }
}

#[cube]
fn unit_iq2(
    held: &Held,
    x: &Input,
    tables: &Tables,
    staged: &Staged,
    u: usize,
    index: &Array<u32>,
    offset: usize,
    acc: &mut Array<f32>,
    #[comptime] first: usize,
    #[comptime] rows: usize,
    #[comptime] columns: usize,
) {
    // Two groups of 32 weights: four codes, then their signs.
    #[unroll]
    for g in 0..2usize {
        #[unroll]
        for r in 0..rows {
            let quad = held.quads[comptime!(first + r)];
            let codes = quad.extract(comptime!(2 * g));
            let signs = quad.extract(comptime!(2 * g + 1));
            let mut lo = Quad::empty();
            let mut hi = Quad::empty();
            #[unroll]
            for v in 0..2usize {
                let a = tables.eight(codes, signs, v);
                let b = tables.eight(codes, signs, comptime!(v + 2));
                lo.insert(comptime!(2 * v), a.0);
                lo.insert(comptime!(2 * v + 1), a.1);
                hi.insert(comptime!(2 * v), b.0);
                hi.insert(comptime!(2 * v + 1), b.1);
            }
            let scale = f32::cast_from(held.scales[comptime!(2 * (first + r))]) * 0.125f32;
            let sub = held.sub[comptime!(2 * (first + r))] >> (8 * (u % 4) + 4 * g) as u32;
            let unit = i32::cast_from(2 * (sub & 15) + 1);
            #[unroll]
            for c in 0..columns {
                let row = index[c] as usize;
                let (at, d) = (4 * u + 2 * g, staged.scale(x, row, offset, 2 * u + g));
                let sum = dot_bytes(lo, staged.quad(x, row, offset, at), 0i32);
                let sum = dot_bytes(hi, staged.quad(x, row, offset, at + 1), sum);
                // 127 * 43 * 32 times 31: no overflow.
                acc[comptime!(r * columns + c)] += scale * d * f32::cast_from(unit * sum);
            }
        }
    }
}

#[cube]
fn unit_q2k(
    held: &Held,
    x: &Input,
    staged: &Staged,
    u: usize,
    index: &Array<u32>,
    offset: usize,
    acc: &mut Array<f32>,
    #[comptime] first: usize,
    #[comptime] rows: usize,
    #[comptime] columns: usize,
) {
    // Two pairs of groups of 16 weights; a pair shares the scale of its activations.
    #[unroll]
    for g in 0..2usize {
        #[unroll]
        for r in 0..rows {
            let pairs = held.quads[comptime!(first + r)] >> Quad::new(comptime!(4 * g as u32));
            // The second group's quants stay where they are, which makes them four times too large: so is the other's scale.
            let (one, other) = (pairs & Quad::new(0x0303_0303u32), pairs & Quad::new(0x0c0c_0c0cu32));
            let sub = held.sub[comptime!(2 * (first + r))] >> comptime!(16 * g as u32);
            let (scale, low) = (i32::cast_from((sub << 2) & 60), i32::cast_from((sub >> 4) & 15));
            let (other_scale, other_low) =
                (i32::cast_from((sub >> 8) & 15), i32::cast_from((sub >> 12) & 15));
            let d = f32::cast_from(held.scales[comptime!(2 * (first + r))]) * 0.25f32;
            let min = f32::cast_from(held.scales[comptime!(2 * (first + r) + 1)]);
            #[unroll]
            for c in 0..columns {
                let row = index[c] as usize;
                let (at, dx) = (4 * u + 2 * g, staged.scale(x, row, offset, 2 * u + g));
                let dots = scale * dot_bytes(one, staged.quad(x, row, offset, at), 0i32)
                    + other_scale * dot_bytes(other, staged.quad(x, row, offset, at + 1), 0i32);
                let lows =
                    low * staged.sum(x, row, offset, at) + other_low * staged.sum(x, row, offset, at + 1);
                let product = d * f32::cast_from(dots) - min * f32::cast_from(lows);
                acc[comptime!(r * columns + c)] += dx * product;
            }
        }
    }
}

#[cube]
fn unit_q4k(
    held: &Held,
    x: &Input,
    u: usize,
    index: &Array<u32>,
    offset: usize,
    acc: &mut Array<f32>,
    #[comptime] first: usize,
    #[comptime] rows: usize,
    #[comptime] columns: usize,
) {
    let shift = (8 * (u % 4)) as u32;
    #[unroll]
    for r in 0..rows {
        let quad = held.quads[comptime!(first + r)];
        let d = f32::cast_from(held.scales[comptime!(2 * (first + r))]);
        let min = f32::cast_from(held.scales[comptime!(2 * (first + r) + 1)]);
        let scale = d * f32::cast_from((held.sub[comptime!(2 * (first + r))] >> shift) & 255);
        let low = min * f32::cast_from((held.sub[comptime!(2 * (first + r) + 1)] >> shift) & 255);
        #[unroll]
        for j in 0..2usize {
            let q = (quad >> Quad::new(comptime!(4 * j as u32))) & Quad::new(0x0f0f_0f0fu32);
            #[unroll]
            for c in 0..columns {
                let row = index[c] as usize;
                let at = row * comptime!(x.stride / 16) + offset / 16 + 2 * u + j;
                let dx = x.scales[row * comptime!(x.stride / 32) + offset / 32 + u];
                let dot = f32::cast_from(dot_bytes(q, x.quants[at], 0i32));
                acc[comptime!(r * columns + c)] += dx * (scale * dot - low * f32::cast_from(x.sums[at]));
            }
        }
    }
}
