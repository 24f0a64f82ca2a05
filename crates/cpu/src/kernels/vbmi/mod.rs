//! AVX-512 with VBMI (any bytes of two registers): IQ2_XXS, whose cost is look-ups. The other formats are VNNI's.
//!
//! The grid is two tables of bytes: a magnitude is two bits (0, 1, 2 for 8, 25, 43), a byte the four of half a code. For two weights of
//! each code, magnitudes and signs are an index of six bits, of which a table of 64 bytes gives the one weight and another table the other:
//! nothing is moved between the bytes of a code, and activations are planes ([`Input::Planes256`]).
#![allow(unsafe_code)]

mod row;
mod tile;

use super::avx512::TILE_ROWS;
use super::avx512::tile::load_bytes as load;
use super::tile::{IQ2_MAGNITUDES, IQ2_MIDDLE, iq2_fields};
use super::{Input, Kernels, Level, ManyRows, vnni};
use ds4_quant::iq2_signs;
use std::arch::x86_64::*;

pub(super) const KERNELS: Kernels = Kernels {
    level: Level::Vbmi,
    // SAFETY: the table is handed out by `Kernels::new` only where the CPU has the features; so below.
    iq2_xxs: |rows, x, out| unsafe { row::dots(rows, x, out) },
    iq2_xxs_input: Input::Planes256,
    // SAFETY: as above.
    iq2_xxs_rows: ManyRows::many_from(5, TILE_ROWS, |rows, x, out| unsafe { tile::rows(rows, x, out) }),
    ..vnni::KERNELS
};

/// Of every code the byte of its first four magnitudes, then the byte of the others.
static GRID: [[u8; 256]; 2] = {
    let (mut grid, mut code) = ([[0; 256]; 2], 0);
    while code < 256 {
        [grid[0][code], grid[1][code]] = iq2_fields(code).to_le_bytes();
        code += 1;
    }
    grid
};

/// The grid's bytes of 64 codes, of which `upper` are from 128 on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
fn magnitudes(grid: [__m512i; 4], codes: __m512i, upper: __mmask64) -> __m512i {
    let low = _mm512_permutex2var_epi8(grid[0], codes, grid[1]);
    let high = _mm512_permutex2var_epi8(grid[2], codes, grid[3]);
    _mm512_mask_blend_epi8(upper, low, high)
}

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

/// All tables in registers, those of half a code each in twos.
struct Tables {
    grid: [[__m512i; 4]; 2],
    signs: [[__m512i; 2]; 2],
    weights: [__m512i; 4],
}

impl Tables {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
    fn new() -> Self {
        // The compiler is not to know that these are constants: it would load them again wherever they are used.
        let (grid, signs, weights) = std::hint::black_box((&GRID, &SIGNS, &WEIGHTS));
        let grid: [&[[u8; 64]; 4]; 2] = [bytemuck::cast_ref(&grid[0]), bytemuck::cast_ref(&grid[1])];
        let signs: [&[[u8; 64]; 2]; 2] = [bytemuck::cast_ref(&signs[0]), bytemuck::cast_ref(&signs[1])];
        let mut tables = Tables {
            grid: [[_mm512_setzero_si512(); 4]; 2],
            signs: [[_mm512_setzero_si512(); 2]; 2],
            weights: [_mm512_setzero_si512(); 4],
        };
        for half in 0..2 {
            for k in 0..4 {
                tables.grid[half][k] = load(&grid[half][k]);
            }
            for k in 0..2 {
                tables.signs[half][k] = load(&signs[half][k]);
            }
        }
        for k in 0..4 {
            tables.weights[k] = load(&weights[k]);
        }
        tables
    }
}

/// 64 codes, and their signs.
struct Codes {
    codes: __m512i,
    /// The codes from 128 on.
    upper: __mmask64,
    /// Of each code seven bits of signs.
    sevens: __m512i,
}

impl Codes {
    /// Four codes of each word, whose signs the words of `aux` have.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
    fn new(codes: __m512i, aux: __m512i) -> Self {
        let places = _mm512_set1_epi64(i64::from_le_bytes([0, 7, 14, 21, 32, 39, 46, 53]));
        let sevens = _mm512_multishift_epi64_epi8(places, aux);
        Codes { codes, upper: _mm512_movepi8_mask(codes), sevens }
    }

    /// The four weights of each code's half, plus [`IQ2_MIDDLE`].
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
    fn weights(&self, tables: &Tables, half: usize) -> [__m512i; 4] {
        let magnitudes = magnitudes(tables.grid[half], self.codes, self.upper);
        let [low_signs, high_signs] = tables.signs[half];
        let signs = _mm512_permutex2var_epi8(low_signs, self.sevens, high_signs);
        let low = _mm512_set1_epi8(15);
        // Of each bit that of the one where `low` has a one, else that of the other.
        let first = _mm512_ternarylogic_epi32::<0xca>(low, magnitudes, signs);
        let second = _mm512_srli_epi16::<2>(_mm512_ternarylogic_epi32::<0xca>(low, signs, magnitudes));
        [
            _mm512_permutexvar_epi8(first, tables.weights[0]),
            _mm512_permutexvar_epi8(first, tables.weights[1]),
            _mm512_permutexvar_epi8(second, tables.weights[2]),
            _mm512_permutexvar_epi8(second, tables.weights[3]),
        ]
    }
}
