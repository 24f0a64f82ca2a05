//! AVX2 with VNNI (four products of bytes and their sum in one instruction): Intel's processors without AVX-512 since Alder Lake. Tiles of
//! 16 weight rows, eight in a vector, laid out as without VNNI, where a group is one sum of 32 bits; and one row of Q8_0. One row of the
//! other formats costs its unpacking, so that it is AVX2's.
//!
//! Measured: one thread of an Emerald Rapids, much shared, makes 97 (Q8_0), 75 (IQ2_XXS), 59 (Q4_K) G multiply-adds/s with 64 columns.
#![allow(unsafe_code)]

use super::avx2::tile::*;
use super::avx2::{self, TILE_ROWS, zero};
use super::tile::{self, Form, Packed, Packed32, Planes, columns, instructions};
use super::{Columns, Kernels, Level, ManyRows, Target};
use ds4_quant::{BlockIq2Xxs, BlockQ2K, BlockQ4K};
use std::arch::x86_64::*;
use std::cell::RefCell;

pub(super) const KERNELS: Kernels = Kernels {
    level: Level::AvxVnni,
    // SAFETY: the table is handed out by `Kernels::new` only where the CPU has the features; so below.
    q8_0: |rows, x, out| unsafe { one_row::dots(rows, x, out) },
    // SAFETY: as above.
    q8_0_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { q8_0(rows, x, out) }),
    // SAFETY: as above.
    q2_k_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { q2_k(rows, x, out) }),
    // SAFETY: as above.
    q4_k_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { q4_k(rows, x, out) }),
    // SAFETY: as above.
    iq2_xxs_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { iq2_xxs(rows, x, out) }),
    ..avx2::KERNELS
};

instructions! {
    "avx2,fma,f16c,avxvnni",
    products(sum: __m256i, w: __m256i, x: __m256i) -> __m256i { _mm256_dpbusd_avx_epi32(sum, w, x) }
    add_scaled(int: __m256i, sum: __m256i, scale: __m256i) -> __m256i {
        _mm256_add_epi32(int, _mm256_mullo_epi32(sum, scale))
    }
    pairs(int: __m256i, a: __m256i, b: __m256i) -> __m256i { _mm256_dpwssd_avx_epi32(int, a, b) }
}

columns!(
    "avx2,fma,f16c,avxvnni",
    8,
    __m256i,
    __m256,
    wide: true,
    at_once: [6, 4, 2, 1],
    scaled: 4
);

mod one_row {
    use super::super::avx2::load;
    use super::super::prefetch::prefetch;
    use super::super::row::{add_blocks, floats, four_halves, fours32, q8_0_dots, sums_of_four};
    use super::super::{each_row, tiles};
    use super::*;
    use ds4_quant::act::Act32;
    use ds4_quant::{BlockQ8_0, f16_to_f32};

    /// Sums of products of a block with `x`, in eight lanes. Magnitudes are the unsigned bytes.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    fn products(w: &[i8; 32], x: &[i8; 32]) -> __m256i {
        let (w, x) = (load(bytemuck::cast_ref(w)), load(bytemuck::cast_ref(x)));
        _mm256_dpbusd_avx_epi32(zero(), _mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
    }

    q8_0_dots!("avx2,fma,f16c,avxvnni", products);
}
