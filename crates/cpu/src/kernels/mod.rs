//! Dot products of a weight row with activations, at several levels of SIMD.
//!
//! A [`Dots`] kernel multiplies one weight row with any number of activation rows. It handles them in tiles,
//! unpacking the weights once per tile, but its arithmetic for one activation row never depends on the
//! others: results are the same bits in decode, prefill and batches. The level is picked once, when the
//! backend is made, by what the CPU can do.
// Numbers of columns and parts are constants, and loops over them index several arrays. Closures are avoided where registers are wide: a
// closure handed to a function of the standard library is not always built for them.
#![allow(clippy::needless_range_loop)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
mod float;
pub mod index;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod prefetch;
pub(crate) use prefetch::ask_for;
#[cfg(target_arch = "x86_64")]
mod row;
mod scalar;
pub mod small;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod tile;
#[cfg(target_arch = "x86_64")]
mod vbmi;
#[cfg(target_arch = "x86_64")]
mod vnni;

use ds4_gguf::TensorType;
use ds4_quant::act::{Act32, Act256};
use ds4_quant::{dequantize_row, is_supported};
use small::Small;

/// Multiplies weight rows, one behind the other, with the activation rows of `x`; `out`: `[weight rows, rows of x]`.
pub type Dots = fn(rows: &[u8], x: &Columns<'_>, out: &mut [f32]);

/// A way to take several weight rows at once that gives the bits that [`Dots`] gives.
#[derive(Clone, Copy, Debug)]
pub struct ManyRows {
    /// Weight rows at once.
    pub rows: usize,
    /// Fewest activation rows for which it is faster.
    pub least: usize,
    /// Multiplies so many weight rows, one behind the other, with the activation rows of `x`.
    pub multiply: fn(rows: &[u8], x: &Columns<'_>, out: &mut Target<'_>),
}

/// Where the products of some weight rows go.
pub struct Target<'a> {
    /// `[columns, stride]`.
    pub out: &'a mut [f32],
    /// Weight rows of all products.
    pub stride: usize,
    /// The first of them.
    pub first: usize,
}

impl Target<'_> {
    /// The products of some rows with the `j`th column.
    #[inline]
    pub fn column(&mut self, j: usize, rows: usize) -> &mut [f32] {
        &mut self.out[j * self.stride + self.first..][..rows]
    }

    /// The target of what is behind some rows.
    #[inline]
    pub fn behind(&mut self, rows: usize) -> Target<'_> {
        Target { out: self.out, stride: self.stride, first: self.first + rows }
    }
}

/// Lanes of a vector in [`ManyRows`].
pub(crate) const ROWS: usize = 16;

/// Rows of halves that meet many activation rows at once: matrices of control numbers have 24.
pub(crate) const F16_ROWS: usize = 8;

/// Stored rows decoded at once for all heads of a query: they stay in the second cache.
pub const TILE: usize = 32;

/// Some decoded rows that all heads of a query attend to.
#[derive(Clone, Copy)]
pub struct Tile<'a> {
    /// `[n, stride]`, of which the first `width` of each are the row.
    pub rows: &'a [f32],
    /// Rows, at most [`TILE`].
    pub n: usize,
    /// Width of a row and of a head.
    pub width: usize,
    /// Distance of rows.
    pub stride: usize,
}

impl<'a> Tile<'a> {
    /// The `r`th row.
    #[inline]
    pub fn row(&self, r: usize) -> &'a [f32] {
        &self.rows[r * self.stride..][..self.width]
    }
}

