//! Softmax over tiles of scores: plain Rust without branches, which the compiler makes vectors of for the registers of the level whose
//! kernel it becomes part of. All levels give the same bits.

use super::{TILE, Tile};

/// Scores that are handled side by side; sums have as many lanes.
const LANES: usize = 8;

/// `e^x` for `x <= 0`, to two units in the last place; 0 below -87.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding it leaves the nearest integer in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2, of which the first part has few bits: its products with small integers are exact.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2[0]) - n * LN2[1];
    let mut sum = 1.0 / 5040.0;
    for term in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = sum * r + term;
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 { 0.0 } else { sum * power }
}

/// [`super::Softmax`].
#[inline(always)]
pub(super) fn softmax(
    scores: &mut [f32],
    tile: &Tile<'_>,
    scale: f32,
    (max, sum): (&mut [f32], &mut [f32]),
    out: &mut [f32],
) {
    let heads = scores.as_chunks_mut::<TILE>().0.iter_mut().zip(out.chunks_exact_mut(tile.width));
    for ((scores, out), (max, sum)) in heads.zip(max.iter_mut().zip(sum)) {
        // What is behind the last row has no weight.
        scores[tile.n..].fill(f32::NEG_INFINITY);
        let mut lanes = [*max; LANES];
        for scores in scores.as_chunks_mut::<LANES>().0 {
            for i in 0..LANES {
                scores[i] *= scale;
                lanes[i] = if scores[i] > lanes[i] { scores[i] } else { lanes[i] };
            }
        }
        let largest = lanes.into_iter().fold(*max, f32::max);
        if largest > *max {
            let shrink = exp(*max - largest);
            *sum *= shrink;
            out.iter_mut().for_each(|o| *o *= shrink);
            *max = largest;
        }
        let mut lanes = [0.0; LANES];
        for scores in scores.as_chunks_mut::<LANES>().0 {
            for i in 0..LANES {
                scores[i] = exp(scores[i] - largest);
                lanes[i] += scores[i];
            }
        }
        *sum += lanes.into_iter().sum::<f32>();
    }
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn exp_is_that_of_the_library() {
        for i in 0..=870_000 {
            let x = -1e-4 * i as f32;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got / want - 1.0).abs() <= 2.4e-7, "e^{x}: {got} for {want}");
        }
        assert_eq!([exp(0.0), exp(-1e3), exp(f32::NEG_INFINITY)], [1.0, 0.0, 0.0]);
        assert!(exp(f32::NAN).is_nan());
    }
}
