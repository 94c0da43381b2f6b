//! `granite bench`: how fast this machine runs what the other subcommands are made of.

mod attention;
mod attention_page;
mod eager;
mod kernels;
mod roofline;
mod train;

use anyhow::Result;
use tch::Device;

use crate::cli::{BenchArgs, BenchCommand};
use crate::error::user_error;
use crate::kernels::device;

/// Runs the subcommand.
///
/// # Errors
/// When there is no GPU to measure, or what is measured fails.
pub fn run(args: &BenchArgs) -> Result<()> {
    match &args.command {
        BenchCommand::Attention(args) => attention::run(args),
        BenchCommand::Kernels(args) => kernels::run(args),
        BenchCommand::Train(args) => train::run(args),
    }
}

/// The GPU on which kernels are measured.
fn gpu() -> Result<Device> {
    device::cuda().map_err(|error| {
        user_error(
            format!("kernels are measured on a GPU: {error}"),
            "run this where there is an NVIDIA GPU; `granite doctor` says what this machine lacks",
        )
    })
}
