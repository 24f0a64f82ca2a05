//! What clients do wrong, and what they do to a server.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Answer, Server, options};
use ds4_engine::scheduler::Limits;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

const GENERATING: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"];
const LIMITS: Limits = Limits { parallel: 4, queue: 16, context: 20_000 };

fn chat(text: &str) -> Value {
    json!({"messages": [{"role": "user", "content": text}]})
}

/// Whether an error has the form of its dialect.
fn is_error(path: &str, answer: &Answer, kind: &str) {
    let body = answer.json();
    assert_eq!(body["error"]["type"], kind, "{path}: {body}");
    assert!(!body["error"]["message"].as_str().unwrap().is_empty());
    if path.starts_with("/v1/messages") {
        assert_eq!(
            (&body["type"], body["request_id"].as_str()),
            (&json!("error"), answer.header("request-id"))
        );
    } else {
        assert!(body["error"].get("param").is_some() && body["error"].get("code").is_some());
    }
}

#[test]
fn paths_and_methods() {
    let server = Server::start();
    for path in ["/health", "/v1/health"] {
        assert_eq!((server.get(path).status, server.get(path).json()), (200, json!({"status": "ok"})));
    }
    let metrics = server.get("/metrics");
    assert!(metrics.header("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
    assert!(metrics.text().contains("ds4_requests_running 0"));
    let models = server.get("/v1/models?limit=5").json();
    assert_eq!(
        (&models["data"][0]["id"], &models["data"][0]["max_model_len"]),
        (&json!("deepseek-v4-flash"), &json!(20_000))
    );
    assert_eq!(server.get("/v1/models/deepseek-v4-flash").json()["type"], "model");
    let unknown = server.get("/v1/models/other");
    assert_eq!((unknown.status, &unknown.json()["error"]["code"]), (404, &json!("model_not_found")));
    is_error("/v1/nothing", &server.get("/v1/nothing"), "invalid_request_error");
    is_error("/v1/messages/x", &server.get("/v1/messages/x"), "not_found_error");
    for path in GENERATING {
        let answer = server.get(path);
        assert_eq!(answer.status, 405);
        is_error(path, &answer, "invalid_request_error");
    }
    for path in ["/", "/v1/models", "/health"] {
        let answer = server.request("HEAD", path, &[], b"");
        assert_eq!((answer.status, answer.body.len()), (200, 0));
    }
    let page = server.get("/");
    assert!(
        page.text().contains("</html>")
            && page.header("content-security-policy").unwrap().contains("default-src 'none'")
    );
    let described = server.get("/openapi.json").json();
    for path in GENERATING {
        assert!(described["paths"].get(path).is_some(), "{path}");
    }
    assert!(server.get("/health").header("x-request-id").unwrap().starts_with("req_"));
    server.end();
}

#[test]
fn keys() {
    let server =
        Server::with(ds4_server::Options { keys: vec!["one".into(), "two".into()], ..options() }, LIMITS);
    assert_eq!(server.get("/health").status, 200);
    let body = chat("UTF8").to_string();
    let post = |path, headers: &[(&str, &str)]| server.request("POST", path, headers, body.as_bytes());
    for headers in
        [&[][..], &[("Authorization", "Bearer three")], &[("x-api-key", "on")], &[("Authorization", "one")]]
    {
        let answer = post(GENERATING[0], headers);
        assert_eq!(answer.status, 401);
        is_error(GENERATING[0], &answer, "authentication_error");
    }
    is_error("/v1/messages", &post("/v1/messages", &[]), "authentication_error");
    for headers in
        [[("Authorization", "Bearer one")], [("authorization", "bearer two")], [("X-Api-Key", "two")]]
    {
        assert_eq!(post(GENERATING[0], &headers).status, 200);
    }
    assert_eq!(server.get("/v1/models").status, 401);
    server.end();
}

#[test]
fn other_origins() {
    let asked = [("Origin", "http://x.test"), ("Access-Control-Request-Headers", "authorization,x-y")];
    let closed = Server::start();
    let answer = closed.request("OPTIONS", GENERATING[0], &asked, b"");
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (204, None));
    closed.end();
    let open = Server::with(ds4_server::Options { cors: true, keys: vec!["k".into()], ..options() }, LIMITS);
    let answer = open.request("OPTIONS", GENERATING[0], &asked, b"");
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (204, Some("*")));
    assert_eq!(answer.header("access-control-allow-headers"), Some("authorization,x-y"));
    let denied = open.request("POST", GENERATING[0], &asked, b"{}");
    assert_eq!((denied.status, denied.header("access-control-allow-origin")), (401, Some("*")));
    open.end();
}

