//! 32 weight rows of blocks of 256, laid out side by side in two sixteens, with many activation rows.
//!
//! A step multiplies a vector that holds four bytes of each of 16 rows with four bytes of an activation row; these meet both sixteens, and
//! the vectors several activation rows, so that there are fewer loads than products. Groups of 32 are scaled in integers, minima meet the
//! activations' sums in integers: what the one-row kernels add up, in another order, so the sum over a block is the same.

use super::*;
use std::cell::RefCell;

/// A block's 64 steps, each a line of the cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Steps(pub(super) [[u8; 4 * ROWS]; 64]);

/// 16 rows of blocks, side by side.
#[derive(Default)]
pub(super) struct Packed {
    /// `[blocks, 64, 16 rows, 4]`: quants, unsigned.
    pub(super) q: Vec<Steps>,
    /// `[blocks, 16, 16 rows]`: 8 scales of groups of 32, 8 pairs of minima of 16.
    pub(super) groups: Vec<[[i32; ROWS]; 16]>,
    /// `[blocks, 16 rows]`.
    pub(super) d: Vec<[f32; ROWS]>,
    pub(super) dmin: Vec<[f32; ROWS]>,
}

thread_local! {
    static PACKED: RefCell<[Packed; 2]> = RefCell::default();
}

/// Lays out two sixteens of rows in the running thread's buffers by `lay_out`, which takes one sixteen of blocks `B` at a time, and
/// multiplies them with all columns. See [`columns`] for the rest.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn multiply<B, const SCALED: bool, const SIGNED: bool>(
    lay_out: impl Fn(&mut Packed, usize, &[u8]),
    unit: f32,
    rows: &[u8],
    x: &Columns<'_>,
    out: &mut Target<'_>,
) {
    PACKED.with_borrow_mut(|packed| {
        for (packed, rows) in packed.iter_mut().zip(rows.chunks_exact(rows.len() / 2)) {
            for b in 0..packed.room::<B>(rows) {
                lay_out(packed, b, rows);
            }
        }
        all_columns::<SCALED, SIGNED>(packed, unit, x, out);
    });
}

/// Block `b` of each of 16 rows. The blocks of the next 16 rows at the same place are asked for: to the hardware these are 16 streams, too
/// many to see.
#[inline]
pub(super) fn blocks<B: bytemuck::Pod>(rows: &[u8], b: usize) -> [&B; ROWS] {
    let row = rows.len() / ROWS;
    let bytes = |r: usize| &rows[r * row + b * size_of::<B>()..][..size_of::<B>()];
    for r in 0..ROWS {
        let next = bytes(r).as_ptr().wrapping_add(rows.len());
        ask_second_cache(next);
        ask_second_cache(next.wrapping_add(size_of::<B>() - 1));
    }
    std::array::from_fn(|r| bytemuck::from_bytes(bytes(r)))
}

impl Packed {
    /// Makes room for 16 rows; their number of blocks.
    pub(super) fn room<B>(&mut self, rows: &[u8]) -> usize {
        let blocks = rows.len() / ROWS / size_of::<B>();
        self.q.resize(blocks, Steps([[0; 4 * ROWS]; 64]));
        self.groups.resize(blocks, [[0; ROWS]; 16]);
        self.d.resize(blocks, [0.0; ROWS]);
        self.dmin.resize(blocks, [0.0; ROWS]);
        blocks
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store<T: bytemuck::Pod>(v: __m512i, to: &mut T) {
    const { assert!(size_of::<T>() == 64) };
    // SAFETY: `to` has 64 bytes; the store needs no alignment.
    unsafe { _mm512_storeu_si512(std::ptr::from_mut(to).cast(), v) };
}

#[inline]
#[target_feature(enable = "avx2,f16c,avx512f")]
pub(super) fn halves(d: &[[u8; 2]; ROWS]) -> [f32; ROWS] {
    let mut out = [0.0; ROWS];
    // SAFETY: `d` has 32 bytes and `out` 64; nothing here needs alignment.
    unsafe {
        let floats = _mm512_cvtph_ps(_mm256_loadu_si256(d.as_ptr().cast()));
        _mm512_storeu_ps(out.as_mut_ptr(), floats);
    }
    out
}

/// 64 bytes of each row, of which `at` gives those of one, as 16 words of all rows.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn words_of_rows<'a>(at: impl Fn(usize) -> &'a [u8; 64]) -> [__m512i; 16] {
    let mut rows = [_mm512_setzero_si512(); ROWS];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = load(at(r));
    }
    transpose(rows)
}

/// Rows of 16 words to columns.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    // Four rows at a time: `quads[4 g + m]` has words `4 lane + m` of rows `4 g..4 g + 4`.
    let mut quads = rows;
    for (q, r) in quads.as_chunks_mut::<4>().0.iter_mut().zip(rows.as_chunks::<4>().0) {
        let (a, b) = (_mm512_unpacklo_epi32(r[0], r[1]), _mm512_unpackhi_epi32(r[0], r[1]));
        let (c, d) = (_mm512_unpacklo_epi32(r[2], r[3]), _mm512_unpackhi_epi32(r[2], r[3]));
        q[0] = _mm512_unpacklo_epi64(a, c);
        q[1] = _mm512_unpackhi_epi64(a, c);
        q[2] = _mm512_unpacklo_epi64(b, d);
        q[3] = _mm512_unpackhi_epi64(b, d);
    }
    let mut out = rows;
    for m in 0..4 {
        let [a, b, c, d] = [quads[m], quads[4 + m], quads[8 + m], quads[12 + m]];
        let (low, high) = (_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0x44>(c, d));
        out[m] = _mm512_shuffle_i32x4::<0x88>(low, high);
        out[4 + m] = _mm512_shuffle_i32x4::<0xdd>(low, high);
        let (low, high) = (_mm512_shuffle_i32x4::<0xee>(a, b), _mm512_shuffle_i32x4::<0xee>(c, d));
        out[8 + m] = _mm512_shuffle_i32x4::<0x88>(low, high);
        out[12 + m] = _mm512_shuffle_i32x4::<0xdd>(low, high);
    }
    out
}

