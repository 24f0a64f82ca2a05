//! How far apart two tensors are.

/// Differences of two tensors of equal size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    /// Largest absolute difference.
    pub max_abs: f32,
    /// Its index.
    pub at: usize,
    /// Root mean square of the differences over that of the first tensor.
    pub relative_rms: f64,
    /// Values that differ at all.
    pub differing: usize,
}

/// Compares value by value; `None` if the sizes differ. NaN against anything but NaN counts as infinite.
pub fn compare(a: &[f32], b: &[f32]) -> Option<Difference> {
    if a.len() != b.len() {
        return None;
    }
    let mut d = Difference { max_abs: 0.0, at: 0, relative_rms: 0.0, differing: 0 };
    let (mut error, mut size) = (0f64, 0f64);
    for (i, (&x, &y)) in a.iter().zip(b).enumerate() {
        let diff = if x.to_bits() == y.to_bits() { 0.0 } else { (x - y).abs() };
        let diff = if diff.is_nan() { f32::INFINITY } else { diff };
        d.differing += usize::from(diff != 0.0);
        if diff > d.max_abs {
            (d.max_abs, d.at) = (diff, i);
        }
        error += f64::from(diff) * f64::from(diff);
        size += f64::from(x) * f64::from(x);
    }
    d.relative_rms = if error == 0.0 { 0.0 } else { (error / size.max(f64::MIN_POSITIVE)).sqrt() };
    Some(d)
}
