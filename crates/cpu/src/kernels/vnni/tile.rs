//! 32 weight rows, 16 in a vector, with many activation rows, laid out as without VNNI. A group is one sum of 32 bits; one of Q2_K and
//! Q8_0 is a block.

use super::super::avx512::tile::*;
use crate::kernels::tile::{Form, Packed, Packed32, Planes, columns, instructions};
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

columns!("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni", 16, __m512i, __m512, wide: true, at_once: [8, 6, 4, 2, 1], scaled: 6);

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn q8_0(rows: &[u8], x: &Columns<'_>, out: &mut Target<'_>) {
    multiply_32(|packed, rows| lay_out_q8_0(packed, rows), rows, x, out);
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn q2_k(rows: &[u8], x: &Columns<'_>, out: &mut Target<'_>) {
    multiply::<BlockQ2K>(|packed, b, rows| lay_out_q2_k(packed, b, rows), rows, x, out);
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn q4_k(rows: &[u8], x: &Columns<'_>, out: &mut Target<'_>) {
    multiply::<BlockQ4K>(|packed, b, rows| lay_out_q4_k::<false>(packed, b, rows), rows, x, out);
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn iq2_xxs(rows: &[u8], x: &Columns<'_>, out: &mut Target<'_>) {
    multiply::<BlockIq2Xxs>(|packed, b, rows| lay_out_iq2_xxs::<false>(packed, b, rows), rows, x, out);
}
