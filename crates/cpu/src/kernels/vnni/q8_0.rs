//! Q8_0, 34 bytes a block of 32. One row: seven instructions a block and activation row, bound by memory. Many rows: laid out plus 128,
//! scaled once a block in floats.

use super::*;
use crate::kernels::{Columns, ROWS, tiles};
use ds4_quant::BlockQ8_0;
use ds4_quant::act::Act32;
use std::cell::RefCell;

/// Values of a block.
const BLOCK: usize = 32;

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn load_block(q: &[i8], at: usize) -> __m256i {
    let q = &q[at..at + BLOCK];
    // SAFETY: `q` has 32 bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(q.as_ptr().cast()) }
}

/// Sums of products of a block with `x`, in eight lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn products(block: &BlockQ8_0, x: &[i8], b: usize) -> __m256i {
    let w = load_block(&block.q, 0);
    _mm256_dpbusd_epi32(
        _mm256_setzero_si256(),
        _mm256_abs_epi8(w),
        _mm256_sign_epi8(load_block(x, BLOCK * b), w),
    )
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn row_tile<const N: usize>(row: &[BlockQ8_0], x: [Act32<'_>; N]) -> [f32; N] {
    let mut acc = [_mm_setzero_ps(); N];
    let (fours, rest) = row.as_chunks::<4>();
    for (i, four) in fours.iter().enumerate() {
        let b = 4 * i;
        prefetch(four);
        let d = halves(four.each_ref().map(|block| block.d));
        for j in 0..N {
            let p = [0, 1, 2, 3].map(|k| products(&four[k], x[j].q, b + k));
            let p = _mm256_hadd_epi32(_mm256_hadd_epi32(p[0], p[1]), _mm256_hadd_epi32(p[2], p[3]));
            let p = _mm_add_epi32(_mm256_castsi256_si128(p), _mm256_extracti128_si256::<1>(p));
            let x_scales = &x[j].d[b..b + 4];
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
            let p = products(block, x[j].q, b);
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

/// 16 rows of blocks, side by side.
#[derive(Default)]
struct Packed {
    /// `[blocks, 8, 16 rows, 4]`: weights plus 128.
    q: Vec<[[u8; 4 * ROWS]; BLOCK / 4]>,
    /// `[blocks, 16 rows]`.
    d: Vec<[f32; ROWS]>,
}

impl Packed {
    fn load(&mut self, rows: &[u8]) {
        let row = rows.len() / ROWS;
        let blocks = row / size_of::<BlockQ8_0>();
        self.q.resize(blocks, [[0; 4 * ROWS]; BLOCK / 4]);
        self.d.resize(blocks, [0.0; ROWS]);
        for (r, row) in rows.chunks_exact(row).enumerate() {
            let row: &[BlockQ8_0] = bytemuck::cast_slice(row);
            for ((block, q), d) in row.iter().zip(&mut self.q).zip(&mut self.d) {
                d[r] = f16_to_f32(block.d);
                let fours: &[[u8; 4]] = bytemuck::cast_slice(&block.q);
                for (four, q) in fours.iter().zip(q) {
                    let flipped = u32::from_ne_bytes(*four) ^ 0x8080_8080;
                    q[4 * r..4 * r + 4].copy_from_slice(&flipped.to_ne_bytes());
                }
            }
        }
    }
}

thread_local! {
    static PACKED: RefCell<Packed> = RefCell::default();
}

/// `out [16, columns]`: products of 16 weight rows, one behind the other, with the columns.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn rows(rows: &[u8], x: &Columns<'_>, out: &mut [f32]) {
    PACKED.with_borrow_mut(|packed| {
        packed.load(rows);
        let n = x.index.len();
        let mut j = 0;
        while j + 8 <= n {
            packed_tile::<8>(packed, x, j, out);
            j += 8;
        }
        while j < n {
            packed_tile::<1>(packed, x, j, out);
            j += 1;
        }
    });
}

/// Columns `j..j + N` of the product.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn packed_tile<const N: usize>(packed: &Packed, x: &Columns<'_>, j: usize, out: &mut [f32]) {
    let n = x.index.len();
    let columns: [Act32<'_>; N] = std::array::from_fn(|c| x.act32(j + c));
    let sums: [&[i16]; N] = std::array::from_fn(|c| x.sums32(j + c));
    let mut parts = [[_mm512_setzero_ps(); N]; 4];
    for (first, acc) in parts.iter_mut().enumerate() {
        for b in (first..packed.q.len()).step_by(4) {
            let (q, d) = (&packed.q[b], &packed.d[b]);
            let mut int = [_mm512_setzero_si512(); N];
            for c in 0..N {
                int[c] = _mm512_set1_epi32(-128 * i32::from(sums[c][b]));
            }
            let blocks: [&[i8; BLOCK]; N] = std::array::from_fn(|c| &columns[c].q.as_chunks::<BLOCK>().0[b]);
            for (k, w) in q.iter().enumerate() {
                // SAFETY: `w` has 64 bytes; the load needs no alignment.
                let w = unsafe { _mm512_loadu_si512(w.as_ptr().cast()) };
                for c in 0..N {
                    let four: &[[i8; 4]; BLOCK / 4] = bytemuck::cast_ref(blocks[c]);
                    let four = i32::from_ne_bytes(four[k].map(|v| v as u8));
                    int[c] = _mm512_dpbusd_epi32(int[c], w, _mm512_set1_epi32(four));
                }
            }
            // SAFETY: `d` has 16 values; the load needs no alignment.
            let d = unsafe { _mm512_loadu_ps(d.as_ptr()) };
            for c in 0..N {
                let scale = _mm512_mul_ps(d, _mm512_set1_ps(columns[c].d[b]));
                acc[c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(int[c]), scale, acc[c]);
            }
        }
    }
    let acc: [__m512; N] = std::array::from_fn(|c| {
        let [a, b, c, d] = [0, 1, 2, 3].map(|k: usize| parts[k][c]);
        _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d))
    });
    for (c, acc) in acc.into_iter().enumerate() {
        let mut lanes = [0f32; ROWS];
        // SAFETY: `lanes` has 16 values; the store needs no alignment.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), acc) };
        for (r, v) in lanes.into_iter().enumerate() {
            out[r * n + j + c] = v;
        }
    }
}
