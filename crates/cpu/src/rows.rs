//! Activation buffers.

use crate::kernels::{Columns, Input, planes};
use ds4_quant::act::{quantize_32, quantize_256};
use rayon::prelude::*;

/// A line of the cache. Buffers of lines begin at one, so that no vector that is loaded from them lies in two.
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Floats that begin at a line of the cache.
#[derive(Default)]
pub(crate) struct Floats(Vec<Line>);

impl Floats {
    /// Room for so many, zeros at first. It never becomes less.
    pub(crate) fn reserve(&mut self, len: usize) {
        let lines = len.div_ceil(16);
        if self.0.len() < lines {
            self.0.resize(lines, Line::default());
        }
    }

    pub(crate) fn get(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }

    pub(crate) fn get_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

/// Activations `[capacity, width]`, of which the first `n` rows are in use.
#[derive(Default)]
pub struct Rows {
    pub(crate) width: usize,
    pub(crate) n: usize,
    data: Floats,
}

impl Rows {
    pub(crate) fn new(capacity: usize, width: usize) -> Self {
        let mut data = Floats::default();
        data.reserve(capacity * width);
        Rows { width, n: 0, data }
    }

    /// The rows in use.
    pub(crate) fn used(&self) -> &[f32] {
        &self.data.get()[..self.n * self.width]
    }

    /// Takes `n` rows into use; their content is whatever was there.
    pub(crate) fn take(&mut self, n: usize) -> &mut [f32] {
        self.n = n;
        &mut self.data.get_mut()[..n * self.width]
    }

    /// The same with rows of another width: a buffer can serve steps of different widths.
    pub(crate) fn take_as(&mut self, n: usize, width: usize) -> &mut [f32] {
        self.width = width;
        self.take(n)
    }

    pub(crate) fn row(&self, i: usize) -> &[f32] {
        &self.data.get()[i * self.width..(i + 1) * self.width]
    }
}

/// Experts chosen for each row, in ascending order, and their weights `[capacity, used]`.
pub struct Routes {
    pub(crate) used: usize,
    pub(crate) n: usize,
    pub(crate) ids: Vec<u32>,
    pub(crate) weights: Vec<f32>,
}

/// Compressed rows chosen for each row, ascending `[capacity, top_k]`. Only rows that see more than `top_k`
/// have an entry; the others attend to all.
pub struct Selection {
    pub(crate) top_k: usize,
    pub(crate) n: usize,
    pub(crate) ids: Vec<u32>,
    pub(crate) chosen: Vec<bool>,
}

/// Expert ids by token `[V, K]`.
pub struct Table {
    pub(crate) width: usize,
    pub(crate) values: Vec<i32>,
}

/// The int8 forms of some activations; the floats stay where they are.
#[derive(Default)]
pub(crate) struct Panel {
    stride: usize,
    q32: Vec<i8>,
    d32: Vec<f32>,
    offsets32: Vec<i32>,
    q256: Vec<i8>,
    planes256: Vec<i8>,
    d256: Vec<f32>,
    sums: Vec<i16>,
}

fn grow<T: Default + Clone>(v: &mut Vec<T>, len: usize) -> &mut [T] {
    if v.len() < len {
        v.resize(len, T::default());
    }
    &mut v[..len]
}

impl Panel {
    /// Quantizes rows of `width` values into the forms that `inputs` name.
    pub(crate) fn load(&mut self, x: &[f32], width: usize, inputs: impl Iterator<Item = Input> + Clone) {
        self.stride = width;
        let n = x.len();
        if inputs.clone().any(|i| i == Input::Int32) {
            let (q, d) = (grow(&mut self.q32, n), grow(&mut self.d32, n / 32));
            let sums = grow(&mut self.offsets32, n / 32);
            let rows = q.par_chunks_mut(width).zip(d.par_chunks_mut(width / 32));
            let rows = rows.zip(sums.par_chunks_mut(width / 32)).zip(x.par_chunks(width));
            rows.for_each(|(((q, d), sums), x)| {
                quantize_32(x, q, d);
                for (sum, q) in sums.iter_mut().zip(q.as_chunks::<32>().0) {
                    *sum = -128 * q.iter().map(|&q| i32::from(q)).sum::<i32>();
                }
            });
        }
        let as_planes = inputs.clone().any(|i| i == Input::Planes256);
        if as_planes || inputs.clone().any(|i| i == Input::Int256) {
            let (q, d) = (grow(&mut self.q256, n), grow(&mut self.d256, n / 256));
            let sums = grow(&mut self.sums, n / 16);
            let rows = q.par_chunks_mut(width).zip(d.par_chunks_mut(width / 256));
            let rows = rows.zip(sums.par_chunks_mut(width / 16)).zip(x.par_chunks(width));
            rows.for_each(|(((q, d), sums), x)| quantize_256(x, q, d, sums));
            if as_planes {
                let rows = grow(&mut self.planes256, n).par_chunks_mut(width).zip(q.par_chunks(width));
                rows.for_each(|(to, q)| planes(q, to));
            }
        }
    }

    /// The rows `index`, `len` values of each from `offset`, in the form `input`.
    pub(crate) fn columns<'a>(
        &'a self,
        floats: &'a [f32],
        input: Input,
        (offset, len): (usize, usize),
        index: &'a [u32],
    ) -> Columns<'a> {
        let mut columns = Columns { floats, stride: self.stride, offset, len, index, ..Columns::default() };
        match input {
            Input::Float => {}
            Input::Int32 => (columns.q, columns.d, columns.offsets) = (&self.q32, &self.d32, &self.offsets32),
            Input::Int256 => (columns.q, columns.d, columns.sums) = (&self.q256, &self.d256, &self.sums),
            Input::Planes256 => {
                (columns.q, columns.d, columns.sums) = (&self.planes256, &self.d256, &self.sums);
            }
        }
        columns
    }
}
