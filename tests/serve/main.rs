//! The service, driven over HTTP by a scripted model behind the real engine and a real tokenizer.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod chat;
mod http;
mod live;
mod query;
mod scripted;

use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, StatusCode};
use granite::engine::{Engine, EngineOptions};
use granite::serve::router::router;
use granite::serve::{Library, Service, Settings};
use scripted::{Scripted, tokenizer};
use serde_json::Value;
use tower::ServiceExt as _;

fn settings() -> Settings {
    Settings { model: "test-model".to_string(), api_key: None, top_k: 2, max_tokens: 400, queue: 4 }
}

fn service_with(model: Scripted, library: Option<Library>, settings: Settings) -> Service {
    // One at a time: tests know then what waits.
    let (queue, context) = (settings.queue, Some(2000));
    let options = EngineOptions { queue, context, batch: 1, cached_tokens: None };
    let engine = Engine::spawn(model, &options).unwrap();
    Service::new(engine, tokenizer(), library, settings)
}

fn service(model: Scripted) -> Arc<Service> {
    Arc::new(service_with(model, None, settings()))
}

/// A response, read whole.
struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// The error's message, after checking its shape.
    fn error(&self) -> String {
        let json = self.json();
        let error = json["error"].as_object().unwrap_or_else(|| panic!("no error: {json}"));
        let keys: Vec<&str> = error.keys().map(String::as_str).collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        error["message"].as_str().unwrap().to_string()
    }

    /// Events of a stream: name (empty when it has none) and data.
    fn events(&self) -> Vec<(String, String)> {
        assert_eq!(self.headers["content-type"], "text/event-stream");
        let field = |block: &str, name: &str| {
            let line = block.lines().find_map(|line| line.strip_prefix(name).map(str::trim_start));
            line.unwrap_or_default().to_string()
        };
        let blocks = self.text.split_terminator("\n\n");
        blocks.map(|block| (field(block, "event:"), field(block, "data:"))).collect()
    }
}

async fn send(service: &Arc<Service>, request: Request<Body>) -> Reply {
    let response = router(Arc::clone(service)).oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let text = String::from_utf8(to_bytes(body, usize::MAX).await.unwrap().to_vec()).unwrap();
    Reply { status: parts.status, headers: parts.headers, text }
}

async fn get(service: &Arc<Service>, path: &str) -> Reply {
    send(service, Request::get(path).body(Body::empty()).unwrap()).await
}

async fn post(service: &Arc<Service>, path: &str, body: Value) -> Reply {
    let request = Request::post(path).header("content-type", "application/json; charset=utf-8");
    send(service, request.body(Body::from(body.to_string())).unwrap()).await
}
