//! The routes, and what every one of them passes through.

use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};

use super::error::ApiError;
use super::limits::{self, BODY_BYTES};
use super::metrics::Load;
use super::{Service, chat, documents, query};

/// Every route of the service; the key check is outermost, so that nothing can be added beside it.
pub fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route("/query", post(query::query))
        .route("/v1/chat/completions", post(chat::completions))
        .route("/v1/models", get(chat::models))
        .route("/v1/models/{model}", get(chat::model))
        .route("/documents", get(documents::list))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES))
        .layer(middleware::from_fn_with_state(Arc::clone(&service), limits::check))
        .layer(middleware::from_fn_with_state(Arc::clone(&service), count))
        .with_state(service)
}

async fn unknown_route(uri: Uri) -> ApiError {
    ApiError::refused(StatusCode::NOT_FOUND, "unknown_route", format!("there is no route `{}`", uri.path()))
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("`{}` does not answer {method}", uri.path());
    ApiError::refused(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

async fn count(State(service): State<Arc<Service>>, request: Request, next: Next) -> Response {
    // Names of routes that do not exist are anyone's to invent: they would fill the table.
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_string();
    let response = next.run(request).await;
    service.metrics.request(&route, response.status().as_u16());
    response
}

/// Live and ready are one thing here: the port opens when the model and the index are loaded.
async fn health(State(service): State<Arc<Service>>, headers: HeaderMap) -> Response {
    let healthy = service.engine.is_healthy();
    let status = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut body = json!({"status": if healthy { "ok" } else { "failed" }});
    let key = service.settings.api_key.as_deref();
    if key.is_none_or(|key| limits::carries_key(&headers, key)) {
        describe(&service, &mut body);
    }
    (status, Json(body)).into_response()
}

fn describe(service: &Service, body: &mut Value) {
    let index = service.library.as_ref().map(|library| library.index());
    body["version"] = json!(env!("CARGO_PKG_VERSION"));
    body["model"] = json!(service.settings.model);
    body["context"] = json!(service.engine.context());
    body["documents"] = json!(index.map_or(0, |index| index.documents().len()));
    body["passages"] = json!(index.map_or(0, |index| index.passages().len()));
    body["running"] = json!(service.engine.running());
    body["waiting"] = json!(service.engine.waiting());
    body["queue"] = json!(service.settings.queue);
}

async fn metrics(State(service): State<Arc<Service>>) -> impl IntoResponse {
    let load = Load { running: service.engine.running(), waiting: service.engine.waiting() };
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], service.metrics.render(load))
}
