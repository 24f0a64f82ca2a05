//! Products with many rows, on the matrix units: f16 tiles, sums in f32.
//!
//! A cube multiplies a tile of rows of activations with a tile of rows of weights, a slice of 32 or 64 values of depth
//! at a time. Both come into shared memory as f16, the weights decoded on the way in: once for all the rows of the tile.
//! While the matrix units work on one slice, the next is decoded, and the one after it on its way into registers. What a
//! row's result is does not depend on the other rows of the tile, nor on the tile's size.

use super::direct::{is_direct, product_direct};
use super::dot::{Eight, Weights};
use super::tables::Grid;
use super::units::{Sums, column_of, multiply, row_of, store_sum, zero_sums};
use super::unpack::{Stored, fetch, store_weights};
use crate::layout::Format;
use cubecl::prelude::*;

/// Units of a cube.
pub const UNITS: usize = 128;

/// How a cube's planes share a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tiling {
    /// Side of the matrix units' tiles.
    pub side: usize,
    /// Rows of activations in a tile.
    pub rows: usize,
    /// Rows of weights in a tile: one or two for each unit to load.
    pub columns: usize,
    /// Depth of a slice.
    pub depth: usize,
    /// Planes along the rows.
    pub planes_m: usize,
    /// Planes along the columns.
    pub planes_n: usize,
    /// Slices in shared memory at once: of two, one is decoded while the other is multiplied.
    pub buffers: usize,
    /// Whether the parts of a tile that a unit holds are known, see [`Sums`].
    pub fragments: bool,
}

impl Tiling {
    /// Tiles of a plane along the rows.
    pub const fn m(&self) -> usize {
        self.rows / self.planes_m / self.side
    }
    /// Tiles of a plane along the columns.
    pub const fn n(&self) -> usize {
        self.columns / self.planes_n / self.side
    }
    /// Eights of f16 from row to row of a tile in shared memory: one more than a slice has, so that rows start in
    /// different banks.
    pub const fn pitch(&self) -> usize {
        self.depth / 8 + 1
    }
    /// Eights of activations that a unit loads.
    pub const fn eights(&self) -> usize {
        (self.rows * self.depth / 8).div_ceil(UNITS)
    }
    /// Chunks of 16 weights to decode after step `k` of a slice: all by the last, none before the middle.
    const fn chunks_after(&self, k: usize) -> (usize, usize) {
        let (steps, chunks) = (self.depth / self.side, self.depth / 16);
        let (half, late) = (steps / 2, if k >= steps / 2 { k - steps / 2 } else { return (0, 0) });
        (late * chunks / (steps - half), (late + 1) * chunks / (steps - half))
    }
    /// Rows of activations from one eight of a unit to its next.
    const fn row_step(&self) -> usize {
        8 * UNITS / self.depth
    }
    /// Bytes of shared memory, with the largest table and what experts lay side by side.
    pub const fn shared_bytes(&self) -> usize {
        self.buffers * (self.rows + self.columns) * self.pitch() * 16
            + 256 * 8
            + 2 * self.side * self.side * 4 * self.planes_m * self.planes_n
    }
}

/// Shared memory that the products of experts need at the least.
pub const fn least_shared_bytes(side: usize) -> usize {
    Tiling {
        side,
        rows: 64,
        columns: 2 * UNITS,
        depth: 32,
        planes_m: 1,
        planes_n: 4,
        buffers: 1,
        fragments: false,
    }
    .shared_bytes()
}

/// Row of activations, within the cube's tile, of this unit's eight `i`.
#[cube]
pub fn input_row(#[comptime] i: usize, #[comptime] t: Tiling) -> usize {
    UNIT_POS as usize / comptime!(t.depth / 8) + comptime!(i * t.row_step())
}

/// The product of a tile of activations and one of weights: this plane's sums. Row `input_row(i)` of the activations
/// begins at eight `starts[i]` of `x`. The rows of weights begin at `first_row` of `first` and, where there are two for
/// each unit, at `second_row` of `second`; none is beyond `last`.
#[cube]
pub fn product(
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
    let direct =
        comptime!(is_direct(first.format, first.input, &t) && is_direct(second.format, second.input, &t));
    if comptime!(direct) {
        product_direct(x, starts, first, first_row, second, second_row, last, words, t, pair)
    } else {
        product_through_shared(x, starts, first, first_row, second, second_row, last, words, t, pair)
    }
}

