//! Few columns, one row. The first weights of 64 codes (two blocks) are a vector, their second weights another, and so on to the eighth, as
//! are the activations. So 20 instructions that move bytes make 512 weights, and a dword lane of the products is a group, which is how the
//! file has its scales.
//!
//! Measured, one column: one thread of a Zen 4 takes 13 GiB/s of the 31 that it reads from memory, in 17.5 cycles a block; so many instructions
//! for the units that move bytes or multiply them would be 11.

use super::{Codes, Tables, load};
use crate::kernels::avx2::zero;
use crate::kernels::avx512::tile::scales_of;
use crate::kernels::prefetch::prefetch;
use crate::kernels::row::{add_blocks, floats, four_halves, padded, sums_of_four, total};
use crate::kernels::tile::iq2_offsets;
use crate::kernels::{Columns, each_row, tile_of};
use bytemuck::Zeroable;
use ds4_quant::BlockIq2Xxs;
use ds4_quant::act::Act256;
use std::arch::x86_64::*;
use std::cell::RefCell;

/// What is behind the end of a row: its products are times zero.
static NO_WEIGHTS: BlockIq2Xxs = BlockIq2Xxs { d: [0; 2], groups: [[0; 8]; 8] };

/// Activations of two blocks, in lines of the cache.
#[derive(Clone, Copy, Zeroable)]
#[repr(align(64))]
struct Pair {
    /// Planes of the two blocks.
    q: [[[i8; 32]; 2]; 8],
    /// See [`iq2_offsets`].
    offsets: [i32; 16],
}

/// Activations of four blocks.
#[derive(Clone, Copy, Zeroable)]
struct Four {
    pairs: [Pair; 2],
    d: [f32; 4],
}

thread_local! {
    static FOURS: RefCell<Vec<Four>> = const { RefCell::new(Vec::new()) };
}

/// Lays a column out. What was there before stays behind its end, where weights are zeros.
fn lay_out(x: &Act256<'_>, fours: &mut [Four]) {
    let (q, sums): (&[[i8; 256]], &[[i16; 16]]) = (x.q.as_chunks().0, x.sums.as_chunks().0);
    for (four, d) in fours.iter_mut().zip(x.d.chunks(4)) {
        four.d = padded(d);
    }
    for (b, (q, sums)) in q.iter().zip(sums).enumerate() {
        let (pair, half) = (&mut fours[b / 4].pairs[b % 4 / 2], b % 2);
        let planes: &[[i8; 32]; 8] = bytemuck::cast_ref(q);
        pair.q.iter_mut().zip(planes).for_each(|(to, plane)| to[half] = *plane);
        pair.offsets[8 * half..8 * half + 8].copy_from_slice(&iq2_offsets(sums));
    }
}

/// Groups' products of two blocks with N columns, times their scales: eight lanes a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
fn products<const N: usize>(tables: &Tables, blocks: [&BlockIq2Xxs; 2], x: [&Pair; N]) -> [__m512i; N] {
    let words = [load(bytemuck::cast_ref(&blocks[0].groups)), load(bytemuck::cast_ref(&blocks[1].groups))];
    let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    let odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    let codes = _mm512_permutex2var_epi32(words[0], even, words[1]);
    let aux = _mm512_permutex2var_epi32(words[0], odd, words[1]);
    let codes = Codes::new(codes, aux);
    let mut sums = [_mm512_setzero_si512(); N];
    for j in 0..N {
        sums[j] = load(bytemuck::cast_ref(&x[j].offsets));
    }
    for half in 0..2 {
        let weights = codes.weights(tables, half);
        for k in 0..4 {
            for j in 0..N {
                let x = load(bytemuck::cast_ref(&x[j].q[4 * half + k]));
                sums[j] = _mm512_dpbusd_epi32(sums[j], weights[k], x);
            }
        }
    }
    let scales = scales_of(aux);
    for j in 0..N {
        sums[j] = _mm512_mullo_epi32(sums[j], scales);
    }
    sums
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
fn add_pairs<const PAIRS: usize, const N: usize>(
    tables: &Tables,
    acc: &mut [__m128; N],
    four: [&BlockIq2Xxs; 4],
    x: [&Four; N],
) {
    let mut ints = [[zero(); 4]; N];
    for p in 0..PAIRS {
        let mut pairs = [&x[0].pairs[p]; N];
        for j in 1..N {
            pairs[j] = &x[j].pairs[p];
        }
        let products = products(tables, [four[2 * p], four[2 * p + 1]], pairs);
        for j in 0..N {
            ints[j][2 * p] = _mm512_castsi512_si256(products[j]);
            ints[j][2 * p + 1] = _mm512_extracti64x4_epi64::<1>(products[j]);
        }
    }
    let d = four_halves([four[0].d, four[1].d, four[2].d, four[3].d]);
    let d = _mm_mul_ps(d, _mm_set1_ps(0.125));
    for j in 0..N {
        acc[j] = add_blocks(acc[j], sums_of_four(ints[j]), d, floats(&x[j].d));
    }
}

/// Rows with N columns, each laid out in `fours[j]`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
fn row_tile<const N: usize>(rows: &[u8], fours: [&[Four]; N], out: &mut [f32], columns: usize) {
    let tables = Tables::new();
    for (row, out) in each_row::<BlockIq2Xxs>(rows, out, columns) {
        let mut acc = [_mm_setzero_ps(); N];
        let (whole, rest) = row.as_chunks::<4>();
        let mut x = fours;
        for j in 0..N {
            x[j] = &fours[j][..row.len().div_ceil(4)];
        }
        for (i, four) in whole.iter().enumerate() {
            prefetch(four);
            let mut x_four = [&x[0][i]; N];
            for j in 1..N {
                x_four[j] = &x[j][i];
            }
            add_pairs::<2, N>(&tables, &mut acc, four.each_ref(), x_four);
        }
        if let [first, others @ ..] = rest {
            let behind = |k: usize| others.get(k).unwrap_or(&NO_WEIGHTS);
            let four = [first, behind(0), behind(1), &NO_WEIGHTS];
            let mut x_four = [&x[0][whole.len()]; N];
            for j in 1..N {
                x_four[j] = &x[j][whole.len()];
            }
            match rest.len() {
                1 | 2 => add_pairs::<1, N>(&tables, &mut acc, four, x_four),
                _ => add_pairs::<2, N>(&tables, &mut acc, four, x_four),
            }
        }
        for j in 0..N {
            out[j] = total(acc[j]);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
pub(super) fn dots(rows: &[u8], x: &Columns<'_>, out: &mut [f32]) {
    let columns = x.index.len();
    FOURS.with_borrow_mut(|fours| {
        for first in (0..columns).step_by(4) {
            let n = (columns - first).min(4);
            let each = (x.len / 256).div_ceil(4);
            if fours.len() < n * each {
                fours.resize(n * each, Four::zeroed());
            }
            for (j, fours) in fours.chunks_exact_mut(each).enumerate().take(n) {
                lay_out(&x.act256(first + j), fours);
            }
            let of = |j: usize| &fours[each * j..each * (j + 1)];
            tile_of!(n, of, row_tile(rows, &mut out[first..], columns));
        }
    });
}
