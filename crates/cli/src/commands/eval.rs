//! `ds4 eval`: scores of a model on generated cases with checkable answers.

use super::lines;
use crate::Result;
use crate::args::EvalArgs;
use crate::device::{Description, Device};
use crate::load::{self, Loaded, Wants, WithEngine};
use crate::ui;
use ds4_engine::{Engine, Event, Finish, Generation, Sampler, Sampling};
use ds4_text::{Answer, End, Mode, Parser, ParserOptions, Start, Tokenizer};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

/// A line of a case file.
#[derive(Deserialize)]
struct Case {
    skill: String,
    /// The rendered prompt, markers as text, up to where the model speaks.
    prompt: String,
    /// Whether the prompt asks for thinking.
    think: bool,
    max_tokens: usize,
    check: Check,
}

/// What a right answer is.
#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Check {
    /// The answer, white space at its ends aside, is the value.
    Exact { value: String },
    /// The answer contains the value.
    Contains { value: String },
    /// The answer is JSON equal to the value.
    Json { value: Value },
    /// The answer makes exactly these calls.
    ToolCall { calls: Vec<Call> },
    /// Any answer: only whether it thought as told counts.
    Think,
}

#[derive(Deserialize)]
struct Call {
    name: String,
    arguments: Map<String, Value>,
}

#[derive(Default)]
struct Score {
    cases: usize,
    right: usize,
    seconds: f64,
}

pub(crate) fn run(args: &EvalArgs) -> Result<ExitCode> {
    let file = load::open(args.model.model.as_deref())?;
    let tokenizer = Tokenizer::from_gguf(file.metadata())?;
    let cases = cases(&args.cases)?;
    // A token is a byte or more.
    let context = cases.iter().map(|c| c.prompt.len() + c.max_tokens + 1).max().unwrap_or(1);
    let job = Scoring { tokenizer, cases, verbose: args.verbose };
    load::with_engine(&file, &args.model, Wants::session(context), job)
}

struct Scoring {
    tokenizer: Tokenizer,
    cases: Vec<Case>,
    verbose: bool,
}

impl WithEngine for Scoring {
    fn run<B: Device>(self, engine: Engine<B>, _: Description) -> Result<ExitCode> {
        let mut loaded = Loaded::new(engine, self.tokenizer)?;
        score(&mut loaded, &self.cases, self.verbose)
    }
}

fn score<B: Device>(loaded: &mut Loaded<B>, cases: &[Case], verbose: bool) -> Result<ExitCode> {
    let mut scores: BTreeMap<String, Score> = BTreeMap::new();
    let bar = ui::items("cases");
    bar.set_length(cases.len() as u64);
    for case in cases {
        bar.set_message(case.skill.clone());
        let start = Instant::now();
        let output = answer(loaded, case)?;
        let right = is_right(case, &output);
        if verbose {
            let tail: String =
                case.prompt.chars().rev().take(300).collect::<Vec<_>>().into_iter().rev().collect();
            bar.suspend(|| {
                let (verdict, output) = (if right { "right" } else { "WRONG" }, shown(output.answer()));
                println!("[{verdict}] {}\n...{tail}{output}\n", case.skill);
            });
        }
        let score = scores.entry(case.skill.clone()).or_default();
        score.cases += 1;
        score.right += usize::from(right);
        score.seconds += start.elapsed().as_secs_f64();
        bar.inc(1);
    }
    bar.finish_and_clear();
    println!("{:24} {:>6} {:>6} {:>7} {:>9}", "skill", "cases", "right", "share", "seconds");
    let (mut all, mut right) = (0, 0);
    for (skill, s) in &scores {
        let share = 100.0 * s.right as f64 / s.cases as f64;
        println!("{skill:24} {:6} {:6} {share:6.1}% {:9.1}", s.cases, s.right, s.seconds);
        all += s.cases;
        right += s.right;
    }
    println!("{:24} {all:6} {right:6} {:6.1}%", "all", 100.0 * right as f64 / all.max(1) as f64);
    Ok(ExitCode::SUCCESS)
}

/// The cases of a file, or of every `.jsonl` file of a folder.
fn cases(path: &Path) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for file in lines::files(path, &["jsonl"])? {
        cases.extend(lines::read(&file, |line| Ok(serde_json::from_str::<Case>(line)?))?);
    }
    Ok(cases)
}

