//! Q8_0, one row, 34 bytes a block of 32: seven instructions a block and activation row, bound by memory.
//!
//! Measured: one thread of a Zen 4 takes 25 to 27 GiB/s of the 31 that it reads; two together 93 % of 62 GB/s and 99 % of 36.

use super::*;
use ds4_quant::act::Act32;
use ds4_quant::{BlockQ8_0, f16_to_f32};

/// Sums of products of a block with `x`, in eight lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn products(w: &[i8; 32], x: &[i8; 32]) -> __m256i {
    let (w, x) = (avx2::load(bytemuck::cast_ref(w)), avx2::load(bytemuck::cast_ref(x)));
    _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
}

q8_0_dots!("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni", products);
