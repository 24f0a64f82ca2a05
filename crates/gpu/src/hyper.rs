//! Embedding, norms and hyper-connections on the device.

use crate::backend::Gpu;
use crate::buffer::Buffer;
use crate::device::FEW_ROWS;
use crate::kernels::common::Real;
use crate::kernels::dot::{Form, InputLaunch, OutputLaunch, WeightsLaunch};
use crate::kernels::experts::Expert;
use crate::kernels::hyper::{self, Hyper, MIX_UNITS, MixingLaunch};
use crate::kernels::join;
use crate::kernels::mixed::{self, UnmixedLaunch};
use crate::kernels::output;
use crate::kernels::tables::{RawLaunch, tables_bytes};
use crate::layout::Format;
use crate::output::{Heads, Joined};
use crate::project::columns;
use crate::rows::{Matrix, Rows, Vector};
use crate::stage::{Abilities, Stage};
use cubecl::prelude::*;
use ds4_model::{HeadMix, HyperConnection, Mtp, Shape};
use half::f16;

/// A sublayer's last product, which waits to be one step with the join that follows it.
pub(crate) enum LastProduct {
    Attention {
        low: InputLaunch,
        weights: Box<WeightsLaunch>,
    },
    /// Of a row that both halves of the output projection have yet to meet.
    Heads(Box<Heads>),
    Experts {
        hidden: InputLaunch,
        down: Box<[WeightsLaunch; 2]>,
        ids: Buffer,
        s: Expert,
    },
}

/// A join of a sublayer's output into streams that waits to be made.
pub(crate) struct Join {
    streams: Buffer,
    y: Buffer,
    mix: Buffer,
    /// What makes `y`, unless it has been made.
    product: Option<LastProduct>,
}

/// Post and comb of a sublayer, which wait to be made beside something else.
pub(crate) struct Mixing {
    totals: Buffer,
    control: Buffer,
    mix: Buffer,
    s: Hyper,
}

impl Mixing {
    fn arg(&self) -> MixingLaunch {
        MixingLaunch::new(self.totals.arg(4), self.control.arg(4), self.mix.arg(4), self.s)
    }

    /// As what a kernel makes beside its work, if it waits.
    pub(crate) fn beside(waiting: Option<&Mixing>) -> SequenceArg<hyper::Mixing> {
        let mut arg = SequenceArg::new();
        waiting.into_iter().for_each(|m| arg.push(m.arg()));
        arg
    }
}

/// A sublayer's input of one row, which waits to be mixed by the products that follow.
pub(crate) struct Unmixed {
    streams: Buffer,
    partial: Buffer,
    control: Buffer,
    norm: Buffer,
    totals: Buffer,
    s: Hyper,
    /// Where it goes.
    x: Buffer,
    out: OutputLaunch,
}

impl Unmixed {
    /// Whether it is what some products multiply.
    pub(crate) fn is(&self, x: &Rows) -> bool {
        self.x.id() == x.values.id()
    }

    /// As what products mix themselves, and where they leave it.
    pub(crate) fn arg(self) -> (UnmixedLaunch, OutputLaunch) {
        let (streams, norm) = (self.streams.arg(16), self.norm.arg(16));
        let (partial, control, totals) = (self.partial.arg(4), self.control.arg(4), self.totals.arg(4));
        (UnmixedLaunch::new(streams, partial, control, norm, totals, self.s), self.out)
    }
}

/// A norm that waits to be part of the products that follow.
pub(crate) struct Norm {
    x: Buffer,
    weight: Buffer,
    n: usize,
    width: usize,
    stride: usize,
    eps: Real,
    /// Where it goes if they cannot take it.
    out: OutputLaunch,
}

impl Norm {
    /// As what products norm themselves.
    pub(crate) fn raw(&self) -> RawLaunch {
        let (x, weight) = (self.x.arg(16), self.weight.arg(16));
        RawLaunch::new(x, weight, self.width, self.stride, self.eps, UNITS as usize)
    }
}

/// Rows of the sublayer's last matrix that a plane takes, where it joins them, too: the same for all passes of few
/// rows, since it decides how sums are split.
pub(crate) const JOINED_ROWS: usize = 2;

/// Units of a cube that joins what it makes of a sublayer's output: on NVIDIA there is room for larger parts, of which
/// fewer sums are left.
fn join_units(a: &Abilities) -> u32 {
    if a.ptx { 2 * UNITS } else { UNITS }
}

/// Units of a cube where a row is a cube.
pub(crate) const UNITS: u32 = 256;

