//! AVX2 + FMA + F16C.
//!
//! Integer formats: weights as unsigned bytes, activations as signed ones, `maddubs` to i16 (no pair can
//! overflow: 128*127*2 < 2^15), `madd` with the sub-block scale to i32, and one conversion to f32 per block.
#![allow(unsafe_code)]

use super::float::float_kernels;
use super::index::{self, IndexQuery};
use super::{Columns, Kernels, Level, ManyRows, ROWS, TILE, Target, Tile, tiles};
use ds4_quant::act::{Act32, Act256};
use ds4_quant::{
    BlockIq2Xxs, BlockQ2K, BlockQ4K, BlockQ8_0, IQ2XXS_GRID, e8m0_to_f32, f16_to_f32, scale_min,
};
use std::arch::x86_64::*;

pub(super) const KERNELS: Kernels = Kernels {
    level: Level::Avx2,
    // SAFETY: the table is handed out by `Kernels::new` only where the CPU has the features; so below.
    f32: |row, x, out| unsafe { f32_dots(row, x, out) },
    // SAFETY: as above.
    f16: |row, x, out| unsafe { f16_dots(row, x, out) },
    // SAFETY: as above.
    f16_rows: ManyRows::many(ROWS, |rows, x, out| unsafe { f16_rows(rows, x, out) }),
    // SAFETY: as above.
    q8_0: |row, x, out| unsafe { q8_0_dots(row, x, out) },
    q8_0_rows: None,
    // SAFETY: as above.
    q2_k: |row, x, out| unsafe { q2_k_dots(row, x, out) },
    q2_k_rows: None,
    // SAFETY: as above.
    q4_k: |row, x, out| unsafe { q4_k_dots(row, x, out) },
    q4_k_rows: None,
    // SAFETY: as above.
    iq2_xxs: |row, x, out| unsafe { iq2_xxs_dots(row, x, out) },
    iq2_xxs_rows: None,
    // SAFETY: as above.
    dot: |a, b| unsafe { dot(a, b) },
    // SAFETY: as above.
    scores: |q, tile, out| unsafe { scores(q, tile, out) },
    // SAFETY: as above.
    weigh: |weights, tile, out| unsafe { weigh(weights, tile, out) },
    // SAFETY: as above.
    index_scores: |query, keys, scores| unsafe { index_scores(query, keys, scores) },
};

