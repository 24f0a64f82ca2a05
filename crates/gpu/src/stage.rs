//! One device's part of the backend: its buffers, its layers, and its share of a pass. The steps are in their modules.

use crate::attention::{Absorbing, PARTIALS};
use crate::backend::Options;
use crate::buffer::{Buffer, device_error};
use crate::device::{DeviceInfo, FEW_ROWS, has_fragments, usable_tile};
use crate::graph::{Key, Recorder};
use crate::hyper::{Join, LastProduct, Mixing, Norm, Unmixed};
use crate::kernels::cache::RowShape;
use crate::kernels::dot::Form;
use crate::kernels::hyper::MIX_UNITS;
use crate::kernels::output::told_bytes;
use crate::kernels::plane::ptx;
use crate::kernels::select::STRETCH;
use crate::kernels::tables;
use crate::layout::{Format, pack};
use crate::logits::Finding;
use crate::output::{Halfway, Splits};
use crate::rows::{Matrix, Routes, Rows, Selection};
use crate::staging::{PIECE, Staging};
use crate::store::{Arena, Sizes, Store};
use crate::timer::Timer;
use cubecl::client::Client;
use cubecl::features::Tma;
use cubecl_environment::stream::StreamId;
use ds4_gguf::Tensor;
use ds4_model::cache::Layout;
use ds4_model::{BackendError, LayerKind, PassForm, Plan, RopeTables, Run, RunRows, Shape};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Most rows of a pass that is recorded.
const MOST_RECORDED: usize = FEW_ROWS;
/// Positions that a recorded pass reaches at the least; it reaches the next power of two.
const LEAST_REACH: usize = 1024;

/// The runs of a pass: each session has a store on every device.
pub(crate) type Runs<'a> = [Run<'a, Vec<Store>>];

/// Bytes of an arena, at the least: small sessions share it.
const LEAST_ARENA: u64 = 64 << 20;

/// What is known of the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Abilities {
    /// Most units of a plane.
    pub(crate) plane: u32,
    /// Whether all planes have so many.
    pub(crate) certain: bool,
    /// Most units of a cube.
    pub(crate) units: u32,
    /// Most rows of the default mode that a plane a row of weights is for; more go to the matrix units.
    pub(crate) few: usize,
    /// Side of the matrix units' tiles.
    pub(crate) tile: Option<usize>,
    /// Whether a tile's parts are known to units.
    pub(crate) fragments: bool,
    /// Whether kernels are compiled to PTX.
    pub(crate) ptx: bool,
    /// Whether there are copies to shared memory of which no unit waits for each vector.
    pub(crate) bulk: bool,
    /// Bytes of shared memory of a cube.
    pub(crate) shared: usize,
    /// Processors, each of which runs cubes of its own; 0 where nobody tells.
    pub(crate) processors: u32,
}

/// Scratch of a pass, allocated once.
pub(crate) struct Scratch {
    /// `[n, parts, numbers]`: partial sums of the hyper-connections.
    pub(crate) partial: Buffer,
    /// `[n, numbers]`: their totals, for whoever makes post and comb.
    pub(crate) totals: Buffer,
    /// `[n * (used + 1), I]`: hidden activations of the experts.
    pub(crate) hidden: Rows,
    /// `[n, I]`: gate and up of the shared expert.
    pub(crate) shared: Option<Box<[Rows; 2]>>,
    /// `[PARTIALS, H, d]` and `[PARTIALS, H, 2]`: sums of attention and what they are relative to.
    pub(crate) partials: Buffer,
    pub(crate) stats: Buffer,
    /// What cubes tell each other of a row on its way through the output of attention, and how often they have.
    pub(crate) told: Buffer,
    pub(crate) turn: Buffer,
    /// `[tile of rows, keys]`: index scores.
    pub(crate) scores: Buffer,
    /// The best of each stretch of scores, and their places.
    pub(crate) best: Buffer,
    pub(crate) places: Buffer,
    /// int8 index queries `[n, IH * ID]`, and their scales.
    pub(crate) index_words: Buffer,
    pub(crate) index_scales: Buffer,
    /// What products of experts with many rows need.
    pub(crate) grouped: Option<Grouped>,
    /// What finding the best tokens needs, once it was asked for.
    pub(crate) finding: Option<Finding>,
    /// Inputs and products of the draft block.
    pub(crate) draft: Option<Box<[Rows; 5]>>,
}

