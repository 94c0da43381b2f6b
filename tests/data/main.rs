//! `granite prepare` and what it is made of, on real data where there is some.

#![expect(clippy::unwrap_used, reason = "a test panics where it fails")]

mod chat;
mod fixture;
mod forms;
mod pipeline;
mod trusted;
