//! AVX-512 with VNNI (four products of bytes and their sum in one instruction), and with VBMI (any bytes of a
//! table).
//!
//! A format has two kernels that give the same bits: the sum over a block is an exact integer, and there are four sums of blocks, one
//! for every fourth block: `acc = fma(block, weight scale * activation scale, acc)`, in order; the product is
//! `(acc0 + acc1) + (acc2 + acc3)`.
//! * Few activation rows: a weight row at a time, bound by memory.
//! * Many ([`tile`]): weight rows are laid out once so that a vector holds four bytes of each of 16, and meet all activation rows; a lane
//!   is a weight row, so nothing is ever summed across lanes.
#![allow(unsafe_code)]

mod index;
mod iq2_xxs;
mod iq2_xxs_vbmi;
mod q2_k;
mod q4_k;
mod q8_0;
mod tile;

use super::{Columns, Kernels, Level, ManyRows, ROWS, Target, avx512};
use std::arch::x86_64::*;

/// Weight rows of a tile.
const TILE_ROWS: usize = 2 * ROWS;

pub(super) const VNNI: Kernels = Kernels {
    level: Level::Vnni,
    // SAFETY: the table is handed out by `Kernels::new` only where the CPU has the features; so below.
    q8_0: |row, x, out| unsafe { q8_0::dots(row, x, out) },
    // SAFETY: as above.
    q8_0_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { q8_0::rows(rows, x, out) }),
    // SAFETY: as above.
    q2_k: |row, x, out| unsafe { q2_k::dots(row, x, out) },
    // SAFETY: as above.
    q2_k_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { q2_k::rows(rows, x, out) }),
    // SAFETY: as above.
    q4_k: |row, x, out| unsafe { q4_k::dots(row, x, out) },
    // SAFETY: as above.
    q4_k_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { q4_k::rows(rows, x, out) }),
    // SAFETY: as above.
    iq2_xxs: |row, x, out| unsafe { iq2_xxs::dots(row, x, out) },
    // SAFETY: as above.
    iq2_xxs_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { iq2_xxs::rows(rows, x, out) }),
    // SAFETY: as above.
    index_scores: |query, keys, scores| unsafe { index::scores(query, keys, scores) },
    ..avx512::KERNELS
};

pub(super) const VBMI: Kernels = Kernels {
    level: Level::Vbmi,
    // SAFETY: as above.
    iq2_xxs_rows: Some(ManyRows {
        rows: TILE_ROWS,
        least: 1,
        // SAFETY: as above.
        multiply: |rows, x, out| unsafe { iq2_xxs_vbmi::rows(rows, x, out) },
    }),
    ..VNNI
};

/// Bytes that a thread asks for ahead of their use.
const AHEAD: usize = 4096;

/// Asks for as many bytes as some blocks have, [`AHEAD`] of them: the hardware's prefetchers stop at the ends of pages, and a row of an
/// expert is shorter than one.
#[inline]
fn prefetch<B>(blocks: &[B]) {
    let first = blocks.as_ptr().cast::<i8>();
    for at in (0..size_of_val(blocks)).step_by(64) {
        // SAFETY: a prefetch reads nothing that the program could see, and an address that is not there is ignored.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(first.wrapping_add(AHEAD + at)) };
    }
}

/// Asks for the line of an address, as far as the second cache.
#[inline]
fn ask_second_cache(line: *const u8) {
    // SAFETY: as above.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
}

/// 64 bytes of activations or weights.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: there are 64 bytes; the load needs no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

/// Values `64 * part..` of a block.
#[inline]
#[target_feature(enable = "avx512f")]
fn quarter(q: &[i8; 256], part: usize) -> __m512i {
    load(bytemuck::cast_ref(&q.as_chunks::<64>().0[part]))
}

/// Two groups of 32 values of a block.
#[inline]
#[target_feature(enable = "avx512f")]
fn groups(q: &[i8; 256], low: usize, high: usize) -> __m512i {
    let groups = q.as_chunks::<32>().0;
    let (low, high) = (&groups[low], &groups[high]);
    // SAFETY: both have 32 bytes; the loads need no alignment.
    unsafe {
        let low = _mm512_castsi256_si512(_mm256_loadu_si256(low.as_ptr().cast()));
        _mm512_inserti64x4::<1>(low, _mm256_loadu_si256(high.as_ptr().cast()))
    }
}

/// Minima times the sums of the activations under them.
#[inline]
#[target_feature(enable = "avx2,avx512f")]
fn min_products(minima: __m256i, sums: &[i16; 16]) -> __m512i {
    // SAFETY: there are 32 bytes; the load needs no alignment.
    let sums = unsafe { _mm256_loadu_si256(sums.as_ptr().cast()) };
    _mm512_zextsi256_si512(_mm256_madd_epi16(minima, sums))
}

/// Places for a permutation of words.
#[inline]
#[target_feature(enable = "avx512f")]
fn places(words: &[i16; 32]) -> __m512i {
    load(bytemuck::cast_ref(words))
}

/// Places of the bytes of every word of a lane, of which `at` gives those of the first; 128 makes a 0.
const fn in_words(at: [u8; 4]) -> [u8; 16] {
    let mut places = [0; 16];
    let mut i = 0;
    while i < 16 {
        places[i] = at[i % 4] + 4 * (i / 4) as u8;
        i += 1;
    }
    places
}

