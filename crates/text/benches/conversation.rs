//! A long conversation: rendering it, tokenizing it, and reading an answer. To be seen beside the time that a prefill of
//! the same tokens takes.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

#[path = "../tests/common/mod.rs"]
mod common;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ds4_text::{
    Assistant, Body, Instructions, Json, Message, Mode, Parser, ParserOptions, RenderOptions, Replay,
    ResultPart, ToolCall, ToolResult, render,
};

/// An agent's session of about 100,000 tokens: tools, and turns that read and write files.
fn conversation() -> Vec<Message> {
    let texts = |name: &str| -> String {
        common::cases(&format!("text-{name}.json")).iter().map(|c| c["text"].as_str().unwrap()).collect()
    };
    let (prose, code) = (texts("english"), texts("code").repeat(2));
    let tool = r#"{"name": "write_file", "description": "Writes a file", "parameters": {"type": "object", "properties":
        {"path": {"type": "string"}, "text": {"type": "string"}}, "required": ["path", "text"]}}"#;
    let tools = vec![Json::parse(tool).unwrap(); 20];
    let system = Instructions { text: prose.clone(), tools, response_format: None };
    let mut messages = vec![Body::System(system).into(), Message::user("Tidy up this project.")];
    for i in 0..24 {
        let arguments = serde_json::json!({"path": format!("src/{i}.rs"), "text": code}).to_string();
        let call = ToolCall { id: Some(i.to_string()), name: "write_file".into(), arguments };
        messages.push(
            Assistant { reasoning: prose.clone(), content: String::new(), calls: vec![call], open: false }
                .into(),
        );
        let parts = vec![ResultPart::Text(code.clone())];
        messages.push(Body::ToolResult(ToolResult { call: i.to_string(), parts }).into());
    }
    messages
}

fn benches(c: &mut Criterion) {
    let tokenizer = common::from_json();
    let (messages, options) = (conversation(), RenderOptions::default());
    let render = || render(&messages, &options, &mut Replay::default()).unwrap();
    let prompt = render();
    let tokens = prompt.to_tokens(&tokenizer).unwrap();
    println!("{} messages, {} bytes, {} tokens", messages.len(), prompt.to_text().len(), tokens.len());
    let mut group = c.benchmark_group("conversation");
    group.throughput(Throughput::Elements(tokens.len() as u64));
    group.bench_function("render", |b| b.iter(render));
    group.bench_function("tokenize", |b| b.iter(|| prompt.to_tokens(&tokenizer).unwrap()));
    // Its last answer over and over, as one long stream of tokens.
    let text = prompt.to_text();
    let block =
        &text[text.rfind("\n\n<｜DSML｜tool_calls>").unwrap()..text.rfind("<｜end▁of▁sentence｜>").unwrap()];
    let answer = tokenizer.encode(&block.replace("</｜DSML｜parameter>", "").repeat(20), Mode::Special);
    group.throughput(Throughput::Elements(answer.len() as u64));
    group.bench_function("parse an answer, token by token", |b| {
        b.iter(|| {
            let mut parser = Parser::new(ParserOptions { tools: true, ..ParserOptions::default() });
            answer.iter().map(|&id| parser.push_token(id, &tokenizer).len()).sum::<usize>()
        });
    });
    group.finish();
}

criterion_group! {
    name = conversations;
    config = Criterion::default().sample_size(10);
    targets = benches
}
criterion_main!(conversations);