/// Pairs sorted by expert, tiles of them, and what each pair's expert gave.
pub(crate) struct Grouped {
    /// `[n * used]`.
    pub(crate) sorted: Buffer,
    /// Their number, then expert, first place and count of each.
    pub(crate) tiles: Buffer,
    /// `[n * (used + 1), I]` in f16.
    pub(crate) hidden: Buffer,
    /// `[n * (used + 1), D]`.
    pub(crate) parts: Buffer,
}

/// A pass as the device sees it.
#[derive(Default)]
pub(crate) struct Current {
    /// Rows.
    pub(crate) n: usize,
    /// Positions that its rows can see: how far it goes back, or in a recorded pass, how far it may.
    pub(crate) reach: usize,
    /// Rows whose logits are wanted.
    pub(crate) outputs: Vec<usize>,
    /// How the sessions store rows.
    pub(crate) row: Option<RowShape>,
    /// Whether every row is the only one of its session.
    pub(crate) single: bool,
    /// Whether steps are looked at one by one: then each leaves what it should.
    pub(crate) observed: bool,
    /// Whether the experts' hidden activations are where products of many rows leave them.
    pub(crate) grouped: bool,
}

/// A device, and the layers that lie on it.
pub(crate) struct Stage {
    /// Its place among the stages.
    pub(crate) index: usize,
    /// Its layers.
    pub(crate) layers: Range<usize>,
    pub(crate) client: Client,
    pub(crate) shape: Shape,
    pub(crate) options: Options,
    pub(crate) abilities: Abilities,
    rope: RopeTables,
    /// Ratios of compressing layers, each with a set of angles.
    ratios: Vec<usize>,
    /// Tables of IQ2_XXS, for int8 and for f16.
    pub(crate) words: Buffer,
    pub(crate) pair_words: Buffer,
    /// `[n, 4]` token, position, base of the store, first position of the run; then the output rows; then `[sets, n, R]`
    /// cosines and sines.
    pub(crate) plan: Buffer,
    /// Bound where a kernel's argument is not used.
    pub(crate) nothing: [Buffer; 2],
    pub(crate) scratch: Scratch,
    pub(crate) current: Current,
    pub(crate) timer: Timer,
    /// Work that waits to become part of the next kernel.
    pub(crate) last_product: Option<LastProduct>,
    pub(crate) pending_join: Option<Join>,
    pub(crate) mixing: Option<Mixing>,
    pub(crate) unmixed: Option<Unmixed>,
    pub(crate) splits: Option<Splits>,
    pub(crate) halfway: Option<Halfway>,
    pub(crate) absorbing: Option<Absorbing>,
    pub(crate) norm: Option<Norm>,
    recorder: Recorder,
    /// The form of the pass, if it can be recorded.
    key: Option<Key>,
    arenas: Vec<Arc<Arena>>,
    staging: Staging,
}

