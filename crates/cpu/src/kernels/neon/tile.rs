//! Eight weight rows, four in a vector, with many activation rows: what lays them out, and the plain instructions. What multiplies is
//! that of a level.

use super::super::prefetch::ask_second_cache;
use crate::kernels::tile::{self, IQ2_MIDDLE, Packed, Packed32, Planes, Step, instructions, lay_outs};
use ds4_quant::{BlockIq2Xxs, BlockQ2K, BlockQ4K, BlockQ8_0, f16_to_f32};
use std::arch::aarch64::*;

/// Bytes are multiplied as signed ones.
pub(super) const Q8_MIDDLE: u8 = 0;

instructions! {
    "neon",
    zero() -> int32x4_t { vdupq_n_s32(0) }
    load(step: &Step<4>) -> int32x4_t { load_bytes(bytemuck::cast_ref(step)) }
    words(v: &[i32; 4]) -> int32x4_t { load_bytes(bytemuck::cast_ref(v)) }
    splat(v: i32) -> int32x4_t { vdupq_n_s32(v) }
    splat_bytes(v: u8) -> int32x4_t { vreinterpretq_s32_u8(vdupq_n_u8(v)) }
    and(a: int32x4_t, b: int32x4_t) -> int32x4_t { vandq_s32(a, b) }
    or(a: int32x4_t, b: int32x4_t) -> int32x4_t { vorrq_s32(a, b) }
    xor(a: int32x4_t, b: int32x4_t) -> int32x4_t { veorq_s32(a, b) }
    right_16<const N: i32>(v: int32x4_t) -> int32x4_t {
        vreinterpretq_s32_u16(vshrq_n_u16::<N>(vreinterpretq_u16_s32(v)))
    }
    right_32<const N: i32>(v: int32x4_t) -> int32x4_t {
        vreinterpretq_s32_u32(vshrq_n_u32::<N>(vreinterpretq_u32_s32(v)))
    }
    left_32<const N: i32>(v: int32x4_t) -> int32x4_t { vshlq_n_s32::<N>(v) }
    multiply_16(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vreinterpretq_s32_s16(vmulq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)))
    }
    add_bytes(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vreinterpretq_s32_u8(vaddq_u8(vreinterpretq_u8_s32(a), vreinterpretq_u8_s32(b)))
    }
    negative(v: int32x4_t, signs: int32x4_t, bits: int32x4_t) -> int32x4_t {
        let signs = vtstq_u8(vreinterpretq_u8_s32(signs), vreinterpretq_u8_s32(bits));
        let v = vreinterpretq_s8_s32(v);
        vreinterpretq_s32_s8(vbslq_s8(signs, vnegq_s8(v), v))
    }
    subtract(a: int32x4_t, b: int32x4_t) -> int32x4_t { vsubq_s32(a, b) }
    add_scaled(int: int32x4_t, sum: int32x4_t, scale: int32x4_t) -> int32x4_t { vmlaq_s32(int, sum, scale) }
    pairs(int: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        let (a, b) = (vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b));
        let low = vmull_s16(vget_low_s16(a), vget_low_s16(b));
        vaddq_s32(int, vpaddq_s32(low, vmull_high_s16(a, b)))
    }
    no_floats() -> float32x4_t { vdupq_n_f32(0.0) }
    floats(v: &[f32; 4]) -> float32x4_t { vreinterpretq_f32_s32(load_bytes(bytemuck::cast_ref(v))) }
    store_floats(v: float32x4_t, to: &mut [f32; 4]) -> () { store(vreinterpretq_s32_f32(v), to) }
    add_floats(a: float32x4_t, b: float32x4_t) -> float32x4_t { vaddq_f32(a, b) }
    scaled_floats(v: float32x4_t, by: f32) -> float32x4_t { vmulq_n_f32(v, by) }
    add_block(acc: float32x4_t, int: int32x4_t, scale: float32x4_t) -> float32x4_t {
        vfmaq_f32(acc, vcvtq_f32_s32(int), scale)
    }
    subtract_block(acc: float32x4_t, int: int32x4_t, scale: float32x4_t) -> float32x4_t {
        vfmsq_f32(acc, vcvtq_f32_s32(int), scale)
    }
    look_up(table: &[u8; 16], places: int32x4_t) -> int32x4_t {
        vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(load_bytes(table)), vreinterpretq_u8_s32(places)))
    }
    shuffle(v: int32x4_t, places: &[u8; 16]) -> int32x4_t {
        vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(v), vreinterpretq_u8_s32(load_bytes(places))))
    }
}

