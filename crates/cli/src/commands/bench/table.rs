//! `ds4 bench --table`: speed at many contexts and batch sizes.

use super::{Decode, Meter, WARM_UP, session_of, sync, tokens};
use crate::args::BenchArgs;
use crate::device::{Description, Device};
use crate::{Result, ui};
use ds4_engine::{Engine, Work};
use serde::Serialize;
use std::process::ExitCode;
use std::time::Instant;

/// Context of the sessions of a batch.
const BATCH_CONTEXT: usize = 2048;

#[derive(Serialize)]
struct Prefill {
    tokens: usize,
    tps: f64,
}

#[derive(Serialize)]
struct Table {
    #[serde(flatten)]
    device: Description,
    #[serde(skip_serializing_if = "Option::is_none")]
    bandwidth: Option<f64>,
    prefill: Vec<Prefill>,
    decode: Vec<Decode>,
    batches: Vec<Decode>,
}

/// Tokens that the longest session needs.
pub(super) fn context(args: &BenchArgs) -> usize {
    let longest = args.prefills.iter().chain(&args.contexts).copied().max().unwrap_or(1);
    // Every context is decoded at, on the way to the longest.
    let steps = (args.contexts.len() + 1) * (args.gen_tokens + WARM_UP);
    longest.max(BATCH_CONTEXT) + steps
}

pub(super) fn run<B: Device>(
    args: &BenchArgs,
    engine: &mut Engine<B>,
    device: &Description,
    meter: &Meter,
) -> Result<ExitCode> {
    warm_up(engine)?;
    let mut table = Table {
        device: device.clone(),
        bandwidth: meter.bandwidth,
        prefill: Vec::new(),
        decode: Vec::new(),
        batches: Vec::new(),
    };
    one_session(args, engine, meter, &mut table)?;
    for &n in &args.batches {
        table.batches.push(batch(args, engine, meter, n.max(1))?);
    }
    if args.json {
        println!("{}", serde_json::to_string(&table)?);
    } else {
        print(&table);
    }
    Ok(ExitCode::SUCCESS)
}

/// Pages are read, buffers grow, kernels are compiled.
fn warm_up<B: Device>(engine: &mut Engine<B>) -> Result<()> {
    let prompt = tokens(512, engine.shape().vocab);
    let mut session = session_of(engine, prompt.len() + WARM_UP)?;
    sync(engine, &mut session, &prompt)?;
    for _ in 0..WARM_UP {
        engine.step(&mut session, 1)?;
    }
    Ok(())
}

/// One session that grows through all lengths: prefilled up to each, and decoded a little where asked.
fn one_session<B: Device>(
    args: &BenchArgs,
    engine: &mut Engine<B>,
    meter: &Meter,
    table: &mut Table,
) -> Result<()> {
    let context = context(args);
    let all = tokens(context, engine.shape().vocab);
    let mut session = session_of(engine, context)?;
    let mut lengths: Vec<usize> = args.prefills.iter().chain(&args.contexts).copied().collect();
    lengths.retain(|&n| n > 0);
    lengths.sort_unstable();
    lengths.dedup();
    let bar = ui::tokens("bench", context);
    let (mut seconds, mut prefilled) = (0.0, 0);
    for n in lengths {
        // Decoding may have gone past a length that is close to the one before.
        let length = n.max(session.tokens().len());
        let missing = length - session.tokens().len();
        if missing > 0 {
            seconds += sync(engine, &mut session, &all[..length])?;
            prefilled += missing;
        }
        if args.prefills.contains(&n) {
            table.prefill.push(Prefill { tokens: n, tps: prefilled as f64 / seconds });
        }
        if args.contexts.contains(&n) {
            let at = session.tokens().len();
            for &token in &all[at..at + WARM_UP] {
                engine.step(&mut session, token)?;
            }
            let start = Instant::now();
            for &token in &all[at + WARM_UP..][..args.gen_tokens] {
                engine.step(&mut session, token)?;
            }
            let seconds = start.elapsed().as_secs_f64();
            table.decode.push(meter.decode(engine, 1, n, args.gen_tokens, seconds));
        }
        bar.set_position(n as u64);
    }
    bar.finish_and_clear();
    Ok(())
}

/// `n` sessions that decode together.
fn batch<B: Device>(args: &BenchArgs, engine: &mut Engine<B>, meter: &Meter, n: usize) -> Result<Decode> {
    let steps = args.gen_tokens + WARM_UP;
    let all = tokens(BATCH_CONTEXT + n * steps, engine.shape().vocab);
    let (prompt, next) = all.split_at(BATCH_CONTEXT);
    let mut sessions = vec![session_of(engine, BATCH_CONTEXT + steps)?];
    sync(engine, &mut sessions[0], prompt)?;
    let prefilled = engine.snapshot(&mut sessions[0])?;
    for _ in 1..n {
        let mut session = session_of(engine, BATCH_CONTEXT + steps)?;
        engine.restore(&mut session, &prefilled)?;
        sessions.push(session);
    }
    let mut start = Instant::now();
    for (i, step) in next.chunks(n).enumerate() {
        if i == WARM_UP {
            start = Instant::now();
        }
        let work = sessions.iter_mut().zip(step.chunks(1));
        let mut work: Vec<_> = work.map(|(session, tokens)| Work { session, tokens }).collect();
        engine.batch(&mut work)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(meter.decode(engine, n, BATCH_CONTEXT, args.gen_tokens, seconds))
}

fn print(table: &Table) {
    let bandwidth = table.bandwidth.map_or(String::new(), |b| format!(", reads {:.0} GB/s", b / 1e9));
    println!("{}{bandwidth}\n", table.device);
    println!("{:24} {:>10}", "prefill", "t/s");
    for p in &table.prefill {
        println!("{:>17} tokens {:10.2}", p.tokens, p.tps);
    }
    println!("\n{:24} {:>10} {:>9}  a step reads, of bandwidth", "decode at context", "t/s", "ms/step");
    let line = |what: String, d: &Decode| {
        let step = 1e3 * d.sessions as f64 / d.tps;
        println!("{what:>24} {:10.2} {step:9.2}  {}", d.tps, d.traffic());
    };
    for d in &table.decode {
        line(format!("{} tokens", d.context), d);
    }
    println!("\n{:24} {:>10} {:>9}", format!("decode at {BATCH_CONTEXT} tokens"), "t/s", "ms/step");
    for d in &table.batches {
        line(format!("{} sessions", d.sessions), d);
    }
}
