//! The output of attention: the splits of its sums joined, both halves of the output projection.
//!
//! Each may wait for the next, until the sublayer's output is joined into the streams: of one row, one kernel does all.

use crate::buffer::Buffer;
use crate::hyper::LastProduct;
use crate::kernels::dot::{Form, InputLaunch, OutputLaunch, WeightsLaunch};
use crate::kernels::flash::{self, FlashShape};
use crate::kernels::hyper::Hyper;
use crate::kernels::output::{OutputShape, SplitsLaunch, attention_output};
use crate::kernels::project;
use crate::layout::Format;
use crate::project::columns;
use crate::rows::{Matrix, Rows};
use crate::stage::Stage;
use cubecl::prelude::*;
use half::f16;

/// Attention's sums of some rows, by splits, to be joined.
pub(crate) struct Splits {
    pub(crate) sinks: Buffer,
    pub(crate) out: OutputLaunch,
    pub(crate) first: u32,
    pub(crate) rows: u32,
    pub(crate) first_angle: u32,
    pub(crate) count: u32,
    pub(crate) s: FlashShape,
    pub(crate) groups: usize,
}

/// Products of groups of few rows, to be made.
struct Groups {
    x: InputLaunch,
    weights: WeightsLaunch,
    out: OutputLaunch,
    n: usize,
    /// Rows of the matrix, those of a group, and those of a cube.
    rows: usize,
    group: usize,
    per_cube: usize,
    units: u32,
}

/// A row on its way through the first half of the output projection.
pub(crate) struct Halfway {
    splits: Splits,
    groups: Groups,
}

/// A row whose way through both halves waits to be one step with the join that follows.
pub(crate) struct Heads {
    splits: Splits,
    first: WeightsLaunch,
    last: WeightsLaunch,
    o: OutputShape,
}

/// What the join is of.
pub(crate) struct Joined {
    pub(crate) streams: BufferArg,
    pub(crate) mix: BufferArg,
    pub(crate) control: BufferArg,
    pub(crate) partial: BufferArg,
}

impl Stage {
    /// Whether attention's splits may wait for what follows.
    pub(crate) fn output_may_join(&self, n: usize) -> bool {
        n == 1 && self.abilities.bulk && self.abilities.processors > 0 && self.joined_part(n).is_some()
    }

    /// Joins attention's splits.
    #[allow(unsafe_code)]
    pub(crate) fn combine(&self, w: Splits) {
        // SAFETY: partial sums are there for all splits of all rows.
        self.timer.time(&self.client, "combine", || unsafe {
            flash::combine::launch_unchecked(
                &self.client,
                CubeCount::new_2d(w.s.heads as u32, w.rows),
                CubeDim::new_1d((w.groups * w.s.lanes_of_row()) as u32),
                self.scratch.partials.arg(16),
                self.scratch.stats.arg(4),
                w.sinks.arg(4),
                self.plan.arg(4),
                w.out,
                w.first,
                w.first_angle,
                w.count,
                w.s,
                w.groups,
            );
        });
    }

    /// Group `g` of the input meets rows `g * rows/groups..` of `w`.
    pub(crate) fn project_groups_step(&mut self, w: &Matrix, x: &Rows, out: &mut Rows) {
        out.take(x.n, w.rows);
        let group = w.rows / (x.width / w.input);
        let splits = self.splits.take();
        match (splits, self.quantized_products(x, w, out, group)) {
            (Some(splits), Some(groups)) if w.format == Format::Q8 => {
                self.halfway = Some(Halfway { splits, groups });
            }
            (splits, groups) => {
                splits.into_iter().for_each(|s| self.combine(s));
                match groups {
                    Some(groups) => self.project_groups(groups),
                    None => self.products(x, &[(w, &*out, group)]),
                }
            }
        }
    }

