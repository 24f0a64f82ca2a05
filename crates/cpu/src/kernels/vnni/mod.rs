//! AVX-512 with VNNI: four products of bytes and their sum in one instruction.
//!
//! A format has two kernels that give the same bits: [`super::row`] for few activation rows, bound by memory (IQ2_XXS has that
//! of AVX-512: its cost is look-ups), and [`super::tile`] for many.
#![allow(unsafe_code)]

mod index;
mod q2_k;
mod q4_k;
mod q8_0;
pub(super) mod tile;

use super::avx2::zero;
use super::avx512::TILE_ROWS;
use super::avx512::tile::load_bytes as load;
use super::prefetch::prefetch;
use super::row::{
    Few, Fours, add_blocks, block_dots, few_blocks, floats, four_halves, four_halves_of_integers, fours32,
    last, one_block, q8_0_dots, sums_of_four, total,
};
use super::{Columns, Kernels, Level, ManyRows, avx2, avx512, each_row, tiles};
use ds4_quant::act::Act256;
use std::arch::x86_64::*;

pub(super) const KERNELS: Kernels = Kernels {
    level: Level::Vnni,
    // SAFETY: the table is handed out by `Kernels::new` only where the CPU has the features; so below.
    q8_0: |rows, x, out| unsafe { q8_0::dots(rows, x, out) },
    // SAFETY: as above.
    q8_0_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { tile::q8_0(rows, x, out) }),
    // SAFETY: as above.
    q2_k: |rows, x, out| unsafe { q2_k::dots(rows, x, out) },
    // SAFETY: as above.
    q2_k_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { tile::q2_k(rows, x, out) }),
    // SAFETY: as above.
    q4_k: |rows, x, out| unsafe { q4_k::dots(rows, x, out) },
    // SAFETY: as above.
    q4_k_rows: ManyRows::many(TILE_ROWS, |rows, x, out| unsafe { tile::q4_k(rows, x, out) }),
    // SAFETY: as above.
    iq2_xxs_rows: ManyRows::many_from(8, TILE_ROWS, |rows, x, out| unsafe { tile::iq2_xxs(rows, x, out) }),
    // SAFETY: as above.
    index_scores: |query, keys, scores| unsafe { index::scores(query, keys, scores) },
    ..avx512::KERNELS
};
