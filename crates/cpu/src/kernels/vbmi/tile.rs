//! Many columns, 16 rows at a time, a lane a row from the start: the codes of 16 rows are turned to columns, and unpacked by ten
//! instructions for eight weights of each, without a load from a table. One instruction moves each field of two bits to a byte of its own, as
//! one picks the bits of four signs.
//!
//! Measured: one thread of a Zen 4 makes 149 G multiply-adds/s of 237.

use super::{GRID, halves, magnitudes, places, quarters, sevens};
use crate::kernels::avx512::tile::{lay_out_groups, store, words_of};
use crate::kernels::tile::{IQ2_MIDDLE, Packed, Steps, blocks};
use crate::kernels::vnni::tile::multiply;
use crate::kernels::{Columns, ROWS, Target};
use ds4_quant::{BlockIq2Xxs, iq2_signs};
use std::arch::x86_64::*;

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

/// A lane is a row from the start: the codes of 16 rows are turned to columns before they are unpacked.
#[inline]
#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bitalg"
)]
fn lay_out(Steps(q): &mut Steps<ROWS>, words: &[__m512i; 16]) {
    let plus = _mm512_set1_epi32(i32::from_le_bytes([IQ2_MIDDLE + 8, IQ2_MIDDLE + 25, IQ2_MIDDLE + 43, 0]));
    let minus = _mm512_set1_epi32(i32::from_le_bytes([IQ2_MIDDLE - 8, IQ2_MIDDLE - 25, IQ2_MIDDLE - 43, 0]));
    for (g, q) in q.iter_mut().enumerate() {
        let codes = words[2 * g];
        let upper = _mm512_movepi8_mask(codes);
        let entries =
            [magnitudes(quarters(&GRID[0]), codes, upper), magnitudes(quarters(&GRID[1]), codes, upper)];
        let [low, high] = halves(&EIGHTS);
        let signs = _mm512_permutex2var_epi8(low, sevens(words[2 * g + 1]), high);
        for (k, q) in q.iter_mut().enumerate() {
            let fields = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(FIELDS[k / 2]), entries[k % 2]);
            let negative = _mm512_bitshuffle_epi64_mask(signs, _mm512_set1_epi64(SIGNS[k]));
            let bytes = _mm512_permutexvar_epi8(fields, plus);
            store(_mm512_mask_permutexvar_epi8(bytes, negative, fields, minus), q);
        }
    }
}

/// 32 weight rows with any columns.
#[target_feature(
    enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bitalg"
)]
pub(super) fn rows(rows: &[u8], x: &Columns<'_>, out: &mut Target<'_>) {
    let lay_out = |packed: &mut Packed<ROWS>, b, rows: &[u8]| {
        let blocks: [&BlockIq2Xxs; ROWS] = blocks(rows, b);
        let words = words_of(&blocks);
        lay_out_groups::<false>(packed, b, &blocks, &words);
        lay_out(&mut packed.q[b], &words);
    };
    multiply::<BlockIq2Xxs>(lay_out, rows, x, out);
}
