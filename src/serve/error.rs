//! Refusals: JSON in the shape of OpenAI's errors, on every route.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::engine::SubmitError;

/// A request that is not answered, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
    retry_after: Option<u64>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, code: None, param: None, message: message.into(), retry_after: None }
    }

    /// 400: the request is wrong.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400: the field `param` is wrong.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::invalid(message) }
    }

    /// The request is wrong in a way that HTTP has a status for.
    pub fn refused(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { code: Some(code), ..Self::new(status, "invalid_request_error", message) }
    }

    /// 429: too many wait; `retry_after` in seconds.
    pub fn overloaded(waiting: usize, retry_after: u64) -> Self {
        let message = format!("the queue is full: {waiting} requests are waiting");
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        Self { code: Some("queue_full"), retry_after: Some(retry_after), ..error }
    }

    /// 500: ours.
    pub fn internal(error: &anyhow::Error) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", format!("{error:#}"))
    }

    /// 503: the engine has ended.
    pub fn stopped() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "the engine is not running")
    }

    /// What the engine said to a request; `retry_after` in seconds.
    pub fn submit(error: &SubmitError, retry_after: u64) -> Self {
        match error {
            SubmitError::Overloaded { waiting } => Self::overloaded(*waiting, retry_after),
            SubmitError::PromptTooLong { .. } => {
                Self { code: Some("context_length_exceeded"), ..Self::field("messages", error.to_string()) }
            }
            SubmitError::Invalid(message) => Self::invalid(message),
            SubmitError::Stopped => Self::stopped(),
        }
    }

    /// The body.
    pub fn json(&self) -> Value {
        let Self { kind, code, param, message, .. } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.json())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
