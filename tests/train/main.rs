//! The training loop: optimisers and schedules against torch, bitsandbytes and transformers; runs that stop and go on.

#![expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod optimizer;
mod options;
mod refusals;
mod resume;
mod schedule;
mod tiny;
