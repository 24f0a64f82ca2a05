//! What makes and judges weights, from the command line.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Folder, ds4, stdout};
use ds4_gguf::{Gguf, TensorType};
use std::path::Path;

fn stderr(args: &[&str]) -> String {
    let out = ds4(args);
    assert!(!out.status.success(), "{args:?}");
    String::from_utf8(out.stderr).unwrap()
}

fn nano() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/ds4-nano");
    path.canonicalize().unwrap().to_str().unwrap().to_owned()
}

/// Rendered conversations of the model's kind.
const TEXTS: &str = r#"{"text": "<｜begin▁of▁sentence｜><｜User｜>What is 17 + 25?<｜Assistant｜></think>42<｜end▁of▁sentence｜>"}
{"messages": [{"role": "user", "content": "What is 6 * 7?"}, {"role": "assistant", "reasoning_content": "6 * 7 = 42.", "content": "42"}]}
{"text": "Once upon a time there was a small fox called Lira. The fox lived near the river and loved to walk there. One day Lira found a golden key on the path."}
"#;

/// The first number behind a word.
fn number(text: &str, word: &str) -> f64 {
    let rest = &text[text.find(word).unwrap_or_else(|| panic!("{word}: {text}")) + word.len()..];
    rest.split_whitespace().next().unwrap().trim_end_matches(',').parse().unwrap()
}

#[test]
fn from_text_to_a_file_by_importance() {
    let folder = Folder::new();
    let (texts, imatrix, out) =
        (folder.write("t.jsonl", TEXTS), folder.path("i.gguf"), folder.path("m.gguf"));
    let said = stdout(&["imatrix", "--backend", "cpu", "--dataset", &texts, "--out", &imatrix]);
    assert!(said.contains("in 4 sequences"), "a conversation is rendered both ways: {said}");
    let file = Gguf::open(&imatrix).unwrap();
    assert_eq!(file.metadata().str("general.type").unwrap(), "imatrix");
    assert_eq!(file.metadata().str_array("imatrix.datasets").unwrap(), ["t.jsonl"]);
    let dims = |name: &str| file.tensor(name).map(|t| t.dims().to_vec());
    assert_eq!(dims("blk.5.ffn_down_exps.weight.in_sum2"), Some(vec![256, 8]));
    assert_eq!(dims("mtp.0.ffn_gate_exps.weight.counts"), Some(vec![1, 8]));
    assert_eq!(dims("output.weight.in_sum2"), Some(vec![256, 1]));

    let plan = stdout(&["quantize", &nano(), "--recipe", "q2-q4", "--imatrix", &imatrix, "--dry-run"]);
    assert!(plan.contains("blk.*.ffn_gate_exps.weight                 IQ2_XXS     5 x"), "{plan}");
    assert!(plan.contains("blk.*.ffn_gate_exps.weight                 Q4_K        1 x"), "{plan}");
    assert!(plan.contains("by importance"), "{plan}");
    let draft = folder.path("d.gguf");
    let more = ["--mtp-out", &draft, "--tensor-type", "blk\\.0\\.ffn_up_exps=q2_k"];
    let base = ["quantize", &nano(), &out, "--recipe", "q2", "--imatrix", &imatrix];
    stdout(&[&base[..], &more].concat());
    let file = Gguf::open(&out).unwrap();
    assert_eq!(file.tensor("blk.0.ffn_up_exps.weight").unwrap().ty(), TensorType::Q2K);
    assert_eq!(file.metadata().str("quantize.imatrix.dataset").unwrap(), "t.jsonl");
    assert!(file.tensor("mtp.0.e_proj.weight").is_none());
    assert_eq!(stdout(&["-m", &out, "--mtp", &draft, "--temp", "0", "-p", "What is 17 + 25?"]), "42\n");
    assert_eq!(std::fs::read_dir(folder.0.path()).unwrap().count(), 4, "nothing is left behind");
}

#[test]
fn files_are_compared_with_the_checkpoint() {
    let folder = Folder::new();
    let (q2, q4) = (folder.path("q2.gguf"), folder.path("q4.gguf"));
    stdout(&["quantize", &nano(), &q2, "--recipe", "q2"]);
    let said = stdout(&["quantize", &nano(), &q4, "--recipe", "q4", "--compare", &q2]);
    let line = said.lines().find(|l| l.starts_with("blk.3.ffn_up_exps")).unwrap();
    assert!(line.contains("Q4_K  IQ2_XXS") && line.ends_with("closer"), "{line}");
    assert!(said.contains("closer to the checkpoint: 18; farther: 0"), "{said}");
}

/// The perplexity is what the logits say.
#[test]
fn perplexity_of_a_text() {
    let folder = Folder::new();
    let texts = folder.write("t.jsonl", TEXTS);
    let said = stdout(&["perplexity", "--backend", "cpu", "--exact", "--text", &texts]);
    let tokens = stdout(&[
        "tokenize",
        "--tokenizer",
        &format!("{}/tokenizer.json", nano()),
        "--jsonl",
        &texts_only(&folder),
    ]);
    let (mut nll, mut count) = (0.0, 0);
    for (i, line) in tokens.lines().enumerate() {
        let mut ids: Vec<u32> = serde_json::from_str(line).unwrap();
        if ids[0] != 0 {
            ids.insert(0, 0);
        }
        let (file, out) =
            (folder.write("ids.json", line_of(&ids).as_str()), folder.path(&format!("{i}.npy")));
        stdout(&["logits", "--backend", "cpu", "--exact", "--tokens", &file, "--out", &out]);
        let logits = ds4_testkit::read_npy(Path::new(&out)).unwrap().values;
        for (row, &next) in logits.chunks_exact(4096).zip(&ids[1..]) {
            let sum: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
            nll += sum.ln() - f64::from(row[next as usize]);
            count += 1;
        }
    }
    assert!(said.starts_with(&format!("{count} tokens in 4 sequences")), "{said}");
    assert!((number(&said, "NLL") - nll / f64::from(count)).abs() < 6e-5, "{said}{nll} {count}");
    let few =
        stdout(&["perplexity", "--backend", "cpu", "--text", &texts, "--ctx", "8", "--max-tokens", "40"]);
    assert!(number(&few, "").abs() <= 40.0, "{few}");
}

