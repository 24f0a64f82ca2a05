//! 64-bit Arm: NEON, which every such CPU has.
//!
//! Integer formats go through [`dot32`]: 32 signed weights with 32 signed activations, widened to i16 products
//! and added in pairs to i32 lanes. Weights of the K formats and of IQ2_XXS are unpacked to bytes once per
//! block and tile.
#![allow(unsafe_code)]

use super::float::float_kernels;
use super::index;
use super::{Columns, Kernels, Level, ManyRows, ROWS, TILE, Target, Tile, tiles};
use ds4_quant::act::{Act32, Act256};
use ds4_quant::{BlockIq2Xxs, BlockQ2K, BlockQ4K, BlockQ8_0, IQ2XXS_GRID, f16_to_f32, iq2_signs, scale_min};
use std::arch::aarch64::*;

pub(super) const KERNELS: Kernels = Kernels {
    level: Level::Neon,
    // SAFETY: NEON is part of the architecture; so below.
    f32: |row, x, out| unsafe { f32_dots(row, x, out) },
    f16: |row, x, out| unsafe { f16_dots(row, x, out) },
    f16_rows: ManyRows::many(ROWS, |rows, x, out| unsafe { f16_rows(rows, x, out) }),
    q8_0: q8_0_dots,
    q8_0_rows: None,
    q2_k: q2_k_dots,
    q2_k_rows: None,
    q4_k: q4_k_dots,
    q4_k_rows: None,
    iq2_xxs: iq2_xxs_dots,
    iq2_xxs_rows: None,
    dot: |a, b| unsafe { dot(a, b) },
    scores: |q, tile, out| unsafe { scores(q, tile, out) },
    weigh: |weights, tile, out| unsafe { weigh(weights, tile, out) },
    index_scores: index::scores,
};

/// Four lanes whose sum is the dot product of the first 32 values of `w` and `q`.
#[inline(always)]
fn dot32(w: &[i8], q: &[i8]) -> int32x4_t {
    let (w, q) = (&w[..32], &q[..32]);
    // SAFETY: both slices have 32 bytes; NEON is part of the architecture.
    unsafe {
        let (w0, w1) = (vld1q_s8(w.as_ptr()), vld1q_s8(w.as_ptr().add(16)));
        let (q0, q1) = (vld1q_s8(q.as_ptr()), vld1q_s8(q.as_ptr().add(16)));
        // Each product fits i16; each is added to i32 lanes before the next, so nothing overflows.
        let sum = vpaddlq_s16(vmull_s8(vget_low_s8(w0), vget_low_s8(q0)));
        let sum = vpadalq_s16(sum, vmull_high_s8(w0, q0));
        let sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(w1), vget_low_s8(q1)));
        vpadalq_s16(sum, vmull_high_s8(w1, q1))
    }
}

/// `acc + scale * lanes`.
#[inline(always)]
fn add_scaled(acc: float32x4_t, lanes: int32x4_t, scale: f32) -> float32x4_t {
    // SAFETY: NEON is part of the architecture.
    unsafe { vfmaq_n_f32(acc, vcvtq_f32_s32(lanes), scale) }
}

/// `acc + scale * lanes`, in integers.
#[inline(always)]
fn add_scaled_int(acc: int32x4_t, lanes: int32x4_t, scale: i32) -> int32x4_t {
    // SAFETY: NEON is part of the architecture.
    unsafe { vmlaq_n_s32(acc, lanes, scale) }
}

#[inline(always)]
fn zero_f32() -> float32x4_t {
    // SAFETY: NEON is part of the architecture.
    unsafe { vdupq_n_f32(0.0) }
}

#[inline(always)]
fn zero_i32() -> int32x4_t {
    // SAFETY: NEON is part of the architecture.
    unsafe { vdupq_n_s32(0) }
}

#[inline(always)]
fn sum(v: float32x4_t) -> f32 {
    // SAFETY: NEON is part of the architecture.
    unsafe { vaddvq_f32(v) }
}

#[inline(always)]
fn load(x: &[f32], at: usize) -> float32x4_t {
    let x = &x[at..at + 4];
    // SAFETY: `x` has 4 values.
    unsafe { vld1q_f32(x.as_ptr()) }
}

#[inline(always)]
fn store(x: &mut [f32], at: usize, v: float32x4_t) {
    let x = &mut x[at..at + 4];
    // SAFETY: `x` has 4 values.
    unsafe { vst1q_f32(x.as_mut_ptr(), v) }
}

#[inline(always)]
fn half_at(row: &[u8], i: usize) -> float32x4_t {
    let h = row[2 * i..2 * i + 8].as_chunks::<2>().0;
    load(&[f16_to_f32(h[0]), f16_to_f32(h[1]), f16_to_f32(h[2]), f16_to_f32(h[3])], 0)
}

#[inline(always)]
fn splat(v: f32) -> float32x4_t {
    // SAFETY: NEON is part of the architecture.
    unsafe { vdupq_n_f32(v) }
}

#[inline(always)]
fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
    // SAFETY: NEON is part of the architecture.
    unsafe { vfmaq_f32(c, a, b) }
}

#[inline(always)]
fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: NEON is part of the architecture.
    unsafe { vaddq_f32(a, b) }
}

float_kernels!("neon", 4, float32x4_t, 2 x 4, zero_f32, load, half_at, store, splat, fma, add, sum);

