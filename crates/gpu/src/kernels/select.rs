//! The indexer: scores of compressed rows, and the best of them (A.7).

use super::cache::{
    KEY_SCALES, KEYS, Rounding, RowShape, block_max, fp4_code, fp4_scale, fp4_twice, hadamard, part_of,
};
use super::dot::{Quad, dot_bytes};
use cubecl::prelude::*;

/// What the indexer is specialised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Index {
    /// How keys are stored.
    pub key: RowShape,
    /// Query heads.
    pub heads: usize,
    /// Values from row to row of the queries.
    pub stride: usize,
    /// Values from row to row of the heads' weights.
    pub weight_stride: usize,
    /// Rows that are selected.
    pub top_k: usize,
}

impl Index {
    /// Blocks of a key, each with a scale.
    pub const fn blocks(&self) -> usize {
        self.key.width / 32
    }
    /// Vectors of 16 bytes of a key, one a value.
    const fn quads(&self) -> usize {
        self.key.width / 16
    }
}

/// Units of a cube of [`prepare_queries`].
pub const QUERY_UNITS: usize = 64;

/// Rotates and rounds each query head. Where keys are packed the result is int8, twice the FP4 value, with a scale
/// for each 32; else f32. A cube a head.
#[cube(launch_unchecked)]
pub fn prepare_queries(
    q: &mut [f32],
    angles: &[f32],
    words: &mut [u32],
    scales: &mut [f32],
    first_angle: u32,
    #[comptime] s: Index,
) {
    let (head, r) = (CUBE_POS_X as usize, CUBE_POS_Y as usize);
    let width = comptime!(s.key.width);
    let at = r * comptime!(s.stride) + head * width;
    let mut row = Shared::<[f32]>::new_slice(width);
    let mut k = UNIT_POS as usize;
    while k < comptime!(s.key.width / 2) {
        let (mut a, mut b) = (q[at + 2 * k], q[at + 2 * k + 1]);
        if k >= comptime!(s.key.codes() / 2) {
            let pair =
                first_angle as usize + r * comptime!(s.key.rotary) + 2 * (k - comptime!(s.key.codes() / 2));
            let (cos, sin) = (angles[pair], angles[pair + 1]);
            let t = a * cos - b * sin;
            b = a * sin + b * cos;
            a = t;
        }
        row[2 * k] = a;
        row[2 * k + 1] = b;
        k += CUBE_DIM as usize;
    }
    sync_cube();
    if comptime!(s.key.rounding != Rounding::None) {
        hadamard(&mut row, 0usize, UNIT_POS as usize, CUBE_DIM as usize, width);
    }
    if comptime!(s.key.rounding == Rounding::Packed) {
        let blocks = r * comptime!(s.heads * s.blocks()) + head * comptime!(s.blocks());
        let k = UNIT_POS as usize;
        if k < comptime!(s.key.width / 4) {
            let e = fp4_scale(block_max(&row, k / 8 * 32, 32usize, width));
            let inv = f32::reinterpret((254 - e) << 23);
            let mut word = 0u32;
            #[unroll]
            for i in 0..4usize {
                let twice = fp4_twice(fp4_code(row[4 * k + i] * inv));
                word |= (u32::reinterpret(twice) & 255) << comptime!(8 * i as u32);
            }
            words[r * comptime!(s.heads * s.key.width / 4) + head * comptime!(s.key.width / 4) + k] = word;
            if k % 8 == 0 {
                // The query's and the key's values are both twice as large as they should be.
                scales[blocks + k / 8] = f32::reinterpret(e << 23) * 0.25f32;
            }
        }
    } else {
        #[unroll]
        for step in 0..comptime!(s.key.width.div_ceil(QUERY_UNITS)) {
            let k = UNIT_POS as usize + comptime!(step * QUERY_UNITS);
            if k < width {
                let mut v = row[k];
                if comptime!(s.key.rounding == Rounding::Float) {
                    let e = fp4_scale(block_max(&row, k / 32 * 32, 32usize, width));
                    let scale = f32::reinterpret(e << 23);
                    v = f32::cast_from(fp4_twice(fp4_code(v / scale))) * 0.5f32 * scale;
                }
                q[at + k] = v;
            }
        }
    }
}

