//! IQ2_XXS by VBMI, 16 rows at a time, a lane a row from the start: the codes of 16 rows are turned to columns, and unpacked by ten
//! instructions for eight weights of each, without a load from a table. A code stands for eight fields of two bits, the table of codes is
//! eight registers, and one instruction moves each field to a byte of its own, as one picks the bits of four signs. Few columns meet the
//! weights at once, many meet what was laid out.
//!
//! Measured, one column: one thread of a Zen 4 takes 8 GiB/s of the 27 that it reads from memory: some 500 instructions for 16 blocks, of
//! which it starts two, and one shuffle, in a cycle. Many columns: 149 G multiply-adds/s of 237.

use super::tile::{multiply, put, spread};
use super::*;
use crate::kernels::avx512::tile::{floats, halves, lay_out_groups, scales_of, store, words_of};
use crate::kernels::tile::{IQ2_MIDDLE, Packed, Steps, blocks};
use ds4_quant::{BlockIq2Xxs, IQ2XXS_GRID, iq2_signs};

/// The grid, a magnitude in two bits (0, 1, 2 for 8, 25, 43): of every code the byte of its first four, then the byte of the others.
static GRID: [[u8; 256]; 2] = {
    let mut grid = [[0; 256]; 2];
    let mut code = 0;
    while code < 256 {
        let mut k = 0;
        while k < 8 {
            let level = IQ2XXS_GRID[code][k] / 20;
            grid[k / 4][code] |= level << (2 * (k % 4));
            k += 1;
        }
        code += 1;
    }
    grid
};

/// The grid's bytes of 64 codes.
#[inline]
#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bitalg"
)]
fn look_up(codes: __m512i) -> [__m512i; 2] {
    let upper = _mm512_movepi8_mask(codes);
    let mut out = [codes; 2];
    for (out, grid) in out.iter_mut().zip(&GRID) {
        let quarters = grid.as_chunks::<64>().0;
        let low = _mm512_permutex2var_epi8(load(&quarters[0]), codes, load(&quarters[1]));
        let high = _mm512_permutex2var_epi8(load(&quarters[2]), codes, load(&quarters[3]));
        *out = _mm512_mask_blend_epi8(upper, low, high);
    }
    out
}

/// The eight sign bits of seven.
static EIGHTS: [u8; 128] = {
    let mut eights = [0; 128];
    let mut s7 = 0;
    while s7 < 128 {
        eights[s7] = iq2_signs(s7 as u32);
        s7 += 1;
    }
    eights
};

/// Places of the four fields of a byte of the grid, of every word's code `v`.
static FIELDS: [i64; 4] =
    [places([0, 2, 4, 6]), places([8, 10, 12, 14]), places([16, 18, 20, 22]), places([24, 26, 28, 30])];

/// Places of four signs of every word, of its eight fours.
static SIGNS: [i64; 8] = {
    let (mut signs, mut k) = ([0; 8], 0);
    while k < 8 {
        let first = 4 * k as u8;
        signs[k] = places([first, first + 1, first + 2, first + 3]);
        k += 1;
    }
    signs
};

/// Places in eight bytes, of which `at` gives four for the word `i`.
const fn places(at: [u8; 4]) -> i64 {
    let [a, b, c, d] = at;
    i64::from_le_bytes([a, b, c, d, a + 32, b + 32, c + 32, d + 32])
}

/// The eight sign bits of a group's four codes, a byte each.
#[inline]
#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bitalg"
)]
fn signs_of(aux: __m512i) -> __m512i {
    let (low, high) = (&EIGHTS.as_chunks::<64>().0[0], &EIGHTS.as_chunks::<64>().0[1]);
    let sevens = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(places([0, 7, 14, 21])), aux);
    _mm512_permutex2var_epi8(load(low), sevens, load(high))
}

