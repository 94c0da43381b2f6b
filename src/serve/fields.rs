//! The JSON body of a request, field by field, so that an error names the field.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse as _;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;

/// How long the body of a request may be on its way.
const BODY_TIME: Duration = Duration::from_secs(30);

/// The fields of a JSON object that nobody has taken yet.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Fields {
    map: Map<String, Value>,
}

impl Fields {
    /// Takes a field; absent and null are `None`.
    ///
    /// # Errors
    /// When it is no `T`; `expected` says in words what that is.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str, expected: &str) -> Result<Option<T>, ApiError> {
        match self.map.shift_remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let shown = shorten(&value.to_string());
                let wrong = |_| ApiError::field(name, format!("`{name}` is {shown}, expected {expected}"));
                serde_json::from_value(value).map(Some).map_err(wrong)
            }
        }
    }

    /// As [`take`](Self::take), for a field that must be there.
    ///
    /// # Errors
    /// As [`take`](Self::take), or when it is absent.
    pub fn require<T: DeserializeOwned>(&mut self, name: &str, expected: &str) -> Result<T, ApiError> {
        let missing = || ApiError::field(name, format!("`{name}` is missing, expected {expected}"));
        self.take(name, expected)?.ok_or_else(missing)
    }

    /// Takes a number of `least` or more.
    ///
    /// # Errors
    /// When it is another kind of value, or smaller.
    pub fn count(&mut self, name: &str, least: usize) -> Result<Option<usize>, ApiError> {
        let expected = format!("a whole number of {least} or more");
        let value: Option<usize> = self.take(name, &expected)?;
        match value {
            Some(value) if value < least => {
                Err(ApiError::field(name, format!("`{name}` is {value}, expected {expected}")))
            }
            value => Ok(value),
        }
    }

    /// Takes a number in `least..=most`.
    ///
    /// # Errors
    /// When it is another kind of value, or outside.
    pub fn number(&mut self, name: &str, least: f64, most: f64) -> Result<Option<f64>, ApiError> {
        let expected = format!("a number from {least} to {most}");
        let value: Option<f64> = self.take(name, &expected)?;
        match value {
            Some(value) if !(least..=most).contains(&value) => {
                Err(ApiError::field(name, format!("`{name}` is {value}, expected {expected}")))
            }
            value => Ok(value),
        }
    }

    /// Takes a field that only its `neutral` values leave possible: what it asks for is not supported.
    ///
    /// # Errors
    /// When it is anything else.
    pub fn neutral(&mut self, name: &str, neutral: &[Value]) -> Result<(), ApiError> {
        match self.map.shift_remove(name) {
            None | Some(Value::Null) => Ok(()),
            Some(value) if neutral.contains(&value) => Ok(()),
            Some(value) => {
                let shown = shorten(&value.to_string());
                Err(ApiError::field(name, format!("`{name}` is {shown}: this server does not support it")))
            }
        }
    }

    /// Ends the reading: what is left is an error, but for `ignored`.
    ///
    /// # Errors
    /// When a field is left that nobody knows.
    pub fn finish(mut self, ignored: &[&str]) -> Result<(), ApiError> {
        self.map.retain(|name, value| !value.is_null() && !ignored.contains(&name.as_str()));
        match self.map.keys().next() {
            Some(name) => Err(ApiError::field(name, format!("unknown field `{}`", shorten(name)))),
            None => Ok(()),
        }
    }
}

impl From<Map<String, Value>> for Fields {
    fn from(map: Map<String, Value>) -> Self {
        Self { map }
    }
}

/// An error message may repeat what was sent, but not all of it.
fn shorten(text: &str) -> String {
    const MOST: usize = 80;
    if text.len() <= MOST {
        text.to_string()
    } else {
        format!("{}…", &text[..text.floor_char_boundary(MOST)])
    }
}

/// The whole body, when it comes `within` that time: who sends half of it would hold the connection forever.
async fn body<S: Send + Sync>(request: Request, state: &S, within: Duration) -> Result<Bytes, ApiError> {
    match tokio::time::timeout(within, Bytes::from_request(request, state)).await {
        Ok(read) => read.map_err(unreadable),
        Err(_) => Err(ApiError::refused(
            StatusCode::REQUEST_TIMEOUT,
            "request_timeout",
            format!("the body did not come within {within:?}: send as many bytes as `content-length` says"),
        )),
    }
}

fn unreadable(rejection: BytesRejection) -> ApiError {
    let message = rejection.body_text();
    match rejection.into_response().status() {
        status @ StatusCode::PAYLOAD_TOO_LARGE => {
            ApiError::refused(status, "request_too_large", "the request is larger than the server takes")
        }
        _ => ApiError::invalid(message),
    }
}

impl<S: Send + Sync> FromRequest<S> for Fields {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        // A page of another origin may send text without asking, but not JSON: this closes the loopback to it.
        let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = content_type.and_then(|value| value.split(';').next()).map(str::trim);
        if !media_type.is_some_and(|media_type| media_type.eq_ignore_ascii_case("application/json")) {
            return Err(ApiError::refused(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "unsupported_media_type",
                "the header `content-type: application/json` is missing",
            ));
        }
        let bytes = body(request, state, BODY_TIME).await?;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(map)) => Ok(Self { map }),
            Ok(_) => Err(ApiError::invalid("the body is no JSON object")),
            Err(error) => Err(ApiError::invalid(format!("the body is no JSON: {error}"))),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use std::convert::Infallible;

    use axum::body::Body;
    use tokio_stream::StreamExt as _;

    use super::*;

    #[tokio::test]
    async fn half_a_body_is_not_waited_for() {
        let half = tokio_stream::once(Ok::<_, Infallible>("{\"query\": "));
        let request = Request::new(Body::from_stream(half.chain(tokio_stream::pending())));
        let error = body(request, &(), Duration::from_millis(10)).await.unwrap_err();
        assert_eq!(error.json()["error"]["code"], "request_timeout");
        assert_eq!(error.into_response().status(), StatusCode::REQUEST_TIMEOUT);
    }
}
