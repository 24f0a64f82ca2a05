//! Answers as server-sent events.

use crate::reply::{Piece, Reply};
use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, Response, header};
use futures_util::stream::unfold;
use serde_json::Value;
use std::convert::Infallible;
use std::time::{Duration, Instant};

/// Time without an event after which one is sent, so that nobody thinks that the connection is dead. Comments are no events:
/// some clients do not count them.
const BEAT: Duration = Duration::from_secs(5);

/// How a dialect writes an answer.
pub(crate) trait Encoder: Send + 'static {
    /// What is sent at once, before anything is known.
    fn open(&mut self) -> String;
    /// What a piece becomes. The last one closes the stream.
    fn piece(&mut self, piece: Piece, reply: &Reply) -> String;
    /// An event that says nothing.
    fn beat(&mut self) -> String;
}

/// An event without a name.
pub(crate) fn data(body: &Value) -> String {
    format!("data: {body}\n\n")
}

/// An event with a name.
pub(crate) fn event(name: &str, body: &Value) -> String {
    format!("event: {name}\ndata: {body}\n\n")
}

/// A line that clients ignore.
pub(crate) fn comment(text: &str) -> String {
    format!(": {text}\n\n")
}

struct State<E> {
    reply: Reply,
    encoder: E,
    opened: bool,
    over: bool,
    /// When the last event was sent.
    event: Instant,
}

/// The answer to a request, event by event. When the client goes away, the reply is dropped, which cancels it.
pub(crate) fn stream(reply: Reply, encoder: impl Encoder) -> Response<Body> {
    let state = State { reply, encoder, opened: false, over: false, event: Instant::now() };
    let events = unfold(state, |mut state| async move {
        let text = state.next().await?;
        Some((Ok::<_, Infallible>(Bytes::from(text)), state))
    });
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that gather answers would hold the events back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

impl<E: Encoder> State<E> {
    /// The next events; never empty.
    async fn next(&mut self) -> Option<String> {
        if !std::mem::replace(&mut self.opened, true) {
            let text = self.encoder.open();
            if !text.is_empty() {
                return Some(text);
            }
        }
        let mut text = String::new();
        while text.is_empty() {
            if self.over {
                return None;
            }
            match tokio::time::timeout(BEAT, self.reply.next()).await {
                Err(_) => text.push_str(&self.encoder.beat()),
                Ok(None) => return None,
                Ok(Some(piece)) => self.add(piece, &mut text),
            }
            while let Some(piece) = self.reply.next_now() {
                self.add(piece, &mut text);
            }
        }
        if text.contains("data: ") {
            self.event = Instant::now();
        } else if self.event.elapsed() > BEAT {
            text.push_str(&self.encoder.beat());
            self.event = Instant::now();
        }
        Some(text)
    }

    fn add(&mut self, piece: Piece, text: &mut String) {
        let is_last = matches!(piece, Piece::Done(_) | Piece::Failed(_));
        text.push_str(&self.encoder.piece(piece, &self.reply));
        self.over |= is_last;
    }
}
