//! Q2_K, one row, 84 bytes a block: planes of quants are multiplied in the order of the file.
//!
//! Measured: one thread of a Zen 4 takes 14.0 GiB/s of the 31 that it reads from memory.

use super::*;
use ds4_quant::BlockQ2K;
use ds4_quant::act::Act256;

/// For each plane of each half of a block the places, as words, of the scales of its two lanes in the block's 16.
static SCALES: [[[u8; 32]; 4]; 2] = {
    let mut places = [[[0; 32]; 4]; 2];
    let mut i = 0;
    while i < 256 {
        let (half, plane, byte) = (i / 128, i / 32 % 4, i % 32);
        let scale = 8 * half + 2 * plane + byte / 16;
        places[half][plane][byte] = if byte % 2 == 0 { scale as u8 } else { 128 };
        i += 1;
    }
    places
};

/// The 16 scales, and the 16 minima as 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::kernels) fn scales_minima(block: &BlockQ2K) -> (__m128i, __m256i) {
    // SAFETY: there are 16 bytes; the load needs no alignment.
    let bytes = unsafe { _mm_loadu_si128(block.scales.as_ptr().cast()) };
    let nibble = _mm_set1_epi8(15);
    let minima = _mm_and_si128(_mm_srli_epi16::<4>(bytes), nibble);
    (_mm_and_si128(bytes, nibble), _mm256_cvtepu8_epi16(minima))
}

/// The 16 scales for the lower and the upper two planes: of two quants in a byte the upper one is multiplied where it is, as 16 of it; so the
/// lower one's scale is 16 of it, and the product with the block is 16 of it.
#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::kernels) fn scales_of_pairs(scales: __m128i) -> [__m256i; 2] {
    let scales = _mm256_broadcastsi128_si256(scales);
    [_mm256_slli_epi16::<4>(scales), scales]
}

/// What takes the quants of a lower plane from bytes, and those of an upper one.
#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::kernels) fn masks_of_pairs() -> [__m256i; 2] {
    [_mm256_set1_epi8(3), _mm256_set1_epi8(3 << 4)]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn products<const N: usize>(block: &BlockQ2K, x: [(&[i8; 256], &[i16; 16]); N]) -> [(__m256i, __m256i); N] {
    let (scales, minima) = scales_minima(block);
    let (scales, masks) = (scales_of_pairs(scales), masks_of_pairs());
    let mut int = [zero(); N];
    for half in 0..2 {
        let even = load(&block.q.as_chunks().0[half]);
        let bits = [even, _mm256_srli_epi16::<2>(even)];
        for plane in 0..4 {
            let w = _mm256_and_si256(bits[plane % 2], masks[plane / 2]);
            let scale = _mm256_shuffle_epi8(scales[plane / 2], load(&SCALES[half][plane]));
            for j in 0..N {
                let p = _mm256_maddubs_epi16(w, group(x[j].0, 4 * half + plane));
                int[j] = _mm256_add_epi32(int[j], _mm256_madd_epi16(p, scale));
            }
        }
    }
    let mut out = [(zero(), zero()); N];
    for j in 0..N {
        out[j] = (int[j], min_products(minima, x[j].1));
    }
    out
}

block_dots!("avx2,fma,f16c", BlockQ2K, each products, 0.0625, Some(|block| block.dmin));
