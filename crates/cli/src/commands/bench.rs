//! `ds4 bench`: prefill and decode speed of a model.

use crate::Result;
use crate::args::BenchArgs;
use crate::load::{self, Numbers};
use serde::Serialize;
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::Instant;

#[derive(Serialize)]
struct Figures {
    prompt_tokens: usize,
    prompt_tps: f64,
    decode_tokens: usize,
    decode_tps: f64,
    threads: usize,
    kernels: String,
}

/// Tokens spread over the vocabulary, so that hash-routed layers touch many experts.
fn tokens(n: usize, vocab: usize) -> Vec<u32> {
    (0..n as u64).map(|i| ((i.wrapping_mul(2_654_435_761) >> 7) % vocab as u64) as u32).collect()
}

pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode> {
    let file = load::open(args.model.model.as_deref())?;
    let mut engine = load::engine(&file, &args.model, Numbers::default())?;
    let vocab = engine.shape().vocab;
    let prompt = tokens(args.prompt.max(1), vocab);
    // Once over everything first: pages are read, buffers grow.
    let mut warm = engine.session(prompt.len() + 1)?;
    engine.sync(&mut warm, &prompt, &mut |_, _| ControlFlow::Continue(()))?;
    engine.step(&mut warm, 1)?;
    let mut session = engine.session(prompt.len() + args.gen_tokens)?;
    let start = Instant::now();
    engine.sync(&mut session, &prompt, &mut |_, _| ControlFlow::Continue(()))?;
    let prefill = start.elapsed().as_secs_f64();
    let start = Instant::now();
    for token in tokens(args.gen_tokens, vocab) {
        engine.step(&mut session, token)?;
    }
    let decode = start.elapsed().as_secs_f64();
    let figures = Figures {
        prompt_tokens: prompt.len(),
        prompt_tps: prompt.len() as f64 / prefill,
        decode_tokens: args.gen_tokens,
        decode_tps: args.gen_tokens as f64 / decode.max(1e-9),
        threads: engine.backend().threads(),
        kernels: format!("{:?}", engine.backend().level()),
    };
    if args.json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        println!("prompt {:6} tokens {:10.2} t/s", figures.prompt_tokens, figures.prompt_tps);
        println!("decode {:6} tokens {:10.2} t/s", figures.decode_tokens, figures.decode_tps);
        println!("{} threads, {} kernels", figures.threads, figures.kernels);
    }
    Ok(ExitCode::SUCCESS)
}
