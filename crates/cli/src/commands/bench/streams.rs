//! `ds4 bench --streams`: what many requests at once get through the scheduler that `ds4 serve` uses.

use super::tokens;
use crate::args::BenchArgs;
use crate::device::{Description, Device};
use crate::load::{self, Wants};
use crate::{Result, ui};
use ds4_engine::scheduler::{Done, Job, Limits, Refused, Rules, Scheduler, Update};
use ds4_engine::{Engine, Sampling};
use ds4_text::{ParserOptions, Prompt, Tokenizer};
use serde::Serialize;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Receiver;

/// What so many requests got that came at the same time.
#[derive(Serialize)]
struct Streams {
    streams: usize,
    /// Tokens a second of all answers together, from the last one's first token to the last one's end.
    tps: f64,
    /// The same as a multiple of what one got.
    times: f64,
    /// Until the last of them had its first token.
    first_token_seconds: f64,
}

#[derive(Serialize)]
struct Table {
    #[serde(flatten)]
    device: Description,
    prompt_tokens: usize,
    streams: Vec<Streams>,
}

fn limits(args: &BenchArgs) -> Limits {
    let most = args.streams.iter().copied().max().unwrap_or(1).max(1);
    Limits { parallel: most, queue: most, context: args.prompt.max(1) + args.gen_tokens + 1 }
}

/// What there must be room for.
pub(super) fn wants(args: &BenchArgs) -> Wants {
    let limits = limits(args);
    Wants { sessions: limits.sessions(), ..Wants::session(limits.context) }
}

pub(super) fn run<B: Device>(
    args: &BenchArgs,
    engine: &mut Engine<B>,
    device: Description,
) -> Result<ExitCode> {
    // Only the number of the end marker matters here.
    let tokenizer = Tokenizer::from_gguf(load::nano()?.metadata())?;
    let vocab = engine.shape().vocab;
    let (scheduler, worker) = Scheduler::new(limits(args), None);
    let table = std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let table = measure(args, &scheduler, vocab, device);
            scheduler.shut_down(Duration::ZERO);
            table
        });
        worker.run(engine, &tokenizer, || {}).map_err(|e| e.to_string())?;
        asking.join().map_err(|_| "the measuring thread panicked".to_owned())?
    })?;
    if args.json {
        println!("{}", serde_json::to_string(&table)?);
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(
    args: &BenchArgs,
    scheduler: &Scheduler,
    vocab: usize,
    device: Description,
) -> std::result::Result<Table, String> {
    let mut table = Table { device, prompt_tokens: args.prompt.max(1), streams: Vec::new() };
    if !args.json {
        println!("{}\n", table.device);
        println!("{:>7} {:>10} {:>7} {:>15}", "streams", "t/s", "times", "first token, s");
    }
    let mut round = 0;
    let mut at_once = |n: usize| {
        round += 1;
        together(args, scheduler, vocab, n.max(1), round)
    };
    // Pages are read, buffers grow, kernels are compiled, steps are recorded.
    for &n in &args.streams {
        at_once(n)?;
    }
    let mut one = None;
    for &n in &args.streams {
        let mut figures = at_once(n)?;
        let of_one = *one.get_or_insert(figures.tps / n.max(1) as f64);
        figures.times = figures.tps / of_one;
        if !args.json {
            let Streams { streams, tps, times, first_token_seconds } = figures;
            println!("{streams:7} {tps:10.2} {times:7.2} {first_token_seconds:15.2}");
        }
        table.streams.push(figures);
    }
    Ok(table)
}

/// Sends `n` requests at once. They have the same prompt, which is computed once, so that their answers begin together.
fn together(
    args: &BenchArgs,
    scheduler: &Scheduler,
    vocab: usize,
    n: usize,
    round: usize,
) -> std::result::Result<Streams, String> {
    let length = args.prompt.max(1);
    let prompt = tokens((round + 1) * length, vocab).split_off(round * length);
    let job = || Job {
        prompt: Prompt::default(),
        tokens: prompt.clone(),
        sampling: Sampling::greedy(),
        max_tokens: args.gen_tokens,
        raw: true,
        parser: ParserOptions::default(),
        rules: Rules::default(),
        logprobs: None,
        on_block: None,
    };
    let begun: std::result::Result<Vec<_>, _> =
        (0..n).map(|_| Ok((Instant::now(), scheduler.submit(job())?))).collect();
    let begun = begun.map_err(|e: Refused| e.to_string())?;
    let start = begun.first().map_or_else(Instant::now, |(at, _)| *at);
    let (mut first, mut last, mut generated) = (start, start, 0);
    for (at, updates) in begun {
        let done = end_of(updates)?;
        let first_token = at + done.timings.queued + done.timings.prefill;
        first = first.max(first_token);
        last = last.max(first_token + done.timings.decode);
        generated += done.generated;
    }
    if generated < n * args.gen_tokens {
        ui::note("an answer ended early: its place was empty then");
    }
    let tps = generated as f64 / (last - first).as_secs_f64().max(1e-9);
    Ok(Streams { streams: n, tps, times: 1.0, first_token_seconds: (first - start).as_secs_f64() })
}

fn end_of(mut updates: Receiver<Update>) -> std::result::Result<Done, String> {
    loop {
        match updates.blocking_recv() {
            Some(Update::Done(done)) => return Ok(done),
            Some(Update::Failed(failure)) => return Err(failure.to_string()),
            Some(_) => {}
            None => return Err("the engine has stopped".into()),
        }
    }
}
