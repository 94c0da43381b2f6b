//! Generation: token ids in, token ids out. Knows no chat and no text.
//!
//! One thread owns the model ([`Engine::spawn`]); everyone else holds an [`EngineHandle`], submits a
//! [`Request`] and reads a [`TokenStream`]. The thread answers as many requests at once as
//! [`EngineOptions`] says: one alone is a batch of one, and no answer depends on what else is answered beside it but for
//! the rounding of products of another size.

mod causal_lm;
mod handle;
pub mod memory;
mod queue;
mod running;
pub mod sampler;
mod stream;
mod worker;

pub use causal_lm::CausalLm;
pub use handle::{Engine, EngineHandle, EngineOptions, Request, SubmitError};
pub use sampler::Sampling;
pub use stream::{Event, FinishReason, Finished, Generation, Timings, Token, TokenStream, Usage};
