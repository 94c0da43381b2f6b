//! What holds for every route: the key, the body, the shape of refusals.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use granite::serve::limits::BODY_BYTES;
use granite::serve::{Service, Settings};
use serde_json::json;

use crate::scripted::Scripted;
use crate::{Reply, get, post, send, service, service_with, settings};

const ROUTES: [(&str, &str); 9] = [
    ("POST", "/query"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/test-model"),
    ("GET", "/documents"),
    ("GET", "/metrics"),
    ("POST", "/health"),
    ("GET", "/no/such/route"),
    ("DELETE", "/query"),
];

fn with_key() -> Arc<Service> {
    let settings = Settings { api_key: Some("secret".to_string()), ..settings() };
    Arc::new(service_with(Scripted::says("x"), None, settings))
}

async fn request(
    service: &Arc<Service>,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Reply {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    send(service, request.body(Body::from(body.to_string())).unwrap()).await
}

#[tokio::test]
async fn no_route_answers_without_the_key() {
    let service = with_key();
    let wrong = [
        None,
        Some("Bearer wrong"),
        Some("Bearer"),
        Some("Bearer "),
        Some("secret"),
        Some("Basic secret"),
        Some("Bearer secret2"),
    ];
    for (method, path) in ROUTES {
        for key in wrong {
            let headers: Vec<(&str, &str)> = key.map(|key| ("authorization", key)).into_iter().collect();
            let reply = request(&service, method, path, &headers, "{}").await;
            assert_eq!(reply.status, StatusCode::UNAUTHORIZED, "{method} {path} {key:?}");
            assert_eq!(reply.json()["error"]["code"], "invalid_api_key");
            assert_eq!(reply.headers["www-authenticate"], "Bearer");
        }
        let reply = request(&service, method, path, &[("authorization", "bearer secret")], "{}").await;
        assert_ne!(reply.status, StatusCode::UNAUTHORIZED, "{method} {path}");
    }
}

#[tokio::test]
async fn health_tells_strangers_nothing_else() {
    let service = with_key();
    assert_eq!(get(&service, "/health").await.json(), json!({"status": "ok"}));
    let full = request(&service, "GET", "/health", &[("authorization", "Bearer secret")], "").await.json();
    assert_eq!(
        (&full["status"], &full["model"], &full["context"]),
        (&json!("ok"), &json!("test-model"), &json!(2000))
    );
    assert_eq!((&full["documents"], &full["waiting"]), (&json!(0), &json!(0)));
}

#[tokio::test]
async fn without_a_key_only_loopback_names_are_answered() {
    let service = service(Scripted::says("x"));
    for host in ["127.0.0.1:8080", "localhost", "[::1]:1"] {
        assert_eq!(request(&service, "GET", "/health", &[("host", host)], "").await.status, StatusCode::OK);
    }
    let reply = request(&service, "GET", "/health", &[("host", "evil.example")], "").await;
    assert_eq!(
        (reply.status, reply.json()["error"]["code"].clone()),
        (StatusCode::FORBIDDEN, json!("host_not_allowed"))
    );
    let keyed = request(
        &with_key(),
        "GET",
        "/v1/models",
        &[("host", "any.example"), ("authorization", "Bearer secret")],
        "",
    )
    .await;
    assert_eq!(keyed.status, StatusCode::OK);
}

#[tokio::test]
async fn every_refusal_is_json() {
    let service = service(Scripted::says("x"));
    let json_type = [("content-type", "application/json")];
    let too_large = format!("{{\"query\": \"{}\"}}", "x".repeat(BODY_BYTES));
    let deep = "[".repeat(10_000);
    /// Method, route, headers, body; status and what the message says.
    type Refusal<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)], &'a str, StatusCode, &'a str);
    let cases: [Refusal<'_>; 9] = [
        ("GET", "/no/such/route", &[], "", StatusCode::NOT_FOUND, "there is no route `/no/such/route`"),
        ("GET", "/query", &[], "", StatusCode::METHOD_NOT_ALLOWED, "`/query` does not answer GET"),
        ("POST", "/query", &[], "{}", StatusCode::UNSUPPORTED_MEDIA_TYPE, "content-type: application/json"),
        (
            "POST",
            "/query",
            &[("content-type", "text/plain")],
            "{}",
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "application/json",
        ),
        ("POST", "/query", &json_type, "", StatusCode::BAD_REQUEST, "the body is no JSON"),
        ("POST", "/query", &json_type, "{\"query\": \"a\"", StatusCode::BAD_REQUEST, "line 1 column 13"),
        (
            "POST",
            "/v1/chat/completions",
            &json_type,
            "[]",
            StatusCode::BAD_REQUEST,
            "the body is no JSON object",
        ),
        ("POST", "/query", &json_type, &deep, StatusCode::BAD_REQUEST, "recursion limit"),
        (
            "POST",
            "/query",
            &json_type,
            &too_large,
            StatusCode::PAYLOAD_TOO_LARGE,
            "larger than the server takes",
        ),
    ];
    for (method, path, headers, body, status, part) in cases {
        let reply = request(&service, method, path, headers, body).await;
        assert_eq!(reply.status, status, "{method} {path}: {}", reply.text);
        assert!(reply.error().contains(part), "{}", reply.text);
    }
    let bytes = Request::post("/query")
        .header("content-type", "application/json")
        .body(Body::from(&b"{\"query\": \"\xff\"}"[..]))
        .unwrap();
    assert_eq!(send(&service, bytes).await.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn no_page_of_another_origin_is_invited() {
    let service = service(Scripted::says("x"));
    let headers = [("origin", "https://evil.example"), ("access-control-request-method", "POST")];
    let reply = request(&service, Method::OPTIONS.as_str(), "/query", &headers, "").await;
    assert_eq!(reply.status, StatusCode::METHOD_NOT_ALLOWED);
    assert!(!reply.headers.contains_key("access-control-allow-origin"));
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let service = service(Scripted::says("abc"));
    let ask = json!({"messages": [{"role": "user", "content": "Hi"}]});
    for _ in 0..2 {
        assert_eq!(post(&service, "/v1/chat/completions", ask.clone()).await.status, StatusCode::OK);
    }
    post(&service, "/query", json!({})).await;
    get(&service, "/nothing\"here").await;
    get(&service, "/v1/models/test-model").await;
    let reply = get(&service, "/metrics").await;
    assert_eq!(reply.headers["content-type"], "text/plain; version=0.0.4");
    let expected = [
        "granite_http_requests_total{route=\"/v1/chat/completions\",status=\"200\"} 2",
        "granite_http_requests_total{route=\"/query\",status=\"400\"} 1",
        "granite_http_requests_total{route=\"other\",status=\"404\"} 1",
        "granite_http_requests_total{route=\"/v1/models/{model}\",status=\"200\"} 1",
        "granite_prompt_tokens_total 10",
        "granite_generation_tokens_total 6",
        "granite_requests_running 0",
        "granite_requests_waiting 0",
        "granite_requests_unfinished_total 0",
        "granite_request_duration_seconds_bucket{le=\"+Inf\"} 2",
        "granite_request_duration_seconds_count 2",
        "granite_time_to_first_token_seconds_count 2",
        concat!("granite_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
    ];
    for line in expected {
        assert!(reply.text.lines().any(|found| found == line), "`{line}` is not in\n{}", reply.text);
    }
    // Every sample has its family before it, and buckets do not fall.
    let mut family = "";
    let mut last = 0;
    for line in reply.text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            family = rest.split(' ').next().unwrap();
            last = 0;
        } else if !line.starts_with('#') {
            assert!(line.starts_with(family), "{line}");
            if line.contains("_bucket") {
                let count: u64 = line.rsplit(' ').next().unwrap().parse().unwrap();
                assert!(count >= last);
                last = count;
            }
        }
    }
}
