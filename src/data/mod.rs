//! Dumps to packed rows: the only reader of dumps.

pub mod example;
pub mod template;
pub mod tokenizer;
