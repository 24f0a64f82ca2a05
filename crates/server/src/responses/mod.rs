//! `POST /v1/responses` and `/v1/responses/input_tokens` (`api.md` section 6).

mod events;
mod items;
mod read;

pub(crate) use events::Events;
pub(crate) use items::Items;
pub(crate) use read::read;

use crate::app::App;
use crate::ask::ToolKind;
use crate::error::{ApiError, Dialect};
use crate::http::{Answering, unix_time};
use crate::reply::{Ending, Reply, Usage, logprobs};
use serde_json::{Value, json};
use std::collections::HashMap;

/// What a response says of its request, and how its items are written.
#[derive(Clone)]
pub(crate) struct Form {
    pub(crate) id: String,
    model: String,
    created: u64,
    /// What the request said, but for its input, which may be long.
    request: Value,
    /// Summaries of the reasoning are wanted.
    summary: bool,
    kinds: HashMap<String, ToolKind>,
}

impl Form {
    pub(crate) fn new(a: &Answering, mut request: Value) -> Self {
        if let Some(members) = request.as_object_mut() {
            members.remove("input");
        }
        Form {
            id: a.id.clone(),
            model: a.model.clone(),
            created: unix_time(),
            summary: request["reasoning"]["summary"].is_string(),
            request,
            kinds: a.kinds.clone(),
        }
    }

    /// The name of an item.
    fn item_id(&self, prefix: &str, index: usize) -> String {
        format!("{prefix}_{}_{index}", self.id.trim_start_matches("resp_"))
    }

    /// The response object with these items.
    fn response(&self, status: &str, output: Value, usage: Value) -> Value {
        let r = &self.request;
        let given = |key: &str, usual: Value| if r[key].is_null() { usual } else { r[key].clone() };
        let is_over = status != "in_progress";
        // The tools are long; who waits for the answer knows them.
        let tools = if is_over { given("tools", json!([])) } else { json!([]) };
        json!({
            "id": self.id, "object": "response", "created_at": self.created,
            "completed_at": if status == "completed" { json!(unix_time()) } else { Value::Null },
            "status": status, "incomplete_details": null, "error": null, "model": self.model, "output": output,
            "previous_response_id": null, "instructions": r["instructions"], "tools": tools,
            "tool_choice": given("tool_choice", json!("auto")), "truncation": given("truncation", json!("disabled")),
            "parallel_tool_calls": given("parallel_tool_calls", json!(true)),
            "text": given("text", json!({"format": {"type": "text"}})),
            "top_p": given("top_p", json!(1.0)), "temperature": given("temperature", json!(1.0)),
            "presence_penalty": given("presence_penalty", json!(0.0)),
            "frequency_penalty": given("frequency_penalty", json!(0.0)),
            "top_logprobs": given("top_logprobs", json!(0)),
            "reasoning": given("reasoning", json!({"effort": null, "summary": null})),
            "usage": usage, "max_output_tokens": r["max_output_tokens"], "max_tool_calls": r["max_tool_calls"],
            "store": false, "background": false, "service_tier": given("service_tier", json!("default")),
            "metadata": given("metadata", json!({})), "safety_identifier": r["safety_identifier"],
            "prompt_cache_key": r["prompt_cache_key"], "user": r["user"],
        })
    }

    /// The response at its end.
    fn over(&self, end: &Ending, output: Value, u: &Usage) -> Value {
        let status = if *end == Ending::Length { "incomplete" } else { "completed" };
        let mut response = self.response(status, output, usage(u));
        if *end == Ending::Length {
            response["incomplete_details"] = json!({"reason": "max_output_tokens"});
        }
        response
    }

    /// Remembers the items, unless the client said that it sends them again.
    fn remember(&self, app: &App, output: &[Value]) {
        if self.request["store"] != false {
            app.items().remember(output);
        }
    }

    /// The response of a request that failed.
    fn failed(&self, error: &ApiError, output: Value) -> Value {
        let mut response = self.response("failed", output, Value::Null);
        response["error"] = json!({"code": "server_error", "message": error.text(Dialect::OpenAi)});
        response
    }

    /// What the model thought. Its whole text comes back with the next request, so that nothing has to be stored here.
    fn reasoning(&self, index: usize, text: &str, status: &str) -> Value {
        let part =
            |kind: &str| if text.is_empty() { json!([]) } else { json!([{"type": kind, "text": text}]) };
        let summary = if self.summary { part("summary_text") } else { json!([]) };
        json!({
            "id": self.item_id("rs", index), "type": "reasoning", "summary": summary,
            "content": part("reasoning_text"), "encrypted_content": null, "status": status,
        })
    }

    fn message(&self, index: usize, parts: Value, status: &str) -> Value {
        json!({"id": self.item_id("msg", index), "type": "message", "role": "assistant", "status": status, "content": parts})
    }

    /// A call, as the tool's kind wants it.
    fn call(&self, index: usize, id: &str, name: &str, arguments: &str, status: &str) -> Value {
        match self.kinds.get(name) {
            Some(ToolKind::Custom) => json!({
                "id": self.item_id("ctc", index), "type": "custom_tool_call", "call_id": id, "name": name,
                "input": custom_input(arguments), "status": status,
            }),
            Some(ToolKind::Member { namespace, name }) => json!({
                "id": self.item_id("fc", index), "type": "function_call", "call_id": id, "name": name,
                "namespace": namespace, "arguments": arguments, "status": status,
            }),
            Some(ToolKind::Function) | None => json!({
                "id": self.item_id("fc", index), "type": "function_call", "call_id": id, "name": name,
                "arguments": arguments, "status": status,
            }),
        }
    }

    fn is_custom(&self, name: &str) -> bool {
        self.kinds.get(name) == Some(&ToolKind::Custom)
    }
}

fn output_text(text: &str, logprobs: Value) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})
}

/// The text that a tool without form gets.
fn custom_input(arguments: &str) -> String {
    let parsed: Value = serde_json::from_str(arguments).unwrap_or_default();
    parsed["input"].as_str().unwrap_or_default().to_owned()
}

fn usage(u: &Usage) -> Value {
    json!({
        "input_tokens": u.prompt, "input_tokens_details": {"cached_tokens": u.cached, "cache_write_tokens": 0},
        "output_tokens": u.generated, "output_tokens_details": {"reasoning_tokens": u.reasoning},
        "total_tokens": u.prompt + u.generated,
    })
}

/// All items of an answer.
fn items(form: &Form, reply: &Reply, end: &Ending, logprobs: Value) -> Vec<Value> {
    let answer = &reply.answer;
    let status = if *end == Ending::Length { "incomplete" } else { "completed" };
    let mut items = Vec::new();
    if !answer.reasoning.is_empty() {
        items.push(form.reasoning(0, &answer.reasoning, "completed"));
    }
    if !answer.content.is_empty() {
        let parts = json!([output_text(&answer.content, logprobs)]);
        items.push(form.message(items.len(), parts, status));
    }
    for (i, call) in answer.calls.iter().enumerate() {
        items.push(form.call(items.len(), &reply.call_id(i), &call.name, &call.arguments, "completed"));
    }
    items
}

/// The answer as one object.
pub(crate) async fn whole(mut a: Answering, request: Value) -> Result<Value, ApiError> {
    let form = Form::new(&a, request);
    let (summary, tokens) = a.reply.whole().await?;
    let logprobs = if a.wants_logprobs { logprobs(&a.app, &tokens) } else { json!([]) };
    let output = items(&form, &a.reply, &summary.end, logprobs);
    form.remember(&a.app, &output);
    Ok(form.over(&summary.end, output.into(), &summary.usage))
}
