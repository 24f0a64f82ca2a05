//! Rotation, the window, and attention over window and compressed rows (A.4, A.5).

use crate::backend::Cpu;
use crate::hyper::{norm_row, rms_scale};
use crate::kernels::{Kernels, TILE, Tile};
use crate::pool::{pieces, with_scratch};
use crate::rows::{Rows, Selection};
use crate::store::Store;
use ds4_model::cache::RowCodec;
use ds4_model::{LayerKind, Plan, RopeTables, Run};
use rayon::prelude::*;

/// Most rotary pairs of a head that fit the stack tables here.
pub(crate) const MAX_PAIRS: usize = 256;

/// Rotates the last `2 * table.len()` channels of `x` as for `position`, or back.
pub(crate) fn rotate(x: &mut [f32], table: &[f32], position: usize, inverse: bool) {
    let mut angles = [(0.0, 0.0); MAX_PAIRS];
    let angles = &mut angles[..table.len()];
    RopeTables::fill(table, position, angles);
    rotate_with(x, angles, inverse);
}

fn rotate_with(x: &mut [f32], angles: &[(f32, f32)], inverse: bool) {
    let start = x.len() - 2 * angles.len();
    for (pair, &(cos, sin)) in x[start..].chunks_exact_mut(2).zip(angles) {
        let sin = if inverse { -sin } else { sin };
        (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos);
    }
}

/// Distance of decoded rows less their width: rows of a power of two would meet in few sets of the first cache.
const APART: usize = 16;

/// Fewest heads that a task decodes rows for: decoding one costs what two heads' products with it do.
const LEAST_HEADS: usize = 4;

/// Everything the heads of one query share.
struct Query<'a> {
    kernels: &'a Kernels,
    codec: RowCodec,
    /// Stored rows, window first, both in order of position.
    row: &'a (dyn Fn(usize) -> &'a [u8] + Sync),
    rows: usize,
}

impl Query<'_> {
    /// Attention of the heads `q` (concatenated), into `out`. Softmax runs over tiles of rows: every head keeps its largest score so
    /// far and its denominator; the sink counts from the start.
    fn attend(&self, q: &[f32], sinks: &[f32], out: &mut [f32]) {
        let d = self.codec.head_dim;
        let (heads, stride, scale) = (sinks.len(), d + APART, (d as f32).powf(-0.5));
        out.fill(0.0);
        with_scratch(TILE * stride + heads * (TILE + 2), |scratch| {
            let (rows, rest) = scratch.split_at_mut(TILE * stride);
            let (scores, state) = rest.split_at_mut(heads * TILE);
            let (max, sum) = state.split_at_mut(heads);
            max.copy_from_slice(sinks);
            sum.fill(1.0);
            for first in (0..self.rows).step_by(TILE) {
                let n = TILE.min(self.rows - first);
                for (i, row) in rows.chunks_exact_mut(stride).enumerate().take(n) {
                    (self.kernels.small.load_row)(self.codec, (self.row)(first + i), &mut row[..d]);
                }
                let tile = Tile { rows, n, width: d, stride };
                (self.kernels.scores)(q, &tile, scores);
                (self.kernels.small.softmax)(scores, &tile, scale, (&mut *max, &mut *sum), out);
                (self.kernels.weigh)(scores, &tile, out);
            }
            for (out, sum) in out.chunks_exact_mut(d).zip(sum) {
                let inv = 1.0 / *sum;
                out.iter_mut().for_each(|o| *o *= inv);
            }
        });
    }
}

impl Cpu {
    pub(crate) fn rotate_queries_step(&mut self, kind: LayerKind, plan: &Plan, q: &mut Rows) {
        let (d, eps) = (self.shape.head_dim, self.shape.norm_eps);
        let table = self.rope.of(kind != LayerKind::Window);
        let width = q.width;
        q.take(plan.len()).par_chunks_mut(width).zip(&plan.positions).for_each(|(q, &position)| {
            let mut angles = [(0.0, 0.0); MAX_PAIRS];
            let angles = &mut angles[..table.len()];
            RopeTables::fill(table, position, angles);
            for head in q.chunks_exact_mut(d) {
                let scale = rms_scale(head, eps);
                head.iter_mut().for_each(|v| *v *= scale);
                rotate_with(head, angles, false);
            }
        });
    }

