//! 64-bit Arm: NEON, which every such CPU has, without and with dot products of bytes.
//!
//! Integer formats are multiplied as signed bytes. A format has a kernel for one row ([`row`]) and one for many activation rows
//! ([`super::tile`]), which give the same bits; both are made for a level from what adds products of bytes in fours.
#![allow(unsafe_code)]

mod dot;
mod plain;
mod row;
mod tile;

use super::float::float_kernels;
use super::small::{self, Heads, Mix, Small, small_kernels};
use super::{Columns, F16_ROWS, Input, Kernels, Level, ManyRows, TILE, Target, Tile, each_row, tiles};
use ds4_model::cache::RowCodec;
use ds4_quant::{BlockIq2Xxs, BlockQ2K, BlockQ4K, f16_to_f32};
use std::arch::aarch64::*;

/// Weight rows of a tile: two vectors.
const TILE_ROWS: usize = 8;

pub(super) const NEON: Kernels = Kernels {
    level: Level::Neon,
    // SAFETY: NEON is part of the architecture; so below.
    f32: |rows, x, out| unsafe { f32_dots(rows, x, out) },
    f16: |rows, x, out| unsafe { f16_dots(rows, x, out) },
    f16_rows: ManyRows::many(F16_ROWS, |rows, x, out| unsafe { f16_rows(rows, x, out) }),
    q8_0: |rows, x, out| unsafe { plain::q8_0_dots(rows, x, out) },
    q8_0_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { plain::q8_0(rows, x, out) }),
    q2_k: |rows, x, out| unsafe { plain::block_dots::<BlockQ2K>(rows, x, out) },
    q2_k_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { plain::q2_k(rows, x, out) }),
    q4_k: |rows, x, out| unsafe { plain::block_dots::<BlockQ4K>(rows, x, out) },
    q4_k_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { plain::q4_k(rows, x, out) }),
    iq2_xxs: |rows, x, out| unsafe { plain::block_dots::<BlockIq2Xxs>(rows, x, out) },
    iq2_xxs_input: Input::Int256,
    iq2_xxs_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { plain::iq2_xxs(rows, x, out) }),
    dot: |a, b| unsafe { dot(a, b) },
    scores: |q, tile, out| unsafe { scores(q, tile, out) },
    weigh: |weights, tile, out| unsafe { weigh(weights, tile, out) },
    small: SMALL,
    index_scores: |query, keys, scores| unsafe { plain::index_scores(query, keys, scores) },
};

pub(super) const NEON_DOT: Kernels = Kernels {
    level: Level::NeonDot,
    // SAFETY: the table is handed out by `Kernels::new` only where the CPU has the feature; so below.
    q8_0: |rows, x, out| unsafe { dot::q8_0_dots(rows, x, out) },
    q8_0_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { dot::q8_0(rows, x, out) }),
    q2_k: |rows, x, out| unsafe { dot::block_dots::<BlockQ2K>(rows, x, out) },
    q2_k_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { dot::q2_k(rows, x, out) }),
    q4_k: |rows, x, out| unsafe { dot::block_dots::<BlockQ4K>(rows, x, out) },
    q4_k_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { dot::q4_k(rows, x, out) }),
    iq2_xxs: |rows, x, out| unsafe { dot::block_dots::<BlockIq2Xxs>(rows, x, out) },
    iq2_xxs_input: Input::Int256,
    iq2_xxs_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { dot::iq2_xxs(rows, x, out) }),
    index_scores: |query, keys, scores| unsafe { dot::index_scores(query, keys, scores) },
    ..NEON
};

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

small_kernels!("neon");

float_kernels!("neon", 4, float32x4_t, 2 x 4, tile::no_floats, load, half_at, store, splat, fma, tile::add_floats, sum);
