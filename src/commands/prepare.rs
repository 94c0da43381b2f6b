//! `granite prepare`

use anyhow::{Result, bail};

use crate::cli::PrepareArgs;

/// Runs the subcommand.
///
/// # Errors
/// What went wrong.
pub fn run(_args: &PrepareArgs) -> Result<()> {
    bail!("`granite prepare` is not built yet")
}
