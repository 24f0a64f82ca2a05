//! How weights lie on the device: quants as aligned 16-byte vectors, scales apart.
//!
//! A file's blocks of 34, 66, 84 or 144 bytes cannot be read in wide aligned loads. Here each row's quants are
//! one run of 16-byte vectors, each of weights that lie side by side, and its scales a run of f16 in another buffer;
//! the small scales within blocks are a third. Of IQ2_XXS every sign has its bit, which costs 6 % more bytes and saves a
//! third of the instructions. No value changes, but in one case: a row of MXFP4 becomes Q8_0 with the same values.

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

    /// The format for a tensor of a model file by its name and type.
    pub(crate) fn of_tensor(name: &str, ty: TensorType, exact: bool) -> Option<Self> {
        // Control numbers and embeddings are read in plain types only, and these in Q8_0.
        let embedding = name.starts_with("token_embd");
        match Self::of(ty, exact) {
            Some(Format::Q8) if embedding => Some(Format::Q8),
            Some(f) if f.int8() && (embedding || name.contains("hc_")) => Some(Format::F32),
            format => format,
        }
    }

    /// Bytes of a row of `input` values in all.
    pub(crate) const fn row_bytes(self, input: usize) -> usize {
        self.quant_bytes(input) + 2 * self.scales(input) + self.sub_bytes(input)
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
            Format::Iq2 => input / 256 * 4,
            Format::Q2K | Format::Q4K => input / 256 * 16,
            Format::F32 | Format::F16 | Format::Q8 => 0,
        }
    }
}

/// Bytes that a tensor of a model file, of dimensions `dims` with the row first, takes on a device; `exact`: for exact
/// mode.
pub fn tensor_bytes(name: &str, ty: TensorType, dims: &[u64], exact: bool) -> u64 {
    let values = dims.iter().fold(1u64, |n, &d| n.saturating_mul(d));
    match (dims, Format::of_tensor(name, ty, exact)) {
        (&[input, _, ..], Some(format)) => {
            (values / input.max(1)).saturating_mul(format.row_bytes(input as usize) as u64)
        }
        // Vectors are f32, and so wide are numbers of tables.
        _ => values.saturating_mul(4),
    }
}

/// The parts of one row, to be filled.
struct RowOut<'a> {
    quants: &'a mut [u8],
    scales: &'a mut [u8],
    sub: &'a mut [u8],
}

