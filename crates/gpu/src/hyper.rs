//! Embedding, norms and hyper-connections on the device.

use crate::backend::Gpu;
use crate::buffer::Buffer;
use crate::device::FEW_ROWS;
use crate::kernels::common::Real;
use crate::kernels::hyper::{self, Hyper, MIX_UNITS};
use crate::layout::Format;
use crate::rows::{Matrix, Rows, Vector};
use crate::stage::Stage;
use cubecl::prelude::*;
use ds4_model::{HeadMix, HyperConnection, Mtp, Shape};
use half::f16;

/// A join of a sublayer's output into streams that waits to be made.
pub(crate) struct Join {
    streams: Buffer,
    y: Buffer,
    mix: Buffer,
}

/// Units of a cube where a row is a cube.
pub(crate) const UNITS: u32 = 256;

/// What the hyper-connection kernels are specialised by, in passes of `n` rows.
pub(crate) fn hyper(shape: &Shape, n: usize, controls: usize, input: usize) -> Hyper {
    // Of few rows, many cubes share the width; of many, several share each weight.
    let (part, rows, block) = if n > FEW_ROWS { (256, 4, 3) } else { (64, 1, 1) };
    Hyper {
        n: shape.streams,
        d: shape.width,
        stride: shape.streams_width().next_multiple_of(64),
        y_stride: shape.width.next_multiple_of(64),
        mix_stride: (shape.streams + shape.streams * shape.streams).next_multiple_of(64),
        controls,
        input,
        part,
        rows,
        block,
        sinkhorn: shape.sinkhorn,
        norm_eps: Real::new(shape.norm_eps),
        eps: Real::new(shape.hc_eps),
    }
}

/// Values that a pass of up to `n` rows needs for partial sums.
pub(crate) fn partial_values(shape: &Shape, n: usize) -> usize {
    let of = |n: usize| {
        let hyper = hyper(shape, n, shape.hc_mix(), shape.streams_width());
        n * hyper.parts() * hyper.numbers()
    };
    of(n).max(of(n.min(FEW_ROWS)))
}

/// Cubes for `units` units along x.
pub(crate) fn cubes(units: usize, per_cube: u32) -> u32 {
    (units as u32).div_ceil(per_cube)
}

impl Stage {
    /// Rows of embeddings of the pass's tokens, each repeated `copies` times.
    #[allow(unsafe_code)]
    pub(crate) fn embed_step(&mut self, table: &Matrix, out: &mut Rows, copies: usize) {
        let (n, d, stride) = (self.current.n, self.shape.width, out.stride);
        out.take(n, copies * d);
        let count = CubeCount::new_2d(cubes(d / 4, 128), n as u32);
        let (dim, client) = (CubeDim::new_1d(128), &self.client);
        let (plan, values) = (self.plan.arg(4), out.values.arg(16));
        let padded = table.format.padded(table.input);
        // SAFETY: rows are of `stride` values, and every token is below the rows of the table (checked when the
        // plan was made).
        unsafe {
            match table.format {
                Format::F16 => hyper::embed::launch_unchecked::<f16>(
                    client,
                    count,
                    dim,
                    table.quants.arg(8),
                    plan,
                    values,
                    d,
                    copies,
                    stride,
                    padded,
                ),
                Format::Q8 => hyper::embed_q8::launch_unchecked(
                    client,
                    count,
                    dim,
                    table.quants.arg(4),
                    table.scales.arg(2),
                    plan,
                    values,
                    d,
                    copies,
                    stride,
                ),
                _ => hyper::embed::launch_unchecked::<f32>(
                    client,
                    count,
                    dim,
                    table.quants.arg(16),
                    plan,
                    values,
                    d,
                    copies,
                    stride,
                    padded,
                ),
            }
        }
    }

    /// Joins `y` into the streams (if given), and computes their products with a control matrix (if given).
    #[allow(unsafe_code)]
    fn control(&self, n: usize, streams: &Buffer, join: Option<&Join>, matrix: Option<&Matrix>) -> Hyper {
        let controls = matrix.map_or(0, |m| m.rows);
        let s = hyper(&self.shape, n, controls, matrix.map_or(0, |m| m.format.padded(m.input)));
        let nothing = &self.nothing;
        let (y, mix) = join.map_or((&nothing[0], &nothing[1]), |j| (&j.y, &j.mix));
        let half = matrix.is_some_and(|m| m.format == Format::F16);
        let weights = matrix.map_or(nothing[0].arg(16), |m| m.quants.arg(if half { 8 } else { 16 }));
        let count = CubeCount::new_2d(s.parts() as u32, n.div_ceil(s.rows) as u32);
        // Of few rows, as many planes as there are control numbers.
        let planes = if n > FEW_ROWS { 8 } else { controls.max(4) as u32 };
        let dim =
            CubeDim::new_1d((planes * self.abilities.plane).clamp(UNITS, self.abilities.units.min(1024)));
        let client = &self.client;
        let (streams, y, mix) = (streams.arg(16), y.arg(16), mix.arg(4));
        let partial = self.scratch.partial.arg(4);
        let (join, project) = (join.is_some(), matrix.is_some());
        // SAFETY: sizes are those of the shape; `partial` was allocated for the larger number of controls.
        unsafe {
            self.timer.time(client, "hc_control", || {
                if half {
                    hyper::hc_control::launch_unchecked::<f16>(
                        client, count, dim, streams, y, mix, weights, partial, n as u32, s, join, project,
                    );
                } else {
                    hyper::hc_control::launch_unchecked::<f32>(
                        client, count, dim, streams, y, mix, weights, partial, n as u32, s, join, project,
                    );
                }
            });
        }
        s
    }

