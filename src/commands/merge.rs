//! `granite merge`

use anyhow::{Result, bail};

use crate::cli::MergeArgs;

/// Runs the subcommand.
///
/// # Errors
/// What went wrong.
pub fn run(_args: &MergeArgs) -> Result<()> {
    bail!("`granite merge` is not built yet")
}
