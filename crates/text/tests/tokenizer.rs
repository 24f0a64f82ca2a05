//! Equal to the official tokenizer on every fixture, from either file, in both modes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod common;

use common::{data, from_json, json, official_gguf};
use ds4_text::{Mode, Tokenizer};
use proptest::prelude::*;
use serde_json::Value as Json;
use std::sync::LazyLock;

static OFFICIAL: LazyLock<Tokenizer> = LazyLock::new(from_json);

const TEXTS: [&str; 12] = [
    "boundary",
    "chinese",
    "code",
    "digits",
    "emoji",
    "english",
    "italian",
    "long",
    "other-languages",
    "punctuation",
    "unicode-odd",
    "whitespace",
];

fn ids(v: &Json) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect()
}

fn bytes(hex: &Json) -> Vec<u8> {
    let hex = hex.as_str().unwrap();
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

fn check(tokenizer: &Tokenizer) {
    let mut cases = 0;
    for name in TEXTS {
        for case in json(&format!("text-{name}.json"))["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            for mode in [Mode::Plain, Mode::Special] {
                assert_eq!(tokenizer.encode(text, mode), ids(&case["ids"]), "{name}: {text:?} {mode:?}");
            }
            cases += 1;
        }
    }
    assert_eq!(cases, 707);
    for case in json("special-vs-plain.json")["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, Mode::Special), ids(&case["ids_special"]), "{text:?}");
        assert_eq!(tokenizer.encode(text, Mode::Plain), ids(&case["ids_plain"]), "{text:?}");
    }
    let decode = json("decode.json");
    for case in decode["tokens"].as_array().unwrap() {
        let id = case["id"].as_u64().unwrap() as u32;
        assert_eq!(tokenizer.token_bytes(id), bytes(&case["hex"]), "token {id}");
    }
    for case in decode["sequences"].as_array().unwrap() {
        let ids = ids(&case["ids"]);
        assert_eq!(tokenizer.decode(&ids), bytes(&case["hex"]));
        assert_eq!(tokenizer.decode_text(&ids, false), case["text"].as_str().unwrap());
        assert_eq!(tokenizer.decode_text(&ids, true), case["text_skip_special"].as_str().unwrap());
    }
}

#[test]
fn from_tokenizer_json() {
    check(&OFFICIAL);
    assert_eq!((OFFICIAL.vocab_len(), OFFICIAL.bos(), OFFICIAL.eos()), (129_280, 0, 1));
}

#[test]
fn from_gguf() {
    let gguf = official_gguf(true);
    check(&Tokenizer::from_gguf(gguf.metadata()).unwrap());
    let types = gguf.metadata().i32_array("tokenizer.ggml.token_type").unwrap();
    let count = |ty| types.iter().filter(|t| **t == ty).count();
    assert_eq!((count(1), count(3), count(4)), (127_997, 1_277, 6));
}

#[test]
fn from_gguf_without_types() {
    let tokenizer = Tokenizer::from_gguf(official_gguf(false).metadata()).unwrap();
    for case in json("text-english.json")["cases"].as_array().unwrap() {
        assert_eq!(tokenizer.encode(case["text"].as_str().unwrap(), Mode::Plain), ids(&case["ids"]));
    }
    let added = |t: &Tokenizer| (0..t.vocab_len() as u32).map(|id| t.is_special(id)).collect::<Vec<_>>();
    assert_eq!(added(&tokenizer), added(&OFFICIAL));
    for case in json("special-vs-plain.json")["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, Mode::Special), ids(&case["ids_special"]), "{text:?}");
    }
}

#[test]
fn licence_travels_with_the_vocabulary() {
    assert!(String::from_utf8(data("LICENSE.deepseek")).unwrap().contains("DeepSeek"));
}

#[test]
fn broken_vocabularies_are_refused_by_name() {
    let message = |json: &str| Tokenizer::from_json(json.as_bytes()).err().unwrap().to_string();
    assert!(message("{").contains("tokenizer.json"));
    assert!(message(r#"{"model":{"vocab":{},"merges":[]}}"#).contains("no token for byte 0x00"));
    assert!(message(r#"{"model":{"vocab":{"a":0,"b":0},"merges":[]}}"#).contains("given twice"));
    assert!(message(r#"{"model":{"vocab":{"a":4294967295},"merges":[]}}"#).contains("out of proportion"));
    assert!(message(r#"{"model":{"type":"Unigram","vocab":{},"merges":[]}}"#).contains("Unigram"));
}

/// Files with a cut vocabulary name merges of tokens that they lack.
#[test]
fn merges_that_can_never_apply_are_left_out() {
    let printable = |b: &u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let bytes = (33..256).filter(printable).chain(256..256 + 68).filter_map(char::from_u32).map(String::from);
    let tokens = bytes.chain(["ab", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"].map(String::from));
    let vocab: serde_json::Map<String, Json> = tokens.zip(0u32..).map(|(t, i)| (t, Json::from(i))).collect();
    let merges = ["b c", "x yz", "zz x", "a b"];
    let file = serde_json::json!({"model": {"vocab": vocab, "merges": merges}});
    let tokenizer = Tokenizer::from_json(file.to_string().as_bytes()).unwrap();
    let id = |text: &str| vocab[text].as_u64().unwrap() as u32;
    assert_eq!(tokenizer.encode("abc", Mode::Plain), [id("ab"), id("c")]);
    assert_eq!(tokenizer.encode("xyz", Mode::Plain), ["x", "y", "z"].map(id));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Decoding gives back every text, in both modes.
    #[test]
    fn round_trip(text in "(\\PC|[ \\n\\r\\t]|<｜User｜>|｜DSML｜|</think>|[0-9]{1,7}|中文。|é\u{301}){0,60}") {
        for mode in [Mode::Plain, Mode::Special] {
            let ids = OFFICIAL.encode(&text, mode);
            prop_assert_eq!(OFFICIAL.decode(&ids), text.as_bytes());
        }
    }

    #[test]
    fn random_json_never_panics(text in "\\PC{0,80}", ids in prop::collection::vec(0u32..40, 0..6)) {
        let vocab: serde_json::Map<String, Json> = ids.iter().map(|i| (format!("{text}{i}"), Json::from(*i))).collect();
        let file = serde_json::json!({"model": {"vocab": vocab, "merges": [text.clone(), [text.clone(), "x"]]}, "added_tokens": [{"id": 3, "content": text}]});
        let _ = Tokenizer::from_json(file.to_string().as_bytes());
        let _ = Tokenizer::from_json(text.as_bytes());
    }
}
