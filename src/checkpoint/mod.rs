//! Files of models and runs: the only place that names them.

pub mod adapter;
pub mod base;
pub mod export;
pub mod fingerprint;
pub mod form;
pub mod gguf;
pub mod hub;
pub mod hugging_face;
mod mapped;
pub mod merge;
pub mod nf4_cache;
pub mod open;
pub mod prequantized;
pub mod run;
pub mod safetensors;
pub mod tensor_file;
pub mod tokenizer_files;