impl Stage {
    /// Some layers of models of a shape, on a device.
    pub(crate) fn new(
        shape: &Shape,
        device: &DeviceInfo,
        index: usize,
        layers: Range<usize>,
        options: Options,
    ) -> Self {
        let mut client = device.client();
        pin_stream(&mut client);
        let hardware = &client.properties().hardware;
        let certain = hardware.plane_size_min == hardware.plane_size_max;
        let tile = usable_tile(&client).filter(|_| !options.exact);
        let abilities = Abilities {
            plane: hardware.plane_size_max,
            certain,
            units: hardware.max_units_per_cube,
            few: if tile.is_some() { FEW_ROWS } else { usize::MAX },
            tile,
            fragments: has_fragments(&client),
            ptx: ptx(client.properties()),
            bulk: ptx(client.properties()) && client.features().tma.contains(Tma::Base),
            shared: hardware.max_shared_memory_size,
            processors: hardware.num_streaming_multiprocessors.unwrap_or(0),
        };
        let rows = options.max_rows;
        let mut ratios: Vec<usize> = shape.layers.iter().filter_map(|k| k.ratio()).collect();
        ratios.sort_unstable();
        ratios.dedup();
        let few = rows.min(abilities.few);
        let f32s = |n: usize| Buffer::new(&client, 4 * n as u64);
        let index_width = shape.index_heads * shape.index_dim;
        let indexed = shape.layers.contains(&LayerKind::Indexed);
        let index_rows = if indexed { rows } else { 0 };
        let low = shape.out_rank * shape.out_groups;
        let scratch = Scratch {
            partial: f32s(crate::hyper::partial_values(shape, rows, &abilities)),
            totals: f32s(rows.min(FEW_ROWS) * crate::hyper::numbers(shape)),
            hidden: Rows::new(&client, few * (shape.experts_used + 1), shape.expert_width, true),
            shared: Some(Box::new([0, 1].map(|_| Rows::new(&client, few, shape.expert_width, false)))),
            grouped: (rows > abilities.few).then(|| {
                let tiles = crate::experts::room_for_tiles(rows, shape.experts_used, shape.experts);
                Grouped {
                    sorted: f32s(rows * shape.experts_used),
                    tiles: f32s(4 + 4 * tiles),
                    hidden: Buffer::zeroed(
                        &client,
                        (2 * rows * (shape.experts_used + 1) * shape.expert_width.next_multiple_of(64))
                            as u64,
                    ),
                    parts: f32s(rows * (shape.experts_used + 1) * shape.width.next_multiple_of(64)),
                }
            }),
            partials: f32s(if abilities.tile.is_some() { PARTIALS * shape.q_width() } else { 0 }),
            stats: f32s(2 * PARTIALS * shape.heads),
            told: Buffer::zeroed(
                &client,
                if abilities.bulk { told_bytes(shape.q_width(), low) as u64 } else { 0 },
            ),
            turn: Buffer::zeroed(&client, 4),
            scores: f32s(1),
            best: f32s(1),
            places: f32s(1),
            index_words: f32s(index_rows * index_width / 4),
            index_scales: f32s(index_rows * index_width / 32),
            finding: None,
            draft: None,
        };
        Stage {
            index,
            layers,
            rope: RopeTables::new(&shape.rope, shape.rotary),
            words: Buffer::from_slice(&client, &tables::words()),
            pair_words: Buffer::from_slice(&client, &tables::pair_words()),
            plan: f32s(5 * rows + 4 + (2 + ratios.len()) * rows * shape.rotary),
            nothing: [f32s(64), f32s(64)],
            ratios,
            scratch,
            current: Current::default(),
            timer: Timer::default(),
            last_product: None,
            pending_join: None,
            mixing: None,
            unmixed: None,
            splits: None,
            halfway: None,
            absorbing: None,
            norm: None,
            recorder: Recorder::default(),
            arenas: Vec::new(),
            staging: Staging::default(),
            shape: shape.clone(),
            options,
            abilities,
            client,
            key: None,
        }
    }

    /// Takes the rows of a tensor to the device, some at a time, so that little host memory is needed.
    pub(crate) fn upload(
        &mut self,
        tensor: &Tensor,
        format: Format,
        rows: usize,
        input: usize,
    ) -> Result<Matrix, BackendError> {
        // Writes that may wait for the device.
        const AHEAD: usize = 4;
        let parts = [format.quant_bytes(input), 2 * format.scales(input), format.sub_bytes(input)];
        let longest = parts.iter().copied().max().unwrap_or(1);
        if 2 * longest > PIECE {
            let name = tensor.name();
            return Err(BackendError::new(format!("tensor {name}: rows of {input} values are too long")));
        }
        let buffers = parts.map(|row| Buffer::new(&self.client, (rows * row) as u64));
        // An even number, so that parts of rows begin at whole words.
        let step = (PIECE / longest) & !1;
        for (i, first) in (0..rows).step_by(step).enumerate() {
            let count = step.min(rows - first);
            let mut pieces = parts.map(|row| (row > 0).then(|| self.staging.piece(&self.client)));
            let mut out = pieces.each_mut().map(|piece| piece.as_deref_mut().unwrap_or_default());
            pack(tensor, format, input, first, count, &mut out)?;
            for ((piece, buffer), row) in pieces.into_iter().zip(&buffers).zip(parts) {
                if let Some(piece) = piece {
                    let bytes = self.staging.lend(piece, (count * row).next_multiple_of(4));
                    buffer.write_bytes(&self.client, (first * row) as u64, bytes);
                }
            }
            if (i + 1).is_multiple_of(AHEAD) || first + count == rows {
                self.client.flush().map_err(device_error)?;
            }
        }
        let [quants, scales, sub] = buffers;
        let plane = if self.abilities.certain { self.abilities.plane as usize } else { 0 };
        Ok(Matrix { stage: self.index, quants, scales, sub, format, rows, input, plane })
    }

    pub(crate) fn format(&self, tensor: &Tensor) -> Result<Format, BackendError> {
        Format::of_tensor(tensor.name(), tensor.ty(), self.options.exact).ok_or_else(|| {
            BackendError::new(format!("tensor {}: no kernel for type {:?}", tensor.name(), tensor.ty()))
        })
    }

