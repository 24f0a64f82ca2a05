//! IQ2_XXS, one row, 66 bytes a block: bound by 32 look-ups in a grid of 256 codes of eight magnitudes. Signs and scales of four blocks are
//! unpacked before any product, so that what is stored in vectors is there when it is loaded in words.
//!
//! Measured: one thread of a Zen 4 takes 4.6 GiB/s of the 31 that it reads from memory. The instructions of a group of 32, in a loop without
//! anything else, would let it take 6.2.

use super::tile::{look_up, scales_of};
use super::*;
use crate::kernels::tile::PARITY;
use ds4_quant::act::Act256;
use ds4_quant::{BlockIq2Xxs, IQ2XXS_GRID};

/// Magnitudes of a group of 32 weights.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels) fn magnitudes(codes: [u8; 8]) -> __m256i {
    // As floats, since a register's upper half can be loaded with a float only. No code is a NaN.
    let level = |v: usize| f64::from_le_bytes(IQ2XXS_GRID[codes[v] as usize]);
    _mm256_castpd_si256(_mm256_set_pd(level(3), level(2), level(1), level(0)))
}

/// For each weight of a group its place in [`Ready::signs`], its bit there, and half of that.
static SIGNS: [[u8; 32]; 3] = {
    let mut signs = [[0; 32]; 3];
    let mut i = 0;
    while i < 32 {
        let (code, k) = (i as u8 / 8, i % 8);
        let (place, bit) = if k < 7 { (code, 2 << k) } else { (4 + code, 128) };
        (signs[0][i], signs[1][i], signs[2][i]) = (place, bit, bit / 2);
        i += 1;
    }
    signs
};

/// A block's signs and scales.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Ready {
    /// Of each group four bytes of seven signs, from bit 1 on, and four of the eighth, at bit 7.
    signs: [u64; 8],
    /// In both halves of a word.
    scales: [u32; 8],
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prepare(block: &BlockIq2Xxs, ready: &mut Ready) {
    let groups: &[[u8; 32]; 2] = bytemuck::cast_ref(&block.groups);
    let (low, high) = (_mm256_castsi256_ps(load(&groups[0])), _mm256_castsi256_ps(load(&groups[1])));
    // The second words of 0, 1, 4, 5 and 2, 3, 6, 7.
    let words = _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(low, high));
    let splat = |v: u32| _mm256_set1_epi32(v as i32);
    let sevens = _mm256_or_si256(
        _mm256_or_si256(
            _mm256_and_si256(_mm256_slli_epi32::<1>(words), splat(0xfe)),
            _mm256_and_si256(_mm256_slli_epi32::<2>(words), splat(0xfe00)),
        ),
        _mm256_or_si256(
            _mm256_and_si256(_mm256_slli_epi32::<3>(words), splat(0xfe_0000)),
            _mm256_and_si256(_mm256_slli_epi32::<4>(words), splat(0xfe00_0000)),
        ),
    );
    let fours =
        _mm256_and_si256(_mm256_xor_si256(sevens, _mm256_srli_epi16::<4>(sevens)), _mm256_set1_epi8(15));
    let eighths = look_up(&PARITY, fours);
    let scales = scales_of(words);
    let [low, high]: &mut [[u64; 4]; 2] = bytemuck::cast_mut(&mut ready.signs);
    store(_mm256_unpacklo_epi32(sevens, eighths), low);
    store(_mm256_unpackhi_epi32(sevens, eighths), high);
    let scales = _mm256_or_si256(scales, _mm256_slli_epi32::<16>(scales));
    store(_mm256_permute4x64_epi64::<0b11_01_10_00>(scales), &mut ready.scales);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn products<const K: usize, const N: usize>(
    blocks: &[BlockIq2Xxs; K],
    x: &[Few<'_, K>; N],
    (ints, _): (&mut [[__m256i; 4]; N], &mut [[__m256i; 4]; N]),
) {
    let mut ready = [Ready { signs: [0; 8], scales: [0; 8] }; K];
    for k in 0..K {
        prepare(&blocks[k], &mut ready[k]);
    }
    // The compiler is not to know where these come from: it would take words from vectors by shuffles, of which there are too many.
    let ready = std::hint::black_box(&ready);
    let table = std::hint::black_box(&SIGNS);
    let [places, bits, halves] = [load(&table[0]), load(&table[1]), load(&table[2])];
    for k in 0..K {
        let mut sums = [zero(); N];
        for g in 0..8 {
            let levels = magnitudes(blocks[k].groups[g]);
            let signs = _mm256_shuffle_epi8(_mm256_set1_epi64x(ready[k].signs[g] as i64), places);
            // Half a bit, or half a bit less the bit: never 0.
            let signs = _mm256_sub_epi8(halves, _mm256_and_si256(signs, bits));
            let scale = _mm256_set1_epi32(ready[k].scales[g] as i32);
            for j in 0..N {
                let p = _mm256_maddubs_epi16(levels, _mm256_sign_epi8(group(&x[j].q[k], g), signs));
                sums[j] = _mm256_add_epi32(sums[j], _mm256_madd_epi16(p, scale));
            }
        }
        for j in 0..N {
            ints[j][k] = sums[j];
        }
    }
}

block_dots!("avx2,fma,f16c", BlockIq2Xxs, all products, 0.125, None);
