//! Q4_K, one row, 144 bytes a block, in vectors half as wide as could be, as Q2_K.
//!
//! Measured: one thread of a Zen 4 takes 25 GiB/s of the 31 that it reads from memory.

use super::*;
use crate::kernels::avx2::q4_k::twice;
use crate::kernels::tile::scales_mins;
use ds4_quant::BlockQ4K;

/// For each pair of groups the places, as words, of their scales in eight, where products of a pair are packed to words.
static SCALES: [[u8; 32]; 4] = {
    let mut places = [[128; 32]; 4];
    let mut i = 0;
    while i < 64 {
        let (pair, lane, word) = (i / 16, i / 8 % 2, i % 8);
        places[pair][16 * lane + 2 * word] = (2 * pair + word / 4) as u8;
        i += 1;
    }
    places
};

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn products<const N: usize>(block: &BlockQ4K, x: [(&[i8; 256], &[i16; 16]); N]) -> [(__m256i, __m256i); N] {
    let (scales, minima) = scales_mins(&block.scales);
    let (scales, minima) = (_mm256_set1_epi64x(scales as i64), twice(minima));
    let nibble = _mm256_set1_epi8(15);
    let mut out = [(zero(), zero()); N];
    for pair in 0..4 {
        let bytes = avx2::load(&block.q.as_chunks().0[pair]);
        let groups =
            [_mm256_and_si256(bytes, nibble), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble)];
        let scale = _mm256_shuffle_epi8(scales, avx2::load(&SCALES[pair]));
        for j in 0..N {
            let low = _mm256_dpbusd_epi32(zero(), groups[0], avx2::group(x[j].0, 2 * pair));
            let high = _mm256_dpbusd_epi32(zero(), groups[1], avx2::group(x[j].0, 2 * pair + 1));
            out[j].0 = _mm256_dpwssd_epi32(out[j].0, _mm256_packs_epi32(low, high), scale);
        }
    }
    for j in 0..N {
        out[j].1 = avx2::min_products(minima, x[j].1);
    }
    out
}

block_dots!(
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni",
    BlockQ4K,
    each products,
    1.0,
    Some(|block| block.dmin)
);
