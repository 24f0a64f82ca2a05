//! Embedding, norms and hyper-connections (A.1 to A.3), the draft block's input (A.11).

use super::common::{Real, cube_sum, quantize_four, rms_scale, sigmoid, store_four};
use super::dot::{Four, Output};
use super::fetch::load_x;
use cubecl::prelude::*;

/// Room for a value of each plane of a cube, whatever the size of planes.
pub const MOST_PLANES: usize = 256;

/// What the hyper-connection kernels are specialised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Hyper {
    /// Streams.
    pub n: usize,
    /// Model width.
    pub d: usize,
    /// Values from row to row of the streams.
    pub stride: usize,
    /// Values from row to row of the sublayer's output.
    pub y_stride: usize,
    /// Values from row to row of post and comb.
    pub mix_stride: usize,
    /// Control numbers: rows of the control matrix.
    pub controls: usize,
    /// Values of a stored row of it.
    pub input: usize,
    /// Channels of a cube that joins.
    pub part: usize,
    /// Rows of it.
    pub rows: usize,
    /// Units of it.
    pub units: usize,
    /// Control numbers that a plane of it takes at once.
    pub block: usize,
    /// Sinkhorn iterations.
    pub sinkhorn: usize,
    /// Epsilon of the norm.
    pub norm_eps: Real,
    /// Epsilon of the hyper-connections.
    pub eps: Real,
}

impl Hyper {
    /// Vectors of four channels of a part.
    pub const fn fours(&self) -> usize {
        self.part / 4
    }
    /// The same of all streams.
    pub const fn items(&self) -> usize {
        self.n * self.fours()
    }
    /// Values of post and comb.
    pub const fn mixed(&self) -> usize {
        self.n + self.n * self.n
    }
    /// Cubes along the width.
    pub const fn parts(&self) -> usize {
        self.d.div_ceil(self.part)
    }
    /// Sums of a row: control numbers, and products of the streams.
    pub const fn numbers(&self) -> usize {
        self.controls + self.n * (self.n + 1) / 2
    }
    /// Units that add the parts of a number, where a cube mixes streams.
    pub const fn groups(&self) -> usize {
        MIX_UNITS / self.numbers()
    }
    /// Place of the product of streams `i <= j` among the products.
    pub const fn pair(&self, i: usize, j: usize) -> usize {
        i * self.n - i * (i + 1) / 2 + j
    }
}

/// Units of a cube that mixes streams, four channels each.
pub const MIX_UNITS: usize = 512;

/// A.1: every stream of a row starts as its token's embedding.
#[cube(launch_unchecked)]
pub fn embed<E: Float>(
    table: &[Vector<E, Const<4>>],
    plan: &[u32],
    out: &mut [Four],
    #[comptime] width: usize,
    #[comptime] copies: usize,
    #[comptime] stride: usize,
    #[comptime] table_stride: usize,
) {
    let row = CUBE_POS_Y as usize;
    let k = (CUBE_POS_X * CUBE_DIM + UNIT_POS) as usize;
    if k < comptime!(width / 4) {
        let token = plan[4 * row] as usize;
        let v = Four::cast_from(table[token * comptime!(table_stride / 4) + k]);
        #[unroll]
        for i in 0..copies {
            out[row * comptime!(stride / 4) + comptime!(i * width / 4) + k] = v;
        }
    }
}

/// The same from a Q8_0 table.
#[cube(launch_unchecked)]
pub fn embed_q8(
    table: &[u32],
    scales: &[half::f16],
    plan: &[u32],
    out: &mut [Four],
    #[comptime] width: usize,
    #[comptime] copies: usize,
    #[comptime] stride: usize,
) {
    let row = CUBE_POS_Y as usize;
    let k = (CUBE_POS_X * CUBE_DIM + UNIT_POS) as usize;
    if k < comptime!(width / 4) {
        let token = plan[4 * row] as usize;
        let word = i32::reinterpret(table[token * comptime!(width / 4) + k]);
        let d = f32::cast_from(scales[token * comptime!(width / 32) + k / 8]);
        let mut v = Four::empty();
        #[unroll]
        for i in 0..4usize {
            v.insert(i, d * f32::cast_from((word << comptime!(24 - 8 * i as i32)) >> 24i32));
        }
        #[unroll]
        for i in 0..copies {
            out[row * comptime!(stride / 4) + comptime!(i * width / 4) + k] = v;
        }
    }
}

