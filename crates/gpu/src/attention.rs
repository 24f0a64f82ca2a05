//! Rotation, the cache, selection and attention on the device.

use crate::backend::Gpu;
use crate::buffer::Buffer;
use crate::hyper::{Mixing, cubes};
use crate::kernels::attend::{self, AttendShape};
use crate::kernels::cache::{
    self, Compressing, CompressingLaunch, Pool, Rounding, RowShape, WindowRowsLaunch,
};
use crate::kernels::common::Real;
use crate::kernels::dot::Form;
use crate::kernels::flash::{self, FlashShape};
use crate::kernels::select::{self, Index, SCORE_KEYS, SCORE_UNITS, SELECT_UNITS, STRETCH};
use crate::output::Splits;
use crate::rows::{Rows, Selection, Vector};
use crate::stage::{Runs, Stage};
use cubecl::prelude::*;
use ds4_model::cache::{Layout, Part};
use ds4_model::{Compressor, LayerKind, Role};

/// What a decode pass puts into the cache, which waits for the products that make the queries, to be done beside them.
pub(crate) struct Absorbing {
    pub(crate) layer: usize,
    pub(crate) arena: Buffer,
    pub(crate) window: WindowRowsLaunch,
    pub(crate) compressors: SequenceArg<Compressing>,
}

impl Absorbing {
    /// Cubes for each row: the window, the compressors.
    pub(crate) fn roles(&self) -> usize {
        1 + self.compressors.values.len()
    }

    /// Buffers of its arguments.
    pub(crate) fn buffers(&self) -> usize {
        5 + 4 * self.compressors.values.len()
    }
}

/// Units of a cube that handles a row.
const UNITS: u32 = cache::UNITS as u32;

/// Rows times splits whose partial sums of attention are held at once.
pub(crate) const PARTIALS: usize = 512;
/// Cubes that keep a large device busy.
const WANTED_CUBES: usize = 132;

/// Bytes of index scores held at once.
const SCORE_BYTES: usize = 256 << 20;

/// Rows of a pass whose scores of all visible keys are held at once, where there is room for so many scores.
fn score_tile(scores: usize, visible: usize, rows: usize) -> usize {
    (scores / visible).clamp(1, rows)
}

/// Stretches that a tile of scores has at the most, whatever is visible: many rows of few keys have more of them than
/// few rows of many, since every row begins a stretch.
fn most_stretches(scores: usize, max_rows: usize) -> usize {
    scores / STRETCH + max_rows
}

impl Stage {
    #[allow(unsafe_code)]
    pub(crate) fn rotate_queries_step(&mut self, kind: LayerKind, q: &mut Rows) {
        q.quantized = false;
        // The matrix units' attention rotates on the way in; nobody else looks at queries.
        if self.rotates_late() {
            return;
        }
        let s = &self.shape;
        // SAFETY: a cube for each head of each row.
        unsafe {
            self.timer.time(&self.client, "rotate_queries", || {
                attend::rotate_queries::launch_unchecked(
                    &self.client,
                    CubeCount::new_2d(s.heads as u32, q.n as u32),
                    CubeDim::new_1d(UNITS),
                    q.values.arg(16),
                    self.plan.arg(4),
                    self.angle_set(kind, false),
                    s.head_dim,
                    s.rotary,
                    q.stride,
                    Real::new(s.norm_eps),
                );
            });
        }
    }

    #[allow(unsafe_code)]
    pub(crate) fn push_window_step(&mut self, layer: usize, norm: &Vector, kv: &Rows, runs: &Runs<'_>) {
        let Some(layout) = self.layout(runs) else { return };
        let rows = WindowRowsLaunch::new(
            kv.values.arg(4),
            norm.values[self.index].arg(4),
            self.angle_set(layout.layers[layer], false),
            self.sizes(layout).row,
            layout.ring as u32,
            kv.stride,
        );
        let arena = self.arena(runs);
        // Of many rows, other kernels make the queries.
        if self.current.single && !self.current.observed && kv.n <= self.abilities.few {
            self.absorbing = Some(Absorbing { layer, arena, window: rows, compressors: SequenceArg::new() });
            return;
        }
        // SAFETY: the plan's stores lie in the arena, and have a slot for every position.
        unsafe {
            self.timer.time(&self.client, "push_window", || {
                cache::push_window::launch_unchecked(
                    &self.client,
                    CubeCount::new_1d(kv.n as u32),
                    CubeDim::new_1d(UNITS),
                    rows,
                    self.plan.arg(4),
                    self.plan.arg(4),
                    arena.arg(4),
                    layer as u32,
                );
            });
        }
    }

