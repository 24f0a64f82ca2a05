//! `ds4 compare`: how far a model's predictions are from another's.
//!
//! The models are run one after the other, so that each may take all memory there is; what the first computes waits in temporary
//! files.

use super::perplexity::shown;
use crate::Result;
use crate::args::{CompareArgs, ModelArgs, TextArgs};
use crate::device::{Description, Device};
use crate::load::{self, Wants, WithEngine};
use crate::texts::Texts;
use ds4_engine::Engine;
use ds4_gguf::Gguf;
use ds4_model::{Shape, Tap};
use ds4_quantize::quality::{Agreement, Row, StepErrors};
use ds4_text::{Profile, Tokenizer};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, Write};
use std::process::ExitCode;

/// Tokens whose steps are looked at: the results are large.
const STEP_TOKENS: usize = 512;

/// Tokens that are compared unless told otherwise: their logits wait on disk.
const TOKENS: usize = 16384;

/// Bytes of the buffers before the temporary files.
const BUFFER: usize = 1 << 20;

pub(crate) fn run(args: &CompareArgs) -> Result<ExitCode> {
    let (base, other) = (Gguf::open(&args.base)?, Gguf::open(&args.other)?);
    let shapes = (Shape::from_gguf(&base)?, Shape::from_gguf(&other)?);
    let dims = |s: &Shape| (s.vocab, s.width, s.streams, s.layers.clone());
    if dims(&shapes.0) != dims(&shapes.1) {
        let (base, other) = (args.base.display(), args.other.display());
        return Err(format!("{base} and {other}: models of different shapes, expected two of one").into());
    }
    let tokenizer = Tokenizer::from_gguf(base.metadata())?;
    let most = args.text.max_tokens.unwrap_or(TOKENS);
    let text = TextArgs { max_tokens: Some(most), ..args.text };
    let texts = Texts::read(&args.file, &tokenizer, Profile::of_file(base.metadata()), &text)?;
    let model = ModelArgs { model: None, mtp: None, compute: args.compute.clone() };
    let wants = Wants::scoring(text.exact, texts.longest());
    let scratch = Scratch { logits: tempfile::tempfile()?, steps: tempfile::tempfile()? };
    load::with_engine(
        &base,
        &model,
        wants,
        First { tokenizer: &tokenizer, texts: &texts, scratch: &scratch },
    )?;
    (&scratch.logits).rewind()?;
    (&scratch.steps).rewind()?;
    load::with_engine(
        &other,
        &model,
        wants,
        Second { tokenizer: &tokenizer, texts: &texts, scratch: &scratch },
    )
}

/// What the first model computed, in the order of computation: f32 as this machine has them.
struct Scratch {
    logits: File,
    steps: File,
}

/// Looks at what each layer makes of the first tokens.
struct Steps<F> {
    tokens: usize,
    /// Keeps or compares a step's values.
    see: F,
    failure: Option<std::io::Error>,
}

impl<F: FnMut(&str, &[f32]) -> std::io::Result<()>> Tap for Steps<F> {
    fn on(&self) -> bool {
        self.tokens < STEP_TOKENS && self.failure.is_none()
    }

    fn wants(&self, name: &str) -> bool {
        name == "output_in" || [".attn_out", ".ffn_out", ".streams"].iter().any(|s| name.ends_with(s))
    }

    fn rows(&mut self, name: &str, width: usize, values: &[f32]) {
        // The last step of a token.
        if name == "output_in" {
            self.tokens += values.len() / width.max(1);
        }
        self.failure = (self.see)(name, values).err().or(self.failure.take());
    }
}

fn write(file: &mut impl Write, values: &[f32]) -> std::io::Result<()> {
    values.iter().try_for_each(|v| file.write_all(&v.to_ne_bytes()))
}

fn read(file: &mut impl Read, n: usize) -> std::io::Result<Vec<f32>> {
    let mut bytes = vec![0; 4 * n];
    file.read_exact(&mut bytes)?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_ne_bytes(*b)).collect())
}

