//! Hyper-connections between two sublayers (A.3): the output of one is joined into the streams, and these meet the
//! control matrix of the next.
//!
//! A cube has a part of the channels, of all streams: joining needs no others. With few rows it is part of the product
//! that makes the sublayer's output, whose cube then has those channels; else it is a kernel of its own.

use super::dot::{Four, Input, Weights, dot_four};
use super::experts::{Expert, down_rows, fetch_down, stage_hidden};
use super::hyper::Hyper;
use super::plane::{lane, lanes, plane, plane_total, planes};
use super::project::cube_products;
use super::tables::Tables;
use crate::layout::Format;
use cubecl::prelude::*;

/// Where a cube is: its first row and first vector of four channels, and the end of all rows.
#[derive(CubeType)]
pub struct Place {
    row: usize,
    four: usize,
    end: usize,
}

/// Where this cube is, of a grid of parts by groups of `rows` rows.
#[cube]
pub fn place_of_part(end: u32, #[comptime] s: Hyper) -> Place {
    Place {
        row: CUBE_POS_Y as usize * comptime!(s.rows),
        four: CUBE_POS_X as usize * comptime!(s.fours()),
        end: end as usize,
    }
}

/// A unit's share of what its cube will hold, on its way while the sublayer's output is computed.
#[derive(CubeType)]
pub struct Coming {
    streams: Array<Four>,
    mix: Array<f32>,
}

/// A cube's part of the streams of its rows, and how they are joined.
#[derive(CubeType)]
struct Held {
    /// `[rows, streams, part]`.
    streams: Shared<[Four]>,
    /// post and comb of the rows.
    mix: Shared<[f32]>,
}

/// This unit's share of what its cube will hold.
#[cube]
pub fn fetch(
    streams: &[Four],
    mix: &[f32],
    place: &Place,
    #[comptime] s: Hyper,
    #[comptime] join: bool,
) -> Coming {
    let (fours, items) = (comptime!(s.fours()), comptime!(s.items()));
    let count = comptime!((s.items() * s.rows).div_ceil(s.units));
    let mut own = Array::<Four>::new(count);
    #[unroll]
    for i in 0..count {
        let at = UNIT_POS as usize + comptime!(i * s.units);
        let (row, item) = (place.row + at / items, at % items);
        let k = place.four + item % fours;
        // Channels and rows beyond the last are zeros.
        let mut v = Four::new(0.0f32);
        if k < comptime!(s.d / 4) && row < usize::min(place.end, place.row + comptime!(s.rows)) {
            v = streams[row * comptime!(s.stride / 4) + item / fours * comptime!(s.d / 4) + k];
        }
        own[i] = v;
    }
    let (mixed, count) = (comptime!(s.mixed()), comptime!((s.mixed() * s.rows).div_ceil(s.units)));
    let mut joins = Array::<f32>::new(count);
    if comptime!(join) {
        #[unroll]
        for i in 0..count {
            let at = UNIT_POS as usize + comptime!(i * s.units);
            let row = usize::min(place.row + at / mixed, place.end - 1);
            joins[i] = mix[row * comptime!(s.mix_stride) + at % mixed];
        }
    }
    Coming { streams: own, mix: joins }
}

/// Lays what came into shared memory.
#[cube]
fn lay(coming: &Coming, #[comptime] s: Hyper, #[comptime] join: bool) -> Held {
    let mut streams = Shared::<[Four]>::new_slice(comptime!(s.items() * s.rows));
    let mut mix = Shared::<[f32]>::new_slice(comptime!(s.mixed() * s.rows));
    #[unroll]
    for i in 0..comptime!((s.items() * s.rows).div_ceil(s.units)) {
        let at = UNIT_POS as usize + comptime!(i * s.units);
        if at < comptime!(s.items() * s.rows) {
            streams[at] = coming.streams[i];
        }
    }
    if comptime!(join) {
        #[unroll]
        for i in 0..comptime!((s.mixed() * s.rows).div_ceil(s.units)) {
            let at = UNIT_POS as usize + comptime!(i * s.units);
            if at < comptime!(s.mixed() * s.rows) {
                mix[at] = coming.mix[i];
            }
        }
    }
    Held { streams, mix }
}