    #[allow(unsafe_code)]
    pub(crate) fn compress_step(
        &mut self,
        (layer, role): (usize, Role),
        compressor: &Compressor<Gpu>,
        (kv, gate): (&Rows, &Rows),
        runs: &Runs<'_>,
    ) {
        let Some(layout) = self.layout(runs) else { return };
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
        let compressing = CompressingLaunch::new(
            kv.values.arg(4),
            gate.values.arg(4),
            compressor.ape.values[self.index].arg(4),
            compressor.norm.values[self.index].arg(4),
            self.angle_set(kind, true),
            row,
            pool,
        );
        if let Some(absorbing) = &mut self.absorbing {
            absorbing.compressors.push(compressing);
            return;
        }
        let arena = self.arena(runs);
        // SAFETY: the plan's stores lie in the arena; rows and slots exist for every position.
        unsafe {
            self.timer.time(&self.client, "compress", || {
                cache::compress::launch_unchecked(
                    &self.client,
                    CubeCount::new_1d(kv.n as u32),
                    CubeDim::new_1d(UNITS),
                    compressing,
                    self.plan.arg(4),
                    self.plan.arg(4),
                    arena.arg(4),
                    layer as u32,
                );
            });
            self.timer.time(&self.client, "keep_open", || {
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
            });
        }
    }

    /// Room for the scores of the longest session.
    pub(crate) fn reserve_scores(&mut self, layout: &Layout) {
        let keys = (0..layout.layers.len()).map(|l| layout.capacity(l, Part::Keys)).max().unwrap_or(0);
        let rows = (SCORE_BYTES / 4 / keys.max(1)).clamp(1, self.options.max_rows);
        let bytes = 4 * (rows * keys) as u64;
        if bytes > self.scratch.scores.bytes {
            self.scratch.scores = Buffer::new(&self.client, bytes);
            let best =
                4 * (most_stretches(rows * keys, self.options.max_rows) * self.shape.index_top_k) as u64;
            self.scratch.best = Buffer::new(&self.client, best);
            self.scratch.places = Buffer::new(&self.client, best);
        }
    }

    fn index(&self, key: RowShape, q: &Rows, weights: &Rows) -> Index {
        Index {
            key,
            heads: self.shape.index_heads,
            stride: q.stride,
            weight_stride: weights.stride,
            top_k: self.shape.index_top_k,
        }
    }

    #[allow(unsafe_code)]
    pub(crate) fn select_step(
        &mut self,
        layer: usize,
        (q, weights): (&mut Rows, &Rows),
        runs: &Runs<'_>,
        selection: &mut Selection,
    ) {
        let Some(layout) = self.layout(runs) else { return };
        let visible = self.current.reach / 4;
        let s = self.index(self.sizes(layout).key, q, weights);
        selection.n = q.n;
        q.quantized = false;
        let tile = score_tile(self.scratch.scores.bytes as usize / 4, visible, q.n);
        let arena = self.arena(runs);
        // SAFETY: sizes are those of the shape; the scores hold `tile` rows of all visible keys.
        unsafe {
            self.timer.time(&self.client, "prepare_queries", || {
                select::prepare_queries::launch_unchecked(
                    &self.client,
                    CubeCount::new_2d(s.heads as u32, q.n as u32),
                    CubeDim::new_1d(64),
                    q.values.arg(4),
                    self.plan.arg(4),
                    self.scratch.index_words.arg(4),
                    self.scratch.index_scales.arg(4),
                    self.angle_set(LayerKind::Indexed, false),
                    s,
                );
            });
            for first in (0..q.n).step_by(tile) {
                let rows = tile.min(q.n - first) as u32;
                self.timer.time(&self.client, "score", || {
                    select::score::launch_unchecked(
                        &self.client,
                        CubeCount::new_2d(cubes(visible, SCORE_KEYS as u32), rows),
                        CubeDim::new_1d(SCORE_UNITS as u32),
                        q.values.arg(4),
                        self.scratch.index_words.arg(16),
                        self.scratch.index_scales.arg(4),
                        weights.values.arg(4),
                        self.plan.arg(4),
                        arena.arg(4),
                        self.scratch.scores.arg(4),
                        layer as u32,
                        first as u32,
                        visible as u32,
                        s,
                    );
                });
                self.choose_best(selection, first, rows, visible, s);
            }
        }
    }

