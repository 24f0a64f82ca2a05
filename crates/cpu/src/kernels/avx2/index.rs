//! Index scores: a key's 32 broadcasts meet two halves of a vector of heads.

use super::*;
use crate::kernels::index::{self, IndexQuery};
use ds4_quant::e8m0_to_f32;

/// Products of a key's byte, at most 24, with twice a value, at most 12, add up to less than 2^15 over a block.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scores(query: &IndexQuery, keys: &[u8], scores: &mut [f32]) {
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
                    let q: &[[u8; 32]; 2] = bytemuck::cast_ref(q);
                    for half in 0..2 {
                        let p = _mm256_maddubs_epi16(four, load(&q[half]));
                        int[half] = _mm256_add_epi16(int[half], p);
                    }
                }
                for half in 0..2 {
                    let offsets: &[[u8; 32]; 2] = bytemuck::cast_ref(&group.offsets[b]);
                    let p = _mm256_madd_epi16(int[half], ones);
                    let p = _mm256_cvtepi32_ps(_mm256_add_epi32(p, load(&offsets[half])));
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
