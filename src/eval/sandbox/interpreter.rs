//! The user's Python, and what belongs to it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::error::{HintExt as _, user_error};

/// What `probe.py` prints.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Interpreter {
    /// The program itself, behind links and wrapper scripts.
    pub executable: PathBuf,
    /// `3.11.7`
    pub version: String,
    /// The folders of its library.
    pub folders: Vec<PathBuf>,
    /// Shared libraries that it and its modules load, the loader among them.
    pub libraries: Vec<PathBuf>,
}

/// Asks the first `python3` of the path; it runs unconfined, with a program of ours.
pub(super) fn find() -> Result<Interpreter> {
    let hint = "install Python 3, or leave `eval.humaneval` and `eval.mbpp` out";
    let output = Command::new("python3")
        .args(["-I", "-c", include_str!("probe.py")])
        .output()
        .context("cannot run `python3`, which code is run with")
        .hint(hint)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
        return Err(user_error(format!("`python3` failed with {}: {said}", output.status), hint));
    }
    serde_json::from_slice(&output.stdout).context("`python3` did not say where its library is")
}
