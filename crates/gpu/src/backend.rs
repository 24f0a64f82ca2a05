//! The backend: the layers of a model spread over one device or several, and the trait's methods, each a line over
//! the step of the device that has the layer at hand.

use crate::buffer::Buffer;
use crate::device::DeviceInfo;
use crate::rows::{Experts, Matrix, Routes, Rows, Selection, Table, Vector};
use crate::stage::{Stage, check};
use crate::store::Store;
use ds4_gguf::Tensor;
use ds4_model::cache::{Layout, Part};
use ds4_model::memory::split_layers;
use ds4_model::{
    Backend, BackendError, Best, Compressor, FeedForward, HeadMix, HyperConnection, LayerKind, Mtp, PassForm,
    Plan, Role, Run, Shape, Steps,
};
use std::collections::BTreeMap;
use std::ops::Range;

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

/// The GPU backend.
///
/// Each device has some consecutive layers, with their part of every session's cache. A pass goes through the devices
/// in order: when a layer of the next one comes up, the streams are carried there. Buffers and small weights exist on
/// every device, so a `Vec` is always one for each.
pub struct Gpu {
    stages: Vec<Stage>,
    /// The device whose layers are being computed.
    at: usize,
    /// The present pass's streams.
    streams: Vec<Buffer>,
    /// Bytes of a row of them.
    row_bytes: u64,
    /// Whether the present pass is computed from recordings.
    replays: bool,
    /// What went wrong in a step, which cannot say so itself.
    failed: Option<BackendError>,
    kv_bytes: u64,
}

impl Gpu {
    /// A backend for models of a shape on some devices, layers in proportion to their free memory. Devices beyond the
    /// number of layers stay idle.
    pub fn new(shape: &Shape, devices: &[DeviceInfo], options: Options) -> Result<Self, BackendError> {
        check(shape)?;
        let memory: Vec<u64> = devices.iter().map(DeviceInfo::usable).collect();
        let parts = split_layers(shape.layers.len(), &memory);
        let stages: Vec<Stage> = devices
            .iter()
            .zip(parts)
            .enumerate()
            .map(|(i, (device, layers))| Stage::new(shape, device, i, layers, options))
            .collect();
        if stages.is_empty() {
            return Err(BackendError::new("no GPU was named"));
        }
        Ok(Gpu {
            stages,
            at: 0,
            streams: Vec::new(),
            row_bytes: 0,
            replays: false,
            failed: None,
            kv_bytes: options.kv_bytes,
        })
    }

    /// Starts or stops taking the time of every kernel, which slows everything down.
    pub fn time_kernels(&mut self, on: bool) {
        self.stages.iter_mut().for_each(|s| s.time_kernels(on));
    }

    /// Name, launches and seconds of every kernel since timing was switched on, the longest first.
    pub fn kernel_times(&self) -> Vec<(&'static str, usize, f64)> {
        let mut all = BTreeMap::<_, (usize, f64)>::new();
        for (name, launches, seconds) in self.stages.iter().flat_map(Stage::kernel_times) {
            let entry = all.entry(name).or_default();
            *entry = (entry.0 + launches, entry.1 + seconds);
        }
        let mut all: Vec<_> = all.into_iter().map(|(name, (n, s))| (name, n, s)).collect();
        all.sort_by(|a, b| b.2.total_cmp(&a.2));
        all
    }

    /// Bytes a second that a large buffer of the first device is read at, measured now. Of several devices one reads
    /// at a time.
    pub fn bandwidth(&mut self) -> Option<f64> {
        self.stages.first_mut()?.bandwidth()
    }

    fn last(&self) -> usize {
        self.stages.len() - 1
    }

    /// The device of a layer; that of the draft block is the last.
    fn stage_of_layer(&self, layer: usize) -> usize {
        self.stages.iter().position(|s| layer < s.layers.end).unwrap_or(self.last())
    }

