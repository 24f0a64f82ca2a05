//! IQ2_XXS, one row, 66 bytes a block. The 32 codes of a block are looked up at once, as words, in a table of eight registers, and their signs
//! in one of four; a byte has the four magnitudes of half a code, two bits each. So a vector of the block has the `i`th of every four weights,
//! and activations lie likewise.
//!
//! Measured: one thread of a Zen 4 takes 6.5 GiB/s of the 31 that it reads from memory.

use super::tile::{four_times, load_bytes as load, store};
use crate::kernels::avx2::zero;
use crate::kernels::prefetch::prefetch;
use crate::kernels::row::{add_blocks, floats, four_halves, padded, sums_of_four, total};
use crate::kernels::tile::{IQ2_MAGNITUDES, iq2_fields};
use crate::kernels::{Columns, each_row, tile_of};
use bytemuck::Zeroable;
use ds4_quant::{BlockIq2Xxs, iq2_signs};
use std::arch::x86_64::*;
use std::cell::RefCell;

/// The fields of every code.
static GRID: [[u16; 32]; 8] = {
    let (mut grid, mut code) = ([[0; 32]; 8], 0);
    while code < 256 {
        grid[code / 32][code % 32] = iq2_fields(code);
        code += 1;
    }
    grid
};

/// Of seven bits of signs the four signs of each half of a code, a byte each.
static SIGNS: [[u16; 32]; 4] = {
    let (mut signs, mut s7) = ([[0; 32]; 4], 0);
    while s7 < 128 {
        let eight = iq2_signs(s7 as u32) as u16;
        signs[s7 / 32][s7 % 32] = eight & 15 | eight >> 4 << 8;
        s7 += 1;
    }
    signs
};

/// The magnitude that four bits name from bit `at`.
const fn magnitudes(at: u32) -> [u8; 16] {
    let (mut table, mut i) = ([0; 16], 0);
    while i < 16 {
        table[i] = IQ2_MAGNITUDES[i >> at & 3];
        i += 1;
    }
    table
}

static MAGNITUDES: [[u8; 16]; 2] = [magnitudes(0), magnitudes(2)];

/// Places in 16 bytes, which are two groups: as words the four codes, the two bytes in which a code's seven bits of signs begin, and, four times,
/// the byte that ends with the scale.
static CODES: [u8; 16] = [0, 128, 1, 128, 2, 128, 3, 128, 8, 128, 9, 128, 10, 128, 11, 128];
static SEVENS: [u8; 16] = [4, 5, 4, 5, 5, 6, 6, 7, 12, 13, 12, 13, 13, 14, 14, 15];
static SCALES: [u8; 16] = [7, 128, 7, 128, 7, 128, 7, 128, 15, 128, 15, 128, 15, 128, 15, 128];
/// The `i`th bytes of four words.
static FOURTHS: [u8; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];

/// Activations of a block in lines of the cache: the `i`th of every four values, of four times 16.
#[derive(Clone, Copy, Zeroable)]
#[repr(align(64))]
struct Planes([[[u8; 16]; 4]; 4]);

