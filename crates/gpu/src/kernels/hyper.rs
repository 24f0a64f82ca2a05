//! Embedding, norms and hyper-connections (A.1 to A.3), the draft block's input (A.11).

use super::common::{Real, cube_sum, quantize_four, rms_scale, sigmoid, store_four};
use super::dot::{Four, Output};
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
    /// Channels of a cube.
    pub part: usize,
    /// Units of a cube that handles a row.
    pub units: usize,
    /// Sinkhorn iterations.
    pub sinkhorn: usize,
    /// Epsilon of the norm.
    pub norm_eps: Real,
    /// Epsilon of the hyper-connections.
    pub eps: Real,
}

impl Hyper {
    /// Cubes along the width.
    pub fn parts(&self) -> usize {
        self.d.div_ceil(self.part)
    }
}

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

/// A.3: joins the sublayer's output into the streams, where `join`; then this cube's share of the products of
/// the streams with the control matrix, and of their squares: `partial [n, parts, controls + 1]`.
#[cube(launch_unchecked)]
pub fn hc_control<E: Float>(
    streams: &mut [f32],
    y: &[f32],
    mix: &[f32],
    control: &[Vector<E, Const<2>>],
    partial: &mut [f32],
    #[comptime] s: Hyper,
    #[comptime] join: bool,
    #[comptime] project: bool,
) {
    let row = CUBE_POS_Y as usize;
    let n = comptime!(s.n);
    let pairs = comptime!(s.part / 2);
    let items = comptime!(n * s.part / 2);
    let base = CUBE_POS_X as usize * comptime!(s.part);
    let streams_row = row * comptime!(s.stride);
    let mut joined = Shared::<[f32]>::new_slice(comptime!(2 * items));
    let mut item = UNIT_POS as usize;
    // All streams of a channel are replaced at once: read by all units before any writes.
    while item < items {
        let j = item / pairs;
        let k = base + 2 * (item % pairs);
        if k < comptime!(s.d) {
            let at = streams_row + j * comptime!(s.d) + k;
            let mut a = streams[at];
            let mut b = streams[at + 1];
            if comptime!(join) {
                let m = row * comptime!(s.mix_stride);
                let post = mix[m + j];
                a = post * y[row * comptime!(s.y_stride) + k];
                b = post * y[row * comptime!(s.y_stride) + k + 1];
                #[unroll]
                for i in 0..n {
                    let c = mix[m + comptime!(n + i * n) + j];
                    a += c * streams[streams_row + comptime!(i * s.d) + k];
                    b += c * streams[streams_row + comptime!(i * s.d) + k + 1];
                }
            }
            joined[2 * item] = a;
            joined[2 * item + 1] = b;
        } else {
            joined[2 * item] = 0.0f32;
            joined[2 * item + 1] = 0.0f32;
        }
        item += CUBE_DIM as usize;
    }
    sync_cube();
    if comptime!(join) {
        item = UNIT_POS as usize;
        while item < items {
            let k = base + 2 * (item % pairs);
            if k < comptime!(s.d) {
                let at = streams_row + item / pairs * comptime!(s.d) + k;
                streams[at] = joined[2 * item];
                streams[at + 1] = joined[2 * item + 1];
            }
            item += CUBE_DIM as usize;
        }
    }
    if comptime!(project) {
        // A plane takes control numbers; the sum of squares is one more.
        let planes = (CUBE_DIM / PLANE_DIM) as usize;
        let part = row * CUBE_COUNT_X as usize + CUBE_POS_X as usize;
        let mut m = PLANE_POS as usize;
        while m < comptime!(s.controls + 1) {
            let mut sum = 0.0f32;
            let mut item = UNIT_POS_PLANE as usize;
            while item < items {
                let (a, b) = (joined[2 * item], joined[2 * item + 1]);
                let k = usize::min(base + 2 * (item % pairs), comptime!(s.d - 2));
                let mut w = Vector::<f32, Const<2>>::empty();
                w.insert(0usize, a);
                w.insert(1usize, b);
                if m < comptime!(s.controls) {
                    let at = m * comptime!(s.input / 2) + (item / pairs * comptime!(s.d) + k) / 2;
                    w = Vector::<f32, Const<2>>::cast_from(control[at]);
                }
                sum += w.extract(0usize) * a + w.extract(1usize) * b;
                item += PLANE_DIM as usize;
            }
            sum = plane_sum(sum);
            if UNIT_POS_PLANE == 0 {
                partial[part * comptime!(s.controls + 1) + m] = sum;
            }
            m += planes;
        }
    }
}

