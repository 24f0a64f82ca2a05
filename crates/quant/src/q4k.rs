//! Q4_K: 256 weights of four bits.

use crate::act::Act256;
use crate::blocks::{Block, BlockQ4K, f16_to_f32};
use ds4_gguf::TensorType;

/// Six-bit scale and minimum of group `g` (0..8) from the twelve packed bytes.
pub fn scale_min(p: &[u8; 12], g: usize) -> (u8, u8) {
    if g < 4 {
        (p[g] & 63, p[g + 4] & 63)
    } else {
        ((p[g + 4] & 15) | ((p[g - 4] >> 6) << 4), (p[g + 4] >> 4) | ((p[g] >> 6) << 4))
    }
}

impl BlockQ4K {
    fn quant(&self, i: usize) -> u8 {
        let byte = self.q[32 * (i / 64) + i % 32];
        if (i / 32).is_multiple_of(2) { byte & 15 } else { byte >> 4 }
    }
}

impl Block for BlockQ4K {
    const TYPE: TensorType = TensorType::Q4K;
    const LEN: usize = 256;

    fn dequantize(&self, out: &mut [f32]) {
        let (d, dmin) = (f16_to_f32(self.d), f16_to_f32(self.dmin));
        for (i, o) in out.iter_mut().enumerate().take(256) {
            let (s, m) = scale_min(&self.scales, i / 32);
            *o = d * f32::from(s) * f32::from(self.quant(i)) - dmin * f32::from(m);
        }
    }
}

/// Dot product of a row with activations quantized per 256.
pub(crate) fn dot(row: &[BlockQ4K], x: Act256<'_>) -> f32 {
    let mut sum = 0.0;
    for (b, block) in row.iter().enumerate() {
        let q = &x.q[256 * b..256 * b + 256];
        let (mut scaled, mut mins) = (0i32, 0i32);
        for g in 0..8 {
            let (s, m) = scale_min(&block.scales, g);
            let int: i32 = (32 * g..32 * g + 32).map(|i| i32::from(block.quant(i)) * i32::from(q[i])).sum();
            let group_sum = i32::from(x.sums[16 * b + 2 * g]) + i32::from(x.sums[16 * b + 2 * g + 1]);
            scaled += i32::from(s) * int;
            mins += i32::from(m) * group_sum;
        }
        sum += x.d[b] * (f16_to_f32(block.d) * scaled as f32 - f16_to_f32(block.dmin) * mins as f32);
    }
    sum
}
