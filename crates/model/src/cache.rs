//! The KV cache's layout and bookkeeping: plain integers, the same for every backend (A.10).
//!
//! A session at length `n` holds, per layer: the last `window` rows in a ring; all compressed rows (and, in
//! indexed layers, their index keys), append-only; and the projected inputs of the compressor's open window.
//! Everything but the compressed rows is the *frontier*. What is where follows from `n` alone.

use crate::{Backend, BackendError, LayerKind, Role, Shape};
use ds4_quant::{fp4, fp8};
use std::ops::Range;

/// How KV rows and index keys are rounded and stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvFormat {
    /// f32 as computed.
    Plain,
    /// Rounded as the model was trained (A.9), stored in f32: for proofs.
    Rounded,
    /// Rounded and stored in the trained precision: FP8 with a power-of-two scale per 64 channels, rotary
    /// channels in BF16; FP4 index keys with a scale per 32.
    Packed,
}

/// Encodes and decodes the rows of a cache; the scalar reference for every backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowCodec {
    /// Format of rows and keys.
    pub format: KvFormat,
    /// Width of a KV row.
    pub head_dim: usize,
    /// Rotary channels at its end.
    pub rotary: usize,
    /// Width of an index key.
    pub index_dim: usize,
}

impl RowCodec {
    fn fp8_channels(&self) -> usize {
        self.head_dim - self.rotary
    }

    /// Bytes of a stored KV row: for `Packed`, codes, then scales, then BF16.
    pub fn row_bytes(&self) -> usize {
        match self.format {
            KvFormat::Packed => {
                let n = self.fp8_channels();
                n + n.div_ceil(fp8::BLOCK) + 2 * self.rotary
            }
            _ => 4 * self.head_dim,
        }
    }

    /// Bytes of a stored index key: for `Packed`, codes, then scales.
    pub fn key_bytes(&self) -> usize {
        match self.format {
            KvFormat::Packed => self.index_dim / 2 + self.index_dim / fp4::BLOCK,
            _ => 4 * self.index_dim,
        }
    }

    /// Rounds a rotated KV row as the format says and stores it. `row` is scratch afterwards.
    pub fn store_row(&self, row: &mut [f32], out: &mut [u8]) {
        let n = self.fp8_channels();
        match self.format {
            KvFormat::Plain => store_f32(row, out),
            KvFormat::Rounded => {
                fp8::round(&mut row[..n]);
                store_f32(row, out);
            }
            KvFormat::Packed => {
                let (codes, rest) = out.split_at_mut(n);
                let (scales, rotary) = rest.split_at_mut(n.div_ceil(fp8::BLOCK));
                let blocks = row[..n].chunks(fp8::BLOCK).zip(codes.chunks_mut(fp8::BLOCK));
                for ((block, codes), scale) in blocks.zip(scales) {
                    *scale = fp8::pack_block(block, codes);
                }
                for (v, out) in row[n..].iter().zip(rotary.as_chunks_mut::<2>().0) {
                    *out = bf16(*v).to_le_bytes();
                }
            }
        }
    }

    /// Reads a stored KV row. Part of the caller, so that it is compiled for its registers.
    #[inline(always)]
    pub fn load_row(&self, bytes: &[u8], row: &mut [f32]) {
        if self.format != KvFormat::Packed {
            return load_f32(bytes, row);
        }
        let n = self.fp8_channels();
        let (codes, rest) = bytes.split_at(n);
        let (scales, rotary) = rest.split_at(n.div_ceil(fp8::BLOCK));
        let (values, tail) = row.split_at_mut(n);
        let blocks = codes.chunks(fp8::BLOCK).zip(values.chunks_mut(fp8::BLOCK));
        for ((codes, values), &scale) in blocks.zip(scales) {
            fp8::unpack_block(codes, scale, values);
        }
        for (v, b) in tail.iter_mut().zip(rotary.as_chunks::<2>().0) {
            *v = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
        }
    }

    /// Rounds an indexer query in place (A.9, step 2), so that it meets keys of the same precision.
    pub fn round_query(&self, query: &mut [f32]) {
        if self.format != KvFormat::Plain {
            fp4::hadamard(query);
            fp4::round(query);
        }
    }

