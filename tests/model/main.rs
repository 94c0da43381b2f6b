//! The decoder against transformers and PEFT (committed fixtures) and against a second, plainer decoder under
//! libtorch's autograd (`twin`), on packed batches.
//!
//! Tolerance is never a literal: ours may be off from the float64 reference by twice what the float32 reference
//! is off, plus twice the rounding of the reference itself.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

mod cached_generation;
mod dropout;
mod fixture;
mod misuse;
mod oracle;
mod packing;
mod peft_files;
mod tolerance;
mod twin;
