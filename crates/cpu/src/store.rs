//! The cache of one session, in host memory.

use ds4_model::cache::{Layout, Part};
use ds4_model::{BackendError, Role};
use std::ops::Range;

/// One session's cache. The large parts are zeroed pages of the system: what is not used takes no memory.
pub struct Store {
    pub(crate) layout: Layout,
    pub(crate) layers: Vec<LayerStore>,
}

pub(crate) struct LayerStore {
    /// Ring of `layout.ring` rows; position `p` is at slot `p % ring`.
    pub(crate) window: Vec<u8>,
    /// Compressed rows.
    pub(crate) rows: Vec<u8>,
    /// Index keys.
    pub(crate) keys: Vec<u8>,
    /// Ring of compressor projections, per position `[value, gate]`, for rows and for keys.
    pub(crate) open: [Vec<f32>; 2],
}

fn role_index(role: Role) -> usize {
    match role {
        Role::Rows => 0,
        Role::Keys => 1,
    }
}

impl LayerStore {
    pub(crate) fn open(&self, role: Role) -> &[f32] {
        &self.open[role_index(role)]
    }

    /// The encoded rows or keys of a role, and its open ring.
    pub(crate) fn parts_mut(&mut self, role: Role) -> (&mut Vec<u8>, &mut Vec<f32>) {
        match role {
            Role::Rows => (&mut self.rows, &mut self.open[0]),
            Role::Keys => (&mut self.keys, &mut self.open[1]),
        }
    }
}

impl Store {
    pub(crate) fn new(layout: &Layout) -> Self {
        let layers = (0..layout.layers.len()).map(|l| {
            let bytes = |part| vec![0u8; layout.capacity(l, part) * layout.unit_bytes(l, part)];
            let open = |role| {
                vec![0f32; layout.capacity(l, Part::Open(role)) * layout.unit_bytes(l, Part::Open(role)) / 4]
            };
            LayerStore {
                window: bytes(Part::Window),
                rows: bytes(Part::Rows),
                keys: bytes(Part::Keys),
                open: [open(Role::Rows), open(Role::Keys)],
            }
        });
        Store { layout: layout.clone(), layers: layers.collect() }
    }

    /// Bytes allocated (address space; unused pages take no memory).
    pub fn bytes(&self) -> usize {
        let layer = |l: &LayerStore| {
            l.window.len() + l.rows.len() + l.keys.len() + l.open.iter().map(|o| 4 * o.len()).sum::<usize>()
        };
        self.layers.iter().map(layer).sum()
    }

    pub(crate) fn export(
        &self,
        layer: usize,
        part: Part,
        range: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), BackendError> {
        let unit = self.layout.check(layer, part, &range)?;
        let l = &self.layers[layer];
        let slots = self.layout.capacity(layer, part).max(1);
        for i in range {
            let at = i % slots * unit;
            match part {
                Part::Window => out.extend_from_slice(&l.window[at..at + unit]),
                Part::Rows => out.extend_from_slice(&l.rows[i * unit..(i + 1) * unit]),
                Part::Keys => out.extend_from_slice(&l.keys[i * unit..(i + 1) * unit]),
                Part::Open(role) => {
                    out.extend(l.open(role)[at / 4..(at + unit) / 4].iter().flat_map(|v| v.to_le_bytes()));
                }
            }
        }
        Ok(())
    }

    pub(crate) fn import(
        &mut self,
        layer: usize,
        part: Part,
        range: Range<usize>,
        bytes: &[u8],
    ) -> Result<(), BackendError> {
        let unit = self.layout.check_bytes(layer, part, &range, bytes)?;
        let slots = self.layout.capacity(layer, part).max(1);
        let l = &mut self.layers[layer];
        for (i, bytes) in range.zip(bytes.chunks_exact(unit.max(1))) {
            let at = i % slots * unit;
            match part {
                Part::Window => l.window[at..at + unit].copy_from_slice(bytes),
                Part::Rows => l.rows[i * unit..(i + 1) * unit].copy_from_slice(bytes),
                Part::Keys => l.keys[i * unit..(i + 1) * unit].copy_from_slice(bytes),
                Part::Open(role) => {
                    let open = &mut l.parts_mut(role).1[at / 4..(at + unit) / 4];
                    for (v, b) in open.iter_mut().zip(bytes.as_chunks::<4>().0) {
                        *v = f32::from_le_bytes(*b);
                    }
                }
            }
        }
        Ok(())
    }
}
