//! Index scores: a key's 32 broadcasts meet four vectors of a query each, 128 products of 64 bytes for 64 heads of 128 values.

use super::*;
use crate::kernels::avx512::tile::floats;
use crate::kernels::index::{BLOCK, BLOCKS, HEADS, IndexQuery, MIDDLE, TWICE, total};
use ds4_quant::e8m0_to_f32;

/// A block's codes to bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn unpack(codes: &[u8; BLOCK / 2], out: &mut [u8; BLOCK]) {
    const VALUES: [u8; 16] = {
        let mut values = [0; 16];
        let mut code = 0;
        while code < 16 {
            values[code] = (TWICE[code] + MIDDLE) as u8;
            code += 1;
        }
        values
    };
    // SAFETY: there are 16 bytes in `codes` and `VALUES` and 32 in `out`; nothing here needs alignment.
    unsafe {
        let codes = _mm_loadu_si128(codes.as_ptr().cast());
        let table = _mm_loadu_si128(VALUES.as_ptr().cast());
        let nibble = _mm_set1_epi8(15);
        let low = _mm_shuffle_epi8(table, _mm_and_si128(codes, nibble));
        let high = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16::<4>(codes), nibble));
        let pairs = _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
        _mm256_storeu_si256(out.as_mut_ptr().cast(), pairs);
    }
}

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn scores(query: &IndexQuery, keys: &[u8], scores: &mut [f32]) {
    let mut key = [0u8; BLOCK * BLOCKS];
    for (bytes, score) in keys.chunks_exact(query.key_bytes()).zip(scores) {
        let (codes, scales) = bytes.split_at(query.code_bytes());
        for (codes, key) in codes.as_chunks().0.iter().zip(key.as_chunks_mut().0) {
            unpack(codes, key);
        }
        let mut all = _mm512_setzero_ps();
        for group in query.groups() {
            let mut dot = _mm512_setzero_ps();
            let fours = key.as_chunks::<BLOCK>().0;
            for (b, ((q, fours), scale)) in group.q.iter().zip(fours).zip(scales).enumerate() {
                let mut int = load(bytemuck::cast_ref(&group.offsets[b]));
                for (q, four) in q.iter().zip(fours.as_chunks::<4>().0) {
                    let four = _mm512_set1_epi32(i32::from_ne_bytes(*four));
                    int = _mm512_dpbusd_epi32(int, four, load(bytemuck::cast_ref(q)));
                }
                let scale = _mm512_mul_ps(floats(&group.d[b]), _mm512_set1_ps(e8m0_to_f32(*scale)));
                dot = _mm512_fmadd_ps(_mm512_cvtepi32_ps(int), scale, dot);
            }
            all = _mm512_fmadd_ps(floats(group.weights), _mm512_max_ps(dot, _mm512_setzero_ps()), all);
        }
        let mut lanes = [0f32; HEADS];
        // SAFETY: `lanes` has 16 values; the store needs no alignment.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), all) };
        *score = total(&lanes);
    }
}
