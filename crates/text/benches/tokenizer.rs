//! Loading the full vocabulary, and encoding.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../tests/common/mod.rs"]
mod common;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ds4_text::{Mode, Tokenizer};

fn tokenizer(c: &mut Criterion) {
    let gguf = common::official_gguf(true);
    c.bench_function("load 129,280 tokens from GGUF metadata", |b| {
        b.iter(|| Tokenizer::from_gguf(gguf.metadata()).unwrap());
    });
    let json = common::official_json();
    c.bench_function("load 129,280 tokens from tokenizer.json", |b| {
        b.iter(|| Tokenizer::from_json(&json).unwrap());
    });
    let tokenizer = Tokenizer::from_json(&json).unwrap();
    let mut text = String::new();
    for name in ["english", "code", "chinese"] {
        for case in common::json(&format!("text-{name}.json"))["cases"].as_array().unwrap() {
            text.push_str(case["text"].as_str().unwrap());
        }
    }
    let text = text.repeat(20);
    let mut group = c.benchmark_group("encode");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("english, code and chinese", |b| b.iter(|| tokenizer.encode(&text, Mode::Plain)));
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = tokenizer
}
criterion_main!(benches);
