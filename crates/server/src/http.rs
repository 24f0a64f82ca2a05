//! Paths, and what is the same for all of them: limits, keys, names of requests, errors, figures.

use crate::app::App;
use crate::ask::{Ask, Prepared, ToolKind, random};
use crate::error::{ApiError, Dialect, Kind, json_response};
use crate::reply::Reply;
use crate::stream::stream;
use crate::{chat, completions, messages, models, responses};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, MatchedPath, Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::routing::{get, post};
use futures_util::StreamExt;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use subtle::ConstantTimeEq;

/// Longest body.
const MOST_BODY: usize = 64 << 20;
/// Time in which a body must have come.
const BODY_TIME: Duration = Duration::from_secs(120);

/// A request that is being answered.
pub(crate) struct Answering {
    pub(crate) app: Arc<App>,
    pub(crate) reply: Reply,
    pub(crate) model: String,
    /// The answer's name.
    pub(crate) id: String,
    /// The request's.
    pub(crate) request: String,
    pub(crate) wants_logprobs: bool,
    /// How tools are called, by the names that the model sees.
    pub(crate) kinds: HashMap<String, ToolKind>,
}

/// Where answers are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Endpoint {
    Chat,
    Completions,
    Responses,
    Messages,
}

impl Endpoint {
    fn dialect(self) -> Dialect {
        if self == Endpoint::Messages { Dialect::Anthropic } else { Dialect::OpenAi }
    }

    fn id_prefix(self) -> &'static str {
        match self {
            Endpoint::Chat => "chatcmpl-",
            Endpoint::Completions => "cmpl-",
            Endpoint::Responses => "resp_",
            Endpoint::Messages => "msg_",
        }
    }

    fn read(self, app: &App, body: &Value) -> Result<Ask, ApiError> {
        match self {
            Endpoint::Chat => chat::read(app, body),
            Endpoint::Completions => completions::read(app, body),
            Endpoint::Responses => responses::read(app, body),
            Endpoint::Messages => messages::read(app, body, false),
        }
    }
}

/// The name of a request, in the headers of its answer.
#[derive(Clone)]
struct RequestId(String);

/// Seconds since 1970.
pub(crate) fn unix_time() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// All paths.
pub(crate) fn router(app: Arc<App>) -> Router {
    let answering = |endpoint: Endpoint| {
        post(move |State(app): State<Arc<App>>, request: Request| generate(app, endpoint, request))
    };
    Router::new()
        .route("/", get(page))
        .route("/health", get(health))
        .route("/v1/health", get(health))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(openapi))
        .route("/v1/models", get(list_models))
        .route("/v1/models/{id}", get(find_model))
        .route("/v1/chat/completions", answering(Endpoint::Chat))
        .route("/v1/completions", answering(Endpoint::Completions))
        .route("/v1/responses", answering(Endpoint::Responses))
        .route("/v1/messages", answering(Endpoint::Messages))
        .route("/v1/responses/input_tokens", post(count_input))
        .route("/v1/messages/count_tokens", post(count_messages))
        .method_not_allowed_fallback(wrong_method)
        .fallback(unknown_path)
        .layer(DefaultBodyLimit::disable())
        .layer(from_fn_with_state(Arc::clone(&app), around))
        .with_state(app)
}

/// Whose clients speak: by the path, else by a header that only one sort sends.
fn dialect(path: &str, headers: &HeaderMap) -> Dialect {
    if path.starts_with("/v1/messages") || headers.contains_key("anthropic-version") {
        Dialect::Anthropic
    } else {
        Dialect::OpenAi
    }
}

/// What happens to every request.
async fn around(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response<Body> {
    let begun = Instant::now();
    let id = format!("req_{:032x}", random().unwrap_or_default());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let endpoint = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let dialect = dialect(&path, request.headers());
    let origin = request.headers().contains_key(header::ORIGIN);
    let asked = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    request.extensions_mut().insert(RequestId(id.clone()));
    let is_open = matches!(endpoint.as_str(), "/" | "/health" | "/v1/health" | "/openapi.json");
    let mut response = if method == Method::OPTIONS {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::NO_CONTENT;
        response
    } else if !is_open && !has_key(&app, request.headers()) {
        ApiError::new(Kind::Key, "the API key is missing or wrong").response(dialect, &id)
    } else {
        next.run(request).await
    };
    let status = response.status().as_u16();
    app.metrics.answered(&endpoint, status);
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&id) {
        headers.insert("x-request-id", value.clone());
        headers.insert("request-id", value);
    }
    if app.options.cors && origin {
        cross_origin(headers, asked);
    }
    let ms = begun.elapsed().as_millis() as u64;
    tracing::info!(request = %id, %method, path, status, ms, "request");
    response
}

