//! Where measurements go.

pub mod event;
pub mod jsonl;
