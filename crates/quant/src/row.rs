//! Rows of any supported type: the scalar reference for every kernel.

use crate::act::{Act32, Act256};
use crate::blocks::{Block, BlockIq2Xxs, BlockMxfp4, BlockQ2K, BlockQ4K, BlockQ8_0, f16_to_f32};
use crate::{iq2, q2k, q4k, q8};
use ds4_gguf::TensorType;

/// Why a row could not be decoded.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum RowError {
    /// No decoder for the type.
    #[error("tensor type {0:?} is not supported; F32, F16, BF16, Q8_0, Q2_K, Q4_K, IQ2_XXS and MXFP4 are")]
    Type(TensorType),
    /// Byte count and value count disagree.
    #[error("{bytes} bytes of {ty:?} do not hold {values} values")]
    Length {
        /// Type of the row.
        ty: TensorType,
        /// Bytes given.
        bytes: usize,
        /// Values wanted.
        values: usize,
    },
}

/// Whether [`dequantize_row`] can decode rows of this type.
pub fn is_supported(ty: TensorType) -> bool {
    use TensorType as T;
    matches!(ty, T::F32 | T::F16 | T::Bf16 | T::Q8_0 | T::Q2K | T::Q4K | T::Iq2Xxs | T::Mxfp4)
}

fn blocks<B: Block>(bytes: &[u8], values: usize) -> Result<&[B], RowError> {
    let error = RowError::Length { ty: B::TYPE, bytes: bytes.len(), values };
    let blocks: &[B] = bytemuck::try_cast_slice(bytes).map_err(|_| error.clone())?;
    if blocks.len() * B::LEN == values { Ok(blocks) } else { Err(error) }
}

fn decode<B: Block>(bytes: &[u8], out: &mut [f32]) -> Result<(), RowError> {
    for (block, out) in blocks::<B>(bytes, out.len())?.iter().zip(out.chunks_exact_mut(B::LEN)) {
        block.dequantize(out);
    }
    Ok(())
}

/// Decodes the bytes of a row into `out.len()` values.
pub fn dequantize_row(ty: TensorType, bytes: &[u8], out: &mut [f32]) -> Result<(), RowError> {
    let plain = |width: usize| match bytes.len() == width * out.len() {
        true => Ok(()),
        false => Err(RowError::Length { ty, bytes: bytes.len(), values: out.len() }),
    };
    match ty {
        TensorType::F32 => {
            plain(4)?;
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *o = f32::from_le_bytes(*b);
            }
        }
        TensorType::F16 => {
            plain(2)?;
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = f16_to_f32(*b);
            }
        }
        TensorType::Bf16 => {
            plain(2)?;
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            }
        }
        TensorType::Q8_0 => decode::<BlockQ8_0>(bytes, out)?,
        TensorType::Q2K => decode::<BlockQ2K>(bytes, out)?,
        TensorType::Q4K => decode::<BlockQ4K>(bytes, out)?,
        TensorType::Iq2Xxs => decode::<BlockIq2Xxs>(bytes, out)?,
        TensorType::Mxfp4 => decode::<BlockMxfp4>(bytes, out)?,
        other => return Err(RowError::Type(other)),
    }
    Ok(())
}

/// Dot product of two float rows, accumulated in `f64`: the yardstick for float kernels.
pub fn dot_f32(w: &[f32], x: &[f32]) -> f32 {
    w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum::<f64>() as f32
}

/// Dot product of a quantized row with int8 activations; `None` where the type takes float activations.
pub fn dot_row(ty: TensorType, bytes: &[u8], x32: Act32<'_>, x256: Act256<'_>) -> Option<f32> {
    Some(match ty {
        TensorType::Q8_0 => q8::dot(blocks(bytes, x32.q.len()).ok()?, x32),
        TensorType::Q2K => q2k::dot(blocks(bytes, x256.q.len()).ok()?, x256),
        TensorType::Q4K => q4k::dot(blocks(bytes, x256.q.len()).ok()?, x256),
        TensorType::Iq2Xxs => iq2::dot(blocks(bytes, x256.q.len()).ok()?, x256),
        _ => return None,
    })
}