/// All columns of the product, as many at a time as registers have room for.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn all_columns<const SCALED: bool, const SIGNED: bool>(
    packed: &[Packed; 2],
    unit: f32,
    x: &Columns<'_>,
    out: &mut Target<'_>,
) {
    let n = x.index.len();
    let mut j = 0;
    while !SCALED && n - j >= 8 {
        columns::<SCALED, SIGNED, 8>(packed, unit, x, j, out);
        j += 8;
    }
    while n - j >= 6 {
        columns::<SCALED, SIGNED, 6>(packed, unit, x, j, out);
        j += 6;
    }
    while n - j >= 4 {
        columns::<SCALED, SIGNED, 4>(packed, unit, x, j, out);
        j += 4;
    }
    while n - j >= 2 {
        columns::<SCALED, SIGNED, 2>(packed, unit, x, j, out);
        j += 2;
    }
    if j < n {
        columns::<SCALED, SIGNED, 1>(packed, unit, x, j, out);
    }
}

/// Four bytes of an activation row, in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn spread<const N: usize>(x: &[i8; N], four: usize) -> __m512i {
    _mm512_set1_epi32(bytemuck::cast(x.as_chunks::<4>().0[four]))
}

/// Columns `j..j + N` of the product. `SCALED`: groups have scales. `SIGNED`: minima belong to the quants' sum, as the offset that made
/// them unsigned. A weight is `unit * d` times a quant.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn columns<const SCALED: bool, const SIGNED: bool, const N: usize>(
    packed: &[Packed; 2],
    unit: f32,
    x: &Columns<'_>,
    j: usize,
    out: &mut Target<'_>,
) {
    // Loops, not closures: what is called through a closure is not built for these registers.
    let mut rows = [x.act256(j); N];
    for c in 1..N {
        rows[c] = x.act256(j + c);
    }
    let zero = _mm512_setzero_si512();
    let mut acc = [[[_mm512_setzero_ps(); N]; 4]; 2];
    for b in 0..packed[0].q.len() {
        let mut x: [&[i8; 256]; N] = [&rows[0].q.as_chunks().0[b]; N];
        for c in 1..N {
            x[c] = &rows[c].q.as_chunks().0[b];
        }
        let (low, high) = (&packed[0].q[b].0.as_chunks::<8>().0, &packed[1].q[b].0.as_chunks::<8>().0);
        let groups = [&packed[0].groups[b], &packed[1].groups[b]];
        let mut int = [[zero; N]; 2];
        for g in 0..8 {
            let mut part = if SCALED { [[zero; N]; 2] } else { int };
            for k in 0..8 {
                let w = [load(&low[g][k]), load(&high[g][k])];
                for c in 0..N {
                    let four = spread(x[c], 8 * g + k);
                    part[0][c] = _mm512_dpbusd_epi32(part[0][c], w[0], four);
                    part[1][c] = _mm512_dpbusd_epi32(part[1][c], w[1], four);
                }
            }
            if !SCALED {
                int = part;
                continue;
            }
            for h in 0..2 {
                let scale = load(bytemuck::cast_ref(&groups[h][g]));
                for c in 0..N {
                    int[h][c] = _mm512_add_epi32(int[h][c], _mm512_mullo_epi32(part[h][c], scale));
                }
            }
        }
        for h in 0..2 {
            let mut minima = [zero; N];
            for k in 0..8 {
                let pairs = load(bytemuck::cast_ref(&groups[h][8 + k]));
                for c in 0..N {
                    let sums: [i16; 2] = rows[c].sums.as_chunks::<16>().0[b].as_chunks::<2>().0[k];
                    let sums = _mm512_set1_epi32(bytemuck::cast(sums));
                    minima[c] = _mm512_dpwssd_epi32(minima[c], pairs, sums);
                }
            }
            let d = _mm512_mul_ps(floats(&packed[h].d[b]), _mm512_set1_ps(unit));
            let dmin = floats(&packed[h].dmin[b]);
            for c in 0..N {
                let scale = _mm512_set1_ps(rows[c].d[b]);
                let acc = &mut acc[h][b % 4][c];
                let quants = if SIGNED { _mm512_sub_epi32(int[h][c], minima[c]) } else { int[h][c] };
                *acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(quants), _mm512_mul_ps(d, scale), *acc);
                if !SIGNED {
                    *acc = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(minima[c]), _mm512_mul_ps(dmin, scale), *acc);
                }
            }
        }
    }
    put(&acc[0], j, out);
    put(&acc[1], j, &mut out.behind());
}

/// Puts the sums of four sums in columns `j..j + N`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn put<const N: usize>(acc: &[[__m512; N]; 4], j: usize, out: &mut Target<'_>) {
    for c in 0..N {
        let sum = _mm512_add_ps(_mm512_add_ps(acc[0][c], acc[1][c]), _mm512_add_ps(acc[2][c], acc[3][c]));
        // SAFETY: a column has 16 values; the store needs no alignment.
        unsafe { _mm512_storeu_ps(out.column(j + c).as_mut_ptr(), sum) };
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn floats(v: &[f32; ROWS]) -> __m512 {
    // SAFETY: there are 16 values; the load needs no alignment.
    unsafe { _mm512_loadu_ps(v.as_ptr()) }
}
