//! FP4 E2M1 and the rounding of indexer vectors (`architecture.md` A.9, step 2).

use crate::{e8m0_to_f32, pow2_ceil_e8m0};

/// Values per scale in an indexer vector.
pub const BLOCK: usize = 32;

const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// Value of an E2M1 code (low four bits): sign bit 3, magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6.
pub fn e2m1_to_f32(code: u8) -> f32 {
    let magnitude = MAGNITUDES[usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// Nearest E2M1 code, ties to the even code; magnitudes beyond 6 saturate.
pub fn f32_to_e2m1(x: f32) -> u8 {
    let a = x.abs().min(6.0);
    // steps of 1/2 below 2, of 1 below 4, of 2 above: rounding to even there is rounding to even codes
    let code = if a < 2.0 {
        (a * 2.0).round_ties_even() as u8
    } else if a < 4.0 {
        2 + a.round_ties_even() as u8
    } else {
        4 + (a * 0.5).round_ties_even() as u8
    };
    code | ((x.to_bits() >> 28) & 8) as u8
}

/// Scale byte (E8M0) of a block: the smallest power of two `s` with `max / s <= 6`.
pub fn block_scale(block: &[f32]) -> u8 {
    const TINY: f32 = 6.0 * f32::MIN_POSITIVE;
    let max = block.iter().fold(TINY, |m, v| m.max(v.abs()));
    pow2_ceil_e8m0(max * (1.0 / 6.0))
}

/// Packs one block of an even number of values, two codes a byte (low nibble first); returns the scale.
pub fn pack_block(block: &[f32], codes: &mut [u8]) -> u8 {
    let scale = block_scale(block);
    let inv = 1.0 / e8m0_to_f32(scale);
    for (code, v) in codes.iter_mut().zip(block.chunks_exact(2)) {
        *code = f32_to_e2m1(v[0] * inv) | f32_to_e2m1(v[1] * inv) << 4;
    }
    scale
}

/// The inverse of [`pack_block`].
pub fn unpack_block(codes: &[u8], scale: u8, out: &mut [f32]) {
    let scale = e8m0_to_f32(scale);
    for (o, &code) in out.chunks_exact_mut(2).zip(codes) {
        o[0] = e2m1_to_f32(code) * scale;
        o[1] = e2m1_to_f32(code >> 4) * scale;
    }
}

/// Rounds values in place as storage in FP4 would, in blocks of 32 (the last may be shorter).
pub fn round(x: &mut [f32]) {
    for block in x.chunks_mut(BLOCK) {
        let scale = e8m0_to_f32(block_scale(block));
        let inv = 1.0 / scale;
        for v in block {
            *v = e2m1_to_f32(f32_to_e2m1(*v * inv)) * scale;
        }
    }
}

/// Normalised Walsh-Hadamard transform in natural (Sylvester) order; the length is a power of two.
pub fn hadamard(x: &mut [f32]) {
    let n = x.len();
    debug_assert!(n.is_power_of_two());
    let mut step = 1;
    while step < n {
        for pair in x.chunks_exact_mut(2 * step) {
            let (lo, hi) = pair.split_at_mut(step);
            for (a, b) in lo.iter_mut().zip(hi) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        step *= 2;
    }
    let norm = (n as f32).sqrt().recip();
    for v in x {
        *v *= norm;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_code_is_its_own_nearest() {
        for code in 0..16 {
            assert_eq!(f32_to_e2m1(e2m1_to_f32(code)), code);
        }
    }

    #[test]
    fn ties_go_to_even_codes() {
        for (x, want) in
            [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)]
        {
            assert_eq!(e2m1_to_f32(f32_to_e2m1(x)), want, "{x}");
            assert_eq!(e2m1_to_f32(f32_to_e2m1(-x)), -want, "-{x}");
        }
        assert_eq!(e2m1_to_f32(f32_to_e2m1(1e9)), 6.0);
    }

    proptest! {
        #[test]
        fn packing_equals_rounding(x in prop::collection::vec(-1e4f32..1e4, 32), tiny in 0i32..60) {
            let mut x: Vec<f32> = x.iter().map(|v| v * 2f32.powi(-tiny)).collect();
            let (mut codes, mut unpacked) = ([0; 16], [0.0; 32]);
            let scale = pack_block(&x, &mut codes);
            unpack_block(&codes, scale, &mut unpacked);
            round(&mut x);
            prop_assert_eq!(&x[..], &unpacked[..]);
        }

        #[test]
        fn hadamard_is_its_own_inverse(x in prop::collection::vec(-10f32..10.0, 128)) {
            let mut y = x.clone();
            hadamard(&mut y);
            hadamard(&mut y);
            for (a, b) in x.iter().zip(&y) {
                prop_assert!((a - b).abs() < 1e-4);
            }
        }
    }
}
