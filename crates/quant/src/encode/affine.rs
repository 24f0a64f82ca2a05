//! Q2_K and Q4_K: groups of values on an even grid, `d s q - m n`, where the block has `d` and `m` and each group the small
//! integers `s` and `n`.
//!
//! All groups of a block are fitted side by side, in lanes of 16 values each. Q2_K has 16 groups of 16. Of Q4_K's groups of 32,
//! lane `g` has the first half of group `g` and lane `g + 8` the second: sums over a group are made of both.

use super::to_f16;
use crate::blocks::{BlockQ2K, BlockQ4K, f16_to_f32};

/// Values side by side.
const LANES: usize = 16;

/// From one lane of a pair to the other.
const HALF: usize = LANES / 2;

/// A number for each lane.
type Lanes = [f32; LANES];

/// What the integers of a format can be.
#[derive(Clone, Copy)]
struct Form {
    /// Largest quant.
    levels: f32,
    /// Largest scale and minimum of a group.
    scales: f32,
    /// Whether two lanes make a group.
    paired: bool,
}

const Q2K: Form = Form { levels: 3.0, scales: 15.0, paired: false };
const Q4K: Form = Form { levels: 15.0, scales: 63.0, paired: true };

/// Rounds of fitting the scales of the block to the quants and the quants to the scales.
const ROUNDS: usize = 3;

/// Grids that are tried for each group.
const SPANS: usize = 10;

/// The values of each lane, and what the square of an error in each costs.
struct Values {
    x: [Lanes; LANES],
    w: [Lanes; LANES],
    form: Form,
}

/// A block on its way.
#[derive(Clone)]
struct Fit {
    /// Scales of the scales and of the minima, as the file has them.
    d: f32,
    m: f32,
    s: Lanes,
    n: Lanes,
}

#[inline(always)]
pub(super) fn q2k(x: &[f32; 256], w: &[f32; 256]) -> BlockQ2K {
    let (fit, q) = fit(x, w, Q2K);
    let mut block = BlockQ2K { scales: [0; 16], q: [0; 64], d: to_f16(fit.d), dmin: to_f16(fit.m) };
    for (g, scale) in block.scales.iter_mut().enumerate() {
        *scale = fit.s[g] as u8 | ((fit.n[g] as u8) << 4);
    }
    for (i, q) in q.iter().enumerate() {
        block.q[32 * (i / 128) + i % 32] |= q << (2 * (i % 128 / 32));
    }
    block
}

#[inline(always)]
pub(super) fn q4k(x: &[f32; 256], w: &[f32; 256]) -> BlockQ4K {
    let (fit, q) = fit(x, w, Q4K);
    let mut block = BlockQ4K { d: to_f16(fit.d), dmin: to_f16(fit.m), scales: [0; 12], q: [0; 128] };
    let (s, n) = (fit.s.map(|s| s as u8), fit.n.map(|n| n as u8));
    for g in 0..4 {
        block.scales[g] = s[g] | ((s[g + 4] >> 4) << 6);
        block.scales[g + 4] = n[g] | ((n[g + 4] >> 4) << 6);
        block.scales[g + 8] = (s[g + 4] & 15) | ((n[g + 4] & 15) << 4);
    }
    for (i, q) in q.iter().enumerate() {
        block.q[32 * (i / 64) + i % 32] |= q << (4 * (i / 32 % 2));
    }
    block
}

/// Fits each group by itself, then the block's scales to what the groups want, then all to each other; returns the quants too.
#[inline(always)]
fn fit(x: &[f32; 256], w: &[f32; 256], form: Form) -> (Fit, [u8; 256]) {
    let values = Values::new(x, w, form);
    let wanted = values.wanted();
    let most = |lanes: &Lanes| lanes.iter().copied().fold(0.0, f32::max) / form.scales;
    let (d, m) = (most(&wanted.0), most(&wanted.1));
    let mut best: Option<(f32, Fit)> = None;
    // Where one group is far from the others, a smaller step serves the others better.
    for (a, b) in [(1.0, 1.0), (0.9, 0.95)] {
        let mut fit = Fit { d: f16(d * a), m: f16(m * b), s: [0.0; LANES], n: [0.0; LANES] };
        for round in 0..=ROUNDS {
            let error = fit.choose(&values, &wanted);
            if best.as_ref().is_none_or(|(least, _)| error < *least) {
                best = Some((error, fit.clone()));
            }
            if round == ROUNDS || !fit.refit(&values) {
                break;
            }
        }
    }
    let fit = best.map_or(Fit { d: 0.0, m: 0.0, s: [0.0; LANES], n: [0.0; LANES] }, |(_, fit)| fit);
    let (a, b) = fit.grids();
    let inverse = a.map(inverse);
    let lane = |i: usize| if form.paired { i / 32 } else { i / 16 };
    let q = std::array::from_fn(|i| on_grid(x[i], inverse[lane(i)], b[lane(i)], form.levels) as u8);
    (fit, q)
}

