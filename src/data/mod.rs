//! Dumps to packed rows: the only reader of dumps.

pub mod example;
pub mod manifest;
pub mod store;
pub mod template;
pub mod tokenizer;