    #[allow(unsafe_code)]
    pub(crate) fn hc_split_step(
        &mut self,
        hc: &HyperConnection<Gpu>,
        norm: &Vector,
        streams: &Rows,
        x: &mut Rows,
        mix: &mut Rows,
    ) {
        let n = self.current.n;
        // The join of the sublayer before is part of the same kernel.
        if self.pending_join.as_ref().is_some_and(|j| j.streams.id() != streams.values.id()) {
            self.finish_join();
        }
        let join = self.pending_join.take();
        let s = self.control(n, &streams.values, join.as_ref(), Some(&hc.mix));
        mix.take(n, mix.width);
        let out = x.output(n, self.form(n));
        // SAFETY: sizes are those of the shape.
        unsafe {
            self.timer.time(&self.client, "hc_mix", || {
                hyper::hc_mix::launch_unchecked(
                    &self.client,
                    CubeCount::new_2d(n as u32, cubes(s.d / 4, MIX_UNITS as u32) + 1),
                    CubeDim::new_1d(MIX_UNITS as u32),
                    streams.values.arg(16),
                    self.scratch.partial.arg(4),
                    hc.affine.values[self.index].arg(4),
                    norm.values[self.index].arg(16),
                    out,
                    mix.values.arg(4),
                    s,
                );
            });
        }
    }

    /// Joining waits for the next split of the same streams; whoever reads them before calls
    /// [`Gpu::finish_join`].
    pub(crate) fn hc_join_step(&mut self, y: &Rows, mix: &Rows, streams: &mut Rows) {
        // They may have been carried here.
        streams.n = self.current.n;
        let (y, mix) = (y.values.clone(), mix.values.clone());
        self.pending_join = Some(Join { streams: streams.values.clone(), y, mix });
    }

    /// Joins what waits: somebody wants to see the streams.
    pub(crate) fn finish_join(&mut self) {
        if let Some(join) = self.pending_join.take() {
            self.control(self.current.n, &join.streams, Some(&join), None);
        }
    }

    #[allow(unsafe_code)]
    pub(crate) fn hc_head_step(&mut self, head: &HeadMix<Gpu>, streams: &Rows, z: &mut Rows) {
        let n = streams.n;
        let s = self.control(n, &streams.values, None, Some(&head.mix));
        z.take(n, self.shape.width);
        // SAFETY: sizes are those of the shape.
        unsafe {
            self.timer.time(&self.client, "hc_head", || {
                hyper::hc_head::launch_unchecked(
                    &self.client,
                    CubeCount::new_2d(n as u32, cubes(s.d / 4, MIX_UNITS as u32)),
                    CubeDim::new_1d(MIX_UNITS as u32),
                    streams.values.arg(16),
                    self.scratch.partial.arg(4),
                    head.affine.values[self.index].arg(4),
                    z.values.arg(16),
                    s,
                    z.stride,
                );
            });
        }
    }

    #[allow(unsafe_code)]
    pub(crate) fn norm_step(&mut self, weight: &Vector, x: &Rows, out: &mut Rows) {
        if self.absorbing.is_some() {
            self.absorb(weight, x, out);
            return;
        }
        let (n, width, stride) = (x.n, x.width, x.stride);
        let eps = Real::new(self.shape.norm_eps);
        let out = out.output(n, self.form(n));
        // SAFETY: both have `n` rows of `width` values.
        unsafe {
            self.timer.time(&self.client, "norm", || {
                hyper::norm::launch_unchecked(
                    &self.client,
                    CubeCount::new_1d(n as u32),
                    CubeDim::new_1d(UNITS),
                    x.values.arg(16),
                    weight.values[self.index].arg(16),
                    out,
                    width,
                    stride,
                    eps,
                );
            });
        }
    }

