//! Encoders: weights as blocks, so that the weighted sum of squared errors is small.
//!
//! `weights` are the importances of the columns, as an importance matrix has them: how much the square of an error in a column
//! costs. Without them all columns count the same. Each block is encoded by itself, so rows may be encoded in any order and by
//! any number of threads.

mod affine;
mod iq2;
mod simd;

use crate::quantize_q8_0;
use ds4_gguf::TensorType;

/// Why a row could not be encoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// No encoder for the type.
    #[error("there is no encoder for {0}")]
    Type(TensorType),
    /// The row is not whole blocks.
    #[error("a row of {values} values is not whole blocks of {block}")]
    Length {
        /// Values of the row.
        values: usize,
        /// Values of a block.
        block: usize,
    },
    /// There must be an importance for each value.
    #[error("{given} importances for a row of {values} values")]
    Importances {
        /// Importances given.
        given: usize,
        /// Values of the row.
        values: usize,
    },
}

/// Appends a row as blocks of a type to `out`. Values must be finite; importances too, and not negative.
///
/// # Errors
/// See [`EncodeError`].
pub fn encode_row(
    ty: TensorType,
    row: &[f32],
    importances: Option<&[f32]>,
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    if let Some(given) = importances.map(<[f32]>::len).filter(|&n| n != row.len()) {
        return Err(EncodeError::Importances { given, values: row.len() });
    }
    let whole = |block: usize| match row.len().is_multiple_of(block) {
        true => Ok(()),
        false => Err(EncodeError::Length { values: row.len(), block }),
    };
    match ty {
        TensorType::F32 => out.extend(row.iter().flat_map(|v| v.to_le_bytes())),
        TensorType::F16 => out.extend(row.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes())),
        TensorType::Bf16 => out.extend(row.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())),
        TensorType::Q8_0 => {
            whole(32)?;
            quantize_q8_0(row, out);
        }
        TensorType::Q2K | TensorType::Q4K | TensorType::Iq2Xxs => {
            whole(256)?;
            simd::super_blocks(ty, row, importances, out);
        }
        other => return Err(EncodeError::Type(other)),
    }
    Ok(())
}

/// Appends a row as blocks of 256.
#[inline(always)]
fn super_blocks(ty: TensorType, row: &[f32], importances: Option<&[f32]>, out: &mut Vec<u8>) {
    let (blocks, _) = row.as_chunks::<256>();
    for (i, block) in blocks.iter().enumerate() {
        let weights = weights(importances.map(|w| &w[256 * i..256 * i + 256]));
        match ty {
            TensorType::Q2K => out.extend(bytemuck::bytes_of(&affine::q2k(block, &weights))),
            TensorType::Q4K => out.extend(bytemuck::bytes_of(&affine::q4k(block, &weights))),
            _ => out.extend(bytemuck::bytes_of(&iq2::iq2_xxs(block, &weights))),
        }
    }
}

/// Weights of a block's values. A column that never mattered still gets a little: it may yet.
fn weights(importances: Option<&[f32]>) -> [f32; 256] {
    let mut weights = [1.0; 256];
    if let Some(importances) = importances {
        let mean = importances.iter().sum::<f32>() / 256.0;
        let least = if mean > 0.0 { mean * 1e-4 } else { 1.0 };
        weights.iter_mut().zip(importances).for_each(|(w, i)| *w = i.max(least));
    }
    weights
}

/// The nearest half that is finite.
fn to_f16(value: f32) -> [u8; 2] {
    half::f16::from_f32(value.clamp(-65504.0, 65504.0)).to_le_bytes()
}