    /// The device of a tensor: embeddings lie on the first, what comes after the layers on the last.
    fn stage_of(&self, tensor: &Tensor) -> usize {
        let name = tensor.name();
        let layer = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse().ok());
        match layer {
            Some(layer) => self.stage_of_layer(layer),
            None if name.starts_with("token_embd") => 0,
            None => self.last(),
        }
    }

    /// The device at hand, and a layer's place on it.
    fn layer(&mut self, layer: usize) -> (&mut Stage, usize) {
        let stage = &mut self.stages[self.at];
        let first = stage.layers.start;
        (stage, layer - first)
    }

    /// Carries rows from a device's buffer to that of another.
    fn carry(&self, from: (usize, &Buffer), to: (usize, &Buffer), bytes: u64) -> Result<(), BackendError> {
        let read = from.1.read(&self.stages[from.0].client, 0, bytes)?;
        to.1.write_bytes(&self.stages[to.0].client, 0, read);
        Ok(())
    }

    /// Carries the streams to the next device and goes on there.
    fn advance(&mut self) -> Result<(), BackendError> {
        let (from, to) = (self.at, self.at + 1);
        let bytes = self.row_bytes * self.stages[from].current.n as u64;
        self.carry((from, &self.streams[from]), (to, &self.streams[to]), bytes)?;
        self.at = to;
        Ok(())
    }

    /// Goes on to the device of the coming steps, if it is not the one at hand.
    fn go_to(&mut self, stage: usize) {
        while self.at < stage && self.failed.is_none() {
            let moved = self.stages[self.at].finish().and_then(|()| self.advance());
            self.failed = moved.and_then(|()| self.stages[self.at].start()).err();
        }
    }

    /// Copies a vector to every device.
    fn on_all<T: bytemuck::NoUninit>(&self, values: &[T]) -> Vec<Buffer> {
        self.stages.iter().map(|s| Buffer::from_slice(&s.client, values)).collect()
    }
}

impl Backend for Gpu {
    type Matrix = Matrix;
    type Experts = Experts;
    type Vector = Vector;
    type Table = Table;
    type Rows = Vec<Rows>;
    type Routes = Vec<Routes>;
    type Selection = Vec<Selection>;
    type Store = Vec<Store>;

