//! Block formats of DeepSeek V4 weights and caches.
//!
//! Everything here is scalar and written to be read: these functions *are* the specification that the SIMD
//! and GPU kernels are tested against (`gguf.md` section 4, `architecture.md` A.9). A block is a
//! byte-aligned struct whose size is asserted, so a row of a memory-mapped file can be viewed as blocks
//! without copying. The encoders are built for the machine's wide registers too, which is the only `unsafe` here.

pub mod act;
mod blocks;
mod encode;
pub mod fp4;
pub mod fp8;
mod iq2;
mod q2k;
mod q4k;
mod q8;
mod row;

pub use blocks::{Block, BlockIq2Xxs, BlockMxfp4, BlockQ2K, BlockQ4K, BlockQ8_0, f16_to_f32};
pub use encode::{EncodeError, encode_row};
pub use iq2::{IQ2XXS_GRID, iq2_signs};
pub use q4k::scale_min;
pub use q8::quantize_q8_0;
pub use row::{RowError, dequantize_row, dot_f32, dot_row, is_supported};

/// Value of an E8M0 scale byte: `2^(e-127)`. Code 255 is NaN by the format's definition; it decodes to
/// infinity here, which no valid checkpoint contains.
pub fn e8m0_to_f32(e: u8) -> f32 {
    if e == 0 { f32::from_bits(0x0040_0000) } else { f32::from_bits(u32::from(e) << 23) }
}

/// The E8M0 byte of the smallest power of two that is at least `x` (positive, finite).
///
/// Works on the exponent bits, so that exact powers of two are not disturbed by a logarithm's last bit.
pub fn pow2_ceil_e8m0(x: f32) -> u8 {
    let bits = x.to_bits();
    let round_up = u32::from(bits & 0x007f_ffff != 0);
    ((bits >> 23) + round_up).min(254) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_are_exact() {
        for e in 1..=254u8 {
            assert_eq!(e8m0_to_f32(e), 2f32.powi(i32::from(e) - 127));
        }
        assert_eq!(e8m0_to_f32(0), 2f32.powi(-127));
        assert_eq!(pow2_ceil_e8m0(1.0), 127);
        assert_eq!(pow2_ceil_e8m0(1.0 + f32::EPSILON), 128);
        assert_eq!(pow2_ceil_e8m0(0.75), 127);
    }
}
