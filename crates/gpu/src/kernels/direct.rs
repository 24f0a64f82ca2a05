//! Products with many rows, where a plane alone meets its rows of weights: on NVIDIA it decodes them to its fragments, with
//! no way through shared memory, which would be what bounds the product.
//!
//! In a fragment, unit `4 n + q` of a plane holds values of row `n` of the weights: of each step two neighbours, and the two
//! eight further on. The order along the depth is free if activations have the same. So unit `q` of four takes 16 weights
//! one after the other of a slice of 64, four a step, and activations are laid into shared memory such that they meet them.

use super::dot::{Eight, Quad, Weights};
use super::fetch::{Held, fetch_unit, room};
use super::matmul::{Tiling, fetch_input, input_row};
use super::plane::lane;
use super::tables::{Grid, shared_address, signed_levels};
use super::units::{Sums, column_of, multiply_with, zero_sums};
use super::unpack::{Two, halves_of, levels_to_halves, pair_of, two_of, word_of};
use crate::layout::Format;
use cubecl::prelude::*;

/// Depth of a slice.
const DEPTH: usize = 64;

/// Whether a product of matrices of a format is of this kind.
pub const fn is_direct(format: Format, input: usize, t: &Tiling) -> bool {
    let known = matches!(format, Format::Q8 | Format::Iq2 | Format::Q2K);
    known
        && t.fragments
        && t.planes_m == 1
        && t.depth == DEPTH
        && t.buffers == 2
        && input.is_multiple_of(DEPTH)
}

/// Fetches a unit's piece of slice `slice` of a row, to place `i`: its own vector where a slice has four, else the whole.
#[cube]
fn fetch_piece(w: &Weights, row: usize, slice: usize, to: &mut Held, #[comptime] i: usize) {
    let own = if comptime!(w.format == Format::Q8) { 4 * slice + lane() % 4 } else { slice };
    fetch_unit(w, to, row, own, i, false);
}

/// Scale, and what is subtracted, of the unit's weights of piece `i`.
#[cube]
fn scales_of(from: &Held, slice: usize, #[comptime] i: usize, #[comptime] format: Format) -> (u32, u32) {
    let scale = f32::cast_from(from.scales[comptime!(2 * i)]);
    let q = (lane() % 4) as u32;
    match comptime!(format) {
        Format::Iq2 => {
            let sub = (from.sub[comptime!(2 * i)] >> (8 * (slice as u32 % 4) + 4 * (q / 2))) & 15;
            let scale = word_of(pair_of(scale * 0.125f32 * f32::cast_from(2 * sub + 1)));
            (scale, scale)
        }
        Format::Q2K => {
            let sub = from.sub[comptime!(2 * i)] >> (8 * q);
            let low = f32::cast_from(from.scales[comptime!(2 * i + 1)]) * f32::cast_from((sub >> 4) & 15);
            (word_of(pair_of(scale * f32::cast_from(sub & 15))), word_of(pair_of(low)))
        }
        _ => (word_of(pair_of(scale)), word_of(pair_of(scale))),
    }
}

/// Four weights of step `s` of piece `i`: two words of two.
#[cube]
fn decode_step(
    from: &Held,
    grid: &Grid,
    scale: u32,
    low: u32,
    #[comptime] i: usize,
    #[comptime] s: usize,
    #[comptime] format: Format,
) -> (u32, u32) {
    let (quad, q) = (from.quads[i], (lane() % 4) as u32);
    let scale = two_of(scale);
    match comptime!(format) {
        Format::Iq2 => {
            // Two codes of a group are this unit's.
            let (codes, signs) = (
                select(q >= 2, quad.extract(2usize), quad.extract(0usize)),
                select(q >= 2, quad.extract(3usize), quad.extract(1usize)),
            );
            let code = ((codes >> (16 * (q % 2) + comptime!(8 * (s / 2) as u32))) & 255) as usize;
            let by = signed_levels(grid.levels[code], signs >> (2 * (q % 2)), comptime!(s / 2));
            let (a, b) = levels_to_halves(by >> comptime!(16 * (s % 2) as u32));
            (word_of(two_of(a) * scale), word_of(two_of(b) * scale))
        }
        Format::Q2K => {
            let four = (quad.extract(s) >> (2 * q)) & 0x0303_0303;
            let (a, b) = halves_of(four, comptime!(1024.0f32));
            (word_of(a * scale - two_of(low)), word_of(b * scale - two_of(low)))
        }
        _ => {
            let (a, b) = halves_of(quad.extract(s) ^ 0x8080_8080, comptime!(1152.0f32));
            (word_of(a * scale), word_of(b * scale))
        }
    }
}

