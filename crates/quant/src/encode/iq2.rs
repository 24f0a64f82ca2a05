//! IQ2_XXS: vectors of eight from a grid of 256, with signs of which the number of minuses is even.

use super::to_f16;
use crate::blocks::{BlockIq2Xxs, f16_to_f32};
use crate::iq2::IQ2XXS_GRID;

/// Codes that are looked at side by side.
const LANES: usize = 16;

/// What a vector and a code have in common: for a unit `u` the error is that of zeros plus `u² squares - 2 u products`.
struct Vector {
    products: [f32; 256],
    squares: [f32; 256],
    /// Magnitudes times weights.
    xw: [f32; 8],
    /// Signs of the values; if their number is odd, one of them has to be wrong.
    signs: u8,
}

/// Grid levels, element by element: `LEVELS[k][c]` is element `k` of code `c`.
static LEVELS: [[f32; 256]; 8] = {
    let mut levels = [[0.0; 256]; 8];
    let mut c = 0;
    while c < 256 {
        let mut k = 0;
        while k < 8 {
            levels[k][c] = IQ2XXS_GRID[c][k] as f32;
            k += 1;
        }
        c += 1;
    }
    levels
};

impl Vector {
    const EMPTY: Self = Vector { products: [0.0; 256], squares: [0.0; 256], xw: [0.0; 8], signs: 0 };

    /// Of eight values and their weights.
    #[inline(always)]
    fn fill(&mut self, x: &[f32], w: &[f32]) {
        for k in 0..8 {
            self.xw[k] = x[k].abs() * w[k];
            self.signs |= u8::from(x[k] < 0.0) << k;
        }
        // Where a sign has to be wrong, it is the one that costs least.
        let turned = if self.signs.count_ones() % 2 == 1 { 2.0 } else { 0.0 };
        for first in (0..256).step_by(LANES) {
            let (mut products, mut squares) = ([0.0; LANES], [0.0; LANES]);
            let mut cheapest = [f32::MAX; LANES];
            for k in 0..8 {
                let levels = &LEVELS[k][first..first + LANES];
                for i in 0..LANES {
                    let cost = self.xw[k] * levels[i];
                    products[i] += cost;
                    squares[i] += w[k] * levels[i] * levels[i];
                    cheapest[i] = if cost < cheapest[i] { cost } else { cheapest[i] };
                }
            }
            for i in 0..LANES {
                self.products[first + i] = products[i] - turned * cheapest[i];
                self.squares[first + i] = squares[i];
            }
        }
    }

    /// The least error for a unit beyond that of zeros.
    #[inline(always)]
    fn least(&self, unit: f32) -> f32 {
        let (square, twice) = (unit * unit, 2.0 * unit);
        // Lanes without an order between them, so that they are computed side by side.
        let mut least = [f32::INFINITY; LANES];
        let (products, _) = self.products.as_chunks::<LANES>();
        let (squares, _) = self.squares.as_chunks::<LANES>();
        for (products, squares) in products.iter().zip(squares) {
            for i in 0..LANES {
                let error = square * squares[i] - twice * products[i];
                least[i] = if error < least[i] { error } else { least[i] };
            }
        }
        least.into_iter().fold(f32::INFINITY, f32::min)
    }

    /// The best code for a unit: the first with the least error.
    #[inline(always)]
    fn best(&self, unit: f32) -> usize {
        let (square, twice) = (unit * unit, 2.0 * unit);
        let (mut least, mut codes) = ([f32::INFINITY; LANES], [0u32; LANES]);
        let (products, _) = self.products.as_chunks::<LANES>();
        let (squares, _) = self.squares.as_chunks::<LANES>();
        for (at, (products, squares)) in products.iter().zip(squares).enumerate() {
            for i in 0..LANES {
                let error = square * squares[i] - twice * products[i];
                let better = error < least[i];
                least[i] = if better { error } else { least[i] };
                codes[i] = if better { (LANES * at + i) as u32 } else { codes[i] };
            }
        }
        let first = (0..LANES)
            .fold(0, |best, i| if (least[i], codes[i]) < (least[best], codes[best]) { i } else { best });
        codes[first] as usize
    }

    /// The seven signs that are stored for a code: the eighth makes their number even.
    #[inline(always)]
    fn signs(&self, code: usize) -> u32 {
        let mut signs = self.signs;
        if signs.count_ones() % 2 == 1 {
            let cost = |k: &usize| self.xw[*k] * LEVELS[*k][code];
            let turned = (0..8).min_by(|a, b| cost(a).total_cmp(&cost(b))).unwrap_or(0);
            signs ^= 1 << turned;
        }
        u32::from(signs & 127)
    }
}

/// The four vectors of a group that shares a unit.
struct Group([Vector; 4]);

impl Group {
    #[inline(always)]
    fn fill(&mut self, x: &[f32], w: &[f32]) {
        for (v, vector) in self.0.iter_mut().enumerate() {
            vector.fill(&x[8 * v..8 * v + 8], &w[8 * v..8 * v + 8]);
        }
    }