/// A unit's share of the parts of a row's numbers, on its way.
#[cube]
pub fn fetch_parts(partial: &[f32], row: usize, #[comptime] s: Hyper) -> Array<f32> {
    let (numbers, groups) = (comptime!(s.numbers()), comptime!(s.groups()));
    let unit = usize::min(UNIT_POS as usize, comptime!(s.groups() * s.numbers() - 1));
    let mut own = Array::<f32>::new(comptime!(s.parts().div_ceil(s.groups())));
    #[unroll]
    for step in 0..comptime!(s.parts().div_ceil(s.groups())) {
        let p = usize::min(unit / numbers + step * groups, comptime!(s.parts() - 1));
        own[step] = load_x(partial, (row * comptime!(s.parts()) + p) * numbers + unit % numbers, false);
    }
    own
}

/// Sums of the parts, in shared memory.
#[cube]
pub fn sum_parts(own: &Array<f32>, #[comptime] s: Hyper) -> Shared<[f32]> {
    let (numbers, groups) = (comptime!(s.numbers()), comptime!(s.groups()));
    let mut sums = Shared::<[f32]>::new_slice(comptime!(s.groups() * s.numbers()));
    let mut totals = Shared::<[f32]>::new_slice(comptime!(s.numbers()));
    let unit = UNIT_POS as usize;
    if unit < comptime!(s.groups() * s.numbers()) {
        let mut sum = 0.0f32;
        #[unroll]
        for step in 0..comptime!(s.parts().div_ceil(s.groups())) {
            if unit / numbers + step * groups < comptime!(s.parts()) {
                sum += own[step];
            }
        }
        sums[unit] = sum;
    }
    sync_cube();
    if unit < numbers {
        let mut sum = 0.0f32;
        #[unroll]
        for g in 0..groups {
            sum += sums[comptime!(g * s.numbers()) + unit];
        }
        totals[unit] = sum;
    }
    sync_cube();
    totals
}

/// `1 / rms` of a row's streams together.
#[cube]
fn streams_scale(totals: &[f32], #[comptime] s: Hyper) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for i in 0..comptime!(s.n) {
        sum += totals[comptime!(s.controls + s.pair(i, i))];
    }
    rms_scale(sum, comptime!(s.n * s.d), s.norm_eps)
}

/// `1 / rms` of a mix of the streams.
#[cube]
pub fn mix_scale(totals: &Shared<[f32]>, pre: &Array<f32>, #[comptime] s: Hyper) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for i in 0..comptime!(s.n) {
        #[unroll]
        for j in i..comptime!(s.n) {
            let twice = comptime!(if i == j { 1.0f32 } else { 2.0f32 });
            sum += twice * pre[i] * pre[j] * totals[comptime!(s.controls + s.pair(i, j))];
        }
    }
    // Rounding could leave less than nothing.
    rms_scale(f32::max(sum, 0.0f32), comptime!(s.d), s.norm_eps)
}

/// What post and comb of a sublayer are made of, for whoever makes them.
#[derive(CubeType, CubeLaunch)]
pub struct Mixing {
    /// Numbers of each row.
    pub totals: Box<[f32]>,
    /// Scales and offsets of the control numbers.
    pub control: Box<[f32]>,
    /// Where post and comb go.
    pub mix: Box<[f32]>,
    /// The streams' shape.
    #[cube(comptime)]
    pub s: Hyper,
}

/// A.3: post and comb of a row, by the first plane of a cube.
#[cube]
pub fn post_comb_row(mixing: &mut Mixing, row: usize) {
    if PLANE_POS == 0 {
        let s = comptime!(mixing.s);
        let first = row * comptime!(s.numbers());
        let totals = &mixing.totals[first..first + comptime!(s.numbers())];
        sinkhorn(totals, &mixing.control, row, &mut mixing.mix, s);
    }
}

