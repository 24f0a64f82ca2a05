//! 32 weight rows, 16 in a vector, with many activation rows, laid out as without VNNI. A group is one sum of 32 bits; one of Q2_K and
//! Q8_0 is a block.
//!
//! Measured: one thread of a Zen 4 makes 150 to 168 G multiply-adds/s of the 237 that there can be with 64 columns; one of a Zen 5 made 319
//! to 338 of 544.

use super::super::avx512::tile::*;
use crate::kernels::tile::{self, Form, Packed, Packed32, Planes, columns, instructions};
use crate::kernels::{Columns, Target};
use ds4_quant::{BlockIq2Xxs, BlockQ2K, BlockQ4K};
use std::arch::x86_64::*;
use std::cell::RefCell;

instructions! {
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni",
    products(sum: __m512i, w: __m512i, x: __m512i) -> __m512i { _mm512_dpbusd_epi32(sum, w, x) }
    add_scaled(int: __m512i, sum: __m512i, scale: __m512i) -> __m512i {
        _mm512_add_epi32(int, _mm512_mullo_epi32(sum, scale))
    }
    pairs(int: __m512i, a: __m512i, b: __m512i) -> __m512i { _mm512_dpwssd_epi32(int, a, b) }
}

columns!(
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni",
    16,
    __m512i,
    __m512,
    wide: true,
    at_once: [8, 6, 4, 2, 1],
    scaled: 6
);
