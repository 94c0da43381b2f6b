//! `granite eval`

use anyhow::{Result, bail};

use crate::cli::EvalArgs;

/// Runs the subcommand.
///
/// # Errors
/// What went wrong.
pub fn run(_args: &EvalArgs) -> Result<()> {
    bail!("`granite eval` is not built yet")
}
