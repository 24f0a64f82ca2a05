//! The caches of sessions: regions of an arena of words on the device.

use crate::buffer::Buffer;
use crate::kernels::cache::{
    KEY_SCALES, KEYS, OPEN_KEYS, OPEN_ROWS, PARTS, ROW_SCALES, ROWS, Rounding, RowShape, WINDOW,
    WINDOW_SCALES,
};
use crate::kernels::common::Real;
use cubecl::client::Client;
use ds4_model::cache::{KvFormat, Layout, Part, RowCodec};
use ds4_model::{BackendError, Role};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// One device buffer that holds the stores of many sessions, so that all can take part in one launch.
pub(crate) struct Arena {
    pub(crate) buffer: Buffer,
    words: u32,
    /// Free ranges of words, ascending.
    free: Mutex<Vec<Range<u32>>>,
}

/// Regions begin at whole 16-byte vectors, many of them, for any device's alignment.
const ALIGN: u32 = 64;

impl Arena {
    pub(crate) fn new(client: &Client, words: u32) -> Arc<Self> {
        let buffer = Buffer::new(client, 4 * u64::from(words));
        Arc::new(Arena { buffer, words, free: Mutex::new(std::iter::once(0..words).collect()) })
    }

    /// First free range of so many words.
    fn take(&self, words: u32) -> Option<u32> {
        let mut free = self.free.lock().ok()?;
        let i = free.iter().position(|r| r.len() >= words as usize)?;
        let start = free[i].start;
        free[i].start += words;
        if free[i].is_empty() {
            free.remove(i);
        }
        Some(start)
    }

    fn give_back(&self, range: Range<u32>) {
        let Ok(mut free) = self.free.lock() else { return };
        let i = free.partition_point(|r| r.start < range.start);
        free.insert(i, range);
        // Neighbours grow together.
        free.dedup_by(|next, before| {
            let touch = before.end == next.start;
            if touch {
                before.end = next.end;
            }
            touch
        });
    }

    /// Whether nothing lies in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.free.lock().is_ok_and(|f| f.iter().map(|r| r.end - r.start).sum::<u32>() == self.words)
    }
}

/// Sizes of rows on the device, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) row: RowShape,
    pub(crate) key: RowShape,
}

impl Sizes {
    pub(crate) fn new(codec: &RowCodec, eps: f32) -> Self {
        let (d, r, id) = (codec.head_dim, codec.rotary, codec.index_dim);
        let rounding = match codec.format {
            KvFormat::Plain => Rounding::None,
            KvFormat::Rounded => Rounding::Float,
            KvFormat::Packed => Rounding::Packed,
        };
        let packed = rounding == Rounding::Packed;
        let words = |packed_words: usize, width: usize| if packed { packed_words } else { width };
        let scales = |blocks: usize| if packed { blocks.div_ceil(4) } else { 0 };
        let shape = |width, keys, words: usize, scale_words| RowShape {
            width,
            rotary: r,
            keys,
            rounding,
            // Whole 16-byte vectors.
            words: words.next_multiple_of(4),
            scale_words,
            eps: Real::new(eps),
        };
        Sizes {
            row: shape(d, false, words((d - r) / 4 + r / 2, d), scales((d - r).div_ceil(64))),
            key: shape(id, true, words(id / 8, id), scales(id / 32)),
        }
    }
}

/// One session's cache.
pub struct Store {
    pub(crate) arena: Arc<Arena>,
    /// First word in the arena.
    pub(crate) base: u32,
    words: u32,
    pub(crate) layout: Layout,
    sizes: Sizes,
    /// Offsets of the parts, as in the table on the device.
    offsets: Vec<u32>,
}

impl Drop for Store {
    fn drop(&mut self) {
        self.arena.give_back(self.base..self.base + self.words);
    }
}

/// Where each part of each layer of a store lies, and how many words there are.
fn offsets(layout: &Layout, sizes: &Sizes) -> Result<(Vec<u32>, u32), BackendError> {
    let layers = layout.layers.len();
    let mut offsets = vec![0; layers * PARTS as usize];
    let mut end = offsets.len() as u64;
    for l in 0..layers {
        let open = |role| {
            let slots = layout.capacity(l, Part::Open(role));
            slots * 2 * layout.open_width(l, role)
        };
        let (window, rows) = (layout.capacity(l, Part::Window), layout.capacity(l, Part::Rows));
        let keys = layout.capacity(l, Part::Keys);
        let parts = [
            (WINDOW, window * sizes.row.words),
            (WINDOW_SCALES, window * sizes.row.scale_words),
            (ROWS, rows * sizes.row.words),
            (ROW_SCALES, rows * sizes.row.scale_words),
            (KEYS, keys * sizes.key.words),
            (KEY_SCALES, keys * sizes.key.scale_words),
            (OPEN_ROWS, open(Role::Rows)),
            (OPEN_KEYS, if keys > 0 { open(Role::Keys) } else { 0 }),
        ];
        for (part, words) in parts {
            end = end.next_multiple_of(4);
            offsets[l * PARTS as usize + part as usize] = u32::try_from(end).unwrap_or(u32::MAX);
            end += words as u64;
        }
    }
    match u32::try_from(end.next_multiple_of(u64::from(ALIGN))) {
        Ok(words) => Ok((offsets, words)),
        Err(_) => Err(BackendError::new(format!(
            "a session of {} tokens needs {:.1} GiB of cache on the GPU, at most 16 GiB are possible: lower --ctx",
            layout.context,
            end as f64 * 4.0 / (1u64 << 30) as f64
        ))),
    }
}

