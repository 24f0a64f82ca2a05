//! `ds4 serve` as a program: it starts, answers, ends when told to, and goes on where it was.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic)]

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ds4"))
            .args(["serve", "--port", "0", "--ctx", "8000", "--log-format", "json"])
            .args(args)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().unwrap().unwrap();
            if let Some(rest) = line.strip_prefix("serving at http://") {
                break rest.split(' ').next().unwrap().to_owned();
            }
        };
        // The log must not fill its pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Server { child, address }
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let body = body.to_string();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
    }

    /// Tells it to end, as a service manager does.
    fn end(mut self) {
        let kill = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(kill.success() && self.child.wait().unwrap().success());
    }
}

fn chat(text: &str) -> Value {
    json!({"messages": [{"role": "user", "content": text}], "thinking": {"type": "disabled"}, "temperature": 0, "max_tokens": 40})
}

/// The embedded model answers over HTTP what it answers on the command line, at two addresses.
#[test]
fn answers_as_the_command_line_does() {
    let folder = tempfile::tempdir().unwrap();
    let kv = folder.path().to_str().unwrap();
    let text = "Who are you?";
    let command = Command::new(env!("CARGO_BIN_EXE_ds4"))
        .args(["-p", text, "--temp", "0", "-n", "40", "--kv", "off"])
        .output()
        .unwrap();
    let expected = String::from_utf8(command.stdout).unwrap();
    for host in ["127.0.0.1", "[::1]"] {
        // Where there is no IPv6 there is nothing to try.
        if host == "[::1]" && std::net::TcpListener::bind("[::1]:0").is_err() {
            continue;
        }
        let server = Server::start(&["--host", host, "--kv-dir", kv]);
        let answer = server.post("/v1/chat/completions", &chat(text));
        assert_eq!(answer["choices"][0]["message"]["content"].as_str().unwrap().trim(), expected.trim());
        server.end();
    }
}

/// A tool call that comes back with other spaces is rendered as it was sampled, also by another process.
#[test]
fn tool_calls_are_replayed_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("script.json");
    let block = "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"b\" string=\"false\">[1,   2]</｜DSML｜parameter>\n\
        <｜DSML｜parameter name=\"a\" string=\"true\">x</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>";
    let rules = json!({"rules": [
        {"name": "done", "all": ["<tool_result>"], "text": "Done."},
        {"name": "call", "think": "hm", "text": format!("Look.{block}")},
    ]});
    std::fs::write(&script, rules.to_string()).unwrap();
    let kv = folder.path().join("kv");
    let args = ["--script", script.to_str().unwrap(), "--kv-dir", kv.to_str().unwrap()];
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    let user = json!({"role": "user", "content": "word ".repeat(200)});

    let server = Server::start(&args);
    let first = server.post("/v1/chat/completions", &json!({"messages": [user], "tools": tools}));
    let mut message = first["choices"][0]["message"].clone();
    let call = &mut message["tool_calls"][0];
    assert_eq!(call["function"]["arguments"], "{\"b\": [1,   2], \"a\": \"x\"}");
    call["function"]["arguments"] = "{\"a\":\"x\",\"b\":[1,2]}".into();
    let id = call["id"].clone();
    server.end();

    let server = Server::start(&args);
    let turns = json!([user, message, {"role": "tool", "tool_call_id": id, "content": "r"}]);
    let second = server.post("/v1/chat/completions", &json!({"messages": turns, "tools": tools}));
    assert_eq!(second["choices"][0]["message"]["content"], "Done.");
    let usage = &second["usage"];
    let missing = usage["prompt_tokens"].as_u64().unwrap()
        - usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(missing < 30, "{usage}");
    server.end();
}

#[test]
fn errors_name_the_culprit() {
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_ds4")).arg("serve").args(args).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    assert!(run(&["--port", &port, "--kv", "off"]).contains(&format!("port {port}")));
    assert!(run(&["--script", "/no/such/file"]).contains("/no/such/file"));
    assert!(run(&["--api-key-file", "/no/such/keys", "--kv", "off"]).contains("/no/such/keys"));
    let empty = tempfile::NamedTempFile::new().unwrap();
    let path: &Path = empty.path();
    assert!(run(&["--api-key-file", path.to_str().unwrap(), "--kv", "off"]).contains("no key in it"));
}
