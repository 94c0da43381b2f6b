//! `granite serve`

use anyhow::{Result, bail};

use crate::cli::ServeArgs;

/// Runs the subcommand.
///
/// # Errors
/// What went wrong.
pub fn run(_args: &ServeArgs) -> Result<()> {
    bail!("`granite serve` is not built yet")
}