/// The same of all rows.
#[cube(launch_unchecked)]
pub fn post_comb(mut mixing: Mixing) {
    post_comb_row(&mut mixing, CUBE_POS_X as usize);
}

/// Scales and offsets of the control numbers of a mix, in registers.
#[cube]
pub fn fetch_pre(control: &[f32], #[comptime] s: Hyper) -> Array<f32> {
    let mut own = Array::<f32>::new(comptime!(1 + s.n));
    own[0] = load_x(control, 0usize, false);
    #[unroll]
    for i in 0..comptime!(s.n) {
        own[1 + i] = load_x(control, comptime!(3 + i), false);
    }
    own
}

/// How much of each stream is in the input of a sublayer.
#[cube]
pub fn pre_of(totals: &Shared<[f32]>, control: &Array<f32>, #[comptime] s: Hyper) -> Array<f32> {
    let r = streams_scale(&totals[0..comptime!(s.numbers())], s);
    let mut pre = Array::<f32>::new(comptime!(s.n));
    #[unroll]
    for i in 0..comptime!(s.n) {
        pre[i] = sigmoid(totals[i] * r * control[0] + control[1 + i]) + comptime!(s.eps.get());
    }
    pre
}

/// Four channels of the normed mix of streams, which are held from place `first` on; `scale` is [`mix_scale`].
#[cube]
pub fn mix_four(
    held: &Array<Four>,
    pre: &Array<f32>,
    weight: Four,
    scale: f32,
    #[comptime] first: usize,
    #[comptime] s: Hyper,
) -> Four {
    let mut v = Four::new(0.0f32);
    #[unroll]
    for i in 0..comptime!(s.n) {
        v += Four::new(pre[i]) * held[comptime!(first + i)];
    }
    weight * (v * Four::new(scale))
}

/// A.3 and A.2: each cube mixes a part of a row's streams into the normed input of the sublayer. Post and comb take
/// longer, and nobody needs them before the sublayer's end: where `all`, the last cube along y computes them, else the
/// first leaves what they are made of.
#[cube(launch_unchecked)]
pub fn hc_mix(
    streams: &[Four],
    partial: &[f32],
    control: &[f32],
    norm: &[Four],
    mut x: Output,
    mix: &mut [f32],
    left: &mut [f32],
    #[comptime] all: bool,
    #[comptime] s: Hyper,
) {
    let row = CUBE_POS_X as usize;
    let k = CUBE_POS_Y as usize * MIX_UNITS + UNIT_POS as usize;
    let own = usize::min(k, comptime!(s.d / 4 - 1));
    // On their way while the sums are made.
    let parts = fetch_parts(partial, row, s);
    let mut held = Array::<Four>::new(comptime!(s.n));
    #[unroll]
    for i in 0..comptime!(s.n) {
        held[i] = load_x(streams, row * comptime!(s.stride / 4) + comptime!(i * s.d / 4) + own, true);
    }
    let weight = load_x(norm, own, true);
    let offsets = fetch_pre(control, s);
    let totals = sum_parts(&parts, s);
    if comptime!(!all) && CUBE_POS_Y == 0 && UNIT_POS < comptime!(s.numbers() as u32) {
        left[row * comptime!(s.numbers()) + UNIT_POS as usize] = totals[UNIT_POS as usize];
    }
    let mixes = if comptime!(all) { CUBE_POS_Y < CUBE_COUNT_Y - 1 } else { true.runtime() };
    if mixes {
        let pre = pre_of(&totals, &offsets, s);
        let v = mix_four(&held, &pre, weight, mix_scale(&totals, &pre, s), 0usize, s);
        let valid = k < comptime!(s.d / 4);
        store_four(&mut x, row, k, select(valid, v, Four::new(0.0f32)), valid);
    } else if PLANE_POS == 0 {
        sinkhorn(&totals[0..comptime!(s.numbers())], control, row, mix, s);
    }
}

