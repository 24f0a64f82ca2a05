//! Products with weight matrices.

use crate::attention::Absorbing;
use crate::hyper::Unmixed;
use crate::kernels::cache;
use crate::kernels::hyper::MIX_UNITS;
use crate::kernels::matmul::{self, Dense, Tiling};
use crate::kernels::mixed::{Shares, project_mixed};
use crate::kernels::project::{self, Job, JobLaunch};
use crate::kernels::tables::staged_bytes;
use crate::layout::Format;
use crate::rows::{Matrix, Rows};
use crate::stage::Stage;
use cubecl::prelude::*;

/// Buffers that a kernel may have, on any device: of the 31 of Metal, `wgpu` takes two.
const MAX_BUFFERS: usize = 29;

/// Rows of weights of a tile of the matrix units.
const DENSE_COLUMNS: usize = 128;
/// Cubes that keep a large device busy: two for each of its processors.
const WANTED_CUBES: usize = 264;

/// Units of a cube of the kernels that give a plane a row.
const UNITS: u32 = 256;

/// Planes that keep a large device busy.
const WANTED_PLANES: usize = 2048;

/// Rows of weights that a plane takes at once: enough loads on the way, but not so many that few planes are left; and
/// a divisor of the rows at hand.
pub(crate) fn rows_per_plane(units: usize, plane: u32, columns: usize, rows: usize) -> usize {
    // Loads of one lane for one row.
    let loads = units.div_ceil(plane as usize);
    let wanted = match loads {
        0..=2 => 4,
        3..=16 => 2,
        _ => 1,
    };
    let most = wanted.min((16 / columns).max(1)).min(rows / WANTED_PLANES);
    [4, 2].into_iter().find(|&r| r <= most && rows.is_multiple_of(r)).unwrap_or(1)
}

/// Rows of activations that a plane takes at once.
pub(crate) fn columns(n: usize) -> usize {
    [1, 2, 4].into_iter().find(|&c| c >= n).unwrap_or(8)
}

/// Planes of a cube, at the least.
pub(crate) fn planes(plane: u32) -> usize {
    (UNITS / plane).max(1) as usize
}

impl Stage {
    /// Cubes so that every `per_plane` of `rows` rows have a plane.
    pub(crate) fn plane_cubes(&self, rows: usize, per_plane: usize) -> u32 {
        let planes = self.planes();
        rows.div_ceil(planes * per_plane) as u32
    }

    /// Planes of a cube, at the least.
    pub(crate) fn planes(&self) -> usize {
        planes(self.abilities.plane)
    }

    pub(crate) fn plane_dim(&self) -> CubeDim {
        CubeDim::new_1d(UNITS)
    }

    /// `out = W x` for several matrices with the same input.
    pub(crate) fn project_step(&mut self, x: &Rows, jobs: &mut [(&Matrix, &mut Rows)]) {
        for (w, out) in jobs.iter_mut() {
            out.take(x.n, w.rows);
        }
        if let Some(unmixed) = self.unmixed.take() {
            match self.jobs_of_mix(jobs).filter(|_| unmixed.is(x)) {
                Some((jobs, shares)) => return self.products_of_mix(unmixed, jobs, shares),
                None => self.mix_rows(unmixed, &self.nothing[0], 1, false),
            }
        }
        let mut rest: Vec<_> = jobs.iter().map(|(w, out)| (*w, &**out, w.rows)).collect();
        while !rest.is_empty() {
            // As many in one launch as a kernel may have buffers, beside those of the input and the tables.
            let mut buffers = 5 + self.absorbing.as_ref().map_or(0, Absorbing::buffers);
            buffers += if self.norm.is_some() { 2 } else { 0 };
            let fit = rest.iter().take_while(|(w, ..)| {
                buffers += w.buffers() + 1;
                buffers <= MAX_BUFFERS
            });
            let later = rest.split_off(fit.count());
            if !later.is_empty()
                && let Some(norm) = self.norm.take()
            {
                // The others will want it, too.
                self.norm_rows(norm);
            }
            self.products(x, &rest);
            rest = later;
        }
    }

    /// Jobs of products that mix their input themselves, and each cube's share of them; if they can.
    fn jobs_of_mix(&self, jobs: &[(&Matrix, &mut Rows)]) -> Option<(SequenceArg<Job>, Shares)> {
        if !jobs.iter().all(|(w, _)| matches!(w.format, Format::Q8 | Format::F16)) {
            return None;
        }
        let mut jobs: Vec<_> = jobs.iter().collect();
        jobs.sort_by_key(|(w, _)| w.format != Format::F16);
        let cubes = self.abilities.processors;
        let (mut args, mut items, mut halves) = (SequenceArg::new(), 0, 0);
        for (w, out) in jobs {
            args.push(JobLaunch::new(w.arg(), out.values.arg(4), items, w.rows, out.stride, w.rows, 1));
            items += (w.rows as u32).div_ceil(cubes);
            if w.format == Format::F16 {
                halves = items;
            }
        }
        let shares = Shares::new(cubes, items, halves, self.shape.width, self.abilities.shared)?;
        Some((args, shares))
    }

    /// Products of an input that they mix themselves.
    #[allow(unsafe_code)]
    fn products_of_mix(&self, unmixed: Unmixed, jobs: SequenceArg<Job>, shares: Shares) {
        let (mixed, x) = unmixed.arg();
        let (count, dim) = (CubeCount::new_1d(shares.cubes), CubeDim::new_1d(MIX_UNITS as u32));
        // SAFETY: every matrix has rows of the input's width, every output room for a row.
        self.timer.time(&self.client, "project_mixed", || unsafe {
            project_mixed::launch_unchecked(&self.client, count, dim, mixed, x, jobs, shares);
        });
    }

