//! Router, routed experts and the shared expert, for few rows (A.8).

use super::common::{Real, sigmoid, store_four};
use super::dot::{Four, Held, Input, Output, Weights, dot_held, dot_rows, fetch_rows, one_turn};
use super::tables::{Staged, Tables};
use cubecl::prelude::*;

/// Units of a cube that routes a row.
pub const ROUTE_UNITS: usize = 256;

/// What routing is specialised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RouteShape {
    /// Experts.
    pub experts: usize,
    /// Experts of a token.
    pub used: usize,
    /// Values from row to row of the logits.
    pub stride: usize,
    /// Whether a table by token chooses, else score plus bias.
    pub hash: bool,
    /// Scale of the weights.
    pub scale: Real,
    /// SwiGLU clamp.
    pub clamp: Real,
}

#[cube]
fn softplus(z: f32) -> f32 {
    select(z > 20.0f32, z, f32::log1p(f32::exp(f32::min(z, 20.0f32))))
}

/// A row along x. Its first cube chooses experts by the router's logits, or by token id, ascending, and weighs them; the
/// others join what gate and up of the shared expert gave to its hidden activations.
#[cube(launch_unchecked)]
pub fn route(
    logits: &[f32],
    bias: &[f32],
    table: &[i32],
    plan: &[u32],
    ids: &mut [u32],
    weights: &mut [f32],
    gate: &[Four],
    up: &[Four],
    mut hidden: Output,
    #[comptime] s: RouteShape,
) {
    if CUBE_POS_Y == 0 {
        choose(logits, bias, table, plan, ids, weights, s);
    } else {
        let row = CUBE_POS_X as usize;
        let k = (CUBE_POS_Y as usize - 1) * ROUTE_UNITS + UNIT_POS as usize;
        let fours = comptime!(hidden.stride / 4);
        // Those beyond the last are of the padding, whose values nobody reads.
        let valid = k < fours;
        let at = row * fours + usize::min(k, fours - 1);
        let mut v = Four::empty();
        #[unroll]
        for i in 0..4usize {
            v.insert(i, swiglu(gate[at].extract(i), up[at].extract(i), s.clamp));
        }
        store_four(&mut hidden, row * comptime!(s.used + 1) + comptime!(s.used), k, v, valid);
    }
}

#[cube]
fn choose(
    logits: &[f32],
    bias: &[f32],
    table: &[i32],
    plan: &[u32],
    ids: &mut [u32],
    weights: &mut [f32],
    #[comptime] s: RouteShape,
) {
    let row = CUBE_POS_X as usize;
    let (experts, used) = (comptime!(s.experts), comptime!(s.used));
    let mut p = Shared::<[f32]>::new_slice(experts);
    let mut order = Shared::<[f32]>::new_slice(experts);
    let mut chosen = Shared::<[u32]>::new_slice(used);
    let mut ascending = Shared::<[u32]>::new_slice(used);
    #[unroll]
    for step in 0..comptime!(s.experts.div_ceil(ROUTE_UNITS)) {
        let e = UNIT_POS as usize + comptime!(step * ROUTE_UNITS);
        if e < experts {
            let v = f32::sqrt(softplus(logits[row * comptime!(s.stride) + e]));
            p[e] = v;
            if comptime!(!s.hash) {
                order[e] = v + bias[e];
            }
        }
    }
    let unit = UNIT_POS as usize;
    if unit < used {
        // Scores that are not numbers leave places without a choice: those keep an expert that exists.
        chosen[unit] =
            if comptime!(s.hash) { table[plan[4 * row] as usize * used + unit] as u32 } else { unit as u32 };
    }
    sync_cube();
    if comptime!(!s.hash) {
        #[unroll]
        for step in 0..comptime!(s.experts.div_ceil(ROUTE_UNITS)) {
            let e = UNIT_POS as usize + comptime!(step * ROUTE_UNITS);
            if e < experts {
                let own = order[e];
                let mut better = 0usize;
                for j in 0..experts {
                    let other = order[j];
                    let first = other > own || (other == own && j < e);
                    better += select(first, 1usize, 0usize);
                }
                if better < used {
                    chosen[better] = e as u32;
                }
            }
        }
        sync_cube();
    }
    if unit < used {
        let own = chosen[unit];
        let mut place = 0usize;
        #[unroll]
        for j in 0..used {
            let other = chosen[j];
            place += select(other < own || (other == own && j < unit), 1usize, 0usize);
        }
        ascending[place] = own;
    }
    sync_cube();
    if unit < used {
        let mut sum = 0.0f32;
        #[unroll]
        for j in 0..used {
            sum += p[ascending[j] as usize];
        }
        let own = ascending[unit];
        let scale = comptime!(s.scale.get()) / f32::max(sum, 1.175_494_4e-38f32);
        ids[row * used + unit] = own;
        weights[row * used + unit] = p[own as usize] * scale;
    }
}

