//! How weights lie on the device: quants as aligned 16-byte vectors, scales apart.
//!
//! A file's blocks of 34, 66, 84 or 144 bytes cannot be read in wide aligned loads. Here each row's quants are
//! one run of 16-byte vectors, each of weights that lie side by side, and its scales a run of f16 in another buffer;
//! the small scales within the blocks of the K formats are a third. No value changes, but in one case: a row of MXFP4
//! becomes Q8_0 with the same values.

use ds4_gguf::{Tensor, TensorType};
use ds4_model::BackendError;
use ds4_quant::{BlockIq2Xxs, BlockMxfp4, BlockQ2K, BlockQ4K, BlockQ8_0, dequantize_row, scale_min};
use rayon::prelude::*;

/// How a matrix is stored on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Format {
    /// Plain f32.
    F32,
    /// Plain f16.
    F16,
    /// 32 int8 and an f16 scale.
    Q8,
    /// IQ2_XXS.
    Iq2,
    /// Q2_K.
    Q2K,
    /// Q4_K, its scales unpacked to bytes.
    Q4K,
}

impl Format {
    /// The format for a tensor: `exact` wants plain values.
    pub(crate) fn of(ty: TensorType, exact: bool) -> Option<Self> {
        Some(match ty {
            TensorType::F16 => Format::F16,
            TensorType::F32 | TensorType::Bf16 => Format::F32,
            TensorType::Q8_0 | TensorType::Mxfp4 | TensorType::Iq2Xxs | TensorType::Q2K | TensorType::Q4K
                if exact =>
            {
                Format::F32
            }
            TensorType::Q8_0 | TensorType::Mxfp4 => Format::Q8,
            TensorType::Iq2Xxs => Format::Iq2,
            TensorType::Q2K => Format::Q2K,
            TensorType::Q4K => Format::Q4K,
            _ => return None,
        })
    }

    /// Weights of a 16-byte unit of quants.
    pub(crate) const fn unit(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 => 8,
            Format::Q8 => 16,
            Format::Q4K => 32,
            Format::Iq2 | Format::Q2K => 64,
        }
    }

    /// Whether products take int8 activations.
    pub(crate) const fn int8(self) -> bool {
        !matches!(self, Format::F32 | Format::F16)
    }

    /// Values of a stored row: whole units.
    pub(crate) const fn padded(self, input: usize) -> usize {
        input.div_ceil(self.unit()) * self.unit()
    }

    /// Bytes of a row's quants.
    pub(crate) const fn quant_bytes(self, input: usize) -> usize {
        self.padded(input) / self.unit() * 16
    }

    /// f16 scales of a row.
    pub(crate) const fn scales(self, input: usize) -> usize {
        match self {
            Format::F32 | Format::F16 => 0,
            Format::Q8 => input / 32,
            Format::Iq2 => input / 256,
            Format::Q2K | Format::Q4K => input / 256 * 2,
        }
    }

    /// Bytes of a row's scales within blocks.
    pub(crate) const fn sub_bytes(self, input: usize) -> usize {
        match self {
            Format::Q2K | Format::Q4K => input / 256 * 16,
            _ => 0,
        }
    }
}

/// Some rows in device layout.
#[derive(Default)]
pub(crate) struct Packed {
    /// Quants.
    pub(crate) quants: Vec<u8>,
    /// f16 scales, little endian.
    pub(crate) scales: Vec<u8>,
    /// Scales within blocks.
    pub(crate) sub: Vec<u8>,
}

/// The parts of one row, to be filled.
struct RowOut<'a> {
    quants: &'a mut [u8],
    scales: &'a mut [u8],
    sub: &'a mut [u8],
}

/// Brings rows `first..first + count` of `input` values into device layout.
pub(crate) fn pack(
    tensor: &Tensor,
    format: Format,
    input: usize,
    first: usize,
    count: usize,
    out: &mut Packed,
) -> Result<(), BackendError> {
    let row_bytes = input / tensor.ty().block_len() as usize * tensor.ty().block_bytes() as usize;
    let bytes = &tensor.bytes()[first * row_bytes..(first + count) * row_bytes];
    let (q, s, b) = (format.quant_bytes(input), 2 * format.scales(input), format.sub_bytes(input));
    out.quants.resize(count * q, 0);
    out.scales.resize(count * s, 0);
    out.sub.resize(count * b, 0);
    // Scales may be absent, and an empty slice has no chunks; so rows are cut off one by one.
    let (mut scales, mut sub) = (&mut out.scales[..], &mut out.sub[..]);
    let mut rows = Vec::with_capacity(count);
    for (bytes, quants) in bytes.chunks_exact(row_bytes).zip(out.quants.chunks_exact_mut(q)) {
        let (row_scales, rest_scales) = std::mem::take(&mut scales).split_at_mut(s);
        let (row_sub, rest_sub) = std::mem::take(&mut sub).split_at_mut(b);
        (scales, sub) = (rest_scales, rest_sub);
        rows.push((bytes, RowOut { quants, scales: row_scales, sub: row_sub }));
    }
    rows.into_par_iter()
        .with_min_len(16)
        .try_for_each(|(bytes, out)| pack_row(tensor, format, input, bytes, out))
}

fn blocks<'a, B: bytemuck::AnyBitPattern>(tensor: &Tensor, bytes: &'a [u8]) -> Result<&'a [B], BackendError> {
    bytemuck::try_cast_slice(bytes)
        .map_err(|_| BackendError::new(format!("tensor {}: its size is not that of its type", tensor.name())))
}

