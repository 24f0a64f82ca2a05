//! Matrix times few rows: one plane a row of weights, all matrices of one input in one launch.

use super::common::store_four;
use super::dot::{Four, Input, Output, Weights, dot_fetched, dot_rows, fetch_ahead};
use super::plane::{lane, plane, plane_total, planes};
use super::tables::{Raw, Staged, Tables, fetch_raw};
use crate::layout::Format;
use cubecl::prelude::*;

/// A matrix and where its products go.
#[derive(CubeType, CubeLaunch)]
pub struct Job {
    /// `[rows, input]`.
    pub weights: Weights,
    /// `[n, stride]`.
    pub out: Box<[f32]>,
    /// First cube of this job.
    pub first: u32,
    /// Rows of the matrix.
    #[cube(comptime)]
    pub rows: usize,
    /// Values from row to row of `out`.
    #[cube(comptime)]
    pub stride: usize,
    /// Rows of the matrix that share a slice of the input, for grouped products; else `rows`.
    #[cube(comptime)]
    pub group: usize,
    /// Rows that a plane takes at once.
    #[cube(comptime)]
    pub per_plane: usize,
}

/// `out = W x` for every job. Cubes along y take `columns` rows of the input each.
#[cube(launch_unchecked)]
pub fn project(
    x: &Input,
    mut jobs: Sequence<Job>,
    words: &[Vector<u32, Const<2>>],
    n: u32,
    #[comptime] columns: usize,
    #[comptime] tables: bool,
) {
    project_jobs(x, &Sequence::new(), &mut jobs, words, n, columns, tables);
}

/// This cube's share of the jobs, which multiply `x`, or where there is any the norm of what is `raw`.
#[cube]
pub fn project_jobs(
    x: &Input,
    raw: &Sequence<Raw>,
    jobs: &mut Sequence<Job>,
    words: &[Vector<u32, Const<2>>],
    n: u32,
    #[comptime] columns: usize,
    #[comptime] tables: bool,
) {
    let mut loaded = Tables::load(words, tables);
    if comptime!(tables) {
        loaded.meet();
    }
    #[unroll]
    for j in 0..comptime!(jobs.len()) {
        let job = jobs.index_mut(j);
        let per_plane = comptime!(job.per_plane);
        let per_cube = planes() * per_plane;
        // Before the first cube of the job this wraps round to a row far beyond its last.
        let first = (CUBE_POS_X - job.first) as usize * per_cube;
        if CUBE_POS_X >= job.first && first < comptime!(job.rows) {
            project_rows(x, raw, job, &loaded, first + plane() * per_plane, n, columns);
        }
    }
}

#[cube]
fn project_rows(
    x: &Input,
    raw: &Sequence<Raw>,
    job: &mut Job,
    tables: &Tables,
    row: usize,
    n: u32,
    #[comptime] columns: usize,
) {
    let per_plane = comptime!(job.per_plane);
    // The last rows may be computed twice, by two planes, to the same values.
    let row = row.min(comptime!(job.rows - per_plane));
    let first_column = CUBE_POS_Y as usize * columns;
    let mut acc = Array::<f32>::new(comptime!(per_plane * columns));
    #[unroll]
    for i in 0..comptime!(per_plane * columns) {
        acc[i] = 0.0f32;
    }
    let offset = (row / comptime!(job.group)) * comptime!(job.weights.input);
    let w = &job.weights;
    let mut index = Array::<u32>::new(columns);
    if comptime!(raw.len() == 1) {
        let raw = raw.index(0usize);
        let fetched = fetch_raw(raw, x, first_column, n as usize, columns);
        let mut coming = fetch_ahead(w, row, per_plane, columns);
        let staged = Staged::normed(&fetched, raw, x, columns);
        #[unroll]
        for c in 0..columns {
            index[c] = c.runtime() as u32;
        }
        dot_fetched(w, x, &mut coming, tables, &staged, row, &index, offset, &mut acc, per_plane, columns);
    } else {
        let none = Staged::none(x);
        #[unroll]
        for c in 0..columns {
            index[c] = u32::min((first_column + c) as u32, n - 1);
        }
        dot_rows(w, x, tables, &none, row, &index, offset, &mut acc, per_plane, columns);
    }
    #[unroll]
    for c in 0..columns {
        #[unroll]
        for r in 0..per_plane {
            let sum = plane_total(acc[comptime!(r * columns + c)]);
            if lane() == 0 && first_column + c < n as usize {
                job.out[(first_column + c) * comptime!(job.stride) + row + r] = sum;
            }
        }
    }
}

