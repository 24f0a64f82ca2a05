//! The official vocabulary, both ways.
#![allow(dead_code)]

use ds4_gguf::{Gguf, Value, Writer};
use ds4_text::Tokenizer;
use serde_json::Value as Json;
use std::path::Path;

pub fn data(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)).unwrap()
}

pub fn json(name: &str) -> Json {
    serde_json::from_slice(&data(name)).unwrap()
}

pub fn official_json() -> Vec<u8> {
    zstd::decode_all(&data("tokenizer.json.zst")[..]).unwrap()
}

pub fn from_json() -> Tokenizer {
    Tokenizer::from_json(&official_json()).unwrap()
}

/// A file with the metadata that converters write for the official vocabulary.
pub fn official_gguf(with_types: bool) -> Gguf {
    let file: Json = serde_json::from_slice(&official_json()).unwrap();
    let mut tokens = vec![(String::new(), 1); 129_280];
    for (text, id) in file["model"]["vocab"].as_object().unwrap() {
        tokens[id.as_u64().unwrap() as usize] = (text.clone(), 1);
    }
    for added in file["added_tokens"].as_array().unwrap() {
        let text = added["content"].as_str().unwrap();
        let barred = (text.starts_with("<|") && text.ends_with("|>"))
            || (text.starts_with("<｜") && text.ends_with("｜>"));
        let control = added["special"].as_bool().unwrap() || barred;
        tokens[added["id"].as_u64().unwrap() as usize] = (text.to_owned(), if control { 3 } else { 4 });
    }
    let merges = file["model"]["merges"].as_array().unwrap().iter().map(|m| match m {
        Json::String(s) => s.clone(),
        m => format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap()),
    });
    let mut writer = Writer::new("deepseek4");
    writer.set("tokenizer.ggml.merges", Value::ArrayString(merges.collect()));
    if with_types {
        writer.set("tokenizer.ggml.token_type", Value::ArrayI32(tokens.iter().map(|t| t.1).collect()));
    }
    writer.set("tokenizer.ggml.tokens", Value::ArrayString(tokens.into_iter().map(|t| t.0).collect()));
    let mut bytes = Vec::new();
    writer.write(&mut bytes, &mut |_, _| Ok(())).unwrap();
    Gguf::from_bytes(bytes).unwrap()
}