/// Sums `controls + 1` partial results over the parts, into shared memory.
#[cube]
fn sum_parts(partial: &[f32], row: usize, #[comptime] s: Hyper) -> Shared<[f32]> {
    let width = comptime!(s.controls + 1);
    let parts = comptime!(s.d.div_ceil(s.part));
    let lanes = 8usize;
    let mut eighths = Shared::<[f32]>::new_slice(comptime!(8 * width));
    let mut totals = Shared::<[f32]>::new_slice(width);
    #[unroll]
    for step in 0..comptime!((8 * width).div_ceil(s.units)) {
        let i = UNIT_POS as usize + comptime!(step * s.units);
        if i < comptime!(8 * width) {
            let mut sum = 0.0f32;
            let mut p = i % lanes;
            while p < parts {
                sum += partial[(row * parts + p) * width + i / lanes];
                p += lanes;
            }
            eighths[i] = sum;
        }
    }
    sync_cube();
    let mut i = UNIT_POS as usize;
    while i < width {
        let mut sum = 0.0f32;
        #[unroll]
        for l in 0..8usize {
            sum += eighths[8 * i + l];
        }
        totals[i] = sum;
        i += CUBE_DIM as usize;
    }
    sync_cube();
    totals
}

/// A.3 and A.2: cubes with y = 0 mix the streams into the normed input of the sublayer, those with y = 1 compute
/// post and comb.
#[cube(launch_unchecked)]
pub fn hc_mix(
    streams: &[Four],
    partial: &[f32],
    control: &[f32],
    norm: &[Four],
    mut x: Output,
    mix: &mut [f32],
    #[comptime] s: Hyper,
) {
    let row = CUBE_POS_X as usize;
    let n = comptime!(s.n);
    let totals = sum_parts(partial, row, s);
    let r = rms_scale(totals[comptime!(s.controls)], comptime!(s.n * s.d), s.norm_eps);
    if CUBE_POS_Y == 0 {
        let mut pre = Array::<f32>::new(n);
        #[unroll]
        for i in 0..n {
            pre[i] = sigmoid(totals[i] * r * control[0] + control[comptime!(3 + i)]) + comptime!(s.eps.get());
        }
        mix_and_norm(streams, row, &pre, norm, &mut x, s);
    } else if UNIT_POS == 0 {
        sinkhorn(&totals, r, control, row, mix, s);
    }
}

/// `norm(sum_i pre[i] * stream[i])`.
#[cube]
fn mix_and_norm(
    streams: &[Four],
    row: usize,
    pre: &Array<f32>,
    norm: &[Four],
    x: &mut Output,
    #[comptime] s: Hyper,
) {
    let fours = comptime!(s.d / 4);
    let mut u = Shared::<[Four]>::new_slice(fours);
    let mut scratch = Shared::<[f32]>::new_slice(MOST_PLANES);
    let mut sum = 0.0f32;
    let mut k = UNIT_POS as usize;
    while k < fours {
        let mut v = Four::new(0.0f32);
        #[unroll]
        for i in 0..comptime!(s.n) {
            v += Four::new(pre[i]) * streams[row * comptime!(s.stride / 4) + comptime!(i * s.d / 4) + k];
        }
        u[k] = v;
        sum += v.extract(0usize) * v.extract(0usize)
            + v.extract(1usize) * v.extract(1usize)
            + v.extract(2usize) * v.extract(2usize)
            + v.extract(3usize) * v.extract(3usize);
        k += CUBE_DIM as usize;
    }
    let scale = rms_scale(cube_sum(sum, &mut scratch), comptime!(s.d), s.norm_eps);
    for step in 0..(fours + CUBE_DIM as usize - 1) / CUBE_DIM as usize {
        let k = step * CUBE_DIM as usize + UNIT_POS as usize;
        let valid = k < fours;
        let mut v = Four::new(0.0f32);
        if valid {
            v = norm[k] * (u[k] * Four::new(scale));
        }
        store_four(x, row, k, v, valid);
    }
}

