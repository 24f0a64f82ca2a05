//! Q2_K and Q4_K: groups of values on an even grid, `d s q - m n`, where the block has `d` and `m` and each group the small
//! integers `s` and `n`.

use super::to_f16;
use crate::blocks::{BlockQ2K, BlockQ4K, f16_to_f32};

/// How a format divides its block.
#[derive(Clone, Copy)]
struct Form {
    /// Values of a group.
    group: usize,
    /// Largest quant.
    levels: u8,
    /// Largest scale and minimum of a group.
    scales: u8,
}

const Q2K: Form = Form { group: 16, levels: 3, scales: 15 };
const Q4K: Form = Form { group: 32, levels: 15, scales: 63 };
const MOST_GROUPS: usize = 16;
/// Values that are computed side by side.
const LANES: usize = 8;
/// Rounds of fitting the scales of the block to the quants and the quants to the scales.
const ROUNDS: usize = 3;

/// A block on its way.
struct Fit {
    /// Scales of the scales and of the minima, as the file has them.
    d: f32,
    m: f32,
    s: [u8; MOST_GROUPS],
    n: [u8; MOST_GROUPS],
    q: [u8; 256],
}

pub(super) fn q2k(x: &[f32; 256], w: &[f32; 256]) -> BlockQ2K {
    let fit = fit(x, w, Q2K);
    let mut block = BlockQ2K { scales: [0; 16], q: [0; 64], d: to_f16(fit.d), dmin: to_f16(fit.m) };
    for (g, scale) in block.scales.iter_mut().enumerate() {
        *scale = fit.s[g] | (fit.n[g] << 4);
    }
    for (i, q) in fit.q.iter().enumerate() {
        block.q[32 * (i / 128) + i % 32] |= q << (2 * (i % 128 / 32));
    }
    block
}

pub(super) fn q4k(x: &[f32; 256], w: &[f32; 256]) -> BlockQ4K {
    let fit = fit(x, w, Q4K);
    let mut block = BlockQ4K { d: to_f16(fit.d), dmin: to_f16(fit.m), scales: [0; 12], q: [0; 128] };
    for g in 0..4 {
        let (s, n, s4, n4) = (fit.s[g], fit.n[g], fit.s[g + 4], fit.n[g + 4]);
        block.scales[g] = s | ((s4 >> 4) << 6);
        block.scales[g + 4] = n | ((n4 >> 4) << 6);
        block.scales[g + 8] = (s4 & 15) | ((n4 & 15) << 4);
    }
    for (i, q) in fit.q.iter().enumerate() {
        block.q[32 * (i / 64) + i % 32] |= q << (4 * (i / 32 % 2));
    }
    block
}

/// Fits each group by itself, then the block's scales to what the groups want, then all to each other.
fn fit(x: &[f32; 256], w: &[f32; 256], form: Form) -> Fit {
    let groups = 256 / form.group;
    let of = |g: usize| form.group * g..form.group * (g + 1);
    let mut wanted = [(0.0, 0.0); MOST_GROUPS];
    for (g, wanted) in wanted.iter_mut().enumerate().take(groups) {
        *wanted = group_fit(&x[of(g)], &w[of(g)], form.levels);
    }
    let most = |f: fn(&(f32, f32)) -> f32| wanted.iter().map(f).fold(0.0, f32::max) / f32::from(form.scales);
    let (d, m) = (most(|w| w.0), most(|w| w.1));
    let mut best: Option<(f32, Fit)> = None;
    // Where one group is far from the others, a smaller step serves the others better.
    for (a, b) in [(1.0, 1.0), (0.9, 0.95)] {
        let mut fit = Fit { d: f16(d * a), m: f16(m * b), s: [0; 16], n: [0; 16], q: [0; 256] };
        for round in 0..=ROUNDS {
            let mut error = 0.0;
            for (g, wanted) in wanted.iter().enumerate().take(groups) {
                error += fit.choose(g, &x[of(g)], &w[of(g)], *wanted, form, of(g).start);
            }
            if best.as_ref().is_none_or(|(least, _)| error < *least) {
                best = Some((error, Fit { ..fit }));
            }
            if round == ROUNDS || !fit.refit(x, w, form) {
                break;
            }
        }
    }
    best.map_or(Fit { d: 0.0, m: 0.0, s: [0; 16], n: [0; 16], q: [0; 256] }, |(_, fit)| fit)
}

impl Fit {
    /// Chooses a group's scale, minimum and quants near what it wants; returns the error.
    fn choose(&mut self, g: usize, x: &[f32], w: &[f32], wanted: (f32, f32), form: Form, at: usize) -> f32 {
        let near = |value: f32, unit: f32| {
            let exact = if unit > 0.0 { value / unit } else { 0.0 };
            let nearest = exact.round().clamp(0.0, f32::from(form.scales)) as u8;
            [nearest, nearest.saturating_sub(1), (nearest + 1).min(form.scales)]
        };
        let mut least = f32::INFINITY;
        for s in near(wanted.0, self.d) {
            for n in near(wanted.1, self.m) {
                let (a, b) = (self.d * f32::from(s), self.m * f32::from(n));
                let error = error(x, w, a, b, form.levels);
                if error < least {
                    least = error;
                    (self.s[g], self.n[g]) = (s, n);
                }
            }
        }
        let (a, b) = (self.d * f32::from(self.s[g]), self.m * f32::from(self.n[g]));
        for (q, &x) in self.q[at..at + x.len()].iter_mut().zip(x) {
            *q = quant(x, a, b, form.levels) as u8;
        }
        least
    }