thread_local! {
    static PLANES: RefCell<Vec<Planes>> = const { RefCell::new(Vec::new()) };
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn lay_out(q: &[i8; 256], Planes(planes): &mut Planes) {
    let lanes = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    for (i, values) in q.as_chunks::<64>().0.iter().enumerate() {
        let fourths = _mm512_shuffle_epi8(load(bytemuck::cast_ref(values)), four_times(&FOURTHS));
        let mut columns = [[0; 16]; 4];
        store(_mm512_permutexvar_epi32(lanes, fourths), &mut columns);
        for (plane, column) in planes.iter_mut().zip(columns) {
            plane[i] = column;
        }
    }
}

/// All tables in registers.
struct Tables {
    grid: [__m512i; 8],
    magnitudes: [__m512i; 2],
    signs: [__m512i; 4],
    codes: __m512i,
    sevens: __m512i,
    scales: __m512i,
}

impl Tables {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
    fn new() -> Self {
        // The compiler is not to know that these are constants: it would load them again wherever they are used.
        let (grid_table, sign_table, magnitudes) = std::hint::black_box((&GRID, &SIGNS, &MAGNITUDES));
        let (mut grid, mut signs) = ([_mm512_setzero_si512(); 8], [_mm512_setzero_si512(); 4]);
        for k in 0..8 {
            grid[k] = load(bytemuck::cast_ref(&grid_table[k]));
        }
        for k in 0..4 {
            signs[k] = load(bytemuck::cast_ref(&sign_table[k]));
        }
        let [codes, sevens, scales] = std::hint::black_box([&CODES, &SEVENS, &SCALES]);
        Tables {
            grid,
            magnitudes: [four_times(&magnitudes[0]), four_times(&magnitudes[1])],
            signs,
            codes: four_times(codes),
            sevens: four_times(sevens),
            scales: four_times(scales),
        }
    }
}

/// The magnitudes of a block's codes: 64 bytes of four.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn look_up(grid: &[__m512i; 8], codes: __m512i) -> __m512i {
    let (bit_6, bit_7) = (
        _mm512_test_epi16_mask(codes, _mm512_set1_epi16(64)),
        _mm512_test_epi16_mask(codes, _mm512_set1_epi16(128)),
    );
    let low = _mm512_mask_blend_epi16(
        bit_6,
        _mm512_permutex2var_epi16(grid[0], codes, grid[1]),
        _mm512_permutex2var_epi16(grid[2], codes, grid[3]),
    );
    let high = _mm512_mask_blend_epi16(
        bit_6,
        _mm512_permutex2var_epi16(grid[4], codes, grid[5]),
        _mm512_permutex2var_epi16(grid[6], codes, grid[7]),
    );
    _mm512_mask_blend_epi16(bit_7, low, high)
}

/// The signs of a block: four bits a byte.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn signs_of(tables: &Tables, groups: __m512i) -> __m512i {
    // Where in its two bytes a code's seven bits begin.
    let places = _mm512_set1_epi64(0x0005_0006_0007_0000);
    let sevens = _mm512_srlv_epi16(_mm512_shuffle_epi8(groups, tables.sevens), places);
    let low = _mm512_permutex2var_epi16(tables.signs[0], sevens, tables.signs[1]);
    let high = _mm512_permutex2var_epi16(tables.signs[2], sevens, tables.signs[3]);
    _mm512_mask_blend_epi16(_mm512_test_epi16_mask(sevens, _mm512_set1_epi16(64)), low, high)
}

/// Products of a block with N columns, in eight lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn products<const N: usize>(tables: &Tables, block: &BlockIq2Xxs, x: [&Planes; N]) -> [__m256i; N] {
    let groups = load(bytemuck::cast_ref(&block.groups));
    let entries = look_up(&tables.grid, _mm512_shuffle_epi8(groups, tables.codes));
    let signs = signs_of(tables, groups);
    // The bit below a scale becomes the one of `2 s + 1`.
    let scales = _mm512_srli_epi16::<3>(_mm512_shuffle_epi8(groups, tables.scales));
    let scales = _mm512_or_si512(scales, _mm512_set1_epi16(1));
    let nibble = _mm512_set1_epi8(15);
    let index =
        [_mm512_and_si512(entries, nibble), _mm512_and_si512(_mm512_srli_epi16::<4>(entries), nibble)];
    let zero = _mm512_setzero_si512();
    let mut sums = [[zero; 2]; N];
    for p in 0..4 {
        let levels = _mm512_shuffle_epi8(tables.magnitudes[p % 2], index[p / 2]);
        let negative = _mm512_test_epi8_mask(signs, _mm512_set1_epi8(1 << p));
        for j in 0..N {
            let x = load(bytemuck::cast_ref(&x[j].0[p]));
            let x = _mm512_mask_sub_epi8(x, negative, zero, x);
            // Two of them are at most 2 x 2 x 43 x 127.
            sums[j][p / 2] = _mm512_add_epi16(sums[j][p / 2], _mm512_maddubs_epi16(levels, x));
        }
    }
    let mut out = [_mm256_setzero_si256(); N];
    for j in 0..N {
        let [first, second] = sums[j];
        let int = _mm512_add_epi32(_mm512_madd_epi16(first, scales), _mm512_madd_epi16(second, scales));
        out[j] = _mm256_add_epi32(_mm512_castsi512_si256(int), _mm512_extracti64x4_epi64::<1>(int));
    }
    out
}