impl Values {
    #[inline(always)]
    fn new(x: &[f32; 256], w: &[f32; 256], form: Form) -> Self {
        let at = |lane: usize| if form.paired { 32 * (lane % 8) + 16 * (lane / 8) } else { 16 * lane };
        let lanes = |v: &[f32; 256]| std::array::from_fn(|k| std::array::from_fn(|lane| v[at(lane) + k]));
        Values { x: lanes(x), w: lanes(w), form }
    }

    /// The scale and minimum that suit each group best, if they may be any.
    #[inline(always)]
    fn wanted(&self) -> (Lanes, Lanes) {
        let (mut min, mut max) = ([0.0; LANES], [f32::MIN; LANES]);
        for x in &self.x {
            for g in 0..LANES {
                min[g] = lesser(x[g], min[g]);
                max[g] = greater(x[g], max[g]);
            }
        }
        if self.form.paired {
            min = std::array::from_fn(|g| lesser(min[g], min[(g + HALF) % LANES]));
            max = std::array::from_fn(|g| greater(max[g], max[(g + HALF) % LANES]));
        }
        let top = self.form.levels;
        let (mut a, mut b) = ([0.0; LANES], [0.0; LANES]);
        for g in 0..LANES {
            // Groups of equal values need no step.
            a[g] = greater(max[g] - min[g], 0.0) / top;
            b[g] = -min[g];
        }
        let (widest, lowest) = (a, b);
        let mut least = self.errors(&a, &b);
        // Outliers may be cut off: grids that span less than all values, and each fitted to the values on it.
        for step in 0..SPANS {
            let span = 1.08 - 0.58 * step as f32 / SPANS as f32;
            let (c, d) = self.lines(&widest.map(|a| a * span), &lowest.map(|b| b * span));
            let errors = self.errors(&c, &d);
            for g in 0..LANES {
                let better = errors[g] < least[g];
                least[g] = if better { errors[g] } else { least[g] };
                a[g] = if better { c[g] } else { a[g] };
                b[g] = if better { d[g] } else { b[g] };
            }
        }
        (a, b)
    }

    /// The lines through the values over the quants that lines give them: weighted least squares, their minimum not negative.
    #[inline(always)]
    fn lines(&self, a: &Lanes, b: &Lanes) -> (Lanes, Lanes) {
        let Sums { w, wq, wqq, wx, wxq } = self.sums(a, b);
        let (mut slope, mut min) = (*a, *b);
        for g in 0..LANES {
            let det = w[g] * wqq[g] - wq[g] * wq[g];
            let (mut s, mut m) =
                ((w[g] * wxq[g] - wx[g] * wq[g]) / det, (wq[g] * wxq[g] - wqq[g] * wx[g]) / det);
            let alone = if wqq[g] > 0.0 { wxq[g] / wqq[g] } else { a[g] };
            s = if m < 0.0 { alone } else { s };
            m = greater(m, 0.0);
            let good = det > 1e-6 * w[g] * wqq[g] && s > 0.0;
            slope[g] = if good { s } else { a[g] };
            min[g] = if good { m } else { b[g] };
        }
        (slope, min)
    }

    /// Sums over the values and the quants that lines give them.
    #[inline(always)]
    fn sums(&self, a: &Lanes, b: &Lanes) -> Sums {
        let (inverse, top) = (a.map(inverse), self.form.levels);
        let zero = [0.0; LANES];
        let mut sums = Sums { w: zero, wq: zero, wqq: zero, wx: zero, wxq: zero };
        for (x, w) in self.x.iter().zip(&self.w) {
            for g in 0..LANES {
                let q = on_grid(x[g], inverse[g], b[g], top);
                let (wq, wx) = (w[g] * q, w[g] * x[g]);
                sums.w[g] += w[g];
                sums.wq[g] += wq;
                sums.wqq[g] += wq * q;
                sums.wx[g] += wx;
                sums.wxq[g] += wx * q;
            }
        }
        let Sums { w, wq, wqq, wx, wxq } = sums;
        let [w, wq, wqq, wx, wxq] = [w, wq, wqq, wx, wxq].map(|lanes| self.of_groups(lanes));
        Sums { w, wq, wqq, wx, wxq }
    }

