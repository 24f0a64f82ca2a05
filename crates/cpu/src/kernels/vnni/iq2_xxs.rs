//! IQ2_XXS, one row, 66 bytes a block: 32 look-ups in a grid of 256 codes of eight magnitudes, and 32 of signs.

use super::*;
use ds4_quant::act::Act256;
use ds4_quant::{BlockIq2Xxs, IQ2XXS_GRID, iq2_signs};

/// A block's magnitudes, in order, and -1 for every negative one.
type Unpacked = ([__m512i; 4], [__m512i; 4]);

/// `v`, negative where `signs` is -1.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn signed(v: __m512i, signs: __m512i) -> __m512i {
    _mm512_sub_epi8(_mm512_xor_si512(v, signs), signs)
}

/// Places of the groups' scales (words `4 g`), as words, where the products of two quarters are packed to words.
const SCALES: [[i16; 32]; 2] = {
    let mut index = [[0; 32]; 2];
    let mut i = 0;
    while i < 64 {
        let (pair, lane, word) = (i / 32, i % 32 / 8, i % 8);
        let quarter = 2 * pair + word / 4;
        index[pair][i % 32] = (4 * (2 * quarter + lane / 2)) as i16;
        i += 1;
    }
    index
};

/// Eight bytes of 0 or -1 for every seven stored sign bits.
static SIGNS: [i64; 128] = {
    let mut table = [0; 128];
    let mut s7 = 0;
    while s7 < 128 {
        let s8 = iq2_signs(s7 as u32);
        let (mut bytes, mut k) = ([0; 8], 0);
        while k < 8 {
            bytes[k] = if s8 >> k & 1 == 1 { 255 } else { 0 };
            k += 1;
        }
        table[s7] = i64::from_le_bytes(bytes);
        s7 += 1;
    }
    table
};

/// `2 s + 1` of each group, in 64 bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn scales_of(block: &BlockIq2Xxs) -> __m512i {
    let groups = load(bytemuck::cast_ref(&block.groups));
    // The bit below a scale becomes the one.
    _mm512_or_si512(_mm512_srli_epi64::<59>(groups), _mm512_set1_epi64(1))
}

/// Magnitudes and signs of a group.
#[inline]
#[target_feature(enable = "avx2")]
fn group((codes, aux): (u32, u32)) -> (__m256i, __m256i) {
    let level = |v: u32| i64::from_le_bytes(IQ2XXS_GRID[(codes >> (8 * v)) as usize & 255]);
    let sign = |v: u32| SIGNS[(aux >> (7 * v)) as usize & 127];
    (
        _mm256_set_epi64x(level(3), level(2), level(1), level(0)),
        _mm256_set_epi64x(sign(3), sign(2), sign(1), sign(0)),
    )
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn unpack(block: &BlockIq2Xxs) -> Unpacked {
    let (mut levels, mut signs) = ([_mm512_setzero_si512(); 4], [_mm512_setzero_si512(); 4]);
    for k in 0..4 {
        let (low, high) = (group(block.group(2 * k)), group(block.group(2 * k + 1)));
        levels[k] = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low.0), high.0);
        signs[k] = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low.1), high.1);
    }
    (levels, signs)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn products<const N: usize>(
    block: &BlockIq2Xxs,
    x: [(&[i8; 256], &[i16; 16]); N],
) -> [(__m512i, __m512i); N] {
    let (levels, signs) = unpack(block);
    let scales = scales_of(block);
    let scales = [
        _mm512_permutexvar_epi16(places(&SCALES[0]), scales),
        _mm512_permutexvar_epi16(places(&SCALES[1]), scales),
    ];
    let zero = _mm512_setzero_si512();
    let mut out = [(zero, zero); N];
    for (out, (x, _)) in out.iter_mut().zip(x) {
        let mut p = [zero; 4];
        for k in 0..4 {
            p[k] = _mm512_dpbusd_epi32(zero, levels[k], signed(quarter(x, k), signs[k]));
        }
        // Four products of at most 43 * 127 fit 16 bits.
        let low = _mm512_dpwssd_epi32(zero, _mm512_packs_epi32(p[0], p[1]), scales[0]);
        out.0 = _mm512_dpwssd_epi32(low, _mm512_packs_epi32(p[2], p[3]), scales[1]);
    }
    out
}

block_dots!(
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni",
    BlockIq2Xxs,
    products,
    0.125,
    None
);