    /// Products of few rows that another product will want in int8, if their shape allows it.
    fn quantized_products(&self, x: &Rows, w: &Matrix, out: &mut Rows, group: usize) -> Option<Groups> {
        // Cubes of a block of rows, two of which find room at a time.
        let (plane, per_cube) = (self.abilities.plane, 32usize);
        let units = (per_cube as u32 * plane).min(self.abilities.units).min(512);
        if self.abilities.tile.is_none()
            || x.n > self.abilities.few
            || !per_cube.is_multiple_of((units / plane) as usize)
            || !group.is_multiple_of(per_cube)
        {
            return None;
        }
        if w.format.int8() && !x.quantized {
            self.quantize(x, x.n);
        }
        let out = out.output(x.n, Form::Quantized);
        let weights = w.arg();
        Some(Groups { x: x.input(), weights, out, n: x.n, rows: w.rows, group, per_cube, units })
    }

    #[allow(unsafe_code)]
    fn project_groups(&self, g: Groups) {
        let (columns, planes) = (columns(g.n), (g.units / self.abilities.plane) as usize);
        // SAFETY: as for plain products.
        self.timer.time(&self.client, "project_quantized", || unsafe {
            project::project_quantized::launch_unchecked(
                &self.client,
                CubeCount::new_2d((g.rows / g.per_cube) as u32, g.n.div_ceil(columns) as u32),
                CubeDim::new_1d(g.units),
                g.x,
                g.weights,
                self.words.arg(8),
                g.out,
                g.n as u32,
                g.group,
                g.per_cube / planes,
                columns,
                g.per_cube,
            );
        });
    }

    /// `y = W low`, the sublayer's output, which waits to be joined where that is one step with it.
    pub(crate) fn project_out_step(&mut self, w: &Matrix, low: &Rows, y: &mut Rows) {
        if let Some(Halfway { splits, groups }) = self.halfway.take() {
            let sizes = (groups.rows / groups.group, groups.rows, w.rows);
            if let Some(o) = self.output_shape(splits.s, sizes).filter(|_| w.format == Format::Q8) {
                y.take(low.n, w.rows);
                let heads = Heads { splits, first: groups.weights, last: w.arg(), o };
                self.last_product = Some(LastProduct::Heads(Box::new(heads)));
                return;
            }
            self.combine(splits);
            self.project_groups(groups);
        }
        if self.joined_part(low.n).is_none() {
            self.project_step(low, &mut [(w, y)]);
            return;
        }
        y.take(low.n, w.rows);
        if w.format.int8() && !low.quantized {
            self.quantize(low, low.n);
        }
        self.last_product = Some(LastProduct::Attention { low: low.input(), weights: Box::new(w.arg()) });
    }

    /// How cubes share what is to be done with a row's heads, if they can, with room for control numbers in f32: `sizes` are
    /// groups, rows of the first matrix, rows of the second.
    fn output_shape(&self, s: FlashShape, sizes: (usize, usize, usize)) -> Option<OutputShape> {
        let cubes = sizes.2 / self.joined_part(1)?;
        if cubes > self.abilities.processors as usize {
            return None;
        }
        OutputShape::new(cubes, s, sizes, (self.abilities.shared, self.join_bytes(1)))
    }

    /// The output of a row's heads, joined into the streams.
    #[allow(unsafe_code)]
    pub(crate) fn output_joined(&self, heads: Heads, j: Joined, half: bool, s: Hyper) {
        let Heads { splits, first, last, o } = heads;
        // Control numbers in f16 leave room for more weights.
        let join = self.join_bytes(1) - if half { 2 * s.controls * s.n * s.part } else { 0 };
        let o = o.with_room(self.abilities.shared, join);
        let launch = match half {
            true => attention_output::launch_unchecked::<f16>,
            false => attention_output::launch_unchecked::<f32>,
        };
        let arg = SplitsLaunch::new(
            self.scratch.partials.arg(16),
            self.scratch.stats.arg(4),
            splits.sinks.arg(4),
            self.plan.arg(4),
            splits.first_angle,
            splits.count,
            splits.s,
        );
        let (told, turn) = (self.scratch.told.arg(16), self.scratch.turn.arg(4));
        // SAFETY: a cube for each part of the channels; there are as many processors, so that all run at once and may wait for
        // each other.
        self.timer.time(&self.client, "attention_output", || unsafe {
            launch(
                &self.client,
                CubeCount::new_1d(o.cubes()),
                CubeDim::new_1d(s.units as u32),
                arg,
                first,
                last,
                told,
                turn,
                j.streams,
                j.mix,
                j.control,
                j.partial,
                o,
                s,
            );
        });
    }
}