#[cube]
fn product_through_shared(
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
    let iq2 = comptime!(first.format == Format::Iq2 || second.format == Format::Iq2);
    let grid = Grid::load(words, iq2);
    let mut a = Shared::<[Eight]>::new_slice(comptime!(t.buffers * t.rows * t.pitch()));
    let mut b = Shared::<[Eight]>::new_slice(comptime!(t.buffers * t.columns * t.pitch()));
    let mut sums = zero_sums(t);
    let slices = comptime!(first.input.div_ceil(t.depth));
    let mut one = Stored::new(comptime!(first.format), comptime!(t.depth));
    let mut other = Stored::new(comptime!(second.format), comptime!(t.depth));
    let mut input = Array::<Eight>::new(comptime!(t.eights()));
    fetch_slice(
        x, starts, first, first_row, second, second_row, last, 0usize, &mut one, &mut other, &mut input, t,
    );
    let (formats, steps) = (comptime!((first.format, second.format)), comptime!(t.depth / t.side));
    if comptime!(t.buffers == 2) {
        store_input(&input, &mut a, 0usize, t);
        store_chunks(&one, &other, &grid, 0usize, &mut b, 0usize, comptime!((0, t.depth / 16)), formats, t);
        let next = comptime!(usize::min(1, slices - 1)).runtime();
        fetch_slice(
            x, starts, first, first_row, second, second_row, last, next, &mut one, &mut other, &mut input, t,
        );
        sync_cube();
        for slice in 0..slices {
            let (buffer, free) = (slice % 2, (slice + 1) % 2);
            // What was fetched during the slice before is decoded in the second half of the steps, between the
            // products: the matrix units go on meanwhile.
            #[unroll]
            for k in 0..steps {
                multiply(&a, &b, buffer, &mut sums, k, t, pair);
                let chunks = comptime!(t.chunks_after(k));
                if comptime!(chunks.0 < chunks.1) {
                    if comptime!(chunks.0 == 0) {
                        store_input(&input, &mut a, free, t);
                    }
                    store_chunks(&one, &other, &grid, slice + 1, &mut b, free, chunks, formats, t);
                }
            }
            let next = usize::min(slice + 2, comptime!(slices - 1));
            fetch_slice(
                x, starts, first, first_row, second, second_row, last, next, &mut one, &mut other,
                &mut input, t,
            );
            sync_cube();
        }
    } else {
        for slice in 0..slices {
            sync_cube();
            store_input(&input, &mut a, 0usize, t);
            let all = comptime!((0, t.depth / 16));
            store_chunks(&one, &other, &grid, slice, &mut b, 0usize, all, formats, t);
            sync_cube();
            let next = usize::min(slice + 1, comptime!(slices - 1));
            fetch_slice(
                x, starts, first, first_row, second, second_row, last, next, &mut one, &mut other,
                &mut input, t,
            );
            #[unroll]
            for k in 0..steps {
                multiply(&a, &b, 0usize, &mut sums, k, t, pair);
            }
        }
    }
    sums
}

/// Some chunks of this unit's rows of weights of a slice, into shared memory.
#[cube]
fn store_chunks(
    one: &Stored,
    other: &Stored,
    grid: &Grid,
    slice: usize,
    b: &mut Shared<[Eight]>,
    buffer: usize,
    #[comptime] chunks: (usize, usize),
    #[comptime] formats: (Format, Format),
    #[comptime] t: Tiling,
) {
    let (odd, depth) = (slice % 2 == 1, comptime!(t.depth));
    let (first, pitch) = (buffer * comptime!(t.columns), comptime!(t.pitch()));
    store_weights(one, grid, odd, b, first, chunks, comptime!(formats.0), depth, pitch);
    if comptime!(t.columns > UNITS) {
        store_weights(other, grid, odd, b, first + UNITS, chunks, comptime!(formats.1), depth, pitch);
    }
}

