//! `POST /v1/chat/completions` (`api.md` section 4).

mod read;

pub(crate) use read::read;

use crate::app::App;
use crate::error::{ApiError, Dialect};
use crate::http::{Answering, unix_time};
use crate::reply::{Ending, Piece, Reply, Summary, Usage, logprobs};
use crate::stream::{Encoder, comment, data};
use ds4_engine::scheduler::TokenLogprobs;
use ds4_text::ToolCall;
use serde_json::{Value, json};
use std::sync::Arc;

/// Tokens as this dialect counts them.
pub(crate) fn usage(u: &Usage) -> Value {
    json!({
        "prompt_tokens": u.prompt, "completion_tokens": u.generated, "total_tokens": u.prompt + u.generated,
        "prompt_tokens_details": {"cached_tokens": u.cached},
        "completion_tokens_details": {"reasoning_tokens": u.reasoning},
        "prompt_cache_hit_tokens": u.cached, "prompt_cache_miss_tokens": u.prompt - u.cached,
    })
}

fn finish_reason(end: &Ending) -> &'static str {
    match end {
        Ending::Turn | Ending::StopString(_) => "stop",
        Ending::Calls => "tool_calls",
        Ending::Length => "length",
    }
}

/// Probabilities of tokens of the content.
fn content_logprobs(app: &App, tokens: &[TokenLogprobs]) -> Value {
    json!({"content": logprobs(app, tokens), "refusal": null})
}

/// The answer as one object.
pub(crate) async fn whole(a: Answering) -> Result<Value, ApiError> {
    let Answering { app, mut reply, model, id, wants_logprobs, .. } = a;
    let (summary, probabilities) = reply.whole().await?;
    let answer = &reply.answer;
    let content = if answer.content.is_empty() && !answer.calls.is_empty() {
        Value::Null
    } else {
        answer.content.clone().into()
    };
    let mut message = json!({"role": "assistant", "content": content, "refusal": null});
    if !answer.reasoning.is_empty() {
        message["reasoning_content"] = answer.reasoning.clone().into();
    }
    if !answer.calls.is_empty() {
        let call = |(i, c): (usize, &ToolCall)| json!({"id": reply.call_id(i), "type": "function", "function": {"name": c.name, "arguments": c.arguments}});
        message["tool_calls"] = answer.calls.iter().enumerate().map(call).collect();
    }
    let logprobs = if wants_logprobs { content_logprobs(&app, &probabilities) } else { Value::Null };
    Ok(json!({
        "id": id, "object": "chat.completion", "created": unix_time(), "model": model,
        "system_fingerprint": app.fingerprint(),
        "choices": [{"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish_reason(&summary.end)}],
        "usage": usage(&summary.usage), "timings": summary.timings,
    }))
}

/// The answer as chunks.
pub(crate) struct Chunks {
    app: Arc<App>,
    base: Value,
    include_usage: bool,
    wants_logprobs: bool,
    calls: usize,
    request: String,
}

impl Chunks {
    pub(crate) fn new(a: &Answering, body: &Value) -> Self {
        let base = json!({
            "id": a.id, "object": "chat.completion.chunk", "created": unix_time(), "model": a.model,
            "system_fingerprint": a.app.fingerprint(),
        });
        let include_usage = body["stream_options"]["include_usage"].as_bool().unwrap_or(false);
        let (app, request) = (Arc::clone(&a.app), a.request.clone());
        Chunks { app, base, include_usage, wants_logprobs: a.wants_logprobs, calls: 0, request }
    }

    fn chunk(&self, choices: Value) -> Value {
        let mut chunk = self.base.clone();
        chunk["choices"] = choices;
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn delta(&self, delta: Value) -> String {
        data(&self.chunk(json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": null}])))
    }

    fn content(&self, text: &str, tokens: &[TokenLogprobs]) -> String {
        let logprobs = if self.wants_logprobs { content_logprobs(&self.app, tokens) } else { Value::Null };
        let choice =
            json!([{"index": 0, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": null}]);
        data(&self.chunk(choice))
    }

    fn call(&self, call: Value) -> String {
        self.delta(json!({"tool_calls": [call]}))
    }

    fn done(&self, summary: &Summary) -> String {
        let choice = json!([{"index": 0, "delta": {}, "logprobs": null, "finish_reason": finish_reason(&summary.end)}]);
        let mut last = self.chunk(choice);
        let mut text = String::new();
        if self.include_usage {
            text.push_str(&data(&last));
            last = self.chunk(json!([]));
            last["usage"] = usage(&summary.usage);
        }
        last["timings"] = summary.timings.clone();
        text.push_str(&data(&last));
        text.push_str("data: [DONE]\n\n");
        text
    }
}

impl Encoder for Chunks {
    fn open(&mut self) -> String {
        self.delta(json!({"role": "assistant", "content": ""}))
    }

    fn piece(&mut self, piece: Piece, _: &Reply) -> String {
        match piece {
            Piece::Started | Piece::CallEnd => String::new(),
            Piece::Progress { done, total } => comment(&format!("prefill {done}/{total}")),
            Piece::Reasoning(text) => self.delta(json!({"reasoning_content": text})),
            Piece::Content(text, tokens) => self.content(&text, &tokens),
            Piece::Call { id, name } => {
                self.calls += 1;
                let function = json!({"name": name, "arguments": ""});
                self.call(
                    json!({"index": self.calls - 1, "id": id, "type": "function", "function": function}),
                )
            }
            Piece::Arguments(text) => {
                self.call(json!({"index": self.calls.saturating_sub(1), "function": {"arguments": text}}))
            }
            Piece::Done(summary) => self.done(&summary),
            Piece::Failed(error) => data(&error.body(Dialect::OpenAi, &self.request)),
        }
    }

    fn beat(&mut self) -> String {
        self.delta(json!({}))
    }
}
