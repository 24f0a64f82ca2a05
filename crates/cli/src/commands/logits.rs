//! `ds4 logits`: every position's logits, and whatever led to them.

use crate::Result;
use crate::args::{LogitsArgs, Rounding};
use crate::device::{Description, Device};
use crate::load::{self, Wants, WithEngine};
use crate::ui;
use ds4_engine::Engine;
use ds4_model::cache::KvFormat;
use ds4_model::{NoTap, Tap};
use ds4_testkit::{NpyTaps, NpyWriter};
use std::process::ExitCode;

pub(crate) fn run(args: &LogitsArgs) -> Result<ExitCode> {
    let text = std::fs::read(&args.tokens).map_err(|e| format!("{}: {e}", args.tokens.display()))?;
    let tokens: Vec<u32> = serde_json::from_slice(&text)
        .map_err(|e| format!("{}: {e}; expected a JSON array of token ids", args.tokens.display()))?;
    let kv = match (args.rounding, args.exact) {
        (Rounding::Off, _) => KvFormat::Plain,
        (Rounding::Model, true) => KvFormat::Rounded,
        (Rounding::Model, false) => KvFormat::Packed,
    };
    let max_rows = (args.chunk as usize).min(tokens.len().max(1));
    let file = load::open(args.model.model.as_deref())?;
    let wants = Wants { exact: args.exact, kv, max_rows: Some(max_rows), context: tokens.len(), sessions: 1 };
    load::with_engine(&file, &args.model, wants, Logits { args, tokens, max_rows })
}

struct Logits<'a> {
    args: &'a LogitsArgs,
    tokens: Vec<u32>,
    max_rows: usize,
}

impl WithEngine for Logits<'_> {
    fn run<B: Device>(self, engine: Engine<B>, _: Description) -> Result<ExitCode> {
        write(self.args, engine, &self.tokens, self.max_rows)
    }
}

fn write<B: Device>(
    args: &LogitsArgs,
    mut engine: Engine<B>,
    tokens: &[u32],
    max_rows: usize,
) -> Result<ExitCode> {
    if args.mtp_out.is_some() && !engine.has_draft() {
        return Err("--mtp-out: the model has no draft block; name its file with --mtp FILE".into());
    }
    let vocab = engine.shape().vocab as u64;
    let mut out = NpyWriter::create(&args.out, &[tokens.len() as u64, vocab])?;
    let drafts = tokens.len().saturating_sub(1) as u64;
    let mut draft_out = args.mtp_out.as_ref().map(|p| NpyWriter::create(p, &[drafts, vocab])).transpose()?;
    let mut taps = args.taps.as_ref().map(|dir| NpyTaps::create(dir)).transpose()?;
    let mut session = engine.session(tokens.len())?;
    let bar = ui::tokens("logits", tokens.len());
    for (i, chunk) in tokens.chunks(max_rows).enumerate() {
        // The draft of the last position needs a token that is not there; any will do, its row is dropped.
        let next = draft_out.as_ref().map(|_| tokens.get((i + 1) * max_rows).copied().unwrap_or(0));
        let mut no_tap = NoTap;
        let tap: &mut (dyn Tap + Send) = match &mut taps {
            Some(taps) => taps,
            None => &mut no_tap,
        };
        let (logits, draft) = engine.score(&mut session, chunk, next, tap)?;
        out.write(&logits)?;
        if let (Some(file), Some(draft)) = (&mut draft_out, draft) {
            let last = (i + 1) * max_rows >= tokens.len();
            file.write(&draft[..draft.len() - if last { vocab as usize } else { 0 }])?;
        }
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    out.finish()?;
    draft_out.map(NpyWriter::finish).transpose()?;
    taps.map(NpyTaps::finish).transpose()?;
    Ok(ExitCode::SUCCESS)
}
