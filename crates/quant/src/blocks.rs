//! Layouts of the weight blocks, byte for byte as in the file.

use bytemuck::{Pod, Zeroable};
use ds4_gguf::TensorType;

/// A weight block: a fixed number of consecutive weights of one row.
pub trait Block: Pod {
    /// Type of the tensor in the file.
    const TYPE: TensorType;
    /// Weights per block.
    const LEN: usize;
    /// Writes the block's `LEN` weights.
    fn dequantize(&self, out: &mut [f32]);
}

/// IEEE half, two little-endian bytes, to `f32`.
pub fn f16_to_f32(bytes: [u8; 2]) -> f32 {
    half::f16::from_le_bytes(bytes).to_f32()
}

/// 32 weights: `x[i] = d * q[i]`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ8_0 {
    /// Scale, f16.
    pub d: [u8; 2],
    /// Quants.
    pub q: [i8; 32],
}

/// 256 weights of two bits in 16 sub-blocks, each with a four-bit scale and a four-bit minimum.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ2K {
    /// Per sub-block: low nibble scale, high nibble minimum.
    pub scales: [u8; 16],
    /// Two-bit quants: byte `32a + c` holds lane `c` of four planes of half `a`.
    pub q: [u8; 64],
    /// Scale of the scales, f16.
    pub d: [u8; 2],
    /// Scale of the minima, f16.
    pub dmin: [u8; 2],
}

/// 256 weights of four bits in 8 groups, each with a six-bit scale and minimum.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4K {
    /// Scale of the scales, f16.
    pub d: [u8; 2],
    /// Scale of the minima, f16.
    pub dmin: [u8; 2],
    /// Packed six-bit scales and minima, see [`crate::scale_min`].
    pub scales: [u8; 12],
    /// Nibbles: group `2j` low, group `2j + 1` high, of bytes `32j..32j + 32`.
    pub q: [u8; 128],
}

/// 256 weights in 32 vectors of 8, each a code of a fixed grid with signs.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIq2Xxs {
    /// Scale, f16.
    pub d: [u8; 2],
    /// 8 groups of (four grid codes; 4 x 7 sign bits and a four-bit scale), little endian.
    pub groups: [[u8; 8]; 8],
}

/// 32 weights of FP4 E2M1 with a power-of-two scale.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct BlockMxfp4 {
    /// E8M0 scale.
    pub e: u8,
    /// Nibbles: weight `i` low, weight `16 + i` high.
    pub q: [u8; 16],
}

macro_rules! assert_layout {
    ($($block:ty: $bytes:expr;)*) => {$(
        const _: () = assert!(size_of::<$block>() == $bytes && align_of::<$block>() == 1);
    )*};
}
assert_layout! { BlockQ8_0: 34; BlockQ2K: 84; BlockQ4K: 144; BlockIq2Xxs: 66; BlockMxfp4: 17; }

impl Block for BlockMxfp4 {
    const TYPE: TensorType = TensorType::Mxfp4;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        let scale = crate::e8m0_to_f32(self.e);
        for (i, &q) in self.q.iter().enumerate() {
            out[i] = crate::fp4::e2m1_to_f32(q & 15) * scale;
            out[16 + i] = crate::fp4::e2m1_to_f32(q >> 4) * scale;
        }
    }
}
