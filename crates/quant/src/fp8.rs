//! FP8 E4M3 (`float8_e4m3fn`) and the rounding of KV rows (`architecture.md` A.9, step 1).

use crate::{e8m0_to_f32, pow2_ceil_e8m0};

/// Values per scale in a KV row.
pub const BLOCK: usize = 64;
/// Largest finite magnitude.
pub const MAX: f32 = 448.0;

/// Value of an E4M3 code: sign, four exponent bits (bias 7), three mantissa bits; no infinities, codes
/// 0x7f and 0xff are NaN.
pub fn e4m3_to_f32(code: u8) -> f32 {
    E4M3[usize::from(code)]
}

static E4M3: [f32; 256] = e4m3_table();

const fn e4m3_table() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut code = 0usize;
    while code < 256 {
        let (exponent, mantissa) = ((code >> 3) & 15, code & 7);
        let magnitude = if code & 127 == 127 {
            f32::NAN
        } else if exponent == 0 {
            mantissa as f32 / 512.0
        } else {
            f32::from_bits(((exponent + 120) << 23 | mantissa << 20) as u32)
        };
        table[code] = if code & 128 == 0 { magnitude } else { -magnitude };
        code += 1;
    }
    table
}

/// Nearest E4M3 code, ties to even; magnitudes beyond 448 saturate. NaN maps to NaN.
pub fn f32_to_e4m3(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    let a = x.abs();
    if a.is_nan() {
        return sign | 0x7f;
    }
    let code = if a < 0.015_625 {
        // subnormal: steps of 2^-9; eight steps are the smallest normal number, whose code is 8 too
        (a * 512.0).round_ties_even() as u8
    } else if a >= MAX {
        0x7e
    } else {
        let bits = a.to_bits();
        let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
        (((rounded >> 20) - (120 << 3)) as u8).min(0x7e)
    };
    sign | code
}

/// Scale byte (E8M0) of a block: the smallest power of two `s` with `max / s <= 448`.
pub fn block_scale(block: &[f32]) -> u8 {
    let max = block.iter().fold(1e-4f32, |m, v| m.max(v.abs()));
    pow2_ceil_e8m0(max * (1.0 / MAX))
}

/// Packs one block: writes a code per value, returns the scale byte.
pub fn pack_block(block: &[f32], codes: &mut [u8]) -> u8 {
    let scale = block_scale(block);
    let inv = 1.0 / e8m0_to_f32(scale); // exact: a power of two
    for (code, v) in codes.iter_mut().zip(block) {
        *code = f32_to_e4m3(v * inv);
    }
    scale
}

/// The inverse of [`pack_block`]: part of the caller, and without branches and tables, so that it becomes vectors of the registers that the
/// caller is compiled for.
#[inline(always)]
pub fn unpack_block(codes: &[u8], scale: u8, out: &mut [f32]) {
    let scale = e8m0_to_f32(scale);
    for (o, &code) in out.iter_mut().zip(codes) {
        let (code, sign) = (u32::from(code & 127), u32::from(code & 128) << 24);
        let normal = f32::from_bits((code << 20) + (120 << 23));
        let value = if code < 8 { code as f32 * (1.0 / 512.0) } else { normal };
        let value = if code == 127 { f32::NAN } else { value };
        *o = f32::from_bits(value.to_bits() | sign) * scale;
    }
}

/// Rounds values in place as storage in FP8 would, in blocks of 64 (the last may be shorter).
pub fn round(x: &mut [f32]) {
    for block in x.chunks_mut(BLOCK) {
        let scale = e8m0_to_f32(block_scale(block));
        let inv = 1.0 / scale;
        for v in block {
            *v = e4m3_to_f32(f32_to_e4m3(*v * inv)) * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_code_is_its_own_nearest() {
        for code in 0..=255u8 {
            let v = e4m3_to_f32(code);
            if v.is_nan() {
                assert_eq!(code & 127, 127);
            } else {
                assert_eq!(f32_to_e4m3(v), code);
            }
        }
    }

    #[test]
    fn unpacked_codes_are_those_of_the_table() {
        let codes: Vec<u8> = (0..=255).collect();
        let mut values = [0.0; 256];
        unpack_block(&codes, 128, &mut values);
        for (code, v) in codes.into_iter().zip(values) {
            let want = 2.0 * e4m3_to_f32(code);
            assert!(v.to_bits() == want.to_bits() || v.is_nan() && want.is_nan(), "code {code}: {v}");
        }
    }

    #[test]
    fn ties_go_to_even_and_large_values_saturate() {
        assert_eq!(e4m3_to_f32(f32_to_e4m3(17.0)), 16.0);
        assert_eq!(e4m3_to_f32(f32_to_e4m3(19.0)), 20.0);
        assert_eq!(e4m3_to_f32(f32_to_e4m3(1e9)), 448.0);
        assert_eq!(e4m3_to_f32(f32_to_e4m3(-1e9)), -448.0);
        assert_eq!(f32_to_e4m3(2f32.powi(-10)), 0);
        assert_eq!(f32_to_e4m3(3.0 * 2f32.powi(-10)), 2);
    }

    proptest! {
        /// Brute force: no other code is nearer.
        #[test]
        fn nearest(x in -500f32..500.0) {
            let got = e4m3_to_f32(f32_to_e4m3(x));
            let best = (0..=255u8).map(e4m3_to_f32).filter(|v| !v.is_nan())
                .map(|v| (v - x).abs()).fold(f32::INFINITY, f32::min);
            prop_assert_eq!((got - x).abs(), best);
        }

        /// What is packed is exactly what rounding in place produces, so storage is lossless.
        #[test]
        fn packing_equals_rounding(x in prop::collection::vec(-1e4f32..1e4, 64), tiny in 0i32..40) {
            let mut x: Vec<f32> = x.iter().map(|v| v * 2f32.powi(-tiny)).collect();
            let (mut codes, mut unpacked) = ([0; 64], [0.0; 64]);
            let scale = pack_block(&x, &mut codes);
            unpack_block(&codes, scale, &mut unpacked);
            round(&mut x);
            prop_assert_eq!(&x[..], &unpacked[..]);
            round(&mut x);
            prop_assert_eq!(&x[..], &unpacked[..]);
        }
    }
}
