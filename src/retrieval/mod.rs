//! Documents to passages, passages to vectors, questions to passages.

pub mod chunk;
pub mod documents;
pub mod encoder;
pub mod index;
pub mod prompt;