    /// Where angles begin in the plan: behind the rows and outputs, at a whole vector.
    fn first_angle(&self) -> usize {
        (5 * self.current.n).next_multiple_of(4)
    }

    /// First angle of a kind of layer at the rows' own positions, or at the first positions of the windows of a
    /// ratio that rows complete.
    pub(crate) fn angle_set(&self, kind: LayerKind, window: bool) -> u32 {
        let set = match kind.ratio() {
            None => 0,
            Some(_) if !window => 1,
            Some(r) => 2 + self.ratios.iter().position(|&x| x == r).unwrap_or(0),
        };
        (self.first_angle() + set * self.current.n * self.shape.rotary) as u32
    }

    /// Puts the plan and its angles on the device, in one piece.
    fn send_plan(&mut self, plan: &Plan, runs: &Runs<'_>) {
        let (n, rotary) = (plan.len(), self.shape.rotary);
        let mut words = Vec::with_capacity(self.first_angle() + self.sets() * n * rotary);
        for (r, &token) in plan.tokens.iter().enumerate() {
            let run = plan.run_of[r];
            let start = plan.runs[run].start;
            words.extend([token, plan.positions[r] as u32, runs[run].store[self.index].base, start as u32]);
        }
        words.extend(plan.outputs.iter().map(|&r| r as u32));
        words.resize(self.first_angle() + self.sets() * n * rotary, 0);
        let angles = &mut words[self.first_angle()..];
        let (rope, ratios) = (&self.rope, &self.ratios);
        // Sines take a while for thousands of rows.
        angles.par_chunks_mut(rotary).with_min_len(64).enumerate().for_each(|(i, row)| {
            angles_of(rope, ratios, i / n, plan.positions[i % n], row);
        });
        self.plan.write(&self.client, 0, bytemuck::cast_slice(&words).to_vec());
    }

    /// Sets of angles of a pass.
    fn sets(&self) -> usize {
        2 + self.ratios.len()
    }

    /// The form under which a pass can be recorded: one token of each of a few sessions, the logits of all.
    fn recordable(&self, form: PassForm, plan: &Plan, runs: &Runs<'_>, streams: &Rows) -> Option<Key> {
        let n = plan.len();
        let single = runs.len() == n && plan.outputs.len() == n && n <= MOST_RECORDED;
        let context = runs.iter().map(|r| r.store[self.index].layout.context).max()?;
        let end = plan.runs.iter().map(RunRows::end).max()?;
        let reach = end.next_power_of_two().max(LEAST_REACH).min(context.max(end));
        (single && !form.observed && !self.timer.is_on()).then(|| Key {
            draft: form.draft,
            n,
            reach,
            selects: plan.most_visible(4) > self.shape.index_top_k,
            streams: streams.values.id(),
            arena: runs.first().map_or(0, |r| r.store[self.index].arena.buffer.id()),
            scores: self.scratch.scores.id(),
        })
    }

    /// Starts or stops taking the time of every kernel, which slows everything down.
    pub(crate) fn time_kernels(&mut self, on: bool) {
        self.timer.switch(on);
    }

    /// Name, launches and seconds of every kernel since timing was switched on, the longest first.
    pub(crate) fn kernel_times(&self) -> Vec<(&'static str, usize, f64)> {
        self.timer.times()
    }

    /// The layout of the stores of a pass, which are alike but in length.
    pub(crate) fn layout<'a>(&self, runs: &'a Runs<'_>) -> Option<&'a Layout> {
        runs.first().map(|r| &r.store[self.index].layout)
    }

    /// The arena of the stores of a pass.
    pub(crate) fn arena(&self, runs: &Runs<'_>) -> Buffer {
        runs.first().map_or_else(|| self.nothing[0].clone(), |r| r.store[self.index].arena.buffer.clone())
    }

    /// Bytes a second that a large buffer is read at, measured now.
    pub(crate) fn bandwidth(&mut self) -> Option<f64> {
        crate::bandwidth::read(&self.client)
    }