    /// The best of the scores of some rows: in one go, or of many scores first those of each stretch.
    #[allow(unsafe_code)]
    fn choose_best(&self, selection: &Selection, first: usize, rows: u32, visible: usize, s: Index) {
        let stretches = cubes(visible, STRETCH as u32);
        let scratch = &self.scratch;
        let launch = |scores: &Buffer, places: &Buffer, to: &Buffer, stride: usize, (many, again)| {
            let count = CubeCount::new_2d(rows, if many { stretches } else { 1 });
            // SAFETY: the scores hold `rows` rows of all visible keys, `best` and `places` the best of their
            // stretches; the selection has a row for every row.
            unsafe {
                self.timer.time(&self.client, "top_k", || {
                    select::top_k::launch_unchecked(
                        &self.client,
                        count,
                        CubeDim::new_1d(SELECT_UNITS),
                        scores.arg(4),
                        places.arg(4),
                        self.plan.arg(4),
                        scratch.best.arg(4),
                        to.arg(4),
                        first as u32,
                        stride as u32,
                        many,
                        again,
                        s,
                    );
                });
            }
        };
        if stretches == 1 {
            launch(&scratch.scores, &self.nothing[0], &selection.ids, visible, (false, false));
            return;
        }
        launch(&scratch.scores, &self.nothing[0], &scratch.places, visible, (true, false));
        let stride = stretches as usize * s.top_k;
        launch(&scratch.best, &scratch.places, &selection.ids, stride, (false, true));
    }

    #[allow(unsafe_code)]
    pub(crate) fn attend_step(
        &mut self,
        layer: usize,
        (q, sinks): (&Rows, &Vector),
        selection: Option<&Selection>,
        runs: &Runs<'_>,
        out: &mut Rows,
    ) {
        let Some(layout) = self.layout(runs) else { return };
        let kind = layout.layers[layer];
        let s = AttendShape {
            row: self.sizes(layout).row,
            ring: layout.ring as u32,
            window: layout.window as u32,
            ratio: kind.ratio().unwrap_or(0) as u32,
            top_k: selection.map_or(0, |_| self.shape.index_top_k) as u32,
            q_stride: q.stride,
        };
        let ids = selection.map_or(&self.nothing[0], |s| &s.ids).clone();
        if let Some(flash) = self.flash(s, q.n) {
            self.flash_step(layer, (q, sinks), &ids, runs, out, flash);
            return;
        }
        out.width = q.width;
        let arg = out.output(q.n, self.heads_form(q.n));
        // SAFETY: the plan's stores lie in the arena; selections are rows that exist.
        unsafe {
            self.timer.time(&self.client, "attend", || {
                attend::attend::launch_unchecked(
                    &self.client,
                    CubeCount::new_2d(self.shape.heads as u32, q.n as u32),
                    CubeDim::new_1d(attend::UNITS as u32),
                    q.values.arg(16),
                    sinks.values[self.index].arg(4),
                    self.plan.arg(4),
                    self.plan.arg(4),
                    ids.arg(4),
                    self.arena(runs).arg(4),
                    arg,
                    layer as u32,
                    self.angle_set(kind, false),
                    s,
                );
            });
        }
    }

    /// In which form the output projection wants heads.
    fn heads_form(&self, n: usize) -> Form {
        let form = self.form(n);
        if n > self.abilities.few && !self.groups_fit_tiles() { Form::Plain } else { form }
    }

    /// How the matrix units attend, if they can: to packed rows, with room for a tile of them in shared memory.
    fn flash(&self, attend: AttendShape, n: usize) -> Option<FlashShape> {
        let (side, planes) = (self.abilities.tile?, flash::UNITS / self.abilities.plane as usize);
        let (heads, rotate, eps) = (self.shape.heads, !self.current.observed, Real::new(self.shape.norm_eps));
        let early = n <= self.abilities.few;
        let with = |tile| FlashShape { attend, heads, side, tile, planes, rotate, early, eps };
        let fits = |f: &FlashShape| f.fits() && f.shared_bytes() <= self.abilities.shared;
        [32, 16].map(with).into_iter().find(fits).filter(|_| attend.row.rounding == Rounding::Packed)
    }

