//! `POST /v1/chat/completions` (`api.md` section 4).

use crate::app::App;
use crate::ask::{Ask, Choice, Format, Input, Tool, ToolKind, Wishes, effort, thinking_by_name};
use crate::conversation::Conversation;
use crate::error::{ApiError, Dialect};
use crate::http::{Answering, unix_time};
use crate::read::{Bad, Object, Read, array, boolean, count, list, one_of, string, within};
use crate::reply::{Ending, Piece, Reply, Summary, Usage, logprobs};
use crate::stream::{Encoder, comment, data};
use ds4_engine::scheduler::TokenLogprobs;
use ds4_text::{Assistant, Effort, Json, ResultPart, Thinking, ToolCall, ToolResult};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Most alternatives to a token.
const MOST_LOGPROBS: usize = 20;

/// Reads a request.
pub(crate) fn read(app: &App, body: &Value) -> Result<Ask, ApiError> {
    let body = Object::of(body)?;
    let model = model(app, &body)?;
    let mut conversation = Conversation::default();
    body.req("messages", |v| messages(&mut conversation, v))?;
    let thinking = thinking(app, &body, &model)?;
    refuse(&body)?;
    let max_tokens = body.opt("max_completion_tokens", count(1))?.or(body.opt("max_tokens", count(1))?);
    let mut sampling = wishes(&body)?.sampling(thinking)?;
    penalties(&body, &mut sampling)?;
    let logprobs = match body.opt("logprobs", boolean)? {
        Some(true) => Some(body.opt("top_logprobs", count(0))?.unwrap_or(0)),
        _ if body.opt("top_logprobs", count(0))?.is_some_and(|n| n > 0) => {
            return Err(Bad::at("top_logprobs", "needs logprobs to be true").into());
        }
        _ => None,
    };
    if logprobs.is_some_and(|n| n > MOST_LOGPROBS) {
        return Err(Bad::at("top_logprobs", format!("must be at most {MOST_LOGPROBS}")).into());
    }
    Ok(Ask {
        model,
        input: Input::Conversation(conversation),
        tools: body.opt("tools", list(tool))?.unwrap_or_default(),
        choice: body.opt("tool_choice", choice)?.unwrap_or(Choice::Auto),
        parallel: body.opt("parallel_tool_calls", boolean)?.unwrap_or(true),
        format: body.opt("response_format", format)?.unwrap_or_default(),
        thinking,
        sampling,
        stop: body.opt("stop", stop)?.unwrap_or_default(),
        max_tokens,
        logprobs,
        stream: body.opt("stream", boolean)?.unwrap_or(false),
        call_prefix: "call_",
    })
}

/// The model's name in the request; any will do, because there is only one model.
pub(crate) fn model(app: &App, body: &Object<'_>) -> Read<String> {
    Ok(body.opt("model", string)?.filter(|m| !m.is_empty()).unwrap_or(&app.options.model).to_owned())
}

/// What clients say of sampling, in the words of all dialects.
pub(crate) fn wishes(body: &Object<'_>) -> Read<Wishes> {
    Ok(Wishes {
        temperature: body.opt("temperature", within(0.0, 2.0))?,
        top_p: body.opt("top_p", within(0.0, 1.0))?,
        top_k: body.opt("top_k", |v| if v.as_i64() == Some(-1) { Ok(0) } else { count(0)(v) })?,
        min_p: body.opt("min_p", within(0.0, 1.0))?,
        seed: body.opt("seed", |v| match (v.as_u64(), v.as_i64()) {
            (Some(seed), _) => Ok(seed),
            (None, Some(seed)) => Ok(seed as u64),
            _ => Err(Bad::new("must be a whole number")),
        })?,
    })
}

pub(crate) fn penalties(body: &Object<'_>, sampling: &mut ds4_engine::Sampling) -> Read<()> {
    sampling.presence_penalty = body.opt("presence_penalty", within(-2.0, 2.0))?.unwrap_or(0.0);
    sampling.frequency_penalty = body.opt("frequency_penalty", within(-2.0, 2.0))?.unwrap_or(0.0);
    sampling.repetition_penalty = body.opt("repetition_penalty", within(0.1, 10.0))?.unwrap_or(1.0);
    let bias = body.opt("logit_bias", |v| {
        let each = Object::of(v)?.0.iter().map(|(token, bias)| {
            let id = token.parse::<u32>().map_err(|_| Bad::at(token, "is no number of a token"))?;
            Ok((id, within(-100.0, 100.0)(bias).map_err(|bad| bad.under(token))?))
        });
        each.collect::<Read<Vec<_>>>()
    })?;
    sampling.logit_bias = bias.unwrap_or_default();
    Ok(())
}

