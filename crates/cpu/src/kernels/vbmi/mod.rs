//! AVX-512 with VBMI (any bytes of two registers) and BITALG: IQ2_XXS, whose cost is look-ups. The other formats are VNNI's.
//!
//! The grid is two tables of bytes: a magnitude is two bits (0, 1, 2 for 8, 25, 43), a byte the four of half a code.
#![allow(unsafe_code)]

mod row;
mod tile;

use super::avx512::TILE_ROWS;
use super::avx512::tile::load_bytes as load;
use super::tile::iq2_fields;
use super::{Kernels, Level, ManyRows, vnni};
use std::arch::x86_64::*;

pub(super) const KERNELS: Kernels = Kernels {
    level: Level::Vbmi,
    // SAFETY: the table is handed out by `Kernels::new` only where the CPU has the features; so below.
    iq2_xxs: |rows, x, out| unsafe { row::dots(rows, x, out) },
    // SAFETY: as above.
    iq2_xxs_rows: ManyRows::twice_many(TILE_ROWS, |rows, x, out| unsafe { tile::rows(rows, x, out) }),
    ..vnni::KERNELS
};

/// Of every code the byte of its first four magnitudes, then the byte of the others.
static GRID: [[u8; 256]; 2] = {
    let (mut grid, mut code) = ([[0; 256]; 2], 0);
    while code < 256 {
        [grid[0][code], grid[1][code]] = iq2_fields(code).to_le_bytes();
        code += 1;
    }
    grid
};

/// A table of the grid in registers.
#[inline]
#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bitalg"
)]
fn quarters(grid: &[u8; 256]) -> [__m512i; 4] {
    let quarters = grid.as_chunks().0;
    [load(&quarters[0]), load(&quarters[1]), load(&quarters[2]), load(&quarters[3])]
}

/// The grid's bytes of 64 codes, of which `upper` are from 128 on.
#[inline]
#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bitalg"
)]
fn magnitudes(grid: [__m512i; 4], codes: __m512i, upper: __mmask64) -> __m512i {
    let low = _mm512_permutex2var_epi8(grid[0], codes, grid[1]);
    let high = _mm512_permutex2var_epi8(grid[2], codes, grid[3]);
    _mm512_mask_blend_epi8(upper, low, high)
}

/// Places in eight bytes, of which `at` gives four for the word `i`.
const fn places(at: [u8; 4]) -> i64 {
    let [a, b, c, d] = at;
    i64::from_le_bytes([a, b, c, d, a + 32, b + 32, c + 32, d + 32])
}

/// The four seven bits of signs of each word.
#[inline]
#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bitalg"
)]
fn sevens(aux: __m512i) -> __m512i {
    _mm512_multishift_epi64_epi8(_mm512_set1_epi64(places([0, 7, 14, 21])), aux)
}

/// A table of what signs mean in registers.
#[inline]
#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bitalg"
)]
fn halves(signs: &[u8; 128]) -> [__m512i; 2] {
    let halves = signs.as_chunks().0;
    [load(&halves[0]), load(&halves[1])]
}