/// Runs the first model.
struct First<'a> {
    tokenizer: &'a Tokenizer,
    texts: &'a Texts,
    scratch: &'a Scratch,
}

impl WithEngine for First<'_> {
    fn run<B: Device>(self, mut engine: Engine<B>, _: Description) -> Result<ExitCode> {
        let mut logits = BufWriter::with_capacity(BUFFER, &self.scratch.logits);
        let mut file = BufWriter::with_capacity(BUFFER, &self.scratch.steps);
        let see = |_: &str, values: &[f32]| write(&mut file, values);
        let mut steps = Steps { tokens: 0, see, failure: None };
        self.texts.run(
            "first model",
            &mut engine,
            self.tokenizer,
            false,
            &mut steps,
            &mut |_, _, rows| Ok(write(&mut logits, rows)?),
        )?;
        steps.failure.map_or(Ok(()), Err)?;
        logits.flush()?;
        file.flush()?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Runs the second model, and compares.
struct Second<'a> {
    tokenizer: &'a Tokenizer,
    texts: &'a Texts,
    scratch: &'a Scratch,
}

impl WithEngine for Second<'_> {
    fn run<B: Device>(self, mut engine: Engine<B>, _: Description) -> Result<ExitCode> {
        let mut logits = BufReader::with_capacity(BUFFER, &self.scratch.logits);
        let mut file = BufReader::with_capacity(BUFFER, &self.scratch.steps);
        let (vocab, mut agreement, mut errors) =
            (engine.shape().vocab, Agreement::default(), StepErrors::default());
        let see = |name: &str, values: &[f32]| {
            errors.add(name, &read(&mut file, values.len())?, values);
            Ok(())
        };
        let mut steps = Steps { tokens: 0, see, failure: None };
        self.texts.run(
            "second model",
            &mut engine,
            self.tokenizer,
            false,
            &mut steps,
            &mut |tokens, next, rows| {
                let base = read(&mut logits, rows.len())?;
                let after = tokens.iter().skip(1).copied().chain(next);
                for ((a, b), token) in base.chunks_exact(vocab).zip(rows.chunks_exact(vocab)).zip(after) {
                    agreement.add(&Row::new(a), &Row::new(b), token as usize);
                }
                Ok(())
            },
        )?;
        steps.failure.map_or(Ok(()), Err)?;
        print(&agreement, &errors, self.tokenizer);
        Ok(ExitCode::SUCCESS)
    }
}

fn print(agreement: &Agreement, errors: &StepErrors, tokenizer: &Tokenizer) {
    let n = agreement.positions();
    println!("{:14} {}", "first model", shown(&agreement.base));
    println!("{:14} {}", "second model", shown(&agreement.other));
    let [median, most] = [0.5, 0.99].map(|share| agreement.divergence_at(share));
    println!(
        "{:14} {:.5} nats a token in the mean, {median:.5} median, {most:.5} at 99 %, {:.5} at most",
        "KL divergence",
        agreement.mean_divergence(),
        agreement.divergence_at(1.0)
    );
    let share = 100.0 * agreement.same_best as f64 / n.max(1) as f64;
    println!("{:14} {share:.2} % of {n} positions", "same best");
    match agreement.first_difference {
        None => println!("{:14} never", "first other"),
        Some((at, a, b)) => {
            let text = |token: usize| tokenizer.decode_text(&[token as u32], false);
            println!("{:14} position {at}: {:?}, then {:?}", "first other", text(a), text(b));
        }
    }
    println!("\nrelative error of what each layer makes of the first {STEP_TOKENS} tokens");
    println!("{:8} {:>10} {:>10} {:>10}", "layer", "attn_out", "ffn_out", "streams");
    let all: Vec<_> = errors.relative().filter(|(name, _)| *name != "output_in").collect();
    for steps in all.chunks(3) {
        let layer = steps[0].0.rsplit_once('.').map_or("", |(layer, _)| layer);
        let columns: String = steps.iter().map(|(_, error)| format!(" {error:10.2e}")).collect();
        println!("{layer:8}{columns}");
    }
}
