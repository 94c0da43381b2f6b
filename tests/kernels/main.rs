//! Kernels: how they are compiled and embedded, each against its twin on a GPU, and NF4 against bitsandbytes.

mod adapter_dropout;
mod attention;
mod bitsandbytes;
mod build;
mod doctor;
mod elementwise;
mod gpu;

use std::io::Write as _;

/// Says what was not tested and why, past the test runner's capture of output.
fn skipped(what: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "skipped: {what}: {why}");
}