/// Some columns' activations: laid out, and their scales.
#[derive(Clone, Copy)]
struct Column<'a> {
    planes: &'a [Planes],
    d: &'a [f32],
}

/// Adds K blocks from block `b` of a row, four at most.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn add_few<const K: usize, const N: usize>(
    tables: &Tables,
    acc: &mut [__m128; N],
    blocks: &[BlockIq2Xxs; K],
    (x, b): (&[Column<'_>; N], usize),
) {
    let (mut ints, mut d) = ([[zero(); 4]; N], [[0; 2]; 4]);
    for k in 0..K {
        let mut planes = [&x[0].planes[b + k]; N];
        for j in 1..N {
            planes[j] = &x[j].planes[b + k];
        }
        let products = products(tables, &blocks[k], planes);
        for j in 0..N {
            ints[j][k] = products[j];
        }
        d[k] = blocks[k].d;
    }
    let d = _mm_mul_ps(four_halves(d), _mm_set1_ps(0.125));
    for j in 0..N {
        let scales = padded(&x[j].d[b..b + K]);
        acc[j] = add_blocks(acc[j], sums_of_four(ints[j]), d, floats(&scales));
    }
}

/// Rows with N columns.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn row_tile<const N: usize>(rows: &[u8], x: [Column<'_>; N], out: &mut [f32], columns: usize) {
    let tables = Tables::new();
    for (row, out) in each_row::<BlockIq2Xxs>(rows, out, columns) {
        let mut acc = [_mm_setzero_ps(); N];
        let (fours, rest) = row.as_chunks::<4>();
        for (i, four) in fours.iter().enumerate() {
            prefetch(four);
            add_few(&tables, &mut acc, four, (&x, 4 * i));
        }
        // Not copied: what is stored in parts is not there yet when a whole block is loaded.
        let b = 4 * fours.len();
        if let Some(three) = rest.first_chunk::<3>() {
            add_few(&tables, &mut acc, three, (&x, b));
        } else if let Some(two) = rest.first_chunk::<2>() {
            add_few(&tables, &mut acc, two, (&x, b));
        } else if let Some(one) = rest.first_chunk::<1>() {
            add_few(&tables, &mut acc, one, (&x, b));
        }
        for j in 0..N {
            out[j] = total(acc[j]);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn dots(rows: &[u8], x: &Columns<'_>, out: &mut [f32]) {
    let columns = x.index.len();
    PLANES.with_borrow_mut(|planes| {
        for first in (0..columns).step_by(4) {
            let (n, each) = ((columns - first).min(4), x.len / 256);
            if planes.len() < n * each {
                planes.resize(n * each, Planes::zeroed());
            }
            for (j, planes) in planes.chunks_exact_mut(each).enumerate().take(n) {
                let q: &[[i8; 256]] = x.act256(first + j).q.as_chunks().0;
                q.iter().zip(planes).for_each(|(q, planes)| lay_out(q, planes));
            }
            let of =
                |j: usize| Column { planes: &planes[each * j..each * (j + 1)], d: x.act256(first + j).d };
            tile_of!(n, of, row_tile(rows, &mut out[first..], columns));
        }
    });
}
