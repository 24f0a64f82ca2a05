//! A response as events.

use super::{Form, custom_input, output_text};
use crate::app::App;
use crate::error::Dialect;
use crate::http::Answering;
use crate::reply::{Piece, Reply, logprobs};
use crate::stream::{Encoder, comment, event};
use ds4_engine::scheduler::TokenLogprobs;
use serde_json::{Value, json};
use std::sync::Arc;

/// The item that is open.
enum Open {
    Nothing,
    Reasoning(String),
    Message(String, Vec<TokenLogprobs>),
    Call { id: String, name: String, arguments: String },
}

/// Writes the events of a response.
pub(crate) struct Events {
    app: Arc<App>,
    form: Form,
    wants_logprobs: bool,
    number: u64,
    open: Open,
    /// Items that are done.
    output: Vec<Value>,
    request: String,
}

impl Events {
    pub(crate) fn new(a: &Answering, request: Value) -> Self {
        Events {
            app: Arc::clone(&a.app),
            form: Form::new(a, request),
            wants_logprobs: a.wants_logprobs,
            number: 0,
            open: Open::Nothing,
            output: Vec::new(),
            request: a.request.clone(),
        }
    }

    fn event(&mut self, kind: &str, mut body: Value) -> String {
        let name = format!("response.{kind}");
        body["type"] = name.clone().into();
        body["sequence_number"] = self.number.into();
        self.number += 1;
        event(&name, &body)
    }

    /// An event of the open item.
    fn item_event(&mut self, kind: &str, prefix: &str, mut body: Value) -> String {
        body["item_id"] = self.form.item_id(prefix, self.output.len()).into();
        body["output_index"] = self.output.len().into();
        self.event(kind, body)
    }

    fn in_progress(&mut self) -> String {
        let response = self.form.response("in_progress", json!([]), Value::Null);
        self.event("in_progress", json!({"response": response}))
    }

    fn added(&mut self, item: Value) -> String {
        let index = self.output.len();
        self.event("output_item.added", json!({"output_index": index, "item": item}))
    }

    fn item_done(&mut self, item: Value) -> String {
        let index = self.output.len();
        let text = self.event("output_item.done", json!({"output_index": index, "item": item}));
        self.output.push(item);
        text
    }

    fn reasoning(&mut self, more: &str) -> String {
        let mut text = String::new();
        if !matches!(self.open, Open::Reasoning(_)) {
            text = self.close("completed");
            self.open = Open::Reasoning(String::new());
            let item = self.form.reasoning(self.output.len(), "", "in_progress");
            text.push_str(&self.added(item));
            text.push_str(&if self.form.summary {
                let part = json!({"type": "summary_text", "text": ""});
                self.item_event(
                    "reasoning_summary_part.added",
                    "rs",
                    json!({"summary_index": 0, "part": part}),
                )
            } else {
                let part = json!({"type": "reasoning_text", "text": ""});
                self.item_event("content_part.added", "rs", json!({"content_index": 0, "part": part}))
            });
        }
        if let Open::Reasoning(all) = &mut self.open {
            all.push_str(more);
        }
        text + &if self.form.summary {
            self.item_event("reasoning_summary_text.delta", "rs", json!({"summary_index": 0, "delta": more}))
        } else {
            self.item_event("reasoning_text.delta", "rs", json!({"content_index": 0, "delta": more}))
        }
    }

    fn content(&mut self, more: &str, tokens: Vec<TokenLogprobs>) -> String {
        let mut text = String::new();
        if !matches!(self.open, Open::Message(..)) {
            if more.is_empty() {
                return text;
            }
            text = self.close("completed");
            self.open = Open::Message(String::new(), Vec::new());
            let item = self.form.message(self.output.len(), json!([]), "in_progress");
            text.push_str(&self.added(item));
            let part = output_text("", json!([]));
            text.push_str(&self.item_event(
                "content_part.added",
                "msg",
                json!({"content_index": 0, "part": part}),
            ));
        }
        let probabilities = if self.wants_logprobs { logprobs(&self.app, &tokens) } else { json!([]) };
        if let Open::Message(all, all_tokens) = &mut self.open {
            all.push_str(more);
            all_tokens.extend(tokens);
        }
        let delta = json!({"content_index": 0, "delta": more, "logprobs": probabilities});
        text + &self.item_event("output_text.delta", "msg", delta)
    }

