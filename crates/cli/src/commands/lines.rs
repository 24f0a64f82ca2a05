//! Lines of JSON: read, and for some commands a line printed for each.

use crate::{Result, load};
use ds4_gguf::Gguf;
use ds4_text::Tokenizer;
use serde::Serialize;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Prints what `answer` makes of each line of a file, or of standard input for `-`. Its errors are given the line's number.
pub(super) fn each<T: Serialize>(path: &Path, mut answer: impl FnMut(&str) -> Result<T>) -> Result<()> {
    let input: Box<dyn BufRead> = if path.as_os_str() == "-" {
        Box::new(std::io::stdin().lock())
    } else {
        Box::new(BufReader::new(File::open(path).map_err(|e| format!("{}: {e}", path.display()))?))
    };
    let mut out = BufWriter::new(std::io::stdout().lock());
    for (i, line) in input.lines().enumerate() {
        let line = line?;
        if line.trim().is_empty() {
            continue;
        }
        let answer = answer(&line).map_err(|e| format!("{}: line {}: {e}", path.display(), i + 1))?;
        serde_json::to_writer(&mut out, &answer)?;
        out.write_all(b"\n")?;
    }
    Ok(out.flush()?)
}

/// A file, or every file of a folder that ends in one of `extensions`, by name.
pub(crate) fn files(path: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.into()]);
    }
    let named = |e: std::io::Error| format!("{}: {e}", path.display());
    let entries = std::fs::read_dir(path).map_err(named)?;
    let mut files = entries.map(|e| Ok(e?.path())).collect::<std::io::Result<Vec<_>>>().map_err(named)?;
    files.retain(|f| f.extension().is_some_and(|e| extensions.iter().any(|known| e == *known)));
    files.sort();
    Ok(files)
}

/// A whole file.
pub(crate) fn text(path: &Path) -> Result<String> {
    Ok(std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?)
}

/// What `read` makes of each line of a file. Its errors are given the line's number.
pub(crate) fn read<T>(path: &Path, mut read: impl FnMut(&str) -> Result<T>) -> Result<Vec<T>> {
    let text = text(path)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(i, line)| read(line).map_err(|e| format!("{}: line {}: {e}", path.display(), i + 1).into()))
        .collect()
}

/// A vocabulary from either kind of file, told apart by content, and the model file if it is one.
pub(super) fn tokenizer(path: Option<&Path>) -> Result<(Tokenizer, Option<Gguf>)> {
    let gguf = |file: Gguf| Ok((Tokenizer::from_gguf(file.metadata())?, Some(file)));
    let Some(path) = path else { return gguf(load::open(None)?) };
    let named = |e: std::io::Error| format!("{}: {e}", path.display());
    let mut magic = [0; 4];
    let read = std::io::Read::read(&mut File::open(path).map_err(named)?, &mut magic).map_err(named)?;
    if &magic[..read] == b"GGUF" {
        return gguf(Gguf::open(path)?);
    }
    Ok((Tokenizer::from_json(&std::fs::read(path).map_err(named)?)?, None))
}
