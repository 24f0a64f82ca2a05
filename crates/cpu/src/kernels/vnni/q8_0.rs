//! Q8_0, 34 bytes a block of 32. One row: seven instructions a block and activation row, bound by memory. Many rows: laid out plus 128,
//! scaled once a block in floats.

use super::*;
use crate::kernels::tiles;
use ds4_quant::act::Act32;
use ds4_quant::{BlockQ8_0, f16_to_f32};
use std::cell::RefCell;

/// Values of a block.
const BLOCK: usize = 32;

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn load_block(q: &[i8; BLOCK]) -> __m256i {
    // SAFETY: `q` has 32 bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(q.as_ptr().cast()) }
}

/// Sums of products of a block with `x`, in eight lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn products(block: &BlockQ8_0, x: &[i8; BLOCK]) -> __m256i {
    let (w, x) = (load_block(&block.q), load_block(x));
    _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn row_tile<const N: usize>(row: &[BlockQ8_0], x: [Act32<'_>; N]) -> [f32; N] {
    let mut acc = [_mm_setzero_ps(); N];
    let (fours, rest) = row.as_chunks::<4>();
    for (i, four) in fours.iter().enumerate() {
        prefetch(four);
        let d = halves([four[0].d, four[1].d, four[2].d, four[3].d]);
        for j in 0..N {
            let x_blocks: &[[i8; BLOCK]; 4] = &x[j].q.as_chunks().0.as_chunks().0[i];
            let low = _mm256_hadd_epi32(products(&four[0], &x_blocks[0]), products(&four[1], &x_blocks[1]));
            let high = _mm256_hadd_epi32(products(&four[2], &x_blocks[2]), products(&four[3], &x_blocks[3]));
            let p = _mm256_hadd_epi32(low, high);
            let p = _mm_add_epi32(_mm256_castsi256_si128(p), _mm256_extracti128_si256::<1>(p));
            let x_scales = &x[j].d.as_chunks::<4>().0[i];
            // SAFETY: `x_scales` has four values; the load needs no alignment.
            let scale = _mm_mul_ps(d, unsafe { _mm_loadu_ps(x_scales.as_ptr()) });
            acc[j] = _mm_fmadd_ps(_mm_cvtepi32_ps(p), scale, acc[j]);
        }
    }
    let mut out = [0.0; N];
    for j in 0..N {
        let mut sums = [0f32; 4];
        // SAFETY: `sums` has four values; the store needs no alignment.
        unsafe { _mm_storeu_ps(sums.as_mut_ptr(), acc[j]) };
        for (k, block) in rest.iter().enumerate() {
            let b = 4 * fours.len() + k;
            let p = products(block, &x[j].q.as_chunks().0[b]);
            let p = _mm_add_epi32(_mm256_castsi256_si128(p), _mm256_extracti128_si256::<1>(p));
            let p = _mm_hadd_epi32(_mm_hadd_epi32(p, p), p);
            let sum = _mm_cvtsi128_si32(p) as f32;
            sums[k] = sum.mul_add(f16_to_f32(block.d) * x[j].d[b], sums[k]);
        }
        out[j] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    out
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn dots(row: &[u8], x: &Columns<'_>, out: &mut [f32]) {
    let row: &[BlockQ8_0] = bytemuck::cast_slice(row);
    tiles!(x, out, act32, row_tile, row);
}

/// A block's 8 steps, each a line of the cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Steps([[u8; 4 * ROWS]; BLOCK / 4]);

/// 16 rows of blocks, side by side.
#[derive(Default)]
struct Packed {
    /// `[blocks, 8, 16 rows, 4]`: weights plus 128.
    q: Vec<Steps>,
    /// `[blocks, 16 rows]`.
    d: Vec<[f32; ROWS]>,
}

impl Packed {
    /// Lays out two blocks of each row at a time.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    fn load(&mut self, rows: &[u8]) {
        let row = rows.len() / ROWS;
        let blocks = row / size_of::<BlockQ8_0>();
        self.q.resize(blocks, Steps([[0; 4 * ROWS]; BLOCK / 4]));
        self.d.resize(blocks, [0.0; ROWS]);
        let middle = _mm512_set1_epi8(-128);
        for (pair, (q, d)) in self.q.chunks_mut(2).zip(self.d.chunks_mut(2)).enumerate() {
            let mut bytes = [_mm512_setzero_si512(); ROWS];
            let mut halves = [[[0; 2]; ROWS]; 2];
            for (r, bytes) in bytes.iter_mut().enumerate() {
                let blocks: &[BlockQ8_0] = bytemuck::cast_slice(&rows[r * row..(r + 1) * row]);
                let (low, high) = (&blocks[2 * pair], &blocks[2 * pair + q.len() - 1]);
                ask_second_cache(low.d.as_ptr().wrapping_add(rows.len()));
                let (a, b) = (load_block(&low.q), load_block(&high.q));
                *bytes = _mm512_xor_si512(_mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b), middle);
                (halves[0][r], halves[1][r]) = (low.d, high.d);
            }
            let columns = tile::transpose(bytes);
            for (q, columns) in q.iter_mut().zip(columns.as_chunks::<8>().0) {
                q.0.iter_mut().zip(columns).for_each(|(out, v)| tile::store(*v, out));
            }
            for (d, halves) in d.iter_mut().zip(&halves) {
                *d = tile::halves(halves);
            }
        }
    }
}

thread_local! {
    static PACKED: RefCell<[Packed; 2]> = RefCell::default();
}

/// Products of 32 weight rows, one behind the other, with the columns.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn rows(rows: &[u8], x: &Columns<'_>, out: &mut Target<'_>) {
    PACKED.with_borrow_mut(|packed| {
        for (packed, rows) in packed.iter_mut().zip(rows.chunks_exact(rows.len() / 2)) {
            packed.load(rows);
        }
        let n = x.index.len();
        let mut j = 0;
        while j + 8 <= n {
            columns::<8>(packed, x, j, out);
            j += 8;
        }
        while j + 4 <= n {
            columns::<4>(packed, x, j, out);
            j += 4;
        }
        while j < n {
            columns::<1>(packed, x, j, out);
            j += 1;
        }
    });
}