impl Store {
    /// Words that a store of a layout takes.
    pub(crate) fn words(layout: &Layout, sizes: &Sizes) -> Result<u32, BackendError> {
        Ok(offsets(layout, sizes)?.1)
    }

    /// An empty store in the arena, if there is room.
    pub(crate) fn new(
        client: &Client,
        arena: &Arc<Arena>,
        layout: &Layout,
        sizes: Sizes,
    ) -> Result<Option<Self>, BackendError> {
        let (offsets, words) = offsets(layout, &sizes)?;
        let Some(base) = arena.take(words) else { return Ok(None) };
        arena.buffer.write(client, 4 * u64::from(base), bytemuck::cast_slice(&offsets).to_vec());
        Ok(Some(Store { arena: Arc::clone(arena), base, words, layout: layout.clone(), sizes, offsets }))
    }

    /// First word of a unit of a part, words of it, and where its scales are.
    fn place(&self, layer: usize, part: Part, i: usize) -> (u64, usize, u64, usize) {
        let at = |p: u32| u64::from(self.base) + u64::from(self.offsets[layer * PARTS as usize + p as usize]);
        let slot = |n: usize| (i % n.max(1)) as u64;
        match part {
            Part::Window | Part::Rows => {
                let (p, s, i) = match part {
                    Part::Window => (WINDOW, WINDOW_SCALES, slot(self.layout.ring)),
                    _ => (ROWS, ROW_SCALES, i as u64),
                };
                let (w, sw) = (self.sizes.row.words, self.sizes.row.scale_words);
                (at(p) + i * w as u64, w, at(s) + i * sw as u64, sw)
            }
            Part::Keys => {
                let (w, sw) = (self.sizes.key.words, self.sizes.key.scale_words);
                (at(KEYS) + (i * w) as u64, w, at(KEY_SCALES) + (i * sw) as u64, sw)
            }
            Part::Open(role) => {
                let p = if role == Role::Rows { OPEN_ROWS } else { OPEN_KEYS };
                let w = 2 * self.layout.open_width(layer, role);
                (at(p) + slot(self.layout.open_slots(layer)) * w as u64, w, 0, 0)
            }
        }
    }

    /// Runs of units that lie side by side: rings wrap.
    fn stretches(&self, layer: usize, part: Part, range: Range<usize>) -> Vec<Range<usize>> {
        let ring = match part {
            Part::Window | Part::Open(_) => self.layout.capacity(layer, part).max(1),
            Part::Rows | Part::Keys => range.end.max(1),
        };
        let mut stretches = Vec::new();
        let mut start = range.start;
        while start < range.end {
            let end = range.end.min((start / ring + 1) * ring);
            stretches.push(start..end);
            start = end;
        }
        stretches
    }

    /// Copies units out, in the layout's byte format.
    pub(crate) fn export(
        &self,
        client: &Client,
        layer: usize,
        part: Part,
        range: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), BackendError> {
        let unit = self.layout.check(layer, part, &range)?;
        for stretch in self.stretches(layer, part, range) {
            let (at, words, scales_at, scale_words) = self.place(layer, part, stretch.start);
            let n = stretch.len() as u64;
            let main = self.arena.buffer.read(client, 4 * at, 4 * n * words as u64)?;
            if scale_words == 0 {
                main.chunks_exact(4 * words).for_each(|row| out.extend_from_slice(&row[..unit]));
                continue;
            }
            let scales = self.arena.buffer.read(client, 4 * scales_at, 4 * n * scale_words as u64)?;
            for (row, scales) in main.chunks_exact(4 * words).zip(scales.chunks_exact(4 * scale_words)) {
                let (codes, blocks, rest) = self.split(part);
                out.extend_from_slice(&row[..codes]);
                out.extend_from_slice(&scales[..blocks]);
                out.extend_from_slice(&row[codes..codes + rest]);
            }
        }
        Ok(())
    }

    /// Bytes of codes, scales and rotary channels of a packed unit.
    fn split(&self, part: Part) -> (usize, usize, usize) {
        let c = &self.layout.codec;
        match part {
            Part::Keys => (c.index_dim / 2, c.index_dim / 32, 0),
            _ => (c.head_dim - c.rotary, (c.head_dim - c.rotary).div_ceil(64), 2 * c.rotary),
        }
    }

    /// The inverse of [`Store::export`].
    pub(crate) fn import(
        &mut self,
        client: &Client,
        layer: usize,
        part: Part,
        range: Range<usize>,
        bytes: &[u8],
    ) -> Result<(), BackendError> {
        let unit = self.layout.check_bytes(layer, part, &range, bytes)?;
        let mut bytes = bytes;
        for stretch in self.stretches(layer, part, range) {
            let (mine, rest) = bytes.split_at(unit * stretch.len());
            bytes = rest;
            let (at, words, scales_at, scale_words) = self.place(layer, part, stretch.start);
            let mut main = vec![0; 4 * words * stretch.len()];
            let mut scales = vec![0; 4 * scale_words * stretch.len()];
            for (i, unit) in mine.chunks_exact(unit.max(1)).enumerate() {
                let row = &mut main[4 * words * i..4 * words * (i + 1)];
                if scale_words == 0 {
                    row[..unit.len()].copy_from_slice(unit);
                    continue;
                }
                let (codes, blocks, rest) = self.split(part);
                row[..codes].copy_from_slice(&unit[..codes]);
                row[codes..codes + rest].copy_from_slice(&unit[codes + blocks..]);
                scales[4 * scale_words * i..][..blocks].copy_from_slice(&unit[codes..codes + blocks]);
            }
            self.arena.buffer.write(client, 4 * at, main);
            if scale_words > 0 {
                self.arena.buffer.write(client, 4 * scales_at, scales);
            }
        }
        Ok(())
    }
}
