//! Base models and NF4: files of other programs read as those programs read them.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod config;
mod gguf;
mod hugging_face;
mod nf4;
mod nf4_cache;
mod smollm2;

/// The folder of a tiny model that `scripts/oracle/models.py` wrote.
fn tiny(family: &str) -> String {
    format!("{}/tests/fixtures/tiny-{family}", env!("CARGO_MANIFEST_DIR"))
}
