//! Answers that are held to grammars, whatever the model says.
#![allow(clippy::unwrap_used, clippy::panic)]

use ds4_engine::{Bounds, Constraint, Grammars, Sampler, Sampling};
use ds4_gguf::Gguf;
use ds4_text::{Callable, End, Mode, Parser, ParserOptions, Start, Tokenizer, Wanted, grammar};
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

fn tokenizer() -> Tokenizer {
    let nano = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/ds4-nano/ds4-nano.gguf");
    Tokenizer::from_gguf(Gguf::open(nano).unwrap().metadata()).unwrap()
}

fn constraint(wanted: &Wanted<'_>, tokenizer: &Tokenizer) -> Result<Constraint, String> {
    let lark = grammar(wanted, tokenizer).map_err(|e| e.to_string())?;
    Grammars::new(tokenizer).unwrap().constraint(lark)
}

/// Whether the whole of a text is allowed, token by token.
fn accepts(wanted: &Wanted<'_>, tokenizer: &Tokenizer, text: &str) -> bool {
    let mut constraint = constraint(wanted, tokenizer).unwrap();
    for id in tokenizer.encode(text, Mode::Special) {
        if !constraint.allowed().unwrap().get(id as usize) {
            return false;
        }
        constraint.take(id).unwrap();
    }
    constraint.is_whole()
}

/// What a model without sense would say.
fn babble(constraint: &mut Constraint, tokenizer: &Tokenizer, seed: u64) -> Vec<u32> {
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut sampler = Sampler::new(Sampling { seed, min_p: 0.0, ..Sampling::default() });
    let mut ids = Vec::new();
    // Closing tokens become likelier and likelier, so that it ends.
    while ids.len() < 3000 {
        let allowed = constraint.allowed().unwrap();
        let push = ids.len() as f32 / 20.0;
        let logits: Vec<f32> = (0..tokenizer.vocab_len() as u32)
            .map(|id| {
                let closes = [&b"}"[..], b"]", b"\"", b"</", b"<", b"0"].contains(&tokenizer.token_bytes(id));
                4.0 * random.random::<f32>()
                    + if closes || tokenizer.marker_of(id).is_some() { push } else { 0.0 }
            })
            .collect();
        let id = sampler.sample_within(&logits, Bounds { allowed: Some(&allowed), banned: &[] });
        assert!(allowed.get(id as usize));
        if id == tokenizer.eos() {
            break;
        }
        constraint.take(id).unwrap();
        ids.push(id);
        if constraint.is_whole() && ids.len() > 60 {
            break;
        }
    }
    ids
}

fn weather() -> Value {
    json!({
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "at": {"$ref": "#/$defs/point"},
            "note": {"type": ["string", "null"]},
            "code": {"type": "string", "minLength": 2, "maxLength": 3},
        },
        "required": ["city", "days"],
        "additionalProperties": false,
        "$defs": {"point": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}},
    })
}

const D: &str = "｜DSML｜";

fn call(parameters: &[(&str, bool, &str)]) -> String {
    let parameters: String = parameters
        .iter()
        .map(|(key, string, value)| {
            format!("<{D}parameter name=\"{key}\" string=\"{string}\">{value}</{D}parameter>\n")
        })
        .collect();
    format!("<{D}invoke name=\"weather\">\n{parameters}</{D}invoke>\n</{D}tool_calls>")
}

#[test]
fn calls_follow_their_schema() {
    let tokenizer = tokenizer();
    let schema = weather();
    let calls = [Callable { name: "weather", schema: Some(&schema), strict: true }];
    let wanted = Wanted { calls: &calls, one_call: true, json: None };
    let ok = |parameters: &[_]| accepts(&wanted, &tokenizer, &call(parameters));
    let city = ("city", true, "Pra</div> <b>\n\"x\"");
    let days = ("days", false, "3");
    assert!(ok(&[city, days]));
    assert!(ok(&[city, days, ("unit", true, "F"), ("at", false, "[1, -2.5]"), ("code", true, "ab")]));
    assert!(ok(&[city, days, ("note", false, "null")]) && ok(&[city, days, ("note", false, "\"a\\nb\"")]));
    assert!(!ok(&[city]), "a required one is missing");
    assert!(!ok(&[city, ("days", false, "10")]), "more than the maximum");
    assert!(!ok(&[city, ("days", false, "\"3\"")]), "a string");
    assert!(!ok(&[city, days, ("unit", true, "K")]), "none of the choices");
    assert!(!ok(&[city, days, ("code", true, "abcd")]), "too long");
    assert!(!ok(&[city, days, ("at", false, "[1]")]), "too few items");
    assert!(!ok(&[city, days, ("more", true, "x")]), "no such property");
    let two = call(&[city, days]).replace(&format!("</{D}tool_calls>"), &call(&[city, days]));
    assert!(!accepts(&wanted, &tokenizer, &two));
    assert!(accepts(&Wanted { one_call: false, ..wanted }, &tokenizer, &two));
}

