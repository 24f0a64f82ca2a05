//! `ds4 tokenize`: lines of text to token ids.

use super::lines;
use crate::Result;
use crate::args::TokenizeArgs;
use ds4_text::Mode;
use serde::Deserialize;
use std::process::ExitCode;

#[derive(Deserialize)]
struct Line {
    text: String,
    #[serde(default)]
    plain: bool,
}

pub(crate) fn run(args: &TokenizeArgs) -> Result<ExitCode> {
    let (tokenizer, _) = lines::tokenizer(Some(&args.tokenizer))?;
    lines::each(&args.jsonl, |line| {
        let line: Line = serde_json::from_str(line)?;
        Ok(tokenizer.encode(&line.text, if line.plain { Mode::Plain } else { Mode::Special }))
    })?;
    Ok(ExitCode::SUCCESS)
}
