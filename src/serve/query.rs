//! `POST /query`: a question, answered from the documents that are nearest to it.
//!
//! Without documents the model answers alone: `retrieved_docs` is empty and `retrieval_score` is null.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::response::sse::Event;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Map, Value, json};

use super::answer::{Answer, Ask, End};
use super::error::ApiError;
use super::fields::Fields;
use super::stream::{self, Told};
use super::{Library, Service, Settings};
use crate::engine::Sampling;
use crate::retrieval::index::Hit;
use crate::retrieval::prompt::{self, Source};

/// A request that was understood.
#[derive(Debug, Clone, PartialEq)]
struct QueryRequest {
    query: String,
    top_k: usize,
    max_tokens: usize,
    temperature: f64,
    stream: bool,
}

impl QueryRequest {
    fn parse(mut fields: Fields, settings: &Settings) -> Result<Self, ApiError> {
        let request = Self {
            query: fields.require("query", "a string")?,
            top_k: fields.count("top_k", 0)?.unwrap_or(settings.top_k),
            max_tokens: fields.count("max_tokens", 1)?.unwrap_or(settings.max_tokens),
            // An answer from documents is to be found, not invented: the same question gives the same answer.
            temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(0.0),
            stream: fields.take("stream", "true or false")?.unwrap_or(false),
        };
        if request.query.trim().is_empty() {
            return Err(ApiError::field("query", "`query` is empty"));
        }
        fields.finish(&[])?;
        Ok(request)
    }
}

/// A question with its documents, ready for the model.
struct Composed {
    prompt: Vec<u32>,
    documents: Vec<Value>,
    score: Option<f64>,
    retrieval: Duration,
}

/// `POST /query`
///
/// # Errors
/// See [`ApiError`].
pub async fn query(State(service): State<Arc<Service>>, fields: Fields) -> Result<Response, ApiError> {
    let started = Instant::now();
    let open = service.admit()?;
    let request = QueryRequest::parse(fields, &service.settings)?;
    let composed = compose(&service, request.clone()).await?;
    let Composed { prompt, documents, score, retrieval } = composed;
    let sampling = Sampling { temperature: request.temperature, ..Sampling::GREEDY };
    let ask = Ask { prompt, max_tokens: request.max_tokens, sampling, stop: Vec::new() };
    let answer = service.ask(open, ask, started)?;
    let mut body = Map::new();
    body.insert("query".to_string(), json!(request.query));
    body.insert("retrieved_docs".to_string(), json!(documents));
    body.insert("retrieval_score".to_string(), json!(score));
    if request.stream {
        Ok(streamed(answer, body, retrieval))
    } else {
        let (text, end) = answer.whole().await?;
        // The order in which a reader looks for them.
        body.shift_insert(1, "answer".to_string(), json!(text));
        body.extend(ending(&end, retrieval));
        Ok(Json(body).into_response())
    }
}

/// Events: `documents`, then `token` for each piece of text, then `done`; or `error`.
fn streamed(answer: Answer, body: Map<String, Value>, retrieval: Duration) -> Response {
    let mut whole = String::new();
    let event = |name: &str, data: Value| Event::default().event(name).data(data.to_string());
    stream::events(answer, move |told| {
        vec![match told {
            Told::Begin => event("documents", json!(body)),
            Told::Text(text) => {
                whole.push_str(&text);
                event("token", json!({"text": text}))
            }
            Told::End(end) => {
                let mut done = Map::from_iter([("answer".to_string(), json!(whole))]);
                done.extend(ending(&end, retrieval));
                event("done", json!(done))
            }
            Told::Failed(error) => event("error", error.json()),
        }]
    })
}

fn ending(end: &End, retrieval: Duration) -> [(String, Value); 2] {
    [
        ("finish_reason".to_string(), json!(end.finish_reason)),
        ("timings".to_string(), timings(end, retrieval)),
    ]
}

/// Milliseconds of each part; `total_ms` also holds what lies between them.
fn timings(end: &End, retrieval: Duration) -> Value {
    let milliseconds = |duration: Duration| (duration.as_secs_f64() * 1e6).round() / 1e3;
    let decode = end.timings.decode.as_secs_f64();
    // The first token comes from the prompt's pass.
    let decoded = end.completion_tokens.saturating_sub(1) as f64;
    let rate =
        if decode > 0.0 && decoded > 0.0 { Some((decoded / decode * 100.0).round() / 100.0) } else { None };
    json!({
        "retrieval_ms": milliseconds(retrieval),
        "queue_ms": milliseconds(end.timings.queued),
        "prompt_ms": milliseconds(end.timings.prefill),
        "generation_ms": milliseconds(end.timings.decode),
        "total_ms": milliseconds(end.total),
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "tokens_per_second": rate,
    })
}

