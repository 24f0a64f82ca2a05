//! One weight row of an integer format with some activation rows, as all levels of x86 add it up.
//!
//! The sum over a block is an exact integer, and there are four sums of blocks, one for every fourth block:
//! `acc = fma(block, weight scale * activation scale, acc)`, in order; the product is `(acc0 + acc1) + (acc2 + acc3)`. Four blocks are
//! summed across lanes at once. What differs between levels is how the lanes of a block's product come to be.
#![allow(unsafe_code)]

use ds4_quant::act::{Act32, Act256};
use std::arch::x86_64::*;

/// `acc[k] + ints[k] * (w[k] * x[k])`. Blocks that are not there have zeros, which change no sum: none is ever -0.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn add_blocks(acc: __m128, ints: __m128i, w: __m128, x: __m128) -> __m128 {
    _mm_fmadd_ps(_mm_cvtepi32_ps(ints), _mm_mul_ps(w, x), acc)
}

/// Activations of some times four blocks of 32, and their scales: as many of each, so that one check of a place does for both.
#[inline]
pub(super) fn fours32<'a>(x: &Act32<'a>, n: usize) -> (&'a [[[i8; 32]; 4]], &'a [[f32; 4]]) {
    (&x.q.as_chunks().0.as_chunks().0[..n], &x.d.as_chunks().0[..n])
}

/// Activations of some times four blocks of 256: as many of each kind, so that one check of a place does for all.
#[derive(Clone, Copy)]
pub(super) struct Fours<'a> {
    q: &'a [[[i8; 256]; 4]],
    sums: &'a [[[i16; 16]; 4]],
    d: &'a [[f32; 4]],
}

/// Activations of K blocks, four at most.
#[derive(Clone, Copy)]
pub(super) struct Few<'a, const K: usize> {
    pub(super) q: &'a [[i8; 256]; K],
    pub(super) sums: &'a [[i16; 16]; K],
    pub(super) d: [f32; 4],
}

impl<'a> Fours<'a> {
    #[inline]
    pub(super) fn of(x: &Act256<'a>, n: usize) -> Self {
        Fours {
            q: &x.q.as_chunks().0.as_chunks().0[..n],
            sums: &x.sums.as_chunks().0.as_chunks().0[..n],
            d: &x.d.as_chunks().0[..n],
        }
    }

    #[inline]
    pub(super) fn get(&self, i: usize) -> Few<'a, 4> {
        Few { q: &self.q[i], sums: &self.sums[i], d: self.d[i] }
    }
}

/// The last K blocks of a row: what is left behind its fours.
#[inline]
pub(super) fn last<'a, const K: usize>(x: &Act256<'a>) -> Option<Few<'a, K>> {
    let d = padded(x.d.last_chunk::<K>()?);
    Some(Few { q: x.q.as_chunks().0.last_chunk()?, sums: x.sums.as_chunks().0.last_chunk()?, d })
}

/// Up to four scales, and zeros.
#[inline]
pub(super) fn padded(d: &[f32]) -> [f32; 4] {
    let mut four = [0.0; 4];
    four.iter_mut().zip(d).for_each(|(to, d)| *to = *d);
    four
}

/// The sum of the lanes of each of four vectors. (An instruction adds neighbours, too, but takes as long as eight of these.)
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sums_of_four(p: [__m256i; 4]) -> __m128i {
    let a = _mm256_add_epi32(_mm256_unpacklo_epi32(p[0], p[1]), _mm256_unpackhi_epi32(p[0], p[1]));
    let b = _mm256_add_epi32(_mm256_unpacklo_epi32(p[2], p[3]), _mm256_unpackhi_epi32(p[2], p[3]));
    let lanes = _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256::<1>(lanes))
}

/// Four values.
#[inline]
pub(super) fn floats(four: &[f32; 4]) -> __m128 {
    // SAFETY: there are four values; the load needs no alignment.
    unsafe { _mm_loadu_ps(four.as_ptr()) }
}

/// Four halves.
#[inline]
#[target_feature(enable = "f16c")]
pub(super) fn four_halves(d: [[u8; 2]; 4]) -> __m128 {
    _mm_cvtph_ps(_mm_cvtsi64_si128(bytemuck::cast(d)))
}

