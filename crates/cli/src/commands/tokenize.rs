//! `ds4 tokenize`: many texts in one process.

use crate::Result;
use crate::args::TokenizeArgs;
use ds4_gguf::Gguf;
use ds4_text::{Mode, Tokenizer};
use serde::Deserialize;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use std::process::ExitCode;

#[derive(Deserialize)]
struct Line {
    text: String,
    #[serde(default)]
    plain: bool,
}

/// A vocabulary from either kind of file, told apart by content.
fn tokenizer(path: &Path) -> Result<Tokenizer> {
    let named = |e: std::io::Error| format!("{}: {e}", path.display());
    let mut magic = [0; 4];
    let read = std::io::Read::read(&mut File::open(path).map_err(named)?, &mut magic).map_err(named)?;
    if &magic[..read] == b"GGUF" {
        return Ok(Tokenizer::from_gguf(Gguf::open(path)?.metadata())?);
    }
    Ok(Tokenizer::from_json(&std::fs::read(path).map_err(named)?)?)
}

pub(crate) fn run(args: &TokenizeArgs) -> Result<ExitCode> {
    let tokenizer = tokenizer(&args.tokenizer)?;
    let input: Box<dyn BufRead> = if args.jsonl.as_os_str() == "-" {
        Box::new(std::io::stdin().lock())
    } else {
        let file = File::open(&args.jsonl).map_err(|e| format!("{}: {e}", args.jsonl.display()))?;
        Box::new(BufReader::new(file))
    };
    let mut out = BufWriter::new(std::io::stdout().lock());
    for (i, line) in input.lines().enumerate() {
        let line = line?;
        if line.trim().is_empty() {
            continue;
        }
        let line: Line = serde_json::from_str(&line)
            .map_err(|e| format!("{}: line {}: {e}", args.jsonl.display(), i + 1))?;
        let mode = if line.plain { Mode::Plain } else { Mode::Special };
        serde_json::to_writer(&mut out, &tokenizer.encode(&line.text, mode))?;
        out.write_all(b"\n")?;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}
