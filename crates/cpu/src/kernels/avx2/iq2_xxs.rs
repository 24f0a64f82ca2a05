//! IQ2_XXS, one row, 66 bytes a block: bound by 32 look-ups in a grid of 256 codes of eight magnitudes. Signs and scales of all groups are
//! unpacked together.
//!
//! Measured: one thread of a Zen 4 takes 3.8 GiB/s of the 31 that it reads from memory.

use super::tile::{scales_of, signs_of};
use super::*;
use ds4_quant::act::Act256;
use ds4_quant::{BlockIq2Xxs, IQ2XXS_GRID};

/// Signs and scales of each group, in order.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn signs_and_scales(block: &BlockIq2Xxs) -> __m256i {
    let groups: &[[u8; 32]; 2] = bytemuck::cast_ref(&block.groups);
    let (low, high) = (_mm256_castsi256_ps(load(&groups[0])), _mm256_castsi256_ps(load(&groups[1])));
    // The second words of low and high in turn, two and two.
    let words = _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(low, high));
    _mm256_permute4x64_epi64::<0b11_01_10_00>(words)
}

/// Magnitudes of a group of 32 weights.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels) fn magnitudes(codes: [u8; 8]) -> __m256i {
    let level = |v: usize| i64::from_le_bytes(IQ2XXS_GRID[codes[v] as usize]);
    _mm256_set_epi64x(level(3), level(2), level(1), level(0))
}

/// Each byte of a word eight times, and the bit of each of these.
static PLACES: [[u8; 32]; 2] = {
    let mut places = [[0; 32]; 2];
    let mut i = 0;
    while i < 32 {
        (places[0][i], places[1][i]) = (i as u8 / 8, 1 << (i % 8));
        i += 1;
    }
    places
};

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn products<const N: usize>(
    block: &BlockIq2Xxs,
    x: [(&[i8; 256], &[i16; 16]); N],
) -> [(__m256i, __m256i); N] {
    let words = signs_and_scales(block);
    let (mut signs, mut scales) = ([0; 8], [0; 8]);
    store(signs_of(words), &mut signs);
    store(scales_of(words), &mut scales);
    let (bytes, bits) = (load(&PLACES[0]), load(&PLACES[1]));
    let mut out = [(zero(), zero()); N];
    for g in 0..8 {
        let levels = magnitudes(block.groups[g]);
        let eights = _mm256_shuffle_epi8(_mm256_set1_epi32(signs[g]), bytes);
        let negative = _mm256_cmpeq_epi8(_mm256_and_si256(eights, bits), bits);
        let signs = _mm256_or_si256(negative, _mm256_set1_epi8(1));
        let scale = _mm256_set1_epi16(scales[g] as i16);
        for j in 0..N {
            let p = _mm256_maddubs_epi16(levels, _mm256_sign_epi8(group(x[j].0, g), signs));
            out[j].0 = _mm256_add_epi32(out[j].0, _mm256_madd_epi16(p, scale));
        }
    }
    out
}

block_dots!("avx2,fma,f16c", BlockIq2Xxs, products, 0.125, None);
