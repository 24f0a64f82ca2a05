//! `POST /v1/completions` (`api.md` section 5): text is continued as it is.

use crate::app::App;
use crate::ask::{Ask, Choice, Format, Input};
use crate::chat::usage;
use crate::error::{ApiError, Dialect};
use crate::http::{Answering, unix_time};
use crate::parts::{model, penalties, stop, wishes};
use crate::read::{Bad, Object, Read, boolean, count, string};
use crate::reply::{Ending, Piece, Reply};
use crate::stream::{Encoder, comment, data};
use ds4_engine::scheduler::TokenLogprobs;
use ds4_text::Thinking;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Most alternatives to a token.
const MOST_LOGPROBS: usize = 20;

/// Reads a request.
pub(crate) fn read(app: &App, body: &Value) -> Result<Ask, ApiError> {
    let body = Object::of(body)?;
    let prompt = body.req("prompt", prompt)?;
    for (key, least) in [("n", 1), ("best_of", 1)] {
        if body.opt(key, count(least))?.is_some_and(|n| n != 1) {
            return Err(Bad::at(key, "must be 1: send several requests for several answers").into());
        }
    }
    if body.opt("suffix", string)?.is_some_and(|s| !s.is_empty()) {
        return Err(Bad::at("suffix", "is not supported: the model only goes on").into());
    }
    let mut sampling = wishes(&body)?.sampling(Thinking::Off)?;
    penalties(&body, &mut sampling)?;
    let logprobs = body.opt("logprobs", |v| match v {
        Value::Bool(true) => Ok(Some(0)),
        Value::Bool(false) => Ok(None),
        _ => count(0)(v).map(Some),
    })?;
    let logprobs = logprobs.flatten();
    if logprobs.is_some_and(|n| n > MOST_LOGPROBS) {
        return Err(Bad::at("logprobs", format!("must be at most {MOST_LOGPROBS}")).into());
    }
    Ok(Ask {
        model: model(app, &body)?,
        input: Input::Raw(prompt),
        tools: Vec::new(),
        choice: Choice::None,
        parallel: true,
        format: Format::Text,
        thinking: Thinking::Off,
        sampling,
        stop: body.opt("stop", stop)?.unwrap_or_default(),
        max_tokens: body.opt("max_tokens", count(1))?,
        logprobs,
        stream: body.opt("stream", boolean)?.unwrap_or(false),
        call_prefix: "",
    })
}

fn prompt(value: &Value) -> Read<String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Array(texts) => match texts.as_slice() {
            [Value::String(text)] => Ok(text.clone()),
            [Value::String(_), ..] => Err(Bad::new("must be one text: send several requests for several")),
            _ => Err(Bad::new("must be a string: tokens are not supported")),
        },
        _ => Err(Bad::new("must be a string")),
    }
}

/// The text that is repeated before the answer.
fn echo(body: &Value) -> &str {
    let text = match &body["prompt"] {
        Value::Array(texts) => texts.first().and_then(Value::as_str),
        other => other.as_str(),
    };
    text.filter(|_| body["echo"].as_bool().unwrap_or(false)).unwrap_or_default()
}

fn logprobs(app: &App, tokens: &[TokenLogprobs], offset: usize) -> Value {
    let text = |token| String::from_utf8_lossy(app.tokenizer.token_bytes(token)).into_owned();
    let mut at = offset;
    let (mut texts, mut values, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for t in tokens {
        let this = text(t.chosen.token);
        offsets.push(at);
        at += this.chars().count();
        texts.push(this);
        values.push(t.chosen.logprob);
        tops.push(t.top.iter().map(|l| (text(l.token), l.logprob.into())).collect::<Map<String, Value>>());
    }
    json!({"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets})
}

fn finish_reason(end: &Ending) -> &'static str {
    if *end == Ending::Length { "length" } else { "stop" }
}

/// The answer as one object.
pub(crate) async fn whole(a: Answering, body: &Value) -> Result<Value, ApiError> {
    let Answering { app, mut reply, model, id, wants_logprobs, .. } = a;
    let (summary, tokens) = reply.whole().await?;
    let before = echo(body);
    let logprobs = if wants_logprobs { logprobs(&app, &tokens, before.chars().count()) } else { Value::Null };
    let choice = json!({
        "index": 0, "text": format!("{before}{}", reply.answer.content), "logprobs": logprobs,
        "finish_reason": finish_reason(&summary.end),
    });
    Ok(json!({
        "id": id, "object": "text_completion", "created": unix_time(), "model": model,
        "system_fingerprint": app.fingerprint(), "choices": [choice],
        "usage": usage(&summary.usage), "timings": summary.timings,
    }))
}

/// The answer in pieces.
pub(crate) struct Pieces {
    app: Arc<App>,
    base: Value,
    echo: String,
    include_usage: bool,
    wants_logprobs: bool,
    /// Characters so far.
    at: usize,
    request: String,
}

impl Pieces {
    pub(crate) fn new(a: &Answering, body: &Value) -> Self {
        let base = json!({
            "id": a.id, "object": "text_completion", "created": unix_time(), "model": a.model,
            "system_fingerprint": a.app.fingerprint(),
        });
        let include_usage = body["stream_options"]["include_usage"].as_bool().unwrap_or(false);
        Pieces {
            app: Arc::clone(&a.app),
            base,
            echo: echo(body).to_owned(),
            include_usage,
            wants_logprobs: a.wants_logprobs,
            at: 0,
            request: a.request.clone(),
        }
    }

    fn text(&mut self, text: &str, tokens: &[TokenLogprobs], finish: Option<&str>) -> Value {
        let logprobs = if self.wants_logprobs { logprobs(&self.app, tokens, self.at) } else { Value::Null };
        self.at += text.chars().count();
        let mut object = self.base.clone();
        object["choices"] =
            json!([{"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish}]);
        object
    }
}

impl Encoder for Pieces {
    fn open(&mut self) -> String {
        let before = std::mem::take(&mut self.echo);
        if before.is_empty() { comment("waiting") } else { data(&self.text(&before, &[], None)) }
    }

    fn piece(&mut self, piece: Piece, _: &Reply) -> String {
        match piece {
            Piece::Progress { done, total } => comment(&format!("prefill {done}/{total}")),
            Piece::Content(text, tokens) => data(&self.text(&text, &tokens, None)),
            Piece::Done(summary) => {
                let mut last = self.text("", &[], Some(finish_reason(&summary.end)));
                let mut text = String::new();
                if self.include_usage {
                    text.push_str(&data(&last));
                    last = self.base.clone();
                    last["choices"] = json!([]);
                    last["usage"] = usage(&summary.usage);
                }
                last["timings"] = summary.timings;
                text.push_str(&data(&last));
                text.push_str("data: [DONE]\n\n");
                text
            }
            Piece::Failed(error) => data(&error.body(Dialect::OpenAi, &self.request)),
            // Raw text has no parts.
            Piece::Started
            | Piece::Reasoning(_)
            | Piece::Call { .. }
            | Piece::Arguments(_)
            | Piece::CallEnd => String::new(),
        }
    }

    fn beat(&mut self) -> String {
        comment("waiting")
    }
}
