//! The binary, as a person or a script uses it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Folder, ds4, stdout};
use std::path::Path;
use std::process::Command;

fn fixture(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/fixtures/logits/dev-f16");
    folder.join(name).to_str().unwrap().to_owned()
}

#[test]
fn logits_are_the_same_for_every_chunk_and_diff_says_so() {
    let folder = Folder::new();
    let tokens: Vec<u32> = (0..150u32).map(|i| i * 37 % 270).collect();
    let tokens = folder.write("t.json", &format!("{tokens:?}"));
    let run = |out: &str, taps: &str, more: &[&str]| {
        let (model, mtp) = (fixture("model.gguf"), fixture("mtp.gguf"));
        let (out, taps) = (folder.path(out), folder.path(taps));
        let mut args =
            vec!["logits", "-m", &model, "--mtp", &mtp, "--tokens", &tokens, "--out", &out, "--taps", &taps];
        args.extend(more);
        stdout(&args);
        std::fs::read(out).unwrap()
    };
    let draft = folder.path("draft.npy");
    let whole = run("a.npy", "a", &["--exact", "--mtp-out", &draft]);
    let single = run("b.npy", "b", &["--exact", "--chunk", "1"]);
    assert!(whole == single);
    assert!(std::fs::read(&draft).unwrap().len() > 149 * 272 * 4);
    let (a, b) = (folder.path("a"), folder.path("b"));
    assert!(stdout(&["diff", &a, &b]).contains("\nequal"));
    run("c.npy", "c", &["--rounding", "off", "--exact"]);
    let different = ds4(&["diff", &a, &folder.path("c")]);
    assert_eq!(different.status.code(), Some(1));
    let text = String::from_utf8(different.stdout).unwrap();
    // The first thing that rounding changes is what attention reads.
    assert!(text.contains("first difference: blk.0.heads"), "{text}");
}

#[test]
fn tokenize_both_modes() {
    let folder = Folder::new();
    let lines =
        folder.write("in.jsonl", "{\"text\":\"he<think>\",\"plain\":true}\n\n{\"text\":\"he<think>\"}\n");
    let model = fixture("model.gguf");
    let out = stdout(&["tokenize", "--tokenizer", &model, "--jsonl", &lines]);
    let ids: Vec<Vec<u32>> = out.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(ids.len(), 2);
    assert_eq!((ids[0].len(), ids[1].len()), (9, 3));
    let bad = folder.write("bad.jsonl", "{\"text\": 5}\n");
    let out = ds4(&["tokenize", "--tokenizer", &model, "--jsonl", &bad]);
    assert!(String::from_utf8_lossy(&out.stderr).contains("bad.jsonl: line 1"));
}

#[test]
fn render_and_parse() {
    let folder = Folder::new();
    let conversations = folder.write(
        "in.jsonl",
        concat!(
            r#"{"messages":[{"role":"user","content":"hi"}],"thinking_mode":"thinking","reasoning_effort":"max"}"#,
            "\n",
            r#"{"messages":[{"role":"user","content":null}],"thinking_mode":"chat"}"#,
            "\n",
            r#"{"messages":[{"role":"user","content":"a<think>"}],"thinking_mode":"chat"}"#,
        ),
    );
    let lines = |args: &[&str]| -> Vec<serde_json::Value> {
        stdout(args).lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    };
    let rendered = lines(&["render", "--jsonl", &conversations]);
    let text = rendered[0]["text"].as_str().unwrap();
    assert!(text.contains("Absolute maximum") && text.ends_with("hi<｜Assistant｜><think>"), "{text}");
    assert!(rendered[1]["error"].as_str().unwrap().contains("content"), "{}", rendered[1]);
    // By the embedded vocabulary: of the client's marker there is only text.
    let ids = rendered[2]["token_ids"].as_array().unwrap();
    let again = folder.write("t.jsonl", "{\"text\":\"<think>\"}");
    let nano = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/ds4-nano/ds4-nano.gguf");
    let think = &lines(&["tokenize", "--tokenizer", nano, "--jsonl", &again])[0][0];
    assert!(think.is_u64() && !ids.contains(think));
    let july = lines(&["render", "--jsonl", &conversations, "--profile", "0731"]);
    assert!(july[0]["text"].as_str().unwrap().contains("Beyond maximum"));

    let answers = folder.write(
        "answers.jsonl",
        concat!(
            r#"{"text":"so</think>Yes.<｜end▁of▁sentence｜>","thinking_mode":"thinking"}"#,
            "\n",
            r#"{"text":"\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n</｜DSML｜invoke>\n","thinking_mode":"chat"}"#,
        ),
    );
    for stream in [&[][..], &["--stream", "1"], &["--stream", "7"]] {
        let parsed = lines(&[&["parse", "--jsonl", &answers], stream].concat());
        let expected = serde_json::json!({"message": {"role": "assistant", "content": "Yes.",
            "reasoning_content": "so", "tool_calls": []}, "finish": "stop"});
        assert_eq!(parsed[0], expected);
        let function = serde_json::json!({"name": "f", "arguments": "{}"});
        assert_eq!(parsed[1]["message"]["tool_calls"][0]["function"], function);
        assert_eq!((parsed[1]["finish"].as_str(), parsed[1]["flaw"].is_string()), (Some("tool_calls"), true));
    }
    assert!(!ds4(&["parse", "--jsonl", &answers, "--stream", "0"]).status.success());
}

