//! The indexer: scores of compressed rows, and the best of them (A.7).

use crate::attention::rotate;
use crate::backend::Cpu;
use crate::pool::with_scratch;
use crate::rows::{Rows, Selection};
use crate::store::Store;
use ds4_model::{Plan, Run};
use rayon::prelude::*;

/// Keys of one task.
const KEYS: usize = 256;

impl Cpu {
    pub(crate) fn select_step(
        &mut self,
        layer: usize,
        (q, weights): (&mut Rows, &Rows),
        plan: &Plan,
        runs: &[Run<'_, Store>],
        selection: &mut Selection,
    ) {
        let (heads, dim, top_k) = (self.shape.index_heads, self.shape.index_dim, self.shape.index_top_k);
        let (table, dot) = (self.rope.of(true), self.kernels.dot);
        let width = q.width;
        let rows = q.take(plan.len()).par_chunks_mut(width).enumerate();
        rows.for_each(|(r, q)| {
            let codec = runs[plan.run_of[r]].store.layout.codec;
            for head in q.chunks_exact_mut(dim) {
                rotate(head, table, plan.positions[r], false);
                codec.round_query(head);
            }
        });
        let scale = ((dim * heads) as f32).powf(-0.5);
        selection.n = plan.len();
        for r in 0..plan.len() {
            let seen = (plan.positions[r] + 1) / 4;
            selection.chosen[r] = seen > top_k;
            if seen <= top_k {
                continue;
            }
            let store = &*runs[plan.run_of[r]].store;
            let (codec, keys) = (store.layout.codec, &store.layers[layer].keys);
            let unit = codec.key_bytes();
            let (q, weights) = (q.row(r), weights.row(r));
            self.scores.resize(seen.max(self.scores.len()), 0.0);
            let scores = &mut self.scores[..seen];
            scores.par_chunks_mut(KEYS).zip(keys.par_chunks(KEYS * unit)).for_each(|(scores, keys)| {
                with_scratch(dim, |key| {
                    for (score, bytes) in scores.iter_mut().zip(keys.chunks_exact(unit)) {
                        codec.load_key(bytes, key);
                        let heads = q.chunks_exact(dim).zip(weights);
                        *score = heads.map(|(q, w)| w * scale * dot(q, key).max(0.0)).sum();
                    }
                });
            });
            best(scores, &mut self.ranked, &mut selection.ids[r * top_k..(r + 1) * top_k]);
        }
    }
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
