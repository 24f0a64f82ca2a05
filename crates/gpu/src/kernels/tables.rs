//! What products of a plane a row have in shared memory.
//!
//! The grid of IQ2_XXS, from `ds4-quant`. Signs are worked out: looking them up would double the traffic on shared
//! memory, which is what bounds these products.
//!
//! Rows of activations, where weights come 64 to a vector: lanes side by side then read activations 64 bytes apart, every
//! other one from another line of the cache.

use super::dot::{Input, Quad};
use cubecl::prelude::*;
use ds4_quant::IQ2XXS_GRID;

/// The grid, as a kernel sees it. Empty where no format needs it.
#[derive(CubeType)]
pub struct Tables {
    /// Eight magnitudes a code.
    pub grid: Shared<[Vector<u32, Const<2>>]>,
}

/// Words of the grid: 256 pairs of four magnitudes each.
pub fn words() -> Vec<u32> {
    let pairs = IQ2XXS_GRID.iter().flat_map(|g| {
        let (a, b) = g.split_at(4);
        [a, b].map(|h| u32::from_le_bytes([h[0], h[1], h[2], h[3]]))
    });
    pairs.collect()
}

/// The same with the middle bytes of each word exchanged: bytes 0 and 2 are a pair, 1 and 3 the next.
pub fn pair_words() -> Vec<u32> {
    words().into_iter().map(|w| w & 0xff00_00ff | (w & 0xff00) << 8 | (w >> 8) & 0xff00).collect()
}

#[cube]
impl Tables {
    /// Loads it into shared memory; the whole cube takes part.
    pub fn load(words: &[Vector<u32, Const<2>>], #[comptime] needed: bool) -> Tables {
        let mut grid =
            Shared::<[Vector<u32, Const<2>>]>::new_slice(comptime!(if needed { 256usize } else { 1usize }));
        if comptime!(needed) {
            let mut i = UNIT_POS as usize;
            while i < 256 {
                grid[i] = words[i];
                i += CUBE_DIM as usize;
            }
            sync_cube();
        }
        Tables { grid }
    }
}

/// Rows of int8 activations in shared memory. After every four vectors one is left out, so that lanes which read every
/// fourth find theirs in different banks.
#[derive(CubeType)]
pub struct Staged {
    quants: Shared<[Quad]>,
    sums: Shared<[f32]>,
    scales: Shared<[f32]>,
    /// None: the activations are read from memory.
    #[cube(comptime)]
    rows: usize,
}

/// Vectors of a row of `stride` values, with those left out.
const fn staged_quads(stride: usize) -> usize {
    stride / 16 + stride / 64
}

/// Scales of a row, likewise.
const fn staged_scales(stride: usize) -> usize {
    stride / 32 + stride / 64
}

/// Bytes of shared memory of `rows` staged rows.
pub const fn staged_bytes(rows: usize, stride: usize) -> usize {
    rows * (20 * staged_quads(stride) + 4 * staged_scales(stride))
}

#[cube]
impl Staged {
    /// No rows.
    pub fn none(x: &Input) -> Staged {
        Staged::load(x, 0usize, 0usize)
    }

    /// Loads `rows` rows of `x` from row `first` on; the whole cube takes part, and meets before it reads them.
    pub fn load(x: &Input, first: usize, #[comptime] rows: usize) -> Staged {
        let (in_row, scales_in_row) = (comptime!(x.stride / 16), comptime!(x.stride / 32));
        let mut quants = Shared::<[Quad]>::new_slice(comptime!(usize::max(rows * staged_quads(x.stride), 1)));
        let mut sums = Shared::<[f32]>::new_slice(comptime!(usize::max(rows * staged_quads(x.stride), 1)));
        let mut scales = Shared::<[f32]>::new_slice(comptime!(usize::max(rows * staged_scales(x.stride), 1)));
        if comptime!(rows > 0) {
            let mut i = UNIT_POS as usize;
            while i < comptime!(rows * x.stride / 16) {
                let at = i + i / 4;
                quants[at] = x.quants[first * in_row + i];
                sums[at] = x.sums[first * in_row + i];
                i += CUBE_DIM as usize;
            }
            i = UNIT_POS as usize;
            while i < comptime!(rows * x.stride / 32) {
                scales[i + i / 2] = x.scales[first * scales_in_row + i];
                i += CUBE_DIM as usize;
            }
        }
        Staged { quants, sums, scales, rows: comptime!(rows) }
    }

    /// Vector `at` of a row of the activations, from value `offset` on.
    pub fn quad(&self, x: &Input, row: usize, offset: usize, at: usize) -> Quad {
        if comptime!(self.rows > 0) {
            self.quants[row * comptime!(staged_quads(x.stride)) + at + at / 4]
        } else {
            x.quants[row * comptime!(x.stride / 16) + offset / 16 + at]
        }
    }

    /// Sum of the vector's values times its scale.
    pub fn sum(&self, x: &Input, row: usize, offset: usize, at: usize) -> f32 {
        if comptime!(self.rows > 0) {
            self.sums[row * comptime!(staged_quads(x.stride)) + at + at / 4]
        } else {
            x.sums[row * comptime!(x.stride / 16) + offset / 16 + at]
        }
    }

    /// Scale `at` of a row.
    pub fn scale(&self, x: &Input, row: usize, offset: usize, at: usize) -> f32 {
        if comptime!(self.rows > 0) {
            self.scales[row * comptime!(staged_scales(x.stride)) + at + at / 2]
        } else {
            x.scales[row * comptime!(x.stride / 32) + offset / 32 + at]
        }
    }
}
