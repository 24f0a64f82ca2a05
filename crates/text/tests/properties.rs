//! What holds for every conversation and every answer.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::from_json;
use ds4_text::{
    Answer, Assistant, Body, Delta, Effort, End, Instructions, Json, Marker, Message, Parser, ParserOptions,
    Part, Prompt, RenderOptions, Replay, ResultPart, Spelling, Start, Thinking, Tokenizer, ToolCall,
    ToolResult, render, render_after,
};
use proptest::prelude::*;
use serde_json::{Map, Value};
use std::sync::LazyLock;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(from_json);

/// Text with everything that could be taken for structure.
fn text() -> impl Strategy<Value = String> {
    let pieces = prop_oneof![
        4 => "\\PC{0,6}",
        2 => "[ a-c\"'<>/&\n\r\t]{0,5}",
        1 => Just("｜DSML｜".to_owned()),
        1 => Just("</｜DSML｜parameter>".to_owned()),
        1 => Just("\n\n<｜DSML｜tool_calls>\n".to_owned()),
        1 => Just("</think>".to_owned()),
        1 => Just("<think>".to_owned()),
        1 => Just("<｜end▁of▁sentence｜>".to_owned()),
        1 => Just("</tool_result>".to_owned()),
    ];
    prop::collection::vec(pieces, 0..5).prop_map(|p| p.concat())
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<i32>().prop_map(|n| Value::from(f64::from(n / 1024) / 8.0)),
        text().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((text(), inner), 0..4).prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

/// A name that ends where its quotes do.
fn name() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9_.-]{1,12}|[a-c è<>'/]{1,6}"
}

fn call() -> impl Strategy<Value = ToolCall> {
    let arguments = prop::collection::vec((name(), json()), 0..5);
    (name(), arguments).prop_map(|(name, arguments)| {
        let arguments: Map<String, Value> = arguments.into_iter().collect();
        ToolCall { id: None, name, arguments: Value::Object(arguments).to_string() }
    })
}

fn assistant() -> impl Strategy<Value = Assistant> {
    (text(), text(), prop::collection::vec(call(), 0..4)).prop_map(|(reasoning, content, calls)| Assistant {
        reasoning,
        content,
        calls,
        open: false,
    })
}

fn message() -> impl Strategy<Value = Message> {
    prop_oneof![
        3 => text().prop_map(Message::user),
        1 => text().prop_map(Message::system),
        1 => text().prop_map(|t| Body::Reminder(t).into()),
        3 => assistant().prop_map(Message::from),
        1 => (text(), text()).prop_map(|(call, text)| {
            Body::ToolResult(ToolResult { call, parts: vec![ResultPart::Text(text)] }).into()
        }),
        1 => (text(), json()).prop_map(|(text, tool)| {
            let tools = vec![Json::parse(&tool.to_string()).unwrap()];
            Body::System(Instructions { text, tools, response_format: None }).into()
        }),
    ]
}

/// The tokens that the model would have to generate for an answer.
fn completion(assistant: &Assistant, thinking: bool) -> (Vec<u32>, Prompt) {
    let thinking = if thinking { Thinking::On(Effort::High) } else { Thinking::Off };
    let options = RenderOptions { thinking, ..RenderOptions::default() };
    let question = [Message::user("q")];
    let prompt =
        render_after(&question, &[assistant.clone().into()], &options, &mut Replay::default()).unwrap();
    let mut tokens = prompt.to_tokens(&TOKENIZER).unwrap();
    assert_eq!(tokens.pop(), Some(TOKENIZER.eos()));
    (tokens, prompt)
}

fn options(thinking: bool) -> ParserOptions {
    let start = if thinking { Start::Reasoning } else { Start::Content };
    ParserOptions { start, tools: true, ..ParserOptions::default() }
}

fn fold(deltas: &[Delta]) -> Answer {
    let mut answer = Answer::default();
    deltas.iter().for_each(|delta| answer.apply(delta));
    answer
}

