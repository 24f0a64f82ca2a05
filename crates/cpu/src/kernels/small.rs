//! Small steps in plain Rust without branches, which the compiler makes vectors of: for the registers of a level, since they are compiled
//! as part of functions of it ([`small_kernels`]). All levels give the same bits.

use super::{TILE, Tile};
use ds4_model::cache::RowCodec;

/// Of each head the largest score so far, and the sum of weights.
pub type Heads<'a> = (&'a mut [f32], &'a mut [f32]);

/// Weights of a sublayer's output in the streams `[n]`, and of the streams in each other `[n, n]`, source first.
pub type Mix<'a> = (&'a [f32], &'a [f32]);

/// The small steps of a level.
#[derive(Clone, Copy, Debug)]
pub struct Small {
    /// What is between the halves of attention: turns scores `[heads, TILE]` of a tile, times a scale, to weights, relative to the largest
    /// score of each head so far; adds them up, and makes sums and `out [heads, width]` smaller where a larger score came.
    pub softmax: fn(scores: &mut [f32], tile: &Tile<'_>, scale: f32, state: Heads<'_>, out: &mut [f32]),
    /// Decodes a stored row.
    pub load_row: fn(codec: RowCodec, bytes: &[u8], row: &mut [f32]),
    /// `gate[i] = silu(min(gate[i], clamp)) * clip(up[i], -clamp, clamp)`.
    pub swiglu: fn(gate: &mut [f32], up: &[f32], clamp: f32),
    /// `out[k] = sum over i of weights[i] * streams[i][k]`.
    pub mix: fn(weights: &[f32], streams: &[f32], out: &mut [f32]),
    /// `streams[j][k] = post[j] * y[k] + sum over i of comb[i][j] * streams[i][k]`.
    pub join: fn(y: &[f32], mix: Mix<'_>, streams: &mut [f32]),
}

/// [`Small`] of a level: the functions here, compiled for its registers.
macro_rules! small_kernels {
    ($features:literal) => {
        small_kernels! {
            $features,
            softmax(
                scores: &mut [f32],
                tile: &Tile<'_>,
                scale: f32,
                state: Heads<'_>,
                out: &mut [f32]
            )
            load_row(codec: RowCodec, bytes: &[u8], row: &mut [f32])
            swiglu(gate: &mut [f32], up: &[f32], clamp: f32)
            mix(weights: &[f32], streams: &[f32], out: &mut [f32])
            join(y: &[f32], mix: Mix<'_>, streams: &mut [f32])
        }
    };
    ($features:literal, $($name:ident($($arg:ident: $ty:ty),*))*) => {
        pub(super) const SMALL: Small = {
            $(
                #[target_feature(enable = $features)]
                fn $name($($arg: $ty),*) {
                    small::$name($($arg),*);
                }
            )*
            Small {
                $(
                    // SAFETY: tables are handed out by `Kernels::new` only where the CPU has their features.
                    $name: |$($arg),*| unsafe { $name($($arg),*) },
                )*
            }
        };
    };
}
pub(super) use small_kernels;

/// Compiled for any CPU.
pub(super) const PLAIN: Small = Small { softmax, load_row, swiglu, mix, join };

#[inline(always)]
pub(super) fn load_row(codec: RowCodec, bytes: &[u8], row: &mut [f32]) {
    codec.load_row(bytes, row);
}

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

#[inline(always)]
pub(super) fn softmax(
    scores: &mut [f32],
    tile: &Tile<'_>,
    scale: f32,
    (max, sum): Heads<'_>,
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

#[inline(always)]
pub(super) fn swiglu(gate: &mut [f32], up: &[f32], clamp: f32) {
    for (gate, up) in gate.iter_mut().zip(up) {
        let g = gate.min(clamp);
        // `1 / (1 + e^-g)` of the magnitude's power, which cannot overflow.
        let e = exp(-g.abs());
        let sigmoid = if g < 0.0 { e } else { 1.0 } / (1.0 + e);
        *gate = g * sigmoid * up.clamp(-clamp, clamp);
    }
}

#[inline(always)]
pub(super) fn mix(weights: &[f32], streams: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    for (w, stream) in weights.iter().zip(streams.chunks_exact(out.len())) {
        for (o, s) in out.iter_mut().zip(stream) {
            *o += w * s;
        }
    }
}

/// All streams of a channel are replaced at once, so channels go block by block.
#[inline(always)]
pub(super) fn join(y: &[f32], (post, comb): Mix<'_>, streams: &mut [f32]) {
    const BLOCK: usize = 64;
    let (n, d) = (post.len(), y.len());
    let mut old = [[0.0; BLOCK]; 16];
    for k in (0..d).step_by(BLOCK) {
        let len = BLOCK.min(d - k);
        for i in 0..n {
            old[i][..len].copy_from_slice(&streams[i * d + k..i * d + k + len]);
        }
        for j in 0..n {
            let out = &mut streams[j * d + k..j * d + k + len];
            out.iter_mut().zip(&y[k..]).for_each(|(o, y)| *o = post[j] * y);
            for i in 0..n {
                let c = comb[i * n + j];
                out.iter_mut().zip(&old[i]).for_each(|(o, h)| *o += c * h);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{exp, swiglu};

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

    #[test]
    fn swiglu_is_that_of_the_paper() {
        for i in -400..400 {
            let (g, u) = (0.25 * i as f32, 0.1 * i as f32 - 3.0);
            let mut got = [g];
            swiglu(&mut got, &[u], 10.0);
            let clipped = f64::from(g.min(10.0));
            let want = clipped / (1.0 + (-clipped).exp()) * f64::from(u.clamp(-10.0, 10.0));
            assert!(
                (f64::from(got[0]) - want).abs() <= 4e-7 * want.abs() + 1e-34,
                "{g}, {u}: {} for {want}",
                got[0]
            );
        }
    }
}
