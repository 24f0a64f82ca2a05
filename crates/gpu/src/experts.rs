//! Router and experts on the device.

use crate::backend::Gpu;
use crate::hyper::{JOINED_ROWS, LastProduct, Mixing, cubes};
use crate::kernels::common::Real;
use crate::kernels::direct::is_direct;
use crate::kernels::dot::Form;
use crate::kernels::experts::{self, Expert, ROUTE_UNITS, RouteShape};
use crate::kernels::grouped::{self, ExpertMatmul};
use crate::kernels::matmul::{self, Tiling};
use crate::kernels::tables::{staged_bytes, tables_bytes};
use crate::layout::Format;
use crate::project::rows_per_plane;
use crate::rows::{Matrix, Routes, Rows};
use crate::stage::Stage;
use cubecl::prelude::*;
use ds4_model::{Choice, FeedForward};

/// Fewest rows of a tile of an expert's tokens.
const LEAST_ROWS: usize = 16;

/// Shared memory of a cube's products, with room to spare.
const PRODUCTS_BYTES: usize = 2048;

/// Most tiles of the experts' tokens in a pass of `n` rows.
pub(crate) fn most_tiles(n: usize, used: usize, experts: usize, rows: usize) -> usize {
    n * used / rows + experts.min(n * used)
}

/// The same for any pass of at most `n` rows.
pub(crate) fn room_for_tiles(n: usize, used: usize, experts: usize) -> usize {
    most_tiles(n, used, experts, LEAST_ROWS)
}

impl Stage {
    /// How the matrix units take the experts' products of `n` rows, if they do.
    fn expert_tiling(&self, ffn: &FeedForward<Gpu>, n: usize) -> Option<Tiling> {
        if n <= self.abilities.few {
            return None;
        }
        // Tiles as large as what an expert will have of the rows: whole ones cost what partial ones do.
        let each = n * self.shape.experts_used / self.shape.experts;
        let rows = (2 * each).next_power_of_two().clamp(LEAST_ROWS, 64);
        let (routed, shared) = ([&ffn.gate, &ffn.up, &ffn.down].map(|e| &e.all), &ffn.shared);
        let direct = |t: &Tiling| {
            let mut matrices = routed.into_iter().chain([&shared.gate, &shared.up, &shared.down]);
            matrices.all(|m| is_direct(m.format, m.input, t))
        };
        // Without a way through shared memory, tiles may be so small that three cubes find room beside each other.
        let small = self.tiling(rows, 1, &[(128, 64)]).filter(direct);
        small.or_else(|| self.tiling(rows, 1, &[(256, 64), (256, 32)]))
    }

    /// The form in which the products of few rows want hidden activations.
    fn hidden_form(&self, ffn: &FeedForward<Gpu>) -> Form {
        let int8 = ffn.down.all.format.int8() || ffn.shared.down.format.int8();
        if int8 { Form::Quantized } else { Form::Plain }
    }

    /// Chooses experts. Of few rows the shared expert's gate and up come with the router: the choice is not theirs to
    /// wait for.
    #[allow(unsafe_code)]
    pub(crate) fn route_step(
        &mut self,
        ffn: &FeedForward<Gpu>,
        x: &Rows,
        logits: &mut Rows,
        routes: &mut Routes,
    ) {
        let n = x.n;
        routes.n = n;
        let mut shared = std::mem::take(&mut self.scratch.shared);
        let cubes = match (&mut shared, self.expert_tiling(ffn, n)) {
            (Some(shared), None) => {
                let [gate, up] = &mut **shared;
                let own = &ffn.shared;
                self.project_step(x, &mut [(&ffn.router, logits), (&own.gate, gate), (&own.up, up)]);
                cubes(gate.stride / 4, ROUTE_UNITS as u32)
            }
            _ => {
                self.project_step(x, &mut [(&ffn.router, logits)]);
                0
            }
        };
        let nothing = &self.nothing;
        let (gate, up) = shared.as_ref().map_or((&nothing[0], &nothing[0]), |s| (&s[0].values, &s[1].values));
        let (bias, table, hash) = match &ffn.choice {
            Choice::Hash(table) => (&nothing[0], &table.values[self.index], true),
            Choice::Score(bias) => (&bias.values[self.index], &nothing[0], false),
        };
        let s = RouteShape {
            experts: self.shape.experts,
            used: self.shape.experts_used,
            stride: logits.stride,
            hash,
            scale: Real::new(self.shape.route_scale),
            clamp: Real::new(ffn.clamp),
        };
        let form = self.hidden_form(ffn);
        let hidden = self.scratch.hidden.output(n * (s.used + 1), form);
        let mixing = Mixing::beside(self.mixing.take().as_ref());
        let mixes = mixing.values.len() as u32;
        // SAFETY: the table's values were checked to be experts; the shared expert's products have rows of the hidden
        // activations' stride.
        unsafe {
            self.timer.time(&self.client, "route", || {
                experts::route::launch_unchecked(
                    &self.client,
                    CubeCount::new_2d(n as u32, 1 + mixes + cubes),
                    CubeDim::new_1d(ROUTE_UNITS as u32),
                    logits.values.arg(4),
                    bias.arg(4),
                    table.arg(4),
                    self.plan.arg(4),
                    routes.ids.arg(4),
                    routes.weights.arg(4),
                    gate.arg(16),
                    up.arg(16),
                    hidden,
                    mixing,
                    s,
                );
            });
        }
        self.scratch.shared = shared;
    }

