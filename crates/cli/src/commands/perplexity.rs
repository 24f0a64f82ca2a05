//! `ds4 perplexity`: how well a model predicts a text, or given answers.

use super::lines;
use crate::args::PerplexityArgs;
use crate::device::{Description, Device};
use crate::load::{self, Wants, WithEngine, check_vocabulary};
use crate::texts::{ROWS, Texts};
use crate::{Result, ui};
use ds4_engine::Engine;
use ds4_model::NoTap;
use ds4_quantize::quality::{Nll, Row};
use ds4_text::{Mode, Profile, Tokenizer, official};
use serde::Deserialize;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;

pub(crate) fn run(args: &PerplexityArgs) -> Result<ExitCode> {
    let file = load::open(args.model.model.as_deref())?;
    let tokenizer = Tokenizer::from_gguf(file.metadata())?;
    let profile = Profile::of_file(file.metadata());
    let wants = |context| Wants::scoring(args.text.exact, context);
    if let Some(path) = &args.continuations {
        let cases = cases(path, &tokenizer, profile)?;
        let longest = cases.iter().map(|c| c.prompt.len() + c.answer.len()).max().unwrap_or(1);
        return load::with_engine(&file, &args.model, wants(longest), Answers { tokenizer, cases });
    }
    let path = args.file.as_deref().unwrap_or(Path::new(""));
    let texts = Texts::read(path, &tokenizer, profile, &args.text)?;
    load::with_engine(&file, &args.model, wants(texts.longest()), Text { tokenizer, texts })
}

struct Text {
    tokenizer: Tokenizer,
    texts: Texts,
}

impl WithEngine for Text {
    fn run<B: Device>(self, mut engine: Engine<B>, _: Description) -> Result<ExitCode> {
        let (vocab, mut nll) = (engine.shape().vocab, Nll::default());
        self.texts.run(
            "scoring",
            &mut engine,
            &self.tokenizer,
            false,
            &mut NoTap,
            &mut |tokens, next, logits| {
                let after = tokens.iter().skip(1).copied().chain(next);
                after.zip(logits.chunks_exact(vocab)).for_each(|(token, row)| {
                    nll.add(Row::new(row).log_prob(token as usize));
                });
                Ok(())
            },
        )?;
        println!("{} tokens in {} sequences", nll.tokens, self.texts.sequences.len());
        println!("{}", shown(&nll));
        Ok(ExitCode::SUCCESS)
    }
}

/// A result in a line.
pub(super) fn shown(nll: &Nll) -> String {
    let (mean, error) = (nll.mean(), nll.error());
    format!("NLL {mean:.4} ± {error:.4} nats a token, perplexity {:.3}", nll.perplexity())
}

/// A line of the file of answers.
#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    prompt: Option<String>,
    #[serde(default)]
    continuation: Option<String>,
    #[serde(default)]
    tokens: Option<Vec<u32>>,
    #[serde(default)]
    logprobs: Option<Vec<f64>>,
}

/// An answer to score.
struct Case {
    prompt: Vec<u32>,
    answer: Vec<u32>,
    /// The reference's logarithms of the tokens' probabilities.
    reference: Option<Vec<f64>>,
}

fn cases(path: &Path, tokenizer: &Tokenizer, profile: Profile) -> Result<Vec<Case>> {
    let cases = lines::read(path, |line| case(line, tokenizer, profile))?;
    if cases.is_empty() { Err(format!("{}: no line in it", path.display()).into()) } else { Ok(cases) }
}

fn case(line: &str, tokenizer: &Tokenizer, profile: Profile) -> Result<Case> {
    let Line { prompt, continuation, tokens, logprobs } = serde_json::from_str(line)?;
    let prompt = match prompt {
        Some(text) => tokenizer.encode(&text, Mode::Special),
        None => official::render_input(line, profile)?.to_tokens(tokenizer)?,
    };
    let answer = match (tokens, continuation) {
        (Some(tokens), _) => tokens,
        (None, Some(text)) => tokenizer.encode(&text, Mode::Special),
        (None, None) => return Err("neither \"continuation\" nor \"tokens\"".into()),
    };
    if prompt.is_empty() || answer.is_empty() {
        return Err("prompt and continuation need a token each".into());
    }
    if let Some(given) = logprobs.as_ref().map(Vec::len).filter(|&n| n != answer.len()) {
        return Err(format!("{given} logprobs for {} tokens", answer.len()).into());
    }
    Ok(Case { prompt, answer, reference: logprobs })
}

