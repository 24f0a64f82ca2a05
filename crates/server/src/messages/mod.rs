//! `POST /v1/messages` and `/v1/messages/count_tokens` (`api.md` section 7).

mod read;

pub(crate) use read::read;

use crate::error::{ApiError, Dialect};
use crate::http::Answering;
use crate::reply::{Ending, Piece, Reply, Summary, Usage};
use crate::stream::{Encoder, comment, event};
use serde_json::{Value, json};

fn usage(u: &Usage) -> Value {
    json!({
        "input_tokens": u.prompt - u.cached, "cache_read_input_tokens": u.cached, "cache_creation_input_tokens": 0,
        "output_tokens": u.generated, "output_tokens_details": {"thinking_tokens": u.reasoning},
    })
}

/// Why it ended, and the stop string that ended it.
fn stop_reason(end: &Ending) -> (&'static str, Option<&str>) {
    match end {
        Ending::Turn => ("end_turn", None),
        Ending::Calls => ("tool_use", None),
        Ending::StopString(text) => ("stop_sequence", Some(text)),
        Ending::Length => ("max_tokens", None),
    }
}

fn message(id: &str, model: &str, content: Value, end: Option<&Ending>, usage: Value) -> Value {
    let (reason, stop) = end.map(stop_reason).map_or((None, None), |(r, s)| (Some(r), s));
    json!({
        "id": id, "type": "message", "role": "assistant", "model": model, "content": content,
        "stop_reason": reason, "stop_sequence": stop, "usage": usage,
    })
}

/// The answer as one object.
pub(crate) async fn whole(a: Answering) -> Result<Value, ApiError> {
    let Answering { mut reply, model, id, .. } = a;
    let (summary, _) = reply.whole().await?;
    let answer = &reply.answer;
    let mut content = Vec::new();
    if !answer.reasoning.is_empty() {
        content.push(json!({"type": "thinking", "thinking": answer.reasoning, "signature": id}));
    }
    if !answer.content.is_empty() || answer.calls.is_empty() {
        content.push(json!({"type": "text", "text": answer.content}));
    }
    for (i, call) in answer.calls.iter().enumerate() {
        // The parser makes sure that arguments are an object.
        let input: Value = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
        content.push(json!({"type": "tool_use", "id": reply.call_id(i), "name": call.name, "input": input}));
    }
    let usage = usage(&summary.usage);
    Ok(message(&id, &model, content.into(), Some(&summary.end), usage))
}

/// The block that is open in a stream.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Open {
    Nothing,
    Thinking,
    Text,
    Call,
}

/// The answer as events.
pub(crate) struct Events {
    id: String,
    model: String,
    request: String,
    started: bool,
    open: Open,
    /// Blocks so far.
    blocks: usize,
}

impl Events {
    pub(crate) fn new(a: &Answering) -> Self {
        Events {
            id: a.id.clone(),
            model: a.model.clone(),
            request: a.request.clone(),
            started: false,
            open: Open::Nothing,
            blocks: 0,
        }
    }

    fn start(&mut self, usage_so_far: &Usage) -> String {
        self.started = true;
        let message = message(&self.id, &self.model, json!([]), None, usage(usage_so_far));
        event("message_start", &json!({"type": "message_start", "message": message}))
    }

    fn delta(&self, delta: Value) -> String {
        let index = self.blocks.saturating_sub(1);
        event("content_block_delta", &json!({"type": "content_block_delta", "index": index, "delta": delta}))
    }

    fn close(&mut self) -> String {
        let mut text = String::new();
        if self.open == Open::Thinking {
            text = self.delta(json!({"type": "signature_delta", "signature": self.id}));
        }
        if self.open != Open::Nothing {
            let index = self.blocks - 1;
            text.push_str(&event(
                "content_block_stop",
                &json!({"type": "content_block_stop", "index": index}),
            ));
        }
        self.open = Open::Nothing;
        text
    }

    /// Opens a block, unless one of its sort is open.
    fn block(&mut self, open: Open, block: Value) -> String {
        if self.open == open && open != Open::Call {
            return String::new();
        }
        let mut text = self.close();
        let start = json!({"type": "content_block_start", "index": self.blocks, "content_block": block});
        text.push_str(&event("content_block_start", &start));
        self.blocks += 1;
        self.open = open;
        text
    }

    fn done(&mut self, summary: &Summary) -> String {
        let mut text = String::new();
        if self.blocks == 0 {
            text = self.block(Open::Text, json!({"type": "text", "text": ""}));
        }
        text.push_str(&self.close());
        let (reason, stop) = stop_reason(&summary.end);
        let delta = json!({"stop_reason": reason, "stop_sequence": stop});
        text.push_str(&event(
            "message_delta",
            &json!({"type": "message_delta", "delta": delta, "usage": usage(&summary.usage)}),
        ));
        text.push_str(&event("message_stop", &json!({"type": "message_stop"})));
        text
    }
}

impl Encoder for Events {
    fn open(&mut self) -> String {
        // The first event tells how much of the prompt was there, which is not known yet.
        comment("waiting")
    }

    fn piece(&mut self, piece: Piece, reply: &Reply) -> String {
        match piece {
            Piece::Started => self.start(&reply.usage()),
            Piece::Progress { .. } => event("ping", &json!({"type": "ping"})),
            Piece::Reasoning(text) => {
                self.block(Open::Thinking, json!({"type": "thinking", "thinking": "", "signature": ""}))
                    + &self.delta(json!({"type": "thinking_delta", "thinking": text}))
            }
            Piece::Content(text, _) if text.is_empty() => String::new(),
            Piece::Content(text, _) => {
                self.block(Open::Text, json!({"type": "text", "text": ""}))
                    + &self.delta(json!({"type": "text_delta", "text": text}))
            }
            Piece::Call { id, name } => {
                self.block(Open::Call, json!({"type": "tool_use", "id": id, "name": name, "input": {}}))
            }
            Piece::Arguments(text) => self.delta(json!({"type": "input_json_delta", "partial_json": text})),
            Piece::CallEnd => self.close(),
            Piece::Done(summary) => self.done(&summary),
            Piece::Failed(error) => event("error", &error.body(Dialect::Anthropic, &self.request)),
        }
    }

    fn beat(&mut self) -> String {
        if self.started { event("ping", &json!({"type": "ping"})) } else { comment("waiting") }
    }
}