    fn call(&mut self, id: String, name: String) -> String {
        let mut text = self.close("completed");
        let item = self.form.call(self.output.len(), &id, &name, "", "in_progress");
        text.push_str(&self.added(item));
        self.open = Open::Call { id, name, arguments: String::new() };
        text
    }

    fn arguments(&mut self, more: &str) -> String {
        let Open::Call { name, arguments, .. } = &mut self.open else { return String::new() };
        arguments.push_str(more);
        if self.form.is_custom(name) {
            // The input is inside the arguments: it follows when they are whole.
            return String::new();
        }
        self.item_event("function_call_arguments.delta", "fc", json!({"delta": more}))
    }

    /// Ends the open item.
    fn close(&mut self, status: &str) -> String {
        match std::mem::replace(&mut self.open, Open::Nothing) {
            Open::Nothing => String::new(),
            Open::Reasoning(all) => {
                let mut text = if self.form.summary {
                    let part = json!({"type": "summary_text", "text": all});
                    self.item_event(
                        "reasoning_summary_text.done",
                        "rs",
                        json!({"summary_index": 0, "text": all}),
                    ) + &self.item_event(
                        "reasoning_summary_part.done",
                        "rs",
                        json!({"summary_index": 0, "part": part}),
                    )
                } else {
                    let part = json!({"type": "reasoning_text", "text": all});
                    self.item_event("reasoning_text.done", "rs", json!({"content_index": 0, "text": all}))
                        + &self.item_event(
                            "content_part.done",
                            "rs",
                            json!({"content_index": 0, "part": part}),
                        )
                };
                let item = self.form.reasoning(self.output.len(), &all, status);
                text.push_str(&self.item_done(item));
                text
            }
            Open::Message(all, tokens) => {
                let probabilities =
                    if self.wants_logprobs { logprobs(&self.app, &tokens) } else { json!([]) };
                let part = output_text(&all, probabilities.clone());
                let done = json!({"content_index": 0, "text": all, "logprobs": probabilities});
                let mut text = self.item_event("output_text.done", "msg", done);
                text.push_str(&self.item_event(
                    "content_part.done",
                    "msg",
                    json!({"content_index": 0, "part": part}),
                ));
                let item = self.form.message(self.output.len(), json!([part]), status);
                text.push_str(&self.item_done(item));
                text
            }
            Open::Call { id, name, arguments } => {
                let mut text = if self.form.is_custom(&name) {
                    let input = custom_input(&arguments);
                    self.item_event("custom_tool_call_input.delta", "ctc", json!({"delta": input}))
                        + &self.item_event("custom_tool_call_input.done", "ctc", json!({"input": input}))
                } else {
                    let item = self.form.call(0, &id, &name, &arguments, "completed");
                    let done = json!({"name": item["name"], "arguments": arguments});
                    self.item_event("function_call_arguments.done", "fc", done)
                };
                let item = self.form.call(self.output.len(), &id, &name, &arguments, "completed");
                text.push_str(&self.item_done(item));
                text
            }
        }
    }
}

impl Encoder for Events {
    fn open(&mut self) -> String {
        let response = self.form.response("in_progress", json!([]), Value::Null);
        self.event("created", json!({"response": response})) + &self.in_progress()
    }

    fn piece(&mut self, piece: Piece, _: &Reply) -> String {
        match piece {
            Piece::Started => String::new(),
            Piece::Progress { done, total } => comment(&format!("prefill {done}/{total}")),
            Piece::Reasoning(text) => self.reasoning(&text),
            Piece::Content(text, tokens) => self.content(&text, tokens),
            Piece::Call { id, name } => self.call(id, name),
            Piece::Arguments(text) => self.arguments(&text),
            Piece::CallEnd => self.close("completed"),
            Piece::Done(summary) => {
                let is_cut = summary.end == crate::reply::Ending::Length;
                let (status, kind) =
                    if is_cut { ("incomplete", "incomplete") } else { ("completed", "completed") };
                let mut text = self.close(status);
                self.form.remember(&self.app, &self.output);
                let response = self.form.over(&summary.end, self.output.clone().into(), &summary.usage);
                text.push_str(&self.event(kind, json!({"response": response})));
                text
            }
            Piece::Failed(error) => {
                let mut text = self.close("incomplete");
                tracing::warn!(request = %self.request, "{}", error.text(Dialect::OpenAi));
                let response = self.form.failed(&error, self.output.clone().into());
                text.push_str(&self.event("failed", json!({"response": response})));
                text
            }
        }
    }

    fn beat(&mut self) -> String {
        // Comments do not count for some clients.
        self.in_progress()
    }
}