/// Brings rows `first..first + count` of `input` values into device layout: quants, scales (f16, little endian) and scales
/// within blocks go to the beginning of `out`.
pub(crate) fn pack(
    tensor: &Tensor,
    format: Format,
    input: usize,
    first: usize,
    count: usize,
    out: &mut [&mut [u8]; 3],
) -> Result<(), BackendError> {
    let row_bytes = tensor.ty().bytes_of(input as u64) as usize;
    let bytes = &tensor.bytes()[first * row_bytes..(first + count) * row_bytes];
    let (q, s, b) = (format.quant_bytes(input), 2 * format.scales(input), format.sub_bytes(input));
    let [quants, scales, sub] = out;
    // Scales may be absent, and an empty slice has no chunks; so rows are cut off one by one.
    let (mut scales, mut sub) = (&mut scales[..count * s], &mut sub[..count * b]);
    let mut rows = Vec::with_capacity(count);
    for (bytes, quants) in bytes.chunks_exact(row_bytes).zip(quants.chunks_exact_mut(q)) {
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

/// Of each group of 32 weights the four codes, then a word of signs, of weight `j` of code `v` in bit `4 j + v`: so that
/// those of a code are one bit of every nibble. The scales of eight groups are nibbles of a word.
fn pack_iq2(blocks: &[BlockIq2Xxs], out: RowOut<'_>) {
    let parts = out.quants.chunks_exact_mut(64).zip(out.scales.chunks_exact_mut(2));
    for ((block, (quants, scale)), sub) in blocks.iter().zip(parts).zip(out.sub.as_chunks_mut::<4>().0) {
        let mut scales = 0;
        for (g, (group, to)) in block.groups.iter().zip(quants.as_chunks_mut::<8>().0).enumerate() {
            let [a, b, c, d, stored @ ..] = *group;
            let stored = u32::from_le_bytes(stored);
            scales |= (stored >> 28) << (4 * g);
            let signs = (0..4).map(|v| nibble_signs(stored >> (7 * v)) << v).sum::<u32>();
            let [e, f, g, h] = signs.to_le_bytes();
            *to = [a, b, c, d, e, f, g, h];
        }
        *sub = scales.to_le_bytes();
        scale.copy_from_slice(&block.d);
    }
}

/// The signs of eight weights in the lowest bits of eight nibbles, of the lowest seven bits of `stored`: the eighth makes
/// the number of minus signs even.
fn nibble_signs(stored: u32) -> u32 {
    const TABLE: [u32; 128] = {
        let mut table = [0; 128];
        let mut seven = 0u32;
        while seven < 128 {
            let eight = seven | (seven.count_ones() & 1) << 7;
            let mut j = 0;
            while j < 8 {
                table[seven as usize] |= ((eight >> j) & 1) << (4 * j);
                j += 1;
            }
            seven += 1;
        }
        table
    };
    TABLE[(stored & 127) as usize]
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

#[cfg(test)]
mod tests {
    use super::*;
    use ds4_gguf::{Gguf, Metadata, Part};
    use std::sync::Arc;

    fn file(name: &str, ty: TensorType, dims: &[u64], data: Vec<u8>) -> Gguf {
        let part = Part { name: name.into(), dims: dims.to_vec(), ty, data: Arc::new(data) };
        Gguf::from_parts("one tensor", Metadata::default(), vec![part]).unwrap()
    }

    #[test]
    fn bytes_are_those_of_packed_rows() {
        let types = [TensorType::F32, TensorType::F16, TensorType::Bf16, TensorType::Q8_0, TensorType::Mxfp4];
        let (input, rows) = (512, 3);
        for ty in types.into_iter().chain([TensorType::Iq2Xxs, TensorType::Q2K, TensorType::Q4K]) {
            for (name, exact) in
                [("a", false), ("a", true), ("token_embd.weight", false), ("hc_attn_fn", false)]
            {
                let data = vec![127; ty.bytes_of(rows * input) as usize];
                let file = file(name, ty, &[input, rows], data);
                let format = Format::of_tensor(name, ty, exact).unwrap();
                let [q, s, b] = [format.quant_bytes(512), 2 * format.scales(512), format.sub_bytes(512)]
                    .map(|row| vec![0; row * rows as usize]);
                let mut packed = [q, s, b];
                let bytes = packed.iter().map(Vec::len).sum::<usize>() as u64;
                let tensor = file.tensor(name).unwrap();
                let mut out = packed.each_mut().map(|part| &mut part[..]);
                pack(&tensor, format, input as usize, 0, rows as usize, &mut out).unwrap();
                assert_eq!(tensor_bytes(name, ty, &[input, rows], exact), bytes, "{name} {ty:?} {exact}");
            }
        }
        assert_eq!(tensor_bytes("norm", TensorType::F32, &[input], false), 4 * input);
    }

    #[test]
    fn packed_iq2_has_the_weights_of_its_blocks() {
        let mut block = BlockIq2Xxs { d: half::f16::ONE.to_le_bytes(), groups: [[0; 8]; 8] };
        let mut state = 1u32;
        for byte in block.groups.as_flattened_mut() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = (state >> 24) as u8;
        }
        let mut expected = [0.0; 256];
        dequantize_row(TensorType::Iq2Xxs, bytemuck::bytes_of(&block), &mut expected).unwrap();
        let (mut quants, mut scales, mut sub) = ([0; 64], [0; 2], [0; 4]);
        pack_iq2(&[block], RowOut { quants: &mut quants, scales: &mut scales, sub: &mut sub });
        let word = |at: usize| u32::from_le_bytes(*quants[at..].first_chunk().unwrap());
        for (i, &expected) in expected.iter().enumerate() {
            let (group, v, j) = (i / 32, i / 8 % 4, i % 8);
            let magnitude = ds4_quant::IQ2XXS_GRID[quants[8 * group + v] as usize][j];
            let minus = (word(8 * group + 4) >> (4 * j + v)) & 1 == 1;
            let scale = 0.125 * (2 * ((u32::from_le_bytes(sub) >> (4 * group)) & 15) + 1) as f32;
            let weight = scale * f32::from(magnitude) * if minus { -1.0 } else { 1.0 };
            assert_eq!(weight, expected, "weight {i}");
        }
    }
}