/// Strings that end the answer.
pub(crate) fn stop(value: &Value) -> Read<Vec<String>> {
    let texts = match value {
        Value::String(text) => vec![text.clone()],
        other => list(|v| string(v).map(str::to_owned))(other)?,
    };
    if texts.len() > 64 {
        return Err(Bad::new("must be at most 64 strings"));
    }
    match texts.iter().position(String::is_empty) {
        Some(i) => Err(Bad::at(i, "must not be empty")),
        None => Ok(texts),
    }
}

/// What would change the answer's meaning and cannot be had.
fn refuse(body: &Object<'_>) -> Read<()> {
    if body.opt("n", count(1))?.is_some_and(|n| n != 1) {
        return Err(Bad::at("n", "must be 1: send several requests for several answers"));
    }
    for (key, instead) in [("functions", "tools"), ("function_call", "tool_choice"), ("audio", "text")] {
        if body.get(key).is_some() {
            return Err(Bad::at(key, format!("is not supported: use {instead}")));
        }
    }
    let modalities = body.opt("modalities", list(string))?.unwrap_or_default();
    match modalities.iter().position(|m| *m != "text") {
        Some(i) => Err(Bad::at(i, "must be text").under("modalities")),
        None => Ok(()),
    }
}

fn thinking(app: &App, body: &Object<'_>, model: &str) -> Read<Thinking> {
    let level = body.opt("reasoning_effort", |v| effort(app, string(v)?))?;
    let switch = match body
        .opt("thinking", |v| Object::of(v)?.req("type", one_of(&["enabled", "disabled", "adaptive"])))?
    {
        Some(word) => Some(word != "disabled"),
        None => body.opt("think", boolean)?,
    };
    Ok(match (switch, level) {
        (Some(false), _) => Thinking::Off,
        (Some(true), Some(Thinking::On(effort))) => Thinking::On(effort),
        (Some(true), _) => Thinking::On(Effort::High),
        (None, Some(level)) => level,
        (None, None) => thinking_by_name(model, Thinking::On(Effort::High)),
    })
}

fn messages(conversation: &mut Conversation, value: &Value) -> Read<()> {
    let messages = array(value)?;
    if messages.is_empty() {
        return Err(Bad::new("must not be empty"));
    }
    for (i, m) in messages.iter().enumerate() {
        message(conversation, m).map_err(|bad| bad.under(i))?;
    }
    if conversation.ends_with_calls() {
        return Err(Bad::new("must end with the results of the tool calls"));
    }
    Ok(())
}

fn message(conversation: &mut Conversation, value: &Value) -> Read<()> {
    let m = Object::of(value)?;
    let content = |m: &Object<'_>| m.opt("content", text);
    match m.req("role", string)? {
        "system" | "developer" => conversation.system(&content(&m)?.unwrap_or_default()),
        // What others call people and their contexts.
        "user" | "ctx" | "msg" => conversation.user(&m.req("content", text)?),
        "assistant" => {
            let reasoning = m.opt("reasoning_content", string)?.or(m.opt("reasoning", string)?);
            conversation.assistant(Assistant {
                reasoning: reasoning.unwrap_or_default().to_owned(),
                content: content(&m)?.unwrap_or_default(),
                calls: m.opt("tool_calls", list(tool_call))?.unwrap_or_default(),
                open: false,
            });
        }
        "tool" | "function" => {
            let call = m.opt("tool_call_id", string)?.unwrap_or_default().to_owned();
            let parts = m.opt("content", result_parts)?.unwrap_or_default();
            conversation.result(ToolResult { call, parts });
        }
        role => {
            return Err(Bad::at(
                "role",
                format!("{role:?} is none of system, developer, user, assistant, tool"),
            ));
        }
    }
    Ok(())
}

/// Text, or parts that are text.
pub(crate) fn text(value: &Value) -> Read<String> {
    if let Value::String(text) = value {
        return Ok(text.clone());
    }
    let part = |v| {
        let part = Object::of(v)?;
        match part.kind()? {
            "text" | "input_text" | "output_text" | "summary_text" | "reasoning_text" => {
                part.req("text", string)
            }
            "refusal" => part.req("refusal", string),
            kind => Err(Bad::at("type", format!("{kind:?} is not supported: the model reads text only"))),
        }
    };
    match value {
        Value::Array(_) => Ok(list(part)(value)?.join("\n\n")),
        _ => Err(Bad::new("must be a string or an array of parts")),
    }
}