/// Joins `y [rows, part]` into what is held, and stores that.
#[cube]
fn join_held(held: &mut Held, y: &Shared<[f32]>, streams: &mut [Four], place: &Place, #[comptime] s: Hyper) {
    let fours = comptime!(s.fours());
    let mut at = UNIT_POS as usize;
    while at < comptime!(s.fours() * s.rows) {
        let (r, k) = (at / fours, at % fours);
        let (first, m) = (r * comptime!(s.items()) + k, r * comptime!(s.mixed()));
        let mut own = Four::empty();
        #[unroll]
        for i in 0..4usize {
            own.insert(i, y[4 * at + i]);
        }
        let mut old = Array::<Four>::new(comptime!(s.n));
        #[unroll]
        for i in 0..comptime!(s.n) {
            old[i] = held.streams[first + comptime!(i * s.fours())];
        }
        #[unroll]
        for j in 0..comptime!(s.n) {
            let mut v = Four::new(held.mix[m + j]) * own;
            #[unroll]
            for i in 0..comptime!(s.n) {
                v += Four::new(held.mix[m + comptime!(s.n + i * s.n + j)]) * old[i];
            }
            held.streams[first + comptime!(j * s.fours())] = v;
            if place.four + k < comptime!(s.d / 4) && place.row + r < place.end {
                let row = (place.row + r) * comptime!(s.stride / 4);
                streams[row + comptime!(j * s.d / 4) + place.four + k] = v;
            }
        }
        at += CUBE_DIM as usize;
    }
}

/// A.3: joins the sublayer's output into the streams of `rows` rows, where `join`; then this cube's share of the
/// products of the streams with the control matrix, and of the streams with each other:
/// `partial [n, parts, controls + N (N + 1) / 2]`. From the latter follow the norms of the streams and of any mix of
/// them, so that mixing needs no sum over the row.
#[cube(launch_unchecked)]
pub fn hc_control<E: Float>(
    streams: &mut [Four],
    y: &[Four],
    mix: &[f32],
    control: &[Vector<E, Const<4>>],
    partial: &mut [f32],
    end: u32,
    #[comptime] s: Hyper,
    #[comptime] join: bool,
) {
    let place = place_of_part(end, s);
    let mut held = lay(&fetch(&*streams, mix, &place, s, join), s, join);
    let outputs = comptime!(if join { s.part * s.rows } else { 1 });
    let mut own = Shared::<[f32]>::new_slice(outputs);
    if comptime!(join) {
        let fours = comptime!(s.fours());
        let mut at = UNIT_POS as usize;
        while at < comptime!(s.fours() * s.rows) {
            let (row, k) = (place.row + at / fours, place.four + at % fours);
            let mut v = Four::new(0.0f32);
            if k < comptime!(s.d / 4) && row < place.end {
                v = y[row * comptime!(s.y_stride / 4) + k];
            }
            #[unroll]
            for i in 0..4usize {
                own[4 * at + i] = v.extract(i);
            }
            at += CUBE_DIM as usize;
        }
        sync_cube();
        join_held(&mut held, &own, streams, &place, s);
    }
    sync_cube();
    if comptime!(s.controls > 0) {
        control_products(&held, control, partial, &place, s, false);
        stream_products(&held, partial, &place, s);
    }
}