/// Units of a cube of [`score`].
pub const SCORE_UNITS: usize = 256;
/// Units that share a key's heads.
const SHARE: usize = 8;
/// Keys of a cube.
pub const SCORE_KEYS: usize = SCORE_UNITS / SHARE;

/// Scores of the keys that a row of the pass sees: `sum over heads of weight * max(0, q . key)`.
#[cube(launch_unchecked)]
pub fn score(
    q: &[f32],
    words: &[Quad],
    scales: &[f32],
    weights: &[f32],
    plan: &[u32],
    arena: &[u32],
    scores: &mut [f32],
    layer: u32,
    first_row: u32,
    score_stride: u32,
    #[comptime] s: Index,
) {
    let r = (first_row + CUBE_POS_Y) as usize;
    let (position, base) = (plan[4 * r + 1], plan[4 * r + 2]);
    let visible = (position + 1) / 4;
    let first_key = CUBE_POS_X * comptime!(SCORE_KEYS as u32);
    let key = first_key + UNIT_POS / comptime!(SHARE as u32);
    let share = UNIT_POS as usize % SHARE;
    if visible > comptime!(s.top_k as u32) && first_key < visible {
        let keys = part_of(arena, base, layer, comptime!(KEYS));
        // Units beyond the last key repeat it.
        let own = u32::min(key, visible - 1);
        let at = (keys + own * comptime!(s.key.words as u32)) as usize;
        let mut sum = 0.0f32;
        if comptime!(s.key.rounding == Rounding::Packed) {
            let key_scales = part_of(arena, base, layer, comptime!(KEY_SCALES))
                + own * comptime!(s.key.scale_words as u32);
            sum = score_packed(words, scales, weights, arena, r, at, key_scales as usize, share, s);
        } else {
            let mut h = share;
            while h < comptime!(s.heads) {
                let mut dot = 0.0f32;
                for k in 0..comptime!(s.key.width) {
                    dot += q[r * comptime!(s.stride) + h * comptime!(s.key.width) + k]
                        * f32::reinterpret(arena[at + k]);
                }
                sum += weights[r * comptime!(s.weight_stride) + h] * f32::max(dot, 0.0f32);
                h += SHARE;
            }
        }
        #[unroll]
        for i in 0..comptime!(SHARE.ilog2()) {
            sum += plane_shuffle_xor(sum, comptime!(1u32 << i));
        }
        if share == 0 && key < visible {
            let factor = comptime!(((s.key.width * s.heads) as f32).powf(-0.5));
            scores[(CUBE_POS_Y * score_stride + key) as usize] = sum * factor;
        }
    }
}

