//! What a model needs of a device's memory, and what a token reads of it.

use crate::cache::{KvFormat, Layout, Part};
use crate::{LayerKind, Shape};
use ds4_gguf::{Gguf, TensorInfo};
use std::ops::Range;

/// Contexts are offered in steps of this many tokens.
const CONTEXT_STEP: usize = 1024;
/// Rows whose logits a pass computes at once, at most.
const HEAD_ROWS: usize = 16;

/// Bytes that a model needs on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// All tensors.
    pub weights: u64,
    /// The sessions' caches.
    pub cache: u64,
    /// Buffers of a pass.
    pub work: u64,
}

impl Needs {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.cache).saturating_add(self.work)
    }

    /// Whether a device with `memory` bytes holds it.
    pub fn fit(&self, memory: u64) -> bool {
        self.total() <= memory
    }
}

/// A model, and how it is to be run: from which its needs follow for any context.
#[derive(Clone, Debug)]
pub struct Sizing<'a> {
    /// Dimensions.
    pub shape: &'a Shape,
    /// Bytes of all tensors as the device stores them, the draft block's included.
    pub weights: u64,
    /// How the cache is stored.
    pub format: KvFormat,
    /// Whether there is a draft block.
    pub draft: bool,
    /// Most rows of a pass.
    pub max_rows: usize,
    /// Sessions that are open at once.
    pub sessions: usize,
}

impl Sizing<'_> {
    /// The needs with sessions of `context` tokens.
    pub fn needs(&self, context: usize) -> Needs {
        self.needs_of(0..self.shape.layers.len(), context)
    }

    /// The needs of a device that has some of the layers. Embeddings and head count as evenly spread: they differ by
    /// less than a layer.
    pub fn needs_of(&self, layers: Range<usize>, context: usize) -> Needs {
        let (count, all) = (layers.len() as u64, self.shape.layers.len() as u64);
        let mut layout = Layout::new(self.shape, self.format, self.draft, context, self.max_rows);
        let end = if layers.end as u64 == all { layout.layers.len() } else { layers.end };
        layout.layers = layout.layers[layers.start..end].to_vec();
        Needs {
            weights: (u128::from(self.weights) * u128::from(count)).div_ceil(u128::from(all.max(1))) as u64,
            cache: layout.bytes().saturating_mul(self.sessions as u64),
            work: work_bytes(self.shape, self.max_rows),
        }
    }

    /// Whether devices with so many bytes each hold it together.
    pub fn fit(&self, memory: &[u64], context: usize) -> bool {
        let parts = split_layers(self.shape.layers.len(), memory);
        !parts.is_empty()
            && parts.into_iter().zip(memory).all(|(part, &m)| self.needs_of(part, context).fit(m))
    }

    /// The largest context that devices with so many bytes each hold, up to the trained one and in steps of 1,024
    /// tokens; 0 if there is none.
    pub fn largest_context(&self, memory: &[u64]) -> usize {
        // Steps below `low` fit, those from `high` on do not.
        let (mut low, mut high) = (0, self.shape.context / CONTEXT_STEP + 1);
        while low + 1 < high {
            let middle = usize::midpoint(low, high);
            if self.fit(memory, middle * CONTEXT_STEP) { low = middle } else { high = middle }
        }
        low * CONTEXT_STEP
    }
}

/// Consecutive layers for each device, in proportion to the bytes that each has; evenly where those of one are unknown
/// (0). Every device gets a layer, as long as there are some: the result is shorter than `memory` where there are not.
pub fn split_layers(layers: usize, memory: &[u64]) -> Vec<Range<usize>> {
    let count = memory.len().min(layers);
    let even = memory.contains(&0);
    let share = |m: &u64| if even { 1.0 } else { *m as f64 };
    let total: f64 = memory[..count].iter().map(share).sum();
    let (mut start, mut sum) = (0, 0.0);
    let mut parts = Vec::with_capacity(count);
    for (i, m) in memory[..count].iter().enumerate() {
        sum += share(m);
        let end = (layers as f64 * sum / total).round() as usize;
        // One for this device, and one for each after it.
        let end = end.clamp(start + 1, layers - (count - 1 - i));
        parts.push(start..end);
        start = end;
    }
    parts
}