/// This unit's eights of activations of a slice, into shared memory.
#[cube]
fn store_input(input: &Array<Eight>, a: &mut Shared<[Eight]>, buffer: usize, #[comptime] t: Tiling) {
    #[unroll]
    for i in 0..comptime!(t.eights()) {
        let row = input_row(i, t);
        if row < comptime!(t.rows) {
            let at = (buffer * comptime!(t.rows) + row) * comptime!(t.pitch());
            a[at + UNIT_POS as usize % comptime!(t.depth / 8)] = input[i];
        }
    }
}

/// What this unit loads of a slice.
#[cube]
fn fetch_slice(
    x: &[Eight],
    starts: &Array<usize>,
    first: &Weights,
    first_row: usize,
    second: &Weights,
    second_row: usize,
    last: usize,
    slice: usize,
    one: &mut Stored,
    other: &mut Stored,
    input: &mut Array<Eight>,
    #[comptime] t: Tiling,
) {
    fetch(first, first_row, last, slice, one, comptime!(t.depth));
    if comptime!(t.columns > UNITS) {
        fetch(second, second_row, last, slice, other, comptime!(t.depth));
    }
    fetch_input(x, starts, slice, input, comptime!(first.input), t);
}

/// This unit's eights of a slice of the activations. Those beyond the end of a row meet weights of zero.
#[cube]
pub fn fetch_input(
    x: &[Eight],
    starts: &Array<usize>,
    slice: usize,
    to: &mut Array<Eight>,
    #[comptime] width: usize,
    #[comptime] t: Tiling,
) {
    let mut at = slice * comptime!(t.depth / 8) + UNIT_POS as usize % comptime!(t.depth / 8);
    if comptime!(width % t.depth != 0) {
        at = usize::min(at, comptime!(width / 8 - 1));
    }
    #[unroll]
    for i in 0..comptime!(t.eights()) {
        to[i] = x[starts[i] + at];
    }
}

/// What a product of many rows is specialised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dense {
    /// How planes share a tile.
    pub tiling: Tiling,
    /// Values from row to row of the activations.
    pub x_stride: usize,
    /// Rows of the weights.
    pub columns: usize,
    /// Rows of the weights that share a slice of the activations.
    pub group: usize,
    /// Values from row to row of the output.
    pub stride: usize,
}

/// `out = x W^T`: tiles of rows along y, of columns along x. Writes whole tiles: `out` has room for them.
#[cube(launch_unchecked)]
pub fn matmul(
    x: &[Eight],
    w: &Weights,
    words: &[Vector<u32, Const<2>>],
    out: &mut [f32],
    n: u32,
    #[comptime] s: Dense,
) {
    let t = comptime!(s.tiling);
    let first_row = CUBE_POS_Y as usize * comptime!(t.rows);
    let first_column = CUBE_POS_X as usize * comptime!(t.columns);
    let offset = (first_column / comptime!(s.group)) * comptime!(w.input / 8);
    // Rows and columns beyond the last repeat it; nobody reads their results.
    let mut starts = Array::<usize>::new(comptime!(t.eights()));
    #[unroll]
    for i in 0..comptime!(t.eights()) {
        let row = usize::min(first_row + input_row(i, t), n as usize - 1);
        starts[i] = row * comptime!(s.x_stride / 8) + offset;
    }
    let (other, last) = (first_column + UNITS, comptime!(s.columns - 1).runtime());
    let sums = product(x, &starts, w, first_column, w, other, last, words, t, false);
    let length = out.len();
    #[unroll]
    for i in 0..comptime!(t.m()) {
        #[unroll]
        for j in 0..comptime!(t.n()) {
            let (r, c) = (first_row + row_of(i, t), first_column + column_of(j, t, false));
            if c < comptime!(s.columns) {
                let to = &mut out[r * comptime!(s.stride) + c..length];
                store_sum(&sums, to, comptime!(i * t.n() + j), s.stride, t);
            }
        }
    }
}
