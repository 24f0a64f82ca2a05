//! The backend: its buffers, the plan of a pass, and the trait's methods, each a line over the step in its module.

use crate::attention::{Absorbing, PARTIALS};
use crate::buffer::{Buffer, device_error};
use crate::device::{DeviceInfo, FEW_ROWS, usable_tile};
use crate::graph::{Key, Recorder};
use crate::hyper::Join;
use crate::kernels::cache::RowShape;
use crate::kernels::tables;
use crate::layout::{Format, Packed, pack};
use crate::rows::{Experts, Matrix, Routes, Rows, Selection, Table, Vector};
use crate::store::{Arena, Sizes, Store};
use crate::timer::Timer;
use cubecl::client::Client;
use cubecl_environment::stream::StreamId;
use ds4_gguf::Tensor;
use ds4_model::cache::{Layout, Part};
use ds4_model::{
    Backend, BackendError, Choice, Compressor, FeedForward, HeadMix, HyperConnection, LayerKind, Mtp,
    PassForm, Plan, Role, RopeTables, Run, RunRows, Shape, Steps,
};
use std::ops::Range;
use std::sync::Arc;

/// How the backend computes.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Decoded weights and f32 activations throughout.
    pub exact: bool,
    /// Most rows of a pass.
    pub max_rows: usize,
    /// Bytes for the caches of sessions. Sessions that are to share a pass must fit into them together; another
    /// gets memory of its own.
    pub kv_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options { exact: false, max_rows: 2048, kv_bytes: 64 << 20 }
    }
}

/// Most rows of a pass that is recorded.
const MOST_RECORDED: usize = FEW_ROWS;
/// Positions that a recorded pass reaches at the least; it reaches the next power of two.
const LEAST_REACH: usize = 1024;

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
    /// Bytes of shared memory of a cube.
    pub(crate) shared: usize,
}

/// Scratch of a pass, allocated once.
pub(crate) struct Scratch {
    /// `[n, parts, controls + 1]`: partial products of the hyper-connections.
    pub(crate) partial: Buffer,
    /// `[n * (used + 1), I]`: hidden activations of the experts.
    pub(crate) hidden: Rows,
    /// `[PARTIALS, H, d]` and `[PARTIALS, H, 2]`: sums of attention and what they are relative to.
    pub(crate) partials: Buffer,
    pub(crate) stats: Buffer,
    /// `[tile of rows, keys]`: index scores.
    pub(crate) scores: Buffer,
    /// int8 index queries `[n, IH * ID]`, and their scales.
    pub(crate) index_words: Buffer,
    pub(crate) index_scales: Buffer,
    /// What products of experts with many rows need.
    pub(crate) grouped: Option<Grouped>,
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
}

/// The GPU backend.
pub struct Gpu {
    pub(crate) client: Client,
    pub(crate) shape: Shape,
    pub(crate) options: Options,
    pub(crate) abilities: Abilities,
    rope: RopeTables,
    /// Ratios of compressing layers, each with a set of angles.
    ratios: Vec<usize>,
    /// Tables of IQ2_XXS, for int8 and for f16.
    pub(crate) words: Buffer,
    pub(crate) half_words: Buffer,
    /// `[n, 4]` token, position, base of the store, first position of the run; then the output rows.
    pub(crate) plan: Buffer,
    /// `[sets, n, R]` cosines and sines.
    pub(crate) angles: Buffer,
    /// Bound where a kernel's argument is not used.
    pub(crate) nothing: [Buffer; 2],
    pub(crate) scratch: Scratch,
    pub(crate) current: Current,
    pub(crate) timer: Timer,
    /// Work that waits to become part of the next kernel.
    pub(crate) pending_join: Option<Join>,
    pub(crate) absorbing: Option<Absorbing>,
    recorder: Recorder,
    arenas: Vec<Arc<Arena>>,
    staging: Packed,
}

