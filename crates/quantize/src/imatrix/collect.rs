//! Takes the moments while a model runs.

use super::{Imatrix, Moments};
use ds4_model::{Shape, Tap};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Tensors that a step's input meets, by the step's name: one set of moments serves them all.
const DENSE: [(&str, &[&str]); 7] = [
    (
        "attn_in",
        &[
            "attn_q_a",
            "attn_kv",
            "attn_compressor_kv",
            "attn_compressor_gate",
            "indexer.proj",
            "indexer_compressor_kv",
            "indexer_compressor_gate",
        ],
    ),
    ("q_low", &["attn_q_b", "indexer.attn_q_b"]),
    ("heads", &["attn_output_a"]),
    ("out_low", &["attn_output_b"]),
    ("ffn_in", &["ffn_gate_inp", "ffn_gate_shexp", "ffn_up_shexp"]),
    ("hidden", &["ffn_down_shexp"]),
    ("output_in", &["output"]),
];

/// Sums of squares of the inputs of a stack of matrices, in more digits than they are kept with.
#[derive(Clone, Default)]
struct Sums {
    sums: Vec<f64>,
    counts: Vec<u64>,
}

/// Columns that a thread sums up.
const COLUMNS: usize = 512;

impl Sums {
    /// The rows, the first `width` of every `stride` values, all meet the only matrix.
    fn add(&mut self, width: usize, rows: &[f32], stride: usize) {
        self.sums.resize(width, 0.0);
        self.counts.resize(1, 0);
        self.counts[0] += rows.len().div_ceil(stride) as u64;
        self.sums.par_chunks_mut(COLUMNS).enumerate().for_each(|(i, sums)| {
            for row in rows.chunks(stride) {
                add_squares(sums, &row[i * COLUMNS..]);
            }
        });
    }

    /// Row `i` meets matrix `ids[i]`.
    fn add_routed<'a>(
        &mut self,
        matrices: usize,
        width: usize,
        ids: &[f32],
        row: impl Fn(usize) -> &'a [f32] + Sync,
    ) {
        self.sums.resize(matrices * width, 0.0);
        self.counts.resize(matrices, 0);
        let counts = self.counts.par_iter_mut().enumerate();
        counts.zip(self.sums.par_chunks_mut(width)).for_each(|((matrix, count), sums)| {
            for (i, _) in ids.iter().enumerate().filter(|(_, id)| **id as usize == matrix) {
                *count += 1;
                add_squares(sums, row(i));
            }
        });
    }

    fn moments(&self) -> Moments {
        Moments {
            sums: self.sums.iter().map(|&s| s as f32).collect(),
            counts: self.counts.iter().map(|&c| c as f32).collect(),
        }
    }
}

fn add_squares(sums: &mut [f64], row: &[f32]) {
    sums.iter_mut().zip(row).for_each(|(s, x)| *s += f64::from(*x) * f64::from(*x));
}

/// Watches passes and sums up. Names of tensors are those of `gguf.md` section 3.
pub struct Collector {
    experts: usize,
    used: usize,
    groups: usize,
    /// By block (`blk.3.`, `mtp.0.` or nothing) and step.
    steps: BTreeMap<(String, &'static str), Sums>,
    /// Of a block's routed experts: their inputs, and their hidden activations.
    gates: BTreeMap<String, Sums>,
    downs: BTreeMap<String, Sums>,
    /// The last inputs of the feed-forward part and the experts chosen for them.
    ffn_in: Vec<f32>,
    ids: Vec<f32>,
}

impl Collector {
    /// For models of a shape.
    pub fn new(shape: &Shape) -> Self {
        Collector {
            experts: shape.experts,
            used: shape.experts_used,
            groups: shape.out_groups,
            steps: BTreeMap::new(),
            gates: BTreeMap::new(),
            downs: BTreeMap::new(),
            ffn_in: Vec::new(),
            ids: Vec::new(),
        }
    }

    /// Everything so far; the caller adds what it was taken over.
    pub fn finish(&self, has_tensor: impl Fn(&str) -> bool) -> Imatrix {
        let mut tensors = BTreeMap::new();
        let mut put = |name: String, sums: &Sums| {
            if has_tensor(&name) {
                tensors.insert(name, sums.moments());
            }
        };
        for ((block, step), sums) in &self.steps {
            let names = DENSE.iter().filter(|(s, _)| s == step).flat_map(|(_, names)| *names);
            names.for_each(|name| put(format!("{block}{name}.weight"), sums));
        }
        for (block, sums) in &self.gates {
            put(format!("{block}ffn_gate_exps.weight"), sums);
            put(format!("{block}ffn_up_exps.weight"), sums);
        }
        for (block, sums) in &self.downs {
            put(format!("{block}ffn_down_exps.weight"), sums);
        }
        Imatrix { tensors, ..Imatrix::default() }
    }

    fn dense(&mut self, block: &str, step: &'static str, width: usize, values: &[f32]) {
        if width > 0 {
            self.steps.entry((block.to_owned(), step)).or_default().add(width, values, width);
        }
    }

    /// Hidden activations `[n, used + 1, I]`, and the inputs that led to them.
    fn experts(&mut self, block: &str, width: usize, values: &[f32]) {
        let (used, experts) = (self.used, self.experts);
        let (rows, hidden) = (values.len().checked_div(width).unwrap_or(0), width / (used + 1));
        let (x, ids) = (&self.ffn_in, &self.ids);
        let input = x.len().checked_div(rows).unwrap_or(0);
        if hidden == 0 || input == 0 || ids.len() != rows * used {
            return;
        }
        let gates = self.gates.entry(block.to_owned()).or_default();
        gates.add_routed(experts, input, ids, |pair| &x[pair / used * input..][..input]);
        let downs = self.downs.entry(block.to_owned()).or_default();
        let place = |pair: usize| pair / used * (used + 1) + pair % used;
        downs.add_routed(experts, hidden, ids, |pair| &values[place(pair) * hidden..][..hidden]);
        let shared = self.steps.entry((block.to_owned(), "hidden")).or_default();
        shared.add(hidden, &values[used * hidden..], width);
    }
}

impl Tap for Collector {
    fn wants(&self, name: &str) -> bool {
        let step = name.rsplit('.').next().unwrap_or(name);
        step == "router_ids" || DENSE.iter().any(|(s, _)| *s == step)
    }

    fn rows(&mut self, name: &str, width: usize, values: &[f32]) {
        let at = name.rfind('.').map_or(0, |i| i + 1);
        // The draft block shares the model's output matrix.
        let (block, step) = if name.ends_with("output_in") { ("", "output_in") } else { name.split_at(at) };
        match step {
            "router_ids" => self.ids = values.to_vec(),
            "hidden" => self.experts(block, width, values),
            // Each group of the heads meets rows of its own.
            "heads" => self.dense(block, "heads", width / self.groups, values),
            _ => {
                if step == "ffn_in" {
                    self.ffn_in = values.to_vec();
                }
                if let Some((step, _)) = DENSE.iter().find(|(s, _)| *s == step) {
                    self.dense(block, step, width, values);
                }
            }
        }
    }
}