#[test]
fn bodies_that_are_wrong() {
    let server = Server::start();
    let user = |more: &str| {
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"x\"}}], \"input\": \"x\", \"prompt\": \"x\", \"max_tokens\": 5{more}}}"
        )
    };
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    let bodies: Vec<String> = [
        "",
        "null",
        "[]",
        "\"x\"",
        "{",
        "{\"messages\": 1, \"input\": 1, \"prompt\": 1}",
        "{\"messages\": [1], \"input\": [1], \"prompt\": [1]}",
    ]
    .map(str::to_owned)
    .into_iter()
    .chain([
        deep,
        user(", \"temperature\": \"hot\""),
        user(", \"temperature\": 3"),
        user(", \"stream\": \"yes\""),
        user(", \"max_tokens\": -5, \"max_output_tokens\": 0"),
        user(", \"top_p\": 2"),
    ])
    .collect();
    for path in GENERATING {
        for body in &bodies {
            let answer = server.request("POST", path, &[], body.as_bytes());
            assert_eq!(answer.status, 400, "{path} {}: {}", &body[..body.len().min(80)], answer.text());
            is_error(path, &answer, "invalid_request_error");
        }
        assert_eq!(server.request("POST", path, &[], b"\xff\xfe{}").status, 400);
        assert_eq!(server.request("POST", path, &[], b"{\"model\": \"\\ud800\"}").status, 400);
        // What is unknown and means nothing is ignored.
        let odd = user(
            ", \"x_unknown\": {\"a\": [1]}, \"user\": \"u\", \"metadata\": {}, \"service_tier\": \"auto\"",
        );
        assert_eq!(
            server
                .request("POST", path, &[("Content-Type", "text/plain")], format!("\u{feff}{odd}").as_bytes())
                .status,
            200
        );
    }
    let where_is = |path: &str, body: Value| {
        server.post(path, &body).json()["error"]["message"].as_str().unwrap().to_owned()
    };
    let image = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}]);
    assert!(
        where_is(GENERATING[0], json!({"messages": image}))
            .starts_with("messages.0.content.1.type: \"image_url\"")
    );
    assert!(
        where_is("/v1/messages", json!({"messages": image, "max_tokens": 5}))
            .starts_with("messages.0.content.1.type")
    );
    assert!(where_is("/v1/messages", json!({"messages": []})).contains("max_tokens"));
    let tool = json!({"type": "function", "function": {"name": "f", "strict": true, "parameters": {"type": "object", "required": ["x"]}}});
    assert!(
        where_is(GENERATING[0], json!({"messages": [{"role": "user", "content": "x"}], "tools": [tool]}))
            .contains("\"x\"")
    );
    let thread = server.post("/v1/messages", &json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "thread": {"type": "create"}}));
    assert_eq!(
        (thread.status, &thread.json()["error"]["details"]["error_code"]),
        (400, &json!("thread_unsupported_request"))
    );
    server.end();
}

#[test]
fn prompts_that_are_too_long() {
    let server = Server::start();
    let long = "word ".repeat(30_000);
    let answer = server.post(GENERATING[0], &chat(&long)).json();
    assert_eq!(answer["error"]["code"], "context_length_exceeded");
    assert_eq!(
        (answer["error"]["n_ctx"].as_u64(), answer["error"]["n_prompt_tokens"].as_u64() > Some(20_000)),
        (Some(20_000), true)
    );
    let body = json!({"messages": [{"role": "user", "content": long}], "max_tokens": 5});
    let message = server.post("/v1/messages", &body).json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(
        message.starts_with("prompt is too long: ") && message.ends_with(" tokens > 20000 maximum"),
        "{message}"
    );
    // More than fits is what clients usually ask for.
    assert_eq!(
        server
            .post(
                GENERATING[0],
                &json!({"messages": [{"role": "user", "content": "UTF8"}], "max_tokens": 128_000})
            )
            .status,
        200
    );
    server.end();
}

