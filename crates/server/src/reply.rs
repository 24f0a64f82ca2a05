//! An answer as it comes from the scheduler, for all dialects.

use crate::app::App;
use crate::ask::{CallIds, Prepared};
use crate::error::{ApiError, Kind};
use crate::http::unix_time;
use ds4_engine::scheduler::{Done, TokenLogprobs, Update};
use ds4_engine::{Finish, Logprob};
use ds4_text::{Answer, Delta};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Receiver;

/// Tokens that an answer must have left when a call begins, for the client to see its arguments while they come: a call that
/// is cut off was never made, and what has been sent cannot be taken back.
const ROOM_FOR_CALL: usize = 1024;

/// A piece of an answer.
#[derive(Clone, Debug)]
pub(crate) enum Piece {
    /// Work on it has begun; this much of the prompt was there.
    Started,
    /// Tokens of the prompt that are computed, of those that have to be.
    Progress {
        done: usize,
        total: usize,
    },
    Reasoning(String),
    Content(String, Vec<TokenLogprobs>),
    /// A call begins.
    Call {
        id: String,
        name: String,
    },
    Arguments(String),
    CallEnd,
    /// The end.
    Done(Summary),
    /// The end, by a fault.
    Failed(ApiError),
}

/// What there is to say about an answer.
#[derive(Clone, Debug)]
pub(crate) struct Summary {
    pub(crate) end: Ending,
    pub(crate) usage: Usage,
    pub(crate) timings: Value,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    Turn,
    Calls,
    StopString(String),
    Length,
}

/// Tokens.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) prompt: usize,
    pub(crate) cached: usize,
    pub(crate) generated: usize,
    pub(crate) reasoning: usize,
}

/// Probabilities at tokens, as the OpenAI dialects write them.
pub(crate) fn logprobs(app: &App, tokens: &[TokenLogprobs]) -> Value {
    let one = |l: &Logprob| {
        let bytes = app.tokenizer.token_bytes(l.token);
        // JSON has no infinities.
        json!({"token": String::from_utf8_lossy(bytes), "logprob": l.logprob.max(-9999.0), "bytes": bytes})
    };
    let each = tokens.iter().map(|t| {
        let mut entry = one(&t.chosen);
        entry["top_logprobs"] = t.top.iter().map(one).collect();
        entry
    });
    each.collect()
}

/// An answer on its way.
pub(crate) struct Reply {
    app: Arc<App>,
    updates: Receiver<Update>,
    ids: CallIds,
    max_tokens: usize,
    ready: VecDeque<Piece>,
    /// Pieces of a call that may yet be cut off.
    held: Option<Vec<Piece>>,
    calls: usize,
    usage: Usage,
    begun: Instant,
    first: Option<Instant>,
    ended: bool,
    /// The client sees pieces as they come.
    stream: bool,
    /// The request's name.
    request: String,
    /// The request's body and prompt, where they are traced.
    trace: Option<(Value, String)>,
    pub(crate) answer: Answer,
}

impl Reply {
    /// Hands over a job.
    pub(crate) fn start(app: &Arc<App>, prepared: Prepared) -> Result<Self, ApiError> {
        let Prepared { job, ids, prompt_tokens, max_tokens, stream } = prepared;
        if !app.is_ready() {
            return Err(ApiError::new(Kind::Unavailable, "Loading model"));
        }
        if app.is_stopping() {
            return Err(ApiError::new(Kind::Unavailable, "shutting down"));
        }
        let updates = app.scheduler.submit(job)?;
        app.metrics.prompt_tokens.inc_by(prompt_tokens as u64);
        Ok(Reply {
            app: Arc::clone(app),
            updates,
            ids,
            max_tokens,
            ready: VecDeque::new(),
            held: None,
            calls: 0,
            usage: Usage { prompt: prompt_tokens, ..Usage::default() },
            begun: Instant::now(),
            first: None,
            ended: false,
            stream,
            request: String::new(),
            trace: None,
            answer: Answer::default(),
        })
    }

    /// What logs and traces say of the request.
    pub(crate) fn observe_by(&mut self, request: &str, trace: Option<(Value, String)>) {
        request.clone_into(&mut self.request);
        self.trace = trace;
    }