/// How cubes share the work on streams: channels, rows and units of one, and control numbers of a plane at a time.
#[derive(Clone, Copy)]
struct Share {
    part: usize,
    rows: usize,
    units: usize,
    block: usize,
}

/// What the hyper-connection kernels are specialised by.
fn hyper(shape: &Shape, share: Share, controls: usize, input: usize) -> Hyper {
    Hyper {
        n: shape.streams,
        d: shape.width,
        stride: shape.streams_width().next_multiple_of(64),
        y_stride: shape.width.next_multiple_of(64),
        mix_stride: (shape.streams + shape.streams * shape.streams).next_multiple_of(64),
        controls,
        input,
        part: share.part,
        rows: share.rows,
        units: share.units,
        block: share.block,
        sinkhorn: shape.sinkhorn,
        norm_eps: Real::new(shape.norm_eps),
        eps: Real::new(shape.hc_eps),
    }
}

/// Channels of a cube in passes of few rows, which may join what they make of a sublayer's output.
fn few_part(a: &Abilities) -> usize {
    ((join_units(a) / a.plane).max(1) as usize * JOINED_ROWS).next_multiple_of(4)
}

/// Channels of a cube in passes for the matrix units.
const MANY_PART: usize = 256;

/// Values that a pass of up to `n` rows needs for partial sums, of which more than `few` are for the matrix units.
pub(crate) fn partial_values(shape: &Shape, n: usize, a: &Abilities) -> usize {
    let of = |n: usize, part: usize| {
        let share = Share { part, rows: 1, units: UNITS as usize, block: 1 };
        let hyper = hyper(shape, share, shape.hc_mix(), shape.streams_width());
        n * hyper.parts() * hyper.numbers()
    };
    of(n, MANY_PART).max(of(n.min(a.few), few_part(a)))
}

/// Numbers of a row: control numbers, and products of the streams.
pub(crate) fn numbers(shape: &Shape) -> usize {
    shape.hc_mix() + shape.streams * (shape.streams + 1) / 2
}

/// Cubes for `units` units along x.
pub(crate) fn cubes(units: usize, per_cube: u32) -> u32 {
    (units as u32).div_ceil(per_cube)
}