/// `silu(min(gate, clamp)) * clip(up, -clamp, clamp)`.
#[cube]
pub fn swiglu(gate: f32, up: f32, #[comptime] clamp: Real) -> f32 {
    let limit = comptime!(clamp.get());
    let g = f32::min(gate, limit);
    g * sigmoid(g) * f32::min(f32::max(up, -limit), limit)
}

/// What the experts' kernels are specialised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Expert {
    /// Hidden width.
    pub hidden: usize,
    /// Model width.
    pub width: usize,
    /// Experts of a token.
    pub used: usize,
    /// SwiGLU clamp.
    pub clamp: Real,
    /// Rows of a plane.
    pub per_plane: usize,
    /// How many of them it takes at once.
    pub at_once: usize,
    /// Whether the kernel needs the tables of IQ2_XXS.
    pub tables: bool,
    /// Whether it stages the activations.
    pub staged: bool,
}

/// Weighted hidden activations of a (row, expert) pair along y: `hidden [n * (used + 1), I]`, the shared expert's, which
/// [`route`] left, last of each row. A cube takes `per_cube` of the I; if that is whole blocks of 32, it quantizes them.
#[cube(launch_unchecked)]
pub fn hidden(
    x: &Input,
    gate: &Weights,
    up: &Weights,
    ids: &[u32],
    weights: &[f32],
    words: &[Vector<u32, Const<2>>],
    mut out: Output,
    #[comptime] s: Expert,
    #[comptime] per_cube: usize,
) {
    let pair = CUBE_POS_Y as usize;
    let row = pair / comptime!(s.used);
    let (weight, expert) = (weights[pair], ids[pair] as usize);
    let first = CUBE_POS_X as usize * per_cube;
    let mut own = PLANE_POS as usize * comptime!(s.per_plane);
    let end = usize::min(own + s.per_plane, usize::min(per_cube, comptime!(s.hidden) - first));
    // Some rows at a time, so that few registers are needed and many planes find room.
    let rows = comptime!(s.at_once);
    let staged = stage(x, row, 1usize, s.staged);
    let tables = Tables::load(words, s.tables);
    let mut products = Shared::<[f32]>::new_slice(per_cube);
    let mut index = Array::<u32>::new(1usize);
    index[0] = if comptime!(s.staged) { 0u32.runtime() } else { row as u32 };
    while own < end {
        let mut gates = Array::<f32>::new(rows);
        let mut ups = Array::<f32>::new(rows);
        #[unroll]
        for r in 0..rows {
            gates[r] = 0.0f32;
            ups[r] = 0.0f32;
        }
        let from = expert * comptime!(s.hidden) + first + own;
        let mut one = fetch_rows(gate, from, rows);
        let mut other = fetch_rows(up, from, rows);
        dot_held(gate, &mut one, x, &tables, &staged, from, &index, 0usize, &mut gates, rows, 1usize);
        dot_held(up, &mut other, x, &tables, &staged, from, &index, 0usize, &mut ups, rows, 1usize);
        #[unroll]
        for r in 0..rows {
            let g = plane_sum(gates[r]);
            let u = plane_sum(ups[r]);
            if UNIT_POS_PLANE == 0 {
                products[own + r] = swiglu(g, u, s.clamp) * weight;
            }
        }
        own += rows;
    }
    sync_cube();
    let k = UNIT_POS as usize;
    let valid = k < comptime!(per_cube / 4) && first + 4 * k < comptime!(s.hidden);
    let mut v = Four::new(0.0f32);
    if valid {
        #[unroll]
        for i in 0..4usize {
            v.insert(i, products[4 * k + i]);
        }
    }
    store_four(&mut out, pair + row, first / 4 + k, v, valid);
}

