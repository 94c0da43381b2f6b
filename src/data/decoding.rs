//! Columns that others wrote, decoded without trust.

use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Result, anyhow};

/// Runs what decodes parquet or Arrow: on some damaged files the libraries panic, which is an error here.
///
/// # Errors
/// Those of `decode`, and its panic.
pub fn decoding<T>(decode: impl FnOnce() -> Result<T>) -> Result<T> {
    // What `decode` borrows is not used after a panic: the error ends the reading.
    catch_unwind(AssertUnwindSafe(decode))
        .unwrap_or_else(|_| Err(anyhow!("the file is damaged: its pages cannot be decoded")))
}