    /// The next piece; `None` behind the last.
    pub(crate) async fn next(&mut self) -> Option<Piece> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                self.ended |= matches!(piece, Piece::Done(_) | Piece::Failed(_));
                return Some(piece);
            }
            if self.ended {
                return None;
            }
            match self.updates.recv().await {
                Some(update) => self.take(update),
                None => {
                    self.ready
                        .push_back(Piece::Failed(ApiError::new(Kind::Inside, "the engine has stopped")));
                }
            }
        }
    }

    /// A piece that is there already.
    pub(crate) fn next_now(&mut self) -> Option<Piece> {
        while self.ready.is_empty() && !self.ended {
            let update = self.updates.try_recv().ok()?;
            self.take(update);
        }
        let piece = self.ready.pop_front()?;
        self.ended |= matches!(piece, Piece::Done(_) | Piece::Failed(_));
        Some(piece)
    }

    /// The whole answer.
    pub(crate) async fn whole(&mut self) -> Result<(Summary, Vec<TokenLogprobs>), ApiError> {
        let mut logprobs = Vec::new();
        loop {
            match self.next().await {
                Some(Piece::Content(_, more)) => logprobs.extend(more),
                Some(Piece::Done(summary)) => return Ok((summary, logprobs)),
                Some(Piece::Failed(error)) => return Err(error),
                Some(_) => {}
                None => return Err(ApiError::new(Kind::Inside, "the engine has stopped")),
            }
        }
    }

    /// The name of the n-th call.
    pub(crate) fn call_id(&self, n: usize) -> String {
        self.ids.nth(n)
    }

    pub(crate) fn usage(&self) -> Usage {
        self.usage
    }

    fn take(&mut self, update: Update) {
        match update {
            Update::Started(synced) => {
                self.usage.cached = synced.reused().min(self.usage.prompt);
                self.app.metrics.cached_tokens.inc_by(self.usage.cached as u64);
                tracing::info!(
                    request = %self.request, prompt = self.usage.prompt, live = synced.live, kept = synced.kept,
                    disk = synced.disk, computed = synced.computed, differs_at = ?synced.differs_at,
                    missing = ?synced.missing, "prompt"
                );
                self.ready.push_back(Piece::Started);
            }
            Update::Prefill { done, total } => self.ready.push_back(Piece::Progress { done, total }),
            Update::Answer { deltas, logprobs, generated } => {
                self.first.get_or_insert_with(Instant::now);
                self.deltas(deltas, logprobs, generated);
            }
            Update::Done(done) => self.done(done),
            Update::Failed(failure) => self.ready.push_back(Piece::Failed(failure.into())),
        }
    }

    fn deltas(&mut self, deltas: Vec<Delta>, mut logprobs: Vec<TokenLogprobs>, generated: usize) {
        for delta in deltas {
            self.answer.apply(&delta);
            let piece = match delta {
                Delta::Reasoning(text) => Piece::Reasoning(text),
                Delta::Content(text) => Piece::Content(text, std::mem::take(&mut logprobs)),
                Delta::Call { name } => {
                    if !self.stream || self.max_tokens.saturating_sub(generated) < ROOM_FOR_CALL {
                        self.held = Some(Vec::new());
                    }
                    self.calls += 1;
                    Piece::Call { id: self.ids.nth(self.calls - 1), name }
                }
                Delta::Arguments(text) => Piece::Arguments(text),
                Delta::CallEnd => {
                    self.ready.extend(self.held.take().into_iter().flatten());
                    Piece::CallEnd
                }
                Delta::CallDropped => {
                    self.calls -= 1;
                    if self.held.take().is_none() {
                        let message = "the model's tool call was broken off";
                        self.ready.push_back(Piece::Failed(ApiError::new(Kind::Inside, message)));
                    }
                    continue;
                }
                // Nothing is generated behind the calls.
                Delta::Trailing(_) => continue,
            };
            match &mut self.held {
                Some(held) => held.push(piece),
                None => self.ready.push_back(piece),
            }
        }
        if !logprobs.is_empty() {
            self.ready.push_back(Piece::Content(String::new(), logprobs));
        }
    }

    fn done(&mut self, done: Done) {
        self.usage.generated = done.generated;
        self.usage.reasoning = done.reasoning;
        let end = match (&done.finish, done.stop) {
            (_, Some(stop)) => Ending::StopString(stop),
            _ if !self.answer.calls.is_empty() => Ending::Calls,
            (Finish::Length | Finish::ContextFull, _) => Ending::Length,
            (Finish::EndOfSentence | Finish::Repetition, _) => Ending::Turn,
        };
        if let Some(flaw) = done.flaw {
            tracing::info!(request = %self.request, %flaw, "the answer is not as the model was trained to write it");
        }
        let t = done.timings;
        let computed = self.usage.prompt - self.usage.cached;
        self.observe(done.generated, computed, t.prefill, t.decode);
        let ms = |d: Duration| (d.as_secs_f64() * 1e6).round() / 1e3;
        let rate = |n: usize, d: Duration| {
            if d.is_zero() { 0.0 } else { (n as f64 / d.as_secs_f64() * 100.0).round() / 100.0 }
        };
        let timings = json!({
            "queued_ms": ms(t.queued),
            "cache_n": self.usage.cached, "prompt_n": computed,
            "prompt_ms": ms(t.prefill), "prompt_per_second": rate(computed, t.prefill),
            "predicted_n": done.generated, "predicted_ms": ms(t.decode),
            "predicted_per_second": rate(done.generated, t.decode),
        });
        tracing::info!(
            request = %self.request, finish = ?done.finish, generated = done.generated, reasoning = done.reasoning,
            calls = self.answer.calls.len(), %timings, "answer"
        );
        self.write_trace(&timings);
        self.ready.push_back(Piece::Done(Summary { end, usage: self.usage, timings }));
    }

    fn write_trace(&mut self, timings: &Value) {
        let (Some(trace), Some((body, prompt))) = (&self.app.trace, self.trace.take()) else { return };
        let answer = &self.answer;
        let calls: Vec<Value> =
            answer.calls.iter().map(|c| json!({"name": c.name, "arguments": c.arguments})).collect();
        trace.write(&json!({
            "time": unix_time(), "request": self.request, "body": body, "prompt": prompt,
            "reasoning": answer.reasoning, "content": answer.content, "calls": calls, "timings": timings,
        }));
    }

    fn observe(&self, generated: usize, computed: usize, prefill: Duration, decode: Duration) {
        let metrics = &self.app.metrics;
        metrics.generated_tokens.inc_by(generated as u64);
        if let Some(first) = self.first {
            metrics.first_token.observe(first.duration_since(self.begun).as_secs_f64());
        }
        if generated > 1 {
            metrics.between_tokens.observe(decode.as_secs_f64() / (generated - 1) as f64);
        }
        if computed > 0 && !prefill.is_zero() {
            metrics.prefill_rate.observe(computed as f64 / prefill.as_secs_f64());
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.ended {
            self.app.metrics.cancelled.inc();
        }
    }
}
