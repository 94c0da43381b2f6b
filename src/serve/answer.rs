//! One answer: tokens of the engine as text, up to an end token, a stop string or the limit.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Service;
use super::error::ApiError;
use super::stop::StopMatcher;
use crate::data::tokenizer::StreamDecoder;
use crate::engine::{self, Event, FinishReason, Request, Sampling, TokenStream};

/// What is asked of the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Longest answer in tokens; the context may end it earlier.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    /// Whole characters; never empty.
    Text(String),
    /// The end; nothing follows.
    End(End),
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct End {
    /// `stop` or `length`, as OpenAI names them.
    pub finish_reason: &'static str,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    pub completion_tokens: usize,
    /// Where the engine's time went.
    pub timings: engine::Timings,
    /// From the request to the end.
    pub total: Duration,
}

/// A request that was let in; it counts as open until it is dropped with its answer.
pub struct Open {
    service: Arc<Service>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.service.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An answer in the making. Dropped before its end, it cancels the generation.
pub struct Answer {
    open: Open,
    tokens: TokenStream,
    decoder: StreamDecoder,
    stop: StopMatcher,
    /// When the request came in.
    started: Instant,
    prompt_tokens: usize,
    completion_tokens: usize,
    stopped: bool,
    end: Option<End>,
    told: bool,
}

impl Service {
    /// Lets a request in, or turns it away before any work is done for it, when the engine could not take it.
    ///
    /// # Errors
    /// 429 when the queue is full, 503 when the engine has failed.
    pub fn admit(self: &Arc<Self>) -> Result<Open, ApiError> {
        let waiting = self.engine.waiting();
        if !self.engine.is_healthy() {
            Err(ApiError::stopped())
        } else if waiting >= self.settings.queue {
            Err(ApiError::overloaded(waiting, self.metrics.retry_after()))
        } else {
            self.open.fetch_add(1, Ordering::Relaxed);
            Ok(Open { service: Arc::clone(self) })
        }
    }

    /// Requests that were let in and are not answered yet: they are prepared, wait, run or are told.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Hands the prompt of an `open` request to the engine; `started` is when the request came in.
    ///
    /// # Errors
    /// 429 when the queue is full, 400 when the prompt leaves no room for an answer.
    pub fn ask(&self, open: Open, ask: Ask, started: Instant) -> Result<Answer, ApiError> {
        let prompt_tokens = ask.prompt.len();
        let request = Request {
            prompt: ask.prompt,
            max_tokens: ask.max_tokens,
            sampling: ask.sampling,
            stop_token_ids: self.tokenizer.eos_token_ids().to_vec(),
        };
        let refused = |error| ApiError::submit(&error, self.metrics.retry_after());
        let tokens = self.engine.submit(request).map_err(refused)?;
        Ok(Answer {
            open,
            tokens,
            decoder: StreamDecoder::new(),
            stop: StopMatcher::new(ask.stop),
            started,
            prompt_tokens,
            completion_tokens: 0,
            stopped: false,
            end: None,
            told: false,
        })
    }
}

impl Answer {
    /// The next piece; after the end the end again.
    ///
    /// # Errors
    /// When the engine failed or is shutting down.
    pub async fn next(&mut self) -> Result<Piece, ApiError> {
        loop {
            if let Some(end) = self.end {
                self.told = true;
                return Ok(Piece::End(end));
            }
            let text = match self.tokens.next().await {
                Some(Event::Token(token)) => self.token(token.id),
                Some(Event::Finished(finished)) => self.finish(&finished)?,
                Some(Event::Failed(reason)) => return Err(ApiError::internal(&anyhow::anyhow!(reason))),
                None => return Err(ApiError::stopped()),
            };
            if !text.is_empty() {
                return Ok(Piece::Text(text));
            }
        }
    }

    /// The whole of it.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub async fn whole(mut self) -> Result<(String, End), ApiError> {
        let mut text = String::new();
        loop {
            match self.next().await? {
                Piece::Text(piece) => text.push_str(&piece),
                Piece::End(end) => return Ok((text, end)),
            }
        }
    }

    fn token(&mut self, id: u32) -> String {
        if self.stopped {
            return String::new();
        }
        self.completion_tokens += 1;
        if self.completion_tokens == 1 {
            self.open.service.metrics.first_token(self.started.elapsed());
        }
        let piece = self.decoder.push(&self.open.service.tokenizer, id);
        self.tell(&piece)
    }

    /// Passes text by the stop strings; at one of them the engine is told to stop.
    fn tell(&mut self, piece: &str) -> String {
        let (text, met) = self.stop.push(piece);
        if met {
            self.stopped = true;
            self.tokens.cancel();
        }
        text
    }

    /// Notes the end; gives the text that was held back until now.
    fn finish(&mut self, finished: &engine::Finished) -> Result<String, ApiError> {
        let mut text = String::new();
        if !self.stopped {
            let tail = std::mem::take(&mut self.decoder).finish();
            text = self.tell(&tail) + &self.stop.finish();
        }
        let finish_reason = match finished.reason {
            _ if self.stopped => "stop",
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => return Err(ApiError::stopped()),
        };
        self.end = Some(End {
            finish_reason,
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            timings: finished.timings,
            total: self.started.elapsed(),
        });
        Ok(text)
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        match self.end {
            Some(end) if self.told => {
                self.open.service.metrics.answer(end.prompt_tokens, end.completion_tokens, end.total);
            }
            _ => self.open.service.metrics.unfinished(self.completion_tokens),
        }
    }
}
