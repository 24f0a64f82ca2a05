//! Sessions that are saved, restored and rewound.

use super::{MakeBackend, Outcome};
use crate::Fixture;
use crate::conformance::invariance::{Loaded, largest};
use ds4_model::cache::{Frontier, KvFormat, Layout, Part, Snapshot};
use ds4_model::{Backend, NoTap};
use std::error::Error;
use std::ops::Range;

/// Rows of a pass here: few, so that the window's ring wraps within a fixture.
const MAX_ROWS: usize = 32;
/// Chunks in which sessions grow.
const CHUNKS: [usize; 4] = [32, 9, 1, 1];
/// Tokens to go on with.
const MORE: usize = 40;
/// Lengths at which sessions are saved: empty groups, open ones of either compressor, full ones, and before
/// and after the ring of `window - 1 + MAX_ROWS` rows wraps.
const LENGTHS: [usize; 12] = [0, 1, 3, 4, 31, 66, 127, 128, 129, 163, 257, 278];

/// Both formats that store rows differently; the numeric mode that goes with them.
const MODES: [(bool, KvFormat); 2] = [(true, KvFormat::Plain), (false, KvFormat::Packed)];

fn same(got: &[f32], want: &[f32], what: &str, len: usize) -> Result<(), String> {
    if got.iter().zip(want).all(|(a, b)| a.to_bits() == b.to_bits()) && got.len() == want.len() {
        return Ok(());
    }
    Err(format!("{what} after {len} tokens changes what follows by {:.1e}", largest(got, want)))
}

/// Every part of a store's state takes as many bytes as the layout says.
fn lengths<B: Backend>(
    backend: &mut B,
    store: &B::Store,
    layout: &Layout,
    parts: impl Iterator<Item = (usize, Part, Range<usize>)>,
) -> Result<(), Box<dyn Error>> {
    for (layer, part, range) in parts {
        let mut bytes = Vec::new();
        let want = range.len() * layout.unit_bytes(layer, part);
        backend.export(store, layer, part, range, &mut bytes)?;
        if bytes.len() != want {
            let got = bytes.len();
            return Err(format!("layer {layer}: {part:?} exported as {got} bytes, expected {want}").into());
        }
    }
    Ok(())
}

/// A snapshot put into another session goes on with the same bits, and reads back as the same bytes.
pub(super) fn restore<M: MakeBackend>(maker: &M, fixture: &Fixture) -> Outcome {
    let tokens = fixture.tokens()?;
    let mut bytes = 0;
    for (exact, kv) in MODES {
        let mut m = Loaded::new(maker, fixture, exact, kv, MAX_ROWS)?;
        let mut second = m.backend.store(&m.layout)?;
        for len in LENGTHS {
            let mut first = m.backend.store(&m.layout)?;
            m.extend(&mut first, &tokens[..len], 0, &CHUNKS, &mut NoTap)?;
            let layout = m.layout.clone();
            let parts = layout.frontier(len).chain(layout.grown(0, len));
            lengths(&mut m.backend, &first, &layout, parts)?;
            let taken = Snapshot::take(&mut m.backend, &first, &layout, len)?;
            let more = &tokens[..len + MORE];
            let want = m.extend(&mut first, more, len, &CHUNKS, &mut NoTap)?;
            // The second session has been used, so that leftovers would show.
            taken.put(&mut m.backend, &mut second, &layout)?;
            if Snapshot::take(&mut m.backend, &second, &layout, len)? != taken {
                return Err(format!("a snapshot of {len} tokens reads back differently").into());
            }
            let got = m.extend(&mut second, more, len, &CHUNKS, &mut NoTap)?;
            same(&got, &want, "restoring", len)?;
            bytes = bytes.max(taken.size());
        }
    }
    Ok(format!("same bits at {} lengths; snapshots of up to {bytes} bytes", LENGTHS.len()))
}

/// A session that went another way and is put back to a frontier goes on with the same bits.
pub(super) fn rewind<M: MakeBackend>(maker: &M, fixture: &Fixture) -> Outcome {
    let tokens = fixture.tokens()?;
    for (exact, kv) in MODES {
        let mut m = Loaded::new(maker, fixture, exact, kv, MAX_ROWS)?;
        let layout = m.layout.clone();
        for len in LENGTHS {
            let mut store = m.backend.store(&layout)?;
            m.extend(&mut store, &tokens[..len], 0, &CHUNKS, &mut NoTap)?;
            let frontier = Frontier::take(&mut m.backend, &store, &layout, len)?;
            let more = &tokens[..len + MORE];
            let want = m.extend(&mut store, more, len, &CHUNKS, &mut NoTap)?;
            frontier.put(&mut m.backend, &mut store, &layout)?;
            let other: Vec<u32> = more[..len].iter().chain(more.iter().rev()).copied().collect();
            m.extend(&mut store, &other[..len + MORE], len, &CHUNKS, &mut NoTap)?;
            frontier.put(&mut m.backend, &mut store, &layout)?;
            let got = m.extend(&mut store, more, len, &CHUNKS, &mut NoTap)?;
            same(&got, &want, "rewinding", len)?;
        }
    }
    Ok(format!("same bits at {} lengths", LENGTHS.len()))
}