/// Bytes that may well be an answer.
fn answer_text() -> impl Strategy<Value = String> {
    let pieces = prop_oneof![
        Just("\n\n<｜DSML｜tool_calls>\n"),
        Just("<｜DSML｜invoke name=\"f\">\n"),
        Just("<｜DSML｜parameter name=\"a\" string=\"true\">"),
        Just("<｜DSML｜parameter name=\"b\" string=\"false\">"),
        Just("<｜DSML｜parameter name=\"c\">"),
        Just("</｜DSML｜parameter>\n"),
        Just("</｜DSML｜invoke>\n"),
        Just("</｜DSML｜tool_calls>"),
        Just("<tool_calls>"),
        Just("<invoke name=\"g\">"),
        Just("</invoke>"),
        Just("<"),
        Just("｜DSML｜"),
        Just("\""),
        Just(" name=\"x\">"),
        Just("<think>"),
        Just("</think>"),
        Just("\r\n"),
        Just("\n"),
        Just("é"),
        Just("{\"k\": [1, \"s\\\""),
        Just("STOP"),
        Just("ST"),
    ];
    prop::collection::vec(pieces, 0..24).prop_map(|p| p.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// What is rendered is read back, whatever is in it.
    #[test]
    fn an_answer_is_read_as_it_was_written(assistant in assistant(), thinking: bool) {
        let (tokens, prompt) = completion(&assistant, thinking);
        let mut parser = Parser::new(options(thinking));
        let mut deltas = Vec::new();
        for token in tokens {
            deltas.extend(parser.push_token(token, &TOKENIZER));
        }
        deltas.extend(parser.finish(End::Turn));
        prop_assert_eq!(parser.flaw(), None);
        prop_assert_eq!(&fold(&deltas), parser.answer());
        let kept = parser.block().cloned();
        let answer = parser.into_answer();
        prop_assert_eq!(answer.reasoning, if thinking { assistant.reasoning.as_str() } else { "" });
        prop_assert_eq!(&answer.content, &assistant.content);
        prop_assert_eq!(answer.calls.len(), assistant.calls.len());
        for (read, made) in answer.calls.iter().zip(&assistant.calls) {
            prop_assert_eq!(&read.name, &made.name);
            prop_assert!(read.is_valid(), "{}", read.arguments);
            let value = |text: &str| serde_json::from_str::<Value>(text).unwrap();
            prop_assert_eq!(value(&read.arguments), value(&made.arguments));
        }
        // The block that is kept for replay is what was rendered.
        if let Some(block) = kept {
            let is_tag = |p: &Part| *p == Part::Marker(Marker::Dsml);
            let tags = |parts: &[Part]| parts.iter().filter(|p| is_tag(p)).count();
            prop_assert_eq!(tags(&block.parts), tags(prompt.parts()));
        }
    }

    /// However an answer is cut into pieces, the same comes of it.
    #[test]
    fn cuts_do_not_matter(
        text in answer_text(),
        thinking: bool,
        loose: bool,
        tools: bool,
        turn: bool,
        cuts in prop::collection::vec(1usize..9, 1..12),
    ) {
        let spelling = if loose { Spelling::Loose } else { Spelling::Marker };
        let options = ParserOptions { spelling, tools, stop: vec!["STOP".into()], ..options(thinking) };
        let end = if turn { End::Turn } else { End::Cut };
        let mut whole = Parser::new(options.clone());
        let mut whole_deltas = whole.push_bytes(text.as_bytes());
        whole_deltas.extend(whole.finish(end));
        let mut parts = Parser::new(options);
        let (mut deltas, mut rest, mut cuts) = (Vec::new(), text.as_bytes(), cuts.iter().cycle());
        while !rest.is_empty() {
            let (piece, after) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
            deltas.extend(parts.push_bytes(piece));
            rest = after;
        }
        deltas.extend(parts.finish(end));
        prop_assert_eq!(fold(&deltas), fold(&whole_deltas));
        prop_assert_eq!(parts.answer(), whole.answer());
        prop_assert_eq!(&fold(&deltas), parts.answer());
        prop_assert_eq!(parts.flaw(), whole.flaw());
        prop_assert_eq!(parts.block(), whole.block());
        prop_assert_eq!(parts.stopped(), whole.stopped());
    }

    /// No text is lost where nothing is made of it.
    #[test]
    fn without_calls_all_text_comes_out(text in answer_text()) {
        let mut parser = Parser::new(ParserOptions { tools: true, ..ParserOptions::default() });
        parser.push_bytes(text.as_bytes());
        parser.finish(End::Cut);
        let block = parser.block().is_some();
        let answer = parser.answer();
        // A marker of thinking at the very beginning changes what the text is, and is not part of it.
        if answer.calls.is_empty() && !block && !text.starts_with("<think>") && !text.starts_with("</think>") {
            prop_assert_eq!(&answer.content, &text);
        }
    }

    #[test]
    fn random_bytes_are_no_trouble(bytes in prop::collection::vec(any::<u8>(), 0..400), step in 1usize..9) {
        let mut parser = Parser::new(options(false));
        for piece in bytes.chunks(step) {
            parser.push_bytes(piece);
        }
        parser.finish(End::Turn);
        prop_assert_eq!(&parser.answer().content, &String::from_utf8_lossy(&bytes));
    }

    /// What is rendered in two steps is what is rendered in one, where the first step ends with an answer and no
    /// reasoning is left out.
    #[test]
    fn rendering_goes_on(before in prop::collection::vec(message(), 0..4), answer in assistant(), after in message()) {
        let options = RenderOptions {
            thinking: Thinking::On(Effort::Max),
            drop_reasoning: false,
            ..RenderOptions::default()
        };
        let mut context = before;
        context.push(answer.into());
        let mut all = context.clone();
        all.push(after.clone());
        let render_from = |context: &[Message], messages: &[Message]| {
            render_after(context, messages, &options, &mut Replay::default()).unwrap().to_text()
        };
        let (first, second) = (render_from(&[], &context), render_from(&context, std::slice::from_ref(&after)));
        let whole = render_from(&[], &all);
        // At the end of the context, an answer with nothing behind it is followed by nothing.
        prop_assert_eq!(first + &second, whole);
    }

    /// Marker tokens come from the renderer alone: the same conversation with harmless text has the same ones.
    #[test]
    fn clients_write_no_markers(messages in prop::collection::vec(message(), 0..5)) {
        let render = |messages: &[Message]| {
            let options = RenderOptions { thinking: Thinking::On(Effort::High), ..RenderOptions::default() };
            render(messages, &options, &mut Replay::default()).unwrap()
        };
        let prompt = render(&messages);
        let markers = prompt.parts().iter().filter(|p| matches!(p, Part::Marker(_))).count();
        let tokens = prompt.to_tokens(&TOKENIZER).unwrap();
        prop_assert_eq!(tokens.iter().filter(|&&t| TOKENIZER.marker_of(t).is_some()).count(), markers);
        prop_assert_eq!(TOKENIZER.decode(&tokens), prompt.to_text().into_bytes());
    }
}

/// A conversation that comes back as re-ordered, re-spaced JSON is rendered to the very text that was sampled.
#[test]
fn sampled_calls_are_replayed() {
    let sampled = "Let me see.\n<｜DSML｜tool_calls>\n<｜DSML｜invoke  name=\"f\">\n\
        <｜DSML｜parameter string=\"false\" name=\"b\">[1,2 ]</｜DSML｜parameter>\n\n\
        <｜DSML｜parameter name=\"a\" string=\"true\">x</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>";
    let mut parser = Parser::new(options(false));
    for token in TOKENIZER.encode(sampled, ds4_text::Mode::Special) {
        parser.push_token(token, &TOKENIZER);
    }
    parser.finish(End::Turn);
    let mut replay = Replay::default();
    let id = replay.fresh_id("call_").unwrap();
    replay.remember(parser.block().unwrap(), std::slice::from_ref(&id));
    let mut turn = Assistant::from(parser.into_answer());
    turn.calls[0] =
        ToolCall { id: Some(id), name: "f".into(), arguments: r#"{"a":"\u0078","b":[1,2]}"#.into() };
    let options = RenderOptions::default();
    let messages = [Message::user("q"), turn.into()];
    let again = render(&messages, &options, &mut replay).unwrap();
    let expected = format!("<｜User｜>q<｜Assistant｜></think>{sampled}<｜end▁of▁sentence｜>");
    assert_eq!(again.to_text(), format!("{}{expected}", Marker::Bos.text()));
    // The same tokens, not only the same text.
    let tokens = TOKENIZER.encode(&again.to_text(), ds4_text::Mode::Special);
    assert_eq!(again.to_tokens(&TOKENIZER).unwrap(), tokens);
    let canonical = render(&messages, &options, &mut Replay::default()).unwrap();
    assert_ne!(canonical, again);
}
