//! Dumps to packed rows: the only reader of dumps.

pub mod audit;
pub mod clean;
pub mod contamination;
mod decoding;
pub mod duplicates;
pub mod example;
pub mod fit;
pub mod manifest;
pub mod mixture;
pub mod pack;
mod parquet_file;
pub mod prepare;
pub mod reader;
pub mod report;
pub mod screen;
pub mod source;
pub mod split;
pub mod store;
pub mod template;
pub mod tokenizer;
pub mod trace;
pub mod words;
