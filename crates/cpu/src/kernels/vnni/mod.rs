//! AVX-512 with VNNI (four products of bytes and their sum in one instruction), and with VBMI (any bytes of a
//! table).
//!
//! A format has two kernels that give the same bits: [`super::row`] for few activation rows, bound by memory (IQ2_XXS has that
//! of AVX2: its cost is look-ups), and [`super::tile`] for many.
#![allow(unsafe_code)]

mod index;
mod iq2_xxs_vbmi;
mod q2_k;
mod q4_k;
mod q8_0;
mod tile;

use super::avx512::TILE_ROWS;
use super::avx512::tile::{load_bytes as load, two, zero};
use super::prefetch::prefetch;
use super::row::{add_blocks, block_dots, four_halves, q8_0_dots, scales_from, total};
use super::{Columns, Kernels, Level, ManyRows, ROWS, Target, avx2, avx512, tiles};
use std::arch::x86_64::*;

pub(super) const VNNI: Kernels = Kernels {
    level: Level::Vnni,
    // SAFETY: the table is handed out by `Kernels::new` only where the CPU has the features; so below.
    q8_0: |row, x, out| unsafe { q8_0::dots(row, x, out) },
    // SAFETY: as above.
    q8_0_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { tile::q8_0(rows, x, out) }),
    // SAFETY: as above.
    q2_k: |row, x, out| unsafe { q2_k::dots(row, x, out) },
    // SAFETY: as above.
    q2_k_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { tile::q2_k(rows, x, out) }),
    // SAFETY: as above.
    q4_k: |row, x, out| unsafe { q4_k::dots(row, x, out) },
    // SAFETY: as above.
    q4_k_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { tile::q4_k(rows, x, out) }),
    // SAFETY: as above.
    iq2_xxs_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { tile::iq2_xxs(rows, x, out) }),
    // SAFETY: as above.
    index_scores: |query, keys, scores| unsafe { index::scores(query, keys, scores) },
    ..avx512::KERNELS
};

pub(super) const VBMI: Kernels = Kernels {
    level: Level::Vbmi,
    // SAFETY: as above.
    iq2_xxs_rows: Some(ManyRows {
        rows: TILE_ROWS,
        least: 1,
        // SAFETY: as above.
        multiply: |rows, x, out| unsafe { iq2_xxs_vbmi::rows(rows, x, out) },
    }),
    ..VNNI
};

/// Two groups of 32 values of a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn groups(q: &[i8; 256], low: usize, high: usize) -> __m512i {
    let groups = q.as_chunks::<32>().0;
    two(bytemuck::cast_ref(&groups[low]), bytemuck::cast_ref(&groups[high]))
}

/// Minima times the sums of the activations under them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn min_products(minima: __m256i, sums: &[i16; 16]) -> __m512i {
    _mm512_zextsi256_si512(avx2::min_products(minima, sums))
}

/// Places for a permutation of words.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn places(words: &[i16; 32]) -> __m512i {
    load(bytemuck::cast_ref(words))
}

/// The sum of each of four vectors.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn sums_of_four(p: [__m512i; 4]) -> __m128i {
    let a = _mm512_add_epi32(_mm512_unpacklo_epi32(p[0], p[1]), _mm512_unpackhi_epi32(p[0], p[1]));
    let b = _mm512_add_epi32(_mm512_unpacklo_epi32(p[2], p[3]), _mm512_unpackhi_epi32(p[2], p[3]));
    let lanes = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    let half = _mm256_add_epi32(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64::<1>(lanes));
    _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half))
}
