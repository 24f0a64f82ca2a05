//! A server with scripted answers, and a client that sends any bytes.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use ds4_engine::scheduler::{Limits, Scheduler};
use ds4_engine::{Engine, EngineOptions, Script};
use ds4_gguf::Gguf;
use ds4_server::{App, Options};
use ds4_testkit::Idle;
use ds4_text::{Profile, Replay, Tokenizer};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::watch;

pub(crate) const D: &str = "｜DSML｜";

/// What the model says to which prompt.
pub(crate) fn script() -> String {
    let call = |name: &str, city: &str| {
        format!(
            "<{D}invoke name=\"{name}\">\n<{D}parameter name=\"city\" string=\"true\">{city}</{D}parameter>\n</{D}invoke>\n"
        )
    };
    let block = |calls: &str| format!("\n\n<{D}tool_calls>\n{calls}</{D}tool_calls>");
    let rules = json!({"rules": [
        {"name": "after tools", "all": ["<tool_result>"], "think": "I know now.", "text": "It is sunny."},
        {"name": "two", "all": ["TWO"], "think": "Both.", "text": block(&(call("weather", "Roma") + &call("weather", "Oslo")))},
        {"name": "one", "all": ["ONE"], "think": "I should look.", "text": format!("Let me look.{}", block(&call("weather", "Praha <b>")))},
        {"name": "custom", "all": ["CUSTOM"], "text": block(&call("patch", "x").replace("city", "input"))},
        {"name": "member", "all": ["MEMBER"], "text": block(&call("space__weather", "Roma"))},
        {"name": "broken", "all": ["BROKEN"], "text": format!("Hm.\n\n<{D}tool_calls>\n<{D}invoke name=\"weather\">\n<{D}parameter na")},
        {"name": "json", "all": ["JSON"], "think": "A person.", "text": "{\"name\": \"Ada\", \"age\": 36}"},
        {"name": "stop", "all": ["STOP"], "text": "one two HALT three"},
        {"name": "long", "all": ["LONG"], "text": (0..3000).map(|i| format!("word{i} ")).collect::<String>()},
        {"name": "utf8", "all": ["UTF8"], "text": "žluťoučký kůň 日本語 🐴✓"},
        {"name": "raw", "all": ["Once upon"], "text": " a time."},
    ]});
    rules.to_string()
}

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) app: Arc<App>,
    pub(crate) scheduler: Scheduler,
    pub(crate) tokenizer: Arc<Tokenizer>,
    runtime: Runtime,
    stop: watch::Sender<bool>,
    worker: JoinHandle<()>,
}

pub(crate) fn options() -> Options {
    Options {
        model: "deepseek-v4-flash".into(),
        display_name: "Test".into(),
        max_tokens: None,
        keys: Vec::new(),
        cors: false,
        trace: None,
    }
}

impl Server {
    pub(crate) fn start() -> Self {
        Server::with(options(), Limits { parallel: 4, queue: 16, context: 20_000 })
    }

    pub(crate) fn with(options: Options, limits: Limits) -> Self {
        let server = Server::loading(options, limits);
        server.app.set_ready(0);
        server
    }

    /// A server whose model is not there yet.
    pub(crate) fn loading(options: Options, limits: Limits) -> Self {
        let nano = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/ds4-nano/ds4-nano.gguf");
        let file = Gguf::open(nano).unwrap();
        let mut engine = Engine::load(Idle, &file, None, EngineOptions::default()).unwrap();
        let tokenizer = Arc::new(Tokenizer::from_gguf(file.metadata()).unwrap());
        let (scheduler, worker) = Scheduler::new(limits, Some(Script::parse(&script()).unwrap()));
        let app =
            App::new(options, Arc::clone(&tokenizer), Profile::April, scheduler.clone(), Replay::default())
                .unwrap();
        let of_worker = Arc::clone(&tokenizer);
        let worker = std::thread::spawn(move || worker.run(&mut engine, &of_worker, || {}).unwrap());
        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        runtime.spawn(ds4_server::serve(Arc::clone(&app), listener, stopped, Duration::from_secs(2)));
        Server { address, app, scheduler, tokenizer, runtime, stop, worker }
    }

    /// Ends it as a signal does.
    pub(crate) fn end(self) {
        self.stop.send(true).unwrap();
        self.worker.join().unwrap();
        drop(self.runtime);
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    }

    /// Sends bytes, and reads all that comes.
    pub(crate) fn raw(&self, bytes: &[u8]) -> Vec<u8> {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        let mut all = Vec::new();
        let _reset = stream.read_to_end(&mut all);
        all
    }

    pub(crate) fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n",
            body.len()
        );
        headers.iter().for_each(|(k, v)| head.push_str(&format!("{k}: {v}\r\n")));
        head.push_str("\r\n");
        Answer::parse(&self.raw(&[head.as_bytes(), body].concat()))
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.request("GET", path, &[], b"")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        let headers: &[(&str, &str)] =
            if path.starts_with("/v1/messages") { &[("anthropic-version", "2023-06-01")] } else { &[] };
        self.request("POST", path, headers, body.to_string().as_bytes())
    }

    /// The answer to a request that must succeed.
    pub(crate) fn ok(&self, path: &str, body: Value) -> Value {
        let answer = self.post(path, &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()
    }

    /// The events of a request that must succeed.
    pub(crate) fn events(&self, path: &str, mut body: Value) -> Vec<(Option<String>, Value)> {
        body["stream"] = true.into();
        let answer = self.post(path, &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(answer.header("content-type").unwrap().starts_with("text/event-stream"));
        answer.events()
    }
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or_else(|| {
            panic!("no head in {:?}", String::from_utf8_lossy(&bytes[..bytes.len().min(200)]))
        });
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers: Vec<(String, String)> = lines
            .map(|l| l.split_once(": ").unwrap())
            .map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned()))
            .collect();
        let is_chunked = headers.iter().any(|(k, v)| k == "transfer-encoding" && v == "chunked");
        let body = &bytes[end + 4..];
        Answer { status, body: if is_chunked { unchunk(body) } else { body.to_vec() }, headers }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    pub(crate) fn events(&self) -> Vec<(Option<String>, Value)> {
        let text = self.text();
        assert!(text.ends_with("\n\n"), "a stream ends with a blank line");
        let mut events = Vec::new();
        for block in text.split("\n\n").filter(|b| !b.is_empty()) {
            let field = |name: &str| block.lines().find_map(|l| l.strip_prefix(name));
            match field("data: ") {
                Some("[DONE]") => events.push((None, json!("[DONE]"))),
                Some(data) => {
                    events.push((field("event: ").map(str::to_owned), serde_json::from_str(data).unwrap()));
                }
                None => assert!(block.starts_with(": "), "{block:?}"),
            }
        }
        events
    }
}

fn unchunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = bytes.windows(2).position(|w| w == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).unwrap(), 16).unwrap();
        bytes = &bytes[end + 2..];
        if size == 0 {
            break;
        }
        body.extend_from_slice(&bytes[..size.min(bytes.len())]);
        bytes = bytes.get(size + 2..).unwrap_or_default();
    }
    body
}

/// A tool in the form of each dialect.
pub(crate) fn weather(path: &str) -> Value {
    let schema = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]});
    match path {
        "/v1/messages" => json!({"name": "weather", "description": "d", "input_schema": schema}),
        "/v1/responses" => {
            json!({"type": "function", "name": "weather", "description": "d", "parameters": schema})
        }
        _ => {
            json!({"type": "function", "function": {"name": "weather", "description": "d", "parameters": schema}})
        }
    }
}
