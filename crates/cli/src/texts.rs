//! Texts that models are run over: files of them to sequences of tokens.

use crate::args::TextArgs;
use crate::commands::lines;
use crate::device::Device;
use crate::load::check_vocabulary;
use crate::{Result, ui};
use ds4_engine::Engine;
use ds4_model::Tap;
use ds4_text::{Mode, Profile, Tokenizer, official};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::path::Path;

/// Most tokens of a pass: the logits of each are kept.
pub(crate) const ROWS: usize = 256;

/// Is given every piece that was computed: its tokens, the one after them (none at the end), and the logits of each `[tokens,
/// vocab]`.
type See<'a> = dyn FnMut(&[u32], Option<u32>, &[f32]) -> Result<()> + 'a;

/// Texts as sequences of tokens, each of which begins with the token of the beginning and has more than that.
pub(crate) struct Texts {
    pub(crate) sequences: Vec<Vec<u32>>,
}

/// A line of text in a file of JSON lines.
#[derive(Deserialize)]
struct Line {
    text: String,
    /// Whether markers in it are text like any other.
    #[serde(default)]
    plain: bool,
}

impl Texts {
    /// Reads a file, or all files of a folder.
    pub(crate) fn read(
        path: &Path,
        tokenizer: &Tokenizer,
        profile: Profile,
        args: &TextArgs,
    ) -> Result<Self> {
        let mut sequences = Vec::new();
        let mut add = |tokens: &[u32]| cut(tokens, tokenizer.bos(), args.ctx, &mut sequences);
        for file in lines::files(path, &["jsonl", "txt"])? {
            if file.extension().is_some_and(|e| e == "jsonl") {
                let read = lines::read(&file, |line| documents(line, tokenizer, profile))?;
                read.iter().flatten().for_each(|tokens| add(tokens));
            } else {
                add(&tokenizer.encode(&lines::text(&file)?, Mode::Plain));
            }
        }
        let total: usize = sequences.iter().map(Vec::len).sum();
        if let Some(most) = args.max_tokens.filter(|&most| most < total) {
            thin(&mut sequences, most, total);
        }
        if sequences.is_empty() {
            return Err(format!("{}: no text in it", path.display()).into());
        }
        Ok(Texts { sequences })
    }

    /// Tokens of all sequences.
    pub(crate) fn tokens(&self) -> usize {
        self.sequences.iter().map(Vec::len).sum()
    }

    /// Tokens of the longest.
    pub(crate) fn longest(&self) -> usize {
        self.sequences.iter().map(Vec::len).max().unwrap_or(1)
    }

    /// Runs the model over each sequence, and the draft block too if it is to be observed.
    pub(crate) fn run<B: Device>(
        &self,
        what: &'static str,
        engine: &mut Engine<B>,
        tokenizer: &Tokenizer,
        draft: bool,
        tap: &mut (dyn Tap + Send),
        see: &mut See<'_>,
    ) -> Result<()> {
        check_vocabulary(engine, tokenizer)?;
        let rows = ROWS.min(engine.max_rows());
        let mut session = engine.session(self.longest())?;
        let bar = ui::tokens(what, self.tokens());
        for sequence in &self.sequences {
            engine.rewind(&mut session, 0)?;
            for (i, piece) in sequence.chunks(rows).enumerate() {
                let next = sequence.get((i + 1) * rows).copied();
                // The draft block looks one token ahead; behind the last is the end.
                let ahead = next.unwrap_or(tokenizer.eos());
                let (logits, _) = engine.score(&mut session, piece, draft.then_some(ahead), tap)?;
                see(piece, next, &logits)?;
                bar.inc(piece.len() as u64);
            }
        }
        bar.finish_and_clear();
        Ok(())
    }
}

/// What a line holds: a text, or a conversation in both modes if it does not name one.
fn documents(line: &str, tokenizer: &Tokenizer, profile: Profile) -> Result<Vec<Vec<u32>>> {
    const MODE: &str = "thinking_mode";
    let fields: BTreeMap<String, &RawValue> = serde_json::from_str(line)?;
    if !fields.contains_key("messages") {
        let line: Line = serde_json::from_str(line)?;
        return Ok(vec![tokenizer.encode(&line.text, if line.plain { Mode::Plain } else { Mode::Special })]);
    }
    let render =
        |line: &str| -> Result<_> { Ok(official::render_input(line, profile)?.to_tokens(tokenizer)?) };
    if fields.contains_key(MODE) {
        return Ok(vec![render(line)?]);
    }
    ["\"chat\"", "\"thinking\""]
        .into_iter()
        .map(|mode| {
            let mut fields = fields.clone();
            fields.insert(MODE.into(), serde_json::from_str(mode)?);
            render(&serde_json::to_string(&fields)?)
        })
        .collect()
}

/// Cuts a text into sequences of up to `most` tokens, each with the token of the beginning first.
fn cut(tokens: &[u32], bos: u32, most: usize, out: &mut Vec<Vec<u32>>) {
    let tokens = tokens.strip_prefix(&[bos]).unwrap_or(tokens);
    out.extend(tokens.chunks(most - 1).map(|piece| [&[bos], piece].concat()));
}

/// Keeps some of the sequences, evenly spread, of about `most` tokens together; of the first its beginning, if each is longer.
fn thin(sequences: &mut Vec<Vec<u32>>, most: usize, total: usize) {
    if sequences.iter().all(|s| s.len() > most) {
        sequences.truncate(1);
        return sequences.iter_mut().for_each(|s| s.truncate(most));
    }
    let (mut before, mut kept) = (0, 0);
    sequences.retain(|s| {
        before += s.len();
        // What should be there by now.
        let keep = (before as f64 * most as f64 / total as f64) as usize >= kept + s.len();
        kept += if keep { s.len() } else { 0 };
        keep
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut() {
        let mut out = Vec::new();
        cut(&[0, 5, 6, 7, 8, 9], 0, 3, &mut out);
        cut(&[5], 0, 3, &mut out);
        cut(&[0], 0, 3, &mut out);
        assert_eq!(out, [vec![0, 5, 6], vec![0, 7, 8], vec![0, 9], vec![0, 5]]);
    }

    #[test]
    fn thinning_is_even() {
        let mut sequences: Vec<Vec<u32>> = (0..100).map(|i| vec![i; 10]).collect();
        thin(&mut sequences, 250, 1000);
        let first: Vec<u32> = sequences.iter().map(|s| s[0]).collect();
        assert_eq!(first.len(), 25);
        assert!(first.windows(2).all(|w| w[1] - w[0] == 4), "{first:?}");
        thin(&mut sequences, 7, 250);
        assert_eq!(sequences, [vec![first[0]; 7]]);
    }
}
