//! 32 weight rows, 16 in a vector, with many activation rows. What lays out and the plain instructions are those of VNNI, too.
//!
//! Measured: one thread of a Zen 4 makes 65 (Q8_0), 84 (IQ2_XXS), 105 (Q2_K), 120 (Q4_K) G multiply-adds/s with 64 columns.

use crate::kernels::avx2::{self, iq2_xxs, q4_k};
use crate::kernels::prefetch::ask_second_cache;
use crate::kernels::tile::{
    self, Form, IQ2_MIDDLE, Packed, Packed32, Planes, Step, columns, instructions, lay_outs,
};
use crate::kernels::{Columns, ROWS, Target};
use ds4_quant::{BlockIq2Xxs, BlockQ2K, BlockQ4K, BlockQ8_0};
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Makes weights of Q8_0 unsigned.
pub(in crate::kernels) const Q8_MIDDLE: u8 = 128;

instructions! {
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq",
    zero() -> __m512i { _mm512_setzero_si512() }
    load(step: &Step<16>) -> __m512i { load_bytes(bytemuck::cast_ref(step)) }
    words(v: &[i32; 16]) -> __m512i { load_bytes(bytemuck::cast_ref(v)) }
    splat(v: i32) -> __m512i { _mm512_set1_epi32(v) }
    splat_bytes(v: u8) -> __m512i { _mm512_set1_epi8(v as i8) }
    and(a: __m512i, b: __m512i) -> __m512i { _mm512_and_si512(a, b) }
    or(a: __m512i, b: __m512i) -> __m512i { _mm512_or_si512(a, b) }
    xor(a: __m512i, b: __m512i) -> __m512i { _mm512_xor_si512(a, b) }
    right_16<const N: u32>(v: __m512i) -> __m512i { _mm512_srli_epi16::<N>(v) }
    right_32<const N: u32>(v: __m512i) -> __m512i { _mm512_srli_epi32::<N>(v) }
    left_32<const N: u32>(v: __m512i) -> __m512i { _mm512_slli_epi32::<N>(v) }
    multiply_16(a: __m512i, b: __m512i) -> __m512i { _mm512_mullo_epi16(a, b) }
    add_bytes(a: __m512i, b: __m512i) -> __m512i { _mm512_add_epi8(a, b) }
    negative(v: __m512i, signs: __m512i, bits: __m512i) -> __m512i {
        _mm512_mask_sub_epi8(v, _mm512_test_epi8_mask(signs, bits), zero(), v)
    }
    subtract(a: __m512i, b: __m512i) -> __m512i { _mm512_sub_epi32(a, b) }
    products(sum: __m512i, w: __m512i, x: __m512i) -> __m512i {
        _mm512_add_epi16(sum, _mm512_maddubs_epi16(w, x))
    }
    add_scaled(int: __m512i, sum: __m512i, scale: __m512i) -> __m512i {
        _mm512_add_epi32(int, _mm512_madd_epi16(sum, scale))
    }
    pairs(int: __m512i, a: __m512i, b: __m512i) -> __m512i { _mm512_add_epi32(int, _mm512_madd_epi16(a, b)) }
    no_floats() -> __m512 { _mm512_setzero_ps() }
    floats(v: &[f32; 16]) -> __m512 { _mm512_castsi512_ps(load_bytes(bytemuck::cast_ref(v))) }
    store_floats(v: __m512, to: &mut [f32; 16]) -> () { store(_mm512_castps_si512(v), to) }
    add_floats(a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
    scaled_floats(v: __m512, by: f32) -> __m512 { _mm512_mul_ps(v, _mm512_set1_ps(by)) }
    add_block(acc: __m512, int: __m512i, scale: __m512) -> __m512 {
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(int), scale, acc)
    }
    subtract_block(acc: __m512, int: __m512i, scale: __m512) -> __m512 {
        _mm512_fnmadd_ps(_mm512_cvtepi32_ps(int), scale, acc)
    }
}

