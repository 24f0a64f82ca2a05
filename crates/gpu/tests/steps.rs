//! Every step of the model on a GPU beside the CPU's.
#![cfg(any(feature = "cuda", feature = "vulkan", feature = "metal"))]
#![allow(clippy::panic, clippy::print_stdout, clippy::unwrap_used)]

use ds4_cpu::Cpu;
use ds4_engine::{Engine, EngineOptions, Session};
use ds4_gpu::{Gpu, devices};
use ds4_model::cache::{KvFormat, Layout};
use ds4_model::{BEST_TOKENS, Backend, Best, Detail, Logits, Model, NoTap, Pass, Run, Shape, Want};
use ds4_testkit::{Fixture, Synthetic, Taps};
use std::ops::ControlFlow;

/// All taps of a pass over some tokens, in chunks, by name in order of appearance.
fn taps<B: Backend>(mut backend: B, fixture: &Fixture, kv: KvFormat, chunk: usize, tokens: usize) -> Taps {
    let (file, draft) = (fixture.model().unwrap(), fixture.draft().unwrap());
    let model = Model::load(&mut backend, &file, draft.as_ref()).unwrap();
    let mut pass = Pass::new(&mut backend, &model.shape, 64).unwrap();
    let layout = Layout::new(&model.shape, kv, draft.is_some(), 1024, 64);
    let mut store = backend.store(&layout).unwrap();
    let (mut taps, mut logits) = (Taps::default(), Logits::default());
    let all = fixture.tokens().unwrap();
    for (i, part) in all[..tokens].chunks(chunk).enumerate() {
        let mut runs = [Run { store: &mut store, start: i * chunk, tokens: part, want: Want::All }];
        pass.forward(&model, &mut backend, &layout, &mut runs, &mut logits, &mut taps).unwrap();
    }
    taps
}

fn compare(fixture: &str, exact: bool, kv: KvFormat, chunk: usize, tolerance: f32) {
    let fixture = Fixture::shipped(fixture);
    let shape = Shape::from_gguf(&fixture.model().unwrap()).unwrap();
    let options = ds4_cpu::Options { exact, max_rows: 64, ..Default::default() };
    let cpu = taps(Cpu::new(&shape, options).unwrap(), &fixture, kv, chunk, 200);
    let options = ds4_gpu::Options { exact, max_rows: 64, ..Default::default() };
    let gpu = taps(Gpu::new(&shape, &devices()[..1], options).unwrap(), &fixture, kv, chunk, 200);
    let mut wrong = String::new();
    for name in &cpu.order {
        let mut worst = 0f32;
        for p in 0..200 {
            let pairs = cpu.row(name, p).iter().zip(gpu.row(name, p));
            // Of large values, such as hidden activations, the digits count.
            worst = pairs
                .map(|(a, b)| (a - b).abs() / a.abs().max(1.0))
                .fold(worst, |m, d| if d.is_nan() { f32::NAN } else { m.max(d) });
        }
        // Hidden activations are products of two numbers, of which each is off.
        let tolerance = if name.ends_with(".hidden") { 2.0 * tolerance } else { tolerance };
        if worst.is_nan() || worst > tolerance {
            wrong += &format!("{name}: {worst:.2e}\n");
        }
    }
    assert!(wrong.is_empty(), "beyond {tolerance}:\n{wrong}");
}

#[test]
fn exact_steps_of_f16() {
    compare("dev-f16", true, KvFormat::Plain, 50, 1e-4);
}

#[test]
fn exact_steps_of_q2mix() {
    compare("dev-q2mix", true, KvFormat::Plain, 50, 1e-4);
}