    /// Sums over lanes to sums over groups.
    #[inline(always)]
    fn of_groups(&self, lanes: Lanes) -> Lanes {
        let group = |lane: usize| lanes[lane] + lanes[(lane + HALF) % LANES];
        if self.form.paired { std::array::from_fn(group) } else { lanes }
    }

    /// The weighted squares of the errors that lines leave.
    #[inline(always)]
    fn errors(&self, a: &Lanes, b: &Lanes) -> Lanes {
        let (inverse, top) = (a.map(inverse), self.form.levels);
        let mut errors = [0.0; LANES];
        for (x, w) in self.x.iter().zip(&self.w) {
            for g in 0..LANES {
                let e = x[g] - (a[g] * on_grid(x[g], inverse[g], b[g], top) - b[g]);
                errors[g] += w[g] * e * e;
            }
        }
        self.of_groups(errors)
    }
}

/// Sums over a group: of weights, and of weights times quants, quants squared, values, both.
struct Sums {
    w: Lanes,
    wq: Lanes,
    wqq: Lanes,
    wx: Lanes,
    wxq: Lanes,
}

impl Fit {
    /// Step and minimum of each group.
    #[inline(always)]
    fn grids(&self) -> (Lanes, Lanes) {
        (self.s.map(|s| self.d * s), self.n.map(|n| self.m * n))
    }

    /// Chooses each group's scale and minimum near what it wants; returns the error of all (in pairs, twice).
    #[inline(always)]
    fn choose(&mut self, values: &Values, wanted: &(Lanes, Lanes)) -> f32 {
        let form = values.form;
        let nearest = |wanted: &Lanes, unit: f32| {
            let inverse = inverse(unit);
            wanted.map(|v| rounded(lesser(v * inverse, form.scales)))
        };
        let (s, n) = (nearest(&wanted.0, self.d), nearest(&wanted.1, self.m));
        let near = |v: &Lanes, off: f32| v.map(|v| lesser(greater(v + off, 0.0), form.scales));
        let mut least = [f32::INFINITY; LANES];
        for ds in [0.0, -1.0, 1.0] {
            for dn in [0.0, -1.0, 1.0] {
                let other = Fit { d: self.d, m: self.m, s: near(&s, ds), n: near(&n, dn) };
                let (a, b) = other.grids();
                let errors = values.errors(&a, &b);
                for g in 0..LANES {
                    let better = errors[g] < least[g];
                    least[g] = if better { errors[g] } else { least[g] };
                    self.s[g] = if better { other.s[g] } else { self.s[g] };
                    self.n[g] = if better { other.n[g] } else { self.n[g] };
                }
            }
        }
        least.iter().sum()
    }

    /// The block's scales that suit the quants best; false if they are the same as before.
    #[inline(always)]
    fn refit(&mut self, values: &Values) -> bool {
        let (a, b) = self.grids();
        let sums = values.sums(&a, &b);
        // x ~ d s q - m n. That pairs count twice changes no quotient.
        let (mut ss, mut sn, mut nn, mut xs, mut xn) = (0f64, 0f64, 0f64, 0f64, 0f64);
        for g in 0..LANES {
            let (s, n) = (f64::from(self.s[g]), f64::from(self.n[g]));
            ss += s * s * f64::from(sums.wqq[g]);
            sn += s * n * f64::from(sums.wq[g]);
            nn += n * n * f64::from(sums.w[g]);
            xs += s * f64::from(sums.wxq[g]);
            xn += n * f64::from(sums.wx[g]);
        }
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

/// Added and taken away again, it rounds what is small beside it, ties to even, by nothing but sums: the processor does
/// several at once.
const ROUNDING: f32 = 12_582_912.0;

#[inline(always)]
fn rounded(v: f32) -> f32 {
    (v + ROUNDING) - ROUNDING
}

/// Like [`f32::max`] and [`f32::min`], but for what they do to values that are no numbers: one instruction each.
#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[inline(always)]
fn lesser(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

/// The quant of a value on the grid `a q - b`, where `inverse` is that of `a`, or 0.
#[inline(always)]
fn on_grid(x: f32, inverse: f32, b: f32, top: f32) -> f32 {
    rounded(lesser(greater((x + b) * inverse, 0.0), top))
}

#[inline(always)]
fn inverse(a: f32) -> f32 {
    if a > 0.0 { lesser(1.0 / a, f32::MAX) } else { 0.0 }
}

fn f16(value: f32) -> f32 {
    f16_to_f32(to_f16(value))
}
