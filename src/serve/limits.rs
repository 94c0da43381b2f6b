//! Who may ask: the address that is listened on, the key, the name that was called.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use sha2::{Digest as _, Sha256};

use super::Service;
use super::error::ApiError;
use crate::error::user_error;

/// Largest request body in bytes.
pub const BODY_BYTES: usize = 1 << 20;

/// The address to listen on: loopback, or any other once there is a key.
///
/// # Errors
/// When the host is not known, or others could reach it without a key.
pub fn listen_address(host: &str, port: u16, api_key: Option<&str>) -> Result<SocketAddr> {
    check_key(api_key)?;
    // An IPv6 address may be written as in a URL.
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    let addresses: Vec<SocketAddr> =
        (bare, port).to_socket_addrs().with_context(|| format!("cannot find the host `{host}`"))?.collect();
    if api_key.is_none() && !addresses.iter().all(|address| address.ip().is_loopback()) {
        return Err(user_error(
            format!("`{host}` can be reached from other machines, and there is no key"),
            "set `serve.api_key`, `--api-key` or GRANITE_API_KEY, or listen on 127.0.0.1",
        ));
    }
    addresses.first().copied().with_context(|| format!("the host `{host}` has no address"))
}

fn check_key(api_key: Option<&str>) -> Result<()> {
    match api_key {
        Some(key) if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) => Err(user_error(
            "the key is empty or holds characters that a header cannot carry",
            "use visible ASCII characters without spaces, for example the output of `openssl rand -hex 32`",
        )),
        _ => Ok(()),
    }
}

/// Lets a request through that carries the key or, where there is none, came in by a loopback name.
pub async fn check(State(service): State<Arc<Service>>, request: Request, next: Next) -> Response {
    let refusal = match service.settings.api_key.as_deref() {
        Some(key) if carries_key(request.headers(), key) || is_liveness(&request) => None,
        Some(_) => Some(ApiError::refused(
            StatusCode::UNAUTHORIZED,
            "invalid_api_key",
            "the key is missing or wrong: send `Authorization: Bearer KEY`",
        )),
        None if calls_loopback(request.headers()) => None,
        None => Some(ApiError::refused(
            StatusCode::FORBIDDEN,
            "host_not_allowed",
            "without a key this server answers only to `localhost` and loopback addresses",
        )),
    };
    match refusal {
        Some(error) => error.into_response(),
        None => next.run(request).await,
    }
}

/// `/health` answers without a key, so that a supervisor needs none; it then tells nothing but that.
fn is_liveness(request: &Request) -> bool {
    request.method() == Method::GET && request.uri().path() == "/health"
}

/// Whether the request carries `Authorization: Bearer key`.
pub fn carries_key(headers: &HeaderMap, key: &str) -> bool {
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let Some((scheme, given)) = value.and_then(|value| value.split_once(' ')) else { return false };
    scheme.eq_ignore_ascii_case("bearer") && equal(given.trim().as_bytes(), key.as_bytes())
}

/// Compares digests, and all of them: the time tells nothing of where or at what length two keys differ.
fn equal(a: &[u8], b: &[u8]) -> bool {
    let (a, b) = (Sha256::digest(a), Sha256::digest(b));
    a.iter().zip(b.iter()).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

/// A page of another site can point its own name at 127.0.0.1 and have the browser ask; the `Host` gives it away.
fn calls_loopback(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else { return true };
    let Ok(host) = host.to_str() else { return false };
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;
    use crate::error::render;

    #[test]
    fn only_loopback_goes_without_a_key() {
        for host in ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"] {
            assert!(listen_address(host, 0, None).unwrap().ip().is_loopback(), "{host}");
        }
        for host in ["0.0.0.0", "::", "10.1.2.3"] {
            let error = render(&listen_address(host, 0, None).unwrap_err());
            assert!(
                error.contains("there is no key") && error.contains("hint: set `serve.api_key`"),
                "{error}"
            );
            assert!(listen_address(host, 0, Some("k")).is_ok());
        }
    }

    #[test]
    fn a_key_that_no_header_carries_is_refused() {
        for key in ["", " ", "two words", "schlüssel", "a\n"] {
            assert!(listen_address("127.0.0.1", 0, Some(key)).is_err(), "{key:?}");
        }
    }

    #[test]
    fn hosts_are_told_apart() {
        let calls = |host: &'static str| {
            calls_loopback(&HeaderMap::from_iter([(header::HOST, host.parse().unwrap())]))
        };
        for host in ["localhost", "LOCALHOST:80", "127.0.0.1:8080", "[::1]:8080", "[::1]"] {
            assert!(calls(host), "{host}");
        }
        for host in
            ["evil.example", "127.0.0.1.evil.example:80", "localhost.evil.example", "10.0.0.1", "", "[::]"]
        {
            assert!(!calls(host), "{host}");
        }
        assert!(calls_loopback(&HeaderMap::new()));
    }
}