/// post, and comb made doubly stochastic: softmax over destinations, then alternating normalisations, columns
/// first. Each unit of a group of N has a row of comb; the groups of the plane do the same.
#[cube]
fn sinkhorn(totals: &[f32], control: &[f32], row: usize, mix: &mut [f32], #[comptime] s: Hyper) {
    let n = comptime!(s.n);
    let eps = comptime!(s.eps.get());
    let own = UNIT_POS_PLANE as usize % n;
    let r = streams_scale(totals, s);
    let z = totals[n + own] * r * control[1] + control[comptime!(3 + s.n) + own];
    let post = 2.0f32 * sigmoid(z);
    let mut c = Array::<f32>::new(n);
    let mut max = f32::min_value();
    #[unroll]
    for j in 0..n {
        let at = comptime!(2 * s.n + j) + own * n;
        c[j] = totals[at] * r * control[2] + control[3 + at];
        max = f32::max(max, c[j]);
    }
    #[unroll]
    for j in 0..n {
        c[j] = f32::exp(c[j] - max);
    }
    let sum = row_sum(&c, n);
    #[unroll]
    for j in 0..n {
        c[j] = c[j] / sum + eps;
    }
    normalise_columns(&mut c, n, eps);
    for _ in 1..comptime!(s.sinkhorn) {
        let inv = inverse(row_sum(&c, n) + eps);
        #[unroll]
        for j in 0..n {
            c[j] = c[j] * inv;
        }
        normalise_columns(&mut c, n, eps);
    }
    if UNIT_POS_PLANE < comptime!(s.n as u32) {
        let out = row * comptime!(s.mix_stride);
        mix[out + own] = post;
        #[unroll]
        for j in 0..n {
            mix[out + n + own * n + j] = c[j];
        }
    }
}

#[cube]
fn row_sum(c: &Array<f32>, #[comptime] n: usize) -> f32 {
    let mut sum = c[0];
    #[unroll]
    for j in 1..n {
        sum += c[j];
    }
    sum
}

#[cube]
fn normalise_columns(c: &mut Array<f32>, #[comptime] n: usize, eps: f32) {
    #[unroll]
    for j in 0..n {
        let mut sum = c[j];
        #[unroll]
        for i in 0..comptime!(n.ilog2()) {
            sum += plane_shuffle_xor(sum, comptime!(1u32 << i));
        }
        c[j] = c[j] * inverse(sum + eps);
    }
}

/// `1 / x` of positive values, to a few units in the last place. A division takes a device a subroutine; here each of
/// twenty iterations waits for two, one after the other.
#[cube]
fn inverse(x: f32) -> f32 {
    let root = f32::inverse_sqrt(x);
    root * root
}

/// A.3: the head's mix of a row's streams; parts of the row along y.
#[cube(launch_unchecked)]
pub fn hc_head(
    streams: &[Four],
    partial: &[f32],
    control: &[f32],
    z: &mut [Four],
    #[comptime] s: Hyper,
    #[comptime] z_stride: usize,
) {
    let row = CUBE_POS_X as usize;
    let totals = sum_parts(&fetch_parts(partial, row, s), s);
    let r = streams_scale(&totals[0..comptime!(s.numbers())], s);
    let k = CUBE_POS_Y as usize * MIX_UNITS + UNIT_POS as usize;
    if k < comptime!(s.d / 4) {
        let mut v = Four::new(0.0f32);
        #[unroll]
        for i in 0..comptime!(s.n) {
            let pre =
                sigmoid(totals[i] * r * control[0] + control[comptime!(1 + i)]) + comptime!(s.eps.get());
            v += Four::new(pre) * streams[row * comptime!(s.stride / 4) + comptime!(i * s.d / 4) + k];
        }
        z[row * comptime!(z_stride / 4) + k] = v;
    }
}