    /// The block's scales that suit the quants best; false if they are the same as before.
    fn refit(&mut self, x: &[f32; 256], w: &[f32; 256], form: Form) -> bool {
        let (mut ss, mut sn, mut nn, mut xs, mut xn) = (0f64, 0f64, 0f64, 0f64, 0f64);
        for (i, ((&x, &w), &q)) in x.iter().zip(w).zip(&self.q).enumerate() {
            let g = i / form.group;
            let (s, n) = (f64::from(self.s[g]) * f64::from(q), f64::from(self.n[g]));
            let (x, w) = (f64::from(x), f64::from(w));
            ss += w * s * s;
            sn += w * s * n;
            nn += w * n * n;
            xs += w * x * s;
            xn += w * x * n;
        }
        // x ~ d s - m n
        let det = ss * nn - sn * sn;
        let (d, m) = if det > 1e-9 * ss * nn {
            ((xs * nn - xn * sn) / det, (xs * sn - xn * ss) / det)
        } else if ss > 0.0 {
            (xs / ss, f64::from(self.m))
        } else {
            return false;
        };
        if d <= 0.0 || m < 0.0 {
            return false;
        }
        let before = (self.d, self.m);
        (self.d, self.m) = (f16(d as f32), f16(m as f32));
        before != (self.d, self.m)
    }
}

/// The scale and minimum that suit a group best, if they may be any.
fn group_fit(x: &[f32], w: &[f32], levels: u8) -> (f32, f32) {
    let min = x.iter().copied().fold(0.0, f32::min);
    let max = x.iter().copied().fold(f32::MIN, f32::max);
    if max - min <= 0.0 {
        return (0.0, -min);
    }
    let top = f32::from(levels);
    let mut best = ((max - min) / top, -min);
    let mut least = error(x, w, best.0, best.1, levels);
    // Outliers may be cut off: grids that span less than all values, and each fitted to the values on it.
    const STEPS: usize = 10;
    for step in 0..STEPS {
        let span = 1.08 - 0.58 * step as f32 / STEPS as f32;
        let (a, b) = line(x, w, (max - min) / top * span, -min * span, levels);
        let error = error(x, w, a, b, levels);
        if error < least {
            least = error;
            best = (a, b);
        }
    }
    best
}

/// The line through the values over the quants that a line gives them: weighted least squares, its minimum not negative.
fn line(x: &[f32], w: &[f32], a: f32, b: f32, levels: u8) -> (f32, f32) {
    let (inverse, top) = (inverse(a), f32::from(levels));
    let mut sums = [[0f32; LANES]; 5];
    for (x, w) in x.as_chunks::<LANES>().0.iter().zip(w.as_chunks::<LANES>().0) {
        for i in 0..LANES {
            let (x, w) = (x[i], w[i]);
            let q = on_grid(x, inverse, b, top);
            sums[0][i] += w;
            sums[1][i] += w * q;
            sums[2][i] += w * q * q;
            sums[3][i] += w * x;
            sums[4][i] += w * x * q;
        }
    }
    let [sw, sq, sqq, sx, sxq] = sums.map(|lanes| lanes.iter().sum::<f32>());
    let det = sw * sqq - sq * sq;
    if det <= 1e-6 * sw * sqq {
        return (a, b);
    }
    let (mut slope, mut min) = ((sw * sxq - sx * sq) / det, (sq * sxq - sqq * sx) / det);
    if min < 0.0 {
        (slope, min) = (if sqq > 0.0 { sxq / sqq } else { a }, 0.0);
    }
    if slope > 0.0 { (slope, min) } else { (a, b) }
}

/// Added and taken away again, it rounds what is small beside it, ties to even, by nothing but sums: the processor does
/// several at once.
const ROUNDING: f32 = 12_582_912.0;

/// The quant of a value on the grid `a q - b`, where `inverse` is that of `a`, or 0.
fn on_grid(x: f32, inverse: f32, b: f32, top: f32) -> f32 {
    (((x + b) * inverse).max(0.0).min(top) + ROUNDING) - ROUNDING
}

fn quant(x: f32, a: f32, b: f32, levels: u8) -> f32 {
    on_grid(x, inverse(a), b, f32::from(levels))
}

fn inverse(a: f32) -> f32 {
    if a > 0.0 { (1.0 / a).min(f32::MAX) } else { 0.0 }
}

fn error(x: &[f32], w: &[f32], a: f32, b: f32, levels: u8) -> f32 {
    let (inverse, top) = (inverse(a), f32::from(levels));
    let mut sums = [0.0; LANES];
    // Groups are whole lanes.
    let (x, w) = (x.as_chunks::<LANES>().0, w.as_chunks::<LANES>().0);
    for (x, w) in x.iter().zip(w) {
        for i in 0..LANES {
            let e = x[i] - (a * on_grid(x[i], inverse, b, top) - b);
            sums[i] += w[i] * e * e;
        }
    }
    sums.iter().sum()
}

fn f16(value: f32) -> f32 {
    f16_to_f32(to_f16(value))
}
