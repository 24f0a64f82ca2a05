//! Few columns, one row. Nothing is moved between the bytes of a code: the first weights of 64 codes (two blocks) are a vector, their second
//! weights another, and so on to the eighth, and the activations lie likewise. For two weights of each code, magnitudes and signs are an
//! index of six bits, of which a table of 64 bytes gives the one weight and another table the other. So 20 instructions that move bytes make
//! 512 weights, and a dword lane of the products is a group, which is how the file has its scales.
//!
//! Measured, one column: one thread of a Zen 4 takes 13 GiB/s of the 31 that it reads from memory, in 17.5 cycles a block; so many instructions
//! for the units that move bytes or multiply them would be 11.

use super::{GRID, halves, load, magnitudes, quarters, sevens};
use crate::kernels::avx2::zero;
use crate::kernels::avx512::tile::{scales_of, store};
use crate::kernels::prefetch::prefetch;
use crate::kernels::row::{add_blocks, floats, four_halves, padded, sums_of_four, total};
use crate::kernels::tile::{IQ2_MAGNITUDES, IQ2_MIDDLE, iq2_offsets};
use crate::kernels::{Columns, each_row, tile_of};
use bytemuck::Zeroable;
use ds4_quant::act::Act256;
use ds4_quant::{BlockIq2Xxs, iq2_signs};
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Of seven bits of signs, for each half of a code: the signs of its first two weights in bits 4 and 5, of the others in bits 2 and 3.
static SIGNS: [[u8; 128]; 2] = {
    let mut signs = [[0; 128]; 2];
    let mut s7 = 0;
    while s7 < 128 {
        let eight = iq2_signs(s7 as u32);
        let mut half = 0;
        while half < 2 {
            let four = eight >> (4 * half) & 15;
            signs[half][s7] = (four & 3) << 4 | four & 12;
            half += 1;
        }
        s7 += 1;
    }
    signs
};

/// A weight plus [`IQ2_MIDDLE`] from an index: two bits from `magnitude`, one from `sign`.
const fn weights(magnitude: u32, sign: u32) -> [u8; 64] {
    let mut weights = [0; 64];
    let mut i = 0;
    while i < 64 {
        let level = IQ2_MAGNITUDES[i >> magnitude & 3];
        weights[i] = if i >> sign & 1 == 0 { IQ2_MIDDLE + level } else { IQ2_MIDDLE - level };
        i += 1;
    }
    weights
}

/// For the first two weights of half a code the index is their magnitudes, then their signs; for the others their signs come first.
static WEIGHTS: [[u8; 64]; 4] = [weights(0, 4), weights(2, 5), weights(2, 0), weights(4, 1)];

/// What is behind the end of a row: its products are times zero.
static NO_WEIGHTS: BlockIq2Xxs = BlockIq2Xxs { d: [0; 2], groups: [[0; 8]; 8] };

/// Activations of two blocks, in lines of the cache.
#[derive(Clone, Copy, Zeroable)]
#[repr(align(64))]
struct Pair {
    /// The `i`th of every eight values, of eight times eight codes.
    q: [[[u8; 8]; 8]; 8],
    /// What [`IQ2_MIDDLE`] adds too much to a group's product, negated.
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

/// Places of the `i`th values of eight codes.
static COLUMNS: [u8; 64] = {
    let (mut places, mut i) = ([0; 64], 0);
    while i < 64 {
        places[i] = (8 * (i % 8) + i / 8) as u8;
        i += 1;
    }
    places
};

/// Lays a column out. What was there before stays behind its end, where weights are zeros.
#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bitalg"
)]
fn lay_out(x: &Act256<'_>, fours: &mut [Four]) {
    let (q, sums): (&[[i8; 256]], &[[i16; 16]]) = (x.q.as_chunks().0, x.sums.as_chunks().0);
    for (four, d) in fours.iter_mut().zip(x.d.chunks(4)) {
        four.d = padded(d);
    }
    for (b, (q, sums)) in q.iter().zip(sums).enumerate() {
        let (pair, half) = (&mut fours[b / 4].pairs[b % 4 / 2], b % 2);
        for (codes, eights) in q.as_chunks::<64>().0.iter().enumerate() {
            let mut columns = [[0; 8]; 8];
            store(_mm512_permutexvar_epi8(load(&COLUMNS), load(bytemuck::cast_ref(eights))), &mut columns);
            for (plane, column) in pair.q.iter_mut().zip(columns) {
                plane[4 * half + codes] = column;
            }
        }
        pair.offsets[8 * half..8 * half + 8].copy_from_slice(&iq2_offsets(sums));
    }
}

/// All tables in registers, those of half a code each in twos.
struct Tables {
    grid: [[__m512i; 4]; 2],
    signs: [[__m512i; 2]; 2],
    weights: [__m512i; 4],
}

impl Tables {
    #[inline]
    #[target_feature(
        enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bitalg"
    )]
    fn new() -> Self {
        // The compiler is not to know that these are constants: it would load them again wherever they are used.
        let (grid, signs, weights) = std::hint::black_box((&GRID, &SIGNS, &WEIGHTS));
        Tables {
            grid: [quarters(&grid[0]), quarters(&grid[1])],
            signs: [halves(&signs[0]), halves(&signs[1])],
            weights: [load(&weights[0]), load(&weights[1]), load(&weights[2]), load(&weights[3])],
        }
    }
}

/// Groups' products of two blocks with N columns, times their scales: eight lanes a block.
#[inline]
#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bitalg"
)]
fn products<const N: usize>(tables: &Tables, blocks: [&BlockIq2Xxs; 2], x: [&Pair; N]) -> [__m512i; N] {
    let words = [load(bytemuck::cast_ref(&blocks[0].groups)), load(bytemuck::cast_ref(&blocks[1].groups))];
    let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    let odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    let codes = _mm512_permutex2var_epi32(words[0], even, words[1]);
    let aux = _mm512_permutex2var_epi32(words[0], odd, words[1]);
    let upper = _mm512_movepi8_mask(codes);
    let sevens = sevens(aux);
    let low = _mm512_set1_epi8(15);
    let mut sums = [_mm512_setzero_si512(); N];
    for j in 0..N {
        sums[j] = load(bytemuck::cast_ref(&x[j].offsets));
    }
    for half in 0..2 {
        let magnitudes = magnitudes(tables.grid[half], codes, upper);
        let [low_signs, high_signs] = tables.signs[half];
        let signs = _mm512_permutex2var_epi8(low_signs, sevens, high_signs);
        // Of each bit that of the one where `low` has a one, else that of the other.
        let first = _mm512_ternarylogic_epi32::<0xca>(low, magnitudes, signs);
        let second = _mm512_srli_epi16::<2>(_mm512_ternarylogic_epi32::<0xca>(low, signs, magnitudes));
        for k in 0..4 {
            let index = if k < 2 { first } else { second };
            let weights = _mm512_permutexvar_epi8(index, tables.weights[k]);
            for j in 0..N {
                sums[j] =
                    _mm512_dpbusd_epi32(sums[j], weights, load(bytemuck::cast_ref(&x[j].q[4 * half + k])));
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
#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bitalg"
)]
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
#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bitalg"
)]
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

#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bitalg"
)]
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