    pub(crate) fn push_window_step(
        &mut self,
        layer: usize,
        norm: &[f32],
        kv: &Rows,
        plan: &Plan,
        runs: &mut [Run<'_, Store>],
    ) {
        let (d, eps) = (kv.width, self.shape.norm_eps);
        for (run, rows) in runs.iter_mut().zip(&plan.runs) {
            let layout = &run.store.layout;
            let (codec, ring, unit) = (layout.codec, layout.ring, layout.codec.row_bytes());
            let table = self.rope.of(layout.layers[layer] != LayerKind::Window);
            // Encoded side by side, then copied to their slots of the ring.
            let n = rows.rows.len();
            self.encoded.resize((n * unit).max(self.encoded.len()), 0);
            let encoded = &mut self.encoded[..n * unit];
            encoded.par_chunks_mut(unit).enumerate().for_each(|(i, out)| {
                with_scratch(d, |row| {
                    norm_row(norm, kv.row(rows.rows.start + i), eps, row);
                    rotate(row, table, rows.start + i, false);
                    codec.store_row(row, out);
                });
            });
            let window = &mut run.store.layers[layer].window;
            for (i, row) in encoded.chunks_exact(unit).enumerate() {
                let slot = (rows.start + i) % ring * unit;
                window[slot..slot + unit].copy_from_slice(row);
            }
        }
    }

    pub(crate) fn attend_step(
        &mut self,
        layer: usize,
        (q, sinks): (&Rows, &[f32]),
        selection: Option<&Selection>,
        plan: &Plan,
        runs: &[Run<'_, Store>],
        out: &mut Rows,
    ) {
        let (heads, d, width) = (self.shape.heads, self.shape.head_dim, q.width);
        let (kernels, rope) = (&self.kernels, &self.rope);
        // A group of heads shares the decoding of rows; with few rows in the pass, groups are small so that
        // every thread has work, but not so small that each decodes more than it multiplies.
        let group = (plan.len() * heads).div_ceil(2 * self.threads).clamp(LEAST_HEADS.min(heads), heads);
        let groups = heads.div_ceil(group);
        let start = |i: usize| i / groups * width + (i % groups * group).min(heads) * d;
        let out = out.take(plan.len());
        pieces(0..plan.len() * groups, out, &start, &|i, out| {
            let (r, first) = (i / groups, i % groups * group);
            let (t, store) = (plan.positions[r], &*runs[plan.run_of[r]].store);
            let layout = &store.layout;
            let cache = &store.layers[layer];
            let unit = layout.codec.row_bytes();
            let oldest = (t + 1).saturating_sub(layout.window);
            let recent = t + 1 - oldest;
            let seen = layout.layers[layer].ratio().map_or(0, |ratio| (t + 1) / ratio);
            let chosen = selection.filter(|s| s.chosen[r]).map(|s| &s.ids[r * s.top_k..(r + 1) * s.top_k]);
            let row = |i: usize| {
                let (bytes, slot) = match i.checked_sub(recent) {
                    None => (&cache.window, (oldest + i) % layout.ring),
                    Some(i) => (&cache.rows, chosen.map_or(i, |ids| ids[i] as usize)),
                };
                &bytes[slot * unit..(slot + 1) * unit]
            };
            let rows = recent + chosen.map_or(seen, <[u32]>::len);
            let count = out.len() / d;
            let query = Query { kernels, codec: layout.codec, row: &row, rows };
            query.attend(&q.row(r)[first * d..(first + count) * d], &sinks[first..first + count], out);
            let table = rope.of(layout.layers[layer] != LayerKind::Window);
            let mut angles = [(0.0, 0.0); MAX_PAIRS];
            let angles = &mut angles[..table.len()];
            RopeTables::fill(table, t, angles);
            out.chunks_exact_mut(d).for_each(|head| rotate_with(head, angles, true));
        });
    }
}