/// A parser of answers to a case.
fn parser(case: &Case) -> Parser {
    let start = if case.think { Start::Reasoning } else { Start::Content };
    Parser::new(ParserOptions { start, tools: true, ..ParserOptions::default() })
}

/// What the model says, greedily.
fn answer<B: Device>(loaded: &mut Loaded<B>, case: &Case) -> Result<Parser> {
    let tokens = loaded.tokenizer.encode(&case.prompt, Mode::Special);
    let mut session = loaded.engine.session(tokens.len() + case.max_tokens + 1)?;
    loaded.engine.sync(&mut session, &tokens, &mut |_, _| ControlFlow::Continue(()))?;
    let mut generation = Generation::new(Sampler::new(Sampling::greedy()), case.max_tokens);
    let mut parser = parser(case);
    loop {
        match generation.next(&mut loaded.engine, &mut session, &loaded.tokenizer, parser.hint())? {
            Event::Token(id) => drop(parser.push_token(id, &loaded.tokenizer)),
            Event::End(finish) => {
                let end = if finish == Finish::EndOfSentence { End::Turn } else { End::Cut };
                parser.finish(end);
                return Ok(parser);
            }
        }
    }
}

/// An answer for people.
fn shown(answer: &Answer) -> String {
    let calls = answer.calls.iter().map(|c| format!("\n{}({})", c.name, c.arguments)).collect::<String>();
    format!("{}\n{}{calls}{}", answer.reasoning, answer.content, answer.trailing)
}

fn is_right(case: &Case, parser: &Parser) -> bool {
    let answer = parser.answer();
    // It did not think although told to, or the other way round, or its answer is not well formed.
    if parser.flaw().is_some() || case.think == answer.reasoning.trim().is_empty() {
        return false;
    }
    let text = &answer.content;
    match &case.check {
        Check::Exact { value } => text.trim() == value.trim(),
        Check::Contains { value } => contains_word(text, value),
        Check::Json { value } => serde_json::from_str::<Value>(text.trim()).is_ok_and(|v| v == *value),
        Check::ToolCall { calls } => {
            let made = answer.calls.iter().map(|c| (&c.name, serde_json::from_str(&c.arguments).ok()));
            made.eq(calls.iter().map(|c| (&c.name, Some(Value::Object(c.arguments.clone())))))
        }
        Check::Think => !text.trim().is_empty(),
    }
}

/// Whether `value` occurs and is no part of a longer word or number.
fn contains_word(text: &str, value: &str) -> bool {
    let free = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric());
    text.match_indices(value)
        .any(|(i, v)| free(text[..i].chars().next_back()) && free(text[i + v.len()..].chars().next()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn right(think: bool, check: &str, output: &str) -> bool {
        let check = serde_json::from_str(check).unwrap();
        let case = Case { skill: String::new(), prompt: String::new(), think, max_tokens: 1, check };
        let mut parser = parser(&case);
        parser.push_bytes(output.as_bytes());
        parser.finish(End::Turn);
        is_right(&case, &parser)
    }

    #[test]
    fn checks() {
        assert!(right(false, r#"{"kind":"exact","value":"42"}"#, " 42\n"));
        assert!(!right(false, r#"{"kind":"exact","value":"42"}"#, "142"));
        assert!(right(true, r#"{"kind":"contains","value":"42"}"#, "6*7</think>It is 42."));
        assert!(!right(true, r#"{"kind":"contains","value":"42"}"#, "6*7</think>It is 421."));
        assert!(!right(true, r#"{"kind":"contains","value":"42"}"#, "</think>It is 42."));
        assert!(!right(false, r#"{"kind":"contains","value":"42"}"#, "hm</think>It is 42."));
        assert!(right(false, r#"{"kind":"json","value":{"a":1,"b":"x"}}"#, r#"{"b":"x", "a":1}"#));
        assert!(!right(false, r#"{"kind":"json","value":{"a":1}}"#, r#"{"a":2}"#));
        let call = "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>";
        assert!(right(false, r#"{"kind":"tool_call","calls":[{"name":"f","arguments":{}}]}"#, call));
        assert!(!right(false, r#"{"kind":"tool_call","calls":[{"name":"g","arguments":{}}]}"#, call));
    }
}