    /// Whether attention will norm and rotate the queries itself.
    fn rotates_late(&self) -> bool {
        let Some(row) = self.current.row else { return false };
        let attend = AttendShape { row, ring: 1, window: 1, ratio: 0, top_k: 0, q_stride: 0 };
        !self.current.observed && self.flash(attend, 1).is_some()
    }

    /// Attention on the matrix units, which wait for memory: there is time for post and comb.
    #[allow(unsafe_code)]
    fn flash_step(
        &mut self,
        layer: usize,
        (q, sinks): (&Rows, &Vector),
        ids: &Buffer,
        runs: &Runs<'_>,
        out: &mut Rows,
        s: FlashShape,
    ) {
        let Some(kind) = self.layout(runs).map(|l| l.layers[layer]) else { return };
        let n = q.n;
        // Rows that any query of the pass sees, at the most.
        let compressed = kind.ratio().map_or(0, |r| self.current.reach / r);
        let compressed =
            if s.attend.top_k > 0 { compressed.min(s.attend.top_k as usize) } else { compressed };
        let window = self.current.reach.min(s.attend.window as usize);
        let tiles = (window + compressed).div_ceil(s.tile);
        let cubes = s.heads / s.side * n;
        let splits = (WANTED_CUBES / cubes).clamp(1, tiles.min(PARTIALS / n.min(PARTIALS)));
        let splits = splits.min(flash::MOST_SPLITS);
        let groups = if splits > 1 { flash::SPLIT_GROUPS } else { 1 };
        out.width = q.width;
        let step = PARTIALS / splits;
        let arena = self.arena(runs);
        let waiting = self.mixing.take();
        for first in (0..n).step_by(step) {
            let rows = step.min(n - first) as u32;
            let arg = out.output(n, self.heads_form(n));
            // SAFETY: partial sums have room for `step * splits` rows; the rest is as for the kernel without matrix
            // units.
            unsafe {
                let mixing = Mixing::beside(waiting.as_ref());
                self.timer.time(&self.client, "flash", || {
                    flash::flash::launch_unchecked(
                        &self.client,
                        CubeCount::new_3d(
                            (s.heads / s.side) as u32,
                            rows,
                            splits as u32 + mixing.values.len() as u32,
                        ),
                        CubeDim::new_1d(flash::UNITS as u32),
                        q.values.arg(16),
                        self.plan.arg(4),
                        ids.arg(4),
                        arena.arg(4),
                        arena.arg(16),
                        self.scratch.partials.arg(4),
                        self.scratch.stats.arg(4),
                        self.plan.arg(4),
                        mixing,
                        layer as u32,
                        first as u32,
                        self.angle_set(kind, false),
                        s,
                    );
                });
            }
            let splits = Splits {
                sinks: sinks.values[self.index].clone(),
                out: arg,
                first: first as u32,
                rows,
                first_angle: self.angle_set(kind, false),
                count: splits as u32,
                s,
                groups,
            };
            if self.output_may_join(n) { self.splits = Some(splits) } else { self.combine(splits) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// There is room for the best of all stretches at every length on the way to the longest.
    #[test]
    fn stretches_fit() {
        for max_rows in [1, 64, 2048] {
            for keys in [1, 8192, 32_768, 32_769, 131_072, 262_144] {
                let scores = (SCORE_BYTES / 4 / keys).clamp(1, max_rows) * keys;
                for visible in
                    (1..=keys).step_by(61).chain([8192, 8193, 32_768, 32_769, keys]).filter(|&v| v <= keys)
                {
                    for rows in [1, max_rows] {
                        let tile = score_tile(scores, visible, rows);
                        assert!(tile * visible <= scores);
                        let stretches = tile * visible.div_ceil(STRETCH);
                        assert!(stretches <= most_stretches(scores, max_rows), "{visible} of {keys} keys");
                    }
                }
            }
        }
    }
}