    /// Rounds a rotated index key as the format says and stores it. `key` is scratch afterwards.
    pub fn store_key(&self, key: &mut [f32], out: &mut [u8]) {
        match self.format {
            KvFormat::Plain => store_f32(key, out),
            KvFormat::Rounded => {
                self.round_query(key);
                store_f32(key, out);
            }
            KvFormat::Packed => {
                fp4::hadamard(key);
                let (codes, scales) = out.split_at_mut(self.index_dim / 2);
                let blocks = key.chunks(fp4::BLOCK).zip(codes.chunks_mut(fp4::BLOCK / 2));
                for ((block, codes), scale) in blocks.zip(scales) {
                    *scale = fp4::pack_block(block, codes);
                }
            }
        }
    }

    /// Reads a stored index key.
    pub fn load_key(&self, bytes: &[u8], key: &mut [f32]) {
        if self.format != KvFormat::Packed {
            return load_f32(bytes, key);
        }
        let (codes, scales) = bytes.split_at(self.index_dim / 2);
        let blocks = codes.chunks(fp4::BLOCK / 2).zip(key.chunks_mut(fp4::BLOCK));
        for ((codes, values), &scale) in blocks.zip(scales) {
            fp4::unpack_block(codes, scale, values);
        }
    }
}

fn store_f32(values: &[f32], out: &mut [u8]) {
    for (o, v) in out.as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *o = v.to_le_bytes();
    }
}

fn load_f32(bytes: &[u8], out: &mut [f32]) {
    for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *o = f32::from_le_bytes(*b);
    }
}

/// Nearest BF16, ties to even.
fn bf16(v: f32) -> u16 {
    let bits = v.to_bits();
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// Sizes of one session's cache.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    /// Row formats.
    pub codec: RowCodec,
    /// Kinds of the layers, the MTP block's window layer last if there is one.
    pub layers: Vec<LayerKind>,
    /// Tokens a row can look back, itself included.
    pub window: usize,
    /// Slots of the window ring: a pass may push this many rows minus `window - 1` before it attends.
    pub ring: usize,
    /// Most tokens a session can hold.
    pub context: usize,
}

/// A part of one layer's cache, for copying it out and in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Window rows, addressed by position.
    Window,
    /// Compressed rows, addressed by row.
    Rows,
    /// Index keys, addressed by row.
    Keys,
    /// Projected compressor inputs (value, gate), addressed by position.
    Open(Role),
}

impl Layout {
    /// The layout for a model whose passes have up to `max_rows` rows.
    pub fn new(shape: &Shape, format: KvFormat, mtp: bool, context: usize, max_rows: usize) -> Self {
        let mut layers = shape.layers.clone();
        layers.extend(mtp.then_some(LayerKind::Window));
        Layout {
            codec: RowCodec {
                format,
                head_dim: shape.head_dim,
                rotary: shape.rotary,
                index_dim: shape.index_dim,
            },
            layers,
            window: shape.window,
            ring: shape.window - 1 + max_rows,
            context,
        }
    }

    /// Compressed rows a layer can hold.
    pub fn row_capacity(&self, layer: usize) -> usize {
        self.layers[layer].ratio().map_or(0, |r| self.context / r)
    }

    /// Channels of a compressor's projections: twice the row where windows overlap.
    pub fn open_width(&self, layer: usize, role: Role) -> usize {
        let row = match role {
            Role::Rows => self.codec.head_dim,
            Role::Keys => self.codec.index_dim,
        };
        match self.layers[layer] {
            LayerKind::Indexed => 2 * row,
            _ => row,
        }
    }

    /// Tokens whose projections a compressor may need at once: the open window, and the one before it where
    /// windows overlap.
    pub fn open_slots(&self, layer: usize) -> usize {
        match self.layers[layer] {
            LayerKind::Window => 0,
            LayerKind::Indexed => 8,
            LayerKind::Pooled { ratio } => ratio,
        }
    }

    /// Bytes of one unit of a part.
    pub fn unit_bytes(&self, layer: usize, part: Part) -> usize {
        match part {
            Part::Window | Part::Rows => self.codec.row_bytes(),
            Part::Keys => self.codec.key_bytes(),
            Part::Open(role) => 2 * 4 * self.open_width(layer, role),
        }
    }