fn is_half(matrix: Option<&Matrix>) -> bool {
    matrix.is_some_and(|m| m.format == Format::F16)
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

    /// Channels that a cube makes of a sublayer's output and joins at once, in passes where one step does both.
    pub(crate) fn joined_part(&self, n: usize) -> Option<usize> {
        let part = few_part(&self.abilities);
        // Beside the tables of a format.
        let fits = part == (join_units(&self.abilities) / self.abilities.plane) as usize * JOINED_ROWS
            && self.shape.width.is_multiple_of(part)
            && self.join_bytes(columns(n)) + tables_bytes(self.abilities.ptx) <= self.abilities.shared;
        (fits && n <= FEW_ROWS && !self.current.observed).then_some(part)
    }

    /// Bytes of shared memory for joining `rows` rows: streams and control numbers, outputs, post and comb.
    pub(crate) fn join_bytes(&self, rows: usize) -> usize {
        let (part, mix) = (few_part(&self.abilities), self.shape.hc_mix());
        4 * self.shape.streams * part * (rows + mix) + 4 * rows * (part + mix)
    }

    /// How cubes share the streams of `n` rows. Their parts decide how sums are split: one size for all passes of few
    /// rows, however these are computed.
    fn share(&self, n: usize, controls: usize) -> Share {
        if n > self.abilities.few {
            // Several rows and control numbers share each weight.
            return Share { part: MANY_PART, rows: 4, units: UNITS as usize, block: 3 };
        }
        let planes = controls.max(4) as u32;
        let units = (planes * self.abilities.plane).clamp(UNITS, self.abilities.units.min(1024)) as usize;
        Share { part: few_part(&self.abilities), rows: 1, units, block: 1 }
    }

    /// Joins a sublayer's output into the streams (if given), and computes their products with a control matrix (if
    /// given). Says how.
    #[allow(unsafe_code)]
    fn control(&self, n: usize, streams: &Buffer, join: Option<Join>, matrix: Option<&Matrix>) -> Hyper {
        let nothing = &self.nothing;
        let join = match join {
            Some(Join { mix, product: Some(product), .. }) => {
                return self.join_product(n, streams, &mix, product, matrix);
            }
            join => join,
        };
        let controls = matrix.map_or(0, |m| m.rows);
        let s = hyper(&self.shape, self.share(n, controls), controls, matrix.map_or(0, Matrix::stored));
        let (y, mix) = join.as_ref().map_or((&nothing[0], &nothing[1]), |j| (&j.y, &j.mix));
        let launch = match is_half(matrix) {
            true => join::hc_control::launch_unchecked::<f16>,
            false => join::hc_control::launch_unchecked::<f32>,
        };
        // SAFETY: sizes are those of the shape; `partial` was allocated for the larger number of controls.
        self.timer.time(&self.client, "hc_control", || unsafe {
            launch(
                &self.client,
                CubeCount::new_2d(s.parts() as u32, n.div_ceil(s.rows) as u32),
                CubeDim::new_1d(s.units as u32),
                streams.arg(16),
                y.arg(16),
                mix.arg(4),
                self.control_arg(matrix),
                self.scratch.partial.arg(4),
                n as u32,
                s,
                join.is_some(),
            );
        });
        s
    }

    fn control_arg(&self, matrix: Option<&Matrix>) -> BufferArg {
        let width = if is_half(matrix) { 8 } else { 16 };
        matrix.map_or(self.nothing[0].arg(16), |m| m.quants.arg(width))
    }

    /// The same for an output that is yet to be made.
    #[allow(unsafe_code)]
    fn join_product(
        &self,
        n: usize,
        streams: &Buffer,
        mix: &Buffer,
        product: LastProduct,
        matrix: Option<&Matrix>,
    ) -> Hyper {
        let rows = match product {
            LastProduct::Attention { .. } => columns(n),
            LastProduct::Heads(_) | LastProduct::Experts { .. } => 1,
        };
        // For a large matrix of long rows, a plane a row keeps more loads under way; but the units of very large cubes have too
        // few registers for several rows of activations.
        let (joining, larger) =
            (join_units(&self.abilities), join_units(&self.abilities) * JOINED_ROWS as u32);
        let large = matches!(product, LastProduct::Attention { .. })
            && self.abilities.units >= larger
            && (larger <= 512 || rows == 1);
        let (units, per_plane) = match product {
            LastProduct::Heads(_) => (output::UNITS as u32, 1),
            _ if large => (larger, 1),
            _ => (joining, JOINED_ROWS),
        };
        let part = few_part(&self.abilities);
        let share = Share { part, rows, units: units as usize, block: 1 };
        let s = hyper(&self.shape, share, matrix.map_or(0, |m| m.rows), matrix.map_or(0, Matrix::stored));
        let count = CubeCount::new_2d(s.parts() as u32, n.div_ceil(rows) as u32);
        let (client, dim, words) = (&self.client, CubeDim::new_1d(units), self.words.arg(8));
        let (streams, mix, control) = (streams.arg(16), mix.arg(4), self.control_arg(matrix));
        let partial = self.scratch.partial.arg(4);
        match product {
            LastProduct::Heads(heads) => {
                let joined = Joined { streams, mix, control, partial };
                self.output_joined(*heads, joined, is_half(matrix), s);
            }
            LastProduct::Attention { low, weights } => {
                let launch = match is_half(matrix) {
                    true => join::project_join::launch_unchecked::<f16>,
                    false => join::project_join::launch_unchecked::<f32>,
                };
                let (weights, n) = (*weights, n as u32);
                // SAFETY: a cube for each part of the channels; `partial` has room for the smallest parts.
                self.timer.time(client, "project_join", || unsafe {
                    launch(
                        client, count, dim, low, weights, words, streams, mix, control, partial, n,
                        per_plane, s,
                    );
                });
            }
            LastProduct::Experts { hidden, down, ids, s: e } => {
                let launch = match is_half(matrix) {
                    true => join::down_join::launch_unchecked::<f16>,
                    false => join::down_join::launch_unchecked::<f32>,
                };
                let ([routed, shared], n, ids) = (*down, n as u32, ids.arg(4));
                // SAFETY: as above; `hidden` has a row for every pair of a row and an expert of it.
                self.timer.time(client, "down_join", || unsafe {
                    launch(
                        client, count, dim, hidden, routed, shared, ids, words, streams, mix, control,
                        partial, n, e, s,
                    );
                });
            }
        }
        // How rows were shared does not matter to who reads the sums.
        Hyper { rows: 1, ..s }
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
        let s = self.control(n, &streams.values, join, Some(&hc.mix));
        mix.take(n, mix.width);
        let out = x.output(n, self.form(n));
        let control = &hc.affine.values[self.index];
        // Post and comb of few rows are left to kernels with time for them: attention on the matrix units, the choice of
        // experts.
        let all = n > FEW_ROWS || self.current.observed;
        let totals = &self.scratch.totals;
        self.mixing = (!all).then(|| Mixing {
            totals: totals.clone(),
            control: control.clone(),
            mix: mix.values.clone(),
            s,
        });
        let unmixed = Unmixed {
            streams: streams.values.clone(),
            partial: self.scratch.partial.clone(),
            control: control.clone(),
            norm: norm.values[self.index].clone(),
            totals: totals.clone(),
            s,
            x: x.values.clone(),
            out,
        };
        if n == 1 && !all && self.mixes_with_products() {
            self.unmixed = Some(unmixed);
        } else {
            self.mix_rows(unmixed, &mix.values, n, all);
        }
    }

    /// Whether the input of a sublayer, of one row, may wait for the products that follow, which are the first to read it.
    fn mixes_with_products(&self) -> bool {
        let (a, d) = (&self.abilities, self.shape.width);
        a.bulk && a.tile.is_some() && a.processors > 0 && mixed::fits(d)
    }

    /// Mixes `n` rows; where `all`, post and comb go to `mix`.
    #[allow(unsafe_code)]
    pub(crate) fn mix_rows(&self, unmixed: Unmixed, mix: &Buffer, n: usize, all: bool) {
        let s = unmixed.s;
        // SAFETY: sizes are those of the shape.
        self.timer.time(&self.client, "hc_mix", || unsafe {
            hyper::hc_mix::launch_unchecked(
                &self.client,
                CubeCount::new_2d(n as u32, cubes(s.d / 4, MIX_UNITS as u32) + u32::from(all)),
                CubeDim::new_1d(MIX_UNITS as u32),
                unmixed.streams.arg(16),
                unmixed.partial.arg(4),
                unmixed.control.arg(4),
                unmixed.norm.arg(16),
                unmixed.out,
                mix.arg(4),
                unmixed.totals.arg(4),
                all,
                s,
            );
        });
    }

    /// Joining waits for the next split of the same streams; whoever reads them before calls
    /// [`Stage::finish_join`].
    pub(crate) fn hc_join_step(&mut self, y: &Rows, mix: &Rows, streams: &mut Rows) {
        // They may have been carried here.
        streams.n = self.current.n;
        self.finish_post_comb();
        let (y, mix) = (y.values.clone(), mix.values.clone());
        let product = self.last_product.take();
        self.pending_join = Some(Join { streams: streams.values.clone(), y, mix, product });
    }

    /// Makes post and comb, if nobody has.
    #[allow(unsafe_code)]
    fn finish_post_comb(&mut self) {
        if let Some(mixing) = self.mixing.take() {
            // SAFETY: sizes are those of the shape.
            self.timer.time(&self.client, "post_comb", || unsafe {
                let rows = CubeCount::new_1d(self.current.n as u32);
                let dim = CubeDim::new_1d(self.abilities.plane);
                hyper::post_comb::launch_unchecked(&self.client, rows, dim, mixing.arg());
            });
        }
    }

    /// Joins what waits: somebody wants to see the streams.
    pub(crate) fn finish_join(&mut self) {
        if let Some(join) = self.pending_join.take() {
            let streams = join.streams.clone();
            self.control(self.current.n, &streams, Some(join), None);
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

    /// A norm between what is put into the cache and the products beside it is theirs to make.
    pub(crate) fn norm_step(&mut self, weight: &Vector, x: &Rows, out: &mut Rows) {
        let form = self.form(x.n);
        let norm = Norm {
            x: x.values.clone(),
            weight: weight.values[self.index].clone(),
            n: x.n,
            width: x.width,
            stride: x.stride,
            eps: Real::new(self.shape.norm_eps),
            out: out.output(x.n, form),
        };
        if form == Form::Quantized && self.absorbing.is_some() {
            self.norm = Some(norm);
        } else {
            self.norm_rows(norm);
        }
    }

    #[allow(unsafe_code)]
    pub(crate) fn norm_rows(&self, norm: Norm) {
        // SAFETY: both have `n` rows of `width` values.
        unsafe {
            self.timer.time(&self.client, "norm", || {
                hyper::norm::launch_unchecked(
                    &self.client,
                    CubeCount::new_1d(norm.n as u32),
                    CubeDim::new_1d(UNITS),
                    norm.x.arg(16),
                    norm.weight.arg(16),
                    norm.out,
                    norm.width,
                    norm.stride,
                    norm.eps,
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
        let s = hyper(&self.shape, self.share(n, 0), 0, 0);
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