/// Loads 32 bytes; checked in debug builds, and the slice pattern keeps the compiler's own check cheap.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_i8(q: &[i8], at: usize) -> __m256i {
    let q = &q[at..at + 32];
    // SAFETY: `q` has 32 bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(q.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_u8(q: &[u8], at: usize) -> __m256i {
    let q = &q[at..at + 32];
    // SAFETY: `q` has 32 bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(q.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_f32(x: &[f32], at: usize) -> __m256 {
    let x = &x[at..at + 8];
    // SAFETY: `x` has 8 values; the load needs no alignment.
    unsafe { _mm256_loadu_ps(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum(v: __m256) -> f32 {
    let s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn half(b: [u8; 2]) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16::from_le_bytes(b)))))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store_f32(x: &mut [f32], at: usize, v: __m256) {
    let x = &mut x[at..at + 8];
    // SAFETY: `x` has 8 values; the store needs no alignment.
    unsafe { _mm256_storeu_ps(x.as_mut_ptr(), v) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn half_at(row: &[u8], i: usize) -> __m256 {
    let row = &row[2 * i..2 * i + 16];
    // SAFETY: `row` has 16 bytes; the load needs no alignment.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(row.as_ptr().cast()) })
}

float_kernels!(
    "avx2,fma,f16c",
    8,
    __m256,
    1 x 2,
    _mm256_setzero_ps,
    load_f32,
    half_at,
    store_f32,
    _mm256_set1_ps,
    _mm256_fmadd_ps,
    _mm256_add_ps,
    sum
);

#[target_feature(enable = "avx2,fma,f16c")]
fn q8_0_tile<const N: usize>(row: &[BlockQ8_0], x: [Act32<'_>; N]) -> [f32; N] {
    let ones = _mm256_set1_epi16(1);
    let mut acc = [_mm256_setzero_ps(); N];
    for (b, block) in row.iter().enumerate() {
        let w = load_i8(&block.q, 0);
        let magnitude = _mm256_abs_epi8(w);
        let d = half(block.d);
        for j in 0..N {
            let q = _mm256_sign_epi8(load_i8(x[j].q, 32 * b), w);
            let int = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, q), ones);
            acc[j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(int), _mm256_set1_ps(d * x[j].d[b]), acc[j]);
        }
    }
    acc.map(|a| sum(a))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q8_0_dots(row: &[u8], x: &Columns<'_>, out: &mut [f32]) {
    let row: &[BlockQ8_0] = bytemuck::cast_slice(row);
    tiles!(x, out, act32, q8_0_tile, row);
}

/// i16 lanes: `lo` in the lower half, `hi` in the upper.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scales16(lo: u8, hi: u8) -> __m256i {
    _mm256_set_m128i(_mm_set1_epi16(i16::from(hi)), _mm_set1_epi16(i16::from(lo)))
}

/// Products of 16 minima with the sums of the activations under them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn min_products(mins: __m128i, sums: &[i16]) -> __m256i {
    let sums = &sums[..16];
    // SAFETY: `sums` has 16 values of two bytes; the load needs no alignment.
    let sums = unsafe { _mm256_loadu_si256(sums.as_ptr().cast()) };
    _mm256_madd_epi16(_mm256_cvtepu8_epi16(mins), sums)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q2_k_tile<const N: usize>(row: &[BlockQ2K], x: [Act256<'_>; N]) -> [f32; N] {
    let two_bits = _mm256_set1_epi8(3);
    let mut acc = [_mm256_setzero_ps(); N];
    for (b, block) in row.iter().enumerate() {
        // SAFETY: `scales` has 16 bytes; the load needs no alignment.
        let scales = unsafe { _mm_loadu_si128(block.scales.as_ptr().cast()) };
        let mins = _mm_and_si128(_mm_srli_epi16::<4>(scales), _mm_set1_epi8(15));
        let mut int = [_mm256_setzero_si256(); N];
        for half in 0..2 {
            let mut bits = load_u8(&block.q, 32 * half);
            for plane in 0..4 {
                let w = _mm256_and_si256(bits, two_bits);
                bits = _mm256_srli_epi16::<2>(bits);
                let s = 8 * half + 2 * plane;
                let scale = scales16(block.scales[s] & 15, block.scales[s + 1] & 15);
                for j in 0..N {
                    let q = load_i8(x[j].q, 256 * b + 128 * half + 32 * plane);
                    let p = _mm256_madd_epi16(_mm256_maddubs_epi16(w, q), scale);
                    int[j] = _mm256_add_epi32(int[j], p);
                }
            }
        }
        let (d, dmin) = (half(block.d), half(block.dmin));
        for j in 0..N {
            let mins = min_products(mins, &x[j].sums[16 * b..]);
            acc[j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(int[j]), _mm256_set1_ps(d * x[j].d[b]), acc[j]);
            acc[j] = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(mins), _mm256_set1_ps(dmin * x[j].d[b]), acc[j]);
        }
    }
    acc.map(|a| sum(a))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q2_k_dots(row: &[u8], x: &Columns<'_>, out: &mut [f32]) {
    let row: &[BlockQ2K] = bytemuck::cast_slice(row);
    tiles!(x, out, act256, q2_k_tile, row);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q4_k_tile<const N: usize>(row: &[BlockQ4K], x: [Act256<'_>; N]) -> [f32; N] {
    let nibble = _mm256_set1_epi8(15);
    let mut acc = [_mm256_setzero_ps(); N];
    for (b, block) in row.iter().enumerate() {
        let mut mins = [0u8; 16];
        let mut int = [_mm256_setzero_si256(); N];
        for pair in 0..4 {
            let bytes = load_u8(&block.q, 32 * pair);
            let planes =
                [_mm256_and_si256(bytes, nibble), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble)];
            for (k, w) in planes.into_iter().enumerate() {
                let g = 2 * pair + k;
                let (scale, min) = scale_min(&block.scales, g);
                (mins[2 * g], mins[2 * g + 1]) = (min, min);
                let scale = _mm256_set1_epi16(i16::from(scale));
                for j in 0..N {
                    let q = load_i8(x[j].q, 256 * b + 32 * g);
                    let p = _mm256_madd_epi16(_mm256_maddubs_epi16(w, q), scale);
                    int[j] = _mm256_add_epi32(int[j], p);
                }
            }
        }
        let (d, dmin) = (half(block.d), half(block.dmin));
        // SAFETY: `mins` has 16 bytes; the load needs no alignment.
        let mins = unsafe { _mm_loadu_si128(mins.as_ptr().cast()) };
        for j in 0..N {
            let mins = min_products(mins, &x[j].sums[16 * b..]);
            acc[j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(int[j]), _mm256_set1_ps(d * x[j].d[b]), acc[j]);
            acc[j] = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(mins), _mm256_set1_ps(dmin * x[j].d[b]), acc[j]);
        }
    }
    acc.map(|a| sum(a))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q4_k_dots(row: &[u8], x: &Columns<'_>, out: &mut [f32]) {
    let row: &[BlockQ4K] = bytemuck::cast_slice(row);
    tiles!(x, out, act256, q4_k_tile, row);
}

/// Eight bytes of +1 or -1 for every seven stored sign bits.
static SIGNS: [u64; 128] = {
    let mut table = [0; 128];
    let mut s7 = 0;
    while s7 < 128 {
        let parity = (s7 as u32).count_ones() & 1;
        let s8 = s7 as u32 | parity << 7;
        let (mut bytes, mut k) = ([1u8; 8], 0);
        while k < 8 {
            if s8 >> k & 1 == 1 {
                bytes[k] = 255;
            }
            k += 1;
        }
        table[s7] = u64::from_le_bytes(bytes);
        s7 += 1;
    }
    table
};

/// Magnitudes and signs of a group of 32 weights.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn iq2_group(codes: u32, aux: u32) -> (__m256i, __m256i) {
    let level = |v: u32| i64::from_le_bytes(IQ2XXS_GRID[(codes >> (8 * v)) as usize & 255]);
    let sign = |v: u32| SIGNS[(aux >> (7 * v)) as usize & 127] as i64;
    (
        _mm256_set_epi64x(level(3), level(2), level(1), level(0)),
        _mm256_set_epi64x(sign(3), sign(2), sign(1), sign(0)),
    )
}

#[target_feature(enable = "avx2,fma,f16c")]
fn iq2_xxs_tile<const N: usize>(row: &[BlockIq2Xxs], x: [Act256<'_>; N]) -> [f32; N] {
    let mut acc = [_mm256_setzero_ps(); N];
    for (b, block) in row.iter().enumerate() {
        let mut int = [_mm256_setzero_si256(); N];
        for g in 0..8 {
            let (codes, aux) = block.group(g);
            let (levels, signs) = iq2_group(codes, aux);
            let scale = _mm256_set1_epi16(2 * (aux >> 28) as i16 + 1);
            for j in 0..N {
                let q = _mm256_sign_epi8(load_i8(x[j].q, 256 * b + 32 * g), signs);
                let p = _mm256_madd_epi16(_mm256_maddubs_epi16(levels, q), scale);
                int[j] = _mm256_add_epi32(int[j], p);
            }
        }
        let d = half(block.d) * 0.125;
        for j in 0..N {
            acc[j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(int[j]), _mm256_set1_ps(d * x[j].d[b]), acc[j]);
        }
    }
    acc.map(|a| sum(a))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn iq2_xxs_dots(row: &[u8], x: &Columns<'_>, out: &mut [f32]) {
    let row: &[BlockIq2Xxs] = bytemuck::cast_slice(row);
    tiles!(x, out, act256, iq2_xxs_tile, row);
}

/// Index scores: products of a key's byte, at most 24, with twice a value, at most 12, add up to less than 2^15 over a block.
#[target_feature(enable = "avx2,fma,f16c")]
fn index_scores(query: &IndexQuery, keys: &[u8], scores: &mut [f32]) {
    let (ones, mut key) = (_mm256_set1_epi16(1), [0u8; index::BLOCK * index::BLOCKS]);
    for (bytes, score) in keys.chunks_exact(query.key_bytes()).zip(scores) {
        let (codes, scales) = bytes.split_at(query.code_bytes());
        index::unpack(codes, &mut key);
        let mut all = [_mm256_setzero_ps(); 2];
        for group in query.groups() {
            let mut dot = [_mm256_setzero_ps(); 2];
            let fours = key.as_chunks::<{ index::BLOCK }>().0;
            for (b, ((q, fours), scale)) in group.q.iter().zip(fours).zip(scales).enumerate() {
                let mut int = [_mm256_setzero_si256(); 2];
                for (q, four) in q.iter().zip(fours.as_chunks::<4>().0) {
                    let four = _mm256_set1_epi32(i32::from_ne_bytes(*four));
                    let q: &[i8; 64] = bytemuck::cast_ref(q);
                    for half in 0..2 {
                        let p = _mm256_maddubs_epi16(four, load_i8(q, 32 * half));
                        int[half] = _mm256_add_epi16(int[half], p);
                    }
                }
                for half in 0..2 {
                    let offsets: &[[i8; 32]; 2] = bytemuck::cast_ref(&group.offsets[b]);
                    let p = _mm256_madd_epi16(int[half], ones);
                    let p = _mm256_cvtepi32_ps(_mm256_add_epi32(p, load_i8(&offsets[half], 0)));
                    let d = load_f32(&group.d[b], 8 * half);
                    let scale = _mm256_mul_ps(d, _mm256_set1_ps(e8m0_to_f32(*scale)));
                    dot[half] = _mm256_fmadd_ps(p, scale, dot[half]);
                }
            }
            for half in 0..2 {
                let positive = _mm256_max_ps(dot[half], _mm256_setzero_ps());
                all[half] = _mm256_fmadd_ps(load_f32(group.weights, 8 * half), positive, all[half]);
            }
        }
        let mut lanes = [0f32; index::HEADS];
        store_f32(&mut lanes, 0, all[0]);
        store_f32(&mut lanes, 8, all[1]);
        *score = index::total(&lanes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ds4_quant::iq2_signs;

    #[test]
    fn sign_table_agrees_with_the_reference() {
        for (s7, bytes) in SIGNS.iter().enumerate() {
            let bits = iq2_signs(s7 as u32);
            for (k, b) in bytes.to_le_bytes().into_iter().enumerate() {
                assert_eq!(b == 255, bits >> k & 1 == 1);
            }
        }
    }
}