    /// Looks at a pass and puts its plan on the device.
    pub(crate) fn prepare(
        &mut self,
        form: PassForm,
        plan: &Plan,
        runs: &Runs<'_>,
        streams: &Rows,
    ) -> Result<(), BackendError> {
        let first = runs.first().map(|r| Arc::as_ptr(&r.store[self.index].arena));
        if runs.iter().any(|r| Some(Arc::as_ptr(&r.store[self.index].arena)) != first) {
            return Err(BackendError::new(
                "sessions of one pass do not lie in one arena of GPU memory: their caches together are larger \
                 than was said when the backend was made",
            ));
        }
        self.key = self.recordable(form, plan, runs, streams);
        let end = plan.runs.iter().map(RunRows::end).max().unwrap_or(0);
        self.current.n = plan.len();
        self.current.single = runs.len() == plan.len();
        self.current.observed = form.observed;
        self.current.row = self.layout(runs).map(|l| self.sizes(l).row);
        (self.last_product, self.pending_join) = (None, None);
        (self.mixing, self.unmixed, self.absorbing, self.norm) = (None, None, None, None);
        (self.splits, self.halfway) = (None, None);
        self.current.reach = self.key.as_ref().map_or(end, |k| k.reach);
        self.current.outputs.clone_from(&plan.outputs);
        self.recorder.settle(&self.client, self.key.as_ref());
        self.send_plan(plan, runs);
        Ok(())
    }

    /// In which form products want `n` rows.
    pub(crate) fn form(&self, n: usize) -> Form {
        match () {
            () if self.options.exact => Form::Plain,
            () if n <= self.abilities.few => Form::Quantized,
            () if self.current.observed => Form::Both,
            () => Form::Halves,
        }
    }

    /// Whether the pass's steps have been recorded.
    pub(crate) fn recorded(&self) -> bool {
        self.key.as_ref().is_some_and(|k| self.recorder.has(k))
    }

    /// Starts the steps of the pass.
    pub(crate) fn start(&mut self) -> Result<(), BackendError> {
        self.recorder.begin(&self.client, self.key.clone())
    }

    /// Ends them.
    pub(crate) fn finish(&mut self) -> Result<(), BackendError> {
        // Of a pass whose logits nobody wants: what comes after it goes on from its streams.
        self.finish_join();
        self.recorder.end(&self.client)
    }

    /// Computes them from the recording.
    pub(crate) fn replay(&self) -> Result<(), BackendError> {
        self.key.as_ref().map_or(Ok(()), |k| self.recorder.replay(k))
    }

    /// An empty store of a layout of this device's layers, where `kv_bytes` are for all stores.
    pub(crate) fn store(&mut self, layout: &Layout, kv_bytes: u64) -> Result<Store, BackendError> {
        // The weights are there: what they came through is not needed any more.
        self.staging = Staging::default();
        let sizes = self.sizes(layout);
        self.reserve_scores(layout);
        for arena in &self.arenas {
            if let Some(store) = Store::new(&self.client, arena, layout, sizes)? {
                return Ok(store);
            }
        }
        self.arenas.retain(|a| !a.is_empty());
        let words = Store::words(layout, &sizes)?;
        // Here rows are padded to whole words, and regions begin at whole vectors: less than 2 % more.
        let padded = kv_bytes.saturating_add(kv_bytes / 64);
        let budget = u32::try_from(padded.max(LEAST_ARENA) / 4).unwrap_or(u32::MAX);
        let arena = Arena::new(&self.client, words.max(budget));
        self.arenas.push(Arc::clone(&arena));
        let store = Store::new(&self.client, &arena, layout, sizes)?;
        store.ok_or_else(|| BackendError::new("the cache of a session does not fit the GPU's arena"))
    }

    /// Waits, and copies the rows in use out. A join that is still to come adds to no rows but the streams.
    fn copy_out(&self, rows: &Rows, out: &mut [f32]) -> Result<(), BackendError> {
        let n = out.len() / rows.width.max(1);
        let bytes = rows.values.read(&self.client, 0, 4 * (n * rows.stride) as u64)?;
        for (out, row) in out.chunks_exact_mut(rows.width).zip(bytes.chunks_exact(4 * rows.stride)) {
            // Hosts of GPUs have their byte order.
            let values = bytemuck::cast_slice_mut::<f32, u8>(out);
            values.copy_from_slice(&row[..values.len()]);
        }
        Ok(())
    }

    /// The same, once all steps are done.
    pub(crate) fn read(&mut self, rows: &Rows, out: &mut [f32]) -> Result<(), BackendError> {
        self.finish_join();
        self.copy_out(rows, out)
    }

