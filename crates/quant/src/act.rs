//! Activations quantized to int8, as the integer dot products want them (`gguf.md` section 4, last
//! paragraph). They live for one step only and are never stored in a file.
//!
//! Scales and quants are separate arrays, so that kernels load quants as aligned full vectors.

/// One row quantized per 32 values: `x[i] = d[i / 32] * q[i]`. Used with Q8_0 weights.
#[derive(Clone, Copy)]
pub struct Act32<'a> {
    /// Quants, one per value.
    pub q: &'a [i8],
    /// Scales, one per 32 values.
    pub d: &'a [f32],
}

/// One row quantized per 256 values: `x[i] = d[i / 256] * q[i]`. Used with Q2_K, Q4_K and IQ2_XXS weights.
#[derive(Clone, Copy)]
pub struct Act256<'a> {
    /// Quants, one per value.
    pub q: &'a [i8],
    /// Scales, one per 256 values.
    pub d: &'a [f32],
    /// Sums of each 16 quants, for the minimum term of the K formats.
    pub sums: &'a [i16],
}

/// Rounds to nearest, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits.
/// Cheaper than a call where no rounding instruction may be assumed.
fn round(x: f32) -> i32 {
    const MAGIC: f32 = 12_582_912.0;
    ((x + MAGIC).to_bits() as i32) - (MAGIC.to_bits() as i32)
}

/// The largest value of some eights and the largest of their negatives, 0 at least: eight at a time, as registers take them.
fn extremes(x: &[f32]) -> (f32, f32) {
    let (mut high, mut low) = ([0f32; 8], [0f32; 8]);
    for x in x.as_chunks::<8>().0 {
        for i in 0..8 {
            high[i] = if x[i] > high[i] { x[i] } else { high[i] };
            low[i] = if -x[i] > low[i] { -x[i] } else { low[i] };
        }
    }
    let largest = |lanes: [f32; 8]| lanes.into_iter().fold(0.0, |m, v| if v > m { v } else { m });
    (largest(high), largest(low))
}

/// Quantizes a row per 32: `d = max|x| / 127`, `q = round(x / d)`.
pub fn quantize_32(x: &[f32], q: &mut [i8], d: &mut [f32]) {
    for ((x, q), d) in x.chunks_exact(32).zip(q.chunks_exact_mut(32)).zip(d) {
        let max = x.iter().fold(0f32, |m, v| m.max(v.abs()));
        *d = max / 127.0;
        let inv = if max == 0.0 { 0.0 } else { 127.0 / max };
        for (q, x) in q.iter_mut().zip(x) {
            *q = round(x * inv) as i8;
        }
    }
}

/// Quantizes a row per 256: `s = -127 / (value of largest magnitude)`, `q = min(127, round(s * x))`,
/// `d = 1 / s`, and the sums of each 16 quants.
pub fn quantize_256(x: &[f32], q: &mut [i8], d: &mut [f32], sums: &mut [i16]) {
    let rows = x.chunks_exact(256).zip(q.chunks_exact_mut(256)).zip(d).zip(sums.chunks_exact_mut(16));
    for (((x, q), d), sums) in rows {
        let extreme = match extremes(x) {
            (high, low) if high > low => high,
            (high, low) if high < low => -low,
            // The first of equal magnitudes.
            (high, _) => x.iter().copied().find(|v| v.abs() == high).unwrap_or(0.0),
        };
        let s = if extreme == 0.0 { 0.0 } else { -127.0 / extreme };
        *d = if extreme == 0.0 { 0.0 } else { 1.0 / s };
        for (q, x) in q.iter_mut().zip(x) {
            *q = round(s * x).min(127) as i8;
        }
        for (sum, q) in sums.iter_mut().zip(q.chunks_exact(16)) {
            *sum = q.iter().map(|&q| i16::from(q)).sum();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn per_32_error_is_half_a_step(x in prop::collection::vec(-1e3f32..1e3, 64)) {
            let (mut q, mut d) = ([0; 64], [0.0; 2]);
            quantize_32(&x, &mut q, &mut d);
            for i in 0..64 {
                prop_assert!((x[i] - d[i / 32] * f32::from(q[i])).abs() <= 0.501 * d[i / 32]);
            }
        }

        #[test]
        fn per_256_error_is_half_a_step(x in prop::collection::vec(-1e3f32..1e3, 256)) {
            let (mut q, mut d, mut sums) = ([0; 256], [0.0; 1], [0; 16]);
            quantize_256(&x, &mut q, &mut d, &mut sums);
            for i in 0..256 {
                prop_assert!((x[i] - d[0] * f32::from(q[i])).abs() <= 0.501 * d[0].abs());
            }
            for s in 0..16 {
                prop_assert_eq!(i32::from(sums[s]), q[16 * s..16 * s + 16].iter().map(|&q| i32::from(q)).sum::<i32>());
            }
        }
    }

    #[test]
    fn zeros_stay_zero() {
        let (mut q, mut d, mut sums) = ([1; 256], [1.0; 1], [1; 16]);
        quantize_256(&[0.0; 256], &mut q, &mut d, &mut sums);
        assert!(q.iter().all(|&q| q == 0) && d == [0.0] && sums == [0; 16]);
    }
}
