//! Documents to passages, passages to vectors, questions to passages.