fn q8_0_tile<const N: usize>(row: &[BlockQ8_0], x: [Act32<'_>; N]) -> [f32; N] {
    let mut acc = [zero_f32(); N];
    for (b, block) in row.iter().enumerate() {
        let d = f16_to_f32(block.d);
        for j in 0..N {
            acc[j] = add_scaled(acc[j], dot32(&block.q, &x[j].q[32 * b..]), d * x[j].d[b]);
        }
    }
    acc.map(sum)
}

fn q8_0_dots(row: &[u8], x: &Columns<'_>, out: &mut [f32]) {
    let row: &[BlockQ8_0] = bytemuck::cast_slice(row);
    tiles!(x, out, act32, q8_0_tile, row);
}

/// Sum of the minima times the sums of the activations under them.
fn min_sum(mins: &[i32; 16], sums: &[i16]) -> f32 {
    mins.iter().zip(sums).map(|(m, &s)| m * i32::from(s)).sum::<i32>() as f32
}

/// A block of a K format, unpacked: 16 sub-blocks of 16 would need two scales per [`dot32`], so weights come
/// already multiplied where that fits a byte (Q2_K: 3 * 15), or with one scale per 32 (Q4_K).
fn k_block<const N: usize>(
    b: usize,
    w: &[i8; 256],
    scales: &[i32; 8],
    mins: &[i32; 16],
    (d, dmin): (f32, f32),
    x: &[Act256<'_>; N],
    acc: &mut [(float32x4_t, f32); N],
) {
    for j in 0..N {
        let mut int = zero_i32();
        for g in 0..8 {
            int = add_scaled_int(int, dot32(&w[32 * g..], &x[j].q[256 * b + 32 * g..]), scales[g]);
        }
        acc[j].0 = add_scaled(acc[j].0, int, d * x[j].d[b]);
        acc[j].1 -= dmin * x[j].d[b] * min_sum(mins, &x[j].sums[16 * b..16 * b + 16]);
    }
}

fn q2_k_tile<const N: usize>(row: &[BlockQ2K], x: [Act256<'_>; N]) -> [f32; N] {
    let mut acc = [(zero_f32(), 0.0); N];
    for (b, block) in row.iter().enumerate() {
        let mut w = [0i8; 256];
        let mut mins = [0i32; 16];
        for s in 0..16 {
            let (half, plane, lane) = (s / 8, s % 8 / 2, s % 2 * 16);
            let scale = block.scales[s] & 15;
            mins[s] = i32::from(block.scales[s] >> 4);
            let bytes = &block.q[32 * half + lane..32 * half + lane + 16];
            for (w, q) in w[16 * s..16 * s + 16].iter_mut().zip(bytes) {
                *w = (((q >> (2 * plane)) & 3) * scale) as i8;
            }
        }
        let d = (f16_to_f32(block.d), f16_to_f32(block.dmin));
        k_block(b, &w, &[1; 8], &mins, d, &x, &mut acc);
    }
    acc.map(|(lanes, rest)| sum(lanes) + rest)
}

fn q2_k_dots(row: &[u8], x: &Columns<'_>, out: &mut [f32]) {
    let row: &[BlockQ2K] = bytemuck::cast_slice(row);
    tiles!(x, out, act256, q2_k_tile, row);
}

fn q4_k_tile<const N: usize>(row: &[BlockQ4K], x: [Act256<'_>; N]) -> [f32; N] {
    let mut acc = [(zero_f32(), 0.0); N];
    for (b, block) in row.iter().enumerate() {
        let mut w = [0i8; 256];
        let (mut scales, mut mins) = ([0i32; 8], [0i32; 16]);
        for g in 0..8 {
            let (scale, min) = scale_min(&block.scales, g);
            scales[g] = i32::from(scale);
            (mins[2 * g], mins[2 * g + 1]) = (i32::from(min), i32::from(min));
            let bytes = &block.q[32 * (g / 2)..32 * (g / 2) + 32];
            for (w, q) in w[32 * g..32 * g + 32].iter_mut().zip(bytes) {
                *w = if g % 2 == 0 { q & 15 } else { q >> 4 } as i8;
            }
        }
        let d = (f16_to_f32(block.d), f16_to_f32(block.dmin));
        k_block(b, &w, &scales, &mins, d, &x, &mut acc);
    }
    acc.map(|(lanes, rest)| sum(lanes) + rest)
}

fn q4_k_dots(row: &[u8], x: &Columns<'_>, out: &mut [f32]) {
    let row: &[BlockQ4K] = bytemuck::cast_slice(row);
    tiles!(x, out, act256, q4_k_tile, row);
}

fn iq2_xxs_tile<const N: usize>(row: &[BlockIq2Xxs], x: [Act256<'_>; N]) -> [f32; N] {
    let mut acc = [zero_f32(); N];
    for (b, block) in row.iter().enumerate() {
        let mut w = [0i8; 256];
        let mut scales = [0i32; 8];
        for g in 0..8 {
            let (codes, aux) = block.group(g);
            scales[g] = 2 * (aux >> 28) as i32 + 1;
            for v in 0..4 {
                let level = IQ2XXS_GRID[(codes >> (8 * v)) as usize & 255];
                let signs = iq2_signs(aux >> (7 * v));
                for (k, w) in w[32 * g + 8 * v..32 * g + 8 * v + 8].iter_mut().enumerate() {
                    *w = if signs >> k & 1 == 1 { -(level[k] as i8) } else { level[k] as i8 };
                }
            }
        }
        let d = f16_to_f32(block.d) * 0.125;
        for j in 0..N {
            let mut int = zero_i32();
            for g in 0..8 {
                int = add_scaled_int(int, dot32(&w[32 * g..], &x[j].q[256 * b + 32 * g..]), scales[g]);
            }
            acc[j] = add_scaled(acc[j], int, d * x[j].d[b]);
        }
    }
    acc.map(sum)
}

fn iq2_xxs_dots(row: &[u8], x: &Columns<'_>, out: &mut [f32]) {
    let row: &[BlockIq2Xxs] = bytemuck::cast_slice(row);
    tiles!(x, out, act256, iq2_xxs_tile, row);
}
