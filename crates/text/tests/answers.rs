//! Answers: what the official parser accepts is read as it reads it; all else has an outcome.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod common;

use common::{cases, from_json};
use ds4_text::{Answer, Delta, End, Flaw, Marker, Parser, ParserOptions, Spelling, Start, ToolCall};
use serde_json::Value as Json;

/// What came of an answer.
struct Read {
    answer: Answer,
    flaw: Option<Flaw>,
    stopped: Option<String>,
    deltas: Vec<Delta>,
}

fn options(thinking: bool) -> ParserOptions {
    let start = if thinking { Start::Reasoning } else { Start::Content };
    ParserOptions { start, tools: true, ..ParserOptions::default() }
}

fn read(text: &str, options: ParserOptions, step: usize, end: End) -> Read {
    let mut parser = Parser::new(options);
    let mut deltas = Vec::new();
    for bytes in text.as_bytes().chunks(step) {
        deltas.extend(parser.push_bytes(bytes));
    }
    deltas.extend(parser.finish(end));
    let (flaw, stopped) = (parser.flaw(), parser.stopped().map(str::to_owned));
    Read { answer: parser.into_answer(), flaw, stopped, deltas }
}

fn whole(text: &str) -> Read {
    read(text, options(false), usize::MAX, End::Turn)
}

/// The text of a case, without the end marker, and whether it thinks.
fn input(case: &Json) -> (String, bool) {
    let text = case["input"]["text"].as_str().unwrap();
    let text = text.split(Marker::Eos.text()).next().unwrap();
    (text.to_owned(), case["input"]["thinking_mode"] == "thinking")
}

fn calls(expected: &Json) -> Vec<(String, String)> {
    let text = |v: &Json| v.as_str().unwrap().to_owned();
    let function = |c: &Json| {
        let f = c.get("function").unwrap_or(c);
        (text(&f["name"]), text(&f["arguments"]))
    };
    expected.as_array().unwrap().iter().map(function).collect()
}

fn made(answer: &Answer) -> Vec<(String, String)> {
    answer.calls.iter().map(|c| (c.name.clone(), c.arguments.clone())).collect()
}

#[test]
fn what_the_official_parser_accepts() {
    let accepted = cases("parse-accepted.json");
    for case in &accepted {
        let (text, thinking) = input(case);
        let expected = &case["expected"]["message"];
        for step in [usize::MAX, 1, 3, 7] {
            let read = read(&text, options(thinking), step, End::Turn);
            let id = &case["id"];
            assert_eq!(read.answer.content, expected["content"].as_str().unwrap(), "{id}");
            assert_eq!(read.answer.reasoning, expected["reasoning_content"].as_str().unwrap(), "{id}");
            assert_eq!(made(&read.answer), calls(&expected["tool_calls"]), "{id}");
            assert_eq!(read.answer.trailing, "", "{id}");
            // Two that it accepts although they are cut off or oddly spelled.
            let odd = ["unterminated-invoke-newline", "nested-params"].contains(&id.as_str().unwrap());
            assert_eq!(read.flaw.is_some(), odd, "{id}: {:?}", read.flaw);
        }
    }
    assert_eq!(accepted.len(), 40);
}

/// What comes of each that the official parser rejects: its flaw, and the content, reasoning, calls and trailing text.
#[test]
fn what_the_official_parser_rejects() {
    let outcomes: std::collections::BTreeMap<String, String> = cases("parse-rejected.json")
        .iter()
        .map(|case| {
            let (text, thinking) = input(case);
            let read = read(&text, options(thinking), 5, End::Turn);
            let a = &read.answer;
            let flaw = read.flaw.map_or("none".into(), |f| f.to_string());
            let outcome = format!(
                "{flaw} | {:?} | {:?} | {:?} | {:?}",
                a.reasoning,
                a.content,
                made(a).iter().map(|(name, arguments)| format!("{name}({arguments})")).collect::<Vec<_>>(),
                a.trailing
            );
            (case["id"].as_str().unwrap().to_owned(), outcome)
        })
        .collect();
    let text: String = outcomes.iter().map(|(id, outcome)| format!("{id}: {outcome}\n")).collect();
    let expected = String::from_utf8(common::data("parse-rejected-outcomes.txt")).unwrap();
    if text != expected {
        println!("{text}");
    }
    assert_eq!(text, expected);
}