fn cross_origin(headers: &mut HeaderMap, asked: Option<HeaderValue>) {
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, OPTIONS"));
    // A star would not stand for the header with the key.
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        asked.unwrap_or(HeaderValue::from_static("authorization, content-type")),
    );
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("x-request-id"));
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("86400"));
}

/// Whether a request brings a key, in either dialect's header.
fn has_key(app: &App, headers: &HeaderMap) -> bool {
    if app.options.keys.is_empty() {
        return true;
    }
    let bearer = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()).and_then(|v| {
        let (scheme, key) = v.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
    });
    let named = headers.get("x-api-key").and_then(|v| v.to_str().ok());
    let is_ours = |given: &str| {
        // All are compared, each in the same time whatever it is.
        app.options
            .keys
            .iter()
            .fold(false, |found, key| found | bool::from(key.as_bytes().ct_eq(given.as_bytes())))
    };
    bearer.is_some_and(is_ours) || named.is_some_and(is_ours)
}

async fn page() -> Response<Body> {
    let mut response = Response::new(Body::from(include_str!("page.html")));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
        img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    response
}

async fn health(State(app): State<Arc<App>>) -> Response<Body> {
    if app.is_ready() && !app.is_stopping() {
        return json_response(&json!({"status": "ok"}));
    }
    let message = if app.is_stopping() { "Shutting down" } else { "Loading model" };
    let error = json!({"code": 503, "message": message, "type": "unavailable_error"});
    let mut response = json_response(&json!({"error": error}));
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    response
}

async fn metrics(State(app): State<Arc<App>>) -> Response<Body> {
    let m = &app.metrics;
    m.running.set(app.scheduler.running() as i64);
    m.queued.set(app.scheduler.queued() as i64);
    m.live_tokens.set(app.scheduler.live_tokens() as i64);
    let mut response = Response::new(Body::from(m.text()));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

async fn openapi() -> Response<Body> {
    let mut response = Response::new(Body::from(include_str!("openapi.json")));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

async fn list_models(State(app): State<Arc<App>>) -> Response<Body> {
    json_response(&models::list(&app))
}

async fn find_model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    request: Request,
) -> Response<Body> {
    match models::find(&app, &name) {
        Some(model) => json_response(&model),
        None => {
            let error = ApiError::new(Kind::NotFound, format!("there is no model {name:?}"));
            let error = ApiError { code: Some("model_not_found"), ..error };
            error.response(dialect(request.uri().path(), request.headers()), &request_id(&request))
        }
    }
}

async fn unknown_path(request: Request) -> Response<Body> {
    let path = request.uri().path();
    let error = ApiError::new(Kind::NotFound, format!("there is nothing at {path}"));
    error.response(dialect(path, request.headers()), &request_id(&request))
}

async fn wrong_method(request: Request) -> Response<Body> {
    let (method, path) = (request.method(), request.uri().path());
    let error = ApiError::new(Kind::Method, format!("{path} does not take {method}"));
    error.response(dialect(path, request.headers()), &request_id(&request))
}

fn request_id(request: &Request) -> String {
    request.extensions().get::<RequestId>().map(|id| id.0.clone()).unwrap_or_default()
}

/// Reads a body, and as long as it is in memory, no more than so much of others'.
async fn read_body(app: &App, request: Request) -> Result<Vec<u8>, ApiError> {
    let too_large =
        || ApiError::new(Kind::TooLarge, format!("the body is larger than {} MiB", MOST_BODY >> 20));
    let length =
        request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|n| n > MOST_BODY as u64) {
        return Err(too_large());
    }
    let read = async {
        let mut body = Vec::new();
        let mut chunks = request.into_body().into_data_stream();
        let mut held = Vec::new();
        while let Some(chunk) = chunks.next().await {
            let chunk: Bytes = chunk.map_err(|e| ApiError::invalid(format!("the body ended early: {e}")))?;
            if body.len() + chunk.len() > MOST_BODY {
                return Err(too_large());
            }
            let kib = (chunk.len() >> 10) as u32 + 1;
            let permit = app.bodies.try_acquire_many(kib);
            held.push(
                permit
                    .map_err(|_| ApiError::new(Kind::QueueFull, "too much is being sent at the same time"))?,
            );
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    };
    let late =
        || ApiError::new(Kind::Timeout, format!("the body did not come within {} s", BODY_TIME.as_secs()));
    tokio::time::timeout(BODY_TIME, read).await.map_err(|_| late())?
}

fn parse(body: &[u8]) -> Result<Value, ApiError> {
    // Some editors put a mark of the byte order at the front.
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    let text =
        std::str::from_utf8(body).map_err(|e| ApiError::invalid(format!("the body is no UTF-8: {e}")))?;
    serde_json::from_str(text).map_err(|e| ApiError::invalid(format!("the body is no JSON: {e}")))
}

/// Does what takes time apart from the threads that talk, and not too often at once.
async fn prepare<T: Send + 'static>(
    app: &Arc<App>,
    body: Vec<u8>,
    job: impl FnOnce(&Arc<App>, Value) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let inside = |e: String| ApiError::new(Kind::Inside, e);
    let _permit = app.preparing.acquire().await.map_err(|e| inside(e.to_string()))?;
    let app = Arc::clone(app);
    let done = tokio::task::spawn_blocking(move || job(&app, parse(&body)?)).await;
    done.map_err(|e| inside(e.to_string()))?
}

