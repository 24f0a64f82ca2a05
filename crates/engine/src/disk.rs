//! Sessions and the KV store: what is saved when, and what is loaded instead of computed.

use crate::session::Kept;
use crate::{Engine, Error, Session};
use ds4_gguf::Gguf;
use ds4_kvstore::{Block, Fingerprint, Found, Meta, Missing, Names, Section, Store};
use ds4_model::cache::{Frontier, KvFormat, Layout, bytes_of, export_all, import_all};
use ds4_model::{Backend, BackendError};
use sha1::{Digest, Sha1};
use std::sync::Arc;

/// Version of what the cache's bytes mean: rows, their order, and what a frontier is.
const LAYOUT: u32 = 1;
/// Bytes that are looked at in each of two places of every tensor.
const SAMPLE: usize = 4096;
/// Tokens that loading must save to be worth it.
const WORTH_LOADING: usize = 32;

/// What the state of a model's sessions depends on: weights and their types, by what the files say and by samples of every
/// tensor, the format of the cache, and the numeric mode.
pub fn fingerprint(file: &Gguf, mtp: Option<&Gguf>, kv: KvFormat, exact: bool) -> Fingerprint {
    let mut sha = Sha1::new();
    let mode = format!("ds4 cache {LAYOUT} {kv:?} {}\n", if exact { "exact" } else { "default" });
    sha.update(mode);
    for file in std::iter::once(file).chain(mtp) {
        for info in file.tensors() {
            sha.update(format!("{} {:?} {:?}\n", info.name, info.ty, info.dims));
            let Some(tensor) = file.tensor(&info.name) else { continue };
            let bytes = tensor.bytes();
            for at in [0, bytes.len() / 2] {
                sha.update(&bytes[at..(at + SAMPLE).min(bytes.len())]);
            }
        }
    }
    Fingerprint(sha.finalize().into())
}

/// Where an engine keeps state on disk.
#[derive(Clone)]
pub struct Disk {
    /// The store, which others may use too.
    pub store: Arc<Store>,
    /// Which model's state the engine's is.
    pub fingerprint: Fingerprint,
    /// Tokens by which a place must be ahead of the one saved before it.
    pub save_every: usize,
}

impl<B: Backend> Engine<B> {
    /// Keeps state on disk from now on.
    pub fn set_disk(&mut self, disk: Disk) {
        self.disk = Some(disk);
    }

    /// Where state is kept on disk.
    pub fn disk(&self) -> Option<&Disk> {
        self.disk.as_ref()
    }

    /// Keeps the session's present place on disk, however near the one before is: nobody goes on with it here, and there are
    /// notes that would be lost.
    pub fn keep_last(&mut self, session: &mut Session<B>) -> Result<(), Error> {
        self.keep(session)?;
        if session.notes.is_empty() { Ok(()) } else { self.save(session, 1) }
    }

    /// Saves the session's newest kept place, which is where it stands, if it is so many tokens from the one before.
    pub(crate) fn save(&mut self, session: &mut Session<B>, least: usize) -> Result<(), Error> {
        let Some(disk) = &self.disk else { return Ok(()) };
        let end = session.tokens.len();
        let Some(kept) = session.kept.last().filter(|k| k.frontier.len == end) else { return Ok(()) };
        // What was saved may be gone: others share the store, and its room is limited.
        let is_there = |len: &usize| disk.store.has(Names::new(&disk.fingerprint).of(&session.tokens, *len));
        while session.saved.last().is_some_and(|len| !is_there(len)) {
            session.saved.pop();
        }
        let start = session.saved.last().copied().unwrap_or(0);
        if end < start + least || !disk.store.is_enabled() {
            return Ok(());
        }
        let mut rows = Vec::new();
        export_all(&mut self.backend, &session.store, session.layout.grown(start, end), &mut rows)?;
        let block = Block {
            tokens: session.tokens.clone(),
            start,
            rows,
            frontier: kept.frontier.bytes().to_vec(),
            logits: kept.logits.iter().flat_map(|l| l.to_le_bytes()).collect(),
            notes: std::mem::take(&mut session.notes),
        };
        disk.store.put(disk.fingerprint, block);
        session.saved.push(end);
        Ok(())
    }

    /// Brings a session that holds a prefix of `prompt` further along it by what is on disk; returns the tokens gained, and
    /// why there are no more.
    pub(crate) fn load_saved(
        &mut self,
        session: &mut Session<B>,
        prompt: &[u32],
    ) -> Result<(usize, Option<Missing>), Error> {
        let Some(disk) = self.disk.clone() else { return Ok((0, None)) };
        let before = session.tokens.len();
        // A block that turns out to be no good is gone from the next chain.
        loop {
            let Found { mut chain, missing } = disk.store.find(disk.fingerprint, prompt);
            // At the prompt's end logits are needed.
            if chain.last().is_some_and(|m| m.end == prompt.len() && m.len_of(Section::Logits) == 0) {
                chain.pop();
            }
            let Some(end) = chain.last().map(|m| m.end).filter(|&end| end >= before + WORTH_LOADING) else {
                return Ok((0, Some(missing)));
            };
            if self.load_chain(session, &disk.store, &chain, before)? {
                session.tokens.extend_from_slice(&prompt[before..end]);
                session.saved = chain.iter().map(|m| m.end).collect();
                disk.store.used(&chain);
                return Ok((end - before, Some(missing)));
            }
        }
    }

    /// Loads the blocks of a chain that go beyond `before`; false if one is no good. The session's tokens are still those
    /// from before, and its state too unless all went well.
    fn load_chain(
        &mut self,
        session: &mut Session<B>,
        store: &Store,
        chain: &[Meta],
        before: usize,
    ) -> Result<bool, Error> {
        let layout = Arc::clone(&session.layout);
        let Some(last) = chain.last() else { return Ok(false) };
        let (Ok(frontier), Ok(logits)) =
            (store.read(last, Section::Frontier), store.read(last, Section::Logits))
        else {
            return Ok(false);
        };
        check_len(&layout, layout.frontier(last.end), &frontier)?;
        for meta in chain.iter().filter(|m| m.end > before) {
            let Ok(rows) = store.read(meta, Section::Rows) else { return Ok(false) };
            // Rows beyond a session's tokens mean nothing to it, so nothing is lost if the next block is no good.
            import_all(
                &mut self.backend,
                &mut session.store,
                &layout,
                layout.grown(meta.start, meta.end),
                &rows,
            )?;
        }
        let frontier = Frontier::from_bytes(last.end, frontier);
        frontier.put(&mut self.backend, &mut session.store, &layout)?;
        let (floats, _) = logits.as_chunks::<4>();
        let logits: Vec<f32> = floats.iter().map(|b| f32::from_le_bytes(*b)).collect();
        session.clear_logits();
        session.logits.clone_from(&logits);
        session.keep(Kept { frontier, logits });
        Ok(true)
    }
}

fn check_len(
    layout: &Layout,
    parts: impl Iterator<Item = (usize, ds4_model::cache::Part, std::ops::Range<usize>)>,
    bytes: &[u8],
) -> Result<(), BackendError> {
    let expected = bytes_of(layout, parts);
    if bytes.len() == expected {
        return Ok(());
    }
    Err(BackendError::new(format!("a saved frontier has {} bytes, expected {expected}", bytes.len())))
}
