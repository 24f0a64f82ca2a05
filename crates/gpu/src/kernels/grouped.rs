//! The experts' products with many rows, on the matrix units: tokens grouped by expert (A.8).

use super::common::Real;
use super::dot::{Eight, Four, Weights};
use super::experts::swiglu;
use super::matmul::{Tiling, UNITS, input_row, product};
use super::units::{column_of, row_of, store_sum};
use cubecl::prelude::*;
use half::f16;

/// Units of the cube that sorts.
pub const SORT_UNITS: usize = 256;

/// Sorts the pass's (row, expert) pairs by expert, in one cube: `sorted` lists pairs, and `tiles` has for each tile of
/// at most `rows` of them its expert, first place and count; word 0 of `tiles` is their number.
#[cube(launch_unchecked)]
pub fn sort_pairs(
    ids: &[u32],
    sorted: &mut [u32],
    tiles: &mut [u32],
    pairs: u32,
    #[comptime] experts: usize,
    #[comptime] rows: u32,
) {
    let counts = Shared::<[Atomic<u32>]>::new_slice(experts);
    let next = Shared::<[Atomic<u32>]>::new_slice(experts);
    let mut e = UNIT_POS as usize;
    while e < experts {
        counts[e].store(0u32);
        e += CUBE_DIM as usize;
    }
    sync_cube();
    let mut p = UNIT_POS;
    while p < pairs {
        counts[ids[p as usize] as usize].fetch_add(1u32);
        p += CUBE_DIM;
    }
    sync_cube();
    #[unroll]
    for step in 0..comptime!(experts.div_ceil(SORT_UNITS)) {
        let e = UNIT_POS as usize + comptime!(step * SORT_UNITS);
        if e < experts {
            let mut first = 0u32;
            let mut tile = 0u32;
            for j in 0..e {
                let count = counts[j].load();
                first += count;
                tile += (count + comptime!(rows - 1)) / rows;
            }
            let count = counts[e].load();
            next[e].store(first);
            let mut done = 0u32;
            while done < count {
                let at = (4 + 4 * tile) as usize;
                tiles[at] = e as u32;
                tiles[at + 1] = first + done;
                tiles[at + 2] = u32::min(rows, count - done);
                tile += 1;
                done += rows;
            }
            if e == comptime!(experts - 1) {
                tiles[0] = tile;
            }
        }
    }
    sync_cube();
    p = UNIT_POS;
    while p < pairs {
        let place = next[ids[p as usize] as usize].fetch_add(1u32);
        sorted[place as usize] = p;
        p += CUBE_DIM;
    }
}

/// What the experts' products are specialised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExpertMatmul {
    /// How planes share a tile.
    pub tiling: Tiling,
    /// Whether this is the shared expert: its tiles are the rows in order.
    pub shared: bool,
    /// Experts of a token.
    pub used: usize,
    /// Values from row to row of the input.
    pub x_stride: usize,
    /// Rows of an expert's matrix.
    pub columns: usize,
    /// Values from row to row of the output.
    pub stride: usize,
    /// SwiGLU clamp.
    pub clamp: Real,
}

/// The tile of a cube: expert, first place among the sorted pairs, pairs of it (none beyond the last tile).
#[derive(CubeType, Clone, Copy)]
struct ExpertTile {
    expert: usize,
    first: usize,
    count: usize,
}

#[cube]
fn expert_tile(tiles: &[u32], n: u32, #[comptime] s: ExpertMatmul) -> ExpertTile {
    let tile = CUBE_POS_Y as usize;
    let rows = comptime!(s.tiling.rows);
    if comptime!(s.shared) {
        let first = tile * rows;
        ExpertTile { expert: 0usize, first, count: usize::min(rows, n as usize - first) }
    } else {
        let at = 4 + 4 * tile;
        let count = select(CUBE_POS_Y < tiles[0], tiles[at + 2], 0u32);
        ExpertTile { expert: tiles[at] as usize, first: tiles[at + 1] as usize, count: count as usize }
    }
}

/// Row of the hidden activations of the `i`th pair of a tile, and the row of the pass it is of.
#[cube]
fn pair_rows(sorted: &[u32], tile: &ExpertTile, i: usize, #[comptime] s: ExpertMatmul) -> (usize, usize) {
    let i = usize::min(i, tile.count - 1);
    let (used, place) = (comptime!(s.used), tile.first + i);
    if comptime!(s.shared) {
        (place * (used + 1) + used, place)
    } else {
        let pair = sorted[place] as usize;
        (pair / used * (used + 1) + pair % used, pair / used)
    }
}

/// Where the activations of the tile's rows begin: of the rows of the pass, or of the pairs' hidden ones.
#[cube]
fn pair_starts(
    sorted: &[u32],
    tile: &ExpertTile,
    #[comptime] hidden: bool,
    #[comptime] s: ExpertMatmul,
) -> Array<usize> {
    let t = comptime!(s.tiling);
    let mut starts = Array::<usize>::new(comptime!(t.eights()));
    #[unroll]
    for i in 0..comptime!(t.eights()) {
        let (place, row) = pair_rows(sorted, tile, input_row(i, t), s);
        starts[i] = if comptime!(hidden) { place } else { row } * comptime!(s.x_stride / 8);
    }
    starts
}

