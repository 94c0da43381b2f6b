//! `POST /v1/chat/completions` and `GET /v1/models`, as OpenAI's API has them.
//!
//! A field that would change the answer and is not supported is refused; one that would not is passed over.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::sse::Event;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Map, Value, json};

use super::answer::{Answer, Ask, End};
use super::error::ApiError;
use super::fields::Fields;
use super::stream::{self, Told};
use super::{Service, Settings, unix_seconds};
use crate::data::example::{Message, Role};
use crate::engine::Sampling;

/// Stop strings of a request; OpenAI takes four.
const MOST_STOPS: usize = 16;

/// Fields that change nothing about the answer here: bookkeeping of OpenAI's own service.
const IGNORED: [&str; 11] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "prediction",
    "reasoning_effort",
    "verbosity",
];

/// A request that was understood.
#[derive(Debug, Clone, PartialEq)]
struct ChatRequest {
    messages: Vec<Message>,
    max_tokens: usize,
    sampling: Sampling,
    stop: Vec<String>,
    stream: bool,
    include_usage: bool,
}

impl ChatRequest {
    fn parse(mut fields: Fields, settings: &Settings) -> Result<Self, ApiError> {
        check_model(fields.take("model", "a string")?, settings)?;
        refuse_unsupported(&mut fields)?;
        let messages: Vec<Value> = fields.require("messages", "an array of messages")?;
        let stream = fields.take("stream", "true or false")?.unwrap_or(false);
        let newer = fields.count("max_completion_tokens", 1)?;
        let older = fields.count("max_tokens", 1)?;
        let request = Self {
            messages: parse_messages(messages)?,
            max_tokens: newer.or(older).unwrap_or(settings.max_tokens),
            sampling: sampling(&mut fields)?,
            stop: stops(&mut fields)?,
            stream,
            include_usage: include_usage(&mut fields, stream)?,
        };
        fields.finish(&IGNORED)?;
        Ok(request)
    }
}

fn check_model(model: Option<String>, settings: &Settings) -> Result<(), ApiError> {
    match model {
        Some(model) if model != settings.model => Err(unknown_model(&model, settings)),
        _ => Ok(()),
    }
}

fn unknown_model(model: &str, settings: &Settings) -> ApiError {
    let message = format!("there is no model `{model}`: this server has `{}`", settings.model);
    ApiError::refused(StatusCode::NOT_FOUND, "model_not_found", message)
}

/// Each field with the values that ask for nothing.
fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    let neutral: [(&str, &[Value]); 15] = [
        ("n", &[json!(1)]),
        ("logprobs", &[json!(false)]),
        ("top_logprobs", &[json!(0)]),
        ("presence_penalty", &[json!(0), json!(0.0)]),
        ("frequency_penalty", &[json!(0), json!(0.0)]),
        ("logit_bias", &[json!({})]),
        ("response_format", &[json!({"type": "text"})]),
        ("tools", &[json!([])]),
        ("tool_choice", &[json!("none"), json!("auto")]),
        ("functions", &[json!([])]),
        ("function_call", &[json!("none"), json!("auto")]),
        ("modalities", &[json!(["text"])]),
        ("audio", &[]),
        ("web_search_options", &[]),
        ("moderation", &[]),
    ];
    neutral.into_iter().try_for_each(|(name, values)| fields.neutral(name, values))
}

fn parse_messages(messages: Vec<Value>) -> Result<Vec<Message>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::field("messages", "`messages` is empty, expected at least one"));
    }
    messages.into_iter().enumerate().map(|(at, message)| parse_message(at, message)).collect()
}

