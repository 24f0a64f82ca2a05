//! Router, routed experts and the shared expert, for few rows (A.8).

use super::common::{Real, sigmoid, store_four};
use super::dot::{Four, Input, Output, Weights, dot_row, dot_rows, dot_turn, dot_unit, steps, turns};
use super::fetch::{Held, fetch_both, fetch_rows};
use super::hyper::{Mixing, post_comb_row};
use super::plane::{lane, plane, plane_total, planes};
use super::select::rank;
use super::tables::{Staged, Tables};
use crate::layout::Format;
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
/// second makes post and comb of the sublayer, if they wait; the others join what gate and up of the shared expert gave to
/// its hidden activations.
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
    mut mixing: Sequence<Mixing>,
    #[comptime] s: RouteShape,
) {
    let row = CUBE_POS_X as usize;
    let mixes = comptime!(mixing.len() as u32);
    if CUBE_POS_Y == 0 {
        choose(logits, bias, table, plan, ids, weights, s);
    } else if CUBE_POS_Y <= mixes {
        #[unroll]
        for i in 0..comptime!(mixing.len()) {
            post_comb_row(mixing.index_mut(i), row);
        }
    } else {
        let k = (CUBE_POS_Y - 1 - mixes) as usize * ROUTE_UNITS + UNIT_POS as usize;
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
    // Whole blocks; places beyond the last expert are the worst.
    let mut order = Shared::<[u32]>::new_slice(comptime!(s.experts.next_multiple_of(BLOCK)));
    let mut chosen = Shared::<[u32]>::new_slice(used);
    if comptime!(!s.hash) && UNIT_POS < comptime!(BLOCK as u32) {
        let e = comptime!(s.experts.next_multiple_of(BLOCK) - BLOCK) + UNIT_POS as usize;
        if e >= experts {
            order[e] = 0u32;
        }
    }
    let mut ascending = Shared::<[u32]>::new_slice(used);
    #[unroll]
    for step in 0..comptime!(s.experts.div_ceil(ROUTE_UNITS)) {
        let e = UNIT_POS as usize + comptime!(step * ROUTE_UNITS);
        if e < experts {
            let v = f32::sqrt(softplus(logits[row * comptime!(s.stride) + e]));
            p[e] = v;
            if comptime!(!s.hash) {
                order[e] = rank(v + bias[e]);
            }
        }
    }
    let unit = UNIT_POS as usize;
    if unit < used {
        chosen[unit] =
            if comptime!(s.hash) { table[plan[4 * row] as usize * used + unit] as u32 } else { unit as u32 };
    }
    sync_cube();
    if comptime!(!s.hash) {
        #[unroll]
        for step in 0..comptime!(s.experts.div_ceil(ROUTE_UNITS)) {
            let e = UNIT_POS as usize + comptime!(step * ROUTE_UNITS);
            if e < experts {
                let better = better_than(&order, e, experts);
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

/// Experts that are compared with one without a look at how they lie to it.
const BLOCK: usize = 32;

/// How many of the experts come before `e`: those of higher order, and of equal order the first.
#[cube]
fn better_than(order: &Shared<[u32]>, e: usize, #[comptime] experts: usize) -> usize {
    let (own, block) = (order[e], e / BLOCK);
    let mut better = 0u32;
    for b in 0..block {
        #[unroll]
        for j in 0..BLOCK {
            better += select(order[b * BLOCK + j] >= own, 1u32, 0u32);
        }
    }
    #[unroll]
    for j in 0..BLOCK {
        let other = order[block * BLOCK + j];
        let first = other > own || (other == own && j < e % BLOCK);
        better += select(first, 1u32, 0u32);
    }
    for b in block + 1..comptime!(experts.div_ceil(BLOCK)) {
        #[unroll]
        for j in 0..BLOCK {
            better += select(order[b * BLOCK + j] > own, 1u32, 0u32);
        }
    }
    better as usize
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
    /// Whether the kernel needs the tables of IQ2_XXS.
    pub tables: bool,
    /// Whether it stages the activations.
    pub staged: bool,
}

/// Units of both matrices that are on their way while one is multiplied.
const UNITS_AHEAD: usize = 2;

/// Units of a small plane. There a lane has so many units of long rows that a compiler takes minutes where their loop is
/// unrolled.
const SMALL_PLANE: usize = 8;
/// Most units of a lane, of all its rows, for which it is unrolled there nevertheless.
const MOST_TOGETHER: usize = 16;

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
    let own = plane() * comptime!(s.per_plane);
    // Planes beyond the last row fetch its weights, for nothing.
    let from = expert * comptime!(s.hidden) + usize::min(first + own, comptime!(s.hidden - s.per_plane));
    // A unit of both matrices at a time, so that few registers are needed and many planes find room; the next are on their
    // way.
    let rows = comptime!(s.per_plane);
    // Units of a row that a lane has.
    let units =
        comptime!(turns(gate.format, gate.input, gate.plane) * steps(gate.format, gate.input, gate.plane));
    let few = comptime!(gate.plane > SMALL_PLANE || rows * units <= MOST_TOGETHER);
    let together = comptime!(gate.format == up.format && units > 0 && few);
    let mut coming = Sequence::<Held>::new();
    if comptime!(together) {
        #[unroll]
        for i in 0..comptime!(usize::min(UNITS_AHEAD, rows * units)) {
            let u = lane() + comptime!(i % units * gate.plane);
            coming.push(fetch_both(gate, up, from + comptime!(i / units), u));
        }
    }
    let staged = stage(x, row, gate, 1usize, s.staged);
    let mut tables = Tables::load(words, s.tables);
    tables.meet();
    let mut gates = Shared::<[f32]>::new_slice(per_cube);
    let mut ups = Shared::<[f32]>::new_slice(per_cube);
    let mut index = Array::<u32>::new(1usize);
    index[0] = if comptime!(s.staged) { 0u32.runtime() } else { row as u32 };
    if comptime!(together) {
        #[unroll]
        for r in 0..rows {
            let mut both = Array::<f32>::new(2usize);
            both[0] = 0.0f32;
            both[1] = 0.0f32;
            #[unroll]
            for t in 0..units {
                let (i, later) = comptime!((r * units + t, r * units + t + UNITS_AHEAD));
                if comptime!(later < rows * units) {
                    let u = lane() + comptime!(later % units * gate.plane);
                    coming.push(fetch_both(gate, up, from + comptime!(later / units), u));
                }
                let (held, u) = (coming.index(i), lane() + comptime!(t * gate.plane));
                dot_unit(
                    held,
                    x,
                    &tables,
                    &staged,
                    u,
                    &index,
                    0usize,
                    &mut both,
                    0usize,
                    2usize,
                    1usize,
                    gate.format,
                );
            }
            leave(both[0], &mut gates, own + r, per_cube);
            leave(both[1], &mut ups, own + r, per_cube);
        }
    } else {
        for r in 0..rows {
            leave(dot_row(gate, x, &tables, &staged, from + r, &index), &mut gates, own + r, per_cube);
            leave(dot_row(up, x, &tables, &staged, from + r, &index), &mut ups, own + r, per_cube);
        }
    }
    sync_cube();
    // A unit each, not a plane's first for all of its rows.
    let mut k = UNIT_POS as usize;
    while k < per_cube {
        gates[k] = swiglu(gates[k], ups[k], s.clamp) * weight;
        k += CUBE_DIM as usize;
    }
    sync_cube();
    let k = UNIT_POS as usize;
    let valid = k < comptime!(per_cube / 4) && first + 4 * k < comptime!(s.hidden);
    let mut v = Four::new(0.0f32);
    if valid {
        #[unroll]
        for i in 0..4usize {
            v.insert(i, gates[4 * k + i]);
        }
    }
    store_four(&mut out, pair + row, first / 4 + k, v, valid);
}

/// Leaves the plane's sum at a place; planes beyond the last row have none.
#[cube]
fn leave(share: f32, out: &mut Shared<[f32]>, place: usize, #[comptime] places: usize) {
    let total = plane_total(share);
    if lane() == 0 && place < places {
        out[place] = total;
    }
}

/// Rows of activations in shared memory, if they are wanted there. The whole cube takes part, and meets before it reads
/// them.
#[cube]
fn stage(x: &Input, first: usize, w: &Weights, #[comptime] rows: usize, #[comptime] wanted: bool) -> Staged {
    Staged::load(x, first, comptime!(if wanted { rows } else { 0 }), comptime!(w.format == Format::Q2K))
}

/// Hidden activations of the routed experts of a row, likewise.
#[cube]
pub fn stage_hidden(hidden: &Input, routed: &Weights, row: usize, #[comptime] s: Expert) -> Staged {
    stage(hidden, row * comptime!(s.used + 1), routed, s.used, s.staged)
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
    let own = (CUBE_POS_X as usize * planes() + plane()) * per_plane;
    // Planes beyond the last row do its work once more.
    let first = usize::min(own, comptime!(s.width - s.per_plane));
    let mut coming = fetch_down(routed, ids, row, first, s);
    let staged = stage_hidden(hidden, routed, row, s);
    let mut tables = Tables::load(words, s.tables);
    tables.meet();
    let sums = down_rows(hidden, routed, shared, ids, &mut coming, &tables, &staged, row, first, s);
    #[unroll]
    for r in 0..per_plane {
        let sum = plane_total(sums[r]);
        if lane() == 0 {
            out[row * stride + first + r] = sum;
        }
    }
}

/// Experts whose weights are under way at once: more would take so many registers that fewer planes find room.
const AHEAD: usize = 3;

/// Whether the weights of some experts are on the way while one is multiplied: where a lane has one turn for a row.
const fn ahead(format: Format, input: usize, plane: usize) -> usize {
    if turns(format, input, plane) == 1 { AHEAD } else { 0 }
}

/// Row `first` of expert `slot` of a row.
#[cube]
fn row_of(ids: &[u32], row: usize, first: usize, slot: usize, #[comptime] s: Expert) -> usize {
    ids[row * comptime!(s.used) + slot] as usize * comptime!(s.width) + first
}

/// The first weights that [`down_rows`] will want, on their way.
#[cube]
pub fn fetch_down(
    routed: &Weights,
    ids: &[u32],
    row: usize,
    first: usize,
    #[comptime] s: Expert,
) -> Sequence<Held> {
    let mut coming = Sequence::<Held>::new();
    #[unroll]
    for slot in 0..comptime!(usize::min(ahead(routed.format, routed.input, routed.plane), s.used)) {
        coming.push(fetch_rows(routed, row_of(ids, row, first, slot, s), lane(), s.per_plane));
    }
    coming
}

/// This lane's share of rows `first ..` of `shared + routed experts, ascending`.
#[cube]
pub fn down_rows(
    hidden: &Input,
    routed: &Weights,
    shared: &Weights,
    ids: &[u32],
    coming: &mut Sequence<Held>,
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
    index[0] = (place + comptime!(s.used)) as u32;
    let none = Staged::none(hidden);
    dot_rows(shared, hidden, tables, &none, first, &index, 0usize, &mut acc, per_plane, 1usize);
    let ahead = comptime!(ahead(routed.format, routed.input, routed.plane));
    if comptime!(ahead > 0) {
        #[unroll]
        for slot in 0..comptime!(s.used) {
            index[0] = (if comptime!(s.staged) { slot.runtime() } else { place + slot }) as u32;
            let later = comptime!(slot + ahead);
            if comptime!(later < s.used) {
                coming.push(fetch_rows(routed, row_of(ids, row, first, later, s), lane(), per_plane));
            }
            let held = coming.index(slot);
            let u = lane();
            dot_turn(routed, held, hidden, tables, staged, u, &index, 0usize, &mut acc, per_plane, 1usize);
        }
    } else {
        for slot in 0..comptime!(s.used) {
            index[0] = (if comptime!(s.staged) { slot } else { place + slot }) as u32;
            let from = row_of(ids, row, first, slot, s);
            dot_rows(routed, hidden, tables, staged, from, &index, 0usize, &mut acc, per_plane, 1usize);
        }
    }
    acc
}
