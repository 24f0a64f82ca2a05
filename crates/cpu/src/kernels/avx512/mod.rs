//! AVX-512 without VNNI. Floats; integer formats with many activation rows ([`super::tile`]); and IQ2_XXS with few. One weight row of the
//! others uses the AVX2 kernels: its cost is unpacking and scaling blocks of 32, which two blocks in a 512-bit vector did not make cheaper.
#![allow(unsafe_code)]

mod iq2_xxs;
pub(super) mod tile;

use super::float::float_kernels;
use super::small::{self, Heads, Mix, Small, small_kernels};
use super::{Columns, F16_ROWS, Kernels, Level, ManyRows, ROWS, TILE, Target, Tile, avx2, each_row, tiles};
use ds4_model::cache::RowCodec;
use ds4_quant::f16_to_f32;
use std::arch::x86_64::*;

/// Weight rows of a tile: two vectors.
pub(super) const TILE_ROWS: usize = 2 * ROWS;

pub(super) const KERNELS: Kernels = Kernels {
    level: Level::Avx512,
    // SAFETY: the table is handed out by `Kernels::new` only where the CPU has the features; so below.
    f32: |rows, x, out| unsafe { f32_dots(rows, x, out) },
    // SAFETY: as above.
    f16: |rows, x, out| unsafe { f16_dots(rows, x, out) },
    // SAFETY: as above.
    f16_rows: ManyRows::many(F16_ROWS, |rows, x, out| unsafe { f16_rows(rows, x, out) }),
    // SAFETY: as above.
    q8_0_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { tile::q8_0(rows, x, out) }),
    // SAFETY: as above.
    q2_k_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { tile::q2_k(rows, x, out) }),
    // SAFETY: as above.
    q4_k_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { tile::q4_k(rows, x, out) }),
    // SAFETY: as above.
    iq2_xxs: |rows, x, out| unsafe { iq2_xxs::dots(rows, x, out) },
    // SAFETY: as above.
    iq2_xxs_rows: ManyRows::many_from(8, TILE_ROWS, |rows, x, out| unsafe { tile::iq2_xxs(rows, x, out) }),
    // SAFETY: as above.
    dot: |a, b| unsafe { dot(a, b) },
    // SAFETY: as above.
    scores: |q, tile, out| unsafe { scores(q, tile, out) },
    // SAFETY: as above.
    weigh: |weights, tile, out| unsafe { weigh(weights, tile, out) },
    small: SMALL,
    ..avx2::KERNELS
};

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn load(x: &[f32], at: usize) -> __m512 {
    let x = &x[at..at + 16];
    // SAFETY: `x` has 16 values; the load needs no alignment.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn store(x: &mut [f32], at: usize, v: __m512) {
    let x = &mut x[at..at + 16];
    // SAFETY: `x` has 16 values; the store needs no alignment.
    unsafe { _mm512_storeu_ps(x.as_mut_ptr(), v) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn half_at(row: &[u8], i: usize) -> __m512 {
    let row = &row[2 * i..2 * i + 32];
    // SAFETY: `row` has 32 bytes; the load needs no alignment.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(row.as_ptr().cast()) })
}

small_kernels!("avx512f,avx512bw,avx512vl,avx512dq");

float_kernels!(
    "avx512f,avx512bw,avx512vl,avx512dq",
    16,
    __m512,
    2 x 4,
    _mm512_setzero_ps,
    load,
    half_at,
    store,
    _mm512_set1_ps,
    _mm512_fmadd_ps,
    _mm512_add_ps,
    _mm512_reduce_add_ps
);
