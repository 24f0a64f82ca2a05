//! What a device has to offer: the model's own steps.

use crate::cache::{Layout, Part};
use crate::{Best, Compressor, FeedForward, HeadMix, HyperConnection, LayerKind, Mtp, Plan, Role, Run};
use ds4_gguf::Tensor;
use std::ops::Range;

/// The device failed: out of memory, lost, or an unsupported tensor.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BackendError(String);

impl BackendError {
    /// An error with a message for the user.
    pub fn new(message: impl Into<String>) -> Self {
        BackendError(message.into())
    }
}

/// Whether a pass has to call the steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steps {
    /// Yes.
    Needed,
    /// The backend has recorded them.
    Recorded,
}

/// What a pass is of, besides its plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PassForm {
    /// The draft block instead of the model.
    pub draft: bool,
    /// Single steps are looked at.
    pub observed: bool,
}

/// A device that computes the model's steps.
///
/// All activations are f32 and row-major; a `Rows` buffer knows how many of its rows are in use, and a step
/// sets that of its outputs. Steps may be enqueued; [`Backend::read`] waits. Each row's result must not
/// depend on the other rows of the pass: that is what makes a batch, a prefill chunk and single steps agree
/// bit for bit.
pub trait Backend: Sized + Send {
    /// A weight matrix `[out, in]` on the device.
    type Matrix: Send + Sync;
    /// A stack of expert matrices `[experts, out, in]`.
    type Experts: Send + Sync;
    /// A vector of f32.
    type Vector: Send + Sync;
    /// A table of integers `[rows, width]`.
    type Table: Send + Sync;
    /// Activations `[rows, width]`.
    type Rows: Send;
    /// Chosen experts and their weights `[rows, used]`.
    type Routes: Send;
    /// Chosen compressed rows `[rows, top_k]`.
    type Selection: Send;
    /// The cache of one session.
    type Store: Send;