struct Answers {
    tokenizer: Tokenizer,
    cases: Vec<Case>,
}

/// How an answer fared.
struct Scored {
    nll: Nll,
    /// The first of its tokens that the model would not have taken.
    differs_at: Option<usize>,
    /// Mean and largest difference from the reference.
    off: Option<(f64, f64)>,
}

impl WithEngine for Answers {
    fn run<B: Device>(self, mut engine: Engine<B>, _: Description) -> Result<ExitCode> {
        check_vocabulary(&engine, &self.tokenizer)?;
        let mut total = Nll::default();
        let (mut whole, mut off) = (0, (0.0, 0.0f64, 0));
        println!(
            "{:>6} {:>7} {:>9} {:>11} {:>12} {:>12}",
            "case", "tokens", "NLL", "differs at", "mean off", "most off"
        );
        let bar = ui::items("answers");
        bar.set_length(self.cases.len() as u64);
        for (i, case) in self.cases.iter().enumerate() {
            let scored = score(&mut engine, case, &mut total)?;
            let differs = scored.differs_at.map_or("never".into(), |at| at.to_string());
            let [mean, most] = match scored.off {
                Some((mean, most)) => [mean, most].map(|v| format!("{v:.4}")),
                None => ["-", "-"].map(str::to_owned),
            };
            bar.suspend(|| {
                println!(
                    "{:6} {:7} {:9.4} {differs:>11} {mean:>12} {most:>12}",
                    i + 1,
                    case.answer.len(),
                    scored.nll.mean()
                );
            });
            whole += usize::from(scored.differs_at.is_none());
            if let Some((mean, most)) = scored.off {
                let n = case.answer.len();
                off = (off.0 + mean * n as f64, off.1.max(most), off.2 + n);
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        println!(
            "{} tokens; {whole} of {} answers are what the model would say",
            total.tokens,
            self.cases.len()
        );
        println!("{}", shown(&total));
        if off.2 > 0 {
            println!("off the reference: {:.4} in the mean, {:.4} at most", off.0 / off.2 as f64, off.1);
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Scores an answer's tokens, each by what comes before it.
fn score<B: Device>(engine: &mut Engine<B>, case: &Case, total: &mut Nll) -> Result<Scored> {
    let vocab = engine.shape().vocab;
    let mut session = engine.session(case.prompt.len() + case.answer.len())?;
    engine.sync(&mut session, &case.prompt, &mut |_, _| ControlFlow::Continue(()))?;
    let mut scored = Scored { nll: Nll::default(), differs_at: None, off: None };
    let (mut sum, mut most) = (0.0, 0.0f64);
    let mut see = |at: usize, logits: &[f32]| {
        let (row, token) = (Row::new(logits), case.answer[at] as usize);
        let log_prob = row.log_prob(token);
        scored.nll.add(log_prob);
        total.add(log_prob);
        if row.best != token {
            scored.differs_at.get_or_insert(at);
        }
        if let Some(reference) = &case.reference {
            let off = (log_prob - reference[at]).abs();
            (sum, most) = (sum + off, most.max(off));
        }
    };
    see(0, session.logits());
    let rows = ROWS.min(engine.max_rows());
    // What comes behind the last is nobody's question.
    for (i, piece) in case.answer[..case.answer.len() - 1].chunks(rows).enumerate() {
        let (logits, _) = engine.score(&mut session, piece, None, &mut NoTap)?;
        logits.chunks_exact(vocab).enumerate().for_each(|(k, row)| see(i * rows + k + 1, row));
    }
    scored.off = case.reference.as_ref().map(|r| (sum / r.len() as f64, most));
    Ok(scored)
}