/// post, and comb made doubly stochastic: softmax over destinations, then alternating normalisations, columns
/// first.
#[cube]
fn sinkhorn(
    totals: &Shared<[f32]>,
    r: f32,
    control: &[f32],
    row: usize,
    mix: &mut [f32],
    #[comptime] s: Hyper,
) {
    let n = comptime!(s.n);
    let eps = comptime!(s.eps.get());
    let out = row * comptime!(s.mix_stride);
    #[unroll]
    for i in 0..n {
        let z = totals[comptime!(n + i)] * r * control[1] + control[comptime!(3 + n + i)];
        mix[out + i] = 2.0f32 * sigmoid(z);
    }
    let mut c = Array::<f32>::new(comptime!(n * n));
    #[unroll]
    for i in 0..n {
        let mut max = f32::min_value();
        #[unroll]
        for j in 0..n {
            let at = comptime!(2 * n + i * n + j);
            let z = totals[at] * r * control[2] + control[comptime!(3 + at)];
            c[comptime!(i * n + j)] = z;
            max = f32::max(max, z);
        }
        let mut sum = 0.0f32;
        #[unroll]
        for j in 0..n {
            let e = f32::exp(c[comptime!(i * n + j)] - max);
            c[comptime!(i * n + j)] = e;
            sum += e;
        }
        #[unroll]
        for j in 0..n {
            c[comptime!(i * n + j)] = c[comptime!(i * n + j)] / sum + eps;
        }
    }
    columns(&mut c, n, eps);
    for _ in 1..comptime!(s.sinkhorn) {
        #[unroll]
        for i in 0..n {
            let mut sum = 0.0f32;
            #[unroll]
            for j in 0..n {
                sum += c[comptime!(i * n + j)];
            }
            let inv = 1.0f32 / (sum + eps);
            #[unroll]
            for j in 0..n {
                c[comptime!(i * n + j)] = c[comptime!(i * n + j)] * inv;
            }
        }
        columns(&mut c, n, eps);
    }
    #[unroll]
    for i in 0..comptime!(n * n) {
        mix[out + n + i] = c[i];
    }
}

#[cube]
fn columns(c: &mut Array<f32>, #[comptime] n: usize, eps: f32) {
    #[unroll]
    for j in 0..n {
        let mut sum = 0.0f32;
        #[unroll]
        for i in 0..n {
            sum += c[comptime!(i * n + j)];
        }
        let inv = 1.0f32 / (sum + eps);
        #[unroll]
        for i in 0..n {
            c[comptime!(i * n + j)] = c[comptime!(i * n + j)] * inv;
        }
    }
}

/// A.3: the head's mix of the streams.
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
    let totals = sum_parts(partial, row, s);
    let r = rms_scale(totals[comptime!(s.controls)], comptime!(s.n * s.d), s.norm_eps);
    let mut k = UNIT_POS as usize;
    while k < comptime!(s.d / 4) {
        let mut v = Four::new(0.0f32);
        #[unroll]
        for i in 0..comptime!(s.n) {
            let pre =
                sigmoid(totals[i] * r * control[0] + control[comptime!(1 + i)]) + comptime!(s.eps.get());
            v += Four::new(pre) * streams[row * comptime!(s.stride / 4) + comptime!(i * s.d / 4) + k];
        }
        z[row * comptime!(z_stride / 4) + k] = v;
        k += CUBE_DIM as usize;
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