/// Each plane takes `block` control numbers at a time: each weight is read once for all rows, each value once for all
/// the plane's numbers. `own`: the control matrix is only this cube's part of it.
#[cube]
fn control_products<E: Float>(
    held: &Held,
    control: &[Vector<E, Const<4>>],
    partial: &mut [f32],
    place: &Place,
    #[comptime] s: Hyper,
    #[comptime] own: bool,
) {
    let (rows, block) = (comptime!(s.rows), comptime!(s.block));
    let (fours, items) = (comptime!(s.fours()), comptime!(s.items()));
    let mut m = plane() * block;
    while m < comptime!(s.controls) {
        let mut sums = Array::<f32>::new(comptime!(s.rows * s.block));
        #[unroll]
        for i in 0..comptime!(s.rows * s.block) {
            sums[i] = 0.0f32;
        }
        let mut item = lane();
        while item < items {
            // Channels beyond the last are held as zeros.
            let k = usize::min(place.four + item % fours, comptime!(s.d / 4 - 1));
            let at = item / fours * comptime!(s.d / 4) + k;
            #[unroll]
            for b in 0..block {
                let c = usize::min(m + b, comptime!(s.controls - 1));
                let at = if comptime!(own) { c * items + item } else { c * comptime!(s.input / 4) + at };
                let w = Four::cast_from(control[at]);
                #[unroll]
                for r in 0..rows {
                    sums[comptime!(r * s.block + b)] +=
                        dot_four(w, held.streams[item + comptime!(r * s.items())]);
                }
            }
            item += lanes();
        }
        #[unroll]
        for r in 0..rows {
            #[unroll]
            for b in 0..block {
                let sum = plane_total(sums[comptime!(r * s.block + b)]);
                if lane() == 0 && place.row + r < place.end && m + b < comptime!(s.controls) {
                    partial[partial_at(place.row + r, s) + m + b] = sum;
                }
            }
        }
        m += planes() * block;
    }
}

/// Where this cube's numbers of a row begin.
#[cube]
fn partial_at(row: usize, #[comptime] s: Hyper) -> usize {
    (row * comptime!(s.parts()) + CUBE_POS_X as usize) * comptime!(s.numbers())
}

/// Products of the streams with each other.
#[cube]
fn stream_products(held: &Held, partial: &mut [f32], place: &Place, #[comptime] s: Hyper) {
    let (fours, own) = (comptime!(s.fours()), plane());
    #[unroll]
    for i in 0..comptime!(s.n) {
        #[unroll]
        for j in i..comptime!(s.n) {
            // From the last plane on: the first ones have had more control numbers.
            if (comptime!(s.pair(i, j)) + own + 1) % planes() == 0 {
                #[unroll]
                for r in 0..comptime!(s.rows) {
                    let at = comptime!(r * s.items());
                    let mut sum = 0.0f32;
                    let mut k = lane();
                    while k < fours {
                        let a = held.streams[comptime!(i * s.fours()) + at + k];
                        sum += dot_four(a, held.streams[comptime!(j * s.fours()) + at + k]);
                        k += lanes();
                    }
                    sum = plane_total(sum);
                    if lane() == 0 && place.row + r < place.end {
                        let pair = comptime!(s.controls + s.pair(i, j));
                        partial[partial_at(place.row + r, s) + pair] = sum;
                    }
                }
            }
        }
    }
}

/// Vectors of the control matrix that a unit fetches of its cube's part.
const fn control_count(s: &Hyper) -> usize {
    (s.controls * s.items()).div_ceil(s.units)
}

/// A unit's share of its cube's part of the control matrix `[controls, streams, part]`, on its way likewise.
#[cube]
pub fn fetch_control<E: Float>(
    control: &[Vector<E, Const<4>>],
    place: &Place,
    #[comptime] s: Hyper,
) -> Array<Vector<E, Const<4>>> {
    let (fours, items) = (comptime!(s.fours()), comptime!(s.items()));
    let count = comptime!(control_count(&s));
    let mut own = Array::<Vector<E, Const<4>>>::new(comptime!(usize::max(control_count(&s), 1)));
    #[unroll]
    for i in 0..count {
        let at =
            usize::min(UNIT_POS as usize + comptime!(i * s.units), comptime!(s.controls * s.items() - 1));
        let (c, item) = (at / items, at % items);
        let k = item / fours * comptime!(s.d / 4) + place.four + item % fours;
        own[i] = control[c * comptime!(s.input / 4) + k];
    }
    own
}

