//! Q4_K, 144 bytes a block.

use super::tile::{self, Packed};
use super::*;
use crate::kernels::tiles;
use ds4_quant::BlockQ4K;
use ds4_quant::act::Act256;

/// Scales of the groups, as words, where the products of the low and high nibbles of half a block are packed to words.
const SCALES: [[i16; 32]; 2] = {
    let mut index = [[0; 32]; 2];
    let mut i = 0;
    while i < 64 {
        let (half, lane, word) = (i / 32, i % 32 / 8, i % 8);
        index[half][i % 32] = (4 * half + 2 * (lane / 2) + word / 4) as i16;
        i += 1;
    }
    index
};

/// The eight scales and the eight minima.
#[inline]
fn scales_mins(p: &[u8; 12]) -> (u64, u64) {
    let [a, b, c] = *p.as_chunks::<4>().0 else { return (0, 0) };
    let [a, b, c] = [a, b, c].map(u32::from_le_bytes);
    let six = 0x3f3f_3f3f;
    let high = |low: u32, top: u32| u64::from((low & 0x0f0f_0f0f) | ((top >> 6 & 0x0303_0303) << 4)) << 32;
    (u64::from(a & six) | high(c, a), u64::from(b & six) | high(c >> 4, b))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn halves_of(q: &[u8; 128], half: usize) -> (__m512i, __m512i) {
    let bytes = load(&q.as_chunks::<64>().0[half]);
    let nibble = _mm512_set1_epi8(15);
    (_mm512_and_si512(bytes, nibble), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), nibble))
}

/// Eight minima of 32 as 16 minima of 16.
#[inline]
#[target_feature(enable = "avx2")]
fn twice(minima: u64) -> __m256i {
    let minima = _mm_cvtsi64_si128(minima as i64);
    _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(minima, minima))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn products<const N: usize>(block: &BlockQ4K, x: [(&[i8; 256], &[i16; 16]); N]) -> [(__m512i, __m512i); N] {
    let (scales, minima) = scales_mins(&block.scales);
    let scales = _mm512_castsi128_si512(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(scales as i64)));
    let minima = twice(minima);
    let zero = _mm512_setzero_si512();
    let mut out = [(zero, zero); N];
    for half in 0..2 {
        let (low, high) = halves_of(&block.q, half);
        let scales = _mm512_permutexvar_epi16(places(&SCALES[half]), scales);
        for (out, (x, _)) in out.iter_mut().zip(x) {
            let g = 4 * half;
            let low = _mm512_dpbusd_epi32(zero, low, groups(x, g, g + 2));
            let high = _mm512_dpbusd_epi32(zero, high, groups(x, g + 1, g + 3));
            out.0 = _mm512_dpwssd_epi32(out.0, _mm512_packs_epi32(low, high), scales);
        }
    }
    for (out, (_, sums)) in out.iter_mut().zip(x) {
        out.1 = min_products(minima, sums);
    }
    out
}

block_dots!(
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni",
    BlockQ4K,
    products,
    1.0,
    Some(|block| block.dmin)
);

/// Lays out block `b` of each row.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn lay_out(packed: &mut Packed, b: usize, rows: &[u8]) {
    let blocks: [&BlockQ4K; ROWS] = tile::blocks(rows, b);
    let (q, nibble) = (&mut packed.q[b].0, _mm512_set1_epi8(15));
    for (half, q) in q.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let words = tile::words_of_rows(|r| &blocks[r].q.as_chunks().0[half]);
        for (t, bytes) in words.into_iter().enumerate() {
            let (pair, column) = (t / 8, t % 8);
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), nibble);
            tile::store(_mm512_and_si512(bytes, nibble), &mut q[16 * pair + column]);
            tile::store(high, &mut q[16 * pair + 8 + column]);
        }
    }
    let (mut d, mut dmin) = ([[0; 2]; ROWS], [[0; 2]; ROWS]);
    let mut groups = [_mm512_setzero_si512(); ROWS];
    for r in 0..ROWS {
        let (scales, minima) = scales_mins(&blocks[r].scales);
        let scales = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(scales as i64));
        groups[r] = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(scales), twice(minima));
        (d[r], dmin[r]) = (blocks[r].d, blocks[r].dmin);
    }
    for (out, v) in packed.groups[b].iter_mut().zip(tile::transpose(groups)) {
        tile::store(v, out);
    }
    (packed.d[b], packed.dmin[b]) = (tile::halves(&d), tile::halves(&dmin));
}

/// 32 weight rows with the columns; see [`tile`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn rows(rows: &[u8], x: &Columns<'_>, out: &mut Target<'_>) {
    let lay_out = |packed: &mut Packed, b, rows: &[u8]| lay_out(packed, b, rows);
    tile::multiply::<BlockQ4K, true, false>(lay_out, 1.0, rows, x, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use ds4_quant::scale_min;

    #[test]
    fn scales_agree_with_the_reference() {
        let packed: [u8; 12] = std::array::from_fn(|i| (i * 89 + 7) as u8);
        let (scales, mins) = scales_mins(&packed);
        for g in 0..8 {
            assert_eq!((scales.to_le_bytes()[g], mins.to_le_bytes()[g]), scale_min(&packed, g));
        }
    }
}