    #[inline(always)]
    fn error(&self, unit: f32) -> f32 {
        let mut error = 0.0;
        for vector in &self.0 {
            error += vector.least(unit);
        }
        error
    }

    /// Products and squares of the best codes for a unit.
    #[inline(always)]
    fn sums(&self, unit: f32) -> (f32, f32) {
        let (mut products, mut squares) = (0.0, 0.0);
        for vector in &self.0 {
            let code = vector.best(unit);
            products += vector.products[code];
            squares += vector.squares[code];
        }
        (products, squares)
    }

    /// The unit that suits the group best, if it may be any.
    #[inline(always)]
    fn unit(&self, largest: f32) -> f32 {
        // With the largest level on the largest value, and with less of it.
        const STEPS: usize = 9;
        let (mut best, mut least) = (0.0, 0.0);
        for step in 0..STEPS {
            let unit = largest / 43.0 * (1.1 - 0.08 * step as f32);
            let error = self.error(unit);
            if error < least {
                (best, least) = (unit, error);
            }
        }
        // The codes of the best of them suit a unit close to it even better.
        match self.sums(best) {
            (products, squares) if products > 0.0 && squares > 0.0 => products / squares,
            _ => best,
        }
    }
}

/// Rounds of fitting the block's scale and the groups' to each other.
const ROUNDS: usize = 2;

#[inline(always)]
pub(super) fn iq2_xxs(x: &[f32; 256], w: &[f32; 256]) -> BlockIq2Xxs {
    // Loops, not closures: those would not be built for the wide registers.
    let mut groups = [const { Group([const { Vector::EMPTY }; 4]) }; 8];
    for (g, group) in groups.iter_mut().enumerate() {
        group.fill(&x[32 * g..32 * g + 32], &w[32 * g..32 * g + 32]);
    }
    let mut units = [0f32; 8];
    for (g, unit) in units.iter_mut().enumerate() {
        let largest = x[32 * g..32 * g + 32].iter().fold(0f32, |m, v| m.max(v.abs()));
        *unit = groups[g].unit(largest);
    }
    let largest = units.iter().copied().fold(0.0, f32::max);
    let mut best = (0.0, 0.0, [0u32; 8]);
    // A group's unit is an odd multiple of an eighth of d, up to 31. The largest need not be on top of the scale.
    for top in [31.0f32, 27.0] {
        let mut d = f16_to_f32(to_f16(8.0 * largest / top));
        for _ in 0..ROUNDS {
            if d <= 0.0 {
                break;
            }
            let mut scales = [0; 8];
            let (mut error, mut products, mut squares) = (0.0, 0.0, 0.0);
            for ((group, &unit), scale) in groups.iter().zip(&units).zip(&mut scales) {
                let (s, least) = nearest_scale(group, unit, d);
                *scale = s;
                error += least;
                let odd = (2 * s + 1) as f32 / 8.0;
                let (p, q) = group.sums(d * odd);
                products += p * odd;
                squares += q * odd * odd;
            }
            if error < best.0 {
                best = (error, d, scales);
            }
            if squares <= 0.0 {
                break;
            }
            let next = f16_to_f32(to_f16(products / squares));
            if next == d {
                break;
            }
            d = next;
        }
    }
    write(&groups, best.1, &best.2)
}

/// The scale near a unit with the least error.
#[inline(always)]
fn nearest_scale(group: &Group, unit: f32, d: f32) -> (u32, f32) {
    let exact = ((8.0 * unit / d - 1.0) / 2.0).round().clamp(0.0, 15.0) as u32;
    let near = [exact, exact.saturating_sub(1), (exact + 1).min(15)];
    let (mut best, mut least) = (0, f32::INFINITY);
    for s in near {
        let error = group.error(d * (2 * s + 1) as f32 / 8.0);
        if error < least {
            (best, least) = (s, error);
        }
    }
    (best, least)
}

#[inline(always)]
fn write(groups: &[Group; 8], d: f32, scales: &[u32; 8]) -> BlockIq2Xxs {
    let mut block = BlockIq2Xxs { d: to_f16(d), groups: [[0; 8]; 8] };
    if d <= 0.0 {
        return block;
    }
    for ((group, &scale), bytes) in groups.iter().zip(scales).zip(&mut block.groups) {
        let unit = d * (2 * scale + 1) as f32 / 8.0;
        let (mut codes, mut aux) = (0, scale << 28);
        for (v, vector) in group.0.iter().enumerate() {
            let code = vector.best(unit);
            codes |= (code as u32) << (8 * v);
            aux |= vector.signs(code) << (7 * v);
        }
        bytes[..4].copy_from_slice(&codes.to_le_bytes());
        bytes[4..].copy_from_slice(&aux.to_le_bytes());
    }
    block
}
