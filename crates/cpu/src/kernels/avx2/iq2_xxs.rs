//! IQ2_XXS, one row, 66 bytes a block: 32 look-ups in a grid of 256 codes of eight magnitudes, and 32 of signs, which bound it.

use super::*;
use crate::kernels::tile::IQ2_MIDDLE;
use ds4_quant::act::Act256;
use ds4_quant::{BlockIq2Xxs, IQ2XXS_GRID, iq2_signs};

/// Eight bytes of +1 or -1 for every seven stored sign bits.
static SIGNS: [i64; 128] = {
    let mut table = [0; 128];
    let mut s7 = 0;
    while s7 < 128 {
        let s8 = iq2_signs(s7 as u32);
        let (mut bytes, mut k) = ([0; 8], 0);
        while k < 8 {
            bytes[k] = if s8 >> k & 1 == 1 { 255 } else { 1 };
            k += 1;
        }
        table[s7] = i64::from_le_bytes(bytes);
        s7 += 1;
    }
    table
};

/// Magnitudes and signs of a group of 32 weights.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn magnitudes(codes: u32, aux: u32) -> (__m256i, __m256i) {
    let level = |v: u32| i64::from_le_bytes(IQ2XXS_GRID[(codes >> (8 * v)) as usize & 255]);
    let sign = |v: u32| SIGNS[(aux >> (7 * v)) as usize & 127];
    (
        _mm256_set_epi64x(level(3), level(2), level(1), level(0)),
        _mm256_set_epi64x(sign(3), sign(2), sign(1), sign(0)),
    )
}

/// Weights of a block plus [`IQ2_MIDDLE`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels) fn unpack(block: &BlockIq2Xxs, out: &mut [u8; 256]) {
    let middle = _mm256_set1_epi8(IQ2_MIDDLE as i8);
    for (g, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (codes, aux) = block.group(g);
        let (levels, signs) = magnitudes(codes, aux);
        store(_mm256_add_epi8(middle, _mm256_sign_epi8(levels, signs)), out);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn products<const N: usize>(
    block: &BlockIq2Xxs,
    x: [(&[i8; 256], &[i16; 16]); N],
) -> [(__m256i, __m256i); N] {
    let mut out = [(zero(), zero()); N];
    for g in 0..8 {
        let (codes, aux) = block.group(g);
        let (levels, signs) = magnitudes(codes, aux);
        let scale = _mm256_set1_epi16(2 * (aux >> 28) as i16 + 1);
        for j in 0..N {
            let p = _mm256_maddubs_epi16(levels, _mm256_sign_epi8(group(x[j].0, g), signs));
            out[j].0 = _mm256_add_epi32(out[j].0, _mm256_madd_epi16(p, scale));
        }
    }
    out
}

block_dots!("avx2,fma,f16c", BlockIq2Xxs, products, 0.125, None);
