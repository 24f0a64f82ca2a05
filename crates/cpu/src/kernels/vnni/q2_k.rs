//! Q2_K, 84 bytes a block. One row: planes of quants are multiplied in the order of the file. Many rows: quants are multiplied by their scale when they are laid out (at most 45), so that the 64 steps of a block
//! are one sum.

use super::tile::{self, Packed};
use super::*;
use crate::kernels::tiles;
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

/// The 16 minima.
#[inline]
#[target_feature(enable = "avx2")]
fn minima(block: &BlockQ2K) -> __m256i {
    // SAFETY: there are 16 bytes; the load needs no alignment.
    let bytes = unsafe { _mm_loadu_si128(block.scales.as_ptr().cast()) };
    _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16::<4>(bytes), _mm_set1_epi8(15)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn products<const N: usize>(block: &BlockQ2K, x: [(&[i8; 256], &[i16; 16]); N]) -> [(__m512i, __m512i); N] {
    let q = load(&block.q);
    let three = _mm512_set1_epi8(3);
    // SAFETY: there are 16 bytes; the load needs no alignment.
    let bytes = unsafe { _mm_loadu_si128(block.scales.as_ptr().cast()) };
    let scales = _mm256_cvtepu8_epi16(_mm_and_si128(bytes, _mm_set1_epi8(15)));
    let scales = _mm512_castsi256_si512(scales);
    let minima = minima(block);
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

/// A byte of every word in both halves of it.
static BOTH_HALVES: [[u8; 16]; 4] = [
    in_words([0, 128, 0, 128]),
    in_words([1, 128, 1, 128]),
    in_words([2, 128, 2, 128]),
    in_words([3, 128, 3, 128]),
];

/// Lays out block `b` of each row, quants times scales.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn lay_out(packed: &mut Packed, b: usize, rows: &[u8]) {
    let blocks: [&BlockQ2K; ROWS] = tile::blocks(rows, b);
    let (q, groups) = (&mut packed.q[b].0, &mut packed.groups[b]);
    let mut scales = [_mm512_setzero_si512(); ROWS];
    for (r, scales) in scales.iter_mut().enumerate() {
        // SAFETY: there are 16 bytes; the load needs no alignment.
        *scales = _mm512_castsi128_si512(unsafe { _mm_loadu_si128(blocks[r].scales.as_ptr().cast()) });
    }
    let scales = tile::transpose(scales);
    let nibble = _mm512_set1_epi8(15);
    let mut by_sub_block = [_mm512_setzero_si512(); 16];
    for (i, by_sub_block) in by_sub_block.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let minima = _mm512_and_si512(_mm512_srli_epi16::<4>(scales[i]), nibble);
        tile::store(shuffle(minima, &PAIRS[0]), &mut groups[8 + 2 * i]);
        tile::store(shuffle(minima, &PAIRS[1]), &mut groups[8 + 2 * i + 1]);
        let scales = _mm512_and_si512(scales[i], nibble);
        for (out, byte) in by_sub_block.iter_mut().zip(&BOTH_HALVES) {
            *out = shuffle(scales, byte);
        }
    }
    let three = _mm512_set1_epi8(3);
    for (t, mut bits) in tile::words_of_rows(|r| &blocks[r].q).into_iter().enumerate() {
        let (half, column) = (t / 8, t % 8);
        for plane in 0..4 {
            let quants = _mm512_and_si512(bits, three);
            bits = _mm512_srli_epi16::<2>(bits);
            // At most 3 * 15: no byte of two reaches into the other.
            let scaled = _mm512_mullo_epi16(quants, by_sub_block[8 * half + 2 * plane + column / 4]);
            tile::store(scaled, &mut q[32 * half + 8 * plane + column]);
        }
    }
    let (mut d, mut dmin) = ([[0; 2]; ROWS], [[0; 2]; ROWS]);
    for r in 0..ROWS {
        (d[r], dmin[r]) = (blocks[r].d, blocks[r].dmin);
    }
    (packed.d[b], packed.dmin[b]) = (tile::halves(&d), tile::halves(&dmin));
}

/// 32 weight rows with the columns; see [`tile`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn rows(rows: &[u8], x: &Columns<'_>, out: &mut Target<'_>) {
    let lay_out = |packed: &mut Packed, b, rows: &[u8]| lay_out(packed, b, rows);
    tile::multiply::<BlockQ2K, false, false>(lay_out, 1.0, rows, x, out);
}