    pub(crate) fn read_routes(&self, routes: &Routes, out: &mut Vec<f32>) -> Result<(), BackendError> {
        let bytes = routes.ids.read(&self.client, 0, 4 * (routes.n * self.shape.experts_used) as u64)?;
        out.extend(bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b) as f32));
        Ok(())
    }

    /// Hidden activations of `n` rows, from where the experts' products left them.
    pub(crate) fn read_hidden(&self, n: usize, out: &mut Vec<f32>) -> Result<(), BackendError> {
        let (rows, width) = (n * (self.shape.experts_used + 1), self.shape.expert_width);
        let first = out.len();
        out.resize(first + rows * width, 0.0);
        match &self.scratch.grouped {
            Some(grouped) if self.current.grouped => {
                let stride = width.next_multiple_of(64);
                let bytes = grouped.hidden.read(&self.client, 0, 2 * (rows * stride) as u64)?;
                for (out, row) in out[first..].chunks_exact_mut(width).zip(bytes.chunks_exact(2 * stride)) {
                    let halves = row.as_chunks::<2>().0.iter().map(|h| half::f16::from_le_bytes(*h).to_f32());
                    out.iter_mut().zip(halves).for_each(|(o, h)| *o = h);
                }
                Ok(())
            }
            _ => self.copy_out(&self.scratch.hidden, &mut out[first..]),
        }
    }

    pub(crate) fn read_selection(
        &self,
        selection: &Selection,
        out: &mut Vec<f32>,
    ) -> Result<(), BackendError> {
        let top_k = self.shape.index_top_k;
        let ids = selection.ids.read(&self.client, 0, 4 * (selection.n * top_k) as u64)?;
        let plan = self.plan.read(&self.client, 0, 16 * selection.n as u64)?;
        for (ids, plan) in ids.chunks_exact(4 * top_k).zip(plan.as_chunks::<16>().0) {
            let position = u32::from_le_bytes([plan[4], plan[5], plan[6], plan[7]]);
            let chosen = (position as usize + 1) / 4 > top_k;
            let id = |b: &[u8; 4]| if chosen { u32::from_le_bytes(*b) as f32 } else { -1.0 };
            out.extend(ids.as_chunks::<4>().0.iter().map(id));
        }
        Ok(())
    }

    pub(crate) fn sizes(&self, layout: &Layout) -> Sizes {
        Sizes::new(&layout.codec, self.shape.norm_eps)
    }
}

/// Cosines and sines of a row of a set, as bits.
fn angles_of(rope: &RopeTables, ratios: &[usize], set: usize, position: usize, out: &mut [u32]) {
    let (table, position) = match set {
        0 => (&rope.plain, Some(position)),
        1 => (&rope.yarn, Some(position)),
        _ => {
            let ratio = ratios[set - 2];
            let completes = (position + 1).is_multiple_of(ratio);
            (&rope.yarn, completes.then(|| position + 1 - ratio))
        }
    };
    let mut pairs = vec![(1.0, 0.0); out.len() / 2];
    if let Some(p) = position {
        RopeTables::fill(table, p, &mut pairs);
    }
    for (out, (cos, sin)) in out.as_chunks_mut::<2>().0.iter_mut().zip(pairs) {
        *out = [f32::to_bits(cos), f32::to_bits(sin)];
    }
}

/// All work goes to one queue of the device, whichever thread asks for it: it is in order then, and a recording
/// sees all of it.
#[allow(unsafe_code)]
fn pin_stream(client: &mut Client) {
    // SAFETY: this client and its clones are the only ones that use the buffers made through it.
    unsafe { client.set_stream(StreamId::current()) };
}

/// Shapes that the kernels cannot compute.
pub(crate) fn check(shape: &Shape) -> Result<(), BackendError> {
    let require = |ok: bool, what: &str| {
        if ok { Ok(()) } else { Err(BackendError::new(format!("the GPU backend needs {what}"))) }
    };
    let group = shape.q_width() / shape.out_groups;
    require(shape.width.is_multiple_of(8), "a model width that is a multiple of 8")?;
    require(shape.head_dim.is_multiple_of(32), "heads of a multiple of 32 channels")?;
    require(shape.rotary.is_multiple_of(4), "a multiple of 4 rotary channels")?;
    require(group.is_multiple_of(32), "output groups of a multiple of 32 channels")?;
    require(shape.head_dim <= 2048, "heads of at most 2048 channels")?;
    require(shape.experts <= 2048, "at most 2048 experts")?;
    require(shape.index_top_k <= STRETCH, "a selection of at most 8192 rows")?;
    let n = shape.streams;
    require(crate::hyper::numbers(shape) <= MIX_UNITS, "fewer hyper-connection streams")?;
    // Units of a plane share comb, and the smallest plane has eight.
    require(n.is_power_of_two() && n <= 8, "1, 2, 4 or 8 hyper-connection streams")
}