/// Layers spread over devices give what they give on one. The one device here plays them all.
#[test]
fn layers_on_several_devices() {
    let fixture = Fixture::shipped("dev-q2mix");
    let shape = Shape::from_gguf(&fixture.model().unwrap()).unwrap();
    let taps = |count: usize| {
        let devices: Vec<_> = std::iter::repeat_n(devices()[0].clone(), count).collect();
        let options = ds4_gpu::Options { max_rows: 64, ..Default::default() };
        taps(Gpu::new(&shape, &devices, options).unwrap(), &fixture, KvFormat::Packed, 40, 80)
    };
    let (one, three) = (taps(1), taps(3));
    assert_eq!(one.order, three.order);
    for name in &one.order {
        for p in 0..80 {
            assert!(one.row(name, p) == three.row(name, p), "{name} of token {p}");
        }
    }
}

/// The same with recorded passes and the draft block, as an engine uses them, and with sessions saved and resumed.
#[test]
fn sessions_on_several_devices() {
    let fixture = Fixture::shipped("dev-f16");
    let (file, draft) = (fixture.model().unwrap(), fixture.draft().unwrap());
    let shape = Shape::from_gguf(&file).unwrap();
    let tokens = fixture.tokens().unwrap();
    let logits = |count: usize| {
        let devices: Vec<_> = std::iter::repeat_n(devices()[0].clone(), count).collect();
        let options = ds4_gpu::Options { max_rows: 64, ..Default::default() };
        let gpu = Gpu::new(&shape, &devices, options).unwrap();
        let options = EngineOptions { max_rows: 64, ..EngineOptions::default() };
        let mut engine = Engine::load(gpu, &file, draft.as_ref(), options).unwrap();
        let mut session = engine.session(256).unwrap();
        let mut all = Vec::new();
        let (logits, drafts) =
            engine.score(&mut session, &tokens[..20], Some(tokens[20]), &mut NoTap).unwrap();
        all.extend(logits);
        all.extend(drafts.unwrap());
        for &token in &tokens[20..24] {
            engine.step(&mut session, token).unwrap();
            all.extend_from_slice(session.logits());
        }
        let snapshot = engine.snapshot(&mut session).unwrap();
        let mut other = engine.session(256).unwrap();
        engine.restore(&mut other, &snapshot).unwrap();
        engine.step(&mut other, tokens[24]).unwrap();
        all.extend_from_slice(other.logits());
        all
    };
    assert!(logits(1) == logits(2));
}

/// Of a vocabulary of several stretches, the best that the device finds are those of all logits.
#[test]
fn best_of_a_large_vocabulary() {
    let file = Synthetic { vocab: 20_001, ..Synthetic::tiny(2) }.model().unwrap();
    let shape = Shape::from_gguf(&file).unwrap();
    let gpu =
        Gpu::new(&shape, &devices()[..1], ds4_gpu::Options { max_rows: 64, ..Default::default() }).unwrap();
    let options = EngineOptions { max_rows: 64, ..EngineOptions::default() };
    let mut engine = Engine::load(gpu, &file, None, options).unwrap();
    let mut session = engine.session(64).unwrap();
    session.set_detail(Detail::Best);
    for token in [3, 20_000, 7] {
        engine.step(&mut session, token).unwrap();
        let found = session.best().unwrap().clone();
        engine.fetch_logits(&mut session).unwrap();
        let all = session.logits().iter().enumerate().map(|(token, &logit)| (token as u32, logit)).collect();
        assert_eq!(found.tokens, Best::new(all).tokens[..BEST_TOKENS]);
    }
    // The rest of the logits is there until another pass comes; then the session's last token is computed again.
    let mut other = engine.session(64).unwrap();
    let synced = |engine: &mut Engine<Gpu>, session: &mut Session<Gpu>| {
        let tokens = session.tokens().to_vec();
        engine.sync(session, &tokens, &mut |_, _| ControlFlow::Continue(())).unwrap().computed
    };
    engine.step(&mut session, 5).unwrap();
    assert_eq!(synced(&mut engine, &mut session), 0);
    assert_eq!(session.logits().len(), 20_001);
    engine.step(&mut session, 6).unwrap();
    engine.step(&mut other, 6).unwrap();
    assert!(engine.fetch_logits(&mut session).unwrap_err().to_string().contains("another pass"));
    assert!(synced(&mut engine, &mut session) > 0);
    assert_eq!(session.logits().len(), 20_001);
}
