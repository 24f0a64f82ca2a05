//! Q2_K, 84 bytes a block. One row: 12 of AVX-512's instructions unpack a block to bytes in the order of the file, and each activation
//! row takes 16 more. Many rows: quants are multiplied by their scale when they are laid out (at most 45), so that the 64 steps of a block
//! are one sum.

use super::tile::{self, Unpacked};
use super::*;
use crate::kernels::{ROWS, tiles};
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
        _mm512_permutexvar_epi16(index(&SCALES[0]), scales),
        _mm512_permutexvar_epi16(index(&SCALES[1]), scales),
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

/// Quants times scales, in order.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn unpack(block: &BlockQ2K) -> [__m512i; 4] {
    let q = load(&block.q);
    let three = _mm512_set1_epi8(3);
    // SAFETY: there are 16 bytes; the load needs no alignment.
    let bytes = unsafe { _mm_loadu_si128(block.scales.as_ptr().cast()) };
    let scales = _mm512_broadcast_i32x4(_mm_and_si128(bytes, _mm_set1_epi8(15)));
    let planes = [
        _mm512_and_si512(q, three),
        _mm512_and_si512(_mm512_srli_epi16::<2>(q), three),
        _mm512_and_si512(_mm512_srli_epi16::<4>(q), three),
        _mm512_and_si512(_mm512_srli_epi16::<6>(q), three),
    ];
    let quants = [
        _mm512_shuffle_i64x2::<0x44>(planes[0], planes[1]),
        _mm512_shuffle_i64x2::<0x44>(planes[2], planes[3]),
        _mm512_shuffle_i64x2::<0xee>(planes[0], planes[1]),
        _mm512_shuffle_i64x2::<0xee>(planes[2], planes[3]),
    ];
    // 0, s, 2s, 3s in every lane, of which a quant picks one.
    let (odd, high) = (_mm512_set1_epi32(0xff00_ff00u32 as i32), _mm512_set1_epi32(0xffff_0000u32 as i32));
    let lane = _mm512_set_epi64(
        0x0303_0303_0303_0303,
        0x0303_0303_0303_0303,
        0x0202_0202_0202_0202,
        0x0202_0202_0202_0202,
        0x0101_0101_0101_0101,
        0x0101_0101_0101_0101,
        0,
        0,
    );
    let mut out = quants;
    for (part, out) in out.iter_mut().enumerate() {
        let s = _mm512_shuffle_epi8(scales, _mm512_add_epi8(lane, _mm512_set1_epi8(4 * part as i8)));
        let multiples =
            _mm512_add_epi8(_mm512_and_si512(s, odd), _mm512_and_si512(_mm512_add_epi8(s, s), high));
        *out = _mm512_shuffle_epi8(multiples, *out);
    }
    out
}

/// 16 weight rows with the columns; see [`tile`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn rows(rows: &[u8], x: &Columns<'_>, out: &mut [f32]) {
    tile::with_packed(|packed| {
        let blocks = packed.room::<BlockQ2K>(rows);
        for b in 0..blocks {
            let mut out = Unpacked::new();
            for r in 0..ROWS {
                let block: &BlockQ2K = tile::block(rows, r, b);
                out.q[r] = unpack(block);
                out.groups[r] = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), minima(block));
                (out.d[r], out.dmin[r]) = (block.d, block.dmin);
            }
            packed.lay_out(b, &out);
        }
        tile::multiply::<false, false>(packed, 1.0, x, out);
    });
}