/// A unit's share of a packed key's score, by integers. The whole cube takes part: its units unpack parts of the keys
/// for each other.
#[cube]
fn score_packed(
    words: &[Quad],
    scales: &[f32],
    weights: &[f32],
    arena: &[u32],
    r: usize,
    at: usize,
    key_scales: usize,
    share: usize,
    #[comptime] s: Index,
) -> f32 {
    // One more than a row has, so that rows start in different banks.
    let pitch = comptime!(s.quads() + 1);
    let quads = comptime!(s.quads());
    let mut queries = Shared::<[Quad]>::new_slice(comptime!(s.heads * (s.quads() + 1)));
    let mut keys = Shared::<[Quad]>::new_slice(comptime!(SCORE_KEYS * (s.quads() + 1)));
    let mut query_scales = Shared::<[f32]>::new_slice(comptime!(s.heads * s.blocks()));
    let mut head_weights = Shared::<[f32]>::new_slice(s.heads);
    // All of a unit's loads are under way before the first is waited for; units beyond the last value repeat it.
    let own_quads = comptime!(s.quads().div_ceil(SHARE));
    let mut key_words = Array::<u32>::new(comptime!(2 * own_quads));
    #[unroll]
    for j in 0..comptime!(2 * own_quads) {
        let i = usize::min(share + comptime!(j / 2 * SHARE), quads - 1);
        key_words[j] = arena[at + 2 * i + comptime!(j % 2)];
    }
    let mut scale_words = Array::<u32>::new(comptime!(s.blocks().div_ceil(4)));
    #[unroll]
    for b in 0..comptime!(s.blocks().div_ceil(4)) {
        scale_words[b] = arena[key_scales + b];
    }
    let (query_values, query_blocks) = comptime!((s.heads * s.quads(), s.heads * s.blocks()));
    let own_queries = fetch_share(words, r * query_values, query_values);
    let own_scales = fetch_share(scales, r * query_blocks, query_blocks);
    let own_weights = fetch_share(weights, r * comptime!(s.weight_stride), s.heads);
    #[unroll]
    for j in 0..comptime!(query_values.div_ceil(SCORE_UNITS)) {
        let i = UNIT_POS as usize + comptime!(j * SCORE_UNITS);
        if i < query_values {
            queries[i / quads * pitch + i % quads] = own_queries[j];
        }
    }
    lay_share(&own_scales, &mut query_scales, query_blocks);
    lay_share(&own_weights, &mut head_weights, s.heads);
    let key = UNIT_POS as usize / SHARE * pitch;
    #[unroll]
    for j in 0..own_quads {
        let i = share + comptime!(j * SHARE);
        if i < quads {
            let mut unpacked = Quad::empty();
            #[unroll]
            for half in 0..2usize {
                let word = key_words[comptime!(2 * j + half)];
                unpacked.insert(comptime!(2 * half), unpack_keys(word));
                unpacked.insert(comptime!(2 * half + 1), unpack_keys(word >> 16));
            }
            keys[key + i] = unpacked;
        }
    }
    let mut ks = Array::<f32>::new(s.blocks());
    #[unroll]
    for b in 0..comptime!(s.blocks()) {
        ks[b] =
            f32::reinterpret(((scale_words[comptime!(b / 4)] >> comptime!(8 * (b as u32 % 4))) & 255) << 23);
    }
    sync_cube();
    let mut own = Array::<Quad>::new(quads);
    #[unroll]
    for i in 0..quads {
        own[i] = keys[key + i];
    }
    let mut sum = 0.0f32;
    let mut h = share;
    while h < comptime!(s.heads) {
        let mut dot = 0.0f32;
        #[unroll]
        for b in 0..comptime!(s.blocks()) {
            let at = h * pitch + comptime!(2 * b);
            let int = dot_bytes(queries[at], own[comptime!(2 * b)], 0i32);
            let int = dot_bytes(queries[at + 1], own[comptime!(2 * b + 1)], int);
            dot += f32::cast_from(int) * (query_scales[h * comptime!(s.blocks()) + b] * ks[b]);
        }
        sum += head_weights[h] * f32::max(dot, 0.0f32);
        h += SHARE;
    }
    sum
}

/// A unit's share of `len` values, on its way; units beyond the last repeat it.
#[cube]
fn fetch_share<T: CubePrimitive>(from: &[T], first: usize, #[comptime] len: usize) -> Array<T> {
    let mut own = Array::<T>::new(comptime!(len.div_ceil(SCORE_UNITS)));
    #[unroll]
    for j in 0..comptime!(len.div_ceil(SCORE_UNITS)) {
        own[j] = from[first + usize::min(UNIT_POS as usize + comptime!(j * SCORE_UNITS), comptime!(len - 1))];
    }
    own
}

