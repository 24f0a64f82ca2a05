//! Sessions: reuse, rewinding, snapshots and batches change nothing, bit for bit; decoding allocates nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use ds4_cpu::{Cpu, Options};
use ds4_engine::{Engine, EngineOptions, Error, Event, Finish, Generation, Sampler, Sampling, Session, Work};
use ds4_gguf::Gguf;
use ds4_model::Shape;
use ds4_model::cache::KvFormat;
use ds4_testkit::Fixture;
use ds4_text::{Hint, Tokenizer};
use std::ops::ControlFlow;

fn load(name: &str, exact: bool, options: EngineOptions) -> (Engine<Cpu>, Vec<u32>, Gguf) {
    let fixture = Fixture::shipped(name);
    let file = Gguf::open(fixture.path("model.gguf")).unwrap();
    let shape = Shape::from_gguf(&file).unwrap();
    let cpu = Cpu::new(&shape, Options { exact, max_rows: options.max_rows, ..Options::default() }).unwrap();
    let kv = if exact { KvFormat::Rounded } else { KvFormat::Packed };
    let engine = Engine::load(cpu, &file, None, EngineOptions { kv, ..options }).unwrap();
    (engine, fixture.tokens().unwrap(), file)
}

fn sync(engine: &mut Engine<Cpu>, session: &mut Session<Cpu>, prompt: &[u32]) -> (usize, usize) {
    let synced = engine.sync(session, prompt, &mut |_, _| ControlFlow::Continue(())).unwrap();
    (synced.reused(), synced.computed)
}

/// Logits of a fresh session after `prompt`.
fn fresh(engine: &mut Engine<Cpu>, prompt: &[u32]) -> Vec<f32> {
    let mut session = engine.session(prompt.len()).unwrap();
    sync(engine, &mut session, prompt);
    session.logits().to_vec()
}

fn same(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()), "logits differ");
}

/// Every way to reach a prompt gives the logits of computing it from nothing.
fn every_way_is_the_same(name: &str, exact: bool) {
    let options = EngineOptions { max_rows: 64, keep_every: 50, ..EngineOptions::default() };
    let (mut engine, tokens, _) = load(name, exact, options);
    let mut session = engine.session(400).unwrap();
    assert_eq!(sync(&mut engine, &mut session, &tokens[..230]), (0, 230));
    same(session.logits(), &fresh(&mut engine, &tokens[..230]));
    assert_eq!(session.kept().collect::<Vec<_>>(), [50, 100, 150, 200, 230]);

    // A longer prompt continues; single steps are the same as a longer prompt.
    assert_eq!(sync(&mut engine, &mut session, &tokens[..240]), (230, 10));
    for &token in &tokens[240..250] {
        engine.step(&mut session, token).unwrap();
    }
    same(session.logits(), &fresh(&mut engine, &tokens[..250]));

    // An edit in the middle costs what follows the last kept place before it.
    let mut edited = tokens[..220].to_vec();
    edited[170] = (edited[170] + 1) % 256;
    assert_eq!(sync(&mut engine, &mut session, &edited), (150, 70));
    same(session.logits(), &fresh(&mut engine, &edited));

    // A prompt that ends at a kept place is there.
    assert_eq!(sync(&mut engine, &mut session, &tokens[..150]), (150, 0));
    same(session.logits(), &fresh(&mut engine, &tokens[..150]));

    // Back and forth over compressor groups and the window's wrap.
    for len in [149, 127, 128, 129, 300, 131, 3, 5, 4, 260] {
        sync(&mut engine, &mut session, &tokens[..len]);
        same(session.logits(), &fresh(&mut engine, &tokens[..len]));
    }
    assert_eq!(sync(&mut engine, &mut session, &tokens[..260]), (260, 0));
}

#[test]
fn every_way_is_the_same_in_exact_mode() {
    every_way_is_the_same("dev-f16", true);
}

#[test]
fn every_way_is_the_same_in_default_mode() {
    every_way_is_the_same("dev-f16", false);
    every_way_is_the_same("dev-q2mix", false);
}

/// Rewinding to a kept place, or restoring a snapshot, and going on.
#[test]
fn rewind_and_restore_equal_never_having_gone_on() {
    for exact in [false, true] {
        let (mut engine, tokens, _) =
            load("dev-q2mix", exact, EngineOptions { max_rows: 96, ..EngineOptions::default() });
        for len in [1, 4, 63, 64, 127, 128, 130, 517] {
            let mut session = engine.session(700).unwrap();
            sync(&mut engine, &mut session, &tokens[..len]);
            let snapshot = engine.snapshot(&mut session).unwrap();
            for &token in tokens[len..].iter().rev().take(140) {
                engine.step(&mut session, token).unwrap();
            }
            let mut other = engine.session(700).unwrap();
            engine.restore(&mut other, &snapshot).unwrap();
            assert_eq!(engine.rewind(&mut session, len).unwrap(), len);
            let want_len = len + 9;
            for s in [&mut session, &mut other] {
                assert_eq!(s.tokens(), &tokens[..len]);
                sync(&mut engine, s, &tokens[..want_len]);
            }
            let want = fresh(&mut engine, &tokens[..want_len]);
            same(session.logits(), &want);
            same(other.logits(), &want);
        }
    }
}

