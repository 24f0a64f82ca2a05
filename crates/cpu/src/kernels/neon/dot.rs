//! With dot products of four bytes (Armv8.2 and later: every Mac of that architecture, servers since Neoverse N1).

use super::row::{Unpack, rows};
use super::tile::*;
use crate::kernels::index::{self, IndexQuery};
use crate::kernels::prefetch::prefetch;
use crate::kernels::tile::{self, Form, Packed, Packed32, Planes, columns, instructions};
use crate::kernels::{Columns, Target, each_row, tiles};
use ds4_quant::act::{Act32, Act256};
use ds4_quant::{BlockIq2Xxs, BlockQ2K, BlockQ4K, BlockQ8_0, e8m0_to_f32, f16_to_f32};
use std::arch::aarch64::*;
use std::arch::asm;
use std::cell::RefCell;

instructions! {
    "neon,dotprod",
    products(sum: int32x4_t, w: int32x4_t, x: int32x4_t) -> int32x4_t {
        let out;
        // SAFETY: the instruction is of the enabled feature, and works on registers only. It has no stable intrinsic.
        unsafe {
            asm!(
                "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
                inlateout(vreg) sum => out,
                in(vreg) w,
                in(vreg) x,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        out
    }
}

rows!("neon,dotprod");

columns!("neon,dotprod", 4, int32x4_t, float32x4_t, wide: true, at_once: [8, 4, 2, 1], scaled: 4);
