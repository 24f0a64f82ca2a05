//! State on disk: going on from it is, bit for bit, never having stopped.
#![allow(clippy::unwrap_used, clippy::panic)]

use ds4_cpu::{Cpu, Options};
use ds4_engine::{Disk, Engine, EngineOptions, Session, fingerprint};
use ds4_kvstore::{Meta, Section, Store};
use ds4_model::Shape;
use ds4_model::cache::KvFormat;
use ds4_testkit::Fixture;
use proptest::prelude::*;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

const CONTEXT: usize = 400;
const SAVE_EVERY: usize = 16;

struct Setup {
    engine: Engine<Cpu>,
    tokens: Vec<u32>,
}

fn load(exact: bool, kv: KvFormat, max_rows: usize, disk: Option<&Path>) -> Setup {
    let fixture = Fixture::shipped("dev-f16");
    let file = fixture.model().unwrap();
    let shape = Shape::from_gguf(&file).unwrap();
    let cpu = Cpu::new(&shape, Options { exact, max_rows, threads: 1, ..Options::default() }).unwrap();
    let options = EngineOptions { kv, max_rows, keep_every: 64, ..EngineOptions::default() };
    let mut engine = Engine::load(cpu, &file, None, options).unwrap();
    if let Some(directory) = disk {
        let store = Store::open(directory, ds4_kvstore::Options { budget: 1 << 30 }).unwrap();
        let fingerprint = fingerprint(&file, None, kv, exact);
        engine.set_disk(Disk { store: Arc::new(store), fingerprint, save_every: SAVE_EVERY });
    }
    Setup { engine, tokens: fixture.tokens().unwrap() }
}

fn sync(engine: &mut Engine<Cpu>, session: &mut Session<Cpu>, prompt: &[u32]) -> (usize, usize) {
    let synced = engine.sync(session, prompt, &mut |_, _| ControlFlow::Continue(())).unwrap();
    engine.disk().inspect(|d| d.store.flush());
    (synced.disk, synced.computed)
}

fn same(a: &[f32], b: &[f32]) {
    assert!(!a.is_empty() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()));
}

