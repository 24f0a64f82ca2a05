//! A `tokenizer.json` as GGUF metadata (`tokenizer.md` section 6).

use super::hugging_face::entries;
use super::{Error, Kind};
use crate::Marker;
use ds4_gguf::Value;

/// Keys and values that [`crate::Tokenizer::from_gguf`] and other engines read.
pub fn gguf_metadata(json: &[u8]) -> Result<Vec<(&'static str, Value)>, Error> {
    let entries = entries(json)?;
    let id = |marker: Marker| match entries.tokens.iter().position(|(text, _)| text == marker.text()) {
        Some(id) => Ok(Value::U32(id as u32)),
        None => Err(Error::Marker(marker.text())),
    };
    let (bos, eos, pad) = (id(Marker::Bos)?, id(Marker::Eos)?, id(Marker::Pad)?);
    let types = entries.tokens.iter().map(|(text, kind)| token_type(text, *kind)).collect();
    let tokens = entries.tokens.into_iter().map(|(text, _)| text).collect();
    let merges = entries.merges.into_iter().map(|(a, b)| format!("{a} {b}")).collect();
    Ok(vec![
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("joyai-llm".into())),
        ("tokenizer.ggml.tokens", Value::ArrayString(tokens)),
        ("tokenizer.ggml.token_type", Value::ArrayI32(types)),
        ("tokenizer.ggml.merges", Value::ArrayString(merges)),
        ("tokenizer.ggml.bos_token_id", bos),
        ("tokenizer.ggml.eos_token_id", eos),
        ("tokenizer.ggml.padding_token_id", pad),
        // The prompt renderer writes the markers.
        ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
        ("tokenizer.ggml.add_eos_token", Value::Bool(false)),
    ])
}

/// 1 normal, 3 control, 4 user-defined, 5 unused.
fn token_type(text: &str, kind: Kind) -> i32 {
    let between = |open: &str, close: &str| text.starts_with(open) && text.ends_with(close);
    match kind {
        Kind::Normal => 1,
        Kind::Unused => 5,
        Kind::Added { special: true } => 3,
        Kind::Added { .. } if between("<|", "|>") || between("<｜", "｜>") => 3,
        Kind::Added { .. } => 4,
    }
}
