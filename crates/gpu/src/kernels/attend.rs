//! Queries and attention over the cache, in f32 (A.5).

use super::cache::{ROW_SCALES, ROWS, Rounding, RowShape, WINDOW, WINDOW_SCALES, fp8_value, part_of};
use super::common::{Real, cube_sum, cube_sum_unrolled, rms_scale, store_four};
use super::dot::{Four, Output, dot_four};
use super::hyper::MOST_PLANES;
use cubecl::prelude::*;

/// Turns the pairs of four channels.
#[cube]
pub fn rotate_four(v: Four, angles: &[f32], at: usize, #[comptime] inverse: bool) -> Four {
    let mut out = Four::empty();
    #[unroll]
    for i in 0..2usize {
        let (a, b) = (v.extract(comptime!(2 * i)), v.extract(comptime!(2 * i + 1)));
        let cos = angles[at + comptime!(2 * i)];
        let sin = if comptime!(inverse) {
            -angles[at + comptime!(2 * i + 1)]
        } else {
            angles[at + comptime!(2 * i + 1)]
        };
        out.insert(comptime!(2 * i), a * cos - b * sin);
        out.insert(comptime!(2 * i + 1), a * sin + b * cos);
    }
    out
}

/// A.5: unweighted norm and rotation of each query head, in place. A cube a head.
#[cube(launch_unchecked)]
pub fn rotate_queries(
    q: &mut [Four],
    angles: &[f32],
    first_angle: u32,
    #[comptime] width: usize,
    #[comptime] rotary: usize,
    #[comptime] stride: usize,
    #[comptime] eps: Real,
) {
    let row = CUBE_POS_Y as usize;
    let fours = comptime!(width / 4);
    let head = row * comptime!(stride / 4) + CUBE_POS_X as usize * fours;
    let mut scratch = Shared::<[f32]>::new_slice(MOST_PLANES);
    let mut sum = 0.0f32;
    let mut k = UNIT_POS as usize;
    while k < fours {
        let v = q[head + k];
        sum += dot_four(v, v);
        k += CUBE_DIM as usize;
    }
    let scale = rms_scale(cube_sum(sum, &mut scratch), width, eps);
    k = UNIT_POS as usize;
    while k < fours {
        let mut v = q[head + k] * Four::new(scale);
        if k >= comptime!((width - rotary) / 4) {
            let at = first_angle as usize + row * rotary + 4 * (k - comptime!((width - rotary) / 4));
            v = rotate_four(v, angles, at, false);
        }
        q[head + k] = v;
        k += CUBE_DIM as usize;
    }
}

/// Four channels of a stored row.
#[cube]
pub fn row_four(arena: &[u32], at: u32, scales_at: u32, k: usize, #[comptime] s: RowShape) -> Four {
    let mut v = Four::empty();
    if comptime!(s.rounding == Rounding::Packed) {
        if k < comptime!(s.codes() / 4) {
            let word = arena[at as usize + k];
            let e = (arena[scales_at as usize + k / 64] >> (k / 16 % 4 * 8) as u32) & 255;
            let scale = f32::reinterpret(e << 23);
            #[unroll]
            for i in 0..4usize {
                v.insert(i, fp8_value((word >> comptime!(8 * i as u32)) & 255) * scale);
            }
        } else {
            let word = at as usize + comptime!(s.codes() / 4) + 2 * (k - comptime!(s.codes() / 4));
            #[unroll]
            for i in 0..2usize {
                let pair = arena[word + i];
                v.insert(comptime!(2 * i), f32::reinterpret(pair << 16));
                v.insert(comptime!(2 * i + 1), f32::reinterpret(pair & 0xffff_0000));
            }
        }
    } else {
        #[unroll]
        for i in 0..4usize {
            v.insert(i, f32::reinterpret(arena[at as usize + 4 * k + i]));
        }
    }
    v
}

/// What attention is specialised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttendShape {
    /// How rows are stored.
    pub row: RowShape,
    /// Slots of the window ring.
    pub ring: u32,
    /// Tokens of the window.
    pub window: u32,
    /// Tokens of a compressed row; 0 where there are none.
    pub ratio: u32,
    /// Entries of a row of the selection; 0 where there is none.
    pub top_k: u32,
    /// Values from row to row of the queries.
    pub q_stride: usize,
}

/// The rows that a query sees: how many of the window, how many in all, and whether they were selected.
#[derive(CubeType, Clone, Copy)]
pub struct Seen {
    /// Position of the oldest window row.
    pub oldest: u32,
    /// Window rows.
    pub recent: u32,
    /// All rows.
    pub rows: u32,
    /// Whether the compressed rows are those of the selection.
    pub selected: bool,
}