/// Two bytes of every word, each in a half of it.
static PAIRS: [[u8; 16]; 2] = [in_words([0, 128, 1, 128]), in_words([2, 128, 3, 128])];

/// The bytes of every lane from their places in it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn shuffle(v: __m512i, places: &[u8; 16]) -> __m512i {
    // SAFETY: there are 16 bytes; the load needs no alignment.
    let places = unsafe { _mm_loadu_si128(places.as_ptr().cast()) };
    _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(places))
}

/// The sum of each of four vectors.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512vl")]
fn sums_of_four(p: [__m512i; 4]) -> __m128i {
    let a = _mm512_add_epi32(_mm512_unpacklo_epi32(p[0], p[1]), _mm512_unpackhi_epi32(p[0], p[1]));
    let b = _mm512_add_epi32(_mm512_unpacklo_epi32(p[2], p[3]), _mm512_unpackhi_epi32(p[2], p[3]));
    let lanes = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    let half = _mm256_add_epi32(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64::<1>(lanes));
    _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half))
}

/// `acc[k] + ints[k] * (w[k] * x[k])` for the first `count` of four blocks.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512vl")]
fn add_blocks(acc: __m128, ints: __m128i, w: __m128, x: __m128, count: usize) -> __m128 {
    let there = ((1u32 << count) - 1) as __mmask8;
    _mm_mask3_fmadd_ps(_mm_cvtepi32_ps(ints), _mm_mul_ps(w, x), acc, there)
}

/// Activation scales of up to four blocks from `b`.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn scales_from(d: &[f32], b: usize) -> __m128 {
    match d[b..].first_chunk::<4>() {
        // SAFETY: there are four values; the load needs no alignment.
        Some(four) => unsafe { _mm_loadu_ps(four.as_ptr()) },
        None => {
            let mut four = [0.0; 4];
            four.iter_mut().zip(&d[b..]).for_each(|(o, d)| *o = *d);
            // SAFETY: as above.
            unsafe { _mm_loadu_ps(four.as_ptr()) }
        }
    }
}

/// Four halves.
#[inline]
#[target_feature(enable = "f16c")]
fn halves(d: [[u8; 2]; 4]) -> __m128 {
    _mm_cvtph_ps(_mm_cvtsi64_si128(bytemuck::cast(d)))
}

/// The sum of the four sums.
#[inline]
#[target_feature(enable = "avx512f")]
fn total(acc: __m128) -> f32 {
    let mut sums = [0f32; 4];
    // SAFETY: `sums` has four values; the store needs no alignment.
    unsafe { _mm_storeu_ps(sums.as_mut_ptr(), acc) };
    (sums[0] + sums[1]) + (sums[2] + sums[3])
}

/// `dots` of a format of blocks of 256: one weight row with any activation rows. `$products` gives the lanes of a block's
/// product with each of N activation blocks, and those of its minima with the sums; a weight is `$unit * d` times a quant less `dmin`
/// times its minimum, if the format has minima.
macro_rules! block_dots {
    ($features:literal, $block:ty, $products:path, $unit:literal, $minimum:expr) => {
        #[target_feature(enable = $features)]
        fn row_tile<const N: usize>(row: &[$block], x: [Act256<'_>; N]) -> [f32; N] {
            const MINIMUM: Option<fn(&$block) -> [u8; 2]> = $minimum;
            let mut acc = [_mm_setzero_ps(); N];
            for (i, four) in row.chunks(4).enumerate() {
                prefetch(four);
                let mut ints = [[_mm512_setzero_si512(); 4]; N];
                let mut mins = [[_mm512_setzero_si512(); 4]; N];
                let (mut d, mut dmin) = ([[0; 2]; 4], [[0; 2]; 4]);
                for (k, block) in four.iter().enumerate() {
                    let b = 4 * i + k;
                    let at = |j: usize| (&x[j].q.as_chunks().0[b], &x[j].sums.as_chunks().0[b]);
                    let mut blocks = [at(0); N];
                    for j in 1..N {
                        blocks[j] = at(j);
                    }
                    let products = $products(block, blocks);
                    for j in 0..N {
                        (ints[j][k], mins[j][k]) = products[j];
                    }
                    d[k] = block.d;
                    if let Some(minimum) = MINIMUM {
                        dmin[k] = minimum(block);
                    }
                }
                let d = _mm_mul_ps(halves(d), _mm_set1_ps($unit));
                let dmin = halves(dmin);
                for j in 0..N {
                    let scales = scales_from(x[j].d, 4 * i);
                    acc[j] = add_blocks(acc[j], sums_of_four(ints[j]), d, scales, four.len());
                    if MINIMUM.is_some() {
                        let negative = _mm_sub_ps(_mm_setzero_ps(), dmin);
                        acc[j] = add_blocks(acc[j], sums_of_four(mins[j]), negative, scales, four.len());
                    }
                }
            }
            let mut out = [0.0; N];
            for j in 0..N {
                out[j] = total(acc[j]);
            }
            out
        }

        #[target_feature(enable = $features)]
        pub(super) fn dots(row: &[u8], x: &Columns<'_>, out: &mut [f32]) {
            let row: &[$block] = bytemuck::cast_slice(row);
            tiles!(x, out, act256, row_tile, row);
        }
    };
}
use block_dots;