/// Rows of activations in shared memory, if they are wanted there. The whole cube takes part.
#[cube]
fn stage(x: &Input, first: usize, #[comptime] rows: usize, #[comptime] wanted: bool) -> Staged {
    let staged = Staged::load(x, first, comptime!(if wanted { rows } else { 0 }));
    if comptime!(wanted) {
        sync_cube();
    }
    staged
}

/// Hidden activations of the routed experts of a row, likewise.
#[cube]
pub fn stage_hidden(hidden: &Input, row: usize, #[comptime] s: Expert) -> Staged {
    stage(hidden, row * comptime!(s.used + 1), s.used, s.staged)
}

/// `y = shared + routed experts, ascending`; a row of the pass along y.
#[cube(launch_unchecked)]
pub fn down(
    hidden: &Input,
    routed: &Weights,
    shared: &Weights,
    ids: &[u32],
    words: &[Vector<u32, Const<2>>],
    out: &mut [f32],
    #[comptime] stride: usize,
    #[comptime] s: Expert,
) {
    let per_plane = comptime!(s.per_plane);
    let row = CUBE_POS_Y as usize;
    let staged = stage_hidden(hidden, row, s);
    let tables = Tables::load(words, s.tables);
    let first = (CUBE_POS_X * (CUBE_DIM / PLANE_DIM) + PLANE_POS) as usize * per_plane;
    if first < comptime!(s.width) {
        let first = first.min(comptime!(s.width - s.per_plane));
        let sums = down_rows(hidden, routed, shared, ids, &tables, &staged, row, first, s);
        #[unroll]
        for r in 0..per_plane {
            let sum = plane_sum(sums[r]);
            if UNIT_POS_PLANE == 0 {
                out[row * stride + first + r] = sum;
            }
        }
    }
}

/// Experts whose weights are under way at once: more would take so many registers that fewer planes find room.
const AHEAD: usize = 3;

/// This lane's share of rows `first ..` of `shared + routed experts, ascending`.
#[cube]
pub fn down_rows(
    hidden: &Input,
    routed: &Weights,
    shared: &Weights,
    ids: &[u32],
    tables: &Tables,
    staged: &Staged,
    row: usize,
    first: usize,
    #[comptime] s: Expert,
) -> Array<f32> {
    let per_plane = comptime!(s.per_plane);
    let mut index = Array::<u32>::new(1usize);
    let mut acc = Array::<f32>::new(per_plane);
    #[unroll]
    for r in 0..per_plane {
        acc[r] = 0.0f32;
    }
    let place = row * comptime!(s.used + 1);
    let mut chosen = Array::<usize>::new(comptime!(s.used));
    #[unroll]
    for slot in 0..comptime!(s.used) {
        chosen[slot] = ids[row * comptime!(s.used) + slot] as usize * comptime!(s.width) + first;
    }
    // Where a lane has one turn for a row, the weights of some experts are on the way while one is multiplied.
    let ahead = comptime!(one_turn(routed.format, routed.input, routed.plane));
    let mut coming = Sequence::<Held>::new();
    if comptime!(ahead) {
        #[unroll]
        for slot in 0..comptime!(usize::min(AHEAD, s.used)) {
            coming.push(fetch_rows(routed, chosen[slot], per_plane));
        }
    }
    index[0] = (place + comptime!(s.used)) as u32;
    dot_rows(shared, hidden, tables, first, &index, 0usize, &mut acc, per_plane, 1usize);
    #[unroll]
    for slot in 0..comptime!(s.used) {
        index[0] = (if comptime!(s.staged) { slot.runtime() } else { place + slot }) as u32;
        if comptime!(!ahead) {
            coming.push(fetch_rows(routed, chosen[slot], per_plane));
        } else if comptime!(slot + AHEAD < s.used) {
            let later = chosen[comptime!(usize::min(slot + AHEAD, s.used - 1))];
            coming.push(fetch_rows(routed, later, per_plane));
        }
        let held = coming.index_mut(slot);
        let from = chosen[slot];
        dot_held(routed, held, hidden, tables, staged, from, &index, 0usize, &mut acc, per_plane, 1usize);
    }
    acc
}
