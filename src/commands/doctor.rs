//! `granite doctor`

use anyhow::{Result, bail};

use crate::cli::DoctorArgs;

/// Runs the subcommand.
///
/// # Errors
/// What went wrong.
pub fn run(_args: &DoctorArgs) -> Result<()> {
    bail!("`granite doctor` is not built yet")
}
