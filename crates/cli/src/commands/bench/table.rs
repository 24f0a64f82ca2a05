//! `ds4 bench --table`: speed at many contexts and batch sizes.

use super::{Decode, Meter, WARM_UP, session_of, sync, tokens};
use crate::args::BenchArgs;
use crate::device::{Description, Device, GPU_ROWS};
use crate::load::Wants;
use crate::{Result, ui};
use ds4_engine::{Engine, Work};
use ds4_model::Shape;
use ds4_model::cache::Layout;
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
fn longest(args: &BenchArgs) -> usize {
    let longest = args.prefills.iter().chain(&args.contexts).copied().max().unwrap_or(1);
    // Every context is decoded at, on the way to the longest.
    let steps = (args.contexts.len() + 1) * (args.gen_tokens + WARM_UP);
    longest.max(BATCH_CONTEXT) + steps
}

/// Tokens that a session of a batch needs.
fn batch_context(args: &BenchArgs) -> usize {
    BATCH_CONTEXT + args.gen_tokens + WARM_UP
}

/// What there must be room for: the long session, or those of the largest batch, whichever take more.
pub(super) fn wants(args: &BenchArgs, shape: &Shape) -> Wants {
    let batch = args.batches.iter().copied().max().unwrap_or(1).max(1);
    let batched = Wants { sessions: batch, ..Wants::session(batch_context(args)) };
    let long = Wants::session(longest(args));
    let bytes = |w: &Wants| {
        Layout::new(shape, w.kv, false, w.context, GPU_ROWS).bytes().saturating_mul(w.sessions as u64)
    };
    if bytes(&batched) > bytes(&long) { batched } else { long }
}

pub(super) fn run<B: Device>(
    args: &BenchArgs,
    engine: &mut Engine<B>,
    device: &Description,
    meter: &Meter,
) -> Result<ExitCode> {
    warm_up(args, engine)?;
    let mut table = Table {
        device: device.clone(),
        bandwidth: meter.bandwidth,
        prefill: Vec::new(),
        decode: Vec::new(),
        batches: Vec::new(),
    };
    // Lines appear as they are measured: all of them take minutes.
    if !args.json {
        print_heading(&table);
    }
    one_session(args, engine, meter, &mut table)?;
    for &n in &args.batches {
        let decode = batch(args, engine, meter, n.max(1))?;
        if !args.json {
            print_decode(&format!("decode of {} sessions", decode.sessions), &decode);
        }
        table.batches.push(decode);
    }
    if args.json {
        println!("{}", serde_json::to_string(&table)?);
    }
    Ok(ExitCode::SUCCESS)
}

/// Pages are read, buffers grow, kernels are compiled: those of the largest passes, the second of which selects rows.
fn warm_up<B: Device>(args: &BenchArgs, engine: &mut Engine<B>) -> Result<()> {
    let length = longest(args).min(2 * engine.max_rows());
    let prompt = tokens(length, engine.shape().vocab);
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
    let context = longest(args);
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
            let prefill = Prefill { tokens: n, tps: prefilled as f64 / seconds };
            if !args.json {
                bar.suspend(|| print_prefill(&prefill));
            }
            table.prefill.push(prefill);
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
            let decode = meter.decode(engine, 1, n, args.gen_tokens, seconds);
            if !args.json {
                bar.suspend(|| print_decode("decode", &decode));
            }
            table.decode.push(decode);
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
    let mut sessions = vec![session_of(engine, batch_context(args))?];
    sync(engine, &mut sessions[0], prompt)?;
    let prefilled = engine.snapshot(&mut sessions[0])?;
    for _ in 1..n {
        let mut session = session_of(engine, batch_context(args))?;
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

fn print_heading(table: &Table) {
    let bandwidth = table.bandwidth.map_or(String::new(), |b| format!(", reads {:.0} GB/s", b / 1e9));
    println!("{}{bandwidth}\n", table.device);
    println!("{:24} {:>9} {:>10} {:>9}  a step reads, of bandwidth", "", "context", "t/s", "ms/step");
}

fn print_prefill(p: &Prefill) {
    println!("{:24} {:9} {:10.2}", "prefill", p.tokens, p.tps);
}

fn print_decode(what: &str, d: &Decode) {
    let step = 1e3 * d.sessions as f64 / d.tps;
    println!("{what:24} {:9} {:10.2} {step:9.2}  {}", d.context, d.tps, d.traffic());
}