/// Dot products of heads `q [heads, width]` with the rows of a tile, into `scores [heads, TILE]`.
pub type Scores = fn(q: &[f32], tile: &Tile<'_>, scores: &mut [f32]);

/// Adds to `out [heads, width]` the rows of a tile, weighted by `weights [heads, TILE]`, in order.
pub type Weigh = fn(weights: &[f32], tile: &Tile<'_>, out: &mut [f32]);

/// Laying weights out pays from this many activation rows.
pub(crate) const MANY: usize = 4;

impl ManyRows {
    /// For [`MANY`] activation rows and more.
    const fn many(rows: usize, multiply: fn(&[u8], &Columns<'_>, &mut Target<'_>)) -> Option<Self> {
        Self::many_from(MANY, rows, multiply)
    }

    /// For `least` and more: where four meet a row at once for less than it takes to lay it out.
    const fn many_from(
        least: usize,
        rows: usize,
        multiply: fn(&[u8], &Columns<'_>, &mut Target<'_>),
    ) -> Option<Self> {
        Some(ManyRows { rows, least, multiply })
    }
}

/// Form of activations that a kernel reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// f32.
    Float,
    /// int8 with a scale per 32 values.
    Int32,
    /// int8 with a scale per 256 values, and sums per 16.
    Int256,
    /// The same, as planes: of each 256 the first of every eight values, then the second of each, and so on.
    Planes256,
}

/// Values in the order of [`Input::Planes256`].
pub fn planes(q: &[i8], out: &mut [i8]) {
    for (block, planes) in q.as_chunks::<256>().0.iter().zip(out.as_chunks_mut::<256>().0) {
        let eights: &[[i8; 8]; 32] = bytemuck::cast_ref(block);
        let planes: &mut [[i8; 32]; 8] = bytemuck::cast_mut(planes);
        for (i, plane) in planes.iter_mut().enumerate() {
            plane.iter_mut().zip(eights).for_each(|(to, eight)| *to = eight[i]);
        }
    }
}

/// Some rows of a panel of activations, in the form that the kernel reads.
#[derive(Clone, Copy, Default)]
pub struct Columns<'a> {
    /// `[rows, stride]`, for [`Input::Float`].
    pub floats: &'a [f32],
    /// `[rows, stride]`, for the integer forms.
    pub q: &'a [i8],
    /// Scales, `[rows, stride / 32]` or `[rows, stride / 256]`.
    pub d: &'a [f32],
    /// Sums, `[rows, stride / 16]`, for [`Input::Int256`] and [`Input::Planes256`].
    pub sums: &'a [i16],
    /// Sums times -128, `[rows, stride / 32]`, for [`Input::Int32`]: what weights plus 128 add too much.
    pub offsets: &'a [i32],
    /// Values of a row of the panel.
    pub stride: usize,
    /// First value that meets the weights.
    pub offset: usize,
    /// Values that meet the weights: the length of a weight row.
    pub len: usize,
    /// Rows of the panel to multiply with.
    pub index: &'a [u32],
}

impl<'a> Columns<'a> {
    #[inline]
    fn range(&self, j: usize, per: usize) -> std::ops::Range<usize> {
        let start = self.index[j] as usize * (self.stride / per) + self.offset / per;
        start..start + self.len / per
    }

    /// The `j`th row as floats.
    #[inline]
    pub fn float(&self, j: usize) -> &'a [f32] {
        &self.floats[self.range(j, 1)]
    }

    /// The `j`th row quantized per 32.
    #[inline]
    pub fn act32(&self, j: usize) -> Act32<'a> {
        Act32 { q: &self.q[self.range(j, 1)], d: &self.d[self.range(j, 32)] }
    }

    /// Sums of the `j`th row per 32, times -128.
    #[inline]
    pub fn offsets32(&self, j: usize) -> &'a [i32] {
        &self.offsets[self.range(j, 32)]
    }

    /// The `j`th row quantized per 256, in the order of its form.
    #[inline]
    pub fn act256(&self, j: usize) -> Act256<'a> {
        Act256 {
            q: &self.q[self.range(j, 1)],
            d: &self.d[self.range(j, 256)],
            sums: &self.sums[self.range(j, 16)],
        }
    }
}

/// Runs a tile kernel over all columns, four at a time, then one at a time. `$tile::<N>(rows, x, out, columns)` takes all rows, so that what
/// is known of N columns is found once: rows are short.
macro_rules! tiles {
    ($x:expr, $rows:expr, $out:expr, $form:ident, $tile:ident $(::<$block:ty>)?) => {{
        let columns = $x.index.len();
        let mut j = 0;
        while j + 4 <= columns {
            let x = [$x.$form(j), $x.$form(j + 1), $x.$form(j + 2), $x.$form(j + 3)];
            $tile::<4 $(, $block)?>($rows, x, &mut $out[j..], columns);
            j += 4;
        }
        while j < columns {
            $tile::<1 $(, $block)?>($rows, [$x.$form(j)], &mut $out[j..], columns);
            j += 1;
        }
    }};
}
pub(crate) use tiles;

