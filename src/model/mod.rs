//! One decoder for Granite and Llama, with forward and backward written out.

pub mod batch;
pub mod config;
pub mod decoder;
pub mod kv_cache;
pub mod params;
pub mod weights;