/// A lane is a row from the start: the codes of 16 rows are turned to columns before they are unpacked.
#[inline]
#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bitalg"
)]
fn lay_out(Steps(q): &mut Steps<ROWS>, words: &[__m512i; 16]) {
    let plus = _mm512_set1_epi32(i32::from_le_bytes([IQ2_MIDDLE + 8, IQ2_MIDDLE + 25, IQ2_MIDDLE + 43, 0]));
    let minus = _mm512_set1_epi32(i32::from_le_bytes([IQ2_MIDDLE - 8, IQ2_MIDDLE - 25, IQ2_MIDDLE - 43, 0]));
    for (g, q) in q.iter_mut().enumerate() {
        let (entries, signs) = (look_up(words[2 * g]), signs_of(words[2 * g + 1]));
        for (k, q) in q.iter_mut().enumerate() {
            let fields = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(FIELDS[k / 2]), entries[k % 2]);
            let negative = _mm512_bitshuffle_epi64_mask(signs, _mm512_set1_epi64(SIGNS[k]));
            let bytes = _mm512_permutexvar_epi8(fields, plus);
            store(_mm512_mask_permutexvar_epi8(bytes, negative, fields, minus), q);
        }
    }
}

/// 16 weight rows with N columns: what [`lay_out`] makes meets the activations at once. Magnitudes are unsigned,
/// so the signs go to the activations.
#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bitalg"
)]
fn few<const N: usize>(rows: &[u8], x: &Columns<'_>, out: &mut Target<'_>) {
    let (zero, magnitudes) = (_mm512_setzero_si512(), _mm512_set1_epi32(0x002b_1908));
    let mut columns = [x.act256(0); N];
    for c in 1..N {
        columns[c] = x.act256(c);
    }
    let mut acc = [[_mm512_setzero_ps(); N]; 4];
    for b in 0..rows.len() / ROWS / size_of::<BlockIq2Xxs>() {
        let blocks: [&BlockIq2Xxs; ROWS] = blocks(rows, b);
        let words = words_of(&blocks);
        let mut int = [zero; N];
        for g in 0..8 {
            let aux = words[2 * g + 1];
            let (entries, signs) = (look_up(words[2 * g]), signs_of(aux));
            let mut part = [zero; N];
            for k in 0..8 {
                let fields = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(FIELDS[k / 2]), entries[k % 2]);
                let negative = _mm512_bitshuffle_epi64_mask(signs, _mm512_set1_epi64(SIGNS[k]));
                let levels = _mm512_permutexvar_epi8(fields, magnitudes);
                for c in 0..N {
                    let x = spread::<256>(&columns[c].q.as_chunks().0[b], 8 * g + k);
                    let x = _mm512_mask_sub_epi8(x, negative, zero, x);
                    part[c] = _mm512_dpbusd_epi32(part[c], levels, x);
                }
            }
            let scales = scales_of(aux);
            for c in 0..N {
                int[c] = _mm512_add_epi32(int[c], _mm512_mullo_epi32(part[c], scales));
            }
        }
        let mut d = [[0; 2]; ROWS];
        for r in 0..ROWS {
            d[r] = blocks[r].d;
        }
        let d = _mm512_mul_ps(floats(&halves(&d)), _mm512_set1_ps(0.125));
        for c in 0..N {
            let scale = _mm512_mul_ps(d, _mm512_set1_ps(columns[c].d[b]));
            acc[b % 4][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(int[c]), scale, acc[b % 4][c]);
        }
    }
    put(&[acc], 0, out);
}

/// 32 weight rows with any columns.
#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bitalg"
)]
pub(super) fn rows(rows: &[u8], x: &Columns<'_>, out: &mut Target<'_>) {
    let (low, high) = rows.split_at(rows.len() / 2);
    match x.index.len() {
        1 => (few::<1>(low, x, out), few::<1>(high, x, &mut out.behind(ROWS))),
        2 => (few::<2>(low, x, out), few::<2>(high, x, &mut out.behind(ROWS))),
        3 => (few::<3>(low, x, out), few::<3>(high, x, &mut out.behind(ROWS))),
        _ => {
            let lay_out = |packed: &mut Packed<ROWS>, b, rows: &[u8]| {
                let blocks: [&BlockIq2Xxs; ROWS] = blocks(rows, b);
                let words = words_of(&blocks);
                lay_out_groups::<false>(packed, b, &blocks, &words);
                lay_out(&mut packed.q[b], &words);
            };
            (multiply::<BlockIq2Xxs>(lay_out, rows, x, out), ())
        }
    };
}
