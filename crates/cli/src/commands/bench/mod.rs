//! `ds4 bench`: prefill and decode speed of a model.

mod kernels;
mod streams;
mod table;

use crate::Result;
use crate::args::BenchArgs;
use crate::device::{Description, Device};
use crate::load::{self, Wants, WithEngine};
use ds4_engine::{Engine, Session};
use ds4_model::memory::{Reads, cache_read};
use ds4_model::{Detail, Shape};
use serde::Serialize;
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::Instant;

pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode> {
    let file = match &args.synthetic {
        Some(synthetic) => synthetic.model()?,
        None => load::open(args.model.model.as_deref())?,
    };
    let shape = Shape::from_gguf(&file)?;
    let reads = Reads::of(&file, &shape);
    let wants = if args.table {
        table::wants(args, &shape)
    } else if !args.streams.is_empty() {
        streams::wants(args)
    } else {
        Wants { sessions: 2, ..Wants::session(args.prompt.max(1) + args.gen_tokens) }
    };
    load::with_engine(&file, &args.model, wants, Bench { args, reads })
}

struct Bench<'a> {
    args: &'a BenchArgs,
    reads: Reads,
}

impl WithEngine for Bench<'_> {
    fn run<B: Device>(self, mut engine: Engine<B>, device: Description) -> Result<ExitCode> {
        if self.args.kernels {
            return kernels::run(self.args, &mut engine, device);
        }
        if !self.args.streams.is_empty() {
            return streams::run(self.args, &mut engine, device);
        }
        let bandwidth = engine.backend_mut().bandwidth();
        let meter = Meter { reads: self.reads, bandwidth };
        if self.args.table {
            return table::run(self.args, &mut engine, &device, &meter);
        }
        plain(self.args, &mut engine, device, &meter)
    }
}

/// Untimed steps before timed ones: a backend compiles and records its work. After a prompt of 2,048 tokens the fourth is
/// the first to select rows, by other kernels.
const WARM_UP: usize = 8;

/// Tokens spread over the vocabulary, so that hash-routed layers touch many experts.
fn tokens(n: usize, vocab: usize) -> Vec<u32> {
    (0..n as u64).map(|i| ((i.wrapping_mul(2_654_435_761) >> 7) % vocab as u64) as u32).collect()
}

/// A session that decodes as the usual ways to sample do: the best tokens are enough.
fn session_of<B: Device>(engine: &mut Engine<B>, context: usize) -> Result<Session<B>> {
    let mut session = engine.session(context)?;
    session.set_detail(Detail::Best);
    Ok(session)
}

fn sync<B: Device>(engine: &mut Engine<B>, session: &mut Session<B>, prompt: &[u32]) -> Result<f64> {
    let start = Instant::now();
    engine.sync(session, prompt, &mut |_, _| ControlFlow::Continue(()))?;
    Ok(start.elapsed().as_secs_f64())
}

/// Compares decoding with what memory allows.
struct Meter {
    reads: Reads,
    /// Bytes a second that the device can read, if it knows.
    bandwidth: Option<f64>,
}

/// A decode rate, and the memory traffic it implies.
#[derive(Serialize)]
struct Decode {
    /// Sessions decoded together.
    sessions: usize,
    context: usize,
    /// Tokens a second of all sessions together.
    tps: f64,
    /// Bytes that a step reads: weights and the sessions' caches.
    bytes_per_step: u64,
    /// Such bytes a second.
    gb_per_second: f64,
    /// Share of the device's bandwidth.
    #[serde(skip_serializing_if = "Option::is_none")]
    of_bandwidth: Option<f64>,
}

impl Meter {
    fn decode<B: Device>(
        &self,
        engine: &Engine<B>,
        sessions: usize,
        context: usize,
        steps: usize,
        seconds: f64,
    ) -> Decode {
        let cache = cache_read(&engine.layout(context), engine.shape().index_top_k, context);
        let bytes_per_step = self.reads.pass(sessions) + sessions as u64 * cache;
        let rate = steps as f64 / seconds.max(1e-9);
        let bytes_per_second = bytes_per_step as f64 * rate;
        Decode {
            sessions,
            context,
            tps: rate * sessions as f64,
            bytes_per_step,
            gb_per_second: bytes_per_second / 1e9,
            of_bandwidth: self.bandwidth.map(|b| bytes_per_second / b),
        }
    }
}

impl Decode {
    /// `9.54 GB, 310 GB/s, 9 %`
    fn traffic(&self) -> String {
        let share = self.of_bandwidth.map_or("-".into(), |share| format!("{:.0} %", 100.0 * share));
        format!("{:.2} GB, {:.1} GB/s, {share}", self.bytes_per_step as f64 / 1e9, self.gb_per_second)
    }
}

#[derive(Serialize)]
struct Figures {
    prompt_tokens: usize,
    prompt_tps: f64,
    decode_tokens: usize,
    decode_tps: f64,
    #[serde(flatten)]
    device: Description,
    decode: Decode,
}

fn plain<B: Device>(
    args: &BenchArgs,
    engine: &mut Engine<B>,
    device: Description,
    meter: &Meter,
) -> Result<ExitCode> {
    let vocab = engine.shape().vocab;
    let prompt = tokens(args.prompt.max(1), vocab);
    // Once over everything first: pages are read, buffers grow, kernels are compiled, steps are recorded.
    let mut warm = session_of(engine, prompt.len() + args.gen_tokens)?;
    sync(engine, &mut warm, &prompt)?;
    for token in tokens(args.gen_tokens, vocab) {
        engine.step(&mut warm, token)?;
    }
    drop(warm);
    let mut session = session_of(engine, prompt.len() + args.gen_tokens)?;
    let prefill = sync(engine, &mut session, &prompt)?;
    let start = Instant::now();
    for token in tokens(args.gen_tokens, vocab) {
        engine.step(&mut session, token)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let decode = meter.decode(engine, 1, prompt.len(), args.gen_tokens, seconds);
    let figures = Figures {
        prompt_tokens: prompt.len(),
        prompt_tps: prompt.len() as f64 / prefill,
        decode_tokens: args.gen_tokens,
        decode_tps: decode.tps,
        device,
        decode,
    };
    if args.json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        println!("prompt {:6} tokens {:10.2} t/s", figures.prompt_tokens, figures.prompt_tps);
        println!("decode {:6} tokens {:10.2} t/s", figures.decode_tokens, figures.decode_tps);
        println!("a token reads {} of bandwidth; {}", figures.decode.traffic(), figures.device);
    }
    Ok(ExitCode::SUCCESS)
}