fn parse_message(at: usize, message: Value) -> Result<Message, ApiError> {
    let wrong = |part: &str, message: String| {
        let path = format!("messages[{at}]{part}");
        ApiError::field(path.clone(), format!("`{path}` {message}"))
    };
    let Value::Object(mut message) = message else {
        return Err(wrong("", "is no object with `role` and `content`".to_string()));
    };
    let role = match message.get("role").and_then(Value::as_str) {
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some(other) => return Err(wrong(".role", format!("is `{other}`: this server does not support it"))),
        None => return Err(wrong(".role", "is missing, expected a string".to_string())),
    };
    if let Some(calls) = ["tool_calls", "function_call"].iter().find(|key| is_set(&message, key)) {
        return Err(wrong(&format!(".{calls}"), "is set: this server does not support it".to_string()));
    }
    let content = message.remove("content").unwrap_or_default();
    let content = text_of(content).map_err(|problem| wrong(".content", problem))?;
    Ok(Message { role, content })
}

fn is_set(message: &Map<String, Value>, key: &str) -> bool {
    message.get(key).is_some_and(|value| !value.is_null() && *value != json!([]))
}

/// A content is a string, or parts of type `text`.
fn text_of(content: Value) -> Result<String, String> {
    match content {
        Value::String(text) => Ok(text),
        Value::Array(parts) => parts
            .iter()
            .map(|part| match (part["type"].as_str(), part["text"].as_str()) {
                (Some("text"), Some(text)) => Ok(text),
                (Some("text"), None) => Err("holds a part without `text`".to_string()),
                (kind, _) => Err(format!(
                    "holds a part of type `{}`: this server reads text only",
                    kind.unwrap_or("unknown")
                )),
            })
            .collect(),
        _ => Err("is missing, expected a string or text parts".to_string()),
    }
}

/// OpenAI's defaults: temperature 1 and the whole distribution. Without a seed every request draws its own.
fn sampling(fields: &mut Fields) -> Result<Sampling, ApiError> {
    let top_p = fields.number("top_p", 0.0, 1.0)?.unwrap_or(1.0);
    let seed: Option<i64> = fields.take("seed", "a whole number")?;
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(1.0),
        // Nothing is likelier than the likeliest token, so 0 means that one alone.
        top_p: if top_p == 0.0 { f64::MIN_POSITIVE } else { top_p },
        top_k: None,
        seed: seed.map_or_else(random, i64::cast_unsigned),
    })
}

fn stops(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let expected = "a string or an array of strings";
    let stops = match fields.take::<Value>("stop", expected)? {
        None => Vec::new(),
        Some(Value::String(stop)) => vec![stop],
        Some(other) => serde_json::from_value::<Vec<String>>(other)
            .map_err(|_| ApiError::field("stop", format!("`stop` is not {expected}")))?,
    };
    if stops.len() > MOST_STOPS {
        let message = format!("`stop` has {} strings, expected at most {MOST_STOPS}", stops.len());
        return Err(ApiError::field("stop", message));
    }
    if stops.iter().any(String::is_empty) {
        return Err(ApiError::field("stop", "`stop` holds an empty string"));
    }
    Ok(stops)
}

fn include_usage(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let options: Option<Map<String, Value>> = fields.take("stream_options", "an object")?;
    let Some(options) = options else { return Ok(false) };
    if !stream {
        return Err(ApiError::field("stream_options", "`stream_options` is set, but `stream` is not true"));
    }
    let mut options = Fields::from(options);
    let include = options.take("include_usage", "true or false")?.unwrap_or(false);
    // Padding against traffic analysis, which no one listens to on a loopback.
    options.finish(&["include_obfuscation"])?;
    Ok(include)
}

/// Some 64 bits; the standard library seeds its hash maps with such.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// `POST /v1/chat/completions`
///
/// # Errors
/// See [`ApiError`].
pub async fn completions(State(service): State<Arc<Service>>, fields: Fields) -> Result<Response, ApiError> {
    let started = Instant::now();
    let open = service.admit()?;
    let request = ChatRequest::parse(fields, &service.settings)?;
    let ChatRequest { messages, max_tokens, sampling, stop, stream, include_usage } = request;
    let prompt = service.encode(messages).await?;
    let answer = service.ask(open, Ask { prompt, max_tokens, sampling, stop }, started)?;
    let envelope = Envelope::new(&service);
    if stream {
        Ok(streamed(answer, envelope, include_usage))
    } else {
        let (text, end) = answer.whole().await?;
        Ok(Json(envelope.completion(&text, &end)).into_response())
    }
}

