//! Each endpoint over TCP, streamed and not.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Server, weather};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const RESPONSES: &str = "/v1/responses";
const MESSAGES: &str = "/v1/messages";

fn chat(text: &str) -> Value {
    json!({"messages": [{"role": "user", "content": text}]})
}

fn messages(text: &str) -> Value {
    json!({"messages": [{"role": "user", "content": text}], "max_tokens": 4000})
}

fn with(mut body: Value, more: Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// All texts of a kind of delta, joined.
fn joined(events: &[(Option<String>, Value)], pointer: &str) -> String {
    events.iter().filter_map(|(_, e)| e.pointer(pointer)?.as_str()).collect()
}

#[test]
fn chat_completions() {
    let server = Server::start();
    let answer = server.ok(CHAT, chat("UTF8"));
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["content"], "žluťoučký kůň 日本語 🐴✓");
    assert_eq!((&choice["finish_reason"], &answer["object"]), (&json!("stop"), &json!("chat.completion")));
    let usage = &answer["usage"];
    assert_eq!(
        usage["total_tokens"].as_u64(),
        Some(usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap())
    );

    let events = server.events(
        CHAT,
        with(chat("ONE"), json!({"tools": [weather(CHAT)], "stream_options": {"include_usage": true}})),
    );
    assert_eq!(events[0].1["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(joined(&events, "/choices/0/delta/reasoning_content"), "I should look.");
    assert_eq!(joined(&events, "/choices/0/delta/content"), "Let me look.");
    let arguments = joined(&events, "/choices/0/delta/tool_calls/0/function/arguments");
    assert_eq!(serde_json::from_str::<Value>(&arguments).unwrap(), json!({"city": "Praha <b>"}));
    let finish: Vec<&Value> = events
        .iter()
        .filter_map(|(_, e)| e.pointer("/choices/0/finish_reason"))
        .filter(|f| !f.is_null())
        .collect();
    assert_eq!(finish, ["tool_calls"]);
    let [.., (_, usage), (_, done)] = events.as_slice() else { panic!() };
    assert_eq!((&usage["choices"], done), (&json!([]), &json!("[DONE]")));
    assert!(usage["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap() > 3);

    // The second turn sends the call back with other spaces, and goes on from the state of the first.
    let first = server.ok(CHAT, with(chat("ONE"), json!({"tools": [weather(CHAT)]})));
    let mut message = first["choices"][0]["message"].clone();
    let id = message["tool_calls"][0]["id"].clone();
    message["tool_calls"][0]["function"]["arguments"] = "{\"city\"  :\"Praha \\u003cb>\"}".into();
    let history = json!([{"role": "user", "content": "ONE"}, message, {"role": "tool", "tool_call_id": id, "content": "sun"}]);
    let second = server.ok(CHAT, json!({"messages": history, "tools": [weather(CHAT)]}));
    assert_eq!(second["choices"][0]["message"]["content"], "It is sunny.");
    let usage = &second["usage"];
    let (prompt, cached) = (
        usage["prompt_tokens"].as_u64().unwrap(),
        usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap(),
    );
    assert!(prompt - cached < 30, "{cached} of {prompt}");
    server.end();
}

#[test]
fn chat_options() {
    let server = Server::start();
    let text = |body: Value| server.ok(CHAT, body)["choices"][0].clone();
    let off = json!({"thinking": {"type": "disabled"}});
    assert!(text(with(chat("ONE"), off.clone()))["message"].get("reasoning_content").is_none());
    assert!(
        text(with(chat("ONE"), json!({"reasoning_effort": "none"})))["message"]
            .get("reasoning_content")
            .is_none()
    );
    assert!(
        text(with(chat("ONE"), json!({"model": "deepseek-chat"})))["message"]
            .get("reasoning_content")
            .is_none()
    );
    let stopped = text(with(chat("STOP"), json!({"stop": ["HALT"]})));
    assert_eq!(
        (&stopped["message"]["content"], &stopped["finish_reason"]),
        (&json!("one two "), &json!("stop"))
    );
    let cut = server.ok(CHAT, with(with(chat("LONG"), off.clone()), json!({"max_tokens": 9})));
    assert_eq!(
        (&cut["choices"][0]["finish_reason"], &cut["usage"]["completion_tokens"]),
        (&json!("length"), &json!(9))
    );
    let two = text(with(chat("TWO"), json!({"tools": [weather(CHAT)]})));
    assert_eq!(two["message"]["tool_calls"].as_array().unwrap().len(), 2);
    let one = text(with(chat("TWO"), json!({"tools": [weather(CHAT)], "parallel_tool_calls": false})));
    assert_eq!(one["message"]["tool_calls"].as_array().unwrap().len(), 1);
    for choice in [json!("required"), json!({"type": "function", "function": {"name": "weather"}})] {
        let forced = text(with(chat("ONE"), json!({"tools": [weather(CHAT)], "tool_choice": choice})));
        assert_eq!(
            (&forced["finish_reason"], &forced["message"]["content"]),
            (&json!("tool_calls"), &Value::Null)
        );
    }
    // A call that breaks off was never made.
    let broken = text(with(chat("BROKEN"), json!({"tools": [weather(CHAT)]})));
    assert_eq!((&broken["message"]["content"], broken["message"].get("tool_calls")), (&json!("Hm."), None));
    let schema = json!({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"], "additionalProperties": false});
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "p", "schema": schema, "strict": true}});
    let person = text(with(chat("JSON"), json!({"response_format": format})));
    let person: Value = serde_json::from_str(person["message"]["content"].as_str().unwrap()).unwrap();
    assert_eq!(person, json!({"name": "Ada", "age": 36}));
    let probable = text(with(with(chat("UTF8"), off), json!({"logprobs": true, "top_logprobs": 2})));
    let tokens = probable["logprobs"]["content"].as_array().unwrap();
    assert!(tokens.len() > 5 && tokens.iter().all(|t| t["top_logprobs"].as_array().unwrap().len() == 2));
    let bytes: Vec<u8> = tokens
        .iter()
        .flat_map(|t| t["bytes"].as_array().unwrap())
        .map(|b| b.as_u64().unwrap() as u8)
        .collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), "žluťoučký kůň 日本語 🐴✓");
    server.end();
}

#[test]
fn raw_completions() {
    let server = Server::start();
    let path = "/v1/completions";
    let answer = server.ok(path, json!({"prompt": "Once upon", "echo": true}));
    assert_eq!(answer["choices"][0]["text"], "Once upon a time.");
    let events =
        server.events(path, json!({"prompt": ["Once upon"], "stream_options": {"include_usage": true}}));
    assert_eq!(joined(&events, "/choices/0/text"), " a time.");
    assert_eq!(events.last().unwrap().1, "[DONE]");
    for (body, param) in [
        (json!({"prompt": [[1, 2]]}), "prompt"),
        (json!({"prompt": "a", "n": 2}), "n"),
        (json!({"prompt": "a", "suffix": "b"}), "suffix"),
        (json!({}), "prompt"),
    ] {
        let answer = server.post(path, &body);
        assert_eq!((answer.status, answer.json()["error"]["param"].as_str()), (400, Some(param)));
    }
    server.end();
}

#[test]
fn responses() {
    let server = Server::start();
    let answer = server.ok(RESPONSES, json!({"input": "ONE", "tools": [weather(RESPONSES)], "store": false}));
    let kinds: Vec<&str> =
        answer["output"].as_array().unwrap().iter().map(|i| i["type"].as_str().unwrap()).collect();
    assert_eq!(
        (kinds.as_slice(), &answer["status"]),
        (&["reasoning", "message", "function_call"][..], &json!("completed"))
    );
    let cut = server
        .ok(RESPONSES, json!({"input": "LONG", "max_output_tokens": 20, "reasoning": {"effort": "none"}}));
    assert_eq!(
        (&cut["status"], &cut["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );

    for summary in [Value::Null, json!("auto")] {
        let body = json!({"input": "ONE", "tools": [weather(RESPONSES)], "reasoning": {"summary": summary}});
        let events = server.events(RESPONSES, body);
        let numbers: Vec<u64> = events.iter().map(|(_, e)| e["sequence_number"].as_u64().unwrap()).collect();
        assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
        assert!(events.iter().all(|(name, e)| name.as_deref() == e["type"].as_str()));
        let done: Vec<&Value> = events
            .iter()
            .filter(|(_, e)| e["type"] == "response.output_item.done")
            .map(|(_, e)| &e["item"])
            .collect();
        let last = &events.last().unwrap().1;
        assert_eq!(
            (&last["type"], last["response"]["output"].as_array().unwrap().iter().collect::<Vec<_>>()),
            (&json!("response.completed"), done)
        );
        let item = &last["response"]["output"][0];
        assert_eq!(item["content"][0]["text"], "I should look.");
        assert_eq!(item["summary"].as_array().unwrap().is_empty(), summary.is_null());
    }
    let counted =
        server.ok("/v1/responses/input_tokens", json!({"input": "ONE", "tools": [weather(RESPONSES)]}));
    assert_eq!(
        (&counted["object"], &counted["input_tokens"]),
        (&json!("response.input_tokens"), &answer["usage"]["input_tokens"])
    );
    // Tools of other kinds come back as they were called.
    let tools = json!([{"type": "custom", "name": "patch", "description": "d"}, {"type": "web_search"},
        {"type": "namespace", "name": "space", "tools": [{"type": "function", "name": "weather", "parameters": {"type": "object"}}]}]);
    let custom =
        server.ok(RESPONSES, json!({"input": "CUSTOM", "tools": tools, "reasoning": {"effort": "none"}}));
    let item = &custom["output"][0];
    assert_eq!(
        (&item["type"], &item["name"], &item["input"]),
        (&json!("custom_tool_call"), &json!("patch"), &json!("x"))
    );
    let member =
        server.ok(RESPONSES, json!({"input": "MEMBER", "tools": tools, "reasoning": {"effort": "none"}}));
    let item = &member["output"][0];
    assert_eq!((&item["name"], &item["namespace"]), (&json!("weather"), &json!("space")));
    // Items can be named instead of sent.
    let call = &answer["output"][2];
    let replay = json!({"input": [{"role": "user", "content": "ONE"}, call, {"type": "function_call_output", "call_id": call["call_id"], "output": "sun"}], "tools": [weather(RESPONSES)]});
    assert_eq!(server.ok(RESPONSES, replay)["output"][1]["content"][0]["text"], "It is sunny.");
    let stored = server.ok(RESPONSES, json!({"input": "ONE", "tools": [weather(RESPONSES)]}));
    let call = &stored["output"][2];
    let named = json!({"input": [{"role": "user", "content": "ONE"}, {"type": "item_reference", "id": call["id"]}, {"type": "function_call_output", "call_id": call["call_id"], "output": "sun"}]});
    assert_eq!(server.ok(RESPONSES, named)["status"], "completed");
    for (body, code) in [
        (json!({"input": "x", "previous_response_id": "resp_1"}), Some("previous_response_not_found")),
        (json!({"input": [{"type": "function_call_output", "call_id": "call_1", "output": "x"}]}), None),
        (json!({"input": [{"type": "item_reference", "id": "x"}]}), None),
        (json!({"input": "x", "background": true}), None),
        (json!({"input": []}), None),
    ] {
        let answer = server.post(RESPONSES, &body);
        assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (400, code), "{body}");
    }
    server.end();
}

#[test]
fn anthropic_messages() {
    let server = Server::start();
    let plain = server.ok(MESSAGES, messages("ONE"));
    assert_eq!(plain["content"][0]["type"], "text", "no thinking unless asked for");
    let thinking =
        json!({"thinking": {"type": "enabled", "budget_tokens": 1024}, "tools": [weather(MESSAGES)]});
    let answer = server.ok(MESSAGES, with(messages("ONE"), thinking.clone()));
    let kinds: Vec<&str> =
        answer["content"].as_array().unwrap().iter().map(|b| b["type"].as_str().unwrap()).collect();
    assert_eq!(
        (kinds.as_slice(), &answer["stop_reason"]),
        (&["thinking", "text", "tool_use"][..], &json!("tool_use"))
    );
    assert!(!answer["content"][0]["signature"].as_str().unwrap().is_empty());
    assert_eq!(answer["content"][2]["input"], json!({"city": "Praha <b>"}));

    let events = server.events(MESSAGES, with(messages("TWO"), thinking.clone()));
    assert!(events.iter().all(|(name, e)| name.as_deref() == e["type"].as_str()));
    let kinds: Vec<&str> =
        events.iter().map(|(_, e)| e["type"].as_str().unwrap()).filter(|t| *t != "ping").collect();
    assert_eq!(
        (kinds[0], &kinds[kinds.len() - 2..]),
        ("message_start", &["message_delta", "message_stop"][..])
    );
    let (mut open, mut next) = (None, 0);
    for (_, e) in &events {
        match e["type"].as_str().unwrap() {
            "content_block_start" => {
                assert_eq!((open, e["index"].as_u64()), (None, Some(next)));
                open = Some(next);
                next += 1;
            }
            "content_block_delta" => assert_eq!(open, e["index"].as_u64()),
            "content_block_stop" => assert_eq!(open.take(), e["index"].as_u64()),
            _ => {}
        }
    }
    assert_eq!((open, next), (None, 3), "thinking and two calls");
    let stopped = server.ok(MESSAGES, with(messages("STOP"), json!({"stop_sequences": ["HALT"]})));
    assert_eq!(
        (&stopped["stop_reason"], &stopped["stop_sequence"]),
        (&json!("stop_sequence"), &json!("HALT"))
    );
    for choice in [json!({"type": "any"}), json!({"type": "tool", "name": "weather"})] {
        let forced = server.ok(
            MESSAGES,
            with(messages("ONE"), json!({"tools": [weather(MESSAGES)], "tool_choice": choice})),
        );
        assert_eq!(forced["content"].as_array().unwrap().len(), 1);
        assert_eq!(forced["stop_reason"], "tool_use");
    }
    let none = server.ok(
        MESSAGES,
        with(messages("UTF8"), json!({"tools": [weather(MESSAGES)], "tool_choice": {"type": "none"}})),
    );
    assert_eq!(none["stop_reason"], "end_turn");

    // Counting agrees with the real thing.
    let body = with(messages("ONE"), json!({"system": "Be brief.", "tools": [weather(MESSAGES)]}));
    let counted = server.ok("/v1/messages/count_tokens", body.clone())["input_tokens"].as_u64().unwrap();
    let usage = &server.ok(MESSAGES, body)["usage"];
    assert_eq!(
        usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap(),
        counted
    );
    server.end();
}

/// What agents do that costs other servers the state of the whole prompt.
#[test]
fn prefixes_stay() {
    let server = Server::start();
    let tool = |name: &str, deferred: bool| json!({"name": name, "description": "A tool. ".repeat(30), "input_schema": {"type": "object"}, "defer_loading": deferred});
    let ask = |line: u32, tools: Value, history: &Value| {
        let system = json!([{"type": "text", "text": format!("x-anthropic-billing-header: {line}")}, {"type": "text", "text": "You help."}]);
        let usage =
            server.ok(
                MESSAGES,
                json!({"max_tokens": 50, "system": system, "tools": tools, "messages": history}),
            )["usage"]
                .clone();
        let (new, cached) =
            (usage["input_tokens"].as_u64().unwrap(), usage["cache_read_input_tokens"].as_u64().unwrap());
        (new, cached)
    };
    let mut history = json!([{"role": "user", "content": "UTF8"}, {"role": "system", "content": [{"type": "text", "text": "state one"}]}]);
    let (_, cached) = ask(1, json!([tool("a", false), tool("b", false)]), &history);
    assert_eq!(cached, 0);
    // The same as text, the answer, a search that finds a tool, and the tool in the middle of the list.
    history[1]["content"] = "state one".into();
    let more = json!([
        {"role": "assistant", "content": [{"type": "text", "text": "žluťoučký kůň 日本語 🐴✓"}, {"type": "tool_use", "id": "t1", "name": "a", "input": {}}]},
        {"role": "system", "content": "a reminder"},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "tool_reference", "tool_name": "late"}]}]},
    ]);
    history.as_array_mut().unwrap().extend(more.as_array().unwrap().clone());
    let tools = json!([tool("a", false), tool("late", true), tool("b", false)]);
    let (new, cached) = ask(2, tools, &history);
    assert!(cached > 2 * new, "{new} new, {cached} cached");
    server.end();
}

#[test]
fn traces_hold_what_was_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.jsonl");
    let options = ds4_server::Options {
        trace: Some(path.clone()),
        keys: vec!["secret-key".into()],
        ..common::options()
    };
    let server =
        Server::with(options, ds4_engine::scheduler::Limits { parallel: 2, queue: 2, context: 4000 });
    let key = [("authorization", "Bearer secret-key")];
    assert_eq!(server.request("POST", CHAT, &key, chat("UTF8").to_string().as_bytes()).status, 200);
    let text = std::fs::read_to_string(path).unwrap();
    let line: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(line["content"], "žluťoučký kůň 日本語 🐴✓");
    assert!(line["prompt"].as_str().unwrap().contains("<｜User｜>UTF8") && !text.contains("secret-key"));
    server.end();
}