/// 64 bytes of activations or weights.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
pub(in crate::kernels) fn load_bytes(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: there are 64 bytes; the load needs no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

/// Two times 32 bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
pub(in crate::kernels) fn two(low: &[u8; 32], high: &[u8; 32]) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(avx2::load(low)), avx2::load(high))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
pub(in crate::kernels) fn store<T: bytemuck::Pod>(v: __m512i, to: &mut T) {
    const { assert!(size_of::<T>() == 64) };
    // SAFETY: `to` has 64 bytes; the store needs no alignment.
    unsafe { _mm512_storeu_si512(std::ptr::from_mut(to).cast(), v) };
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
pub(in crate::kernels) fn halves(d: &[[u8; 2]; ROWS]) -> [f32; ROWS] {
    let mut out = [0.0; ROWS];
    // SAFETY: `d` has 32 bytes and `out` 64; nothing here needs alignment.
    unsafe {
        let floats = _mm512_cvtph_ps(_mm256_loadu_si256(d.as_ptr().cast()));
        _mm512_storeu_ps(out.as_mut_ptr(), floats);
    }
    out
}

/// The same 16 bytes four times.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn four_times(table: &[u8; 16]) -> __m512i {
    // SAFETY: there are 16 bytes; the load needs no alignment.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(table.as_ptr().cast()) })
}

/// Bytes of a table from their places in it.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn look_up(table: &[u8; 16], places: __m512i) -> __m512i {
    _mm512_shuffle_epi8(four_times(table), places)
}

/// The bytes of every lane from their places in it.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn shuffle(v: __m512i, places: &[u8; 16]) -> __m512i {
    // SAFETY: there are 16 bytes; the load needs no alignment.
    let places = unsafe { _mm_loadu_si128(places.as_ptr().cast()) };
    _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(places))
}

/// 64 bytes of each row, of which `at` gives those of one, as 16 words of all rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn words_of_rows<'a>(at: impl Fn(usize) -> &'a [u8; 64]) -> [__m512i; 16] {
    let mut rows = [_mm512_setzero_si512(); ROWS];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = load_bytes(at(r));
    }
    transpose(rows)
}

/// Rows of 16 words to columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    // Four rows at a time: `quads[4 g + m]` has words `4 lane + m` of rows `4 g..4 g + 4`.
    let mut quads = rows;
    for (q, r) in quads.as_chunks_mut::<4>().0.iter_mut().zip(rows.as_chunks::<4>().0) {
        let (a, b) = (_mm512_unpacklo_epi32(r[0], r[1]), _mm512_unpackhi_epi32(r[0], r[1]));
        let (c, d) = (_mm512_unpacklo_epi32(r[2], r[3]), _mm512_unpackhi_epi32(r[2], r[3]));
        q[0] = _mm512_unpacklo_epi64(a, c);
        q[1] = _mm512_unpackhi_epi64(a, c);
        q[2] = _mm512_unpacklo_epi64(b, d);
        q[3] = _mm512_unpackhi_epi64(b, d);
    }
    let mut out = rows;
    for m in 0..4 {
        let [a, b, c, d] = [quads[m], quads[4 + m], quads[8 + m], quads[12 + m]];
        let (low, high) = (_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0x44>(c, d));
        out[m] = _mm512_shuffle_i32x4::<0x88>(low, high);
        out[4 + m] = _mm512_shuffle_i32x4::<0xdd>(low, high);
        let (low, high) = (_mm512_shuffle_i32x4::<0xee>(a, b), _mm512_shuffle_i32x4::<0xee>(c, d));
        out[8 + m] = _mm512_shuffle_i32x4::<0x88>(low, high);
        out[12 + m] = _mm512_shuffle_i32x4::<0xdd>(low, high);
    }
    out
}

/// Twice 32 bytes of each row.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn words_of_halves<'a>(at: impl Fn(usize) -> [&'a [u8; 32]; 2]) -> [__m512i; 16] {
    let mut rows = [zero(); ROWS];
    for (r, row) in rows.iter_mut().enumerate() {
        let [low, high] = at(r);
        *row = two(low, high);
    }
    transpose(rows)
}

lay_outs!("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq", 16, __m512i);

columns!(
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq",
    16,
    __m512i,
    __m512,
    wide: false,
    at_once: [8, 6, 4, 2, 1],
    scaled: 8
);