#[test]
fn a_batch_equals_single_sessions() {
    let (mut engine, tokens, _) = load("dev-q2mix", false, EngineOptions::default());
    let mut sessions: Vec<_> = (0..4).map(|_| engine.session(256).unwrap()).collect();
    let lens = [100, 5, 1, 64];
    for round in 0..3 {
        let mut work: Vec<_> = sessions
            .iter_mut()
            .zip(lens)
            .enumerate()
            .map(|(i, (session, len))| {
                let start = session.tokens().len();
                let tokens = &tokens[10 * i + start..][..if round == 0 { len } else { 1 + i }];
                Work { session, tokens }
            })
            .collect();
        engine.batch(&mut work).unwrap();
    }
    for session in &sessions {
        let want = fresh(&mut engine, session.tokens());
        same(session.logits(), &want);
    }
}

#[test]
fn cancelling_keeps_what_was_computed() {
    let (mut engine, tokens, _) =
        load("dev-f16", false, EngineOptions { max_rows: 32, ..EngineOptions::default() });
    let mut session = engine.session(400).unwrap();
    let mut chunks = 0;
    let stopped = engine.sync(&mut session, &tokens[..200], &mut |_, _| {
        chunks += 1;
        if chunks > 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(stopped, Err(Error::Cancelled)));
    assert_eq!(session.tokens().len(), 96);
    assert_eq!(sync(&mut engine, &mut session, &tokens[..200]), (96, 104));
    same(session.logits(), &fresh(&mut engine, &tokens[..200]));
}

#[test]
fn limits_are_typed_errors() {
    let (mut engine, tokens, _) = load("dev-f16", false, EngineOptions::default());
    let mut session = engine.session(10).unwrap();
    let mut sync = |engine: &mut Engine<Cpu>, prompt: &[u32]| {
        engine.sync(&mut session, prompt, &mut |_, _| ControlFlow::Continue(())).err().unwrap().to_string()
    };
    assert!(sync(&mut engine, &tokens[..11]).contains("11 tokens, the context holds 10"));
    assert!(sync(&mut engine, &[]).contains("at least one token"));
    assert!(sync(&mut engine, &[5, 9999]).contains("token id 9999"));
    engine.session(10).unwrap();
    let mut full = engine.session(2).unwrap();
    engine.step(&mut full, 1).unwrap();
    engine.step(&mut full, 1).unwrap();
    assert!(engine.step(&mut full, 1).unwrap_err().to_string().contains("context of 2"));
}

#[test]
fn old_places_are_dropped_within_the_budget() {
    let options =
        EngineOptions { max_rows: 64, keep_every: 16, keep_bytes: 600_000, ..EngineOptions::default() };
    let (mut engine, tokens, _) = load("dev-f16", false, options);
    let mut session = engine.session(400).unwrap();
    sync(&mut engine, &mut session, &tokens[..320]);
    let kept: Vec<_> = session.kept().collect();
    assert!(kept.len() > 1 && kept.len() < 20, "{kept:?}");
    assert_eq!(kept.last(), Some(&320));
}

fn generate(
    engine: &mut Engine<Cpu>,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    sampling: Sampling,
    max_tokens: usize,
) -> (Vec<u32>, Finish) {
    let mut session = engine.session(200).unwrap();
    sync(engine, &mut session, prompt);
    let mut generation = Generation::new(Sampler::new(sampling), max_tokens);
    let mut ids = Vec::new();
    loop {
        match generation.next(engine, &mut session, tokenizer, Hint::Free).unwrap() {
            Event::Token(id) => ids.push(id),
            Event::End(finish) => return (ids, finish),
        }
    }
}

#[test]
fn generation_ends_for_typed_reasons_and_repeats_with_its_seed() {
    let (mut engine, tokens, file) = load("dev-f16", false, EngineOptions::default());
    let tokenizer = Tokenizer::from_gguf(file.metadata()).unwrap();
    let seeded = |seed| Sampling { seed, ..Sampling::default() };
    let mut run =
        |sampling, max_tokens| generate(&mut engine, &tokenizer, &tokens[..40], sampling, max_tokens);
    let (ids, finish) = run(seeded(1), 30);
    assert!(ids.len() <= 30 && (finish == Finish::Length || finish == Finish::EndOfSentence));
    assert_eq!(run(seeded(1), 30), (ids.clone(), finish));
    assert_ne!(run(seeded(2), 30).0, ids);
    let (ids, finish) = run(Sampling { logit_bias: vec![(1, -1e9)], ..seeded(3) }, 1000);
    assert_eq!((ids.len(), finish), (160, Finish::ContextFull));
    let forced = Sampling { logit_bias: vec![(1, 1e9)], ..seeded(3) };
    assert_eq!(run(forced, 1000).1, Finish::EndOfSentence);
}