/// Each step is a new process to the store: a new engine, a new session.
fn resumes_as_if_never_stopped(exact: bool, kv: KvFormat, lengths: &[usize], rows: usize) {
    let folder = tempfile::tempdir().unwrap();
    let mut plain = load(exact, kv, rows, None);
    for (i, &len) in lengths.iter().enumerate() {
        let mut setup = load(exact, kv, rows, Some(folder.path()));
        let mut session = setup.engine.session(CONTEXT).unwrap();
        let prompt = &setup.tokens[..len];
        let (disk, computed) = sync(&mut setup.engine, &mut session, prompt);
        assert_eq!(disk + computed, len);
        if lengths[..i].contains(&len) && len >= 32 {
            assert!(computed < SAVE_EVERY, "{computed} of {len} tokens that were there");
        }
        let mut alone = plain.engine.session(CONTEXT).unwrap();
        sync(&mut plain.engine, &mut alone, prompt);
        same(session.logits(), alone.logits());
        // And on from there, into the next windows.
        for &token in &plain.tokens[len..(len + 9).min(plain.tokens.len())] {
            setup.engine.step(&mut session, token).unwrap();
            plain.engine.step(&mut alone, token).unwrap();
            same(session.logits(), alone.logits());
        }
        assert!(setup.engine.disk().unwrap().store.take_problems().is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    #[test]
    fn resuming_is_never_having_stopped(
        lengths in prop::collection::vec(1usize..300, 1..5),
        exact: bool,
        packed: bool,
    ) {
        let kv = if packed { KvFormat::Packed } else { KvFormat::Rounded };
        let again = [&lengths[..], &lengths[..1]].concat();
        resumes_as_if_never_stopped(exact, kv, &again, 64);
    }
}

#[test]
fn at_and_around_the_ends_of_windows_and_groups() {
    for exact in [false, true] {
        resumes_as_if_never_stopped(
            exact,
            KvFormat::Packed,
            &[127, 128, 129, 131, 132, 256, 257, 127, 256],
            64,
        );
    }
}

/// A prompt that ends where a longer one was kept is there, logits and all.
#[test]
fn a_prompt_that_ends_at_a_kept_place() {
    let folder = tempfile::tempdir().unwrap();
    let mut setup = load(false, KvFormat::Packed, 64, Some(folder.path()));
    let mut session = setup.engine.session(CONTEXT).unwrap();
    sync(&mut setup.engine, &mut session, &setup.tokens[..200]);
    let mut other = setup.engine.session(CONTEXT).unwrap();
    assert_eq!(sync(&mut setup.engine, &mut other, &setup.tokens[..128]), (128, 0));
    let mut alone = load(false, KvFormat::Packed, 64, None);
    let mut session = alone.engine.session(CONTEXT).unwrap();
    sync(&mut alone.engine, &mut session, &setup.tokens[..128]);
    same(other.logits(), session.logits());
}

/// What the owner of a session attaches is found with its state by whoever opens the store.
#[test]
fn notes_ride_along() {
    let folder = tempfile::tempdir().unwrap();
    let mut setup = load(false, KvFormat::Packed, 64, Some(folder.path()));
    let mut session = setup.engine.session(CONTEXT).unwrap();
    sync(&mut setup.engine, &mut session, &setup.tokens[..64]);
    session.attach(b"calls ");
    session.attach(b"made");
    sync(&mut setup.engine, &mut session, &setup.tokens[..100]);
    drop(setup);
    let store = Store::open(folder.path(), ds4_kvstore::Options { budget: 1 << 30 }).unwrap();
    let notes = |m: &Meta| store.read(m, Section::Notes).unwrap();
    let all: Vec<_> = store.list().iter().map(|m| (m.end, notes(m))).collect();
    assert_eq!(all, [(64, Vec::new()), (100, b"calls made".to_vec())]);
}

/// Bytes of blocks, without what makes their ends resumable.
fn stored(folder: &Path) -> (u64, usize) {
    let store = Store::open(folder, ds4_kvstore::Options { budget: 1 << 30 }).unwrap();
    let all = store.list();
    (all.iter().map(|m| m.len_of(Section::Rows)).sum(), all.len())
}

#[test]
fn growth_and_common_prefixes_are_stored_once() {
    let (grown, whole) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut setup = load(false, KvFormat::Packed, 64, Some(grown.path()));
    let mut session = setup.engine.session(CONTEXT).unwrap();
    let tokens = setup.tokens.clone();
    for i in 1..=10 {
        sync(&mut setup.engine, &mut session, &tokens[..30 * i]);
    }
    let mut once = load(false, KvFormat::Packed, 64, Some(whole.path()));
    let mut session = once.engine.session(CONTEXT).unwrap();
    sync(&mut once.engine, &mut session, &tokens[..300]);
    let (grown_bytes, grown_blocks) = stored(grown.path());
    let (whole_bytes, _) = stored(whole.path());
    assert_eq!((grown_bytes, grown_blocks >= 10), (whole_bytes, true), "every row once");
    // Another conversation with the same first 192 tokens adds only what is its own.
    let mut other = tokens[..192].to_vec();
    other.extend(tokens[..80].iter().rev());
    let mut session = once.engine.session(CONTEXT).unwrap();
    let (disk, computed) = sync(&mut once.engine, &mut session, &other);
    assert_eq!((disk, computed), (192, 80));
    let (both, _) = stored(whole.path());
    assert!(both > whole_bytes && both < whole_bytes * 3 / 2, "{both} after {whole_bytes}");
}

/// Whatever happens to files, answers stay what they are.
#[test]
fn broken_blocks_are_computed_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut setup = load(false, KvFormat::Packed, 64, Some(folder.path()));
    let tokens = setup.tokens.clone();
    let mut session = setup.engine.session(CONTEXT).unwrap();
    sync(&mut setup.engine, &mut session, &tokens[..256]);
    let want = session.logits().to_vec();
    drop(setup);
    let mut files: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|p| p.extension().is_some_and(|e| e == "kv"));
    assert_eq!(files.len(), 4);
    for (i, file) in files.iter().enumerate() {
        let whole = std::fs::read(file).unwrap();
        let mut bytes = whole.clone();
        match i {
            0 => bytes.truncate(100),
            1 => drop(bytes.pop()),
            // In the rows; in the header.
            2 => bytes[500] ^= 1,
            _ => bytes[100] ^= 0x40,
        }
        std::fs::write(file, bytes).unwrap();
        let mut setup = load(false, KvFormat::Packed, 64, Some(folder.path()));
        let mut session = setup.engine.session(CONTEXT).unwrap();
        let (disk, computed) = sync(&mut setup.engine, &mut session, &tokens[..256]);
        assert!(disk < 256 && disk + computed == 256);
        same(session.logits(), &want);
        let problems = setup.engine.disk().unwrap().store.take_problems();
        assert_eq!(problems.len(), 1, "{problems:?}");
        // It was written again.
        assert_eq!(std::fs::read(file).unwrap().len(), whole.len());
    }
    // Another model's state is none of ours.
    let mut setup = load(true, KvFormat::Packed, 64, Some(folder.path()));
    let mut session = setup.engine.session(CONTEXT).unwrap();
    assert_eq!(sync(&mut setup.engine, &mut session, &tokens[..256]).0, 0);
}