/// 16 bytes of activations or weights.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_bytes(bytes: &[u8; 16]) -> int32x4_t {
    // SAFETY: there are 16 bytes; the load needs no alignment.
    vreinterpretq_s32_u8(unsafe { vld1q_u8(bytes.as_ptr()) })
}

#[inline]
#[target_feature(enable = "neon")]
pub(super) fn store<T: bytemuck::Pod>(v: int32x4_t, to: &mut T) {
    const { assert!(size_of::<T>() == 16) };
    // SAFETY: `to` has 16 bytes; the store needs no alignment.
    unsafe { vst1q_u8(std::ptr::from_mut(to).cast(), vreinterpretq_u8_s32(v)) };
}

#[inline]
fn halves(d: &[[u8; 2]; 4]) -> [f32; 4] {
    d.map(f16_to_f32)
}

/// Four words of each of four rows as columns.
#[inline]
#[target_feature(enable = "neon")]
fn turn(rows: [int32x4_t; 4]) -> [int32x4_t; 4] {
    let [a, b, c, d] = rows;
    let pair = |a, b| (vreinterpretq_s64_s32(vtrn1q_s32(a, b)), vreinterpretq_s64_s32(vtrn2q_s32(a, b)));
    let ((even, odd), (even2, odd2)) = (pair(a, b), pair(c, d));
    [
        vreinterpretq_s32_s64(vzip1q_s64(even, even2)),
        vreinterpretq_s32_s64(vzip1q_s64(odd, odd2)),
        vreinterpretq_s32_s64(vzip2q_s64(even, even2)),
        vreinterpretq_s32_s64(vzip2q_s64(odd, odd2)),
    ]
}

/// Twice 32 bytes of each row, of which `at` gives those of one, as 16 words of all rows.
#[inline]
#[target_feature(enable = "neon")]
fn words_of_halves<'a>(at: impl Fn(usize) -> [&'a [u8; 32]; 2]) -> [int32x4_t; 16] {
    let mut out = [zero(); 16];
    for part in 0..4 {
        let mut rows = [zero(); 4];
        for r in 0..4 {
            rows[r] = load_bytes(&at(r)[part / 2].as_chunks().0[part % 2]);
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
#[target_feature(enable = "neon")]
fn words_of_rows<'a>(at: impl Fn(usize) -> &'a [u8; 64]) -> [int32x4_t; 16] {
    words_of_halves(|r| {
        let halves = at(r).as_chunks::<32>().0;
        [&halves[0], &halves[1]]
    })
}

/// Scales and minima of a block of Q4_K.
mod q4_k {
    /// Eight bytes as 32 bits.
    pub(super) fn words(bytes: u64) -> [u8; 32] {
        bytemuck::cast(bytes.to_le_bytes().map(i32::from))
    }

    /// Eight bytes, twice each, as 16 bits.
    pub(super) fn twice(bytes: u64) -> [u8; 32] {
        bytemuck::cast(bytes.to_le_bytes().map(|b| [i16::from(b); 2]))
    }
}

mod iq2_xxs {
    /// Magnitudes of a group of 32 weights.
    pub(super) fn magnitudes(codes: [u8; 8]) -> [[u8; 8]; 4] {
        [0, 1, 2, 3].map(|v| ds4_quant::IQ2XXS_GRID[usize::from(codes[v])])
    }
}

lay_outs!("neon", 4, int32x4_t);