impl Service {
    /// Tokens of a chat, off the threads that serve connections: a long one takes a while.
    async fn encode(self: &Arc<Self>, messages: Vec<Message>) -> Result<Vec<u32>, ApiError> {
        let service = Arc::clone(self);
        let encoded = tokio::task::spawn_blocking(move || service.tokenizer.encode_prompt(&messages)).await;
        let encoded = encoded.map_err(|error| ApiError::internal(&error.into()))?;
        // What a template refuses is the order or the roles of the messages.
        encoded.map_err(|error| ApiError::field("messages", format!("{error:#}")))
    }
}

fn streamed(answer: Answer, envelope: Envelope, include_usage: bool) -> Response {
    stream::events(answer, move |told| match told {
        Told::Begin => {
            vec![envelope.chunk(&json!({"role": "assistant", "content": ""}), None, include_usage)]
        }
        Told::Text(text) => vec![envelope.chunk(&json!({"content": text}), None, include_usage)],
        Told::End(end) => {
            let mut events = vec![envelope.chunk(&json!({}), Some(end.finish_reason), include_usage)];
            if include_usage {
                events.push(envelope.usage(&end));
            }
            events.push(Event::default().data("[DONE]"));
            events
        }
        Told::Failed(error) => vec![data(&error.json())],
    })
}

/// What every part of one answer repeats.
struct Envelope {
    id: String,
    created: u64,
    model: String,
}

impl Envelope {
    fn new(service: &Service) -> Self {
        let id = format!("chatcmpl-{:016x}", random());
        Self { id, created: unix_seconds(), model: service.settings.model.clone() }
    }

    fn wrap(&self, object: &str, choices: Value) -> Value {
        let Self { id, created, model } = self;
        json!({"id": id, "object": object, "created": created, "model": model, "choices": choices})
    }

    fn completion(&self, text: &str, end: &End) -> Value {
        let message = json!({"role": "assistant", "content": text, "refusal": null});
        let choice = json!({
            "index": 0, "message": message, "logprobs": null, "finish_reason": end.finish_reason,
        });
        let mut body = self.wrap("chat.completion", json!([choice]));
        body["usage"] = usage(end);
        body
    }

    fn chunk(&self, delta: &Value, finish_reason: Option<&str>, include_usage: bool) -> Event {
        let choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish_reason});
        let mut body = self.wrap("chat.completion.chunk", json!([choice]));
        if include_usage {
            body["usage"] = Value::Null;
        }
        data(&body)
    }

    fn usage(&self, end: &End) -> Event {
        let mut body = self.wrap("chat.completion.chunk", json!([]));
        body["usage"] = usage(end);
        data(&body)
    }
}

fn usage(end: &End) -> Value {
    json!({
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    })
}

/// JSON text has no line breaks of its own, so it is one `data:` line.
fn data(body: &Value) -> Event {
    Event::default().data(body.to_string())
}

/// `GET /v1/models`
pub async fn models(State(service): State<Arc<Service>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [model_object(&service)]}))
}

/// `GET /v1/models/{model}`
///
/// # Errors
/// 404 when there is no such model, 400 when the name is no text.
pub async fn model(
    State(service): State<Arc<Service>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(name) = name.map_err(|rejection| ApiError::invalid(rejection.body_text()))?;
    check_model(Some(name), &service.settings)?;
    Ok(Json(model_object(&service)))
}

fn model_object(service: &Service) -> Value {
    json!({
        "id": service.settings.model,
        "object": "model",
        "created": service.created,
        "owned_by": "granite",
        "context_length": service.engine.context(),
    })
}
