//! What comes back from the engine: tokens as they are made, then one last event.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Result, bail};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_stream::Stream;

/// A generated token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Token {
    /// Token id.
    pub id: u32,
    /// Its log-probability in nats under the model itself, before temperature, top-k and top-p.
    pub logprob: f64,
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model said a stop token; it is not part of the stream.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
    /// [`TokenStream::cancel`], or the engine was shut down.
    Cancelled,
}

/// Tokens that went in and came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens in the stream; the stop token is not one of them.
    pub completion_tokens: usize,
}

/// Where the time went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timings {
    /// From submission to the engine taking the request up.
    pub queued: Duration,
    /// The prompt's way through the model, up to the first token.
    pub prefill: Duration,
    /// All tokens after the first.
    pub decode: Duration,
}

/// The end of a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// Tokens in and out.
    pub usage: Usage,
    /// Where the time went.
    pub timings: Timings,
}

/// One thing that happened to a request. After [`Event::Finished`] or [`Event::Failed`] nothing comes.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A token.
    Token(Token),
    /// The end.
    Finished(Finished),
    /// The engine could not go on with this request, and why.
    Failed(String),
}

/// A whole generation, as [`TokenStream::wait`] gives it.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The tokens, without the stop token.
    pub tokens: Vec<Token>,
    /// How it ended.
    pub finished: Finished,
}

impl Generation {
    /// The token ids.
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }
}

/// The events of one request. Dropping it cancels the request.
#[derive(Debug)]
pub struct TokenStream {
    events: UnboundedReceiver<Event>,
    cancelled: Arc<AtomicBool>,
}

impl TokenStream {
    /// The next event, or `None` after the last.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// As [`next`](Self::next), for code outside an async runtime; inside one it panics.
    pub fn blocking_next(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }

    /// Asks the engine to stop; [`Event::Finished`] with [`FinishReason::Cancelled`] follows.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Waits for the end, outside an async runtime.
    ///
    /// # Errors
    /// When the engine failed.
    pub fn wait(mut self) -> Result<Generation> {
        let mut tokens = Vec::new();
        while let Some(event) = self.blocking_next() {
            match event {
                Event::Token(token) => tokens.push(token),
                Event::Finished(finished) => return Ok(Generation { tokens, finished }),
                Event::Failed(reason) => bail!("generation failed: {reason}"),
            }
        }
        bail!("generation failed: the engine stopped")
    }
}

impl Stream for TokenStream {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.events.poll_recv(context)
    }
}

/// The engine's end of a [`TokenStream`].
#[derive(Debug)]
pub(super) struct EventSender {
    events: UnboundedSender<Event>,
    cancelled: Arc<AtomicBool>,
}

impl EventSender {
    /// Both ends of a stream.
    pub(super) fn pair() -> (Self, TokenStream) {
        let (sender, receiver) = unbounded_channel();
        let cancelled = Arc::new(AtomicBool::new(false));
        let stream = TokenStream { events: receiver, cancelled: Arc::clone(&cancelled) };
        (Self { events: sender, cancelled }, stream)
    }

    /// Whether nobody wants the rest.
    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed) || self.is_abandoned()
    }

    /// Whether the stream was dropped, so that no event can reach anyone.
    pub(super) fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// Sends; a reader that has gone is seen by [`is_cancelled`](Self::is_cancelled) before the next step.
    pub(super) fn send(&self, event: Event) {
        let _ = self.events.send(event);
    }
}
