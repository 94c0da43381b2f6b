//! A request that is being answered: what goes through the model next, and what becomes of its logits.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::queue::Job;
use super::sampler::{self, Choice};
use super::stream::{Event, FinishReason, Finished, Timings, Token, Usage};
use crate::model::continuation::Continuation;

/// A request that is being answered.
#[derive(Debug)]
pub(super) struct Running<C> {
    job: Job,
    cache: C,
    /// Tokens of the prompt that are in the cache.
    read: usize,
    /// The token chosen last, which is not in the cache yet.
    last: Option<u32>,
    /// Tokens that go through the model in this step.
    under_way: usize,
    produced: usize,
    taken_up: Instant,
    prefill: Duration,
    end: Option<Result<FinishReason, String>>,
}

/// Tokens that the cache of a request must hold.
pub(super) fn capacity_of(job: &Job) -> usize {
    job.request.prompt.len() + job.request.max_tokens
}

impl<C> Running<C> {
    /// Takes up a request; `cache` has room for [`capacity_of`] tokens.
    pub(super) fn new(job: Job, cache: C) -> Self {
        let (taken_up, prefill) = (Instant::now(), Duration::ZERO);
        Self { job, cache, read: 0, last: None, under_way: 0, produced: 0, taken_up, prefill, end: None }
    }

    /// Tokens its cache has room for.
    pub(super) fn capacity(&self) -> usize {
        capacity_of(&self.job)
    }

    /// Whether its reader wants no more.
    pub(super) fn is_cancelled(&self) -> bool {
        self.job.events.is_cancelled()
    }

    /// Its part of the next step: the token chosen last, or as much of the prompt as there is `room` for, which becomes
    /// less. `None` when there is no room.
    pub(super) fn continuation(&mut self, room: &mut usize) -> Option<Continuation<'_, C>> {
        let ahead = match &self.last {
            Some(last) => std::slice::from_ref(last),
            None => {
                let ahead = &self.job.request.prompt[self.read..];
                let part = &ahead[..ahead.len().min(*room)];
                *room -= part.len();
                part
            }
        };
        self.under_way = ahead.len();
        (!ahead.is_empty()).then_some(Continuation { input_ids: ahead, cache: &mut self.cache })
    }

    /// Whether it had a part in the step, whose outcome is to be told to it.
    pub(super) fn is_under_way(&self) -> bool {
        self.under_way > 0
    }

    /// Goes on from the logits of the step, `[vocab]`.
    pub(super) fn advance(&mut self, logits: &[f32]) {
        let took = std::mem::take(&mut self.under_way);
        if self.last.is_none() {
            self.read += took;
            if self.read < self.job.request.prompt.len() {
                return;
            }
            self.prefill = self.taken_up.elapsed();
        }
        match sampler::choose(logits, &self.job.request.sampling, self.produced as u64) {
            Ok(choice) => self.say(choice),
            Err(error) => self.fail(format!("{error:#}")),
        }
    }

    fn say(&mut self, Choice { id, logprob }: Choice) {
        if self.job.request.stop_token_ids.contains(&id) {
            return self.finish(FinishReason::Stop);
        }
        self.job.events.send(Event::Token(Token { id, logprob }));
        self.last = Some(id);
        self.produced += 1;
        if self.produced == self.job.request.max_tokens {
            self.finish(FinishReason::Length);
        }
    }

    /// It ends here.
    pub(super) fn finish(&mut self, reason: FinishReason) {
        self.end = Some(Ok(reason));
    }

    /// It cannot go on, and why.
    pub(super) fn fail(&mut self, reason: String) {
        self.end = Some(Err(reason));
    }

    /// Whether it has ended and only [`leave`](Self::leave) remains.
    pub(super) fn has_ended(&self) -> bool {
        self.end.is_some()
    }

    /// Tells the reader how it ended.
    pub(super) fn leave(self) {
        let Self { job, produced, taken_up, prefill, end, .. } = self;
        let event = match end {
            Some(Err(reason)) => Event::Failed(reason),
            Some(Ok(reason)) => Event::Finished(Finished {
                reason,
                usage: Usage { prompt_tokens: job.request.prompt.len(), completion_tokens: produced },
                timings: Timings {
                    queued: taken_up.saturating_duration_since(job.submitted),
                    prefill,
                    decode: taken_up.elapsed().saturating_sub(prefill),
                },
            }),
            None => Event::Failed("the engine stopped".to_string()),
        };
        job.events.send(event);
    }
}