#[test]
fn inspect_and_bench() {
    let model = fixture("model.gguf");
    let text = stdout(&["inspect", &model]);
    for part in ["deepseek4.block_count", "routed experts", "5 layers: 2 window, 2 indexed", "1000000"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    let size = ["--prompt", "40", "--gen-tokens", "8"];
    let args = ["bench", "-m", &model, "--json", "--backend", "cpu", "--threads", "1"];
    let json = stdout(&[&args[..], &size].concat());
    let figures: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(figures["prompt_tps"].as_f64().unwrap() > 0.0 && figures["decode_tps"].as_f64().unwrap() > 0.0);
    assert_eq!((figures["device"].as_str(), figures["threads"].as_u64()), (Some("cpu"), Some(1)));
}

#[test]
fn bench_tables_without_a_file() {
    let args = ["bench", "--synthetic", "tiny:4", "--table", "--prefills", "64,256", "--contexts", "64,300"];
    let args = [&args[..], &["--batches", "1,3", "--gen-tokens", "4", "--backend", "cpu"]].concat();
    let text = stdout(&args);
    // What was measured, and at which context.
    for (what, context) in [("prefill", "256"), ("decode", "300"), ("decode of 3 sessions", "2048")] {
        let mut rests = text.lines().filter_map(|line| line.strip_prefix(what));
        let found = rests.any(|rest| rest.split_whitespace().next() == Some(context));
        assert!(found, "{what} at {context} in {text}");
    }
    assert!(text.contains("GB/s"), "{text}");
    let table: serde_json::Value = serde_json::from_str(&stdout(&[&args[..], &["--json"]].concat())).unwrap();
    assert_eq!(table["prefill"].as_array().unwrap().len(), 2);
    assert_eq!(table["batches"][1]["sessions"], 3);
    assert!(table["decode"][1]["tps"].as_f64().unwrap() > 0.0);
}

#[test]
fn bench_of_kernels_is_for_gpus() {
    let args = [
        "bench",
        "--synthetic",
        "tiny:4",
        "--kernels",
        "--prompt",
        "20",
        "--gen-tokens",
        "2",
        "--backend",
        "cpu",
    ];
    let text = stdout(&args);
    assert!(text.contains("no kernels"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&stdout(&[&args[..], &["--json"]].concat())).unwrap();
    assert_eq!((json["device"].as_str(), json["prefill"].as_array().unwrap().len()), (Some("cpu"), 0));
}

#[test]
fn doctor_lists_and_proves() {
    let folder = Folder::new();
    let doctor = |args: &[&str]| {
        let mut ds4 = Command::new(env!("CARGO_BIN_EXE_ds4"));
        // Without ./ds4flash.gguf.
        let out = ds4.current_dir(folder.0.path()).arg("doctor").args(args).output().unwrap();
        assert!(out.status.success());
        String::from_utf8(out.stdout).unwrap()
    };
    let text = doctor(&["--no-tests"]);
    for part in ["cpu: ", "the published 2-bit file", "  1M: weights 86.7", "128k: weights"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!text.contains("checks on"));
    let text = doctor(&["-m", &std::fs::canonicalize(fixture("model.gguf")).unwrap().display().to_string()]);
    assert!(text.contains("checks on cpu") && text.contains("ok    restoring a snapshot"), "{text}");
}

#[test]
fn errors_name_the_culprit() {
    let folder = Folder::new();
    let error = |args: &[&str]| {
        let out = ds4(args);
        assert!(!out.status.success());
        String::from_utf8(out.stderr).unwrap()
    };
    assert!(error(&["-m", "none.gguf", "-p", "hi"]).contains("none.gguf: No such file"));
    let junk = folder.write("junk.gguf", "this is no model");
    assert!(error(&["-m", &junk, "-p", "hi"]).contains("not a GGUF file"));
    assert!(error(&["--prompt-file", "none.txt"]).contains("none.txt"));
    let tokens = folder.write("t.json", "[1, 99999]");
    let (model, out) = (fixture("model.gguf"), folder.path("o.npy"));
    assert!(error(&["logits", "-m", &model, "--tokens", &tokens, "--out", &out]).contains("token id 99999"));
    if !cfg!(feature = "cuda") {
        let error = error(&["-p", "hi", "--backend", "cuda"]);
        assert!(error.contains("cargo build --release --features cuda"), "{error}");
    }
    assert!(error(&["-p", "hi", "--backend", "cpu", "--device", "0"]).contains("--device names GPUs"));
    assert!(error(&["quantize", "/nonexistent", "x.gguf"]).contains("/nonexistent/config.json"));
}

/// `ds4 ... | head -1` is no failure.
#[test]
fn a_reader_that_goes_away_is_no_error() {
    use std::process::Stdio;
    let mut ds4 = Command::new(env!("CARGO_BIN_EXE_ds4"));
    let ds4 = ds4.args(["inspect", "--tensors"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = ds4.spawn().unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.success() && !said.contains("panicked"), "{said}");
}