/// What the sequences of [`TEXTS`] are as texts.
fn texts_only(folder: &Folder) -> String {
    let lines = TEXTS.lines().map(|line| {
        if line.contains("messages") {
            let header = "<｜begin▁of▁sentence｜><｜User｜>What is 6 * 7?<｜Assistant｜>";
            let end = "42<｜end▁of▁sentence｜>";
            return format!(
                "{{\"text\": \"{header}</think>{end}\"}}\n{{\"text\": \"{header}<think>6 * 7 = 42.</think>{end}\"}}\n"
            );
        }
        format!("{line}\n")
    });
    folder.write("texts.jsonl", &lines.collect::<String>())
}

fn line_of(ids: &[u32]) -> String {
    serde_json::to_string(ids).unwrap()
}

#[test]
fn answers_are_scored_against_a_reference() {
    let folder = Folder::new();
    let prompt = "<｜begin▁of▁sentence｜><｜User｜>What is 17 + 25?<｜Assistant｜></think>";
    let cases = format!(
        "{{\"prompt\": \"{prompt}\", \"continuation\": \"42<｜end▁of▁sentence｜>\", \"logprobs\": [-0.5, 0, 0]}}\n\
         {{\"prompt\": \"{prompt}\", \"continuation\": \"43\"}}\n"
    );
    let cases = folder.write("c.jsonl", &cases);
    let said = stdout(&["perplexity", "--backend", "cpu", "--continuations", &cases]);
    let rows: Vec<Vec<&str>> = said.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(rows[1][3], "never", "{said}");
    assert!((rows[1][5].parse::<f64>().unwrap() - 0.5).abs() < 0.05, "{said}");
    assert_eq!((rows[2][3], rows[2][4]), ("1", "-"), "{said}");
    assert!(said.contains("1 of 2 answers are what the model would say"), "{said}");
    let bad = folder.write("bad.jsonl", "{\"prompt\": \"a\", \"continuation\": \"b\", \"logprobs\": [1, 2]}");
    assert!(stderr(&["perplexity", "--continuations", &bad]).contains("line 1: 2 logprobs for 1 tokens"));
    assert!(stderr(&["perplexity"]).contains("--text"));
}

#[test]
fn two_models_are_compared() {
    let folder = Folder::new();
    let texts = folder.write("t.jsonl", TEXTS);
    let (exact, q2) = (folder.path("bf16.gguf"), folder.path("q2.gguf"));
    stdout(&["quantize", &nano(), &exact, "--recipe", "bf16"]);
    stdout(&["quantize", &nano(), &q2, "--recipe", "q2"]);
    let compare =
        |a: &str, b: &str| stdout(&["compare", a, b, "--text", &texts, "--backend", "cpu", "--exact"]);
    let same = compare(&exact, &exact);
    assert!(same.contains("KL divergence  0.00000 nats"), "{same}");
    assert!(same.contains("100.00 % of") && same.contains("never"), "{same}");
    assert!(same.lines().last().unwrap().ends_with("0.00e0"), "{same}");
    let other = compare(&exact, &q2);
    assert!(number(&other, "KL divergence") > 1e-3, "{other}");
    assert_eq!(number(&other, "first model    NLL"), number(&same, "first model    NLL"));
    let layers: Vec<&str> = other.lines().filter(|l| l.starts_with("blk.")).collect();
    assert_eq!(layers.len(), 6, "{other}");
    let streams: f64 = layers[5].split_whitespace().last().unwrap().parse().unwrap();
    assert!(streams > 0.01 && streams < 0.6, "{other}");
    let dev = concat!(env!("CARGO_MANIFEST_DIR"), "/../testkit/fixtures/logits/dev-f16/model.gguf");
    assert!(stderr(&["compare", &exact, dev, "--text", &texts]).contains("models of different shapes"));
}

#[test]
fn what_is_wrong_is_named() {
    let folder = Folder::new();
    let empty = folder.write("empty.txt", "");
    let out = folder.path("o.gguf");
    assert!(stderr(&["imatrix", "--dataset", &empty, "--out", &out]).contains("no text in it"));
    let bad = folder.write("bad.jsonl", "{\"text\": \"a\"}\n{\"texts\": 1}\n");
    assert!(stderr(&["perplexity", "--text", &bad]).contains("bad.jsonl: line 2: missing field `text`"));
    assert!(stderr(&["quantize", &nano(), &out, "--imatrix", &empty]).contains("empty.txt"));
    assert!(stderr(&["quantize", &nano(), &out, "--tensor-type", "x=q3_k"]).contains("expected one of"));
    assert!(stderr(&["quantize", &nano()]).contains("OUT"));
}