/// A.2: RMS norm of each row, a cube a row. The input's stride is its own, so that the streams of a row can be rows
/// too.
#[cube(launch_unchecked)]
pub fn norm(
    x: &[Four],
    weight: &[Four],
    mut out: Output,
    #[comptime] width: usize,
    #[comptime] stride: usize,
    #[comptime] eps: Real,
) {
    norm_row(x, weight, &mut out, CUBE_POS_X as usize, width, stride, eps);
}

/// The norm of one row; the whole cube takes part.
#[cube]
pub fn norm_row(
    x: &[Four],
    weight: &[Four],
    out: &mut Output,
    row: usize,
    #[comptime] width: usize,
    #[comptime] stride: usize,
    #[comptime] eps: Real,
) {
    let fours = comptime!(width / 4);
    let mut scratch = Shared::<[f32]>::new_slice(MOST_PLANES);
    let mut sum = 0.0f32;
    let mut k = UNIT_POS as usize;
    while k < fours {
        let v = x[row * comptime!(stride / 4) + k];
        let s = v * v;
        sum += (s.extract(0usize) + s.extract(1usize)) + (s.extract(2usize) + s.extract(3usize));
        k += CUBE_DIM as usize;
    }
    let scale = rms_scale(cube_sum(sum, &mut scratch), width, eps);
    for step in 0..(fours + CUBE_DIM as usize - 1) / CUBE_DIM as usize {
        let k = step * CUBE_DIM as usize + UNIT_POS as usize;
        let valid = k < fours;
        let mut v = Four::new(0.0f32);
        if valid {
            v = weight[k] * (x[row * comptime!(stride / 4) + k] * Four::new(scale));
        }
        store_four(out, row, k, v, valid);
    }
}

/// The int8 form of rows that were stored without.
#[cube(launch_unchecked)]
pub fn quantize(mut x: Output) {
    let fours = comptime!(x.stride / 4);
    let row = CUBE_POS_Y as usize;
    let four = (CUBE_POS_X * CUBE_DIM + UNIT_POS) as usize;
    // The stride is a multiple of 64, so whole groups of units are in or out.
    let valid = four < fours;
    let mut v = Four::new(0.0f32);
    if valid {
        v = x.values[row * fours + four];
    }
    quantize_four(&mut x, row, four, v, valid);
}

/// Rows as f16.
#[cube(launch_unchecked)]
pub fn halve(x: &[Four], out: &mut [Vector<half::f16, Const<4>>], fours: u32) {
    let k = CUBE_POS_X * CUBE_DIM + UNIT_POS;
    if k < fours {
        let at = (CUBE_POS_Y * fours + k) as usize;
        out[at] = Vector::cast_from(x[at]);
    }
}

/// Copies rows of the streams: row `r` of the output is row `rows[first + r]`.
#[cube(launch_unchecked)]
pub fn gather(
    from: &[Four],
    rows: &[u32],
    to: &mut [Four],
    first: u32,
    #[comptime] fours: usize,
    #[comptime] from_stride: usize,
    #[comptime] to_stride: usize,
) {
    let row = CUBE_POS_Y as usize;
    let k = (CUBE_POS_X * CUBE_DIM + UNIT_POS) as usize;
    if k < fours {
        let source = rows[first as usize + row] as usize;
        to[row * comptime!(to_stride / 4) + k] = from[source * comptime!(from_stride / 4) + k];
    }
}

/// A.11: stream `i` of a row is its projection plus that of the next token's embedding.
#[cube(launch_unchecked)]
pub fn add_embedding(
    h: &[Four],
    e: &[Four],
    streams: &mut [Four],
    #[comptime] s: Hyper,
    #[comptime] stride: usize,
) {
    let row = CUBE_POS_Y as usize;
    let k = (CUBE_POS_X * CUBE_DIM + UNIT_POS) as usize;
    if k < comptime!(s.d / 4) {
        #[unroll]
        for i in 0..comptime!(s.n) {
            let v = h[(row * comptime!(s.n) + i) * comptime!(stride / 4) + k]
                + e[row * comptime!(stride / 4) + k];
            streams[row * comptime!(s.stride / 4) + comptime!(i * s.d / 4) + k] = v;
        }
    }
}
