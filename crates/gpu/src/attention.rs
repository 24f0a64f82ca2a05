//! Rotation, the cache, selection and attention on the device.

use crate::backend::Gpu;
use crate::buffer::Buffer;
use crate::hyper::cubes;
use crate::kernels::attend::{self, AttendShape};
use crate::kernels::cache::{self, Pool, RowShape};
use crate::kernels::common::Real;
use crate::kernels::select::{self, Index, SELECT_UNITS};
use crate::rows::{Rows, Selection, Vector};
use crate::store::Store;
use cubecl::prelude::*;
use ds4_model::cache::{Layout, Part};
use ds4_model::{Compressor, LayerKind, Plan, Role, Run};

/// Units of a cube that handles a row or a head.
const UNITS: u32 = 128;

/// Bytes of index scores held at once.
const SCORE_BYTES: usize = 256 << 20;

impl Gpu {
    #[allow(unsafe_code)]
    pub(crate) fn rotate_queries_step(&mut self, kind: LayerKind, q: &mut Rows) {
        q.quantized = false;
        let s = &self.shape;
        // SAFETY: a cube for each head of each row.
        unsafe {
            attend::rotate_queries::launch_unchecked(
                &self.client,
                CubeCount::new_2d(s.heads as u32, q.n as u32),
                CubeDim::new_1d(UNITS),
                q.values.arg(16),
                self.angles.arg(4),
                self.angle_set(kind, false),
                s.head_dim,
                s.rotary,
                q.stride,
                Real::new(s.norm_eps),
            );
        }
    }