/// Retrieves and writes the prompt, off the threads that serve connections.
async fn compose(service: &Arc<Service>, request: QueryRequest) -> Result<Composed, ApiError> {
    let service = Arc::clone(service);
    let composed = tokio::task::spawn_blocking(move || compose_now(&service, &request)).await;
    composed.map_err(|error| ApiError::internal(&error.into()))?
}

fn compose_now(service: &Service, request: &QueryRequest) -> Result<Composed, ApiError> {
    let started = Instant::now();
    let library = service.library.as_ref().filter(|_| request.top_k > 0);
    let hits = match library {
        Some(library) => {
            library.search(&request.query, request.top_k).map_err(|error| ApiError::internal(&error))?
        }
        None => Vec::new(),
    };
    let retrieval = started.elapsed();
    if library.is_some() {
        service.metrics.retrieval(retrieval);
    }
    let sources = sources(service, library, &hits);
    let (prompt, shown) = fit(service, request, &sources)?;
    let documents = library.map(|library| describe(library, &hits, shown)).unwrap_or_default();
    Ok(Composed { prompt, documents, score: mean_score(&hits), retrieval })
}

/// Title and text of each hit, such that none of them can pass for a turn of the conversation.
fn sources(service: &Service, library: Option<&Library>, hits: &[Hit]) -> Vec<(String, String)> {
    let Some(library) = library else { return Vec::new() };
    let title = |hit: &Hit| &library.index().documents()[hit.document].title;
    let defuse = |text: &str| defuse(text, &service.marks);
    hits.iter().map(|hit| (defuse(title(hit)), defuse(library.index().text(hit)))).collect()
}

/// Sets a space into every mark of the template (`<|end_of_text|>`), so that the tokenizer reads it as text.
pub(super) fn defuse(text: &str, marks: &[String]) -> String {
    let mut text = text.to_string();
    for mark in marks.iter().filter(|mark| mark.chars().count() > 1) {
        if text.contains(mark.as_str()) {
            let first = mark.chars().next().map_or(0, char::len_utf8);
            text = text.replace(mark.as_str(), &format!("{} {}", &mark[..first], &mark[first..]));
        }
    }
    text
}

/// The longest prompt that leaves room for the answer, and how many sources it shows.
fn fit(
    service: &Service,
    request: &QueryRequest,
    sources: &[(String, String)],
) -> Result<(Vec<u32>, usize), ApiError> {
    let context = service.engine.context();
    // However long an answer is asked for, half of the context stays for the documents.
    let room = context - request.max_tokens.min(context / 2).max(1).min(context);
    let sources: Vec<Source<'_>> = sources.iter().map(|(title, text)| Source { title, text }).collect();
    let mut prompt = Vec::new();
    let fits = |messages: &[_]| {
        let ids = service.tokenizer.encode_prompt(messages)?;
        let fits = ids.len() <= room;
        if fits {
            prompt = ids;
        }
        Ok(fits)
    };
    match prompt::build(&request.query, &sources, fits) {
        // The last that fitted is the one that was built.
        Ok(Some(built)) => Ok((prompt, built.shown)),
        Ok(None) => {
            let message = format!("`query` does not fit into the {room} tokens that are left for it");
            Err(ApiError::field("query", message))
        }
        Err(error) => Err(ApiError::internal(&error)),
    }
}

/// `in_prompt` says whether the model saw the document: the last ones are left out where the context is short.
fn describe(library: &Library, hits: &[Hit], shown: usize) -> Vec<Value> {
    let describe = |(at, hit): (usize, &Hit)| {
        let document = &library.index().documents()[hit.document];
        json!({
            "id": document.id,
            "title": document.title,
            "content": library.index().text(hit),
            "category": document.category,
            "metadata": document.metadata,
            "score": hit.score,
            "in_prompt": at < shown,
        })
    };
    hits.iter().enumerate().map(describe).collect()
}

/// Mean cosine of the documents with the question: how near they are, not how right the answer is.
fn mean_score(hits: &[Hit]) -> Option<f64> {
    let sum: f64 = hits.iter().map(|hit| f64::from(hit.score)).sum();
    (!hits.is_empty()).then(|| sum / hits.len() as f64)
}
