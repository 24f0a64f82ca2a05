//! IQ2_XXS by VBMI, 16 rows at a time, a lane a row from the start: the codes of 16 rows are turned to columns, and unpacked by 14
//! instructions for eight weights of each, without a load from a table. A code stands for eight fields of two bits, the table of codes is
//! eight registers, and one instruction moves each field to a byte of its own. Few columns meet the weights at once, many meet what was
//! laid out.

use super::tile::{multiply, put, spread};
use super::*;
use crate::kernels::avx512::tile::{floats, halves, lay_out_groups, scales_of, shuffle, store, words_of};
use crate::kernels::tile::{EVERYWHERE, IQ2_MIDDLE, PAIRS, Packed, Steps, blocks};
use ds4_quant::{BlockIq2Xxs, IQ2XXS_GRID, iq2_signs};

/// The grid, a magnitude in two bits: 0, 1, 2 for 8, 25, 43.
static GRID: [[u16; 32]; 8] = {
    let mut grid = [[0; 32]; 8];
    let mut code = 0;
    while code < 256 {
        let mut k = 0;
        while k < 8 {
            let level = IQ2XXS_GRID[code][k] as u16 / 20;
            grid[code / 32][code % 32] |= level << (2 * k);
            k += 1;
        }
        code += 1;
    }
    grid
};

/// The grid's entries, of 16 bits, of codes of 16 bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
fn look_up(codes: __m512i) -> __m512i {
    let bit6 = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(64));
    let bit7 = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(128));
    let pair = |i: usize| _mm512_permutex2var_epi16(grid(2 * i), codes, grid(2 * i + 1));
    let low = _mm512_mask_blend_epi16(bit6, pair(0), pair(1));
    let high = _mm512_mask_blend_epi16(bit6, pair(2), pair(3));
    _mm512_mask_blend_epi16(bit7, low, high)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn grid(i: usize) -> __m512i {
    load(bytemuck::cast_ref(&GRID[i]))
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

/// Places of the four fields of a half entry of every word.
static FIELDS: [i64; 4] =
    [places([0, 2, 4, 6]), places([8, 10, 12, 14]), places([16, 18, 20, 22]), places([24, 26, 28, 30])];

/// Places in eight bytes, of which `at` gives four for the word `i`.
const fn places(at: [u8; 4]) -> i64 {
    let [a, b, c, d] = at;
    i64::from_le_bytes([a, b, c, d, a + 32, b + 32, c + 32, d + 32])
}

/// The eight sign bits of a group's four codes, a byte each.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
fn signs_of(aux: __m512i) -> __m512i {
    let (low, high) = (&EIGHTS.as_chunks::<64>().0[0], &EIGHTS.as_chunks::<64>().0[1]);
    let sevens = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(places([0, 7, 14, 21])), aux);
    _mm512_permutex2var_epi8(load(low), sevens, load(high))
}

/// A lane is a row from the start: the codes of 16 rows are turned to columns before they are unpacked.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
fn lay_out(Steps(q): &mut Steps<ROWS>, words: &[__m512i; 16]) {
    let plus = _mm512_set1_epi32(i32::from_le_bytes([IQ2_MIDDLE + 8, IQ2_MIDDLE + 25, IQ2_MIDDLE + 43, 0]));
    let minus = _mm512_set1_epi32(i32::from_le_bytes([IQ2_MIDDLE - 8, IQ2_MIDDLE - 25, IQ2_MIDDLE - 43, 0]));
    for (g, q) in q.iter_mut().enumerate() {
        let (codes, aux) = (words[2 * g], words[2 * g + 1]);
        let signs = signs_of(aux);
        for (two, q) in q.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            // Two codes of each row, in a half of a word each.
            let entries = look_up(shuffle(codes, &PAIRS[two]));
            for (k, q) in q.iter_mut().enumerate() {
                let (code, half) = (k / 2, k % 2);
                let at = _mm512_set1_epi64(FIELDS[k]);
                let fields = _mm512_multishift_epi64_epi8(at, entries);
                let sign = shuffle(signs, &EVERYWHERE[2 * two + code]);
                let bits = _mm512_set1_epi32(0x0804_0201 << (4 * half));
                let negative = _mm512_test_epi8_mask(sign, bits);
                let bytes = _mm512_permutexvar_epi8(fields, plus);
                store(_mm512_mask_permutexvar_epi8(bytes, negative, fields, minus), q);
            }
        }
    }
}

/// 16 weight rows with N columns: what [`lay_out`] makes meets the activations at once. Magnitudes are unsigned,
/// so the signs go to the activations.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
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
            let (codes, aux) = (words[2 * g], words[2 * g + 1]);
            let signs = signs_of(aux);
            let mut part = [zero; N];
            for two in 0..2 {
                let entries = look_up(shuffle(codes, &PAIRS[two]));
                for k in 0..4 {
                    let fields = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(FIELDS[k]), entries);
                    let sign = shuffle(signs, &EVERYWHERE[2 * two + k / 2]);
                    let negative =
                        _mm512_test_epi8_mask(sign, _mm512_set1_epi32(0x0804_0201 << (4 * (k % 2))));
                    let levels = _mm512_permutexvar_epi8(fields, magnitudes);
                    for c in 0..N {
                        let x = spread::<256>(&columns[c].q.as_chunks().0[b], 8 * g + 4 * two + k);
                        let x = _mm512_mask_sub_epi8(x, negative, zero, x);
                        part[c] = _mm512_dpbusd_epi32(part[c], levels, x);
                    }
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
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
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