/// Streams as another implementation reads them: it drops the line ends around thinking and at the beginning of text,
/// which we keep, since they are part of the conversation; all else is the same but for what `docs/prompt.md` lists.
#[test]
fn streams_as_observed() {
    // Tool calls in thinking are not made; JSON answers are enforced by grammar, not cut out of prose; a call that is cut
    // off is text.
    let different = ["call-inside-reasoning", "json-fenced", "json-prose-first", "length-in-call"];
    let tokenizer = from_json();
    let mut same = 0;
    for case in cases("stream-observed.json") {
        let id = case["id"].as_str().unwrap();
        if different.contains(&id) {
            continue;
        }
        let wants = &case["options"];
        let is = |key: &str| wants[key] == true;
        let start = match (wants["stage"].as_str(), is("starts_in_tool_calls"), is("thinking")) {
            (Some("ContentContinuation"), ..) => Start::Content,
            (_, true, _) => Start::Calls,
            (_, _, true) => Start::Reasoning,
            _ => Start::Content,
        };
        let stop = wants["stop_sequences"].as_array().into_iter().flatten();
        let mut parser = Parser::new(ParserOptions {
            start,
            tools: wants["parse_tool_calls"] != false,
            spelling: Spelling::Marker,
            stop: stop.map(|s| s.as_str().unwrap().to_owned()).collect(),
        });
        let mut theirs = 0;
        for step in case["steps"].as_array().unwrap() {
            match &step["in"] {
                Json::Number(token) => drop(parser.push_token(token.as_u64().unwrap() as u32, &tokenizer)),
                Json::String(text) => drop(parser.push_bytes(text.as_bytes())),
                _ => {}
            }
            // No text is held back longer than there.
            let text = |v: &Json| v.as_str().map_or(0, str::len);
            let emitted = step["out"].as_array().unwrap().iter();
            theirs += emitted.map(|d| text(&d["content"]) + text(&d["reasoning_content"])).sum::<usize>();
            let ours = parser.answer().content.len() + parser.answer().reasoning.len();
            assert!(ours >= theirs, "{id}: {ours} bytes where {theirs} were out");
        }
        parser.finish(End::Turn);
        let last = &case["final"];
        let trim = |text: &str| text.trim_matches('\n').to_owned();
        let of = |key: &str| trim(last[key].as_str().unwrap_or_default());
        let answer = parser.answer();
        // A marker that means nothing is text to us, and dropped there.
        let content = answer.content.replace(Marker::ThinkEnd.text(), "");
        assert_eq!(trim(&content), of("content"), "{id}");
        assert_eq!(trim(&answer.reasoning), of("reasoning_content"), "{id}");
        assert_eq!(made(answer), calls(&last["tool_calls"]), "{id}");
        same += 1;
    }
    assert_eq!(same, 21);
}

