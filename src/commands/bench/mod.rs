//! `granite bench`: how fast this machine runs what the other subcommands are made of.

mod kernels;
mod roofline;
mod train;

use anyhow::Result;

use crate::cli::{BenchArgs, BenchCommand};

/// Runs the subcommand.
///
/// # Errors
/// When there is no GPU to measure, or what is measured fails.
pub fn run(args: &BenchArgs) -> Result<()> {
    match &args.command {
        BenchCommand::Kernels(args) => kernels::run(args),
        BenchCommand::Train(args) => train::run(args),
    }
}
