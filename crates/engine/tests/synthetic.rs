//! Random weights give ordinary activations.
#![allow(clippy::unwrap_used, clippy::panic)]

use ds4_cpu::{Cpu, Options};
use ds4_engine::{Engine, EngineOptions};
use ds4_model::Shape;
use ds4_testkit::Synthetic;
use std::ops::ControlFlow;

#[test]
fn a_synthetic_model_runs() {
    let file = Synthetic::tiny(5).model().unwrap();
    assert_eq!(file.file_len(), Synthetic::tiny(5).bytes());
    let shape = Shape::from_gguf(&file).unwrap();
    let cpu = Cpu::new(&shape, Options::default()).unwrap();
    let mut engine = Engine::load(cpu, &file, None, EngineOptions::default()).unwrap();
    let mut session = engine.session(300).unwrap();
    let tokens: Vec<u32> = (0..300u32).map(|i| i * 37 % 512).collect();
    engine.sync(&mut session, &tokens, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let logits = session.logits();
    let size = (logits.iter().map(|l| l * l).sum::<f32>() / logits.len() as f32).sqrt();
    assert!((0.1..10.0).contains(&size), "{size}");
}
