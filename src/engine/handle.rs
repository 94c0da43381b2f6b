//! Starting the engine and speaking to it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context as _, Result};
use thiserror::Error;

use super::causal_lm::CausalLm;
use super::queue::{Job, Queue, Refused};
use super::sampler::Sampling;
use super::stream::{EventSender, TokenStream};
use super::worker;

/// What is asked of the engine.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Token ids to go on from.
    pub prompt: Vec<u32>,
    /// Longest answer; the context may end it earlier.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end the answer and are not part of it.
    pub stop_token_ids: Vec<u32>,
}

/// How the engine is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineOptions {
    /// Requests that may wait while others are answered.
    pub queue: usize,
    /// Longest prompt and answer together, when shorter than the model's own: it bounds the memory of a request.
    pub context: Option<usize>,
    /// Requests that are answered at once, at least one.
    pub batch: usize,
    /// Tokens that the caches of all requests answered at once may hold ([`super::memory`]); one request is answered
    /// whatever it needs. `None` sets no limit.
    pub cached_tokens: Option<usize>,
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SubmitError {
    /// The queue is full: try again later.
    #[error("the engine is overloaded: {waiting} requests are waiting")]
    Overloaded {
        /// Requests that wait.
        waiting: usize,
    },
    /// No room is left for an answer.
    #[error("the prompt has {prompt} tokens, the context holds {context} and must leave room for an answer")]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens of the context.
        context: usize,
    },
    /// The request makes no sense; the message says why.
    #[error("{0}")]
    Invalid(String),
    /// The engine was shut down or has failed.
    #[error("the engine is not running")]
    Stopped,
}

/// The limits of the model, kept outside the thread that owns it.
#[derive(Debug, Clone, Copy)]
struct Limits {
    context: usize,
    vocabulary: usize,
}

/// What handles and thread share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) queue: Queue,
    /// Set when the last handle goes: running and waiting requests end as cancelled.
    pub(super) shutdown: AtomicBool,
    /// Cleared when the thread panics.
    pub(super) healthy: AtomicBool,
    /// Requests being answered now.
    pub(super) running: AtomicUsize,
}

/// Ends the thread when the last handle is dropped.
#[derive(Debug)]
struct Owner {
    shared: Arc<Shared>,
    limits: Limits,
    batch: usize,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.shutdown.store(true, Ordering::Relaxed);
        self.shared.queue.close();
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // The thread catches its panics and has told them; libtorch must not be left running at exit.
            thread.join().ok();
        }
    }
}

/// Starts engines.
#[derive(Debug)]
pub struct Engine;

impl Engine {
    /// Moves `model` into a thread of its own and gives the way to reach it.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn spawn<M: CausalLm>(model: M, options: &EngineOptions) -> Result<EngineHandle> {
        let context = options.context.map_or(model.context(), |limit| limit.min(model.context()));
        let limits = Limits { context, vocabulary: model.vocabulary() };
        let shared = Arc::new(Shared {
            queue: Queue::new(options.queue),
            shutdown: AtomicBool::new(false),
            healthy: AtomicBool::new(true),
            running: AtomicUsize::new(0),
        });
        let theirs = Arc::clone(&shared);
        let room = *options;
        let thread = std::thread::Builder::new()
            .name("engine".to_string())
            .spawn(move || worker::run(&model, &theirs, &room))
            .context("cannot start the engine's thread")?;
        let owner = Owner { shared, limits, batch: options.batch.max(1), thread: Mutex::new(Some(thread)) };
        Ok(EngineHandle { owner: Arc::new(owner) })
    }
}

/// A way to reach the engine; clones are cheap and reach the same one.
///
/// Dropping the last handle ends the engine: requests that are not finished end as cancelled, and the drop
/// waits for the step that is being computed.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    owner: Arc<Owner>,
}

impl EngineHandle {
    /// Hands in a request.
    ///
    /// # Errors
    /// See [`SubmitError`]; a full queue is answered at once.
    pub fn submit(&self, mut request: Request) -> Result<TokenStream, SubmitError> {
        self.check(&request)?;
        request.max_tokens = request.max_tokens.min(self.context() - request.prompt.len());
        let (events, stream) = EventSender::pair();
        let job = Job { request, events, submitted: Instant::now() };
        match self.owner.shared.queue.push(job) {
            Ok(()) => Ok(stream),
            Err(Refused::Full) => Err(SubmitError::Overloaded { waiting: self.waiting() }),
            Err(Refused::Closed) => Err(SubmitError::Stopped),
        }
    }

    fn check(&self, request: &Request) -> Result<(), SubmitError> {
        let invalid = |message: &str| Err(SubmitError::Invalid(message.to_string()));
        let Limits { context, vocabulary } = self.owner.limits;
        if request.prompt.is_empty() {
            return invalid("the prompt is empty");
        }
        if request.max_tokens == 0 {
            return invalid("`max_tokens` is 0, expected 1 or more");
        }
        request.sampling.check().map_err(SubmitError::Invalid)?;
        if let Some(id) = request.prompt.iter().find(|id| **id as usize >= vocabulary) {
            let message = format!("token id {id} is beyond the model's vocabulary of {vocabulary}");
            return Err(SubmitError::Invalid(message));
        }
        if request.prompt.len() >= context {
            return Err(SubmitError::PromptTooLong { prompt: request.prompt.len(), context });
        }
        Ok(())
    }

    /// Longest prompt and answer together, in tokens.
    pub fn context(&self) -> usize {
        self.owner.limits.context
    }

    /// Requests that are answered at once, at most.
    pub fn batch(&self) -> usize {
        self.owner.batch
    }

    /// Requests that wait and whose reader is still there.
    pub fn waiting(&self) -> usize {
        self.owner.shared.queue.len()
    }

    /// Requests that are being answered now.
    pub fn running(&self) -> usize {
        self.owner.shared.running.load(Ordering::Relaxed)
    }

    /// Whether the engine can answer; `false` for good after a panic in its thread.
    pub fn is_healthy(&self) -> bool {
        self.owner.shared.healthy.load(Ordering::Relaxed)
    }
}