/// Weighted hidden activations of the tile's pairs: the weights' tile is half gate, half up.
#[cube(launch_unchecked)]
pub fn hidden_matmul(
    x: &[Eight],
    gate: &Weights,
    up: &Weights,
    words: &[Vector<u32, Const<2>>],
    sorted: &[u32],
    tiles: &[u32],
    weights: &[f32],
    out: &mut [f16],
    n: u32,
    #[comptime] s: ExpertMatmul,
) {
    let t = comptime!(s.tiling);
    let tile = expert_tile(tiles, n, s);
    if tile.count > 0 {
        let first_column = CUBE_POS_X as usize * comptime!(t.columns / 2);
        let first = tile.expert * comptime!(s.columns);
        let (row, last) = (first + first_column, first + comptime!(s.columns - 1));
        let starts = pair_starts(sorted, &tile, false, s);
        let sums = product(x, &starts, gate, row, up, row, last, words, t, true);
        // Each plane lays a tile of gate and one of up side by side and joins them.
        let area = comptime!(t.side * t.side);
        let mut stage = Shared::<[f32]>::new_slice(comptime!(2 * t.side * t.side * t.planes_m * t.planes_n));
        let base = PLANE_POS as usize * 2 * area;
        let halves = comptime!(t.n() / 2);
        #[unroll]
        for i in 0..comptime!(t.m()) {
            #[unroll]
            for j in 0..halves {
                let (first_row, first_column) = (row_of(i, t), first_column + column_of(j, t, true));
                store_sum(&sums, &mut stage[base..base + area], comptime!(i * t.n() + j), t.side, t);
                store_sum(
                    &sums,
                    &mut stage[base + area..base + 2 * area],
                    comptime!(i * t.n() + halves + j),
                    t.side,
                    t,
                );
                sync_plane();
                let mut k = UNIT_POS_PLANE as usize;
                while k < area {
                    let (r, c) = (first_row + k / comptime!(t.side), first_column + k % comptime!(t.side));
                    if r < tile.count && c < comptime!(s.columns) {
                        let (place, _) = pair_rows(sorted, &tile, r, s);
                        let mut weight = 1.0f32;
                        if comptime!(!s.shared) {
                            weight = weights[sorted[tile.first + r] as usize];
                        }
                        let v = swiglu(stage[base + k], stage[base + area + k], s.clamp);
                        out[place * comptime!(s.stride) + c] = f16::cast_from(v * weight);
                    }
                    k += PLANE_DIM as usize;
                }
                sync_plane();
            }
        }
    }
}

/// Down projections of the tile's pairs, each to its own row of `out`.
#[cube(launch_unchecked)]
pub fn down_matmul(
    hidden: &[Eight],
    w: &Weights,
    words: &[Vector<u32, Const<2>>],
    sorted: &[u32],
    tiles: &[u32],
    out: &mut [f32],
    n: u32,
    #[comptime] s: ExpertMatmul,
) {
    let t = comptime!(s.tiling);
    let tile = expert_tile(tiles, n, s);
    if tile.count > 0 {
        let first_column = CUBE_POS_X as usize * comptime!(t.columns);
        let first = tile.expert * comptime!(s.columns);
        let (row, last) = (first + first_column, first + comptime!(s.columns - 1));
        let starts = pair_starts(sorted, &tile, true, s);
        let sums = product(hidden, &starts, w, row, w, row + UNITS, last, words, t, false);
        let area = comptime!(t.side * t.side);
        let mut stage = Shared::<[f32]>::new_slice(comptime!(t.side * t.side * t.planes_m * t.planes_n));
        let base = PLANE_POS as usize * area;
        #[unroll]
        for i in 0..comptime!(t.m()) {
            #[unroll]
            for j in 0..comptime!(t.n()) {
                let (first_row, first_column) = (row_of(i, t), first_column + column_of(j, t, false));
                store_sum(&sums, &mut stage[base..base + area], comptime!(i * t.n() + j), t.side, t);
                sync_plane();
                let mut k = UNIT_POS_PLANE as usize;
                while k < area {
                    let (r, c) = (first_row + k / comptime!(t.side), first_column + k % comptime!(t.side));
                    if r < tile.count && c < comptime!(s.columns) {
                        let (place, _) = pair_rows(sorted, &tile, r, s);
                        out[place * comptime!(s.stride) + c] = stage[base + k];
                    }
                    k += PLANE_DIM as usize;
                }
                sync_plane();
            }
        }
    }
}

/// `y = shared + routed experts, ascending`, of the rows that [`down_matmul`] left.
#[cube(launch_unchecked)]
pub fn combine(
    parts: &[Four],
    y: &mut [Four],
    #[comptime] used: usize,
    #[comptime] width: usize,
    #[comptime] stride: usize,
) {
    let row = CUBE_POS_Y as usize;
    let k = (CUBE_POS_X * CUBE_DIM + UNIT_POS) as usize;
    if k < comptime!(width / 4) {
        let first = row * comptime!(used + 1);
        let mut sum = parts[(first + used) * comptime!(stride / 4) + k];
        #[unroll]
        for slot in 0..used {
            sum += parts[(first + slot) * comptime!(stride / 4) + k];
        }
        y[row * comptime!(stride / 4) + k] = sum;
    }
}