/// Lays such shares into shared memory.
#[cube]
fn lay_share<T: CubePrimitive>(own: &Array<T>, to: &mut Shared<[T]>, #[comptime] len: usize) {
    #[unroll]
    for j in 0..comptime!(len.div_ceil(SCORE_UNITS)) {
        let i = UNIT_POS as usize + comptime!(j * SCORE_UNITS);
        if i < len {
            to[i] = own[j];
        }
    }
}

/// Four FP4 codes, the lowest bits of a word, as bytes: twice their values.
#[cube]
fn unpack_keys(codes: u32) -> u32 {
    let mut packed = 0u32;
    #[unroll]
    for i in 0..4usize {
        let code = (codes >> comptime!(4 * i as u32)) & 15;
        packed |= (u32::reinterpret(fp4_twice(code)) & 255) << comptime!(8 * i as u32);
    }
    packed
}

/// Bits of a float in an order that integers share.
#[cube]
pub fn rank(x: f32) -> u32 {
    let bits = u32::reinterpret(x);
    bits ^ select((bits >> 31) != 0, 0xffff_ffffu32, 0x8000_0000u32)
}

/// Units of a cube that selects: one a bin of the histograms.
pub const SELECT_UNITS: u32 = 256;
/// Scores of a cube that selects.
pub const STRETCH: usize = 8192;

/// Sum of the values of the units before this one (`up`) or after it. The whole cube takes part.
#[cube]
fn sum_beside(value: u32, sums: &mut Shared<[u32]>, #[comptime] up: bool) -> u32 {
    let unit = UNIT_POS;
    sums[unit as usize] = value;
    sync_cube();
    let mut sum = value;
    #[unroll]
    for step in 0..comptime!(SELECT_UNITS.ilog2()) {
        let distance = comptime!(1u32 << step);
        let there = if comptime!(up) { unit >= distance } else { unit + distance < SELECT_UNITS };
        let other = if comptime!(up) {
            select(there, unit - distance, 0u32)
        } else {
            select(there, unit + distance, 0u32)
        };
        let more = select(there, sums[other as usize], 0u32);
        sync_cube();
        sum += more;
        sums[unit as usize] = sum;
        sync_cube();
    }
    sum - value
}

/// The `top_k` best scores of each row, ascending by place; of equal scores the first wins. By histograms of eight bits
/// at a time, so in time linear in the scores.
///
/// Of many scores, a cube along y takes a stretch, and leaves its best in `best` (scores) and `selection` (places) with
/// room for `top_k` of each stretch; a second launch then chooses among those, whose places are in `places`.
#[cube(launch_unchecked)]
pub fn top_k(
    scores: &[f32],
    places: &[u32],
    plan: &[u32],
    best: &mut [f32],
    selection: &mut [u32],
    first_row: u32,
    score_stride: u32,
    #[comptime] stretches: bool,
    #[comptime] again: bool,
    #[comptime] s: Index,
) {
    let top = comptime!(s.top_k);
    let r = (first_row + CUBE_POS_X) as usize;
    let visible = ((plan[4 * r + 1] + 1) / 4) as usize;
    if visible > top {
        let mut first = 0usize;
        let mut count = visible;
        if comptime!(stretches) {
            first = usize::min(CUBE_POS_Y as usize * STRETCH, visible);
            count = usize::min(visible - first, STRETCH);
        }
        if comptime!(again) {
            // Whole stretches, but for the last.
            let (whole, rest) = (visible / STRETCH, visible % STRETCH);
            count = whole * top + usize::min(rest, top);
        }
        let row = CUBE_POS_X as usize * score_stride as usize + first;
        let to = if comptime!(stretches) {
            (CUBE_POS_X * CUBE_COUNT_Y + CUBE_POS_Y) as usize * top
        } else {
            r * top
        };
        best_of(scores, places, best, selection, row, first, count, to, stretches, again, top);
    }
}

