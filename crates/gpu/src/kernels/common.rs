//! What many kernels share: sums over a cube, int8 forms of activations.

use super::dot::{Form, Four, Output};
use super::plane::{lane, plane, plane_total, planes};
use cubecl::prelude::*;

/// Sum over the cube, the same in every unit and for every plane size; `scratch` has room for a value a plane.
#[cube]
pub fn cube_sum(value: f32, scratch: &mut Shared<[f32]>) -> f32 {
    let sum = plane_total(value);
    sync_cube();
    if lane() == 0 {
        scratch[plane()] = sum;
    }
    sync_cube();
    let mut total = 0.0f32;
    for i in 0..planes() {
        total += scratch[i];
    }
    total
}

/// The same without a loop, for use within one; `most` bounds the planes of a cube.
#[cube]
pub fn cube_sum_unrolled(value: f32, scratch: &mut Shared<[f32]>, #[comptime] most: usize) -> f32 {
    let sum = plane_total(value);
    sync_cube();
    if lane() == 0 {
        scratch[plane()] = sum;
    }
    sync_cube();
    let planes = planes();
    let mut total = 0.0f32;
    #[unroll]
    for i in 0..most {
        if i < planes {
            total += scratch[i];
        }
    }
    total
}

/// Largest of the values of each aligned group of `lanes` (at most 8) units.
#[cube]
pub fn group_max(value: f32, #[comptime] lanes: u32) -> f32 {
    let mut max = value;
    if comptime!(lanes > 1) {
        max = f32::max(max, plane_shuffle_xor(max, 1));
    }
    if comptime!(lanes > 2) {
        max = f32::max(max, plane_shuffle_xor(max, 2));
    }
    if comptime!(lanes > 4) {
        max = f32::max(max, plane_shuffle_xor(max, 4));
    }
    max
}

/// Rounds to the nearest integer, ties to even, for |x| < 2^22.
#[cube]
pub fn round_even(x: f32) -> i32 {
    let magic = 12_582_912.0f32;
    i32::reinterpret(x + magic) - i32::reinterpret(magic)
}

/// Stores four values of a row, in the forms that are wanted. Consecutive units hold consecutive
/// fours, eight a block of 32; all units of a plane must call this together.
#[cube]
pub fn store_four(out: &mut Output, row: usize, four: usize, value: Four, valid: bool) {
    if valid {
        let at = row * comptime!(out.stride / 4) + four;
        if comptime!(out.form != Form::Halves) {
            out.values[at] = value;
        }
        if comptime!(matches!(out.form, Form::Halves | Form::Both)) {
            out.halves[at] = Vector::cast_from(value);
        }
    }
    if comptime!(out.form == Form::Quantized) {
        quantize_four(out, row, four, value, valid);
    }
}

/// Four values in int8, those of eight units side by side by one scale.
#[derive(CubeType, Clone, Copy)]
pub struct Bytes {
    /// The values, over the scale.
    pub word: u32,
    /// The scale of the block of 32.
    pub scale: f32,
    /// Sum of 16 quants, those of four units.
    pub sum: i32,
}

/// All units of a plane must call this together.
#[cube]
pub fn bytes_of(value: Four) -> Bytes {
    let mut max = 0.0f32;
    #[unroll]
    for i in 0..4usize {
        max = f32::max(max, f32::abs(value.extract(i)));
    }
    max = group_max(max, 8u32);
    let inv = select(max == 0.0f32, 0.0f32, 127.0f32 / max);
    let mut word = 0u32;
    let mut sum = 0i32;
    #[unroll]
    for i in 0..4usize {
        let q = round_even(value.extract(i) * inv);
        sum += q;
        word |= (u32::reinterpret(q) & 255) << comptime!(8 * i as u32);
    }
    sum += plane_shuffle_xor(sum, 1);
    sum += plane_shuffle_xor(sum, 2);
    Bytes { word, scale: max / 127.0f32, sum }
}

/// The int8 form of [`store_four`].
#[cube]
pub fn quantize_four(out: &mut Output, row: usize, four: usize, value: Four, valid: bool) {
    let bytes = bytes_of(value);
    if valid {
        out.words[row * comptime!(out.stride / 4) + four] = bytes.word;
        if four % 8 == 0 {
            out.scales[row * comptime!(out.stride / 32) + four / 8] = bytes.scale;
        }
        if four % 4 == 0 {
            out.sums[row * comptime!(out.stride / 16) + four / 4] = bytes.sum;
        }
    }
}

/// `1 / sqrt(mean + eps)`.
#[cube]
pub fn rms_scale(sum: f32, #[comptime] len: usize, #[comptime] eps: Real) -> f32 {
    1.0f32 / f32::sqrt(sum / comptime!(len as f32) + comptime!(eps.get()))
}

/// An f32 that a kernel can be specialised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Real(u32);

impl Real {
    /// From its value.
    pub fn new(value: f32) -> Self {
        Real(value.to_bits())
    }
    /// Its value.
    pub fn get(self) -> f32 {
        f32::from_bits(self.0)
    }
}

/// The logistic function.
#[cube]
pub fn sigmoid(z: f32) -> f32 {
    1.0f32 / (1.0f32 + f32::exp(-z))
}
