//! `GET /documents?offset=0&limit=100`: what the service retrieves from, without the texts.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Service;
use super::error::ApiError;

/// Documents of one page.
const MOST: usize = 1000;

/// Which documents to list.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Page {
    offset: usize,
    limit: usize,
}

impl Default for Page {
    fn default() -> Self {
        Self { offset: 0, limit: 100 }
    }
}

/// `GET /documents`
///
/// # Errors
/// When the page is no page.
pub async fn list(
    State(service): State<Arc<Service>>,
    page: Result<Query<Page>, QueryRejection>,
) -> Result<Json<Value>, ApiError> {
    let Query(Page { offset, limit }) = page.map_err(|rejection| ApiError::invalid(rejection.body_text()))?;
    let limit = limit.min(MOST);
    let documents = service.library.as_ref().map(|library| library.index().documents()).unwrap_or_default();
    let page: Vec<Value> = documents
        .iter()
        .skip(offset)
        .take(limit)
        .map(|document| {
            json!({
                "id": document.id,
                "title": document.title,
                "category": document.category,
                "metadata": document.metadata,
                "characters": document.content.chars().count(),
            })
        })
        .collect();
    Ok(Json(json!({"total": documents.len(), "offset": offset, "limit": limit, "documents": page})))
}
