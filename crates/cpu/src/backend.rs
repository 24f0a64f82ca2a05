//! The backend: its buffers, and the trait's methods, each a line over the step in its module.

use crate::experts::Pairs;
use crate::kernels::{Kernels, Level};
use crate::matrix::{Experts, Matrix};
use crate::numa::Nodes;
use crate::rows::{Panel, Routes, Rows, Selection, Table};
use crate::select::Query;
use crate::store::Store;
use ds4_gguf::Tensor;
use ds4_model::cache::{Layout, Part};
use ds4_model::{
    Backend, BackendError, Compressor, FeedForward, HeadMix, HyperConnection, LayerKind, Mtp, Plan, Role,
    RopeTables, Run, Shape,
};
use std::ops::Range;
use std::sync::Arc;

/// How the backend computes.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Threads; 0 for one per core.
    pub threads: usize,
    /// f32 activations against decoded weights instead of int8 activations.
    pub exact: bool,
    /// Instruction set of the kernels.
    pub level: Level,
    /// Most rows of a pass.
    pub max_rows: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options { threads: 0, exact: false, level: Level::best(), max_rows: 256 }
    }
}

/// The CPU backend.
pub struct Cpu {
    pub(crate) shape: Shape,
    pub(crate) rope: RopeTables,
    pub(crate) kernels: Kernels,
    pub(crate) exact: bool,
    pub(crate) threads: usize,
    pub(crate) nodes: Nodes,
    pool: Arc<rayon::ThreadPool>,
    /// `0, 1, 2, ...`: the index of all rows.
    pub(crate) identity: Vec<u32>,
    /// int8 forms of a step's input.
    pub(crate) panel: Panel,
    /// int8 forms of the experts' hidden activations.
    pub(crate) hidden_panel: Panel,
    /// `[pairs, I]`.
    pub(crate) hidden: Rows,
    pub(crate) pairs: Pairs,
    /// `[out, n]`: products before they are laid out by row.
    pub(crate) products: Vec<f32>,
    /// `[n, (2+N)*N]` and `[n, N]`: control numbers of the hyper-connections.
    pub(crate) control: Rows,
    pub(crate) head_control: Rows,
    /// Window rows of a run before they go to their slots.
    pub(crate) encoded: Vec<u8>,
    /// Queries of the indexer, of a group of rows.
    pub(crate) queries: Vec<Query>,
    /// Index scores of a group of rows, those of one row in order, and a copy that is being ranked.
    pub(crate) scores: Vec<f32>,
    pub(crate) ranked: Vec<f32>,
    pub(crate) ranking: Vec<f32>,
}

impl Cpu {
    /// A backend for models of a shape.
    pub fn new(shape: &Shape, mut options: Options) -> Result<Self, BackendError> {
        if options.threads == 0 {
            options.threads = std::thread::available_parallelism().map_or(1, usize::from);
        }
        Cpu::on_nodes(shape, options, Nodes::of_machine(options.threads))
    }

    /// The same on given memory nodes.
    pub(crate) fn on_nodes(shape: &Shape, options: Options, nodes: Nodes) -> Result<Self, BackendError> {
        if shape.rotary / 2 > crate::attention::MAX_PAIRS {
            return Err(BackendError::new(format!(
                "{} rotary channels are more than this backend handles",
                shape.rotary
            )));
        }
        let bound = nodes.clone();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(options.threads)
            .thread_name(|i| format!("ds4-cpu-{i}"))
            .start_handler(move |i| bound.bind(i))
            .build()
            .map_err(|e| BackendError::new(format!("cannot start threads: {e}")))?;
        let rows = options.max_rows;
        let pairs = rows * (shape.experts_used + 1);
        Ok(Cpu {
            rope: RopeTables::new(&shape.rope, shape.rotary),
            kernels: Kernels::new(options.level),
            exact: options.exact,
            threads: pool.current_num_threads(),
            nodes,
            pool: Arc::new(pool),
            identity: (0..pairs.max(rows * shape.streams) as u32).collect(),
            panel: Panel::default(),
            hidden_panel: Panel::default(),
            hidden: Rows::new(pairs, shape.expert_width),
            pairs: Pairs::with_capacity(rows, shape.experts, shape.experts_used),
            products: Vec::new(),
            control: Rows::new(rows, shape.hc_mix()),
            head_control: Rows::new(rows, shape.streams),
            encoded: Vec::new(),
            queries: Vec::new(),
            scores: Vec::new(),
            ranked: Vec::new(),
            ranking: Vec::new(),
            shape: shape.clone(),
        })
    }