/// `$tile::<N>(rows, x, out, columns)` with the N columns `of(0)` to `of(N - 1)`, one to four.
#[cfg(target_arch = "x86_64")]
macro_rules! tile_of {
    ($n:expr, $of:ident, $tile:ident($rows:expr, $out:expr, $columns:expr)) => {
        match $n {
            1 => $tile($rows, [$of(0)], $out, $columns),
            2 => $tile($rows, [$of(0), $of(1)], $out, $columns),
            3 => $tile($rows, [$of(0), $of(1), $of(2)], $out, $columns),
            _ => $tile($rows, [$of(0), $of(1), $of(2), $of(3)], $out, $columns),
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(crate) use tile_of;

/// Weight rows of the type `B`, one behind the other, and where their products go: `out[r * columns..]` for row `r`.
#[inline]
pub(crate) fn each_row<'a, B: bytemuck::Pod>(
    rows: &'a [u8],
    out: &'a mut [f32],
    columns: usize,
) -> impl Iterator<Item = (&'a [B], &'a mut [f32])> {
    let row_bytes = rows.len() / out.len().div_ceil(columns);
    rows.chunks_exact(row_bytes).map(bytemuck::cast_slice).zip(out.chunks_mut(columns))
}

/// Instruction set that kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Plain Rust: the reference.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// The same with AVX-VNNI (Intel without AVX-512 since Alder Lake).
    AvxVnni,
    /// x86-64 with AVX-512 F, BW, VL and DQ.
    Avx512,
    /// The same with VNNI (Cascade Lake and later).
    Vnni,
    /// The same with VBMI (Ice Lake, Zen 4 and later).
    Vbmi,
    /// 64-bit Arm.
    Neon,
    /// The same with dot products of bytes (Armv8.2 and later).
    NeonDot,
}

impl Level {
    /// Every level this CPU can run, worst first.
    pub fn available() -> Vec<Level> {
        let mut levels = vec![Level::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx_vnni = avx2 && is_x86_feature_detected!("avxvnni");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq");
            levels.extend(avx2.then_some(Level::Avx2));
            levels.extend(avx_vnni.then_some(Level::AvxVnni));
            levels.extend(avx512.then_some(Level::Avx512));
            let vnni = avx512 && is_x86_feature_detected!("avx512vnni");
            levels.extend(vnni.then_some(Level::Vnni));
            levels.extend((vnni && is_x86_feature_detected!("avx512vbmi")).then_some(Level::Vbmi));
        }
        #[cfg(target_arch = "aarch64")]
        {
            levels.push(Level::Neon);
            levels.extend(std::arch::is_aarch64_feature_detected!("dotprod").then_some(Level::NeonDot));
        }
        levels
    }

    /// The best level this CPU can run.
    pub fn best() -> Level {
        Level::available().last().copied().unwrap_or(Level::Scalar)
    }
}

/// The kernels of one level.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    /// Their level.
    pub level: Level,
    /// F32 weights, float activations.
    pub f32: Dots,
    /// F16 weights, float activations.
    pub f16: Dots,
    /// Several rows of them at once.
    pub f16_rows: Option<ManyRows>,
    /// Q8_0 weights, int8 activations per 32.
    pub q8_0: Dots,
    /// Several rows of them at once, where that is faster; so below.
    pub q8_0_rows: Option<ManyRows>,
    /// Q2_K weights, int8 activations per 256.
    pub q2_k: Dots,
    /// Several rows of them at once.
    pub q2_k_rows: Option<ManyRows>,
    /// Q4_K weights, int8 activations per 256.
    pub q4_k: Dots,
    /// Several rows of them at once.
    pub q4_k_rows: Option<ManyRows>,
    /// IQ2_XXS weights, int8 activations per 256.
    pub iq2_xxs: Dots,
    /// The form of these.
    pub iq2_xxs_input: Input,
    /// Several rows of them at once.
    pub iq2_xxs_rows: Option<ManyRows>,
    /// Dot product of two float vectors of equal length.
    pub dot: fn(&[f32], &[f32]) -> f32,
    /// First half of attention.
    pub scores: Scores,
    /// Its second half.
    pub weigh: Weigh,
    /// Small steps.
    pub small: Small,
    /// Scores of index keys.
    pub index_scores: index::IndexScores,
}