    #[allow(unsafe_code)]
    pub(crate) fn push_window_step(
        &mut self,
        layer: usize,
        norm: &Vector,
        kv: &Rows,
        runs: &[Run<'_, Store>],
    ) {
        let Some(run) = runs.first() else { return };
        let layout = &run.store.layout;
        // SAFETY: the plan's stores lie in the arena, and have a slot for every position.
        unsafe {
            cache::push_window::launch_unchecked(
                &self.client,
                CubeCount::new_1d(kv.n as u32),
                CubeDim::new_1d(UNITS),
                kv.values.arg(4),
                norm.values.arg(4),
                self.angles.arg(4),
                self.plan.arg(4),
                self.arena(runs).arg(4),
                layer as u32,
                self.angle_set(layout.layers[layer], false),
                self.sizes(layout).row,
                layout.ring as u32,
                kv.stride,
            );
        }
    }

    #[allow(unsafe_code)]
    pub(crate) fn compress_step(
        &mut self,
        (layer, role): (usize, Role),
        compressor: &Compressor<Gpu>,
        (kv, gate): (&Rows, &Rows),
        runs: &[Run<'_, Store>],
    ) {
        let Some(run) = runs.first() else { return };
        let layout = &run.store.layout;
        let kind = layout.layers[layer];
        let Some(ratio) = kind.ratio() else { return };
        let sizes = self.sizes(layout);
        let (row, keys) = match role {
            Role::Rows => (sizes.row, false),
            Role::Keys => (sizes.key, true),
        };
        let pool = Pool {
            ratio: ratio as u32,
            overlap: kind == LayerKind::Indexed,
            slots: layout.open_slots(layer) as u32,
            channels: kv.width,
            stride: kv.stride,
        };
        let arena = self.arena(runs);
        // SAFETY: the plan's stores lie in the arena; rows and slots exist for every position.
        unsafe {
            cache::compress::launch_unchecked(
                &self.client,
                CubeCount::new_1d(kv.n as u32),
                CubeDim::new_1d(UNITS),
                kv.values.arg(4),
                gate.values.arg(4),
                compressor.ape.values.arg(4),
                compressor.norm.values.arg(4),
                self.angles.arg(4),
                self.plan.arg(4),
                arena.arg(4),
                layer as u32,
                self.angle_set(kind, true),
                row,
                pool,
            );
            cache::keep_open::launch_unchecked(
                &self.client,
                CubeCount::new_2d(cubes(kv.width, UNITS), kv.n as u32),
                CubeDim::new_1d(UNITS),
                kv.values.arg(4),
                gate.values.arg(4),
                self.plan.arg(4),
                arena.arg(4),
                layer as u32,
                kv.n as u32,
                keys,
                pool,
            );
        }
    }

    /// Room for the scores of the longest session.
    pub(crate) fn reserve_scores(&mut self, layout: &Layout) {
        let keys = (0..layout.layers.len()).map(|l| layout.capacity(l, Part::Keys)).max().unwrap_or(0);
        let rows = (SCORE_BYTES / 4 / keys.max(1)).clamp(1, self.options.max_rows);
        let bytes = 4 * (rows * keys) as u64;
        if bytes > self.scratch.scores.bytes {
            self.scratch.scores = Buffer::new(&self.client, bytes);
        }
    }

    fn index(&self, key: RowShape, q: &Rows, weights: &Rows, keys: usize) -> Index {
        Index {
            key,
            heads: self.shape.index_heads,
            stride: q.stride,
            weight_stride: weights.stride,
            score_stride: keys,
            top_k: self.shape.index_top_k,
        }
    }

    #[allow(unsafe_code)]
    pub(crate) fn select_step(
        &mut self,
        layer: usize,
        (q, weights): (&mut Rows, &Rows),
        plan: &Plan,
        runs: &[Run<'_, Store>],
        selection: &mut Selection,
    ) {
        let Some(run) = runs.first() else { return };
        let layout = &run.store.layout;
        let visible = plan.most_visible(4);
        let s = self.index(self.sizes(layout).key, q, weights, visible);
        selection.n = q.n;
        q.quantized = false;
        let tile = (self.scratch.scores.bytes as usize / 4 / visible).clamp(1, q.n);
        let arena = self.arena(runs);
        // SAFETY: sizes are those of the shape; the scores hold `tile` rows of all visible keys.
        unsafe {
            select::prepare_queries::launch_unchecked(
                &self.client,
                CubeCount::new_2d(s.heads as u32, q.n as u32),
                CubeDim::new_1d(64),
                q.values.arg(4),
                self.angles.arg(4),
                self.scratch.index_words.arg(4),
                self.scratch.index_scales.arg(4),
                self.angle_set(LayerKind::Indexed, false),
                s,
            );
            for first in (0..q.n).step_by(tile) {
                let rows = tile.min(q.n - first) as u32;
                select::score::launch_unchecked(
                    &self.client,
                    CubeCount::new_2d(cubes(visible, UNITS), rows),
                    CubeDim::new_1d(UNITS),
                    q.values.arg(4),
                    self.scratch.index_words.arg(4),
                    self.scratch.index_scales.arg(4),
                    weights.values.arg(4),
                    self.plan.arg(4),
                    arena.arg(4),
                    self.scratch.scores.arg(4),
                    layer as u32,
                    first as u32,
                    s,
                );
                select::top_k::launch_unchecked(
                    &self.client,
                    CubeCount::new_1d(rows),
                    CubeDim::new_1d(SELECT_UNITS),
                    self.scratch.scores.arg(4),
                    self.plan.arg(4),
                    selection.ids.arg(4),
                    first as u32,
                    s,
                );
            }
        }
    }

    #[allow(unsafe_code)]
    pub(crate) fn attend_step(
        &mut self,
        layer: usize,
        (q, sinks): (&Rows, &Vector),
        selection: Option<&Selection>,
        _plan: &Plan,
        runs: &[Run<'_, Store>],
        out: &mut Rows,
    ) {
        let Some(run) = runs.first() else { return };
        let layout = &run.store.layout;
        let kind = layout.layers[layer];
        let s = AttendShape {
            row: self.sizes(layout).row,
            ring: layout.ring as u32,
            window: layout.window as u32,
            ratio: kind.ratio().unwrap_or(0) as u32,
            top_k: selection.map_or(0, |_| self.shape.index_top_k) as u32,
            q_stride: q.stride,
        };
        let ids = selection.map_or(&self.nothing[0], |s| &s.ids);
        out.width = q.width;
        let arg = out.output(q.n, !self.options.exact);
        // SAFETY: the plan's stores lie in the arena; selections are rows that exist.
        unsafe {
            attend::attend::launch_unchecked(
                &self.client,
                CubeCount::new_2d(self.shape.heads as u32, q.n as u32),
                CubeDim::new_1d(UNITS),
                q.values.arg(16),
                sinks.values.arg(4),
                self.angles.arg(4),
                self.plan.arg(4),
                ids.arg(4),
                self.arena(runs).arg(4),
                arg,
                layer as u32,
                self.angle_set(kind, false),
                s,
            );
        }
    }
}
