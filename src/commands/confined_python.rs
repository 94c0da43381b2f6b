//! `granite confined-python`: the process that `granite eval` starts for each program that a model wrote.

use anyhow::{Context as _, Result};

use crate::cli::ConfinedPythonArgs;
use crate::eval::sandbox::confine;

/// Runs the subcommand; comes back only with an error.
///
/// # Errors
/// When the process cannot be confined.
pub fn run(args: &ConfinedPythonArgs) -> Result<()> {
    let confinement =
        serde_json::from_str(&args.confinement).context("this subcommand is for `granite eval` alone")?;
    match confine::become_python(&confinement)? {}
}