/// What follows the sublayer's output, which is in shared memory.
#[cube]
pub fn join_output<E: Float>(
    coming: &Coming,
    coming_control: &Array<Vector<E, Const<4>>>,
    y: &Shared<[f32]>,
    streams: &mut [Four],
    partial: &mut [f32],
    place: &Place,
    #[comptime] s: Hyper,
) {
    let mut held = lay(coming, s, true);
    let all = comptime!(s.controls * s.items());
    let mut control =
        Shared::<[Vector<E, Const<4>>]>::new_slice(comptime!(usize::max(s.controls * s.items(), 1)));
    #[unroll]
    for i in 0..comptime!(control_count(&s)) {
        let at = UNIT_POS as usize + comptime!(i * s.units);
        if at < all {
            control[at] = coming_control[i];
        }
    }
    sync_cube();
    join_held(&mut held, y, streams, place, s);
    if comptime!(s.controls > 0) {
        sync_cube();
        control_products(&held, &control[0..all], partial, place, s, true);
        stream_products(&held, partial, place, s);
    }
}

/// [`hc_control`] of the output of an attention sublayer, `y = W x`: a cube's rows of `W` are its part of the channels.
#[cube(launch_unchecked)]
pub fn project_join<E: Float>(
    x: &Input,
    weights: &Weights,
    words: &[Vector<u32, Const<2>>],
    streams: &mut [Four],
    mix: &[f32],
    control: &[Vector<E, Const<4>>],
    partial: &mut [f32],
    n: u32,
    #[comptime] per_plane: usize,
    #[comptime] s: Hyper,
) {
    let place = place_of_part(n, s);
    let coming = fetch(&*streams, mix, &place, s, true);
    let coming_control = fetch_control(control, &place, s);
    let mut tables = Tables::load(words, comptime!(weights.format == Format::Iq2));
    if comptime!(weights.format == Format::Iq2) {
        tables.meet();
    }
    let mut y = Shared::<[f32]>::new_slice(comptime!(s.part * s.rows));
    let (rows, part) = (comptime!(s.rows), comptime!(s.part));
    cube_products(x, weights, &tables, 4 * place.four, 0usize, place.row, n, &mut y, per_plane, rows, part);
    join_output(&coming, &coming_control, &y, streams, partial, &place, s);
}

/// [`hc_control`] of the output of the experts.
#[cube(launch_unchecked)]
pub fn down_join<E: Float>(
    hidden: &Input,
    routed: &Weights,
    shared: &Weights,
    ids: &[u32],
    words: &[Vector<u32, Const<2>>],
    streams: &mut [Four],
    mix: &[f32],
    control: &[Vector<E, Const<4>>],
    partial: &mut [f32],
    n: u32,
    #[comptime] expert: Expert,
    #[comptime] s: Hyper,
) {
    let place = place_of_part(n, s);
    let coming = fetch(&*streams, mix, &place, s, true);
    let coming_control = fetch_control(control, &place, s);
    let (per_plane, part) = (comptime!(expert.per_plane), comptime!(s.part));
    let own = plane() * per_plane;
    // Planes beyond the last row of the part fetch its weights, for nothing.
    let first = 4 * place.four + usize::min(own, part - per_plane);
    let mut weights = fetch_down(routed, ids, place.row, first, expert);
    let staged = stage_hidden(hidden, routed, place.row, expert);
    let mut tables = Tables::load(words, expert.tables);
    tables.meet();
    let mut y = Shared::<[f32]>::new_slice(part);
    if own < part {
        let row = place.row;
        let sums = down_rows(hidden, routed, shared, ids, &mut weights, &tables, &staged, row, first, expert);
        #[unroll]
        for r in 0..per_plane {
            let sum = plane_total(sums[r]);
            if lane() == 0 {
                y[own + r] = sum;
            }
        }
    }
    join_output(&coming, &coming_control, &y, streams, partial, &place, s);
}