    /// Compressor roles of a layer.
    pub fn roles(&self, layer: usize) -> &'static [Role] {
        match self.layers[layer] {
            LayerKind::Window => &[],
            LayerKind::Indexed => &[Role::Rows, Role::Keys],
            LayerKind::Pooled { .. } => &[Role::Rows],
        }
    }

    /// Units a store allocates for a part.
    pub fn capacity(&self, layer: usize, part: Part) -> usize {
        match part {
            Part::Window => self.ring,
            Part::Rows => self.row_capacity(layer),
            Part::Keys if self.layers[layer] == LayerKind::Indexed => self.row_capacity(layer),
            Part::Keys => 0,
            Part::Open(role) if self.roles(layer).contains(&role) => self.open_slots(layer),
            Part::Open(_) => 0,
        }
    }

    /// Bytes of a unit of a part, if a store has room for the units of a range: those of rings are addressed by
    /// position.
    pub fn check(&self, layer: usize, part: Part, range: &Range<usize>) -> Result<usize, BackendError> {
        let fits = layer < self.layers.len()
            && match part {
                Part::Window | Part::Open(_) => range.len() <= self.capacity(layer, part),
                Part::Rows | Part::Keys => range.end <= self.capacity(layer, part),
            };
        if fits {
            return Ok(self.unit_bytes(layer, part));
        }
        Err(BackendError::new(format!(
            "layer {layer} has no {part:?} {range:?}: the saved session is longer than this one's context"
        )))
    }

    /// The same for units that come as bytes.
    pub fn check_bytes(
        &self,
        layer: usize,
        part: Part,
        range: &Range<usize>,
        bytes: &[u8],
    ) -> Result<usize, BackendError> {
        let unit = self.check(layer, part, range)?;
        if bytes.len() == unit * range.len() {
            return Ok(unit);
        }
        Err(BackendError::new(format!(
            "{} bytes for {part:?} {range:?} of layer {layer}, expected {}",
            bytes.len(),
            unit * range.len()
        )))
    }

    /// Bytes of a session's store.
    pub fn bytes(&self) -> u64 {
        let parts = [Part::Window, Part::Rows, Part::Keys, Part::Open(Role::Rows), Part::Open(Role::Keys)];
        (0..self.layers.len())
            .flat_map(|l| parts.map(|p| (self.capacity(l, p) * self.unit_bytes(l, p)) as u64))
            .sum()
    }

    /// The parts of the frontier of a session of `len` tokens.
    pub fn frontier(&self, len: usize) -> impl Iterator<Item = (usize, Part, Range<usize>)> + '_ {
        (0..self.layers.len()).flat_map(move |layer| {
            let open =
                self.roles(layer).iter().map(move |&role| (layer, Part::Open(role), self.open(layer, len)));
            std::iter::once((layer, Part::Window, len.saturating_sub(self.window)..len)).chain(open)
        })
    }

    /// Positions whose projections a compressor still needs at length `len`.
    fn open(&self, layer: usize, len: usize) -> Range<usize> {
        match self.layers[layer] {
            LayerKind::Window => 0..0,
            LayerKind::Indexed => (len / 4 * 4).saturating_sub(4)..len,
            LayerKind::Pooled { ratio } => len / ratio * ratio..len,
        }
    }

    /// The compressed rows that growing from `from` to `to` tokens adds.
    pub fn grown(&self, from: usize, to: usize) -> impl Iterator<Item = (usize, Part, Range<usize>)> + '_ {
        (0..self.layers.len()).flat_map(move |layer| {
            let range = self.layers[layer].ratio().map_or(0..0, |r| from / r..to / r);
            let keys = (self.layers[layer] == LayerKind::Indexed).then(|| (layer, Part::Keys, range.clone()));
            std::iter::once((layer, Part::Rows, range)).chain(keys)
        })
    }
}

/// What a session needs besides its compressed rows to go on from a length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontier {
    /// Tokens in the session.
    pub len: usize,
    bytes: Vec<u8>,
}

impl Frontier {
    /// Copies the frontier of a store of `len` tokens.
    pub fn take<B: Backend>(
        backend: &mut B,
        store: &B::Store,
        layout: &Layout,
        len: usize,
    ) -> Result<Self, BackendError> {
        let mut bytes = Vec::new();
        export_all(backend, store, layout.frontier(len), &mut bytes)?;
        Ok(Frontier { len, bytes })
    }

    /// The frontier whose bytes were saved.
    pub fn from_bytes(len: usize, bytes: Vec<u8>) -> Self {
        Frontier { len, bytes }
    }

    /// Its bytes, in the order of [`Layout::frontier`].
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Puts the frontier back. The store must still hold the compressed rows of the first `len` tokens.
    pub fn put<B: Backend>(
        &self,
        backend: &mut B,
        store: &mut B::Store,
        layout: &Layout,
    ) -> Result<(), BackendError> {
        import_all(backend, store, layout, layout.frontier(self.len), &self.bytes)
    }

    /// Bytes held.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }
}

/// All of a session's state, in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    frontier: Frontier,
    rows: Vec<u8>,
}