    /// How `rows` rows of the routed experts' matrices meet activations, of which a cube reads `x` (rows, stride); `joins`
    /// bytes of shared memory are for what it does with the products.
    fn expert(
        &self,
        ffn: &FeedForward<Gpu>,
        routed: &[&Matrix],
        rows: usize,
        x: (usize, usize),
        joins: usize,
    ) -> Expert {
        let units = routed.iter().map(|m| m.units()).min().unwrap_or(1);
        let per_plane = rows_per_plane(units, self.abilities.plane, 4, rows);
        let tables = routed.iter().chain([&&ffn.shared.down]).any(|m| m.format == Format::Iq2);
        let others = PRODUCTS_BYTES + joins + if tables { tables_bytes(self.abilities.ptx) } else { 0 };
        let long = [Format::Iq2, Format::Q2K].iter().any(|f| routed.iter().all(|m| m.format == *f));
        Expert {
            hidden: self.shape.expert_width,
            width: self.shape.width,
            used: self.shape.experts_used,
            clamp: Real::new(ffn.clamp),
            per_plane,
            tables,
            staged: long && staged_bytes(x.0, x.1) + others <= self.abilities.shared,
        }
    }

    /// `y = shared(x) + sum over chosen experts, ascending, of their weighted outputs`.
    #[allow(unsafe_code)]
    pub(crate) fn experts_step(&mut self, ffn: &FeedForward<Gpu>, x: &Rows, routes: &Routes, y: &mut Rows) {
        let n = x.n;
        let tiling = self.expert_tiling(ffn, n);
        self.current.grouped = tiling.is_some();
        if let Some(tiling) = tiling {
            self.experts_of_many(ffn, x, routes, y, tiling);
            return;
        }
        let (gate, up, shared) = (&ffn.gate.all, &ffn.up.all, &ffn.shared);
        if [gate, up].iter().any(|m| m.format.int8()) && !x.quantized {
            self.quantize(x, n);
        }
        y.take(n, self.shape.width);
        let used = self.shape.experts_used;
        let planes = self.planes();
        let mut s = self.expert(ffn, &[gate, up], self.shape.expert_width, (1, x.stride), 0);
        if s.hidden.is_multiple_of(4) {
            s.per_plane = 4;
        }
        let per_cube = planes * s.per_plane;
        // Blocks of the int8 form must not straddle cubes.
        let (down, shared_down) = (&ffn.down.all, &shared.down);
        let wanted = self.hidden_form(ffn);
        let form = if per_cube.is_multiple_of(32) { wanted } else { Form::Plain };
        let out = self.scratch.hidden.output(n * (used + 1), form);
        // SAFETY: routes are experts; hidden has a row for every pair.
        unsafe {
            self.timer.time(&self.client, "hidden", || {
                experts::hidden::launch_unchecked(
                    &self.client,
                    CubeCount::new_2d(s.hidden.div_ceil(per_cube) as u32, (n * used) as u32),
                    self.plane_dim(),
                    x.input(),
                    gate.arg(),
                    up.arg(),
                    routes.ids.arg(4),
                    routes.weights.arg(4),
                    self.words.arg(8),
                    out,
                    s,
                    per_cube,
                );
            });
        }
        if form != wanted {
            self.quantize(&self.scratch.hidden, n * (used + 1));
        }
        let joins = self.join_bytes(1);
        let s = self.expert(ffn, &[down], self.shape.width, (used, self.scratch.hidden.stride), joins);
        if self.joined_part(n).is_some() {
            self.last_product = Some(LastProduct::Experts {
                hidden: self.scratch.hidden.input(),
                down: Box::new([down.arg(), shared_down.arg()]),
                ids: routes.ids.clone(),
                s: Expert { per_plane: JOINED_ROWS, ..s },
            });
            return;
        }
        // SAFETY: as above; `y` has a row for every row.
        unsafe {
            self.timer.time(&self.client, "down", || {
                experts::down::launch_unchecked(
                    &self.client,
                    CubeCount::new_2d(self.plane_cubes(s.width, s.per_plane), n as u32),
                    self.plane_dim(),
                    self.scratch.hidden.input(),
                    down.arg(),
                    shared_down.arg(),
                    routes.ids.arg(4),
                    self.words.arg(8),
                    y.values.arg(4),
                    y.stride,
                    s,
                );
            });
        }
    }