/// Rows of weights of a plane's halves of tiles, of this unit: of `first`, or of `second` where that is the other of a pair.
#[cube]
fn fetch_pieces(
    first: &Weights,
    first_row: usize,
    second: &Weights,
    second_row: usize,
    last: usize,
    slice: usize,
    to: &mut Held,
    #[comptime] t: Tiling,
    #[comptime] pair: bool,
) {
    #[unroll]
    for i in 0..comptime!(2 * t.n()) {
        let column = column_of(comptime!(i / 2), t, pair) + comptime!(8 * (i % 2)) + lane() / 4;
        if comptime!(pair && i >= t.n()) {
            let row = usize::min(second_row + column - comptime!(t.columns / 2), last);
            fetch_piece(second, row, slice, to, i);
        } else {
            fetch_piece(first, usize::min(first_row + column, last), slice, to, i);
        }
    }
}

/// This unit's eights of activations of a slice, into shared memory, as the weights' order along the depth wants them.
#[cube]
fn lay_input(input: &Array<Eight>, base: u32, buffer: usize, #[comptime] t: Tiling) {
    let eight = UNIT_POS % 8;
    #[unroll]
    for i in 0..comptime!(t.eights()) {
        let row = input_row(i, t);
        if row < comptime!(t.rows) {
            let words = Quad::reinterpret(input[i]);
            let at = (buffer * comptime!(t.rows) + row) as u32 * comptime!(16 * t.pitch() as u32);
            let own = base + at + 64 * (eight % 2) + 4 * (eight / 2);
            #[unroll]
            for j in 0..4usize {
                let to = own + comptime!(32 * (j / 2) as u32 + 16 * (j % 2) as u32);
                let word = words.extract(j);
                gpu_asm!("st.shared.u32 [{}], {};", in(_) to, in(_) word);
            }
        }
    }
}

/// As [`product`](super::matmul::product).
#[cube]
pub fn product_direct(
    x: &[Eight],
    starts: &Array<usize>,
    first: &Weights,
    first_row: usize,
    second: &Weights,
    second_row: usize,
    last: usize,
    words: &[Vector<u32, Const<2>>],
    #[comptime] t: Tiling,
    #[comptime] pair: bool,
) -> Sums {
    let grid = Grid::load(words, comptime!(first.format == Format::Iq2 || second.format == Format::Iq2));
    let a = Shared::<[Eight]>::new_slice(comptime!(2 * t.rows * t.pitch()));
    let base = shared_address(&a);
    let mut sums = zero_sums(t);
    let slices = comptime!(first.input / DEPTH);
    let halves = comptime!(2 * t.n());
    // A row for each half of a tile.
    let mut own = room(1usize, halves, first.format);
    let mut next = room(1usize, halves, first.format);
    let mut input = Array::<Eight>::new(comptime!(t.eights()));
    fetch_input(x, starts, 0usize, &mut input, comptime!(first.input), t);
    fetch_pieces(first, first_row, second, second_row, last, 0usize, &mut own, t, pair);
    lay_input(&input, base, 0usize, t);
    fetch_input(
        x,
        starts,
        comptime!(usize::min(1, slices - 1)).runtime(),
        &mut input,
        comptime!(first.input),
        t,
    );
    sync_cube();
    for slice in 0..slices {
        let (buffer, free) = (slice % 2, (slice + 1) % 2);
        let later = usize::min(slice + 1, comptime!(slices - 1));
        fetch_pieces(first, first_row, second, second_row, last, later, &mut next, t, pair);
        let mut scales = Array::<u32>::new(halves);
        let mut lows = Array::<u32>::new(halves);
        #[unroll]
        for i in 0..halves {
            let format = comptime!(if pair && i >= t.n() { second.format } else { first.format });
            let (scale, low) = scales_of(&own, slice, i, format);
            scales[i] = scale;
            lows[i] = low;
        }
        #[unroll]
        for s in 0..4usize {
            let mut right = Sequence::<Array<Two>>::new();
            #[unroll]
            for i in 0..halves {
                let format = comptime!(if pair && i >= t.n() { second.format } else { first.format });
                let (one, other) = decode_step(&own, &grid, scales[i], lows[i], i, s, format);
                let mut both = Array::<Two>::new(2usize);
                both[0] = two_of(one);
                both[1] = two_of(other);
                right.push(both);
            }
            multiply_with(&a, buffer, &right, &mut sums, s, t);
            if comptime!(s == 1) {
                lay_input(&input, base, free, t);
                let after = usize::min(slice + 2, comptime!(slices - 1));
                fetch_input(x, starts, after, &mut input, comptime!(first.input), t);
            }
        }
        #[unroll]
        for i in 0..halves {
            let (scale, min) = comptime!((2 * i, 2 * i + 1));
            own.quads[i] = next.quads[i];
            own.scales[scale] = next.scales[scale];
            own.scales[min] = next.scales[min];
            own.sub[scale] = next.sub[scale];
        }
        sync_cube();
    }
    sums
}