impl Snapshot {
    /// Copies the state of a store of `len` tokens.
    pub fn take<B: Backend>(
        backend: &mut B,
        store: &B::Store,
        layout: &Layout,
        len: usize,
    ) -> Result<Self, BackendError> {
        let frontier = Frontier::take(backend, store, layout, len)?;
        let mut rows = Vec::new();
        export_all(backend, store, layout.grown(0, len), &mut rows)?;
        Ok(Snapshot { frontier, rows })
    }

    /// Puts the state into a store of the same layout.
    pub fn put<B: Backend>(
        &self,
        backend: &mut B,
        store: &mut B::Store,
        layout: &Layout,
    ) -> Result<(), BackendError> {
        import_all(backend, store, layout, layout.grown(0, self.len()), &self.rows)?;
        self.frontier.put(backend, store, layout)
    }

    /// Tokens in the session.
    pub fn len(&self) -> usize {
        self.frontier.len
    }

    /// Bytes held.
    pub fn size(&self) -> usize {
        self.frontier.size() + self.rows.len()
    }

    /// Whether the session had no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Bytes of parts.
pub fn bytes_of(layout: &Layout, parts: impl Iterator<Item = (usize, Part, Range<usize>)>) -> usize {
    parts.map(|(layer, part, range)| range.len() * layout.unit_bytes(layer, part)).sum()
}

/// Copies parts out of a store, one behind the other.
///
/// # Errors
/// The backend's.
pub fn export_all<B: Backend>(
    backend: &mut B,
    store: &B::Store,
    parts: impl Iterator<Item = (usize, Part, Range<usize>)>,
    out: &mut Vec<u8>,
) -> Result<(), BackendError> {
    for (layer, part, range) in parts {
        backend.export(store, layer, part, range, out)?;
    }
    Ok(())
}

/// The inverse of [`export_all`].
///
/// # Errors
/// The backend's, and bytes that are too few.
pub fn import_all<B: Backend>(
    backend: &mut B,
    store: &mut B::Store,
    layout: &Layout,
    parts: impl Iterator<Item = (usize, Part, Range<usize>)>,
    mut bytes: &[u8],
) -> Result<(), BackendError> {
    for (layer, part, range) in parts {
        let Some((head, rest)) = bytes.split_at_checked(range.len() * layout.unit_bytes(layer, part)) else {
            return Err(BackendError::new("a saved session is shorter than its layout says"));
        };
        backend.import(store, layer, part, range, head)?;
        bytes = rest;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flash(format: KvFormat, context: usize) -> Layout {
        let layers = (0..43)
            .map(|l| match l {
                0 | 1 => LayerKind::Window,
                l if l % 2 == 0 => LayerKind::Indexed,
                _ => LayerKind::Pooled { ratio: 128 },
            })
            .collect();
        let codec = RowCodec { format, head_dim: 512, rotary: 64, index_dim: 128 };
        Layout { codec, layers, window: 128, ring: 128, context }
    }

    fn compressed_bytes(layout: &Layout) -> usize {
        layout.grown(0, layout.context).map(|(l, p, r)| r.len() * layout.unit_bytes(l, p)).sum()
    }

    /// The figures of architecture A.13.
    #[test]
    fn flash_sizes() {
        let packed = flash(KvFormat::Packed, 1_000_000);
        assert_eq!((packed.codec.row_bytes(), packed.codec.key_bytes()), (583, 68));
        assert_eq!(compressed_bytes(&packed) / 1_000_000, 3508);
        assert_eq!(compressed_bytes(&flash(KvFormat::Rounded, 1_000_000)) / 1_000_000, 13759);
        let window = 43 * 128 * packed.codec.row_bytes();
        assert_eq!(window / 100_000, 32);
    }

    #[test]
    fn frontier_is_what_later_tokens_need() {
        let layout = flash(KvFormat::Packed, 4096);
        let parts: Vec<_> = layout.frontier(130).filter(|(l, ..)| *l == 2 || *l == 3).collect();
        assert_eq!(
            parts,
            [
                (2, Part::Window, 2..130),
                (2, Part::Open(Role::Rows), 124..130),
                (2, Part::Open(Role::Keys), 124..130),
                (3, Part::Window, 2..130),
                (3, Part::Open(Role::Rows), 128..130),
            ]
        );
        assert!(layout.frontier(2).all(|(_, _, r)| r == (0..2)));
        let grown: Vec<_> = layout.grown(127, 256).filter(|(l, ..)| *l == 2 || *l == 3).collect();
        assert_eq!(grown, [(2, Part::Rows, 31..64), (2, Part::Keys, 31..64), (3, Part::Rows, 0..2)]);
    }
}
