//! Without the instruction for dot products of bytes: products of 16 bits are added in twos, and these in twos to 32 bits.

use super::row::{Unpack, rows};
use super::tile::*;
use crate::kernels::index::{self, IndexQuery};
use crate::kernels::prefetch::prefetch;
use crate::kernels::tile::{self, Form, Packed, Packed32, Planes, columns, instructions};
use crate::kernels::{Columns, Target, each_row, tiles};
use ds4_quant::act::{Act32, Act256};
use ds4_quant::{BlockIq2Xxs, BlockQ2K, BlockQ4K, BlockQ8_0, e8m0_to_f32, f16_to_f32};
use std::arch::aarch64::*;

use std::cell::RefCell;

instructions! {
    "neon",
    products(sum: int32x4_t, w: int32x4_t, x: int32x4_t) -> int32x4_t {
        let (w, x) = (vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
        let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
        // No pair can overflow: 2 * 128 * 127 < 2^15.
        vpadalq_s16(sum, vpaddq_s16(low, vmull_high_s8(w, x)))
    }
}

rows!("neon");

columns!("neon", 4, int32x4_t, float32x4_t, wide: true, at_once: [8, 4, 2, 1], scaled: 4);
