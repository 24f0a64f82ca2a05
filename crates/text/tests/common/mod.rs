//! The official vocabulary, both ways, and the fixtures.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use ds4_gguf::{Gguf, Writer};
use ds4_text::{Tokenizer, gguf_metadata};
use serde_json::Value as Json;
use std::path::Path;

/// A file's bytes; large ones are compressed.
pub fn data(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(_) => zstd::decode_all(&std::fs::read(path.with_added_extension("zst")).unwrap()[..]).unwrap(),
    }
}

pub fn json(name: &str) -> Json {
    serde_json::from_slice(&data(name)).unwrap()
}

/// The cases of a file, each as its text: values keep their digits.
pub fn cases(name: &str) -> Vec<Json> {
    match json(name)["cases"].take() {
        Json::Array(cases) => cases,
        _ => Vec::new(),
    }
}

pub fn official_json() -> Vec<u8> {
    data("tokenizer.json")
}

pub fn from_json() -> Tokenizer {
    Tokenizer::from_json(&official_json()).unwrap()
}

/// A file with the metadata that converters write for the official vocabulary.
pub fn official_gguf(with_types: bool) -> Gguf {
    let mut writer = Writer::new("deepseek4");
    for (key, value) in gguf_metadata(&official_json()).unwrap() {
        if with_types || key != "tokenizer.ggml.token_type" {
            writer.set(key, value);
        }
    }
    let mut bytes = Vec::new();
    writer.write(&mut bytes, &mut |_, _| Ok(())).unwrap();
    Gguf::from_bytes(bytes).unwrap()
}