impl Gpu {
    /// A backend for models of a shape, on the one device given.
    pub fn new(shape: &Shape, devices: &[DeviceInfo], options: Options) -> Result<Self, BackendError> {
        let [device] = devices else {
            return Err(BackendError::new(format!(
                "{} GPUs were named; a model lies on one: name it with --device N",
                devices.len()
            )));
        };
        check(shape)?;
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
            shared: hardware.max_shared_memory_size,
        };
        let rows = options.max_rows;
        let mut ratios: Vec<usize> = shape.layers.iter().filter_map(|k| k.ratio()).collect();
        ratios.sort_unstable();
        ratios.dedup();
        let few = rows.min(abilities.few);
        let f32s = |n: usize| Buffer::new(&client, 4 * n as u64);
        let hyper = crate::hyper::hyper(shape, &abilities, shape.hc_mix(), shape.streams_width());
        let index_width = shape.index_heads * shape.index_dim;
        let indexed = shape.layers.contains(&LayerKind::Indexed);
        let index_rows = if indexed { rows } else { 0 };
        let scratch = Scratch {
            partial: f32s(rows * hyper.parts() * (hyper.controls + 1)),
            hidden: Rows::new(&client, few * (shape.experts_used + 1), shape.expert_width, true),
            grouped: (rows > abilities.few).then(|| {
                let tiles = rows * shape.experts_used / crate::experts::TILE_ROWS + shape.experts;
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
            scores: f32s(1),
            index_words: f32s(index_rows * index_width / 4),
            index_scales: f32s(index_rows * index_width / 32),
            draft: None,
        };
        Ok(Gpu {
            rope: RopeTables::new(&shape.rope, shape.rotary),
            words: Buffer::from_slice(&client, &tables::words()),
            half_words: Buffer::from_slice(&client, &tables::half_words()),
            plan: f32s(5 * rows),
            angles: f32s((2 + ratios.len()) * rows * shape.rotary),
            nothing: [f32s(64), f32s(64)],
            ratios,
            scratch,
            current: Current::default(),
            timer: Timer::default(),
            pending_join: None,
            absorbing: None,
            recorder: Recorder::default(),
            arenas: Vec::new(),
            staging: Packed::default(),
            shape: shape.clone(),
            options,
            abilities,
            client,
        })
    }

    /// Takes the rows of a tensor to the device, some at a time, so that little host memory is needed.
    fn upload(
        &mut self,
        tensor: &Tensor,
        format: Format,
        rows: usize,
        input: usize,
    ) -> Result<Matrix, BackendError> {
        const CHUNK: usize = 64 << 20;
        let (q, s, b) = (format.quant_bytes(input), 2 * format.scales(input), format.sub_bytes(input));
        let buffer = |row: usize| Buffer::new(&self.client, (rows * row) as u64);
        let (quants, scales, sub) = (buffer(q), buffer(s), buffer(b));
        let step = (CHUNK / q).clamp(1, rows).next_multiple_of(2);
        let mut first = 0;
        while first < rows {
            let count = step.min(rows - first);
            pack(tensor, format, input, first, count, &mut self.staging)?;
            for (buffer, bytes, row) in [
                (&quants, &mut self.staging.quants, q),
                (&scales, &mut self.staging.scales, s),
                (&sub, &mut self.staging.sub, b),
            ] {
                if row > 0 {
                    let mut bytes = std::mem::take(bytes);
                    bytes.resize(bytes.len().next_multiple_of(4), 0);
                    buffer.write(&self.client, (first * row) as u64, bytes);
                }
            }
            first += count;
        }
        self.client.flush().map_err(device_error)?;
        let plane = if self.abilities.certain { self.abilities.plane as usize } else { 0 };
        Ok(Matrix { quants, scales, sub, format, rows, input, plane })
    }

    fn format(&self, tensor: &Tensor) -> Result<Format, BackendError> {
        // Control numbers and embeddings are read in plain types only.
        let plain = tensor.name().contains("hc_") || tensor.name().starts_with("token_embd");
        let format = Format::of(tensor.ty(), self.options.exact);
        let format = match format {
            Some(Format::Q8) if tensor.name().starts_with("token_embd") => format,
            Some(f) if plain && f.int8() => Some(Format::F32),
            f => f,
        };
        format.ok_or_else(|| {
            BackendError::new(format!("tensor {}: no kernel for type {:?}", tensor.name(), tensor.ty()))
        })
    }

    /// First angle of a kind of layer at the rows' own positions, or at the first positions of the windows of a
    /// ratio that rows complete.
    pub(crate) fn angle_set(&self, kind: LayerKind, window: bool) -> u32 {
        let set = match kind.ratio() {
            None => 0,
            Some(_) if !window => 1,
            Some(r) => 2 + self.ratios.iter().position(|&x| x == r).unwrap_or(0),
        };
        (set * self.options.max_rows * self.shape.rotary) as u32
    }

    /// Puts the plan on the device.
    fn send_plan(&mut self, plan: &Plan, runs: &[Run<'_, Store>]) {
        let rows = self.options.max_rows;
        let mut words = Vec::with_capacity(5 * plan.len());
        for (r, &token) in plan.tokens.iter().enumerate() {
            let run = plan.run_of[r];
            let start = plan.runs[run].start;
            words.extend([token, plan.positions[r] as u32, runs[run].store.base, start as u32]);
        }
        self.plan.write(&self.client, 0, bytemuck::cast_slice(&words).to_vec());
        let outputs: Vec<u32> = plan.outputs.iter().map(|&r| r as u32).collect();
        if !outputs.is_empty() {
            self.plan.write(&self.client, 16 * rows as u64, bytemuck::cast_slice(&outputs).to_vec());
        }
        let sets = 2 + self.ratios.len();
        let mut pairs = vec![(0.0, 0.0); self.shape.rotary / 2];
        for set in 0..sets {
            let mut values: Vec<f32> = Vec::with_capacity(plan.len() * self.shape.rotary);
            for &position in &plan.positions {
                let (table, position) = match set {
                    0 => (&self.rope.plain, Some(position)),
                    1 => (&self.rope.yarn, Some(position)),
                    _ => {
                        let ratio = self.ratios[set - 2];
                        let completes = (position + 1).is_multiple_of(ratio);
                        (&self.rope.yarn, completes.then(|| position + 1 - ratio))
                    }
                };
                match position {
                    Some(p) => RopeTables::fill(table, p, &mut pairs),
                    None => pairs.fill((1.0, 0.0)),
                }
                values.extend(pairs.iter().flat_map(|&(cos, sin)| [cos, sin]));
            }
            let at = 4 * set * rows * self.shape.rotary;
            self.angles.write(&self.client, at as u64, bytemuck::cast_slice(&values).to_vec());
        }
    }

    /// The form under which a pass can be recorded: one token of each of a few sessions, the logits of all.
    fn recordable(
        &self,
        form: PassForm,
        plan: &Plan,
        runs: &[Run<'_, Store>],
        streams: &Rows,
    ) -> Option<Key> {
        let n = plan.len();
        let single = runs.len() == n && plan.outputs.len() == n && n <= MOST_RECORDED;
        let context = runs.iter().map(|r| r.store.layout.context).max()?;
        let end = plan.runs.iter().map(RunRows::end).max()?;
        let reach = end.next_power_of_two().max(LEAST_REACH).min(context.max(end));
        (single && !form.observed && !self.timer.is_on()).then(|| Key {
            draft: form.draft,
            n,
            reach,
            selects: plan.most_visible(4) > self.shape.index_top_k,
            streams: streams.values.id(),
            arena: runs.first().map_or(0, |r| r.store.arena.buffer.id()),
        })
    }

    /// Starts or stops taking the time of every kernel, which slows everything down.
    pub fn time_kernels(&mut self, on: bool) {
        self.timer.switch(on);
    }

    /// Name, launches and seconds of every kernel since timing was switched on, the longest first.
    pub fn kernel_times(&self) -> Vec<(&'static str, usize, f64)> {
        self.timer.times()
    }

    /// The arena of the stores of a pass.
    pub(crate) fn arena(&self, runs: &[Run<'_, Store>]) -> Buffer {
        runs.first().map_or_else(|| self.nothing[0].clone(), |r| r.store.arena.buffer.clone())
    }

    /// Bytes a second that a large buffer is read at, measured now.
    pub fn bandwidth(&mut self) -> Option<f64> {
        crate::bandwidth::read(&self.client)
    }

    pub(crate) fn sizes(&self, layout: &Layout) -> Sizes {
        Sizes::new(&layout.codec, self.shape.norm_eps)
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
fn check(shape: &Shape) -> Result<(), BackendError> {
    let require = |ok: bool, what: &str| {
        if ok { Ok(()) } else { Err(BackendError::new(format!("the GPU backend needs {what}"))) }
    };
    let group = shape.q_width() / shape.out_groups;
    require(shape.width.is_multiple_of(8), "a model width that is a multiple of 8")?;
    require(shape.head_dim.is_multiple_of(32), "heads of a multiple of 32 channels")?;
    require(shape.rotary.is_multiple_of(4), "a multiple of 4 rotary channels")?;
    require(group.is_multiple_of(32), "output groups of a multiple of 32 channels")?;
    require(shape.head_dim <= 2048, "heads of at most 2048 channels")?;
    require(shape.experts <= 2048, "at most 2048 experts")
}

impl Backend for Gpu {
    type Matrix = Matrix;
    type Experts = Experts;
    type Vector = Vector;
    type Table = Table;
    type Rows = Rows;
    type Routes = Routes;
    type Selection = Selection;
    type Store = Store;

    fn begin(
        &mut self,
        form: PassForm,
        plan: &Plan,
        runs: &mut [Run<'_, Store>],
        streams: &Rows,
    ) -> Result<Steps, BackendError> {
        let first = runs.first().map(|r| Arc::as_ptr(&r.store.arena));
        if runs.iter().any(|r| Some(Arc::as_ptr(&r.store.arena)) != first) {
            return Err(BackendError::new(
                "sessions of one pass do not lie in one arena of GPU memory: their caches together are larger \
                 than was said when the backend was made",
            ));
        }
        let key = self.recordable(form, plan, runs, streams);
        let end = plan.runs.iter().map(RunRows::end).max().unwrap_or(0);
        self.current.n = plan.len();
        self.current.single = runs.len() == plan.len();
        self.current.observed = form.observed;
        self.current.row = runs.first().map(|r| self.sizes(&r.store.layout).row);
        (self.pending_join, self.absorbing) = (None, None);
        self.current.reach = key.as_ref().map_or(end, |k| k.reach);
        self.current.outputs.clone_from(&plan.outputs);
        self.recorder.settle(&self.client, key.as_ref());
        self.send_plan(plan, runs);
        self.recorder.begin(&self.client, key)
    }
    fn end(&mut self) -> Result<(), BackendError> {
        // Of a pass whose logits nobody wants: the draft block goes on from its streams.
        self.finish_join();
        self.recorder.end(&self.client)
    }

    fn matrix(&mut self, tensor: &Tensor, out: usize, input: usize) -> Result<Matrix, BackendError> {
        let format = self.format(tensor)?;
        self.upload(tensor, format, out, input)
    }
    fn experts(
        &mut self,
        tensor: &Tensor,
        count: usize,
        out: usize,
        input: usize,
    ) -> Result<Experts, BackendError> {
        let format = self.format(tensor)?;
        Ok(Experts { all: self.upload(tensor, format, count * out, input)? })
    }
    fn vector(&mut self, values: Vec<f32>) -> Result<Vector, BackendError> {
        Ok(Vector { values: Buffer::from_slice(&self.client, &values) })
    }
    fn table(&mut self, values: Vec<i32>, _width: usize) -> Result<Table, BackendError> {
        Ok(Table { values: Buffer::from_slice(&self.client, &values) })
    }

    fn rows(&mut self, capacity: usize, width: usize) -> Result<Rows, BackendError> {
        Ok(Rows::new(&self.client, capacity, width, true))
    }
    fn routes(&mut self, capacity: usize) -> Result<Routes, BackendError> {
        let bytes = 4 * (capacity * self.shape.experts_used) as u64;
        Ok(Routes {
            n: 0,
            ids: Buffer::zeroed(&self.client, bytes),
            weights: Buffer::zeroed(&self.client, bytes),
        })
    }
    fn selection(&mut self, capacity: usize) -> Result<Selection, BackendError> {
        let bytes = 4 * (capacity * self.shape.index_top_k) as u64;
        Ok(Selection { n: 0, ids: Buffer::zeroed(&self.client, bytes) })
    }
    fn store(&mut self, layout: &Layout) -> Result<Store, BackendError> {
        let sizes = self.sizes(layout);
        self.reserve_scores(layout);
        for arena in &self.arenas {
            if let Some(store) = Store::new(&self.client, arena, layout, sizes)? {
                return Ok(store);
            }
        }
        self.arenas.retain(|a| !a.is_empty());
        let words = Store::words(layout, &sizes)?;
        let budget = u32::try_from(self.options.kv_bytes.max(LEAST_ARENA) / 4).unwrap_or(u32::MAX);
        let arena = Arena::new(&self.client, words.max(budget));
        self.arenas.push(Arc::clone(&arena));
        let store = Store::new(&self.client, &arena, layout, sizes)?;
        store.ok_or_else(|| BackendError::new("the cache of a session does not fit the GPU's arena"))
    }
    fn export(
        &mut self,
        store: &Store,
        layer: usize,
        part: Part,
        range: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), BackendError> {
        store.export(&self.client, layer, part, range, out)
    }
    fn import(
        &mut self,
        store: &mut Store,
        layer: usize,
        part: Part,
        range: Range<usize>,
        bytes: &[u8],
    ) -> Result<(), BackendError> {
        store.import(&self.client, layer, part, range, bytes)
    }
    fn read(&mut self, rows: &Rows, out: &mut [f32]) -> Result<(), BackendError> {
        self.finish_join();
        let n = out.len() / rows.width.max(1);
        let bytes = rows.values.read(&self.client, 0, 4 * (n * rows.stride) as u64)?;
        for (out, row) in out.chunks_exact_mut(rows.width).zip(bytes.chunks_exact(4 * rows.stride)) {
            for (o, b) in out.iter_mut().zip(row.as_chunks::<4>().0) {
                *o = f32::from_le_bytes(*b);
            }
        }
        Ok(())
    }
    fn dims(&self, rows: &Rows) -> (usize, usize) {
        (rows.n, rows.width)
    }
    fn read_routes(&mut self, routes: &Routes, out: &mut Vec<f32>) -> Result<(), BackendError> {
        let bytes = routes.ids.read(&self.client, 0, 4 * (routes.n * self.shape.experts_used) as u64)?;
        out.extend(bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b) as f32));
        Ok(())
    }
    fn read_selection(&mut self, selection: &Selection, out: &mut Vec<f32>) -> Result<(), BackendError> {
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

    fn embed(&mut self, table: &Matrix, _plan: &Plan, streams: &mut Rows) {
        let copies = self.shape.streams;
        self.embed_step(table, streams, copies);
    }
    fn hc_split(
        &mut self,
        hc: &HyperConnection<Self>,
        norm: &Vector,
        streams: &Rows,
        x: &mut Rows,
        mix: &mut Rows,
    ) {
        self.hc_split_step(hc, norm, streams, x, mix);
    }
    fn hc_join(&mut self, y: &Rows, mix: &Rows, streams: &mut Rows) {
        self.hc_join_step(y, mix, streams);
    }
    fn norm(&mut self, weight: &Vector, x: &Rows, out: &mut Rows) {
        self.norm_step(weight, x, out);
    }
    fn project(&mut self, x: &Rows, jobs: &mut [(&Matrix, &mut Rows)]) {
        self.project_step(x, jobs);
    }
    fn rotate_queries(&mut self, kind: LayerKind, _plan: &Plan, q: &mut Rows) {
        self.rotate_queries_step(kind, q);
    }
    fn push_window(
        &mut self,
        layer: usize,
        norm: &Vector,
        kv: &Rows,
        _plan: &Plan,
        runs: &mut [Run<'_, Store>],
    ) {
        self.push_window_step(layer, norm, kv, runs);
    }
    fn compress(
        &mut self,
        layer: usize,
        role: Role,
        compressor: &Compressor<Self>,
        kv: &Rows,
        gate: &Rows,
        _plan: &Plan,
        runs: &mut [Run<'_, Store>],
    ) {
        self.compress_step((layer, role), compressor, (kv, gate), runs);
    }
    fn select(
        &mut self,
        layer: usize,
        q: &mut Rows,
        weights: &Rows,
        _plan: &Plan,
        runs: &mut [Run<'_, Store>],
        selection: &mut Selection,
    ) {
        self.select_step(layer, (q, weights), runs, selection);
    }
    fn attend(
        &mut self,
        layer: usize,
        q: &Rows,
        sinks: &Vector,
        selection: Option<&Selection>,
        _plan: &Plan,
        runs: &mut [Run<'_, Store>],
        out: &mut Rows,
    ) {
        self.attend_step(layer, (q, sinks), selection, runs, out);
    }
    fn project_groups(&mut self, w: &Matrix, heads: &Rows, low: &mut Rows) {
        self.project_groups_step(w, heads, low);
    }
    fn route(&mut self, choice: &Choice<Self>, logits: &Rows, _plan: &Plan, routes: &mut Routes) {
        self.route_step(choice, logits, routes);
    }
    fn experts_forward(&mut self, ffn: &FeedForward<Self>, x: &Rows, routes: &Routes, y: &mut Rows) {
        self.experts_step(ffn, x, routes, y);
    }
    fn gather(&mut self, from: &Rows, rows: &[usize], to: &mut Rows) {
        self.gather_step(from, rows, to);
    }
    fn hc_head(&mut self, head: &HeadMix<Self>, streams: &Rows, z: &mut Rows) {
        self.hc_head_step(head, streams, z);
    }
    fn draft_input(&mut self, mtp: &Mtp<Self>, table: &Matrix, _plan: &Plan, streams: &mut Rows) {
        self.draft_input_step(mtp, table, streams);
    }
}
