//! Q2_K, one row, 84 bytes a block: planes of quants are multiplied in the order of the file.
//!
//! Measured: one thread of a Zen 4 takes 11 GiB/s of the 27 that it reads from memory, of a Zen 5 20 to 22 of 34 to 38.

use super::*;
use crate::kernels::avx2::q2_k::scales_minima;
use ds4_quant::BlockQ2K;
use ds4_quant::act::Act256;

/// Scales of the four lanes of planes `p` and `p + 1`, as words, where their products are packed to words.
const SCALES: [[i16; 32]; 2] = {
    let mut index = [[0; 32]; 2];
    let mut i = 0;
    while i < 64 {
        let (pair, lane, word) = (i / 32, i % 32 / 8, i % 8);
        let plane = 2 * pair + word / 4;
        index[pair][i % 32] = (8 * (lane / 2) + 2 * plane + lane % 2) as i16;
        i += 1;
    }
    index
};

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn products<const N: usize>(block: &BlockQ2K, x: [(&[i8; 256], &[i16; 16]); N]) -> [(__m512i, __m512i); N] {
    let q = load(&block.q);
    let three = _mm512_set1_epi8(3);
    let (scales, minima) = scales_minima(block);
    let scales = _mm512_castsi256_si512(_mm256_cvtepu8_epi16(scales));
    let scales = [
        _mm512_permutexvar_epi16(places(&SCALES[0]), scales),
        _mm512_permutexvar_epi16(places(&SCALES[1]), scales),
    ];
    let planes = [
        _mm512_and_si512(q, three),
        _mm512_and_si512(_mm512_srli_epi16::<2>(q), three),
        _mm512_and_si512(_mm512_srli_epi16::<4>(q), three),
        _mm512_and_si512(_mm512_srli_epi16::<6>(q), three),
    ];
    let zero = _mm512_setzero_si512();
    let mut out = [(zero, zero); N];
    for (out, (x, sums)) in out.iter_mut().zip(x) {
        let mut int = zero;
        for pair in 0..2 {
            let p = 2 * pair;
            let low = _mm512_dpbusd_epi32(zero, planes[p], groups(x, p, p + 4));
            let high = _mm512_dpbusd_epi32(zero, planes[p + 1], groups(x, p + 1, p + 5));
            int = _mm512_dpwssd_epi32(int, _mm512_packs_epi32(low, high), scales[pair]);
        }
        *out = (int, min_products(minima, sums));
    }
    out
}

block_dots!(
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni",
    BlockQ2K,
    products,
    1.0,
    Some(|block| block.dmin)
);
