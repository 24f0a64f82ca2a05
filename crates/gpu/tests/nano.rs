//! ds4-nano on a GPU beside the CPU.
#![cfg(any(feature = "cuda", feature = "vulkan", feature = "metal"))]
#![allow(clippy::panic, clippy::print_stdout, clippy::unwrap_used)]

use ds4_cpu::Cpu;
use ds4_engine::{Disk, Engine, EngineOptions, Session, Work, fingerprint};
use ds4_gguf::Gguf;
use ds4_gpu::{Gpu, devices};
use ds4_kvstore::Store;
use ds4_model::cache::KvFormat;
use ds4_model::{BEST_TOKENS, Backend, Best, Detail, Shape};
use ds4_text::{Message, RenderOptions, Replay, Tokenizer, render};
use std::ops::ControlFlow;
use std::sync::Arc;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/ds4-nano/ds4-nano.gguf");
const QUESTIONS: [&str; 2] = ["Who are you?", "What is 17 plus 25?"];
/// Tokens of an answer.
const ANSWER: usize = 24;
/// Two tokens whose logits are closer than this may change places: the noise of int8 and f16 activations.
const NEAR_TIE: f32 = 0.7;

fn prompt(file: &Gguf, question: &str) -> Vec<u32> {
    let tokenizer = Tokenizer::from_gguf(file.metadata()).unwrap();
    let messages = [Message::user(question)];
    let prompt = render(&messages, &RenderOptions::default(), &mut Replay::default()).unwrap();
    prompt.to_tokens(&tokenizer).unwrap()
}

fn engine<B: Backend>(backend: B, file: &Gguf) -> Engine<B> {
    let options = EngineOptions { max_rows: 64, ..EngineOptions::default() };
    Engine::load(backend, file, None, options).unwrap()
}

fn start<B: Backend>(engine: &mut Engine<B>, prompt: &[u32]) -> Session<B> {
    let mut session = engine.session(256).unwrap();
    engine.sync(&mut session, prompt, &mut |_, _| ControlFlow::Continue(())).unwrap();
    session
}

fn best(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a))).unwrap() as u32
}

/// What the device found are the best of the logits.
fn assert_best(found: &Best, logits: &[f32]) {
    let all = logits.iter().enumerate().map(|(token, &logit)| (token as u32, logit)).collect();
    assert_eq!(found.tokens, Best::new(all).tokens[..BEST_TOKENS]);
}

/// The GPU follows the CPU's greedy answer and would have chosen the same tokens, but for near ties; and two sessions
/// in a batch get, bit for bit, what each gets alone.
#[test]
fn answers_are_those_of_the_cpu() {
    let file = Gguf::open(MODEL).unwrap();
    let shape = Shape::from_gguf(&file).unwrap();
    let cpu = Cpu::new(&shape, ds4_cpu::Options { max_rows: 64, ..Default::default() }).unwrap();
    let options = ds4_gpu::Options { max_rows: 64, ..Default::default() };
    let gpu = Gpu::new(&shape, &devices()[..1], options).unwrap();
    let (mut cpu, mut gpu) = (engine(cpu, &file), engine(gpu, &file));
    let (mut answers, mut alone, mut ties) = (Vec::new(), Vec::new(), 0);
    for question in QUESTIONS {
        let prompt = prompt(&file, question);
        let (mut c, mut g) = (start(&mut cpu, &prompt), start(&mut gpu, &prompt));
        let (mut answer, mut logits) = (Vec::new(), Vec::new());
        for _ in 0..ANSWER {
            let (a, b) = (best(c.logits()), best(g.logits()));
            let margin = c.logits()[a as usize] - c.logits()[b as usize];
            assert!(
                margin < NEAR_TIE,
                "{question:?}, token {}: {a} on the CPU, {b} on the GPU",
                answer.len()
            );
            ties += usize::from(a != b);
            answer.push(a);
            cpu.step(&mut c, a).unwrap();
            gpu.step(&mut g, a).unwrap();
            logits.push(g.logits().to_vec());
        }
        answers.push((prompt, answer));
        alone.push(logits);
    }
    println!("{ties} near ties of {}", QUESTIONS.len() * ANSWER);
    assert!(ties <= 2, "{ties} tokens differ");
    let mut sessions: Vec<_> = answers.iter().map(|(prompt, _)| start(&mut gpu, prompt)).collect();
    sessions.iter_mut().for_each(|session| session.set_detail(Detail::Best));
    for i in 0..ANSWER {
        let tokens: Vec<[u32; 1]> = answers.iter().map(|(_, answer)| [answer[i]]).collect();
        let pairs = sessions.iter_mut().zip(&tokens);
        let mut work: Vec<_> = pairs.map(|(session, tokens)| Work { session, tokens }).collect();
        gpu.batch(&mut work).unwrap();
        for (session, alone) in sessions.iter_mut().zip(&alone) {
            let found = session.best().unwrap().clone();
            gpu.fetch_logits(session).unwrap();
            assert!(session.logits() == &alone[i][..], "token {i} of a batch");
            assert_best(&found, &alone[i]);
        }
        if i >= 4 {
            // By now the passes are recorded. One of another form between them changes nothing.
            start(&mut gpu, &answers[i % 2].0[..1 + i % 7]);
        }
    }
}

/// State that the CPU left on disk is the GPU's too: it goes on from there as from its own, within what both differ by.
#[test]
fn goes_on_from_the_cpus_state() {
    let file = Gguf::open(MODEL).unwrap();
    let shape = Shape::from_gguf(&file).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let disk = || {
        let store = Store::open(folder.path(), ds4_kvstore::Options { budget: 1 << 30 }).unwrap();
        let fingerprint = fingerprint(&file, None, KvFormat::Packed, false);
        Disk { store: Arc::new(store), fingerprint, save_every: 16 }
    };
    let prompt = prompt(&file, &"The fox ran over the hill and met a bear. ".repeat(16));
    let mut cpu = engine(Cpu::new(&shape, Default::default()).unwrap(), &file);
    cpu.set_disk(disk());
    let c = start(&mut cpu, &prompt);
    drop(cpu);
    let options = ds4_gpu::Options { max_rows: 64, ..Default::default() };
    let mut gpu = engine(Gpu::new(&shape, &devices()[..1], options).unwrap(), &file);
    let mut alone = start(&mut gpu, &prompt);
    gpu.set_disk(disk());
    let mut g = gpu.session(256).unwrap();
    let synced = gpu.sync(&mut g, &prompt, &mut |_, _| ControlFlow::Continue(())).unwrap();
    assert_eq!((synced.disk, synced.computed), (prompt.len(), 0));
    assert_eq!(g.logits(), c.logits(), "the CPU's logits came along");
    for _ in 0..ANSWER {
        let (a, b) = (best(g.logits()), best(alone.logits()));
        let margin = alone.logits()[b as usize] - alone.logits()[a as usize];
        assert!(margin < NEAR_TIE, "{a} from the CPU's state, {b} from its own");
        gpu.step(&mut g, b).unwrap();
        gpu.step(&mut alone, b).unwrap();
    }
}
