//! The indexer: scores of compressed rows, and the best of them (A.7).

use crate::attention::rotate;
use crate::backend::Cpu;
use crate::kernels::Kernels;
use crate::kernels::index::{self, IndexQuery};
use crate::pool::with_scratch;
use crate::rows::{Rows, Selection};
use crate::store::Store;
use ds4_model::cache::{KvFormat, Layout, Part, RowCodec};
use ds4_model::{Plan, Run};
use rayon::prelude::*;

/// Keys of one task.
const KEYS: usize = 256;
/// Rows of a pass that are scored together.
const ROWS: usize = 16;

impl Cpu {
    /// Room for the scores of the longest session, so that a session that grows allocates nothing.
    pub(crate) fn reserve_scores(&mut self, layout: &Layout) {
        let rows = (0..layout.layers.len()).map(|l| layout.capacity(l, Part::Keys)).max().unwrap_or(0);
        let size = rows.div_ceil(KEYS) * KEYS * ROWS;
        self.scores.reserve(size.saturating_sub(self.scores.len()));
        self.ranked.reserve(rows.saturating_sub(self.ranked.len()));
        self.ranking.reserve(rows.saturating_sub(self.ranking.len()));
    }

    pub(crate) fn select_step(
        &mut self,
        layer: usize,
        (q, weights): (&mut Rows, &Rows),
        plan: &Plan,
        runs: &[Run<'_, Store>],
        selection: &mut Selection,
    ) {
        let (dim, top_k) = (self.shape.index_dim, self.shape.index_top_k);
        let table = self.rope.of(true);
        let scale = ((dim * self.shape.index_heads) as f32).powf(-0.5);
        let (kernels, width) = (&self.kernels, q.width);
        let rows = q.take(plan.len()).par_chunks_mut(width).enumerate();
        rows.for_each(|(r, q)| {
            q.chunks_exact_mut(dim).for_each(|head| rotate(head, table, plan.positions[r], false));
        });
        let q = &*q;
        selection.n = plan.len();
        self.queries.resize_with(ROWS.max(self.queries.len()), Query::default);
        for (run, rows) in runs.iter().zip(&plan.runs) {
            let store = &*run.store;
            let (codec, keys) = (store.layout.codec, &store.layers[layer].keys);
            let unit = codec.key_bytes();
            // The scores of a group of rows wait to be ranked together, and their keys are read once.
            for first in rows.rows.clone().step_by(ROWS) {
                let group = first..rows.rows.end.min(first + ROWS);
                let seen = |r: usize| (plan.positions[r] + 1) / 4;
                let most = seen(group.end - 1);
                group.clone().for_each(|r| selection.chosen[r] = seen(r) > top_k);
                if most <= top_k {
                    continue;
                }
                let queries = &mut self.queries[..group.len()];
                queries.par_iter_mut().zip(group.clone()).for_each(|(query, r)| {
                    query.load(codec, q.row(r), weights.row(r), scale);
                });
                // `[blocks of keys, rows of the group, keys of a block]`
                let size = most.div_ceil(KEYS) * KEYS * ROWS;
                self.scores.resize(size.max(self.scores.len()), 0.0);
                self.scores[..size].par_chunks_mut(KEYS * ROWS).enumerate().for_each(|(block, scores)| {
                    let n = KEYS.min(most - block * KEYS);
                    let keys = &keys[block * KEYS * unit..][..n * unit];
                    for (query, scores) in queries.iter().zip(scores.chunks_exact_mut(KEYS)) {
                        query.scores(kernels, codec, keys, &mut scores[..n]);
                    }
                });
                for r in group.clone().filter(|&r| seen(r) > top_k) {
                    self.ranked.clear();
                    for block in self.scores[..size].chunks_exact(KEYS * ROWS) {
                        let left = seen(r) - self.ranked.len();
                        self.ranked.extend_from_slice(&block[(r - first) * KEYS..][..KEYS.min(left)]);
                    }
                    best(&self.ranked, &mut self.ranking, &mut selection.ids[r * top_k..(r + 1) * top_k]);
                }
            }
        }
    }
}

/// A rotated query of all heads, as it meets the keys.
#[derive(Default)]
pub(crate) struct Query {
    /// Where keys are packed.
    packed: IndexQuery,
    bytes: Vec<u8>,
    /// Where they are floats.
    floats: Vec<f32>,
    weights: Vec<f32>,
}

impl Query {
    fn load(&mut self, codec: RowCodec, q: &[f32], weights: &[f32], scale: f32) {
        let (dim, unit) = (codec.index_dim, codec.key_bytes());
        self.weights.clear();
        self.weights.extend(weights.iter().map(|w| w * scale));
        self.floats.clear();
        self.floats.extend_from_slice(q);
        if !packs(codec) {
            self.floats.chunks_exact_mut(dim).for_each(|head| codec.round_query(head));
            return;
        }
        self.bytes.resize(weights.len() * unit, 0);
        for (head, bytes) in self.floats.chunks_exact_mut(dim).zip(self.bytes.chunks_exact_mut(unit)) {
            codec.store_key(head, bytes);
        }
        self.packed.load(&self.bytes, &self.weights, dim);
    }

    /// Scores of some stored keys.
    fn scores(&self, kernels: &Kernels, codec: RowCodec, keys: &[u8], scores: &mut [f32]) {
        if packs(codec) {
            return (kernels.index_scores)(&self.packed, keys, scores);
        }
        with_scratch(codec.index_dim, |key| {
            for (score, bytes) in scores.iter_mut().zip(keys.chunks_exact(codec.key_bytes())) {
                codec.load_key(bytes, key);
                let heads = self.floats.chunks_exact(codec.index_dim).zip(&self.weights);
                *score = heads.map(|(q, w)| w * (kernels.dot)(q, key).max(0.0)).sum();
            }
        });
    }
}

/// Whether keys meet queries in integers.
fn packs(codec: RowCodec) -> bool {
    codec.format == KvFormat::Packed && codec.index_dim <= index::BLOCKS * index::BLOCK
}

/// The indices of the `out.len()` largest scores, ascending; of equal scores the lower index wins.
fn best(scores: &[f32], ranked: &mut Vec<f32>, out: &mut [u32]) {
    ranked.clear();
    ranked.extend_from_slice(scores);
    let k = out.len();
    let (_, &mut least, _) = ranked.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    let above = scores.iter().filter(|s| s.total_cmp(&least).is_gt()).count();
    let mut ties = k - above;
    let mut next = out.iter_mut();
    for (i, s) in scores.iter().enumerate() {
        let take = match s.total_cmp(&least) {
            std::cmp::Ordering::Greater => true,
            std::cmp::Ordering::Equal if ties > 0 => {
                ties -= 1;
                true
            }
            _ => false,
        };
        if take && let Some(o) = next.next() {
            *o = i as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::best;

    #[test]
    fn picks_the_largest_and_breaks_ties_low() {
        let scores = [1.0, 5.0, 3.0, 5.0, 3.0, 3.0, -1.0];
        let mut ranked = Vec::new();
        for (k, want) in [(1, vec![1]), (2, vec![1, 3]), (3, vec![1, 2, 3]), (4, vec![1, 2, 3, 4])] {
            let mut out = vec![0; k];
            best(&scores, &mut ranked, &mut out);
            assert_eq!(out, want);
        }
    }
}
