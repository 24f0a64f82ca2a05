//! The embedded model, end to end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::Command;

/// (stdout, stderr)
fn ds4(args: &[&str]) -> (String, String) {
    // A folder of its own: no ./ds4flash.gguf.
    let folder = tempfile::tempdir().unwrap();
    let mut ds4 = Command::new(env!("CARGO_BIN_EXE_ds4"));
    // Nothing of a test is kept in the user's cache.
    ds4.env("XDG_CACHE_HOME", folder.path()).env("HOME", folder.path());
    let out = ds4.current_dir(&folder).args(args).output().unwrap();
    let text = |b| String::from_utf8(b).unwrap();
    assert!(out.status.success(), "{args:?}: {}", text(out.stderr));
    (text(out.stdout), text(out.stderr))
}

fn models() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/ds4-nano").canonicalize().unwrap()
}

#[test]
fn answers_and_says_which_model() {
    let (out, err) = ds4(&["-p", "Who are you?", "--temp", "0"]);
    assert!(out.contains("ds4-nano"), "{out}");
    assert!(err.contains("ds4-nano, the small one inside this program"), "{err}");
    assert!(err.contains("prefill: 8 tokens") && err.contains("decode:"), "{err}");
}

#[test]
fn thinks_when_told() {
    let (out, _) = ds4(&["-p", "What is 17 + 25?", "--temp", "0", "--think"]);
    let (thinking, answer) = out.trim_end().rsplit_once('\n').unwrap();
    assert!(thinking.contains("7 + 5 = 12"), "{out}");
    assert_eq!(answer, "42");
    let (out, _) = ds4(&["-p", "What is 17 + 25?", "--temp", "0", "--nothink"]);
    assert_eq!(out, "42\n");
}

#[test]
fn same_seed_same_text_for_any_number_of_threads() {
    let story = |seed: &str, threads: &str| {
        ds4(&["-p", "Tell me a story about a fox.", "-n", "60", "--seed", seed, "--threads", threads]).0
    };
    let first = story("7", "1");
    assert_eq!(first, story("7", "2"));
    assert_eq!(first, story("7", "5"));
    assert_ne!(first, story("8", "1"));
}

#[test]
fn prompt_from_a_file_with_system_text() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.txt");
    std::fs::write(&file, "What is 30 + 12?").unwrap();
    let (out, _) = ds4(&[
        "--prompt-file",
        file.to_str().unwrap(),
        "-s",
        "You are a helpful, concise assistant.",
        "--temp",
        "0",
    ]);
    assert!(out.contains("42"), "{out}");
}

#[test]
fn prompt_from_a_pipe() {
    use std::io::Write;
    use std::process::Stdio;
    let mut ds4 = Command::new(env!("CARGO_BIN_EXE_ds4"));
    let mut child = ds4.args(["--temp", "0"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"What is 17 + 25?").unwrap();
    assert_eq!(child.wait_with_output().unwrap().stdout, b"42\n");
}

/// The scores of `docs/nano.md`, on the skills that take seconds.
#[test]
fn keeps_its_scores() {
    let score = |name: &str| {
        let (out, _) = ds4(&["eval", models().join("eval").join(name).to_str().unwrap()]);
        let line = out.lines().find(|l| l.starts_with("all")).unwrap();
        let numbers: Vec<usize> = line.split_whitespace().filter_map(|w| w.parse().ok()).collect();
        numbers[1] as f64 / numbers[0] as f64
    };
    for (name, least) in
        [("mode.jsonl", 0.96), ("maths.jsonl", 0.9), ("extract.jsonl", 0.9), ("tools.jsonl", 0.8)]
    {
        let got = score(name);
        assert!(got >= least, "{name}: {got}");
    }
}

#[test]
fn the_file_is_made_from_the_checkpoint_by_our_own_code() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("nano.gguf");
    let (checkpoint, imatrix) = (models(), models().join("imatrix.gguf"));
    let [checkpoint, imatrix, to] = [&checkpoint, &imatrix, &out].map(|p| p.to_str().unwrap());
    ds4(&["quantize", checkpoint, to, "--recipe", "q2", "--imatrix", imatrix]);
    assert!(std::fs::read(out).unwrap() == std::fs::read(models().join("ds4-nano.gguf")).unwrap());
}

#[test]
fn a_prompt_is_prefilled_once_ever() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (file, kv) = (path("p.txt"), path("kv"));
    let story = "The fox ran over the hill and met a bear. ".repeat(20);
    std::fs::write(&file, format!("{story}What is 17 + 25?")).unwrap();
    let ask = |more: &[&str]| {
        let args = ["--prompt-file", &file, "--temp", "0", "-n", "12", "--verbose", "--kv-dir", &kv];
        ds4(&[&args[..], more].concat())
    };
    let (first, err) = ask(&[]);
    assert!(err.contains(" 0 on disk;") && !err.contains(" 0 computed"), "{err}");
    let (again, err) = ask(&[]);
    assert_eq!(again, first);
    assert!(err.contains("; 0 computed"), "{err}");
    let (off, err) = ask(&["--kv", "off"]);
    assert_eq!(off, first);
    assert!(err.contains(" 0 on disk;"), "{err}");
    // Another question behind the same story goes on from a place inside it, if one was kept; and answers the same as ever.
    let cache = |args: &[&str]| ds4(&[&["cache", "--kv-dir", &kv], args].concat()).0;
    let listed = cache(&["ls"]);
    assert!(listed.contains("17 + 25") && listed.contains(" 1 "), "{listed}");
    let blocks = listed.lines().count() - 2;
    assert!(cache(&["verify"]).contains(&format!("{blocks} of {blocks} blocks are good")));
    let name = listed.lines().nth(1).unwrap().split_whitespace().nth(1).unwrap();
    assert!(cache(&["rm", name]).contains("removed"));
    cache(&["prune", "0"]);
    assert!(cache(&["ls"]).contains("0 blocks"), "{}", cache(&["ls"]));
    // A folder that cannot be used costs a warning.
    let args = ["--prompt-file", &file, "--temp", "0", "-n", "12", "--kv-dir", &file];
    let (answer, err) = ds4(&args);
    assert_eq!(answer, first);
    assert!(err.contains("nothing is kept on disk"), "{err}");
}
