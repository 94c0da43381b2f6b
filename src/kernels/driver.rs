//! What the NVIDIA driver says of itself and its GPUs, asked without making a context.

use std::ffi::CStr;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use thiserror::Error;

use super::images::Capability;

/// The driver and its GPUs, at least one.
#[derive(Debug, Clone)]
pub struct Driver {
    /// The newest CUDA it runs: major, minor.
    pub cuda: (i32, i32),
    /// In the driver's order, `CUDA_VISIBLE_DEVICES` applied.
    pub gpus: Vec<GpuInfo>,
}

/// One GPU.
#[derive(Debug, Clone)]
pub struct GpuInfo {
    /// `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Bytes of memory, used or free.
    pub memory: usize,
    /// Compute capability.
    pub capability: Capability,
}

/// Why there is no GPU to compute on.
#[derive(Debug, Clone, Error)]
pub enum NoGpu {
    /// libcuda is not installed.
    #[error("there is no NVIDIA driver (`libcuda.so.1` cannot be loaded)")]
    NoDriver,
    /// libcuda is there and does not work.
    #[error("the NVIDIA driver does not start: {0}")]
    Failed(String),
    /// The driver sees no GPU.
    #[error("the NVIDIA driver sees no GPU")]
    NoDevice,
}

/// Asks the driver.
///
/// # Errors
/// When there is no driver, it does not start, or it sees no GPU.
pub fn probe() -> Result<Driver, NoGpu> {
    // cudarc panics where a library is missing, so nothing else of it may run before this.
    // SAFETY: loading libcuda runs its initialisers, which have no preconditions.
    if !unsafe { sys::is_culib_present() } {
        return Err(NoGpu::NoDriver);
    }
    match result::init() {
        Ok(()) => {}
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Err(NoGpu::NoDevice),
        Err(error) => return Err(failed(error)),
    }
    let count = result::device::get_count().map_err(failed)?;
    let gpus = (0..count).map(gpu).collect::<Result<Vec<_>, _>>().map_err(failed)?;
    if gpus.is_empty() {
        return Err(NoGpu::NoDevice);
    }
    Ok(Driver { cuda: version().map_err(failed)?, gpus })
}

fn failed(error: DriverError) -> NoGpu {
    NoGpu::Failed(describe(error))
}

/// The driver's words for an error: `CUDA_ERROR_OUT_OF_MEMORY (out of memory)`.
pub fn describe(error: DriverError) -> String {
    let text = |words: Result<&CStr, DriverError>| {
        words.map_or_else(|_| format!("{:?}", error.0), |words| words.to_string_lossy().into_owned())
    };
    format!("{} ({})", text(error.error_name()), text(error.error_string()))
}

fn version() -> Result<(i32, i32), DriverError> {
    let mut version = 0;
    // SAFETY: the driver is loaded (`probe`), and the pointer is to a live int.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok((version / 1000, version % 1000 / 10))
}

fn gpu(index: i32) -> Result<GpuInfo, DriverError> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    let device = result::device::get(index)?;
    // SAFETY: `device` is the driver's own handle, just given, and stays valid for the life of the process.
    let (memory, major, minor) = unsafe {
        (
            result::device::total_mem(device)?,
            result::device::get_attribute(device, MAJOR)?,
            result::device::get_attribute(device, MINOR)?,
        )
    };
    Ok(GpuInfo { name: result::device::get_name(device)?, memory, capability: (major, minor) })
}