/// The same, put together in integers: vectors would take seven shuffles, which formats with minima have too many of.
#[inline]
#[target_feature(enable = "f16c")]
pub(super) fn four_halves_of_integers(d: [[u8; 2]; 4]) -> __m128 {
    let [a, b, c, d] = d.map(|d| u64::from(u16::from_le_bytes(d)));
    // The compiler is not to know how this came to be: it would put it together in a vector.
    let d = std::hint::black_box(a | b << 16 | c << 32 | d << 48);
    _mm_cvtph_ps(_mm_cvtsi64_si128(d as i64))
}

/// The sum of the four sums.
#[inline]
pub(super) fn total(acc: __m128) -> f32 {
    let mut sums = [0f32; 4];
    // SAFETY: `sums` has four values; the store needs no alignment.
    unsafe { _mm_storeu_ps(sums.as_mut_ptr(), acc) };
    (sums[0] + sums[1]) + (sums[2] + sums[3])
}

/// The `$k`th of K blocks with N columns. (Not a loop: the compiler unrolls it for some formats only, and keeps sums in memory for others.)
macro_rules! one_block {
    ($k:literal, $K:ident, $N:ident, $blocks:ident, $x:ident, $products:path, $ints:ident, $mins:ident) => {
        if $k < $K {
            let mut activations = [(&$x[0].q[$k], &$x[0].sums[$k]); $N];
            for j in 1..$N {
                activations[j] = (&$x[j].q[$k], &$x[j].sums[$k]);
            }
            let products = $products(&$blocks[$k], activations);
            for j in 0..$N {
                ($ints[j][$k], $mins[j][$k]) = products[j];
            }
        }
    };
}
pub(super) use one_block;

/// The lanes of the products of K blocks and of those of their minima: of each block by itself, or of all together.
macro_rules! few_blocks {
    (each $products:path, $K:ident, $N:ident, $blocks:ident, $x:ident, $ints:ident, $mins:ident) => {
        one_block!(0, $K, $N, $blocks, $x, $products, $ints, $mins);
        one_block!(1, $K, $N, $blocks, $x, $products, $ints, $mins);
        one_block!(2, $K, $N, $blocks, $x, $products, $ints, $mins);
        one_block!(3, $K, $N, $blocks, $x, $products, $ints, $mins);
    };
    (all $products:path, $K:ident, $N:ident, $blocks:ident, $x:ident, $ints:ident, $mins:ident) => {
        $products($blocks, &$x, (&mut $ints, &mut $mins));
    };
}
pub(super) use few_blocks;