    /// Tiles of `rows` rows of activations: of the columns and depths given the first that shared memory has room for,
    /// if there are matrix units.
    pub(crate) fn tiling(&self, rows: usize, planes_m: usize, wanted: &[(usize, usize)]) -> Option<Tiling> {
        let (side, plane) = (self.abilities.tile?, self.abilities.plane as usize);
        let fragments = self.abilities.fragments;
        let planes_n = matmul::UNITS / plane / planes_m;
        let with = |&(columns, depth)| {
            let tiling =
                |buffers| Tiling { side, rows, columns, depth, planes_m, planes_n, buffers, fragments };
            // Two cubes should find room beside each other.
            let two = 2 * tiling(2).shared_bytes() <= self.abilities.shared;
            tiling(if two { 2 } else { 1 })
        };
        wanted.iter().map(with).find(|t| t.shared_bytes() <= self.abilities.shared)
    }

    /// Whether a group of the output projection's rows is whole tiles.
    pub(crate) fn groups_fit_tiles(&self) -> bool {
        self.shape.out_rank.is_multiple_of(DENSE_COLUMNS)
    }

    /// Products with many rows, on the matrix units.
    #[allow(unsafe_code)]
    fn products_of_many(&self, x: &Rows, w: &Matrix, out: &Rows, group: usize) {
        // Large tiles need less of shared memory's bandwidth, but there should be enough of them for all of the device.
        let cubes = x.n.div_ceil(128) * w.rows.div_ceil(DENSE_COLUMNS);
        let (rows, planes_m) = if cubes >= WANTED_CUBES { (128, 2) } else { (64, 1) };
        let wanted = [(DENSE_COLUMNS, 64), (DENSE_COLUMNS, 32)];
        let Some(tiling) = self.tiling(rows, planes_m, &wanted) else { return };
        let s = Dense { tiling, x_stride: x.stride, columns: w.rows, group, stride: out.stride };
        // SAFETY: outputs have whole tiles of rows; columns beyond the last are not written.
        unsafe {
            self.timer.time(&self.client, "matmul", || {
                matmul::matmul::launch_unchecked(
                    &self.client,
                    CubeCount::new_2d(
                        w.rows.div_ceil(tiling.columns) as u32,
                        x.n.div_ceil(tiling.rows) as u32,
                    ),
                    CubeDim::new_1d(matmul::UNITS as u32),
                    x.halves.arg(16),
                    w.arg(),
                    self.pair_words.arg(8),
                    out.values.arg(4),
                    x.n as u32,
                    s,
                );
            });
        }
    }

    /// Products of matrices, each in groups of rows that share a slice of the input.
    #[allow(unsafe_code)]
    pub(crate) fn products(&mut self, x: &Rows, jobs: &[(&Matrix, &Rows, usize)]) {
        if x.n > self.abilities.few
            && jobs.iter().all(|(w, _, group)| *group == w.rows || group.is_multiple_of(DENSE_COLUMNS))
        {
            self.halve(x);
            jobs.iter().for_each(|(w, out, group)| self.products_of_many(x, w, out, *group));
            return;
        }
        if !x.quantized && jobs.iter().any(|(w, ..)| w.format.int8()) {
            self.quantize(x, x.n);
        }
        let columns = columns(x.n);
        let absorbing = self.absorbing.take();
        // The cubes norm what they multiply, where the products take that from shared memory and there is room.
        let mut norm = self.norm.take();
        let room = 2 * staged_bytes(columns, x.stride) <= self.abilities.shared;
        if absorbing.is_none() || !room || jobs.iter().any(|(w, ..)| w.format != Format::Q8) {
            norm.take().into_iter().for_each(|norm| self.norm_rows(norm));
        }
        let mut raw = SequenceArg::new();
        norm.iter().for_each(|norm| raw.push(norm.raw()));
        let mut first = absorbing.as_ref().map_or(0, |a| (a.roles() * x.n) as u32);
        let mut args = SequenceArg::new();
        for (w, out, group) in jobs {
            let per_plane = rows_per_plane(w.units(), self.abilities.plane, columns, *group);
            args.push(JobLaunch::new(
                w.arg(),
                out.values.arg(4),
                first,
                w.rows,
                out.stride,
                *group,
                per_plane,
            ));
            first += self.plane_cubes(w.rows, per_plane);
        }
        let tables = jobs.iter().any(|(w, ..)| w.format == Format::Iq2);
        let count = CubeCount::new_2d(first, x.n.div_ceil(columns) as u32);
        let (client, dim, words) = (&self.client, self.plane_dim(), self.words.arg(8));
        match absorbing {
            // SAFETY: every matrix has rows of the input's (or a group's) width, every output room for its rows.
            None => self.timer.time(client, "project", || unsafe {
                project::project::launch_unchecked(
                    client,
                    count,
                    dim,
                    x.input(),
                    args,
                    words,
                    x.n as u32,
                    columns,
                    tables,
                );
            }),
            // SAFETY: as above; the plan's stores lie in the arena, with a slot for every position.
            Some(a) => self.timer.time(client, "project_absorb", || unsafe {
                cache::project_absorb::launch_unchecked(
                    client,
                    count,
                    dim,
                    x.input(),
                    raw,
                    args,
                    words,
                    a.window,
                    a.compressors,
                    self.plan.arg(4),
                    self.plan.arg(4),
                    a.arena.arg(4),
                    a.layer as u32,
                    x.n as u32,
                    columns,
                    tables,
                );
            }),
        }
    }
}
