//! 16 weight rows, eight in a vector, with many activation rows; bound by `maddubs` and `madd`, of which a step and vector needs one and an
//! eighth (Q4_K) to two (IQ2_XXS) and a bit more (Q8_0, as two planes of nibbles).
//!
//! Measured: one thread of a Zen 4 makes 65 (Q8_0), 77 (IQ2_XXS), 101 (Q2_K), 104 (Q4_K) G multiply-adds/s with 64 columns.

use super::{iq2_xxs, load as load_bytes, q4_k, store, zero};
use crate::kernels::prefetch::ask_second_cache;
use crate::kernels::tile::{
    self, Form, IQ2_MIDDLE, Packed, Packed32, Planes, Step, columns, instructions, lay_outs,
};
use crate::kernels::{Columns, Target};
use ds4_quant::{BlockIq2Xxs, BlockQ2K, BlockQ4K, BlockQ8_0};
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Makes weights of Q8_0 unsigned.
pub(in crate::kernels) const Q8_MIDDLE: u8 = 128;

instructions! {
    "avx2,fma,f16c",
    load(step: &Step<8>) -> __m256i { load_bytes(bytemuck::cast_ref(step)) }
    words(v: &[i32; 8]) -> __m256i { load_bytes(bytemuck::cast_ref(v)) }
    splat(v: i32) -> __m256i { _mm256_set1_epi32(v) }
    splat_bytes(v: u8) -> __m256i { _mm256_set1_epi8(v as i8) }
    and(a: __m256i, b: __m256i) -> __m256i { _mm256_and_si256(a, b) }
    or(a: __m256i, b: __m256i) -> __m256i { _mm256_or_si256(a, b) }
    xor(a: __m256i, b: __m256i) -> __m256i { _mm256_xor_si256(a, b) }
    right_16<const N: i32>(v: __m256i) -> __m256i { _mm256_srli_epi16::<N>(v) }
    right_32<const N: i32>(v: __m256i) -> __m256i { _mm256_srli_epi32::<N>(v) }
    left_32<const N: i32>(v: __m256i) -> __m256i { _mm256_slli_epi32::<N>(v) }
    multiply_16(a: __m256i, b: __m256i) -> __m256i { _mm256_mullo_epi16(a, b) }
    add_bytes(a: __m256i, b: __m256i) -> __m256i { _mm256_add_epi8(a, b) }
    subtract(a: __m256i, b: __m256i) -> __m256i { _mm256_sub_epi32(a, b) }
    products(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
        _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x))
    }
    add_scaled(int: __m256i, sum: __m256i, scale: __m256i) -> __m256i {
        _mm256_add_epi32(int, _mm256_madd_epi16(sum, scale))
    }
    pairs(int: __m256i, a: __m256i, b: __m256i) -> __m256i { _mm256_add_epi32(int, _mm256_madd_epi16(a, b)) }
    no_floats() -> __m256 { _mm256_setzero_ps() }
    floats(v: &[f32; 8]) -> __m256 { _mm256_castsi256_ps(load_bytes(bytemuck::cast_ref(v))) }
    store_floats(v: __m256, to: &mut [f32; 8]) -> () { store(_mm256_castps_si256(v), to) }
    add_floats(a: __m256, b: __m256) -> __m256 { _mm256_add_ps(a, b) }
    scaled_floats(v: __m256, by: f32) -> __m256 { _mm256_mul_ps(v, _mm256_set1_ps(by)) }
    add_block(acc: __m256, int: __m256i, scale: __m256) -> __m256 {
        _mm256_fmadd_ps(_mm256_cvtepi32_ps(int), scale, acc)
    }
    subtract_block(acc: __m256, int: __m256i, scale: __m256) -> __m256 {
        _mm256_fnmadd_ps(_mm256_cvtepi32_ps(int), scale, acc)
    }
}

/// `v`, negative where `signs` has one of `bits`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn negative(v: __m256i, signs: __m256i, bits: __m256i) -> __m256i {
    let signs = _mm256_cmpeq_epi8(_mm256_and_si256(signs, bits), bits);
    _mm256_sub_epi8(_mm256_xor_si256(v, signs), signs)
}

/// Bytes of a table from their places in it.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn look_up(table: &[u8; 16], places: __m256i) -> __m256i {
    // SAFETY: there are 16 bytes; the load needs no alignment.
    let table = unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), places)
}

/// The bytes of every 16 from their places in them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn shuffle(v: __m256i, places: &[u8; 16]) -> __m256i {
    // SAFETY: there are 16 bytes; the load needs no alignment.
    let places = unsafe { _mm_loadu_si128(places.as_ptr().cast()) };
    _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(places))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves(d: &[[u8; 2]; 8]) -> [f32; 8] {
    let mut out = [0.0; 8];
    // SAFETY: there are 16 bytes; the load needs no alignment.
    let halves = unsafe { _mm_loadu_si128(d.as_ptr().cast()) };
    store_floats(_mm256_cvtph_ps(halves), &mut out);
    out
}

/// Two times 16 bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn two(low: &[u8; 16], high: &[u8; 16]) -> __m256i {
    // SAFETY: both have 16 bytes; the loads need no alignment.
    unsafe { _mm256_loadu2_m128i(high.as_ptr().cast(), low.as_ptr().cast()) }
}

/// Four words of each of eight rows as columns: row `r` and row `r + 4` share a vector, so that four rows are turned in either half of it.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn turn(rows: [__m256i; 4]) -> [__m256i; 4] {
    let [a, b, c, d] = rows;
    let (low, high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    let (low2, high2) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    [
        _mm256_unpacklo_epi64(low, low2),
        _mm256_unpackhi_epi64(low, low2),
        _mm256_unpacklo_epi64(high, high2),
        _mm256_unpackhi_epi64(high, high2),
    ]
}

/// Twice 32 bytes of each row, of which `at` gives those of one, as 16 words of all rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn words_of_halves<'a>(at: impl Fn(usize) -> [&'a [u8; 32]; 2]) -> [__m256i; 16] {
    let mut out = [zero(); 16];
    for part in 0..4 {
        let mut rows = [zero(); 4];
        for r in 0..4 {
            let (low, high) = (at(r)[part / 2].as_chunks().0, at(r + 4)[part / 2].as_chunks().0);
            rows[r] = two(&low[part % 2], &high[part % 2]);
        }
        let words = turn(rows);
        for k in 0..4 {
            out[4 * part + k] = words[k];
        }
    }
    out
}

/// 64 bytes of each row.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn words_of_rows<'a>(at: impl Fn(usize) -> &'a [u8; 64]) -> [__m256i; 16] {
    words_of_halves(|r| {
        let halves = at(r).as_chunks::<32>().0;
        [&halves[0], &halves[1]]
    })
}

lay_outs!("avx2,fma,f16c", 8, __m256i);

columns!(
    "avx2,fma,f16c",
    8,
    __m256i,
    __m256,
    wide: false,
    at_once: [4, 2, 1],
    scaled: 4
);
