//! Q8_0: 32 weights, one f16 scale, eight-bit quants.

use crate::act::Act32;
use crate::blocks::{Block, BlockQ8_0, f16_to_f32};
use ds4_gguf::TensorType;

impl Block for BlockQ8_0 {
    const TYPE: TensorType = TensorType::Q8_0;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        let d = f16_to_f32(self.d);
        for (o, &q) in out.iter_mut().zip(&self.q) {
            *o = d * f32::from(q);
        }
    }
}

/// Dot product of a row with activations quantized per 32.
pub(crate) fn dot(row: &[BlockQ8_0], x: Act32<'_>) -> f32 {
    let mut sum = 0.0;
    for (i, block) in row.iter().enumerate() {
        let q = &x.q[32 * i..32 * i + 32];
        let int: i32 = block.q.iter().zip(q).map(|(&w, &a)| i32::from(w) * i32::from(a)).sum();
        sum += f16_to_f32(block.d) * x.d[i] * int as f32;
    }
    sum
}

/// Encodes `x` (a multiple of 32 values) as Q8_0 blocks appended to `out`, rounding to nearest.
///
/// The scale is the largest magnitude over 127; quants are computed with the unrounded reciprocal, as the
/// common encoders do.
pub fn quantize_q8_0(x: &[f32], out: &mut Vec<u8>) {
    debug_assert_eq!(x.len() % 32, 0);
    for block in x.chunks_exact(32) {
        let max = block.iter().fold(0f32, |m, v| m.max(v.abs()));
        let d = max / 127.0;
        let inv = if d == 0.0 { 0.0 } else { 1.0 / d };
        out.extend(half::f16::from_f32(d).to_le_bytes());
        out.extend(block.iter().map(|v| (v * inv).round() as i8 as u8));
    }
}