    #[allow(unsafe_code)]
    pub(crate) fn gather_step(&mut self, from: &Rows, rows: &[usize], to: &mut Rows) {
        self.finish_join();
        let outputs = &self.current.outputs;
        let first = outputs.windows(rows.len().max(1)).position(|w| w == rows).unwrap_or(0);
        to.take(rows.len(), from.width);
        let first = 4 * self.current.n + first;
        // SAFETY: the plan lists rows of the pass.
        unsafe {
            self.timer.time(&self.client, "gather", || {
                hyper::gather::launch_unchecked(
                    &self.client,
                    CubeCount::new_2d(cubes(from.width / 4, 128), rows.len() as u32),
                    CubeDim::new_1d(128),
                    from.values.arg(16),
                    self.plan.arg(4),
                    to.values.arg(16),
                    first as u32,
                    from.width / 4,
                    from.stride,
                    to.stride,
                );
            });
        }
    }

    /// Makes the int8 form of rows that lack it.
    #[allow(unsafe_code)]
    pub(crate) fn quantize(&self, x: &Rows, n: usize) {
        // SAFETY: whole rows.
        unsafe {
            self.timer.time(&self.client, "quantize", || {
                hyper::quantize::launch_unchecked(
                    &self.client,
                    CubeCount::new_2d(cubes(x.stride / 4, UNITS), n as u32),
                    CubeDim::new_1d(UNITS),
                    x.refill(),
                );
            });
        }
    }

    /// Makes the f16 form of rows that lack it.
    #[allow(unsafe_code)]
    pub(crate) fn halve(&self, x: &Rows) {
        if !x.claim_halves() {
            return;
        }
        // SAFETY: whole rows.
        unsafe {
            self.timer.time(&self.client, "halve", || {
                hyper::halve::launch_unchecked(
                    &self.client,
                    CubeCount::new_2d(cubes(x.stride / 4, UNITS), x.n as u32),
                    CubeDim::new_1d(UNITS),
                    x.values.arg(16),
                    x.halves.arg(8),
                    (x.stride / 4) as u32,
                );
            });
        }
    }

    /// Buffers of the draft block's input, made when they are first needed.
    fn draft_rows(&mut self) -> Box<[Rows; 5]> {
        let (rows, d, copies) = (self.options.max_rows, self.shape.width, self.shape.streams);
        self.scratch.draft.take().unwrap_or_else(|| {
            let new = |n| Rows::new(&self.client, n, d, true);
            Box::new([new(rows), new(rows), new(rows), new(rows * copies), new(rows * copies)])
        })
    }

    /// Embeddings of the pass's tokens, for a draft block that lies on another device, and their bytes.
    pub(crate) fn draft_embed(&mut self, table: &Matrix) -> (Buffer, u64) {
        let mut draft = self.draft_rows();
        self.embed_step(table, &mut draft[0], 1);
        let embeddings = (draft[0].values.clone(), 4 * (draft[0].n * draft[0].stride) as u64);
        self.scratch.draft = Some(draft);
        embeddings
    }

    /// Where such embeddings go.
    pub(crate) fn draft_embeddings(&mut self) -> Buffer {
        let mut draft = self.draft_rows();
        draft[0].take(self.current.n, self.shape.width);
        let values = draft[0].values.clone();
        self.scratch.draft = Some(draft);
        values
    }

    /// `table`: the embeddings, unless they are there already.
    #[allow(unsafe_code)]
    pub(crate) fn draft_input_step(&mut self, mtp: &Mtp<Gpu>, table: Option<&Matrix>, streams: &mut Rows) {
        self.finish_join();
        let (n, d, copies) = (self.current.n, self.shape.width, self.shape.streams);
        let mut draft = self.draft_rows();
        let [raw, normed, e, stream, h] = &mut *draft;
        if let Some(table) = table {
            self.embed_step(table, raw, 1);
        }
        self.norm_step(&mtp.e_norm, raw, normed);
        self.project_step(normed, &mut [(&mtp.e_proj, e)]);
        // Each stream of each row is a row of its own here.
        let (eps, out) = (Real::new(self.shape.norm_eps), stream.output(n * copies, self.form(n * copies)));
        // SAFETY: streams lie side by side where the width is that of the stride.
        unsafe {
            self.timer.time(&self.client, "norm", || {
                hyper::norm::launch_unchecked(
                    &self.client,
                    CubeCount::new_1d((n * copies) as u32),
                    CubeDim::new_1d(UNITS),
                    streams.values.arg(16),
                    mtp.h_norm.values[self.index].arg(16),
                    out,
                    d,
                    d,
                    eps,
                );
            });
        }
        self.project_step(stream, &mut [(&mtp.h_proj, h)]);
        let s = hyper(&self.shape, n, 0, 0);
        streams.take(n, copies * d);
        // SAFETY: sizes are those of the shape.
        unsafe {
            self.timer.time(&self.client, "add_embedding", || {
                hyper::add_embedding::launch_unchecked(
                    &self.client,
                    CubeCount::new_2d(cubes(d / 4, 128), n as u32),
                    CubeDim::new_1d(128),
                    h.values.arg(16),
                    e.values.arg(16),
                    streams.values.arg(16),
                    s,
                    h.stride,
                );
            });
        }
        self.scratch.draft = Some(draft);
    }
}
