//! The engine's thread: continuous batching (Yu et al. 2022). Each step takes every running request one token further,
//! or through a part of its prompt; requests that end leave at once, and waiting ones take their places.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

use super::causal_lm::CausalLm;
use super::handle::{EngineOptions, Shared};
use super::queue::Job;
use super::running::{Running, capacity_of};
use super::stream::{Event, FinishReason};

/// Tokens of prompts that go through the model in one step: bounds the memory of attention scores, how long running
/// answers wait for new prompts, and how long a cancelled request is still computed.
const PREFILL_CHUNK: usize = 512;

/// Answers requests until the queue is closed, or the model panics.
pub(super) fn run<M: CausalLm>(model: &M, shared: &Shared, options: &EngineOptions) {
    let mut batch = Batch { model, shared, options, running: Vec::new() };
    loop {
        match catch_unwind(AssertUnwindSafe(|| batch.turn())) {
            Ok(true) => {}
            Ok(false) => return,
            Err(panic) => {
                // After a panic in libtorch nothing is known about the device: the engine ends here.
                shared.healthy.store(false, Ordering::Relaxed);
                shared.queue.close();
                batch.fail(&format!("this is a bug in granite: {}", message_of(&*panic)));
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

/// The requests that are being answered.
struct Batch<'a, M: CausalLm> {
    model: &'a M,
    shared: &'a Shared,
    options: &'a EngineOptions,
    /// In the order in which they came.
    running: Vec<Running<M::Cache>>,
}

impl<M: CausalLm> Batch<'_, M> {
    /// Takes up what there is room for, and goes a step; `false` when nothing runs and nothing will come.
    fn turn(&mut self) -> bool {
        let goes_on = self.admit();
        if goes_on {
            self.step();
        }
        goes_on
    }

    /// Takes up waiting requests while there is room, and waits for one when none is running; `false` when none will
    /// come.
    fn admit(&mut self) -> bool {
        if self.running.is_empty() {
            let Some(job) = self.shared.queue.pop() else { return false };
            self.take_up(job);
        }
        while self.running.len() < self.options.batch {
            let held: usize = self.running.iter().map(Running::capacity).sum();
            let limit = self.options.cached_tokens.unwrap_or(usize::MAX);
            let Some(job) = self.shared.queue.pop_if(|job| held.saturating_add(capacity_of(job)) <= limit)
            else {
                break;
            };
            self.take_up(job);
        }
        true
    }

    fn take_up(&mut self, job: Job) {
        let capacity = capacity_of(&job);
        match self.model.new_cache(capacity) {
            Ok(cache) => {
                self.running.push(Running::new(job, cache));
                self.count();
            }
            // Of this request alone: the others have their caches.
            Err(error) => {
                let reason = format!("no memory for the keys and values of {capacity} tokens: {error:#}");
                job.events.send(Event::Failed(reason));
            }
        }
    }

    fn count(&self) {
        self.shared.running.store(self.running.len(), Ordering::Relaxed);
    }

    /// One pass of the model over all that run.
    fn step(&mut self) {
        self.leave_cancelled();
        let mut room = PREFILL_CHUNK;
        let mut batch: Vec<_> =
            self.running.iter_mut().filter_map(|one| one.continuation(&mut room)).collect();
        if batch.is_empty() {
            return;
        }
        let logits = self.model.forward_cached(&mut batch);
        let under_way = self.running.iter_mut().filter(|one| one.is_under_way());
        match logits {
            Ok(logits) => under_way.zip(logits).for_each(|(one, logits)| one.advance(&logits)),
            Err(error) => under_way.for_each(|one| one.fail(format!("{error:#}"))),
        }
        self.leave_ended();
    }

    fn leave_cancelled(&mut self) {
        let shutdown = self.shared.shutdown.load(Ordering::Relaxed);
        for one in &mut self.running {
            if shutdown || one.is_cancelled() {
                one.finish(FinishReason::Cancelled);
            }
        }
        self.leave_ended();
    }

    fn leave_ended(&mut self) {
        let ended: Vec<_> = self.running.extract_if(.., |one| one.has_ended()).collect();
        if !ended.is_empty() {
            // Who reads the end of a request must find its place free.
            self.count();
            ended.into_iter().for_each(Running::leave);
        }
    }

    fn fail(&mut self, reason: &str) {
        self.running.iter_mut().for_each(|one| one.fail(reason.to_string()));
        self.leave_ended();
    }
}