/// What the query of a row at `position` sees.
#[cube]
pub fn seen(position: u32, #[comptime] s: AttendShape) -> Seen {
    let recent = u32::min(position + 1, comptime!(s.window));
    let mut compressed = 0u32;
    let mut selected = false;
    if comptime!(s.ratio > 0) {
        compressed = (position + 1) / comptime!(u32::max(s.ratio, 1));
        if comptime!(s.top_k > 0) {
            selected = compressed > comptime!(s.top_k);
            compressed = u32::min(compressed, comptime!(s.top_k));
        }
    }
    Seen { oldest: position + 1 - recent, recent, rows: recent + compressed, selected }
}

/// Slot of row `i` of those seen: of the window ring, or of the compressed rows.
#[cube]
pub fn slot_of(i: u32, seen: &Seen, selection: &[u32], row: usize, #[comptime] s: AttendShape) -> u32 {
    let mut slot = (seen.oldest + i) % comptime!(s.ring);
    if comptime!(s.ratio > 0) {
        if i >= seen.recent {
            slot = i - seen.recent;
            if comptime!(s.top_k > 0) {
                if seen.selected {
                    slot = selection[row * comptime!(s.top_k as usize) + slot as usize];
                }
            }
        }
    }
    slot
}

/// Units of a cube that attends.
pub const UNITS: usize = 128;

/// A.5: attention of one head of one row, rotated back. Everything in f32, one stored row after the other.
#[cube(launch_unchecked)]
pub fn attend(
    q: &[Four],
    sinks: &[f32],
    angles: &[f32],
    plan: &[u32],
    selection: &[u32],
    arena: &[u32],
    mut out: Output,
    layer: u32,
    first_angle: u32,
    #[comptime] s: AttendShape,
) {
    let (head, row) = (CUBE_POS_X as usize, CUBE_POS_Y as usize);
    let (position, base) = (plan[4 * row + 1], plan[4 * row + 2]);
    let fours = comptime!(s.row.width / 4);
    let scale = comptime!((s.row.width as f32).powf(-0.5));
    let mut scratch = Shared::<[f32]>::new_slice(MOST_PLANES);
    let seen = seen(position, s);
    let window = part_of(arena, base, layer, comptime!(WINDOW));
    let window_scales = part_of(arena, base, layer, comptime!(WINDOW_SCALES));
    let rows = part_of(arena, base, layer, comptime!(ROWS));
    let row_scales = part_of(arena, base, layer, comptime!(ROW_SCALES));
    let mut max = sinks[head];
    let mut sum = 1.0f32;
    // Fours of the query and of the output that a unit holds.
    let held = comptime!((s.row.width / 4).div_ceil(UNITS));
    let mut query = Array::<Four>::new(held);
    let mut stored = Array::<Four>::new(held);
    let mut acc = Array::<Four>::new(held);
    #[unroll]
    for h in 0..held {
        let k = UNIT_POS as usize + comptime!(UNITS * h);
        acc[h] = Four::new(0.0f32);
        query[h] = Four::new(0.0f32);
        stored[h] = Four::new(0.0f32);
        if k < fours {
            query[h] = q[row * comptime!(s.q_stride / 4) + head * fours + k];
        }
    }
    for i in 0..seen.rows {
        let slot = slot_of(i, &seen, selection, row, s);
        let recent = i < seen.recent;
        let data = select(recent, window, rows) + slot * comptime!(s.row.words as u32);
        let scales = select(recent, window_scales, row_scales) + slot * comptime!(s.row.scale_words as u32);
        let mut dot = 0.0f32;
        #[unroll]
        for h in 0..held {
            let k = UNIT_POS as usize + comptime!(UNITS * h);
            if k < fours {
                stored[h] = row_four(arena, data, scales, k, s.row);
                dot += dot_four(query[h], stored[h]);
            }
        }
        let score = cube_sum_unrolled(dot, &mut scratch, comptime!(UNITS / 4)) * scale;
        let top = f32::max(max, score);
        let (shrink, p) = (f32::exp(max - top), f32::exp(score - top));
        sum = sum * shrink + p;
        max = top;
        #[unroll]
        for h in 0..held {
            acc[h] = acc[h] * Four::new(shrink) + Four::new(p) * stored[h];
        }
    }
    let inv = 1.0f32 / sum;
    #[unroll]
    for h in 0..held {
        let k = UNIT_POS as usize + comptime!(UNITS * h);
        let valid = k < fours;
        let mut v = acc[h] * Four::new(inv);
        if valid && k >= comptime!(s.row.codes() / 4) {
            let at =
                first_angle as usize + row * comptime!(s.row.rotary) + 4 * (k - comptime!(s.row.codes() / 4));
            v = rotate_four(v, angles, at, true);
        }
        store_four(&mut out, row, head * fours + k, v, valid);
    }
}
