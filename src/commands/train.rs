//! `granite train`

use anyhow::{Result, bail};

use crate::cli::TrainArgs;

/// Runs the subcommand.
///
/// # Errors
/// What went wrong.
pub fn run(_args: &TrainArgs) -> Result<()> {
    bail!("`granite train` is not built yet")
}
