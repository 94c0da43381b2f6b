//! Generation: token ids in, token ids out. Knows no chat and no text.
//!
//! One thread owns the model ([`Engine::spawn`]); everyone else holds an [`EngineHandle`], submits a
//! [`Request`] and reads a [`TokenStream`]. This form answers one sequence at a time; continuous batching
//! replaces [`worker`] and leaves the handle as it is.

mod handle;
mod queue;
pub mod sampler;
mod stream;
mod worker;

pub use handle::{Engine, EngineHandle, EngineOptions, Request, SubmitError};
pub use sampler::Sampling;
pub use stream::{Event, FinishReason, Finished, Generation, Timings, Token, TokenStream, Usage};
pub use worker::CausalLm;
