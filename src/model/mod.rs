//! One decoder for Granite and Llama, with forward and backward written out.

pub mod batch;
pub mod config;
pub mod continuation;
pub mod decoder;
pub mod fused;
pub mod init;
pub mod kv_cache;
pub mod layer;
pub mod linear;
pub mod load;
pub mod noise;
pub mod params;
pub mod random;
pub mod weights;