/// Bytes of a value of a pass's buffers: f32, and beside it f16 and int8 with scales, as a GPU keeps them.
const VALUE_BYTES: usize = 8;
/// Bytes of index scores and partial sums of attention that a GPU holds at once, whatever the pass.
const TILE_BYTES: u64 = 384 << 20;

/// Bytes of the buffers of a pass of up to `max_rows` rows on a GPU: those of [`crate::Pass`], the hidden activations
/// and outputs of the chosen experts, and tiles of scores.
pub fn work_bytes(shape: &Shape, max_rows: usize) -> u64 {
    let s = shape;
    let row = s.streams_width()
        + s.streams
        + s.streams * s.streams
        + 2 * s.width
        + 2 * s.q_rank
        + 2 * s.q_width()
        + s.head_dim
        + s.out_low_width()
        + 2 * (2 * s.head_dim)
        + 2 * (2 * s.index_dim)
        + s.index_heads * s.index_dim
        + s.index_heads
        + s.experts
        + s.index_top_k
        + 2 * s.experts_used;
    // Hidden activations in f16, outputs in f32.
    let experts = (s.experts_used + 1) * (2 * s.expert_width + 4 * s.width);
    let head = s.streams_width() + 2 * s.width + s.vocab;
    max_rows as u64 * (VALUE_BYTES * row + experts) as u64
        + (VALUE_BYTES * max_rows.min(HEAD_ROWS) * head) as u64
        + TILE_BYTES
}

/// Bytes of weights that a pass reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reads {
    /// Of tensors that every pass reads once, however many rows it has.
    pub dense: u64,
    /// Of all routed experts.
    pub experts: u64,
    /// Share of the experts that a token uses.
    pub used: f64,
}

impl Reads {
    /// Sums a file's tensors; the draft block is no part of a pass.
    pub fn of(file: &Gguf, shape: &Shape) -> Self {
        let per_token = |t: &TensorInfo| match t.name.as_str() {
            // Tables, of which a token reads one row.
            "token_embd.weight" => t.bytes / shape.vocab as u64,
            name if name.ends_with("ffn_gate_tid2eid.weight") => t.bytes / shape.vocab as u64,
            _ => t.bytes,
        };
        let (mut dense, mut experts) = (0, 0);
        for t in file.tensors().iter().filter(|t| !t.name.starts_with("mtp.")) {
            if t.name.contains("_exps.") { experts += t.bytes } else { dense += per_token(t) }
        }
        Reads { dense, experts, used: shape.experts_used as f64 / shape.experts as f64 }
    }

    /// Bytes that a pass of `rows` rows reads, where the rows choose experts independently of each other.
    pub fn pass(&self, rows: usize) -> u64 {
        let touched = 1.0 - (1.0 - self.used).powi(rows.min(1 << 20) as i32);
        self.dense + (self.experts as f64 * touched) as u64
    }
}

/// Bytes of its cache that a session of `len` tokens reads for the next token.
pub fn cache_read(layout: &Layout, top_k: usize, len: usize) -> u64 {
    let unit = |l, part| layout.unit_bytes(l, part) as u64;
    let layer = |l: usize| {
        let window = len.min(layout.window) as u64 * unit(l, Part::Window);
        let rows = layout.layers[l].ratio().map_or(0, |r| len / r);
        let compressed = match layout.layers[l] {
            LayerKind::Window => 0,
            // Nothing is scored where all rows are attended to.
            LayerKind::Indexed if rows <= top_k => rows as u64 * unit(l, Part::Rows),
            LayerKind::Indexed => rows as u64 * unit(l, Part::Keys) + top_k as u64 * unit(l, Part::Rows),
            LayerKind::Pooled { .. } => rows as u64 * unit(l, Part::Rows),
        };
        window + compressed
    };
    (0..layout.layers.len()).map(layer).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_follow_memory() {
        assert_eq!(split_layers(43, &[80, 80]), [0..22, 22..43]);
        assert_eq!(split_layers(43, &[24, 80, 24]), [0..8, 8..35, 35..43]);
        assert_eq!(split_layers(43, &[0, 80]), [0..22, 22..43]);
        assert_eq!(split_layers(4, &[1, 1000, 1]), [0..1, 1..3, 3..4]);
        assert_eq!(split_layers(2, &[5, 5, 5]), [0..1, 1..2]);
        assert_eq!(split_layers(43, &[7]).as_slice(), std::slice::from_ref(&(0..43)));
        assert_eq!(split_layers(43, &[]), []);
    }
}
