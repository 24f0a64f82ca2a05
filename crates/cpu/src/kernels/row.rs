//! One weight row of an integer format with some activation rows, as all levels of x86 add it up.
//!
//! The sum over a block is an exact integer, and there are four sums of blocks, one for every fourth block:
//! `acc = fma(block, weight scale * activation scale, acc)`, in order; the product is `(acc0 + acc1) + (acc2 + acc3)`. Four blocks are
//! summed across lanes at once. What differs between levels is how the lanes of a block's product come to be.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

/// `acc[k] + ints[k] * (w[k] * x[k])`. Blocks that are not there have zeros, which change no sum: none is ever -0.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn add_blocks(acc: __m128, ints: __m128i, w: __m128, x: __m128) -> __m128 {
    _mm_fmadd_ps(_mm_cvtepi32_ps(ints), _mm_mul_ps(w, x), acc)
}

/// Activation scales of up to four blocks from `b`.
#[inline]
pub(super) fn scales_from(d: &[f32], b: usize) -> __m128 {
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
pub(super) fn four_halves(d: [[u8; 2]; 4]) -> __m128 {
    _mm_cvtph_ps(_mm_cvtsi64_si128(bytemuck::cast(d)))
}

/// The sum of the four sums.
#[inline]
pub(super) fn total(acc: __m128) -> f32 {
    let mut sums = [0f32; 4];
    // SAFETY: `sums` has four values; the store needs no alignment.
    unsafe { _mm_storeu_ps(sums.as_mut_ptr(), acc) };
    (sums[0] + sums[1]) + (sums[2] + sums[3])
}

/// `dots` of a format of blocks of 256: one weight row with any activation rows. `$products` gives the lanes of a block's product with
/// each of N activation blocks, and those of its minima with the sums; a weight is `$unit * d` times a quant less `dmin` times its minimum,
/// if the format has minima. In scope must be `zero()` and `sums_of_four(p)`, the sums of the lanes of each of four vectors.
macro_rules! block_dots {
    ($features:literal, $block:ty, $products:path, $unit:literal, $minimum:expr) => {
        #[target_feature(enable = $features)]
        fn row_tile<const N: usize>(row: &[$block], x: [Act256<'_>; N]) -> [f32; N] {
            const MINIMUM: Option<fn(&$block) -> [u8; 2]> = $minimum;
            let mut acc = [_mm_setzero_ps(); N];
            for (i, four) in row.chunks(4).enumerate() {
                prefetch(four);
                let mut ints = [[zero(); 4]; N];
                let mut mins = [[zero(); 4]; N];
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
                let d = _mm_mul_ps(four_halves(d), _mm_set1_ps($unit));
                let dmin = four_halves(dmin);
                for j in 0..N {
                    let scales = scales_from(x[j].d, 4 * i);
                    acc[j] = add_blocks(acc[j], sums_of_four(ints[j]), d, scales);
                    if MINIMUM.is_some() {
                        let negative = _mm_sub_ps(_mm_setzero_ps(), dmin);
                        acc[j] = add_blocks(acc[j], sums_of_four(mins[j]), negative, scales);
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
        pub(in crate::kernels) fn dots(row: &[u8], x: &Columns<'_>, out: &mut [f32]) {
            let row: &[$block] = bytemuck::cast_slice(row);
            tiles!(x, out, act256, row_tile, row);
        }
    };
}
pub(super) use block_dots;

/// `dots` of Q8_0, whose blocks are 32 values. `$products` gives the eight lanes of a block's product.
macro_rules! q8_0_dots {
    ($features:literal, $products:path) => {
        #[target_feature(enable = $features)]
        fn row_tile<const N: usize>(row: &[BlockQ8_0], x: [Act32<'_>; N]) -> [f32; N] {
            let mut acc = [_mm_setzero_ps(); N];
            let (fours, rest) = row.as_chunks::<4>();
            for (i, four) in fours.iter().enumerate() {
                prefetch(four);
                let d = four_halves([four[0].d, four[1].d, four[2].d, four[3].d]);
                for j in 0..N {
                    let x_blocks: &[[i8; 32]; 4] = &x[j].q.as_chunks().0.as_chunks().0[i];
                    let mut p = [_mm256_setzero_si256(); 4];
                    for k in 0..4 {
                        p[k] = $products(&four[k].q, &x_blocks[k]);
                    }
                    let p = _mm256_hadd_epi32(_mm256_hadd_epi32(p[0], p[1]), _mm256_hadd_epi32(p[2], p[3]));
                    let p = _mm_add_epi32(_mm256_castsi256_si128(p), _mm256_extracti128_si256::<1>(p));
                    acc[j] = add_blocks(acc[j], p, d, scales_from(x[j].d, 4 * i));
                }
            }
            let mut out = [0.0; N];
            for j in 0..N {
                let mut sums = [0f32; 4];
                // SAFETY: `sums` has four values; the store needs no alignment.
                unsafe { _mm_storeu_ps(sums.as_mut_ptr(), acc[j]) };
                for (k, block) in rest.iter().enumerate() {
                    let b = 4 * fours.len() + k;
                    let p = $products(&block.q, &x[j].q.as_chunks().0[b]);
                    let p = _mm_add_epi32(_mm256_castsi256_si128(p), _mm256_extracti128_si256::<1>(p));
                    let p = _mm_hadd_epi32(_mm_hadd_epi32(p, p), p);
                    let sum = _mm_cvtsi128_si32(p) as f32;
                    sums[k] = sum.mul_add(f16_to_f32(block.d) * x[j].d[b], sums[k]);
                }
                out[j] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
            }
            out
        }

        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn dots(row: &[u8], x: &Columns<'_>, out: &mut [f32]) {
            let row: &[BlockQ8_0] = bytemuck::cast_slice(row);
            tiles!(x, out, act32, row_tile, row);
        }
    };
}
pub(super) use q8_0_dots;