/// Columns `j..j + N` of the product. What is spread of an activation row meets two vectors of weights: there are fewer loads than products.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn columns<const N: usize>(packed: &[Packed; 2], x: &Columns<'_>, j: usize, out: &mut Target<'_>) {
    let mut columns = [x.act32(j); N];
    let mut offsets = [x.offsets32(j); N];
    for c in 1..N {
        columns[c] = x.act32(j + c);
        offsets[c] = x.offsets32(j + c);
    }
    let mut acc = [[[_mm512_setzero_ps(); N]; 4]; 2];
    for (b, (Steps(low), Steps(high))) in packed[0].q.iter().zip(&packed[1].q).enumerate() {
        let mut int = [[_mm512_setzero_si512(); N]; 2];
        let mut blocks: [&[i8; BLOCK]; N] = [&columns[0].q.as_chunks().0[b]; N];
        for c in 0..N {
            let offset = _mm512_set1_epi32(offsets[c][b]);
            (int[0][c], int[1][c]) = (offset, offset);
            blocks[c] = &columns[c].q.as_chunks().0[b];
        }
        for k in 0..BLOCK / 4 {
            let (low, high) = (load(&low[k]), load(&high[k]));
            for c in 0..N {
                let four = tile::spread(blocks[c], k);
                int[0][c] = _mm512_dpbusd_epi32(int[0][c], low, four);
                int[1][c] = _mm512_dpbusd_epi32(int[1][c], high, four);
            }
        }
        let d = [tile::floats(&packed[0].d[b]), tile::floats(&packed[1].d[b])];
        for c in 0..N {
            let x_scale = _mm512_set1_ps(columns[c].d[b]);
            for r in 0..2 {
                let acc = &mut acc[r][b % 4][c];
                *acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(int[r][c]), _mm512_mul_ps(d[r], x_scale), *acc);
            }
        }
    }
    tile::put(&acc[0], j, out);
    tile::put(&acc[1], j, &mut out.behind());
}
