//! Q2_K, one row, 84 bytes a block: planes of quants are multiplied in the order of the file. Vectors are half as wide as could be: a block's
//! groups are, so that nothing is put together, and fewer lanes are summed.
//!
//! Measured: one thread of a Zen 4 takes 17 GiB/s of the 31 that it reads from memory.

use super::*;
use crate::kernels::avx2::q2_k::{masks_of_pairs, scales_minima, scales_of_pairs};
use ds4_quant::BlockQ2K;

/// For each pair of planes of each half of a block the places, as words, of the scales of their two lanes in the block's 16, where
/// products of a pair are packed to words.
static SCALES: [[[u8; 32]; 2]; 2] = {
    let mut places = [[[128; 32]; 2]; 2];
    let mut i = 0;
    while i < 64 {
        let (half, pair, lane, word) = (i / 32, i / 16 % 2, i / 8 % 2, i % 8);
        places[half][pair][16 * lane + 2 * word] = (8 * half + 4 * pair + 2 * (word / 4) + lane) as u8;
        i += 1;
    }
    places
};

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn products<const N: usize>(block: &BlockQ2K, x: [(&[i8; 256], &[i16; 16]); N]) -> [(__m256i, __m256i); N] {
    let (scales, minima) = scales_minima(block);
    let (scales, masks) = (scales_of_pairs(scales), masks_of_pairs());
    let mut out = [(zero(), zero()); N];
    for half in 0..2 {
        let even = avx2::load(&block.q.as_chunks().0[half]);
        let odd = _mm256_srli_epi16::<2>(even);
        for pair in 0..2 {
            let planes = [_mm256_and_si256(even, masks[pair]), _mm256_and_si256(odd, masks[pair])];
            let scale = _mm256_shuffle_epi8(scales[pair], avx2::load(&SCALES[half][pair]));
            for j in 0..N {
                let g = 4 * half + 2 * pair;
                let low = _mm256_dpbusd_epi32(zero(), planes[0], avx2::group(x[j].0, g));
                let high = _mm256_dpbusd_epi32(zero(), planes[1], avx2::group(x[j].0, g + 1));
                out[j].0 = _mm256_dpwssd_epi32(out[j].0, _mm256_packs_epi32(low, high), scale);
            }
        }
    }
    for j in 0..N {
        out[j].1 = avx2::min_products(minima, x[j].1);
    }
    out
}

block_dots!(
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni",
    BlockQ2K,
    each products,
    0.0625,
    Some(|block| block.dmin)
);
