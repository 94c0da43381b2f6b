//! Generation: token ids in, token ids out.