/// The `top` best of `count` scores from `row` on, ascending by place, to place `to` of the outputs: a score's place is
/// its own from `first` on, or that of `places` where these scores are chosen `again`. Where `keep`, scores go along.
#[cube]
fn best_of(
    scores: &[f32],
    places: &[u32],
    best: &mut [f32],
    selection: &mut [u32],
    row: usize,
    first: usize,
    count: usize,
    to: usize,
    #[comptime] keep: bool,
    #[comptime] again: bool,
    #[comptime] top: usize,
) {
    let (unit, units) = (UNIT_POS as usize, comptime!(SELECT_UNITS as usize));
    let wanted = usize::min(count, top) as u32;
    let histogram = Shared::<[Atomic<u32>]>::new_slice(256usize);
    let mut sums = Shared::<[u32]>::new_slice(256usize);
    let mut found = Shared::<[u32]>::new_slice(2usize);
    let mut prefix = 0u32;
    let mut need = wanted;
    #[unroll]
    for pass in 0..4usize {
        let shift = comptime!(24 - 8 * pass as u32);
        histogram[unit].store(0u32);
        sync_cube();
        let mut i = unit;
        while i < count {
            let key = rank(scores[row + i]);
            let mut same = true;
            if comptime!(pass > 0) {
                same = (key >> comptime!(if pass > 0 { 32 - 8 * pass as u32 } else { 0u32 })) == prefix;
            }
            if same {
                histogram[((key >> shift) & 255) as usize].fetch_add(1u32);
            }
            i += units;
        }
        sync_cube();
        let own = histogram[unit].load();
        let above = sum_beside(own, &mut sums, false);
        if above < need && above + own >= need {
            found[0] = UNIT_POS;
            found[1] = need - above;
        }
        sync_cube();
        prefix = (prefix << 8) | found[0];
        need = found[1];
        sync_cube();
    }
    // Each unit writes those of its part, in order.
    let part = (count + units - 1) / units;
    let start = usize::min(unit * part, count);
    let end = usize::min(start + part, count);
    let mut more = 0u32;
    let mut same = 0u32;
    let mut i = start;
    while i < end {
        let key = rank(scores[row + i]);
        more += select(key > prefix, 1u32, 0u32);
        same += select(key == prefix, 1u32, 0u32);
        i += 1;
    }
    let mut before = sum_beside(more, &mut sums, true);
    let mut ties = sum_beside(same, &mut sums, true);
    i = start;
    while i < end {
        let score = scores[row + i];
        let key = rank(score);
        if key > prefix || (key == prefix && ties < need) {
            let at = before + u32::min(ties, need);
            if at < wanted {
                let place = to + at as usize;
                if comptime!(keep) {
                    best[place] = score;
                }
                selection[place] = if comptime!(again) { places[row + i] } else { (first + i) as u32 };
            }
        }
        before += select(key > prefix, 1u32, 0u32);
        ties += select(key == prefix, 1u32, 0u32);
        i += 1;
    }
}

/// Logits of a cube that looks for the best tokens: random ones are close together and meet in few bins, so few a cube.
pub const TOKENS: usize = 2048;

/// The `top` best of each stretch (y) of each row (x) of `scores`, `stride` apart, of which each has `count`; or of those
/// of all stretches, chosen `again`: then `places` has where they are.
#[cube(launch_unchecked)]
pub fn best_tokens(
    scores: &[f32],
    places: &[u32],
    best: &mut [f32],
    tokens: &mut [u32],
    count: u32,
    stride: u32,
    #[comptime] again: bool,
    #[comptime] top: usize,
) {
    let mut first = CUBE_POS_Y as usize * TOKENS;
    let mut own = usize::min(count as usize - first, TOKENS);
    if comptime!(again) {
        first = 0usize;
        own = count as usize;
    }
    let row = CUBE_POS_X as usize * stride as usize + first;
    let to = (CUBE_POS_X * CUBE_COUNT_Y + CUBE_POS_Y) as usize * top;
    best_of(scores, places, best, tokens, row, first, own, to, true, again, top);
}
