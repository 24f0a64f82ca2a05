//! Writing the KV cache: window rows, compressed rows, index keys (A.4 to A.6, A.9).
//!
//! A store is a region of one arena of words, at a base that the plan gives for each row of a pass. It begins
//! with a table of where its parts lie, so that sessions of any context share a launch:
//! word `layer * PARTS + part` is the offset of a part from the base.

use super::common::{Real, cube_sum, rms_scale, round_even};
use super::dot::Input;
use super::hyper::MOST_PLANES;
use super::project::{Job, project_jobs};
use super::tables::Raw;
use cubecl::prelude::*;

/// Units of a cube that handles a row.
pub const UNITS: usize = 256;

/// Parts of a layer in a store's table of offsets.
pub const PARTS: u32 = 8;
/// Window rows.
pub const WINDOW: u32 = 0;
/// Scales of the window rows.
pub const WINDOW_SCALES: u32 = 1;
/// Compressed rows.
pub const ROWS: u32 = 2;
/// Their scales.
pub const ROW_SCALES: u32 = 3;
/// Index keys.
pub const KEYS: u32 = 4;
/// Their scales.
pub const KEY_SCALES: u32 = 5;
/// Projections of open windows, for rows.
pub const OPEN_ROWS: u32 = 6;
/// The same for keys.
pub const OPEN_KEYS: u32 = 7;

/// How rows are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// f32 as computed.
    None,
    /// Rounded as trained, in f32.
    Float,
    /// Rounded and packed: FP8 with scales, rotary channels BF16; FP4 keys with scales.
    Packed,
}

/// What the cache kernels are specialised by. Sizes in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowShape {
    /// Width of a row: `head_dim`, or `index_dim` for keys.
    pub width: usize,
    /// Rotary channels at its end.
    pub rotary: usize,
    /// Whether these are index keys.
    pub keys: bool,
    /// How they are stored.
    pub rounding: Rounding,
    /// Words of a row without scales.
    pub words: usize,
    /// Words of its scales.
    pub scale_words: usize,
    /// Epsilon of the norm.
    pub eps: Real,
}

impl RowShape {
    /// Channels of an FP8 row before the rotary ones.
    pub const fn codes(&self) -> usize {
        self.width - self.rotary
    }
}

/// Offset of a part of a layer of the store at `base`.
#[cube]
pub fn part_of(arena: &[u32], base: u32, layer: u32, #[comptime] part: u32) -> u32 {
    base + arena[(base + layer * comptime!(PARTS) + part) as usize]
}