fn pack_row(
    tensor: &Tensor,
    format: Format,
    input: usize,
    bytes: &[u8],
    out: RowOut<'_>,
) -> Result<(), BackendError> {
    match (tensor.ty(), format) {
        (TensorType::F32, Format::F32) | (TensorType::F16, Format::F16) => {
            out.quants[..bytes.len()].copy_from_slice(bytes);
        }
        (ty, Format::F32) => {
            let mut values = vec![0.0; input];
            dequantize_row(ty, bytes, &mut values)
                .map_err(|e| BackendError::new(format!("tensor {}: {e}", tensor.name())))?;
            out.quants[..4 * input].copy_from_slice(bytemuck::cast_slice(&values));
        }
        (TensorType::Q8_0, _) => pack_q8(blocks(tensor, bytes)?, out),
        (TensorType::Mxfp4, _) => pack_mxfp4(tensor, blocks(tensor, bytes)?, out)?,
        (TensorType::Iq2Xxs, _) => pack_iq2(blocks(tensor, bytes)?, out),
        (TensorType::Q2K, _) => pack_q2k(blocks(tensor, bytes)?, out),
        (TensorType::Q4K, _) => pack_q4k(blocks(tensor, bytes)?, out),
        (ty, _) => return Err(BackendError::new(format!("tensor {}: no layout for {ty:?}", tensor.name()))),
    }
    Ok(())
}

fn pack_q8(blocks: &[BlockQ8_0], out: RowOut<'_>) {
    let parts = out.quants.chunks_exact_mut(32).zip(out.scales.chunks_exact_mut(2));
    for (block, (quants, scale)) in blocks.iter().zip(parts) {
        quants.copy_from_slice(bytemuck::cast_slice(&block.q));
        scale.copy_from_slice(&block.d);
    }
}

/// Twice the E2M1 magnitudes are integers, so a block is one of Q8_0 with half the scale.
fn pack_mxfp4(tensor: &Tensor, blocks: &[BlockMxfp4], out: RowOut<'_>) -> Result<(), BackendError> {
    let parts = out.quants.chunks_exact_mut(32).zip(out.scales.chunks_exact_mut(2));
    for (block, (quants, scale)) in blocks.iter().zip(parts) {
        let half = half::f16::from_f32(0.5 * ds4_quant::e8m0_to_f32(block.e));
        if half.to_f32() != 0.5 * ds4_quant::e8m0_to_f32(block.e) {
            return Err(BackendError::new(format!(
                "tensor {}: an MXFP4 scale of 2^{} does not fit the device's f16 scales",
                tensor.name(),
                i32::from(block.e) - 127
            )));
        }
        scale.copy_from_slice(&half.to_le_bytes());
        let twice = |code: u8| (2.0 * ds4_quant::fp4::e2m1_to_f32(code)) as i8 as u8;
        for (i, &q) in block.q.iter().enumerate() {
            (quants[i], quants[16 + i]) = (twice(q & 15), twice(q >> 4));
        }
    }
    Ok(())
}

fn pack_iq2(blocks: &[BlockIq2Xxs], out: RowOut<'_>) {
    let parts = out.quants.chunks_exact_mut(64).zip(out.scales.chunks_exact_mut(2));
    for (block, (quants, scale)) in blocks.iter().zip(parts) {
        quants.copy_from_slice(bytemuck::cast_slice(&block.groups));
        scale.copy_from_slice(&block.d);
    }
}

/// The four planes of two bits of a byte hold weights 32 apart in a file; here 16 apart, so that a unit is 64 weights
/// in order, with four scales that are one word.
fn pack_q2k(blocks: &[BlockQ2K], out: RowOut<'_>) {
    let parts = out.quants.chunks_exact_mut(64).zip(out.scales.as_chunks_mut::<4>().0);
    for ((block, (quants, scale)), sub) in blocks.iter().zip(parts).zip(out.sub.chunks_exact_mut(16)) {
        for (u, unit) in quants.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            *unit = [0; 16];
            for j in 0..4 {
                let group = 4 * u + j;
                let from = &block.q[32 * (u / 2) + 16 * (group % 2)..][..16];
                let shift = group / 2 % 4 * 2;
                unit.iter_mut().zip(from).for_each(|(to, q)| *to |= ((q >> shift) & 3) << (2 * j));
            }
        }
        *scale = [block.d[0], block.d[1], block.dmin[0], block.dmin[1]];
        sub.copy_from_slice(&block.scales);
    }
}

/// As for Q2_K: nibbles of a byte hold weights 32 apart in a file; here 16, so that a unit is a group of 32.
fn pack_q4k(blocks: &[BlockQ4K], out: RowOut<'_>) {
    let parts = out.quants.chunks_exact_mut(128).zip(out.scales.as_chunks_mut::<4>().0);
    for ((block, (quants, scale)), sub) in blocks.iter().zip(parts).zip(out.sub.chunks_exact_mut(16)) {
        for (u, unit) in quants.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let (low, high) = block.q[32 * (u / 2)..][..32].split_at(16);
            let shift = 4 * (u % 2);
            for ((to, a), b) in unit.iter_mut().zip(low).zip(high) {
                *to = ((a >> shift) & 15) | ((b >> shift) << 4);
            }
        }
        *scale = [block.d[0], block.d[1], block.dmin[0], block.dmin[1]];
        for g in 0..8 {
            (sub[g], sub[8 + g]) = scale_min(&block.scales, g);
        }
    }
}
