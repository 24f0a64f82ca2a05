//! Errors as each dialect writes them (`api.md` section 9).

use crate::read::Bad;
use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use ds4_engine::scheduler::{Failure, Refused};
use serde_json::{Value, json};

/// Whose clients are talked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    OpenAi,
    Anthropic,
}

/// What went wrong, for whoever asked.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) kind: Kind,
    pub(crate) message: String,
    /// Where in the body.
    pub(crate) param: Option<String>,
    /// A word by which clients know this very error.
    pub(crate) code: Option<&'static str>,
}

/// What sort of error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Invalid,
    ContextTooLong { tokens: usize, most: usize },
    Key,
    NotFound,
    Method,
    Timeout,
    TooLarge,
    QueueFull,
    Inside,
    Unavailable,
}

impl ApiError {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        ApiError { kind, message: message.into(), param: None, code: None }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        ApiError::new(Kind::Invalid, message)
    }

    pub(crate) fn too_long(tokens: usize, most: usize) -> Self {
        ApiError::new(Kind::ContextTooLong { tokens, most }, "")
    }

    fn status(&self, dialect: Dialect) -> StatusCode {
        match self.kind {
            Kind::Invalid | Kind::ContextTooLong { .. } => StatusCode::BAD_REQUEST,
            Kind::Key => StatusCode::UNAUTHORIZED,
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::Method => StatusCode::METHOD_NOT_ALLOWED,
            Kind::Timeout => StatusCode::REQUEST_TIMEOUT,
            Kind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Kind::QueueFull if dialect == Dialect::Anthropic => {
                StatusCode::from_u16(529).unwrap_or(StatusCode::SERVICE_UNAVAILABLE)
            }
            Kind::QueueFull => StatusCode::TOO_MANY_REQUESTS,
            Kind::Inside => StatusCode::INTERNAL_SERVER_ERROR,
            Kind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// Its name in a dialect.
    fn name(&self, dialect: Dialect) -> &'static str {
        let anthropic = dialect == Dialect::Anthropic;
        match self.kind {
            Kind::Key => "authentication_error",
            Kind::NotFound if anthropic => "not_found_error",
            Kind::TooLarge if anthropic => "request_too_large",
            Kind::Timeout if anthropic => "timeout_error",
            Kind::QueueFull if anthropic => "overloaded_error",
            Kind::QueueFull => "rate_limit_error",
            Kind::Inside if anthropic => "api_error",
            Kind::Unavailable if anthropic => "overloaded_error",
            Kind::Inside | Kind::Unavailable => "server_error",
            Kind::Invalid
            | Kind::ContextTooLong { .. }
            | Kind::NotFound
            | Kind::Method
            | Kind::TooLarge
            | Kind::Timeout => "invalid_request_error",
        }
    }

    fn code(&self) -> Option<&'static str> {
        self.code.or(match self.kind {
            Kind::ContextTooLong { .. } => Some("context_length_exceeded"),
            Kind::Key => Some("invalid_api_key"),
            Kind::QueueFull => Some("rate_limit_exceeded"),
            _ => None,
        })
    }

    /// Its text. That of a prompt too long is what clients look for.
    pub(crate) fn text(&self, dialect: Dialect) -> String {
        match (self.kind, &self.param) {
            (Kind::ContextTooLong { tokens, most }, _) if dialect == Dialect::Anthropic => {
                format!("prompt is too long: {tokens} tokens > {most} maximum")
            }
            (Kind::ContextTooLong { tokens, most }, _) => format!(
                "This model's maximum context length is {most} tokens, but the prompt has {tokens}: shorten it, or start the server with a larger --ctx"
            ),
            (_, Some(param)) => format!("{param}: {}", self.message),
            _ => self.message.clone(),
        }
    }

    /// Its body, for an answer or an event in a stream.
    pub(crate) fn body(&self, dialect: Dialect, request: &str) -> Value {
        let (message, name) = (self.text(dialect), self.name(dialect));
        match dialect {
            Dialect::OpenAi => {
                let mut error =
                    json!({"message": message, "type": name, "param": self.param, "code": self.code()});
                if let Kind::ContextTooLong { tokens, most } = self.kind {
                    error["n_prompt_tokens"] = tokens.into();
                    error["n_ctx"] = most.into();
                }
                json!({"error": error})
            }
            Dialect::Anthropic => {
                let mut error = json!({"type": name, "message": message});
                if let Some(code) = self.code {
                    error["details"] = json!({"error_code": code});
                }
                json!({"type": "error", "error": error, "request_id": request})
            }
        }
    }

    /// The whole answer.
    pub(crate) fn response(&self, dialect: Dialect, request: &str) -> Response<Body> {
        let mut response = json_response(&self.body(dialect, request));
        *response.status_mut() = self.status(dialect);
        if matches!(self.kind, Kind::QueueFull | Kind::Unavailable) {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("2"));
        }
        response
    }
}

/// An answer that is JSON.
pub(crate) fn json_response(body: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(body.to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

impl From<Bad> for ApiError {
    fn from(bad: Bad) -> Self {
        let param = (!bad.path.is_empty()).then_some(bad.path);
        ApiError { param, ..ApiError::invalid(bad.message) }
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::QueueFull(_) => ApiError::new(Kind::QueueFull, format!("{refused}: try again soon")),
            Refused::ShuttingDown => ApiError::new(Kind::Unavailable, refused.to_string()),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let kind = match failure {
            Failure::ShuttingDown => Kind::Unavailable,
            // The schema is the client's, and would fail again.
            Failure::Grammar(_) => Kind::Invalid,
            Failure::Engine(_) | Failure::Stalled => Kind::Inside,
        };
        ApiError::new(kind, failure.to_string())
    }
}