#[test]
fn free_calls() {
    let tokenizer = tokenizer();
    let odd = json!({"type": "object", "oneOf": []});
    for schema in [None, Some(&odd)] {
        let calls = [Callable { name: "weather", schema, strict: false }];
        let wanted = Wanted { calls: &calls, one_call: false, json: None };
        assert!(accepts(&wanted, &tokenizer, &call(&[("a", true, "x"), ("b", false, "{\"c\": [1]}")])));
        assert!(accepts(&wanted, &tokenizer, &call(&[])));
        assert!(!accepts(&wanted, &tokenizer, &call(&[("b", false, "{")])));
        assert!(!accepts(&wanted, &tokenizer, &call(&[]).replace("weather", "other")));
    }
}

#[test]
fn json_or_calls() {
    let tokenizer = tokenizer();
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": false});
    let calls = [Callable { name: "weather", schema: None, strict: false }];
    let wanted = Wanted { calls: &calls, one_call: false, json: Some(&schema) };
    assert!(accepts(&wanted, &tokenizer, "{\"n\": 12}"));
    assert!(accepts(&wanted, &tokenizer, "{\n  \"n\": 12\n}"));
    assert!(accepts(&wanted, &tokenizer, &format!("\n\n<{D}tool_calls>\n{}", call(&[]))));
    assert!(
        !accepts(&wanted, &tokenizer, "{\"m\": 12}") && !accepts(&wanted, &tokenizer, "Well, {\"n\": 12}")
    );
    assert!(!accepts(
        &Wanted { calls: &[], ..wanted },
        &tokenizer,
        &format!("\n\n<{D}tool_calls>\n{}", call(&[]))
    ));
}

#[test]
fn what_cannot_be_is_refused() {
    let tokenizer = tokenizer();
    let refused = |schema: Value| {
        let calls = [Callable { name: "t", schema: Some(&schema), strict: true }];
        constraint(&Wanted { calls: &calls, one_call: false, json: None }, &tokenizer).err()
    };
    let lacks = refused(json!({"type": "object", "properties": {}, "required": ["x"]})).unwrap();
    assert!(lacks.contains("\"t\"") && lacks.contains("\"x\""), "{lacks}");
    assert!(refused(json!({"type": "object", "anyOf": []})).unwrap().contains("anyOf"));
    let impossible = json!({"type": "integer", "minimum": 5, "maximum": 4});
    let message =
        constraint(&Wanted { calls: &[], one_call: false, json: Some(&impossible) }, &tokenizer).err();
    assert!(message.unwrap().contains("minimum"));
    let circle = json!({"$ref": "#"});
    let message = constraint(&Wanted { calls: &[], one_call: false, json: Some(&circle) }, &tokenizer).err();
    assert_eq!(message.as_deref(), Some("no text satisfies it"));
    let unknown = json!({"$ref": "#/$defs/nothing"});
    assert!(constraint(&Wanted { calls: &[], one_call: false, json: Some(&unknown) }, &tokenizer).is_err());
}

/// Whatever is sampled, the result is a call of the tool, with arguments of the schema, or JSON.
#[test]
fn babble_obeys() {
    let tokenizer = tokenizer();
    let schema = weather();
    let calls = [Callable { name: "weather", schema: Some(&schema), strict: true }];
    for seed in 0..12 {
        let wanted = Wanted { calls: &calls, one_call: true, json: None };
        let mut constraint = constraint(&wanted, &tokenizer).unwrap();
        let mut parser =
            Parser::new(ParserOptions { start: Start::Calls, tools: true, ..ParserOptions::default() });
        for id in babble(&mut constraint, &tokenizer, seed) {
            parser.push_token(id, &tokenizer);
        }
        parser.finish(End::Turn);
        let answer = parser.answer();
        assert_eq!(answer.calls.len(), 1, "seed {seed}: {answer:?}");
        let arguments: Value = serde_json::from_str(&answer.calls[0].arguments).unwrap();
        assert!(arguments["city"].is_string() && (1..=9).contains(&arguments["days"].as_i64().unwrap()));
    }
    let json = json!({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string"}}, "b": {"type": "boolean"}},
        "required": ["a", "b"], "additionalProperties": false});
    for seed in 0..12 {
        let mut constraint =
            constraint(&Wanted { calls: &[], one_call: false, json: Some(&json) }, &tokenizer).unwrap();
        let ids = babble(&mut constraint, &tokenizer, seed);
        let value: Value = serde_json::from_slice(&tokenizer.decode(&ids)).unwrap();
        assert!(value["a"].is_array() && value["b"].is_boolean(), "{value}");
    }
}
