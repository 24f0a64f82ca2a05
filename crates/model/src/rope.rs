//! Rotary embedding (A.4).

/// Constants of the rotary embedding, from metadata.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base of layers that only have a window.
    pub base: f32,
    /// Base of layers that compress, with YaRN.
    pub compress_base: f32,
    /// YaRN factor.
    pub factor: f32,
    /// Context before YaRN, tokens.
    pub original_context: usize,
    /// YaRN: rotations above which a frequency is kept.
    pub beta_fast: f32,
    /// YaRN: rotations below which a frequency is divided by the factor.
    pub beta_slow: f32,
}

/// Inverse frequencies of both kinds of layer, `rotary / 2` each.
#[derive(Clone, Debug)]
pub struct RopeTables {
    /// Window layers: no YaRN.
    pub plain: Vec<f32>,
    /// Compressing layers: YaRN blend, at every context length.
    pub yarn: Vec<f32>,
}

impl RopeTables {
    /// Both tables for `rotary` channels.
    pub fn new(rope: &Rope, rotary: usize) -> Self {
        let plain = inverse_frequencies(rope.base, rotary);
        let mut yarn = inverse_frequencies(rope.compress_base, rotary);
        let n = rotary as f64;
        // The pair whose wavelength makes `rotations` turns over the original context.
        let pair = |rotations: f32| {
            n * (rope.original_context as f64 / (f64::from(rotations) * std::f64::consts::TAU)).ln()
                / (2.0 * f64::from(rope.compress_base).ln())
        };
        let lo = pair(rope.beta_fast).floor().max(0.0) as f32;
        let hi = pair(rope.beta_slow).ceil().min(n - 1.0) as f32;
        for (i, inv) in yarn.iter_mut().enumerate() {
            let ramp = ((i as f32 - lo) / (hi - lo).max(0.001)).clamp(0.0, 1.0);
            let keep = 1.0 - ramp;
            *inv = *inv / rope.factor * (1.0 - keep) + *inv * keep;
        }
        RopeTables { plain, yarn }
    }

    /// The table for a layer that compresses, or not.
    pub fn of(&self, compresses: bool) -> &[f32] {
        if compresses { &self.yarn } else { &self.plain }
    }
}

/// `1 / f32(base^(2i/R))`: the power in f64, rounded, its reciprocal in f32, as the model was trained with.
fn inverse_frequencies(base: f32, rotary: usize) -> Vec<f32> {
    (0..rotary / 2).map(|i| 1.0 / (f64::from(base).powf(2.0 * i as f64 / rotary as f64) as f32)).collect()
}

/// Cosine and sine of the angle of a pair at a position.
///
/// The angle is the f32 product the model was trained with; its cosine and sine are evaluated in f64, so that
/// large positions lose nothing more.
pub(crate) fn cos_sin(position: usize, inv: f32) -> (f32, f32) {
    let (sin, cos) = f64::from(position as f32 * inv).sin_cos();
    (cos as f32, sin as f32)
}

impl RopeTables {
    /// Fills `cos_sin` with (cos, sin) of every pair at `position`.
    pub fn fill(table: &[f32], position: usize, out: &mut [(f32, f32)]) {
        for (o, &inv) in out.iter_mut().zip(table) {
            *o = cos_sin(position, inv);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flash_yarn_blends_pairs_15_to_25() {
        let rope = Rope {
            base: 1e4,
            compress_base: 16e4,
            factor: 16.0,
            original_context: 65536,
            beta_fast: 32.0,
            beta_slow: 1.0,
        };
        let tables = RopeTables::new(&rope, 64);
        let plain = inverse_frequencies(16e4, 64);
        for (i, (plain, yarn)) in plain.iter().zip(&tables.yarn).enumerate() {
            let ratio = plain / yarn;
            match i {
                0..=15 => assert_eq!(ratio, 1.0),
                25.. => assert!((ratio - 16.0).abs() < 1e-4),
                _ => assert!(ratio > 1.0 && ratio < 16.0),
            }
        }
        assert_eq!(tables.plain[0], 1.0);
    }
}
