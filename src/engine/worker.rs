//! The engine's thread: takes requests from the queue and generates, one sequence at a time.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::handle::{Request, Shared};
use super::queue::Job;
use super::sampler::{self, Choice};
use super::stream::{Event, EventSender, FinishReason, Finished, Timings, Token, Usage};
use crate::model::decoder::Decoder;
use crate::model::kv_cache::KvCache;

/// Tokens of a prompt that go through the model at once: bounds the memory of attention scores and how
/// long a cancelled request is still computed.
const PREFILL_CHUNK: usize = 512;

/// What the engine needs of a model.
pub trait CausalLm: Send + 'static {
    /// Keys and values of one sequence.
    type Cache;

    /// Longest sequence in tokens.
    fn context(&self) -> usize;

    /// Number of token ids.
    fn vocabulary(&self) -> usize;

    /// An empty cache with room for `capacity` tokens.
    fn new_cache(&self, capacity: usize) -> Self::Cache;

    /// Appends `input_ids` to the sequence in `cache`; the logits after the last of them, `[vocab]`.
    ///
    /// # Errors
    /// When the model cannot compute them.
    fn forward_cached(&self, input_ids: &[u32], cache: &mut Self::Cache) -> Result<Vec<f32>>;
}

impl CausalLm for Decoder {
    type Cache = KvCache;

    fn context(&self) -> usize {
        usize::try_from(self.config().max_position_embeddings).unwrap_or(0)
    }

    fn vocabulary(&self) -> usize {
        usize::try_from(self.config().vocab_size).unwrap_or(0)
    }

    fn new_cache(&self, capacity: usize) -> KvCache {
        KvCache::new(self.config(), capacity as i64, self.kind(), self.device())
    }

    fn forward_cached(&self, input_ids: &[u32], cache: &mut KvCache) -> Result<Vec<f32>> {
        let logits: Tensor = Decoder::forward_cached(self, input_ids, cache)?; // [vocab] f32
        Ok(Vec::<f32>::try_from(logits.to_device(Device::Cpu).to_kind(Kind::Float))?)
    }
}

/// Answers requests until the queue is closed, or the model panics.
pub(super) fn run<M: CausalLm>(model: &M, shared: &Shared) {
    while let Some(job) = shared.queue.pop() {
        shared.running.store(1, Ordering::Relaxed);
        let end = catch_unwind(AssertUnwindSafe(|| answer(model, &job, shared)));
        shared.running.store(0, Ordering::Relaxed);
        match end {
            Ok(Ok(finished)) => job.events.send(Event::Finished(finished)),
            Ok(Err(error)) => job.events.send(Event::Failed(format!("{error:#}"))),
            Err(panic) => {
                // After a panic in libtorch nothing is known about the device: the engine ends here.
                shared.healthy.store(false, Ordering::Relaxed);
                shared.queue.close();
                job.events.send(Event::Failed(format!("this is a bug in granite: {}", message_of(&*panic))));
                refuse_waiting(shared);
                return;
            }
        }
    }
}

fn refuse_waiting(shared: &Shared) {
    while let Some(job) = shared.queue.pop() {
        job.events.send(Event::Failed("the engine failed at an earlier request".to_string()));
    }
}

fn message_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

fn answer<M: CausalLm>(model: &M, job: &Job, shared: &Shared) -> Result<Finished> {
    let started = Instant::now();
    let Job { request, events, submitted } = job;
    let mut sequence = Running::new(model, request, events, shared);
    let reason = sequence.generate()?;
    let timings = Timings {
        queued: started.saturating_duration_since(*submitted),
        prefill: sequence.prefill,
        decode: started.elapsed().saturating_sub(sequence.prefill),
    };
    let usage = Usage { prompt_tokens: request.prompt.len(), completion_tokens: sequence.produced };
    Ok(Finished { reason, usage, timings })
}

/// A sequence that is being generated.
struct Running<'a, M: CausalLm> {
    model: &'a M,
    request: &'a Request,
    events: &'a EventSender,
    shared: &'a Shared,
    produced: usize,
    prefill: Duration,
}

impl<'a, M: CausalLm> Running<'a, M> {
    fn new(model: &'a M, request: &'a Request, events: &'a EventSender, shared: &'a Shared) -> Self {
        Self { model, request, events, shared, produced: 0, prefill: Duration::ZERO }
    }

    fn generate(&mut self) -> Result<FinishReason> {
        if self.is_cancelled() {
            return Ok(FinishReason::Cancelled);
        }
        let started = Instant::now();
        let capacity = self.request.prompt.len() + self.request.max_tokens;
        let mut cache = self.model.new_cache(capacity);
        let mut logits = Vec::new();
        for chunk in self.request.prompt.chunks(PREFILL_CHUNK) {
            if self.is_cancelled() {
                return Ok(FinishReason::Cancelled);
            }
            logits = self.model.forward_cached(chunk, &mut cache)?;
        }
        self.prefill = started.elapsed();
        loop {
            let Choice { id, logprob } =
                sampler::choose(&logits, &self.request.sampling, self.produced as u64)?;
            if self.request.stop_token_ids.contains(&id) {
                return Ok(FinishReason::Stop);
            }
            self.events.send(Event::Token(Token { id, logprob }));
            self.produced += 1;
            if self.produced == self.request.max_tokens {
                return Ok(FinishReason::Length);
            }
            if self.is_cancelled() {
                return Ok(FinishReason::Cancelled);
            }
            logits = self.model.forward_cached(&[id], &mut cache)?;
        }
    }

    fn is_cancelled(&self) -> bool {
        self.events.is_cancelled() || self.shared.shutdown.load(Ordering::Relaxed)
    }
}