/// What a tool gave: text, or parts of which those that are no text are only mentioned.
pub(crate) fn result_parts(value: &Value) -> Read<Vec<ResultPart>> {
    let part = |v| {
        let part = Object::of(v)?;
        Ok(match part.kind()? {
            "text" | "input_text" | "output_text" => ResultPart::Text(part.req("text", string)?.to_owned()),
            kind => ResultPart::Unsupported(kind.to_owned()),
        })
    };
    match value {
        Value::String(text) => Ok(vec![ResultPart::Text(text.clone())]),
        Value::Array(_) => list(part)(value),
        other => Ok(vec![ResultPart::Text(other.to_string())]),
    }
}

fn tool_call(value: &Value) -> Read<ToolCall> {
    let call = Object::of(value)?;
    let function = |v| {
        let function = Object::of(v)?;
        let arguments = function.opt("arguments", arguments)?.unwrap_or_default();
        Ok((function.req("name", string)?.to_owned(), arguments))
    };
    let (name, arguments) = call.req("function", function)?;
    Ok(ToolCall { id: call.opt("id", string)?.map(str::to_owned), name, arguments })
}

/// Arguments as text, or as the object that they are.
pub(crate) fn arguments(value: &Value) -> Read<String> {
    Ok(match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    })
}

/// A tool, which may also come without the object around it.
fn tool(value: &Value) -> Read<Tool> {
    let tool = Object::of(value)?;
    match tool.get("function") {
        Some(function) => function_tool(function).map_err(|bad| bad.under("function")),
        None if tool.get("name").is_some() => function_tool(value),
        None => Err(Bad::at("function", "is required")),
    }
}

/// A tool that is a function, from the object that has its name.
pub(crate) fn function_tool(value: &Value) -> Read<Tool> {
    let function = Object::of(value)?;
    let name = tool_name(&function)?;
    let schema = function.opt("parameters", |v| Object::of(v).map(|_| v.clone()))?;
    let shown: Map<String, Value> =
        function.0.iter().filter(|(key, _)| *key != "type").map(|(k, v)| (k.clone(), v.clone())).collect();
    Ok(Tool {
        name,
        shown: shown_json(&Value::Object(shown))?,
        schema,
        strict: function.opt("strict", boolean)?.unwrap_or(false),
        deferred: function.opt("defer_loading", boolean)?.unwrap_or(false),
        kind: ToolKind::Function,
    })
}

pub(crate) fn tool_name(tool: &Object<'_>) -> Read<String> {
    let name = tool.req("name", string)?;
    if name.is_empty() || name.len() > 256 || name.contains(['"', '\n', '<', '>']) {
        return Err(Bad::at(
            "name",
            "must be 1 to 256 characters without quotes, angle brackets and line ends",
        ));
    }
    Ok(name.to_owned())
}

/// A tool's description as the model reads it.
pub(crate) fn shown_json(value: &Value) -> Read<Json> {
    Json::parse(&value.to_string()).map_err(|e| Bad::new(e.to_string()))
}

fn choice(value: &Value) -> Read<Choice> {
    if let Value::String(word) = value {
        return match word.as_str() {
            "auto" => Ok(Choice::Auto),
            "none" => Ok(Choice::None),
            "required" | "any" => Ok(Choice::Required),
            _ => Err(Bad::new(format!("must be auto, none, required or a function, is {word:?}"))),
        };
    }
    let choice = Object::of(value)?;
    let name = |o: &Object<'_>| Ok(o.req("name", string)?.to_owned());
    match choice.kind()? {
        "function" => Ok(Choice::Named(match choice.get("function") {
            Some(function) => {
                Object::of(function).and_then(|f| name(&f)).map_err(|bad| bad.under("function"))?
            }
            None => name(&choice)?,
        })),
        "custom" => Ok(Choice::Named(name(&choice)?)),
        "allowed_tools" => {
            let inner = choice.opt("allowed_tools", Object::of)?.unwrap_or(choice);
            let names = |v| {
                let tool = Object::of(v)?;
                match tool.get("function") {
                    Some(function) => name(&Object::of(function)?),
                    None => name(&tool),
                }
            };
            let must = inner.opt("mode", one_of(&["auto", "required"]))? == Some("required");
            Ok(Choice::Among(inner.req("tools", list(names))?, must))
        }
        kind => Err(Bad::at("type", format!("{kind:?} is not supported"))),
    }
}

fn format(value: &Value) -> Read<Format> {
    let format = Object::of(value)?;
    match format.kind()? {
        "text" => Ok(Format::Text),
        "json_object" => Ok(Format::JsonObject),
        "json_schema" => format.req("json_schema", |v| {
            Object::of(v)?.req("schema", |schema| Object::of(schema).map(|_| Format::Schema(schema.clone())))
        }),
        kind => Err(Bad::at("type", format!("must be text, json_object or json_schema, is {kind:?}"))),
    }
}

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