impl Kernels {
    /// The kernels of a level. Levels that this CPU cannot run give the scalar ones.
    pub fn new(level: Level) -> Self {
        if !Level::available().contains(&level) {
            return scalar::KERNELS;
        }
        match level {
            Level::Scalar => scalar::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => avx2::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni => avx_vnni::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => avx512::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Level::Vnni => vnni::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Level::Vbmi => vbmi::KERNELS,
            #[cfg(target_arch = "aarch64")]
            Level::Neon => neon::NEON,
            #[cfg(target_arch = "aarch64")]
            Level::NeonDot => neon::NEON_DOT,
            #[allow(unreachable_patterns)]
            _ => scalar::KERNELS,
        }
    }

    /// How to multiply with weights of a type: in integers where the format was designed for them and `exact`
    /// is off, else in floats.
    pub fn product(&self, ty: TensorType, exact: bool) -> Option<Product> {
        use TensorType as T;
        let direct = |input, dots, rows| Some(Product { input, dots, rows, decode: None });
        match ty {
            T::F32 => direct(Input::Float, self.f32, None),
            T::F16 => direct(Input::Float, self.f16, self.f16_rows),
            T::Q8_0 if !exact => direct(Input::Int32, self.q8_0, self.q8_0_rows),
            T::Q2K if !exact => direct(Input::Int256, self.q2_k, self.q2_k_rows),
            T::Q4K if !exact => direct(Input::Int256, self.q4_k, self.q4_k_rows),
            T::Iq2Xxs if !exact => direct(self.iq2_xxs_input, self.iq2_xxs, self.iq2_xxs_rows),
            ty if is_supported(ty) => {
                Some(Product { input: Input::Float, dots: self.f32, rows: None, decode: Some(ty) })
            }
            _ => None,
        }
    }
}

/// How a matrix of some type is multiplied.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Form of the activations.
    pub input: Input,
    dots: Dots,
    rows: Option<ManyRows>,
    /// Type to decode to f32 first: exact mode, and formats without a kernel of their own.
    decode: Option<TensorType>,
}

impl Product {
    /// Multiplies weight rows, one behind the other, with the activation rows of `x`; `out`: `[rows of x, weight rows]`.
    pub fn multiply(&self, rows: &[u8], row_bytes: usize, x: &Columns<'_>, out: &mut [f32]) {
        let stride = rows.len() / row_bytes;
        let many = self.rows.filter(|rows| x.index.len() >= rows.least);
        let whole = many.map_or(0, |many| stride / many.rows * many.rows);
        let (tiles, rest) = rows.split_at(whole * row_bytes);
        if let Some(many) = many {
            for (i, rows) in tiles.chunks_exact(many.rows * row_bytes).enumerate() {
                (many.multiply)(rows, x, &mut Target { out, stride, first: i * many.rows });
            }
        }
        if rest.is_empty() {
            return;
        }
        if x.index.len() == 1 {
            return self.dots(rest, row_bytes, x, &mut out[whole..]);
        }
        // Kernels give products row by row, here they go column by column: as many rows at a time as there is room for.
        let mut products = [0.0; 1024];
        for (index, out) in x.index.chunks(64).zip(out.chunks_mut(64 * stride)) {
            let (n, block) = (index.len(), products.len() / index.len());
            for (rows, first) in rest.chunks(block * row_bytes).zip((whole..).step_by(block)) {
                let products = &mut products[..rows.len() / row_bytes * n];
                self.dots(rows, row_bytes, &Columns { index, ..*x }, products);
                for (j, out) in out.chunks_exact_mut(stride).enumerate() {
                    let column = products[j..].iter().step_by(n);
                    out[first..].iter_mut().zip(column).for_each(|(out, p)| *out = *p);
                }
            }
        }
    }

    /// Multiplies weight rows, one at least, with the activation rows of `x`; `out`: `[weight rows, rows of x]`.
    pub fn dots(&self, rows: &[u8], row_bytes: usize, x: &Columns<'_>, out: &mut [f32]) {
        match self.decode {
            None => (self.dots)(rows, x, out),
            Some(ty) => ROW.with_borrow_mut(|buffer| {
                buffer.resize(x.len, 0.0);
                let out = out.chunks_exact_mut(x.index.len());
                for (row, out) in rows.chunks_exact(row_bytes).zip(out) {
                    let decoded = dequantize_row(ty, row, buffer);
                    debug_assert!(decoded.is_ok(), "matrices are checked when they are bound");
                    (self.dots)(bytemuck::cast_slice(buffer), x, out);
                }
            }),
        }
    }
}

thread_local! {
    static ROW: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
}