    /// Instruction set in use.
    pub fn level(&self) -> Level {
        self.kernels.level
    }

    /// Threads in use.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Memory nodes that these are bound to; 1 if to none.
    pub fn memory_nodes(&self) -> usize {
        self.nodes.count()
    }
}

impl Backend for Cpu {
    type Matrix = Matrix;
    type Experts = Experts;
    type Vector = Box<[f32]>;
    type Table = Table;
    type Rows = Rows;
    type Routes = Routes;
    type Selection = Selection;
    type Store = Store;

    fn scope<R: Send>(&mut self, f: impl FnOnce(&mut Self) -> R + Send) -> R {
        let pool = Arc::clone(&self.pool);
        pool.install(|| f(self))
    }

    fn matrix(&mut self, tensor: &Tensor, out: usize, input: usize) -> Result<Matrix, BackendError> {
        Matrix::new(self, tensor, out, input)
    }
    fn experts(
        &mut self,
        tensor: &Tensor,
        count: usize,
        out: usize,
        input: usize,
    ) -> Result<Experts, BackendError> {
        Experts::new(self, tensor, count, out, input)
    }
    fn vector(&mut self, values: Vec<f32>) -> Result<Box<[f32]>, BackendError> {
        Ok(values.into())
    }
    fn table(&mut self, values: Vec<i32>, width: usize) -> Result<Table, BackendError> {
        Ok(Table { width, values })
    }

    fn rows(&mut self, capacity: usize, width: usize) -> Result<Rows, BackendError> {
        Ok(Rows::new(capacity, width))
    }
    fn routes(&mut self, capacity: usize) -> Result<Routes, BackendError> {
        let used = self.shape.experts_used;
        Ok(Routes { used, n: 0, ids: vec![0; capacity * used], weights: vec![0.0; capacity * used] })
    }
    fn selection(&mut self, capacity: usize) -> Result<Selection, BackendError> {
        let top_k = self.shape.index_top_k;
        Ok(Selection { top_k, n: 0, ids: vec![0; capacity * top_k], chosen: vec![false; capacity] })
    }
    fn store(&mut self, layout: &Layout) -> Result<Store, BackendError> {
        self.reserve_scores(layout);
        Ok(Store::new(layout))
    }
    fn export(
        &mut self,
        store: &Store,
        layer: usize,
        part: Part,
        range: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), BackendError> {
        store.export(layer, part, range, out)
    }
    fn import(
        &mut self,
        store: &mut Store,
        layer: usize,
        part: Part,
        range: Range<usize>,
        bytes: &[u8],
    ) -> Result<(), BackendError> {
        store.import(layer, part, range, bytes)
    }
    fn read(&mut self, rows: &Rows, out: &mut [f32]) -> Result<(), BackendError> {
        out.copy_from_slice(rows.used());
        Ok(())
    }
    fn dims(&self, rows: &Rows) -> (usize, usize) {
        (rows.n, rows.width)
    }
    fn read_routes(&mut self, routes: &Routes, out: &mut Vec<f32>) -> Result<(), BackendError> {
        out.extend(routes.ids[..routes.n * routes.used].iter().map(|&id| id as f32));
        Ok(())
    }
    fn read_hidden(&mut self, routes: &Routes, out: &mut Vec<f32>) -> Result<(), BackendError> {
        self.pairs.unsort(&self.hidden, routes, out);
        Ok(())
    }
    fn read_selection(&mut self, selection: &Selection, out: &mut Vec<f32>) -> Result<(), BackendError> {
        let rows = selection.ids.chunks_exact(selection.top_k).zip(&selection.chosen).take(selection.n);
        out.extend(
            rows.flat_map(|(ids, &chosen)| ids.iter().map(move |&id| if chosen { id as f32 } else { -1.0 })),
        );
        Ok(())
    }