#[test]
fn bodies_in_other_ways() {
    let server = Server::start();
    let body = chat("UTF8").to_string();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n";
    let chunked = format!(
        "{head}Transfer-Encoding: chunked\r\n\r\n5\r\n{}\r\n{:x}\r\n{}\r\n0\r\n\r\n",
        &body[..5],
        body.len() - 5,
        &body[5..]
    );
    assert_eq!(Answer::parse(&server.raw(chunked.as_bytes())).status, 200);
    let large = format!("{head}Content-Length: {}\r\n\r\n{{", 1u64 << 30);
    assert_eq!(Answer::parse(&server.raw(large.as_bytes())).status, 413);
    // A connection is kept, and serves several requests.
    let mut stream = server.connect();
    for _ in 0..3 {
        write!(stream, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut bytes = [0; 4096];
        let n = stream.read(&mut bytes).unwrap();
        assert!(bytes[..n].starts_with(b"HTTP/1.1 200"));
    }
    for garbage in [
        &b"\r\n\r\n"[..],
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"POST /v1/messages HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ] {
        let mut stream = server.connect();
        stream.write_all(garbage).unwrap();
        drop(stream);
    }
    assert_eq!(server.get("/health").status, 200);
    server.end();
}

#[test]
fn while_the_model_is_loaded() {
    let server = Server::loading(options(), LIMITS);
    assert_eq!(server.get("/health").status, 503);
    let answer = server.post(GENERATING[0], &chat("UTF8"));
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("2")));
    is_error(
        "/v1/messages",
        &server
            .post("/v1/messages", &json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 5})),
        "overloaded_error",
    );
    server.app.set_ready(0);
    assert_eq!(server.post(GENERATING[0], &chat("UTF8")).status, 200);
    server.end();
}

/// A stream whose reader does not read: it takes a place, and no more.
fn stuck(server: &Server) -> std::net::TcpStream {
    let body = json!({"messages": [{"role": "user", "content": "LONG"}], "stream": true, "logprobs": true, "top_logprobs": 20, "thinking": {"type": "disabled"}}).to_string();
    let mut stream = server.connect();
    write!(
        stream,
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    stream
}

#[test]
fn too_many() {
    let limits = Limits { parallel: 2, queue: 2, context: 20_000 };
    let server = Server::with(options(), limits);
    let _running: Vec<_> = (0..2).map(|_| stuck(&server)).collect();
    let begun = Instant::now();
    while server.scheduler.running() < 2 && begun.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let waiting: Vec<_> = (0..2).map(|_| stuck(&server)).collect();
    while server.scheduler.queued() < 2 && begun.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let answer = server.post(GENERATING[0], &chat("UTF8"));
    assert_eq!((answer.status, answer.header("retry-after")), (429, Some("2")));
    is_error(GENERATING[0], &answer, "rate_limit_error");
    let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 5});
    let answer = server.post("/v1/messages", &body);
    assert_eq!(answer.status, 529);
    is_error("/v1/messages", &answer, "overloaded_error");
    // Counting does not wait in the queue.
    assert_eq!(server.post("/v1/messages/count_tokens", &body).status, 200);
    drop(waiting);
    let begun = Instant::now();
    while server.scheduler.queued() > 0 {
        assert!(begun.elapsed() < Duration::from_secs(5), "those who have left the queue are still in it");
        std::thread::sleep(Duration::from_millis(5));
    }
    server.end();
}

/// Who waits in the queue is told so by events, which reset the timers of clients.
#[test]
fn silence_is_broken_by_events() {
    let server = Server::with(options(), Limits { parallel: 1, queue: 4, context: 20_000 });
    let busy = stuck(&server);
    let begun = Instant::now();
    while server.scheduler.running() < 1 && begun.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let ask = |path: &str| {
        let body =
            json!({"messages": [{"role": "user", "content": "UTF8"}], "input": "UTF8", "stream": true})
                .to_string();
        let mut stream = server.connect();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        stream
    };
    let waiting = [ask("/v1/responses"), ask("/v1/chat/completions")];
    std::thread::sleep(Duration::from_millis(6000));
    drop(busy);
    let events = waiting.map(|mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        Answer::parse(&all).events()
    });
    let repeated = events[0].iter().filter(|(_, e)| e["type"] == "response.in_progress").count();
    let empty = events[1].iter().filter(|(_, e)| e["choices"][0]["delta"] == json!({}));
    // One of each belongs to every answer.
    assert!(repeated >= 2 && empty.count() >= 2);
    assert_eq!(events[0].last().unwrap().1["type"], "response.completed");
    server.end();
}

