//! Base models and NF4: files of other programs read as those programs read them.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod nf4;
mod smollm2;
