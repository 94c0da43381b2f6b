//! The HTTP service: the only module that knows HTTP or the wire types.
//!
//! A request passes the key check and the body limit ([`limits`]), becomes messages ([`chat`], [`query`]), then one
//! [`answer`] whose tokens the engine makes; it is told whole or as server-sent events ([`stream`]). Every refusal is
//! JSON in the shape of OpenAI's errors ([`error`]).

pub mod answer;
pub mod chat;
pub mod documents;
pub mod error;
pub mod fields;
pub mod limits;
pub mod metrics;
pub mod query;
pub mod router;
pub mod run;
pub mod stop;
pub mod stream;

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;

use crate::data::tokenizer::ChatTokenizer;
use crate::engine::EngineHandle;
use crate::retrieval::encoder::Encoder;
use crate::retrieval::index::{Hit, Index};
use metrics::Metrics;

/// What answers requests: a model, its tokenizer and, where there are any, documents.
pub struct Service {
    /// The model's thread.
    pub engine: EngineHandle,
    /// Messages to tokens and back.
    pub tokenizer: ChatTokenizer,
    /// What is retrieved from; `None` answers from the model alone.
    pub library: Option<Library>,
    /// What the operator chose.
    pub settings: Settings,
    /// Texts of the special tokens: a document that spells one must not be read as a turn.
    pub(crate) marks: Vec<String>,
    /// Requests that were let in and are not answered yet; [`answer::Open`] counts them.
    pub(crate) open: AtomicUsize,
    /// What was counted.
    pub metrics: Arc<Metrics>,
    /// When the service began, in seconds since 1970.
    pub created: u64,
}

/// What the operator chose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Name of the model in `/v1/models`.
    pub model: String,
    /// The key that requests must carry; `None` asks for none.
    pub api_key: Option<String>,
    /// Documents of an answer when the request names no number.
    pub top_k: usize,
    /// Longest answer in tokens when the request names none.
    pub max_tokens: usize,
    /// Requests that may wait; one more is answered 429.
    pub queue: usize,
}

impl Service {
    /// Brings the parts together.
    pub fn new(
        engine: EngineHandle,
        tokenizer: ChatTokenizer,
        library: Option<Library>,
        settings: Settings,
    ) -> Self {
        let metrics = Arc::new(Metrics::default());
        let marks = marks(&tokenizer);
        let (open, created) = (AtomicUsize::new(0), unix_seconds());
        Self { engine, tokenizer, library, settings, marks, open, metrics, created }
    }
}

fn marks(tokenizer: &ChatTokenizer) -> Vec<String> {
    let special = (0..tokenizer.vocab_size() as u32).filter(|&id| tokenizer.is_special(id));
    let text = |id| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned();
    special.map(text).filter(|mark| !mark.is_empty()).collect()
}

/// An index and the encoder that asks it.
#[derive(Debug)]
pub struct Library {
    /// Tensors may be sent between threads, not shared.
    encoder: Mutex<Encoder>,
    index: Index,
}

impl Library {
    /// An index and the encoder it was made with.
    pub fn new(encoder: Encoder, index: Index) -> Self {
        Self { encoder: Mutex::new(encoder), index }
    }

    /// The index.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// The `k` documents nearest to `question`. Computes for some milliseconds.
    ///
    /// # Errors
    /// When the encoder fails.
    pub fn search(&self, question: &str, k: usize) -> Result<Vec<Hit>> {
        // A panic in the encoder leaves it as it was: it is only read.
        let encoder = self.encoder.lock().unwrap_or_else(PoisonError::into_inner);
        let embedding = encoder.encode(&[question], |_| ())?;
        drop(encoder);
        self.index.search(&embedding, k)
    }
}

/// Seconds since 1970, as OpenAI's `created`.
fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