/// Writes a row that is in shared memory: norm, rotation, rounding as stored. The whole cube takes part.
#[cube]
fn finish_row(
    row: &mut Shared<[f32]>,
    norm: &[f32],
    angles: &[f32],
    angle: usize,
    arena: &mut [u32],
    at: u32,
    scales_at: u32,
    #[comptime] s: RowShape,
) {
    let mut scratch = Shared::<[f32]>::new_slice(MOST_PLANES);
    let mut sum = 0.0f32;
    let mut k = UNIT_POS as usize;
    while k < comptime!(s.width) {
        sum += row[k] * row[k];
        k += CUBE_DIM as usize;
    }
    let scale = rms_scale(cube_sum(sum, &mut scratch), comptime!(s.width), s.eps);
    // Pairs of channels: the rotary ones turn.
    k = UNIT_POS as usize;
    while k < comptime!(s.width / 2) {
        let mut a = norm[2 * k] * (row[2 * k] * scale);
        let mut b = norm[2 * k + 1] * (row[2 * k + 1] * scale);
        if k >= comptime!(s.codes() / 2) {
            let pair = angle + 2 * (k - comptime!(s.codes() / 2));
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
    if comptime!(s.keys && s.rounding != Rounding::None) {
        hadamard(row, 0usize, UNIT_POS as usize, CUBE_DIM as usize, s.width);
    }
    let exponents = block_exponents(&*row, s);
    match comptime!(s.rounding) {
        Rounding::None => store_plain(&*row, arena, at, s),
        Rounding::Float => store_rounded(&*row, &exponents, arena, at, s),
        Rounding::Packed => {
            if comptime!(s.keys) {
                store_fp4(&*row, &exponents, arena, at, scales_at, s);
            } else {
                store_fp8(&*row, &exponents, arena, at, scales_at, s);
            }
        }
    }
}

/// Normalised Walsh-Hadamard transform of `width` values from `first` on, by `units` units of which this is `unit`.
/// All units of the cube must call it together.
#[cube]
pub fn hadamard(row: &mut Shared<[f32]>, first: usize, unit: usize, units: usize, #[comptime] width: usize) {
    let stages = comptime!(width.ilog2());
    #[unroll]
    for stage in 0..stages {
        let step = comptime!(1usize << stage);
        let mut i = unit;
        while i < comptime!(width / 2) {
            let lo = first + (i / step) * comptime!(2 * step) + i % step;
            let (a, b) = (row[lo], row[lo + step]);
            row[lo] = a + b;
            row[lo + step] = a - b;
            i += units;
        }
        sync_cube();
    }
    let mut i = unit;
    while i < width {
        row[first + i] = row[first + i] * comptime!((width as f32).sqrt().recip());
        i += units;
    }
    sync_cube();
}

/// Scale bytes of a row's blocks, in shared memory. The whole cube takes part.
#[cube]
fn block_exponents(row: &Shared<[f32]>, #[comptime] s: RowShape) -> Shared<[u32]> {
    let (len, end) = comptime!(if s.keys { (32usize, s.width) } else { (64usize, s.codes()) });
    let eighths = comptime!(end.div_ceil(8));
    let mut maxima = Shared::<[f32]>::new_slice(eighths);
    let mut exponents = Shared::<[u32]>::new_slice(comptime!(end.div_ceil(len)));
    let mut k = UNIT_POS as usize;
    while k < eighths {
        let mut max = 0.0f32;
        #[unroll]
        for i in 0..8usize {
            max = f32::max(max, f32::abs(row[usize::min(8 * k + i, comptime!(end - 1))]));
        }
        maxima[k] = max;
        k += CUBE_DIM as usize;
    }
    sync_cube();
    k = UNIT_POS as usize;
    if k < comptime!(end.div_ceil(len)) {
        let mut max = 0.0f32;
        #[unroll]
        for i in 0..comptime!(len / 8) {
            max = f32::max(max, maxima[usize::min(k * comptime!(len / 8) + i, comptime!(eighths - 1))]);
        }
        exponents[k] = if comptime!(s.keys) { fp4_scale(max) } else { fp8_scale(max) };
    }
    sync_cube();
    exponents
}

#[cube]
fn store_plain(row: &Shared<[f32]>, arena: &mut [u32], at: u32, #[comptime] s: RowShape) {
    let mut k = UNIT_POS as usize;
    while k < comptime!(s.width) {
        arena[at as usize + k] = u32::reinterpret(row[k]);
        k += CUBE_DIM as usize;
    }
}

#[cube]
fn store_rounded(
    row: &Shared<[f32]>,
    exponents: &Shared<[u32]>,
    arena: &mut [u32],
    at: u32,
    #[comptime] s: RowShape,
) {
    #[unroll]
    for step in 0..comptime!(s.width.div_ceil(UNITS)) {
        let k = UNIT_POS as usize + comptime!(step * UNITS);
        if k < comptime!(s.width) {
            let mut v = row[k];
            if comptime!(s.keys) {
                let e = exponents[k / 32];
                let scale = f32::reinterpret(e << 23);
                v = fp4_value(fp4_code(v / scale)) * scale;
            } else if k < comptime!(s.codes()) {
                let e = exponents[k / 64];
                let scale = f32::reinterpret(e << 23);
                v = fp8_value(fp8_code(v / scale)) * scale;
            }
            arena[at as usize + k] = u32::reinterpret(v);
        }
    }
}

/// Largest magnitude of a block, the last of which may be shorter.
#[cube]
pub fn block_max(row: &Shared<[f32]>, first: usize, #[comptime] len: usize, #[comptime] end: usize) -> f32 {
    let mut max = 0.0f32;
    for i in 0..len {
        if first + i < end {
            max = f32::max(max, f32::abs(row[first + i]));
        }
    }
    max
}

/// Exponent byte of the smallest power of two that is at least `x`.
#[cube]
fn pow2_ceil(x: f32) -> u32 {
    let bits = u32::reinterpret(x);
    (bits >> 23) + select((bits & 0x007f_ffff) != 0, 1u32, 0u32)
}

/// Scale byte of an FP8 block of a largest magnitude.
#[cube]
pub fn fp8_scale(max: f32) -> u32 {
    pow2_ceil(f32::max(max, 1e-4f32) * (1.0f32 / 448.0f32))
}

/// Scale byte of an FP4 block of a largest magnitude.
#[cube]
pub fn fp4_scale(max: f32) -> u32 {
    pow2_ceil(f32::max(max, 7.052_966e-38f32) * (1.0f32 / 6.0f32))
}

/// Nearest E4M3 code, ties to even; magnitudes beyond 448 saturate.
#[cube]
pub fn fp8_code(x: f32) -> u32 {
    let bits = u32::reinterpret(x);
    let a = f32::abs(x);
    let magnitude = bits & 0x7fff_ffff;
    let rounded = magnitude + 0x7_ffff + ((magnitude >> 20) & 1);
    let normal = u32::min((rounded >> 20) - 960, 126u32);
    let small = u32::reinterpret(round_even(a * 512.0f32));
    let code = select(a < 0.015_625f32, small, select(a >= 448.0f32, 126u32, normal));
    code | ((bits >> 24) & 128)
}

/// Value of an E4M3 code.
#[cube]
pub fn fp8_value(code: u32) -> f32 {
    let magnitude = code & 127;
    let normal = f32::reinterpret((magnitude << 20) + 0x3c00_0000);
    let v = select(magnitude < 8, f32::cast_from(magnitude) * 0.001_953_125f32, normal);
    select(code > 127, -v, v)
}

/// Nearest E2M1 code, ties to even codes; magnitudes beyond 6 saturate.
#[cube]
pub fn fp4_code(x: f32) -> u32 {
    let a = f32::min(f32::abs(x), 6.0f32);
    let low = round_even(a * 2.0f32);
    let mid = 2 + round_even(a);
    let high = 4 + round_even(a * 0.5f32);
    let code = select(a < 2.0f32, low, select(a < 4.0f32, mid, high));
    u32::reinterpret(code) | ((u32::reinterpret(x) >> 28) & 8)
}

/// Twice the value of an E2M1 code, an integer.
#[cube]
pub fn fp4_twice(code: u32) -> i32 {
    let c = i32::reinterpret(code & 7);
    let v = select(c < 5, c, select(c == 5, 6i32, select(c == 6, 8i32, 12i32)));
    select((code & 8) != 0, -v, v)
}

/// Value of an E2M1 code.
#[cube]
pub fn fp4_value(code: u32) -> f32 {
    f32::cast_from(fp4_twice(code)) * 0.5f32
}

#[cube]
fn store_fp8(
    row: &Shared<[f32]>,
    exponents: &Shared<[u32]>,
    arena: &mut [u32],
    at: u32,
    scales_at: u32,
    #[comptime] s: RowShape,
) {
    let codes = comptime!(s.codes());
    #[unroll]
    for step in 0..comptime!(s.words.div_ceil(UNITS)) {
        let k = UNIT_POS as usize + comptime!(step * UNITS);
        if k < comptime!(s.words) {
            let mut word = 0u32;
            if k < codes / 4 {
                let e = exponents[k / 16];
                // The reciprocal of a power of two is exact.
                let inv = f32::reinterpret((254 - e) << 23);
                #[unroll]
                for i in 0..4usize {
                    word |= fp8_code(row[4 * k + i] * inv) << comptime!(8 * i as u32);
                }
            } else if k < codes / 4 + comptime!(s.rotary / 2) {
                let channel = codes + 2 * (k - codes / 4);
                word = bf16(row[channel]) | (bf16(row[channel + 1]) << 16);
            }
            arena[at as usize + k] = word;
        }
    }
    let k = UNIT_POS as usize;
    if k < comptime!(s.scale_words) {
        let mut word = 0u32;
        #[unroll]
        for i in 0..4usize {
            let block = 4 * k + i;
            if 64 * block < codes {
                word |= exponents[block] << comptime!(8 * i as u32);
            }
        }
        arena[scales_at as usize + k] = word;
    }
}

/// Nearest BF16, ties to even.
#[cube]
fn bf16(v: f32) -> u32 {
    let bits = u32::reinterpret(v);
    (bits + 0x7fff + ((bits >> 16) & 1)) >> 16
}

#[cube]
fn store_fp4(
    row: &Shared<[f32]>,
    exponents: &Shared<[u32]>,
    arena: &mut [u32],
    at: u32,
    scales_at: u32,
    #[comptime] s: RowShape,
) {
    #[unroll]
    for step in 0..comptime!((s.width / 8).div_ceil(UNITS)) {
        let k = UNIT_POS as usize + comptime!(step * UNITS);
        if k < comptime!(s.width / 8) {
            let e = exponents[k / 4];
            let inv = f32::reinterpret((254 - e) << 23);
            let mut word = 0u32;
            #[unroll]
            for i in 0..8usize {
                word |= fp4_code(row[8 * k + i] * inv) << comptime!(4 * i as u32);
            }
            arena[at as usize + k] = word;
        }
    }
    let k = UNIT_POS as usize;
    if k < comptime!(s.scale_words) {
        let mut word = 0u32;
        #[unroll]
        for i in 0..4usize {
            let block = 4 * k + i;
            if 32 * block < comptime!(s.width) {
                word |= exponents[block] << comptime!(8 * i as u32);
            }
        }
        arena[scales_at as usize + k] = word;
    }
}

/// What goes into the window.
#[derive(CubeType, CubeLaunch)]
pub struct WindowRows {
    /// `[n, stride]`.
    pub kv: Box<[f32]>,
    /// `[width]`.
    pub norm: Box<[f32]>,
    /// First angle of the rows' positions.
    pub first_angle: u32,
    /// How they are stored.
    #[cube(comptime)]
    pub row: RowShape,
    /// Slots of the ring.
    #[cube(comptime)]
    pub ring: u32,
    /// Values from row to row.
    #[cube(comptime)]
    pub stride: usize,
}

/// A.5: norm, rotation and rounding of a row, into its session's window ring. The whole cube takes part.
#[cube]
fn push_row(w: &WindowRows, r: usize, angles: &[f32], plan: &[u32], arena: &mut [u32], layer: u32) {
    let s = comptime!(w.row);
    let (position, base) = (plan[4 * r + 1], plan[4 * r + 2]);
    let mut row = Shared::<[f32]>::new_slice(comptime!(s.width));
    let mut k = UNIT_POS as usize;
    while k < comptime!(s.width) {
        row[k] = w.kv[r * comptime!(w.stride) + k];
        k += CUBE_DIM as usize;
    }
    sync_cube();
    let slot = position % comptime!(w.ring);
    let at = part_of(&*arena, base, layer, comptime!(WINDOW)) + slot * comptime!(s.words as u32);
    let scales =
        part_of(&*arena, base, layer, comptime!(WINDOW_SCALES)) + slot * comptime!(s.scale_words as u32);
    let angle = w.first_angle as usize + r * comptime!(s.rotary);
    finish_row(&mut row, &w.norm, angles, angle, arena, at, scales, s);
}

/// The rows of a pass, into the windows of their sessions: a cube a row.
#[cube(launch_unchecked)]
pub fn push_window(rows: &WindowRows, angles: &[f32], plan: &[u32], arena: &mut [u32], layer: u32) {
    push_row(rows, CUBE_POS_X as usize, angles, plan, arena, layer);
}

/// What compression is specialised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pool {
    /// Tokens of a window.
    pub ratio: u32,
    /// Whether windows overlap: the four tokens before take part with their first half of channels.
    pub overlap: bool,
    /// Slots of the open ring.
    pub slots: u32,
    /// Channels of the projections.
    pub channels: usize,
    /// Values from row to row of the projections.
    pub stride: usize,
}

/// A compressor's projections and weights.
#[derive(CubeType, CubeLaunch)]
pub struct Compressing {
    /// Values `[n, stride]`.
    pub kv: Box<[f32]>,
    /// Gates `[n, stride]`.
    pub gate: Box<[f32]>,
    /// Gate offset by place in the window.
    pub ape: Box<[f32]>,
    /// `[width]`.
    pub norm: Box<[f32]>,
    /// First angle of the windows' first positions.
    pub first_angle: u32,
    /// How rows are stored.
    #[cube(comptime)]
    pub row: RowShape,
    /// How windows are pooled.
    #[cube(comptime)]
    pub pool: Pool,
}

/// A.6: a row of the pass that completes a window pools it into a compressed row or index key. The whole cube takes
/// part.
#[cube]
fn compress_row(c: &Compressing, r: usize, angles: &[f32], plan: &[u32], arena: &mut [u32], layer: u32) {
    let (s, p) = (comptime!(c.row), comptime!(c.pool));
    let (position, base, start) = (plan[4 * r + 1], plan[4 * r + 2], plan[4 * r + 3]);
    let ratio = comptime!(p.ratio);
    if (position + 1) % ratio == 0 {
        let open = part_of(&*arena, base, layer, comptime!(if s.keys { OPEN_KEYS } else { OPEN_ROWS }));
        let window = position / ratio;
        let end = position + 1;
        let back = comptime!(if p.overlap { 2 * p.ratio } else { p.ratio });
        // The first window has none before it.
        let count = u32::min(back, end);
        let mut row = Shared::<[f32]>::new_slice(comptime!(s.width));
        #[unroll]
        for step in 0..comptime!(s.width.div_ceil(UNITS)) {
            let k = UNIT_POS as usize + comptime!(step * UNITS);
            if k < comptime!(s.width) {
                let mut max = f32::min_value();
                let mut sum = 0.0f32;
                let mut value = 0.0f32;
                #[unroll(back <= 8)]
                for i in 0..back {
                    // Where there are fewer, the first counts again, for nothing.
                    let beyond = i >= count;
                    let t = end - count + select(beyond, 0u32, i);
                    let own = comptime!(p.overlap) && t >= window * ratio;
                    let channel = select(own, k + comptime!(s.width), k);
                    let mut g = c.ape[(t % ratio) as usize * comptime!(p.channels) + channel];
                    // From before the pass, or of a row of the pass.
                    let kept = open as usize
                        + (t % comptime!(p.slots)) as usize * comptime!(2 * p.channels)
                        + channel;
                    let mut v = f32::reinterpret(arena[kept]);
                    if t >= start {
                        let at = (r - (position - t) as usize) * comptime!(p.stride) + channel;
                        g += c.gate[at];
                        v = c.kv[at];
                    } else {
                        g += f32::reinterpret(arena[kept + comptime!(p.channels)]);
                    }
                    g = select(beyond, -1e30f32, g);
                    let top = f32::max(max, g);
                    let (old, new) = (f32::exp(max - top), f32::exp(g - top));
                    sum = sum * old + new;
                    value = value * old + new * v;
                    max = top;
                }
                row[k] = value / sum;
            }
        }
        sync_cube();
        let rows = part_of(&*arena, base, layer, comptime!(if s.keys { KEYS } else { ROWS }));
        let scales = part_of(&*arena, base, layer, comptime!(if s.keys { KEY_SCALES } else { ROW_SCALES }));
        let at = rows + window * comptime!(s.words as u32);
        let scales_at = scales + window * comptime!(s.scale_words as u32);
        let angle = c.first_angle as usize + r * comptime!(s.rotary);
        finish_row(&mut row, &c.norm, angles, angle, arena, at, scales_at, s);
    }
}

/// The windows that the rows of a pass complete: a cube a row.
#[cube(launch_unchecked)]
pub fn compress(c: &Compressing, angles: &[f32], plan: &[u32], arena: &mut [u32], layer: u32) {
    compress_row(c, CUBE_POS_X as usize, angles, plan, arena, layer);
}

/// [`project`](super::project::project), and beside it everything that a decode step puts into the cache: the first
/// cubes have the rows for the windows and what compressors make of them, and also keep the projections: a session has
/// one row here, so the slot it takes is not read by another. One launch instead of up to six.
#[cube(launch_unchecked)]
pub fn project_absorb(
    x: &Input,
    raw: &Sequence<Raw>,
    mut jobs: Sequence<Job>,
    words: &[Vector<u32, Const<2>>],
    window: &WindowRows,
    compressors: &Sequence<Compressing>,
    angles: &[f32],
    plan: &[u32],
    arena: &mut [u32],
    layer: u32,
    n: u32,
    #[comptime] columns: usize,
    #[comptime] tables: bool,
) {
    let roles = n * comptime!(1 + compressors.len() as u32);
    if CUBE_POS_X >= roles {
        project_jobs(x, raw, &mut jobs, words, n, columns, tables);
    } else if CUBE_POS_Y == 0 {
        let (role, r) = (CUBE_POS_X / n, (CUBE_POS_X % n) as usize);
        if role == 0 {
            push_row(window, r, angles, plan, arena, layer);
        }
        #[unroll]
        for i in 0..comptime!(compressors.len()) {
            if role == comptime!(1 + i as u32) {
                let c = compressors.index(i);
                compress_row(c, r, angles, plan, arena, layer);
                let mut k = UNIT_POS as usize;
                while k < comptime!(c.pool.channels) {
                    keep_value(
                        &c.kv,
                        &c.gate,
                        r,
                        k,
                        plan,
                        arena,
                        layer,
                        comptime!(c.row.keys),
                        comptime!(c.pool),
                    );
                    k += CUBE_DIM as usize;
                }
            }
        }
    }
}

/// Keeps channel `k` of the projections of a row.
#[cube]
fn keep_value(
    kv: &[f32],
    gate: &[f32],
    r: usize,
    k: usize,
    plan: &[u32],
    arena: &mut [u32],
    layer: u32,
    #[comptime] keys: bool,
    #[comptime] p: Pool,
) {
    let (position, base) = (plan[4 * r + 1], plan[4 * r + 2]);
    let open = part_of(&*arena, base, layer, comptime!(if keys { OPEN_KEYS } else { OPEN_ROWS })) as usize;
    let at = open + (position % comptime!(p.slots)) as usize * comptime!(2 * p.channels) + k;
    arena[at] = u32::reinterpret(kv[r * comptime!(p.stride) + k]);
    arena[at + comptime!(p.channels)] = u32::reinterpret(gate[r * comptime!(p.stride) + k]);
}

/// Keeps the projections that later windows need: those of the last `slots` positions of each run.
#[cube(launch_unchecked)]
pub fn keep_open(
    kv: &[f32],
    gate: &[f32],
    plan: &[u32],
    arena: &mut [u32],
    layer: u32,
    n: u32,
    #[comptime] keys: bool,
    #[comptime] p: Pool,
) {
    let r = CUBE_POS_Y as usize;
    let c = (CUBE_POS_X * CUBE_DIM + UNIT_POS) as usize;
    let base = plan[4 * r + 2];
    // A later row of the same run that takes the slot is the one that keeps it.
    let other = r + comptime!(p.slots as usize);
    let mut last = true;
    if other < n as usize {
        last = plan[4 * other + 2] != base || plan[4 * other + 3] != plan[4 * r + 3];
    }
    if last && c < comptime!(p.channels) {
        keep_value(kv, gate, r, c, plan, arena, layer, keys, p);
    }
}
