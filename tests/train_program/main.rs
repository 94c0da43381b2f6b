//! `granite train` as a process: from a dump to a run, killed, interrupted, damaged, and gone on.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

mod bench;
mod damaged;
mod interrupted;
mod repeated;
mod runs;