    fn begin(
        &mut self,
        form: PassForm,
        plan: &Plan,
        runs: &mut [Run<'_, Vec<Store>>],
        streams: &Vec<Rows>,
    ) -> Result<Steps, BackendError> {
        self.failed = None;
        self.at = if form.draft { self.last() } else { 0 };
        self.streams = streams.iter().map(|rows| rows.values.clone()).collect();
        self.row_bytes = 4 * streams[0].stride as u64;
        // The draft block may need embeddings of another device in the middle of a pass.
        let form = PassForm { observed: form.observed || (form.draft && self.last() > 0), ..form };
        for (stage, streams) in self.stages.iter_mut().zip(streams) {
            stage.prepare(form, plan, runs, streams)?;
        }
        self.replays = self.stages[self.at..].iter().all(Stage::recorded);
        if self.replays {
            return Ok(Steps::Recorded);
        }
        self.stages[self.at].start()?;
        Ok(Steps::Needed)
    }
    fn end(&mut self) -> Result<(), BackendError> {
        if let Some(failed) = self.failed.take() {
            return Err(failed);
        }
        if !self.replays {
            return self.stages[self.at].finish();
        }
        self.stages[self.at].replay()?;
        while self.at < self.last() {
            self.advance()?;
            self.stages[self.at].replay()?;
        }
        Ok(())
    }

    fn matrix(&mut self, tensor: &Tensor, out: usize, input: usize) -> Result<Matrix, BackendError> {
        let at = self.stage_of(tensor);
        let format = self.stages[at].format(tensor)?;
        self.stages[at].upload(tensor, format, out, input)
    }
    fn experts(
        &mut self,
        tensor: &Tensor,
        count: usize,
        out: usize,
        input: usize,
    ) -> Result<Experts, BackendError> {
        Ok(Experts { all: self.matrix(tensor, count * out, input)? })
    }
    fn vector(&mut self, values: Vec<f32>) -> Result<Vector, BackendError> {
        Ok(Vector { values: self.on_all(&values) })
    }
    fn table(&mut self, values: Vec<i32>, _width: usize) -> Result<Table, BackendError> {
        Ok(Table { values: self.on_all(&values) })
    }

    fn rows(&mut self, capacity: usize, width: usize) -> Result<Vec<Rows>, BackendError> {
        Ok(self.stages.iter().map(|s| Rows::new(&s.client, capacity, width, true)).collect())
    }
    fn routes(&mut self, capacity: usize) -> Result<Vec<Routes>, BackendError> {
        Ok(self.stages.iter().map(|s| Routes::new(&s.client, capacity * s.shape.experts_used)).collect())
    }
    fn selection(&mut self, capacity: usize) -> Result<Vec<Selection>, BackendError> {
        Ok(self.stages.iter().map(|s| Selection::new(&s.client, capacity * s.shape.index_top_k)).collect())
    }
    fn store(&mut self, layout: &Layout) -> Result<Vec<Store>, BackendError> {
        let (last, all) = (self.last(), layout.bytes().max(1) as f64);
        let part = |(i, stage): (usize, &mut Stage)| {
            // The last device has the draft block, too.
            let end = if i == last { layout.layers.len() } else { stage.layers.end };
            let part = Layout { layers: layout.layers[stage.layers.start..end].to_vec(), ..layout.clone() };
            let share = part.bytes() as f64 / all;
            stage.store(&part, (self.kv_bytes as f64 * share) as u64)
        };
        self.stages.iter_mut().enumerate().map(part).collect()
    }
    fn export(
        &mut self,
        store: &Vec<Store>,
        layer: usize,
        part: Part,
        range: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), BackendError> {
        let at = self.stage_of_layer(layer);
        let stage = &self.stages[at];
        store[at].export(&stage.client, layer - stage.layers.start, part, range, out)
    }
    fn import(
        &mut self,
        store: &mut Vec<Store>,
        layer: usize,
        part: Part,
        range: Range<usize>,
        bytes: &[u8],
    ) -> Result<(), BackendError> {
        let at = self.stage_of_layer(layer);
        let stage = &self.stages[at];
        store[at].import(&stage.client, layer - stage.layers.start, part, range, bytes)
    }
    fn read(&mut self, rows: &Vec<Rows>, out: &mut [f32]) -> Result<(), BackendError> {
        self.stages[self.at].read(&rows[self.at], out)
    }
    fn best(&mut self, logits: &Vec<Rows>, out: &mut Vec<Best>) -> Result<bool, BackendError> {
        self.stages[self.at].best_step(&logits[self.at], out)?;
        Ok(true)
    }
    fn set_rows(&mut self, rows: &mut Vec<Rows>, n: usize) {
        rows[self.at].n = n;
    }
    fn dims(&self, rows: &Vec<Rows>) -> (usize, usize) {
        (rows[self.at].n, rows[self.at].width)
    }
    fn read_routes(&mut self, routes: &Vec<Routes>, out: &mut Vec<f32>) -> Result<(), BackendError> {
        self.stages[self.at].read_routes(&routes[self.at], out)
    }
    fn read_hidden(&mut self, routes: &Vec<Routes>, out: &mut Vec<f32>) -> Result<(), BackendError> {
        self.stages[self.at].read_hidden(routes[self.at].n, out)
    }
    fn read_selection(&mut self, selection: &Vec<Selection>, out: &mut Vec<f32>) -> Result<(), BackendError> {
        self.stages[self.at].read_selection(&selection[self.at], out)
    }

    fn embed(&mut self, table: &Matrix, _plan: &Plan, streams: &mut Vec<Rows>) {
        let stage = &mut self.stages[self.at];
        let copies = stage.shape.streams;
        stage.embed_step(table, &mut streams[self.at], copies);
    }
    fn hc_split(
        &mut self,
        hc: &HyperConnection<Self>,
        norm: &Vector,
        streams: &Vec<Rows>,
        x: &mut Vec<Rows>,
        mix: &mut Vec<Rows>,
    ) {
        self.go_to(hc.mix.stage);
        let at = self.at;
        self.stages[at].hc_split_step(hc, norm, &streams[at], &mut x[at], &mut mix[at]);
    }
    fn hc_join(&mut self, y: &Vec<Rows>, mix: &Vec<Rows>, streams: &mut Vec<Rows>) {
        let at = self.at;
        self.stages[at].hc_join_step(&y[at], &mix[at], &mut streams[at]);
    }
    fn norm(&mut self, weight: &Vector, x: &Vec<Rows>, out: &mut Vec<Rows>) {
        self.stages[self.at].norm_step(weight, &x[self.at], &mut out[self.at]);
    }
    fn project(&mut self, x: &Vec<Rows>, jobs: &mut [(&Matrix, &mut Vec<Rows>)]) {
        let at = self.at;
        let mut jobs: Vec<_> = jobs.iter_mut().map(|(w, out)| (*w, &mut out[at])).collect();
        self.stages[at].project_step(&x[at], &mut jobs);
    }
    fn rotate_queries(&mut self, kind: LayerKind, _plan: &Plan, q: &mut Vec<Rows>) {
        self.stages[self.at].rotate_queries_step(kind, &mut q[self.at]);
    }
    fn push_window(
        &mut self,
        layer: usize,
        norm: &Vector,
        kv: &Vec<Rows>,
        _plan: &Plan,
        runs: &mut [Run<'_, Vec<Store>>],
    ) {
        let kv = &kv[self.at];
        let (stage, layer) = self.layer(layer);
        stage.push_window_step(layer, norm, kv, runs);
    }
    fn compress(
        &mut self,
        layer: usize,
        role: Role,
        compressor: &Compressor<Self>,
        kv: &Vec<Rows>,
        gate: &Vec<Rows>,
        _plan: &Plan,
        runs: &mut [Run<'_, Vec<Store>>],
    ) {
        let (kv, gate) = (&kv[self.at], &gate[self.at]);
        let (stage, layer) = self.layer(layer);
        stage.compress_step((layer, role), compressor, (kv, gate), runs);
    }
    fn select(
        &mut self,
        layer: usize,
        q: &mut Vec<Rows>,
        weights: &Vec<Rows>,
        _plan: &Plan,
        runs: &mut [Run<'_, Vec<Store>>],
        selection: &mut Vec<Selection>,
    ) {
        let at = self.at;
        let (stage, layer) = self.layer(layer);
        stage.select_step(layer, (&mut q[at], &weights[at]), runs, &mut selection[at]);
    }
    fn attend(
        &mut self,
        layer: usize,
        q: &Vec<Rows>,
        sinks: &Vector,
        selection: Option<&Vec<Selection>>,
        _plan: &Plan,
        runs: &mut [Run<'_, Vec<Store>>],
        out: &mut Vec<Rows>,
    ) {
        let at = self.at;
        let (stage, layer) = self.layer(layer);
        stage.attend_step(layer, (&q[at], sinks), selection.map(|s| &s[at]), runs, &mut out[at]);
    }
    fn project_groups(&mut self, w: &Matrix, heads: &Vec<Rows>, low: &mut Vec<Rows>) {
        self.stages[self.at].project_groups_step(w, &heads[self.at], &mut low[self.at]);
    }
    fn project_out(&mut self, w: &Matrix, low: &Vec<Rows>, y: &mut Vec<Rows>) {
        let at = self.at;
        self.stages[at].project_out_step(w, &low[at], &mut y[at]);
    }
    fn route(
        &mut self,
        ffn: &FeedForward<Self>,
        x: &Vec<Rows>,
        _plan: &Plan,
        logits: &mut Vec<Rows>,
        routes: &mut Vec<Routes>,
    ) {
        let at = self.at;
        self.stages[at].route_step(ffn, &x[at], &mut logits[at], &mut routes[at]);
    }
    fn experts_forward(
        &mut self,
        ffn: &FeedForward<Self>,
        x: &Vec<Rows>,
        routes: &Vec<Routes>,
        y: &mut Vec<Rows>,
    ) {
        let at = self.at;
        self.stages[at].experts_step(ffn, &x[at], &routes[at], &mut y[at]);
    }
    fn gather(&mut self, from: &Vec<Rows>, rows: &[usize], to: &mut Vec<Rows>) {
        self.stages[self.at].gather_step(&from[self.at], rows, &mut to[self.at]);
    }
    fn hc_head(&mut self, head: &HeadMix<Self>, streams: &Vec<Rows>, z: &mut Vec<Rows>) {
        self.stages[self.at].hc_head_step(head, &streams[self.at], &mut z[self.at]);
    }
    fn draft_input(&mut self, mtp: &Mtp<Self>, table: &Matrix, _plan: &Plan, streams: &mut Vec<Rows>) {
        let at = self.at;
        if table.stage != at {
            let (from, bytes) = self.stages[table.stage].draft_embed(table);
            let to = self.stages[at].draft_embeddings();
            self.failed = self.carry((table.stage, &from), (at, &to), bytes).err();
        }
        self.stages[at].draft_input_step(mtp, Some(table).filter(|t| t.stage == at), &mut streams[at]);
    }
}