#[test]
fn calls_as_they_come() {
    let text = "Hm.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n\
        <｜DSML｜parameter name=\"a\" string=\"true\">x\"y</｜DSML｜parameter>\n\
        <｜DSML｜parameter name=\"b\" string=\"false\">[1, 2]</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>";
    let mut parser = Parser::new(options(false));
    let mut after = |part: &str| parser.push_bytes(part.as_bytes());
    let mut at = 0;
    let mut until = |end: &str| {
        let to = at + text[at..].find(end).unwrap() + end.len();
        let part = &text[at..to];
        at = to;
        after(part)
    };
    let arguments = |text: &str| Delta::Arguments(text.into());
    assert_eq!(until("\n\n<"), [Delta::Content("Hm.".into())]);
    assert_eq!(until("invoke name=\"f\""), []);
    assert_eq!(until(">"), [Delta::Call { name: "f".into() }]);
    assert_eq!(until("string=\"true\">x"), [arguments("{\"a\": \"x")]);
    assert_eq!(until("\"y</"), [arguments("\\\"y")]);
    assert_eq!(until("parameter>"), [arguments("\"")]);
    assert_eq!(until("false\">[1,"), [arguments(", \"b\": [1,")]);
    assert_eq!(until("invoke>"), [arguments(" 2]}"), Delta::CallEnd]);
    assert_eq!(until("tool_calls>"), []);
    assert!(parser.is_done() && parser.flaw().is_none());
    let calls = &parser.block().unwrap().calls;
    assert_eq!(calls[0].arguments, r#"{"a": "x\"y", "b": [1, 2]}"#);
    assert!(calls[0].is_valid());
}

#[test]
fn calls_that_were_cut_off_do_not_count() {
    let text = "<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n\
        <｜DSML｜parameter name=\"a\" string=\"true\">x</｜DSML｜parameter>\n";
    let cut = read(text, options(false), 3, End::Cut);
    assert_eq!((cut.answer.calls.len(), cut.answer.content.as_str()), (0, text));
    assert_eq!(cut.flaw, Some(Flaw::NoBlankLine));
    assert!(cut.deltas.contains(&Delta::CallDropped));
    // Those before it do.
    let two = format!("\n\n{text}</｜DSML｜invoke>\n{}", text.split_once('\n').unwrap().1);
    let cut = read(&two, options(false), 3, End::Cut);
    assert_eq!((cut.answer.calls.len(), cut.flaw), (1, Some(Flaw::OpenCall)));
    assert_eq!(cut.answer.content, format!("\n{}", text.split_once('\n').unwrap().1));
}

#[test]
fn loose_spellings() {
    let call = |mark: &str| {
        format!(
            "\n\n<{mark}tool_calls>\n<{mark}invoke name=\"w\">\n<{mark}parameter name=\"s\" string=\"true\">a <b> c\
             </{mark}parameter>\n</{mark}invoke>\n</{mark}tool_calls>"
        )
    };
    for mark in ["｜DSML｜", "DSML｜", ""] {
        let loose = ParserOptions { spelling: Spelling::Loose, ..options(false) };
        for step in [1, usize::MAX] {
            let read = read(&call(mark), loose.clone(), step, End::Turn);
            let expected = ToolCall { id: None, name: "w".into(), arguments: r#"{"s": "a <b> c"}"#.into() };
            assert_eq!(
                (read.answer.calls.as_slice(), read.answer.content.as_str()),
                (&[expected][..], ""),
                "{mark}"
            );
        }
        assert_eq!(whole(&call(mark)).answer.calls.is_empty(), mark != "｜DSML｜");
    }
}

#[test]
fn stop_strings_end_what_is_said_and_nothing_else() {
    let with = |stop: &str| ParserOptions { stop: vec![stop.into()], ..options(true) };
    for step in [1, 2, usize::MAX] {
        let stopped = read("a STOP b</think>one STOP two", with("STOP"), step, End::Turn);
        assert_eq!(
            (stopped.answer.reasoning.as_str(), stopped.answer.content.as_str()),
            ("a STOP b", "one ")
        );
        assert_eq!(stopped.stopped.as_deref(), Some("STOP"));
        let almost = read("</think>one STO", with("STOP"), step, End::Turn);
        assert_eq!((almost.answer.content.as_str(), almost.stopped), ("one STO", None));
        // What is held back for a stop string goes out before the call.
        let call = "</think>ST\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>";
        let before = read(call, with("STOP"), step, End::Turn);
        let at = |wanted: fn(&Delta) -> bool| before.deltas.iter().position(wanted).unwrap();
        assert_eq!(before.answer.content, "ST");
        assert!(at(|d| matches!(d, Delta::Content(_))) < at(|d| matches!(d, Delta::Call { .. })));
    }
}

#[test]
fn syntax_is_greedy_and_bounded() {
    use ds4_text::Hint::{Free, Syntax};
    let mut parser = Parser::new(options(false));
    let mut hint = |text: &str| {
        parser.push_bytes(text.as_bytes());
        parser.hint()
    };
    assert_eq!((hint("Text <"), hint("b>\n\n<")), (Free, Free));
    assert_eq!(hint("｜DSML｜"), Syntax);
    assert_eq!(hint("tool_calls>\n<｜DSML｜invoke name=\"f"), Syntax);
    assert_eq!(hint("\">\n<｜DSML｜parameter name=\"a\" string=\"true\""), Syntax);
    assert_eq!(hint(">"), Free);
    assert_eq!(hint("x <"), Free);
    assert_eq!(hint("/"), Syntax);
    assert_eq!(hint("b"), Free);
    assert_eq!(hint("</｜DSML｜parameter>\n"), Syntax);
    assert_eq!(hint("<｜DSML｜parameter name=\"b\" string=\"false\">"), Syntax);
    assert_eq!(hint("{\"k\": \""), Free);
    assert_eq!(hint("a\\\""), Free);
    assert_eq!(hint("\", \"n\": 12"), Syntax);
    // A number without end.
    assert_eq!(hint(&"0".repeat(600)), Syntax);
    assert_eq!(hint(&"0".repeat(600)), Free);
    assert_eq!(hint("}</｜DSML｜parameter>\n"), Free);
    assert_eq!(hint("<｜DSML｜parameter name=\"c\" string=\"true\">x"), Free);
    assert_eq!(hint("</｜DSML｜parameter>"), Syntax);
    assert_eq!(hint("</｜DSML｜invoke></｜DSML｜tool_calls>"), Free);
}

/// Reading takes time in proportion to the text, whatever is in it.
#[test]
fn long_answers_take_linear_time() {
    let open = "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"a";
    let bodies = [
        ("", "\n"),
        ("", "<"),
        ("", "<｜DSML｜tool_call"),
        ("", "</think"),
        (open, "\">"),
        (open, "\" b=\"c\">"),
        (open, "x"),
        ("\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"a\">", "\">"),
        (
            "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"a\">",
            "</｜DSML｜para",
        ),
        ("\n\n<｜DSML｜tool_calls>\n", "<｜DSML｜invoke name=\"f\">\n</｜DSML｜invoke>\n"),
        ("\n\n<｜DSML｜tool_calls>\n", " "),
        ("\n\n<｜DSML｜tool_calls>\n</｜DSML｜tool_calls>", "x"),
    ];
    for (open, body) in bodies {
        // Half a million bytes, a byte at a time: anything quadratic would take minutes.
        let text = format!("{open}{}", body.repeat(500_000 / body.len()));
        let start = std::time::Instant::now();
        let read = read(&text, options(false), 1, End::Turn);
        let seconds = start.elapsed().as_secs_f64();
        assert!(seconds < 20.0, "{open}{body}: {seconds} s");
        assert!(!read.deltas.is_empty());
    }
}