/// `dots` of a format of blocks of 256: one weight row with any activation rows. `each $products` gives the lanes of a block's product with
/// each of N activation blocks, and those of its minima with the sums, `all $products` those of K blocks; a weight is `$unit * d` times a
/// quant less `dmin` times its minimum, if the format has minima. In scope must be `zero()` and `sums_of_four(p)`, the sums of the lanes of
/// each of four vectors.
macro_rules! block_dots {
    ($features:literal, $block:ty, $how:ident $products:path, $unit:literal, $minimum:expr) => {
        /// Some blocks and their activations.
        #[inline]
        #[target_feature(enable = $features)]
        fn add_few<const K: usize, const N: usize>(
            acc: &mut [__m128; N],
            blocks: &[$block; K],
            x: [Few<'_, K>; N],
        ) {
            const MINIMUM: Option<fn(&$block) -> [u8; 2]> = $minimum;
            let mut ints = [[zero(); 4]; N];
            let mut mins = [[zero(); 4]; N];
            few_blocks!($how $products, K, N, blocks, x, ints, mins);
            let mut d = [[0; 2]; 4];
            for k in 0..K {
                d[k] = blocks[k].d;
            }
            let d = if MINIMUM.is_some() { four_halves_of_integers(d) } else { four_halves(d) };
            let d = _mm_mul_ps(d, _mm_set1_ps($unit));
            for j in 0..N {
                acc[j] = add_blocks(acc[j], sums_of_four(ints[j]), d, floats(&x[j].d));
            }
            if let Some(minimum) = MINIMUM {
                let mut dmin = [[0; 2]; 4];
                for k in 0..K {
                    dmin[k] = minimum(&blocks[k]);
                }
                let dmin = _mm_sub_ps(_mm_setzero_ps(), four_halves_of_integers(dmin));
                for j in 0..N {
                    acc[j] = add_blocks(acc[j], sums_of_four(mins[j]), dmin, floats(&x[j].d));
                }
            }
        }

        /// The last blocks of a row.
        #[target_feature(enable = $features)]
        fn add_last<const K: usize, const N: usize>(
            acc: &mut [__m128; N],
            row: &[$block],
            x: &[Act256<'_>; N],
        ) {
            let (Some(blocks), Some(first)) = (row.last_chunk::<K>(), last(&x[0])) else { return };
            let mut few = [first; N];
            for j in 1..N {
                few[j] = last(&x[j]).unwrap_or(first);
            }
            add_few(acc, blocks, few);
        }

        #[target_feature(enable = $features)]
        fn row_tile<const N: usize>(rows: &[u8], x: [Act256<'_>; N], out: &mut [f32], columns: usize) {
            let fours = x[0].d.len() / 4;
            let mut whole = [Fours::of(&x[0], fours); N];
            for j in 1..N {
                whole[j] = Fours::of(&x[j], fours);
            }
            for (row, out) in each_row::<$block>(rows, out, columns) {
                let mut acc = [_mm_setzero_ps(); N];
                let (row_fours, rest) = row.as_chunks::<4>();
                for (i, four) in row_fours[..fours].iter().enumerate() {
                    prefetch(four);
                    let mut x = [whole[0].get(i); N];
                    for j in 1..N {
                        x[j] = whole[j].get(i);
                    }
                    add_few(&mut acc, four, x);
                }
                match rest.len() {
                    1 => add_last::<1, N>(&mut acc, row, &x),
                    2 => add_last::<2, N>(&mut acc, row, &x),
                    3 => add_last::<3, N>(&mut acc, row, &x),
                    _ => {}
                }
                for j in 0..N {
                    out[j] = total(acc[j]);
                }
            }
        }

        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn dots(rows: &[u8], x: &Columns<'_>, out: &mut [f32]) {
            tiles!(x, rows, out, act256, row_tile);
        }
    };
}
pub(super) use block_dots;

/// `dots` of Q8_0, whose blocks are 32 values. `$products` gives the eight lanes of a block's product.
macro_rules! q8_0_dots {
    ($features:literal, $products:path) => {
        #[target_feature(enable = $features)]
        fn row_tile<const N: usize>(rows: &[u8], x: [Act32<'_>; N], out: &mut [f32], columns: usize) {
            let fours = x[0].d.len() / 4;
            let mut q = [fours32(&x[0], fours); N];
            for j in 1..N {
                q[j] = fours32(&x[j], fours);
            }
            for (row, out) in each_row::<BlockQ8_0>(rows, out, columns) {
                let mut acc = [_mm_setzero_ps(); N];
                let (whole, rest) = row.as_chunks::<4>();
                for (i, four) in whole[..fours].iter().enumerate() {
                    prefetch(four);
                    let d = four_halves([four[0].d, four[1].d, four[2].d, four[3].d]);
                    for j in 0..N {
                        let (x_blocks, x_d) = (&q[j].0[i], &q[j].1[i]);
                        let mut p = [_mm256_setzero_si256(); 4];
                        for k in 0..4 {
                            p[k] = $products(&four[k].q, &x_blocks[k]);
                        }
                        acc[j] = add_blocks(acc[j], sums_of_four(p), d, floats(x_d));
                    }
                }
                for j in 0..N {
                    let mut sums = [0f32; 4];
                    // SAFETY: `sums` has four values; the store needs no alignment.
                    unsafe { _mm_storeu_ps(sums.as_mut_ptr(), acc[j]) };
                    for (k, block) in rest.iter().enumerate() {
                        let b = 4 * fours + k;
                        let p = $products(&block.q, &x[j].q.as_chunks().0[b]);
                        let p = _mm_add_epi32(_mm256_castsi256_si128(p), _mm256_extracti128_si256::<1>(p));
                        let p = _mm_hadd_epi32(_mm_hadd_epi32(p, p), p);
                        let sum = _mm_cvtsi128_si32(p) as f32;
                        sums[k] = sum.mul_add(f16_to_f32(block.d) * x[j].d[b], sums[k]);
                    }
                    out[j] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
                }
            }
        }

        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn dots(rows: &[u8], x: &Columns<'_>, out: &mut [f32]) {
            tiles!(x, rows, out, act32, row_tile);
        }
    };
}
pub(super) use q8_0_dots;
