//! AVX-512 for floats. The integer formats use the AVX2 kernels: their cost is unpacking and scaling blocks of 32,
//! which two blocks in a 512-bit vector did not make cheaper.
#![allow(unsafe_code)]

use super::{Columns, Kernels, Level, avx2, tiles};
use ds4_quant::f16_to_f32;
use std::arch::x86_64::*;

pub(super) const KERNELS: Kernels = Kernels {
    level: Level::Avx512,
    // SAFETY: the table is handed out by `Kernels::new` only where the CPU has the features; so below.
    f32: |row, x, out| unsafe { f32_dots(row, x, out) },
    // SAFETY: as above.
    f16: |row, x, out| unsafe { f16_dots(row, x, out) },
    // SAFETY: as above.
    q8_0: |row, x, out| unsafe { avx2::q8_0_dots(row, x, out) },
    q8_0_rows: None,
    // SAFETY: as above.
    q2_k: |row, x, out| unsafe { avx2::q2_k_dots(row, x, out) },
    q2_k_rows: None,
    // SAFETY: as above.
    q4_k: |row, x, out| unsafe { avx2::q4_k_dots(row, x, out) },
    q4_k_rows: None,
    // SAFETY: as above.
    iq2_xxs: |row, x, out| unsafe { avx2::iq2_xxs_dots(row, x, out) },
    iq2_xxs_rows: None,
    // SAFETY: as above.
    dot: |a, b| unsafe { dot(a, b) },
    // SAFETY: as above.
    axpy: |a, x, y| unsafe { axpy(a, x, y) },
};

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn load_f32(x: &[f32], at: usize) -> __m512 {
    let x = &x[at..at + 16];
    // SAFETY: `x` has 16 values; the load needs no alignment.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn f32_at(row: &[u8], i: usize) -> __m512 {
    let row = &row[4 * i..4 * i + 64];
    // SAFETY: `row` has 64 bytes; the load needs no alignment.
    unsafe { _mm512_loadu_ps(row.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn f16_at(row: &[u8], i: usize) -> __m512 {
    let row = &row[2 * i..2 * i + 32];
    // SAFETY: `row` has 32 bytes; the load needs no alignment.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(row.as_ptr().cast()) })
}

/// Products of floats, 16 at a time, with two sums per column; the tail in order.
macro_rules! float_tile {
    ($name:ident, $bytes:literal, $load:expr, $one:expr) => {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
        fn $name<const N: usize>(row: &[u8], x: [&[f32]; N]) -> [f32; N] {
            let len = row.len() / $bytes;
            let mut acc = [[_mm512_setzero_ps(); 2]; N];
            let full = len / 32 * 32;
            for i in (0..full).step_by(32) {
                let (w0, w1) = ($load(row, i), $load(row, i + 16));
                for j in 0..N {
                    acc[j][0] = _mm512_fmadd_ps(w0, load_f32(x[j], i), acc[j][0]);
                    acc[j][1] = _mm512_fmadd_ps(w1, load_f32(x[j], i + 16), acc[j][1]);
                }
            }
            let mut out = [0.0; N];
            for j in 0..N {
                out[j] = _mm512_reduce_add_ps(_mm512_add_ps(acc[j][0], acc[j][1]));
                for i in full..len {
                    out[j] += $one(row, i) * x[j][i];
                }
            }
            out
        }
    };
}

float_tile!(f32_tile, 4, f32_at, |row: &[u8], i: usize| f32::from_le_bytes([
    row[4 * i],
    row[4 * i + 1],
    row[4 * i + 2],
    row[4 * i + 3]
]));
float_tile!(f16_tile, 2, f16_at, |row: &[u8], i: usize| f16_to_f32([row[2 * i], row[2 * i + 1]]));

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn f32_dots(row: &[u8], x: &Columns<'_>, out: &mut [f32]) {
    tiles!(x, out, float, f32_tile, row);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn f16_dots(row: &[u8], x: &Columns<'_>, out: &mut [f32]) {
    tiles!(x, out, float, f16_tile, row);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    f32_tile::<1>(bytemuck::cast_slice(a), [b])[0]
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    let wide = _mm512_set1_ps(a);
    let mut parts = y.chunks_exact_mut(16);
    let mut i = 0;
    for part in &mut parts {
        let v = _mm512_fmadd_ps(wide, load_f32(x, i), load_f32(part, 0));
        // SAFETY: `part` has 16 values; the store needs no alignment.
        unsafe { _mm512_storeu_ps(part.as_mut_ptr(), v) };
        i += 16;
    }
    for (y, x) in parts.into_remainder().iter_mut().zip(&x[i..]) {
        *y = a.mul_add(*x, *y);
    }
}
