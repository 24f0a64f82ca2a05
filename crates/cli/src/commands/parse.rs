//! `ds4 parse`: answers to messages.

use super::lines;
use crate::Result;
use crate::args::ParseArgs;
use ds4_text::{Answer, End, Flaw, Marker, Parser, ParserOptions, Spelling, Start};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::process::ExitCode;

#[derive(Deserialize)]
struct Line {
    text: String,
    thinking_mode: ThinkingMode,
    /// Strings that end the answer.
    #[serde(default)]
    stop: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum ThinkingMode {
    Chat,
    Thinking,
}

#[derive(Serialize)]
struct Parsed {
    message: Value,
    finish: &'static str,
    /// What is not as it should be.
    #[serde(skip_serializing_if = "Option::is_none")]
    flaw: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    trailing: String,
}

pub(crate) fn run(args: &ParseArgs) -> Result<ExitCode> {
    lines::each(&args.jsonl, |line| Ok(parse(&serde_json::from_str(line)?, args)))?;
    Ok(ExitCode::SUCCESS)
}

fn parse(line: &Line, args: &ParseArgs) -> Parsed {
    let start = match line.thinking_mode {
        ThinkingMode::Chat => Start::Content,
        ThinkingMode::Thinking => Start::Reasoning,
    };
    let spelling = if args.loose { Spelling::Loose } else { Spelling::Marker };
    let mut parser = Parser::new(ParserOptions { start, tools: true, spelling, stop: line.stop.clone() });
    // The end marker ends the generation: what is behind it was never part of the answer.
    let (text, ended) = match line.text.split_once(Marker::Eos.text()) {
        Some((text, _)) => (text, true),
        None => (line.text.as_str(), false),
    };
    for bytes in text.as_bytes().chunks(args.stream.map_or(usize::MAX, |n| n as usize)) {
        parser.push_bytes(bytes);
    }
    parser.finish(End::Turn);
    let (flaw, done) = (parser.flaw(), parser.is_done());
    let answer = parser.into_answer();
    let finish = match (answer.calls.is_empty(), ended || done) {
        (false, _) => "tool_calls",
        (true, true) => "stop",
        (true, false) => "length",
    };
    Parsed {
        message: message(&answer),
        finish,
        flaw: flaw.as_ref().map(Flaw::to_string),
        trailing: answer.trailing,
    }
}

/// In the form of the official parser.
fn message(answer: &Answer) -> Value {
    let call = |call: &ds4_text::ToolCall| json!({"type": "function", "function": {"name": call.name, "arguments": call.arguments}});
    json!({
        "role": "assistant",
        "content": answer.content,
        "reasoning_content": answer.reasoning,
        "tool_calls": answer.calls.iter().map(call).collect::<Vec<_>>(),
    })
}
