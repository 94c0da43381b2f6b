//! The program as its users meet it: help texts and the errors of a first hour, by snapshot.
//!
//! `INSTA_UPDATE=always cargo test --release --test cli` writes the snapshots anew; read the difference.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

mod errors;
mod help;
mod stdout;

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

/// Runs the program in `folder` and tells its exit code and what it printed.
fn granite(folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_granite"))
        .args(arguments)
        .current_dir(folder)
        // A wide, fixed terminal, and no network in tests.
        .env("COLUMNS", "100")
        .env("HF_HUB_OFFLINE", "1")
        // Told by `train`, and another on every machine.
        .env("OMP_NUM_THREADS", "1")
        // The same on a machine with a GPU and on one without.
        .env("CUDA_VISIBLE_DEVICES", "")
        .env_remove("GRANITE_API_KEY")
        .output()
        .unwrap();
    let mut told = String::new();
    writeln!(told, "exit code: {}", output.status.code().unwrap()).unwrap();
    for (name, stream) in [("stdout", output.stdout), ("stderr", output.stderr)] {
        let text = String::from_utf8(stream).unwrap().replace(&folder.display().to_string(), "[folder]");
        writeln!(told, "----- {name} -----\n{}", text.trim_end()).unwrap();
    }
    told
}
