//! What `granite eval` measures, on real questions where they are at hand and on small ones in any case.

#![expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod spider;
