//! AVX2 + FMA + F16C.
//!
//! Integer formats: weights as unsigned bytes, activations as signed ones, `maddubs` to i16, where no pair can overflow, `madd` with the
//! sub-block scale to i32. A format has two kernels that give the same bits: [`super::row`] for few activation rows, a weight row at a
//! time, and [`super::tile`] for many.
#![allow(unsafe_code)]

mod index;
pub(super) mod iq2_xxs;
pub(super) mod q2_k;
pub(super) mod q4_k;
mod q8_0;
pub(super) mod tile;

use super::float::float_kernels;
use super::prefetch::prefetch;
use super::row::{
    Few, Fours, add_blocks, block_dots, few_blocks, floats, four_halves, four_halves_of_integers, fours32,
    last, one_block, q8_0_dots, sums_of_four, total,
};
use super::small::{self, Heads, Mix, Small, small_kernels};
use super::{Columns, F16_ROWS, Input, Kernels, Level, ManyRows, TILE, Target, Tile, each_row, tiles};
use ds4_model::cache::RowCodec;
use ds4_quant::f16_to_f32;
use std::arch::x86_64::*;

/// Weight rows of a tile: two vectors.
pub(super) const TILE_ROWS: usize = 16;

pub(super) const KERNELS: Kernels = Kernels {
    level: Level::Avx2,
    // SAFETY: the table is handed out by `Kernels::new` only where the CPU has the features; so below.
    f32: |rows, x, out| unsafe { f32_dots(rows, x, out) },
    // SAFETY: as above.
    f16: |rows, x, out| unsafe { f16_dots(rows, x, out) },
    // SAFETY: as above.
    f16_rows: ManyRows::many(F16_ROWS, |rows, x, out| unsafe { f16_rows(rows, x, out) }),
    // SAFETY: as above.
    q8_0: |rows, x, out| unsafe { q8_0::dots(rows, x, out) },
    // SAFETY: as above.
    q8_0_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { tile::q8_0(rows, x, out) }),
    // SAFETY: as above.
    q2_k: |rows, x, out| unsafe { q2_k::dots(rows, x, out) },
    // SAFETY: as above.
    q2_k_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { tile::q2_k(rows, x, out) }),
    // SAFETY: as above.
    q4_k: |rows, x, out| unsafe { q4_k::dots(rows, x, out) },
    // SAFETY: as above.
    q4_k_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { tile::q4_k(rows, x, out) }),
    // SAFETY: as above.
    iq2_xxs: |rows, x, out| unsafe { iq2_xxs::dots(rows, x, out) },
    iq2_xxs_input: Input::Int256,
    // SAFETY: as above.
    iq2_xxs_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { tile::iq2_xxs(rows, x, out) }),
    // SAFETY: as above.
    dot: |a, b| unsafe { dot(a, b) },
    // SAFETY: as above.
    scores: |q, tile, out| unsafe { scores(q, tile, out) },
    // SAFETY: as above.
    weigh: |weights, tile, out| unsafe { weigh(weights, tile, out) },
    small: SMALL,
    // SAFETY: as above.
    index_scores: |query, keys, scores| unsafe { index::scores(query, keys, scores) },
};

/// 32 bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn load(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: there are 32 bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store<T: bytemuck::Pod>(v: __m256i, to: &mut T) {
    const { assert!(size_of::<T>() == 32) };
    // SAFETY: `to` has 32 bytes; the store needs no alignment.
    unsafe { _mm256_storeu_si256(std::ptr::from_mut(to).cast(), v) };
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn zero() -> __m256i {
    _mm256_setzero_si256()
}

/// Group `g` of the activations of a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn group(x: &[i8; 256], g: usize) -> __m256i {
    load(bytemuck::cast_ref(&x.as_chunks::<32>().0[g]))
}

/// Minima times the sums of the activations under them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn min_products(minima: __m256i, sums: &[i16; 16]) -> __m256i {
    _mm256_madd_epi16(minima, load(bytemuck::cast_ref(sums)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_f32(x: &[f32], at: usize) -> __m256 {
    let x = &x[at..at + 8];
    // SAFETY: `x` has 8 values; the load needs no alignment.
    unsafe { _mm256_loadu_ps(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum(v: __m256) -> f32 {
    let s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store_f32(x: &mut [f32], at: usize, v: __m256) {
    let x = &mut x[at..at + 8];
    // SAFETY: `x` has 8 values; the store needs no alignment.
    unsafe { _mm256_storeu_ps(x.as_mut_ptr(), v) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn half_at(row: &[u8], i: usize) -> __m256 {
    let row = &row[2 * i..2 * i + 16];
    // SAFETY: `row` has 16 bytes; the load needs no alignment.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(row.as_ptr().cast()) })
}

small_kernels!("avx2,fma,f16c");

float_kernels!(
    "avx2,fma,f16c",
    8,
    __m256,
    1 x 2,
    _mm256_setzero_ps,
    load_f32,
    half_at,
    store_f32,
    _mm256_set1_ps,
    _mm256_fmadd_ps,
    _mm256_add_ps,
    sum
);