/// What becomes of a request's body.
struct Made {
    body: Value,
    prepared: Prepared,
    model: String,
    stream: bool,
    kinds: HashMap<String, ToolKind>,
}

fn make(app: &Arc<App>, endpoint: Endpoint, body: Value) -> Result<Made, ApiError> {
    let ask = endpoint.read(app, &body)?;
    let (model, stream) = (ask.model.clone(), ask.stream);
    let kinds = ask.tools.iter().map(|t| (t.name.clone(), t.kind.clone())).collect();
    Ok(Made { prepared: ask.prepare(app)?, body, model, stream, kinds })
}

async fn generate(app: Arc<App>, endpoint: Endpoint, request: Request) -> Response<Body> {
    let id = request_id(&request);
    match answer(&app, endpoint, request).await {
        Ok(response) => response,
        Err(error) => {
            tracing::info!(request = %id, "{}", error.text(Dialect::OpenAi));
            error.response(endpoint.dialect(), &id)
        }
    }
}

async fn answer(app: &Arc<App>, endpoint: Endpoint, request: Request) -> Result<Response<Body>, ApiError> {
    let name = request_id(&request);
    let body = read_body(app, request).await?;
    let Made { body, prepared, model, stream: streams, kinds } =
        prepare(app, body, move |app, body| make(app, endpoint, body)).await?;
    let wants_logprobs = prepared.job.logprobs.is_some();
    let trace = app.trace.is_some().then(|| (body.clone(), prepared.job.prompt.to_text()));
    let mut reply = Reply::start(app, prepared)?;
    reply.observe_by(&name, trace);
    let id = format!("{}{:032x}", endpoint.id_prefix(), random()?);
    let a = Answering { app: Arc::clone(app), reply, model, id, request: name, wants_logprobs, kinds };
    if streams {
        return Ok(match endpoint {
            Endpoint::Chat => {
                let encoder = chat::Chunks::new(&a, &body);
                stream(a.reply, encoder)
            }
            Endpoint::Completions => {
                let encoder = completions::Pieces::new(&a, &body);
                stream(a.reply, encoder)
            }
            Endpoint::Responses => {
                let encoder = responses::Events::new(&a, body);
                stream(a.reply, encoder)
            }
            Endpoint::Messages => {
                let encoder = messages::Events::new(&a);
                stream(a.reply, encoder)
            }
        });
    }
    let whole = match endpoint {
        Endpoint::Chat => chat::whole(a).await,
        Endpoint::Completions => completions::whole(a, &body).await,
        Endpoint::Responses => responses::whole(a, body).await,
        Endpoint::Messages => messages::whole(a).await,
    };
    Ok(json_response(&whole?))
}

/// Counts the tokens of a prompt, beside the queue.
async fn count(app: Arc<App>, endpoint: Endpoint, request: Request) -> Response<Body> {
    let id = request_id(&request);
    let counted = async {
        let body = read_body(&app, request).await?;
        let count = move |app: &Arc<App>, body: Value| {
            let mut ask = match endpoint {
                Endpoint::Messages => messages::read(app, &body, true)?,
                _ => endpoint.read(app, &body)?,
            };
            Ok(ask.tokens(app)?.1.len())
        };
        prepare(&app, body, count).await
    };
    match counted.await {
        Ok(n) if endpoint == Endpoint::Messages => json_response(&json!({"input_tokens": n})),
        Ok(n) => json_response(&json!({"object": "response.input_tokens", "input_tokens": n})),
        Err(error) => error.response(endpoint.dialect(), &id),
    }
}

async fn count_messages(State(app): State<Arc<App>>, request: Request) -> Response<Body> {
    count(app, Endpoint::Messages, request).await
}

async fn count_input(State(app): State<Arc<App>>, request: Request) -> Response<Body> {
    count(app, Endpoint::Responses, request).await
}
