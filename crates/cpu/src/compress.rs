//! Compressed rows and index keys (A.6).

use crate::attention::rotate;
use crate::backend::Cpu;
use crate::hyper::rms_scale;
use crate::pool::with_scratch;
use crate::rows::Rows;
use crate::store::Store;
use ds4_model::cache::Layout;
use ds4_model::{Compressor, LayerKind, Plan, Role, Run, RunRows};
use rayon::prelude::*;

/// Where the projections (value, gate) of a position are: in this pass, or kept from before.
struct Projections<'a> {
    kv: &'a Rows,
    gate: &'a Rows,
    rows: &'a RunRows,
    open: &'a [f32],
    slots: usize,
}

impl Projections<'_> {
    fn at(&self, position: usize) -> (&[f32], &[f32]) {
        match position.checked_sub(self.rows.start) {
            Some(i) => (self.kv.row(self.rows.rows.start + i), self.gate.row(self.rows.rows.start + i)),
            None => {
                let n = self.kv.width;
                let slot = &self.open[position % self.slots * 2 * n..][..2 * n];
                slot.split_at(n)
            }
        }
    }

    /// The softmax-weighted sum of a window's slots, for each of `row.len()` channels.
    ///
    /// `overlap`: the four tokens before the window take part with their first half of channels, the window's
    /// own with their second.
    fn pool(
        &self,
        window: usize,
        ratio: usize,
        overlap: bool,
        ape: &[f32],
        row: &mut [f32],
        max: &mut [f32],
        sum: &mut [f32],
    ) {
        let (n, width) = (self.kv.width, row.len());
        let first = window * ratio;
        let before = if overlap { first.saturating_sub(ratio)..first } else { first..first };
        let own = if overlap { width } else { 0 };
        let slots = before.map(|p| (p, 0)).chain((first..first + ratio).map(|p| (p, own)));
        max.fill(f32::NEG_INFINITY);
        for (p, channel) in slots.clone() {
            let gate = &self.at(p).1[channel..channel + width];
            let ape = &ape[p % ratio * n + channel..][..width];
            for ((m, g), a) in max.iter_mut().zip(gate).zip(ape) {
                *m = m.max(g + a);
            }
        }
        row.fill(0.0);
        sum.fill(0.0);
        for (p, channel) in slots {
            let (kv, gate) = self.at(p);
            let (kv, gate) = (&kv[channel..channel + width], &gate[channel..channel + width]);
            let ape = &ape[p % ratio * n + channel..][..width];
            for c in 0..width {
                let e = (gate[c] + ape[c] - max[c]).exp();
                sum[c] += e;
                row[c] += e * kv[c];
            }
        }
        row.iter_mut().zip(sum).for_each(|(r, s)| *r /= *s);
    }
}

fn row_width(layout: &Layout, role: Role) -> usize {
    match role {
        Role::Rows => layout.codec.head_dim,
        Role::Keys => layout.codec.index_dim,
    }
}

impl Cpu {
    pub(crate) fn compress_step(
        &mut self,
        (layer, role): (usize, Role),
        compressor: &Compressor<Cpu>,
        (kv, gate): (&Rows, &Rows),
        plan: &Plan,
        runs: &mut [Run<'_, Store>],
    ) {
        for (run, rows) in runs.iter_mut().zip(&plan.runs) {
            let Store { layout, layers } = &mut *run.store;
            let kind = layout.layers[layer];
            let Some(ratio) = kind.ratio() else { continue };
            let (overlap, slots) = (kind == LayerKind::Indexed, layout.open_slots(layer));
            let (stored, open) = layers[layer].parts_mut(role);
            let (codec, width) = (layout.codec, row_width(layout, role));
            let unit = if role == Role::Rows { codec.row_bytes() } else { codec.key_bytes() };
            let (first, end) = (rows.start / ratio, rows.end() / ratio);
            let projections = Projections { kv, gate, rows, open, slots };
            let (eps, table) = (self.shape.norm_eps, self.rope.of(true));
            stored[first * unit..end * unit].par_chunks_mut(unit).enumerate().for_each(|(i, out)| {
                with_scratch(3 * width, |scratch| {
                    let (row, rest) = scratch.split_at_mut(width);
                    let (max, sum) = rest.split_at_mut(width);
                    projections.pool(first + i, ratio, overlap, &compressor.ape, row, max, sum);
                    let scale = rms_scale(row, eps);
                    row.iter_mut().zip(compressor.norm.iter()).for_each(|(v, w)| *v = w * (*v * scale));
                    rotate(row, table, (first + i) * ratio, false);
                    match role {
                        Role::Rows => codec.store_row(row, out),
                        Role::Keys => codec.store_key(row, out),
                    }
                });
            });
            // Keep what later windows need.
            let n = kv.width;
            for p in rows.start.max(rows.end().saturating_sub(slots))..rows.end() {
                let i = rows.rows.start + p - rows.start;
                let (value, weight) = open[p % slots * 2 * n..][..2 * n].split_at_mut(n);
                value.copy_from_slice(kv.row(i));
                weight.copy_from_slice(gate.row(i));
            }
        }
    }
}