    /// The same with many rows: tokens grouped by expert, on the matrix units.
    #[allow(unsafe_code)]
    fn experts_of_many(
        &mut self,
        ffn: &FeedForward<Gpu>,
        x: &Rows,
        routes: &Routes,
        y: &mut Rows,
        tiling: Tiling,
    ) {
        let (n, used, experts) = (x.n, self.shape.experts_used, self.shape.experts);
        let Some(grouped) = &self.scratch.grouped else { return };
        y.take(n, self.shape.width);
        let rows = tiling.rows;
        let most = most_tiles(n, used, experts, rows);
        let dim = CubeDim::new_1d(matmul::UNITS as u32);
        let shape = |shared: bool, x_stride: usize, columns: usize, stride: usize| ExpertMatmul {
            tiling,
            shared,
            used,
            x_stride,
            columns,
            stride,
            clamp: Real::new(ffn.clamp),
        };
        self.halve(x);
        let (hidden, hidden_stride) = (&grouped.hidden, self.shape.expert_width.next_multiple_of(64));
        let (words, shared) = (&self.pair_words, &ffn.shared);
        let tiles = |is_shared: bool| if is_shared { n.div_ceil(rows) } else { most } as u32;
        // SAFETY: routes are experts; every buffer has a row for every pair, and room for `most` tiles.
        unsafe {
            self.timer.time(&self.client, "sort_pairs", || {
                grouped::sort_pairs::launch_unchecked(
                    &self.client,
                    CubeCount::new_single(),
                    CubeDim::new_1d(256),
                    routes.ids.arg(4),
                    grouped.sorted.arg(4),
                    grouped.tiles.arg(4),
                    (n * used) as u32,
                    experts,
                    rows as u32,
                );
            });
            for (gate, up, is_shared) in
                [(&shared.gate, &shared.up, true), (&ffn.gate.all, &ffn.up.all, false)]
            {
                let s = shape(is_shared, x.stride, self.shape.expert_width, hidden_stride);
                self.timer.time(&self.client, "hidden_matmul", || {
                    grouped::hidden_matmul::launch_unchecked(
                        &self.client,
                        CubeCount::new_2d(s.columns.div_ceil(tiling.columns / 2) as u32, tiles(is_shared)),
                        dim,
                        x.halves.arg(16),
                        gate.arg(),
                        up.arg(),
                        words.arg(8),
                        grouped.sorted.arg(4),
                        grouped.tiles.arg(4),
                        routes.weights.arg(4),
                        hidden.arg(2),
                        n as u32,
                        s,
                    );
                });
            }
            for (down, is_shared) in [(&shared.down, true), (&ffn.down.all, false)] {
                let s = shape(is_shared, hidden_stride, self.shape.width, y.stride);
                self.timer.time(&self.client, "down_matmul", || {
                    grouped::down_matmul::launch_unchecked(
                        &self.client,
                        CubeCount::new_2d(s.columns.div_ceil(tiling.columns) as u32, tiles(is_shared)),
                        dim,
                        hidden.arg(16),
                        down.arg(),
                        words.arg(8),
                        grouped.sorted.arg(4),
                        grouped.tiles.arg(4),
                        grouped.parts.arg(4),
                        n as u32,
                        s,
                    );
                });
            }
            self.timer.time(&self.client, "combine", || {
                grouped::combine::launch_unchecked(
                    &self.client,
                    CubeCount::new_2d((self.shape.width / 4).div_ceil(128) as u32, n as u32),
                    CubeDim::new_1d(128),
                    grouped.parts.arg(16),
                    y.values.arg(16),
                    used,
                    self.shape.width,
                    y.stride,
                );
            });
        }
    }
}