    /// Runs `f` where the backend's threads are; a pass is one such call.
    fn scope<R: Send>(&mut self, f: impl FnOnce(&mut Self) -> R + Send) -> R {
        f(self)
    }
    /// Starts a pass: `plan` and `runs` are what its steps will be given, `streams` is the buffer that all its
    /// layers share. Where nobody observes single steps, a backend may have recorded an earlier pass of the same
    /// form; it then answers [`Steps::Recorded`], and [`Backend::end`] computes all steps at once.
    fn begin(
        &mut self,
        _form: PassForm,
        _plan: &Plan,
        _runs: &mut [Run<'_, Self::Store>],
        _streams: &Self::Rows,
    ) -> Result<Steps, BackendError> {
        Ok(Steps::Needed)
    }
    /// Ends the steps of a pass, before its logits are read.
    fn end(&mut self) -> Result<(), BackendError> {
        Ok(())
    }

    // ---- loading -------------------------------------------------------------------------------------------

    /// Takes a matrix of `out` rows of `input` values; its type and size have been checked.
    fn matrix(&mut self, tensor: &Tensor, out: usize, input: usize) -> Result<Self::Matrix, BackendError>;
    /// Takes a stack of `count` matrices.
    fn experts(
        &mut self,
        tensor: &Tensor,
        count: usize,
        out: usize,
        input: usize,
    ) -> Result<Self::Experts, BackendError>;
    /// Takes a vector.
    fn vector(&mut self, values: Vec<f32>) -> Result<Self::Vector, BackendError>;
    /// Takes a table; its values have been checked.
    fn table(&mut self, values: Vec<i32>, width: usize) -> Result<Self::Table, BackendError>;

    // ---- buffers -------------------------------------------------------------------------------------------

    /// Activations of up to `capacity` rows.
    fn rows(&mut self, capacity: usize, width: usize) -> Result<Self::Rows, BackendError>;
    /// Routes of up to `capacity` rows.
    fn routes(&mut self, capacity: usize) -> Result<Self::Routes, BackendError>;
    /// Selections of up to `capacity` rows.
    fn selection(&mut self, capacity: usize) -> Result<Self::Selection, BackendError>;
    /// An empty session.
    fn store(&mut self, layout: &Layout) -> Result<Self::Store, BackendError>;
    /// Appends units `range` of a part of a layer to `out`, in the layout's byte format.
    fn export(
        &mut self,
        store: &Self::Store,
        layer: usize,
        part: Part,
        range: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), BackendError>;
    /// The inverse of [`Backend::export`].
    fn import(
        &mut self,
        store: &mut Self::Store,
        layer: usize,
        part: Part,
        range: Range<usize>,
        bytes: &[u8],
    ) -> Result<(), BackendError>;
    /// Waits for the device and copies the rows in use out.
    fn read(&mut self, rows: &Self::Rows, out: &mut [f32]) -> Result<(), BackendError>;
    /// Waits for the device and finds the [`BEST_TOKENS`](crate::BEST_TOKENS) largest of each row of logits in use; false
    /// where reading all is as fast.
    fn best(&mut self, _logits: &Self::Rows, _out: &mut Vec<Best>) -> Result<bool, BackendError> {
        Ok(false)
    }
    /// Says how many rows of a buffer are in use, where a recorded pass has filled them and no step was called.
    fn set_rows(&mut self, _rows: &mut Self::Rows, _n: usize) {}
    /// Rows in use and width of a buffer.
    fn dims(&self, rows: &Self::Rows) -> (usize, usize);
    /// The experts chosen for each row, for taps.
    fn read_routes(&mut self, routes: &Self::Routes, out: &mut Vec<f32>) -> Result<(), BackendError>;
    /// The hidden activations of the last [`Backend::experts_forward`] as the down projections met them, weighted, for
    /// taps: `[n, used + 1, I]`, the chosen experts ascending, the shared one last.
    fn read_hidden(&mut self, routes: &Self::Routes, out: &mut Vec<f32>) -> Result<(), BackendError>;
    /// The rows chosen for each row, -1 where fewer than `top_k` were chosen, for taps.
    fn read_selection(&mut self, selection: &Self::Selection, out: &mut Vec<f32>)
    -> Result<(), BackendError>;

    // ---- the model's steps, in order of use ----------------------------------------------------------------

    /// A.1: every stream of a row starts as its token's embedding. `streams`: `[n, N*D]`.
    fn embed(&mut self, table: &Self::Matrix, plan: &Plan, streams: &mut Self::Rows);
    /// A.3, A.2: mixes the streams into the sublayer's normed input `x [n, D]`; `mix [n, N + N*N]` keeps post
    /// and comb.
    fn hc_split(
        &mut self,
        hc: &HyperConnection<Self>,
        norm: &Self::Vector,
        streams: &Self::Rows,
        x: &mut Self::Rows,
        mix: &mut Self::Rows,
    );
    /// A.3: joins the sublayer's output `y [n, D]` into the streams.
    fn hc_join(&mut self, y: &Self::Rows, mix: &Self::Rows, streams: &mut Self::Rows);
    /// A.2: RMS norm of each row.
    fn norm(&mut self, weight: &Self::Vector, x: &Self::Rows, out: &mut Self::Rows);
    /// `out = W x` for several matrices with the same input.
    fn project(&mut self, x: &Self::Rows, jobs: &mut [(&Self::Matrix, &mut Self::Rows)]);
    /// A.5: unweighted norm and rotation of each query head, in place.
    fn rotate_queries(&mut self, kind: LayerKind, plan: &Plan, q: &mut Self::Rows);
    /// A.5: norm, rotation and rounding of the rows `kv [n, d]`; appends them to the sessions' windows.
    fn push_window(
        &mut self,
        layer: usize,
        norm: &Self::Vector,
        kv: &Self::Rows,
        plan: &Plan,
        runs: &mut [Run<'_, Self::Store>],
    );
    /// A.6: pools the projections of every window that this pass completes into a row or index key, and keeps
    /// those of the windows still open.
    fn compress(
        &mut self,
        layer: usize,
        role: Role,
        compressor: &Compressor<Self>,
        kv: &Self::Rows,
        gate: &Self::Rows,
        plan: &Plan,
        runs: &mut [Run<'_, Self::Store>],
    );
    /// A.7: the best compressed rows of each row that sees more than `top_k`. `q [n, IH*ID]` is unrotated.
    fn select(
        &mut self,
        layer: usize,
        q: &mut Self::Rows,
        weights: &Self::Rows,
        plan: &Plan,
        runs: &mut [Run<'_, Self::Store>],
        selection: &mut Self::Selection,
    );
    /// A.5: attention of each row over its window and its compressed rows (those selected, where `selection`
    /// is given), rotated back. `out`: `[n, H*d]`.
    fn attend(
        &mut self,
        layer: usize,
        q: &Self::Rows,
        sinks: &Self::Vector,
        selection: Option<&Self::Selection>,
        plan: &Plan,
        runs: &mut [Run<'_, Self::Store>],
        out: &mut Self::Rows,
    );
    /// A.5: the grouped first half of the output projection: group `g` of the heads meets rows `g` of `w`.
    fn project_groups(&mut self, w: &Self::Matrix, heads: &Self::Rows, low: &mut Self::Rows);
    /// A.5: its second half, the sublayer's output `y [n, D]`. A product like any other, but what follows is
    /// [`Backend::hc_join`]: a backend may make one step of both.
    fn project_out(&mut self, w: &Self::Matrix, low: &Self::Rows, y: &mut Self::Rows) {
        self.project(low, &mut [(w, y)]);
    }
    /// A.8: chooses experts by the router's `logits [n, E]` of `x`, or by token id, and weighs them.
    fn route(
        &mut self,
        ffn: &FeedForward<Self>,
        x: &Self::Rows,
        plan: &Plan,
        logits: &mut Self::Rows,
        routes: &mut Self::Routes,
    );
    /// A.8: shared expert plus the weighted sum of the routed ones, after [`Backend::route`] of the same rows.
    fn experts_forward(
        &mut self,
        ffn: &FeedForward<Self>,
        x: &Self::Rows,
        routes: &Self::Routes,
        y: &mut Self::Rows,
    );
    /// Copies some rows.
    fn gather(&mut self, from: &Self::Rows, rows: &[usize], to: &mut Self::Rows);
    /// A.3: the head's mix of the streams into `z [n, D]`.
    fn hc_head(&mut self, head: &HeadMix<Self>, streams: &Self::Rows, z: &mut Self::Rows);
    /// A.11: replaces the main model's final streams by the MTP block's input; the plan holds the next tokens.
    fn draft_input(&mut self, mtp: &Mtp<Self>, table: &Self::Matrix, plan: &Plan, streams: &mut Self::Rows);
}