/// `out = W x` with its int8 form: the planes of a cube take whole blocks of 32 rows of the matrix, and the cube
/// quantizes what they give.
#[cube(launch_unchecked)]
pub fn project_quantized(
    x: &Input,
    weights: &Weights,
    words: &[Vector<u32, Const<2>>],
    mut out: Output,
    n: u32,
    #[comptime] group: usize,
    #[comptime] per_plane: usize,
    #[comptime] columns: usize,
    #[comptime] per_cube: usize,
) {
    let mut tables = Tables::load(words, comptime!(weights.format == Format::Iq2));
    if comptime!(weights.format == Format::Iq2) {
        tables.meet();
    }
    let mut products = Shared::<[f32]>::new_slice(comptime!(per_cube * columns));
    let first = CUBE_POS_X as usize * per_cube;
    let first_column = CUBE_POS_Y as usize * columns;
    // A group of rows is a multiple of a cube's.
    let offset = (first / group) * comptime!(weights.input);
    cube_products(
        x,
        weights,
        &tables,
        first,
        offset,
        first_column,
        n,
        &mut products,
        per_plane,
        columns,
        per_cube,
    );
    sync_cube();
    let fours = comptime!(per_cube / 4);
    #[unroll]
    for c in 0..columns {
        let k = UNIT_POS as usize;
        let valid = k < fours && first_column + c < n as usize;
        let mut v = Four::new(0.0f32);
        if valid {
            #[unroll]
            for i in 0..4usize {
                v.insert(i, products[comptime!(c * per_cube + i) + 4 * k]);
            }
        }
        store_four(&mut out, first_column + c, first / 4 + k, v, valid);
    }
}

/// Products of `per_cube` rows of the matrix, from `first` on, with `columns` rows of the input from value `offset` on:
/// `out [columns, per_cube]`. The cube has at least a plane for every `per_plane` rows.
#[cube]
pub fn cube_products(
    x: &Input,
    weights: &Weights,
    tables: &Tables,
    first: usize,
    offset: usize,
    first_column: usize,
    n: u32,
    out: &mut Shared<[f32]>,
    #[comptime] per_plane: usize,
    #[comptime] columns: usize,
    #[comptime] per_cube: usize,
) {
    let own = plane() * per_plane;
    let none = Staged::none(x);
    let mut index = Array::<u32>::new(columns);
    #[unroll]
    for c in 0..columns {
        index[c] = u32::min((first_column + c) as u32, n - 1);
    }
    // Several rows of activations share what they meet. For one of them, a row of weights at a time takes few registers.
    let at_once = comptime!(if columns == 1 { 1 } else { per_plane });
    #[unroll]
    for turn in 0..comptime!(per_plane / at_once) {
        let own = own + comptime!(turn * at_once);
        let mut acc = Array::<f32>::new(comptime!(at_once * columns));
        #[unroll]
        for i in 0..comptime!(at_once * columns) {
            acc[i] = 0.0f32;
        }
        if own < per_cube {
            dot_rows(weights, x, tables, &none, first + own, &index, offset, &mut acc, at_once, columns);
        }
        #[unroll]
        for c in 0..columns {
            #[unroll]
            for r in 0..at_once {
                let sum = plane_total(acc[comptime!(r * columns + c)]);
                if lane() == 0 && own < per_cube {
                    out[comptime!(c * per_cube + r) + own] = sum;
                }
            }
        }
    }
}
