//! Q2_K: 256 weights of two bits.

use crate::act::Act256;
use crate::blocks::{Block, BlockQ2K, f16_to_f32};
use ds4_gguf::TensorType;

impl BlockQ2K {
    /// Two-bit quant of weight `i`: half `i / 128`, plane `(i % 128) / 32`, lane `i % 32`.
    fn quant(&self, i: usize) -> u8 {
        (self.q[32 * (i / 128) + i % 32] >> (2 * (i % 128 / 32))) & 3
    }
}

impl Block for BlockQ2K {
    const TYPE: TensorType = TensorType::Q2K;
    const LEN: usize = 256;

    fn dequantize(&self, out: &mut [f32]) {
        let (d, dmin) = (f16_to_f32(self.d), f16_to_f32(self.dmin));
        for (i, o) in out.iter_mut().enumerate().take(256) {
            let s = self.scales[i / 16];
            *o = d * f32::from(s & 15) * f32::from(self.quant(i)) - dmin * f32::from(s >> 4);
        }
    }
}

/// Dot product of a row with activations quantized per 256.
pub(crate) fn dot(row: &[BlockQ2K], x: Act256<'_>) -> f32 {
    let mut sum = 0.0;
    for (b, block) in row.iter().enumerate() {
        let q = &x.q[256 * b..256 * b + 256];
        let (mut scaled, mut mins) = (0i32, 0i32);
        for s in 0..16 {
            let int: i32 = (16 * s..16 * s + 16).map(|i| i32::from(block.quant(i)) * i32::from(q[i])).sum();
            scaled += i32::from(block.scales[s] & 15) * int;
            mins += i32::from(block.scales[s] >> 4) * i32::from(x.sums[16 * b + s]);
        }
        sum += x.d[b] * (f16_to_f32(block.d) * scaled as f32 - f16_to_f32(block.dmin) * mins as f32);
    }
    sum
}