#[test]
fn ending_lets_answers_finish() {
    let server = Server::start();
    let reader = {
        let body =
            json!({"messages": [{"role": "user", "content": "LONG"}], "thinking": {"type": "disabled"}})
                .to_string();
        let mut stream = server.connect();
        write!(
            stream,
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        std::thread::spawn(move || {
            let mut all = Vec::new();
            let _reset = stream.read_to_end(&mut all);
            Answer::parse(&all)
        })
    };
    let begun = Instant::now();
    while server.scheduler.running() == 0 && begun.elapsed() < Duration::from_secs(2) {
        std::thread::yield_now();
    }
    let address = server.address;
    server.end();
    let answer = reader.join().unwrap();
    assert_eq!((answer.status, &answer.json()["choices"][0]["finish_reason"]), (200, &json!("stop")));
    assert!(std::net::TcpStream::connect(address).is_err());
}

/// Bytes of memory of this process.
#[cfg(target_os = "linux")]
fn memory() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// Two hundred clients that go away, send garbage, read slowly and close halves of connections: nothing is stuck behind
/// them, and `/health` answers all the while.
fn bad_company(seconds: u64) {
    let server = Server::start();
    let until = Instant::now() + Duration::from_secs(seconds);
    let worst = std::sync::Mutex::new(Duration::ZERO);
    let early = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for i in 0..200u64 {
            let server = &server;
            scope.spawn(move || {
                let mut n = i;
                while Instant::now() < until {
                    n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    rude(server, n >> 33);
                    // All of them share two cores with the server in this test.
                    std::thread::sleep(Duration::from_millis(100));
                }
            });
        }
        while Instant::now() < until {
            let begun = Instant::now();
            assert_eq!(server.get("/health").status, 200);
            let mut worst = worst.lock().unwrap();
            *worst = (*worst).max(begun.elapsed());
            #[cfg(target_os = "linux")]
            if Instant::now() + Duration::from_secs(seconds / 2) > until {
                let _ = early.compare_exchange(
                    0,
                    memory(),
                    std::sync::atomic::Ordering::Relaxed,
                    std::sync::atomic::Ordering::Relaxed,
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    assert!(*worst.lock().unwrap() < Duration::from_secs(1), "/health took {worst:?}");
    let begun = Instant::now();
    while server.scheduler.running() + server.scheduler.queued() > 0 {
        assert!(begun.elapsed() < Duration::from_secs(10), "something is stuck");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(
        server.ok(GENERATING[0], chat("UTF8"))["choices"][0]["message"]["content"],
        "žluťoučký kůň 日本語 🐴✓"
    );
    #[cfg(target_os = "linux")]
    {
        let (early, late) = (early.into_inner(), memory());
        assert!(late < early + (64 << 20), "memory grew from {early} to {late} bytes");
    }
    server.end();
}

/// One client that does one rude thing.
fn rude(server: &Server, n: u64) {
    let path = GENERATING[(n % 4) as usize];
    let body = json!({"messages": [{"role": "user", "content": "LONG"}], "input": "LONG", "prompt": "LONG", "max_tokens": 900, "stream": !n.is_multiple_of(3)}).to_string();
    let Ok(mut stream) = std::net::TcpStream::connect(server.address) else { return };
    let _ = stream.set_read_timeout(Some(Duration::from_millis(500)));
    let head = format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
    let mut some = [0; 512];
    // Errors are what such clients get.
    let _ = match n / 4 % 6 {
        0 => stream.write_all(format!("{head}{body}").as_bytes()),
        1 => stream
            .write_all(format!("{head}{body}").as_bytes())
            .and_then(|()| stream.read(&mut some))
            .map(|_| ()),
        2 => stream.write_all(&n.to_le_bytes()).and_then(|()| stream.write_all(b"\r\n\r\n\xff")),
        3 => stream.write_all(format!("{head}{}", &body[..20]).as_bytes()),
        4 => stream
            .write_all(format!("{head}{body}").as_bytes())
            .and_then(|()| stream.shutdown(Shutdown::Write)),
        _ => stream.write_all(format!("{head}{body}").as_bytes()).map(|()| {
            for _ in 0..4 {
                let _ = stream.read(&mut some[..16]);
                std::thread::sleep(Duration::from_millis(20));
            }
        }),
    };
}

#[test]
fn bad_company_for_a_while() {
    bad_company(6);
}

#[test]
#[ignore = "takes a minute"]
fn bad_company_for_a_minute() {
    bad_company(60);
}