    fn embed(&mut self, table: &Matrix, plan: &Plan, streams: &mut Rows) {
        self.embed_step(table, plan, streams);
    }
    fn hc_split(
        &mut self,
        hc: &HyperConnection<Self>,
        norm: &Box<[f32]>,
        streams: &Rows,
        x: &mut Rows,
        mix: &mut Rows,
    ) {
        self.hc_split_step(hc, norm, streams, x, mix);
    }
    fn hc_join(&mut self, y: &Rows, mix: &Rows, streams: &mut Rows) {
        self.hc_join_step(y, mix, streams);
    }
    fn norm(&mut self, weight: &Box<[f32]>, x: &Rows, out: &mut Rows) {
        self.norm_step(weight, x, out);
    }
    fn project(&mut self, x: &Rows, jobs: &mut [(&Matrix, &mut Rows)]) {
        self.project_step(x, jobs);
    }
    fn rotate_queries(&mut self, kind: LayerKind, plan: &Plan, q: &mut Rows) {
        self.rotate_queries_step(kind, plan, q);
    }
    fn push_window(
        &mut self,
        layer: usize,
        norm: &Box<[f32]>,
        kv: &Rows,
        plan: &Plan,
        runs: &mut [Run<'_, Store>],
    ) {
        self.push_window_step(layer, norm, kv, plan, runs);
    }
    fn compress(
        &mut self,
        layer: usize,
        role: Role,
        compressor: &Compressor<Self>,
        kv: &Rows,
        gate: &Rows,
        plan: &Plan,
        runs: &mut [Run<'_, Store>],
    ) {
        self.compress_step((layer, role), compressor, (kv, gate), plan, runs);
    }
    fn select(
        &mut self,
        layer: usize,
        q: &mut Rows,
        weights: &Rows,
        plan: &Plan,
        runs: &mut [Run<'_, Store>],
        selection: &mut Selection,
    ) {
        self.select_step(layer, (q, weights), plan, runs, selection);
    }
    fn attend(
        &mut self,
        layer: usize,
        q: &Rows,
        sinks: &Box<[f32]>,
        selection: Option<&Selection>,
        plan: &Plan,
        runs: &mut [Run<'_, Store>],
        out: &mut Rows,
    ) {
        self.attend_step(layer, (q, sinks), selection, plan, runs, out);
    }
    fn project_groups(&mut self, w: &Matrix, heads: &Rows, low: &mut Rows) {
        self.project_groups_step(w, heads, low);
    }
    fn route(
        &mut self,
        ffn: &FeedForward<Self>,
        x: &Rows,
        plan: &Plan,
        logits: &mut Rows,
        routes: &mut Routes,
    ) {
        self.project(x, &mut [(&ffn.router, logits)]);
        self.route_step(&ffn.choice, logits, plan, routes);
    }
    fn experts_forward(&mut self, ffn: &FeedForward<Self>, x: &Rows, routes: &Routes, y: &mut Rows) {
        self.experts_step(ffn, x, routes, y);
    }
    fn gather(&mut self, from: &Rows, rows: &[usize], to: &mut Rows) {
        let width = from.width;
        for (out, &r) in to.take(rows.len()).chunks_exact_mut(width).zip(rows) {
            out.copy_from_slice(from.row(r));
        }
    }
    fn hc_head(&mut self, head: &HeadMix<Self>, streams: &Rows, z: &mut Rows) {
        self.hc_head_step(head, streams, z);
    }
    fn draft_input(&mut self, mtp: &Mtp<Self>, table: &Matrix, plan: &Plan, streams: &mut Rows) {
        self.draft_input_step(mtp, table, plan, streams);
    }
}
