//! Which device computes.

use std::sync::OnceLock;

use anyhow::{Result, anyhow};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::{Cuda, Device};
use thiserror::Error;

use super::driver::{self, NoGpu};
use super::images::{Capability, IMAGES, fitting, portable_families};
use crate::error::HintExt as _;
use crate::progress;

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

/// Why the GPU cannot be used.
#[derive(Debug, Clone, Error)]
pub enum CudaError {
    /// There is none.
    #[error(transparent)]
    NoGpu(#[from] NoGpu),
    /// The program was built without nvcc.
    #[error("this program was built without nvcc and carries no GPU kernels")]
    NoKernels,
    /// The program's kernels do not run on this GPU.
    #[error("`{name}` has compute capability {}.{}, the kernels need 8.0 or newer", .capability.0, .capability.1)]
    Unsupported {
        /// The GPU.
        name: String,
        /// What it has.
        capability: Capability,
    },
    /// libtorch's CUDA half cannot be loaded.
    #[error("cannot load libtorch's CUDA half: {0}")]
    Libtorch(String),
    /// libtorch loads and sees no GPU.
    #[error("libtorch cannot use the GPU: it was built for CUDA {built}, the driver runs up to {}.{}", .driver.0, .driver.1)]
    Refused {
        /// `13.0`.
        built: String,
        /// The newest CUDA of the driver.
        driver: (i32, i32),
    },
}

impl CudaError {
    /// The next step.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NoGpu(NoGpu::NoDriver) => {
                "install NVIDIA driver 580 or newer, or compute with `--device cpu`"
            }
            Self::NoGpu(NoGpu::Failed(_)) => "does `nvidia-smi` work? else compute with `--device cpu`",
            Self::NoGpu(NoGpu::NoDevice) => {
                "does CUDA_VISIBLE_DEVICES hide it? else compute with `--device cpu`"
            }
            Self::NoKernels => {
                "build it again where scripts/setup has installed nvcc, or compute with `--device cpu`"
            }
            Self::Unsupported { .. } => "use an A100, RTX 30 or newer, or compute with `--device cpu`",
            Self::Libtorch(_) => {
                "put the folders of a torch 2.11 with CUDA on LD_LIBRARY_PATH: `torch/lib` and each `nvidia/*/lib`"
            }
            Self::Refused { .. } => "install NVIDIA driver 580 or newer, or compute with `--device cpu`",
        }
    }
}

/// Opens the device: loads libtorch's CUDA half when a GPU is asked for or may be there.
///
/// Must come before anything else asks libtorch about CUDA: libtorch makes up its mind at the first question.
///
/// # Errors
/// When a GPU is asked for and there is none, with what was found missing.
pub fn open(choice: DeviceChoice) -> Result<Device> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto => Ok(cuda().unwrap_or_else(|error| {
            // No GPU is nothing to talk about; a GPU that lies idle is.
            if !matches!(error, CudaError::NoGpu(NoGpu::NoDriver | NoGpu::NoDevice)) {
                progress::note(format!("note: computing on the processor: {error}\nhint: {}", error.hint()));
            }
            Device::Cpu
        })),
        DeviceChoice::Cuda => cuda()
            .map_err(|error| (anyhow!("no GPU to compute on: {error}"), error))
            .or_else(|(message, error)| Err(message).hint(error.hint())),
    }
}

/// The first GPU, ready for libtorch and for our kernels; the work is done once a process.
///
/// # Errors
/// Why there is none.
pub fn cuda() -> Result<Device, CudaError> {
    static OPENED: OnceLock<Result<(), CudaError>> = OnceLock::new();
    OPENED.get_or_init(open_cuda).clone().map(|()| Device::Cuda(0))
}

fn open_cuda() -> Result<(), CudaError> {
    let driver = driver::probe()?;
    if let Some(gpu) = driver.gpus.first() {
        runs_kernels(&gpu.name, gpu.capability)?;
    }
    load_libtorch_cuda()?;
    if !Cuda::is_available() {
        let version = tch::utils::version_cudart();
        let built = format!("{}.{}", version / 1000, version % 1000 / 10);
        return Err(CudaError::Refused { built, driver: driver.cuda });
    }
    // cuDNN would choose its algorithms by timing them, and two runs could choose differently. tch binds no other
    // determinism switch; on a single stream cuBLAS needs none.
    Cuda::cudnn_set_benchmark(false);
    Ok(())
}

/// Whether the program carries each of its kernels for such a GPU, but for those of one architecture alone.
fn runs_kernels(name: &str, capability: Capability) -> Result<(), CudaError> {
    if IMAGES.is_empty() {
        return Err(CudaError::NoKernels);
    }
    if portable_families().into_iter().any(|family| fitting(&IMAGES, family, capability).is_none()) {
        return Err(CudaError::Unsupported { name: name.to_string(), capability });
    }
    Ok(())
}

/// The program links libtorch's CPU half alone, so that it starts where there is no CUDA; the other half registers itself
/// when loaded. Its symbols must be visible to libraries that it loads in turn.
fn load_libtorch_cuda() -> Result<(), CudaError> {
    // SAFETY: loading libtorch_cuda runs its initialisers, which register kernels and have no preconditions.
    let library = unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) };
    // It is never closed: libtorch holds pointers into it.
    library.map(std::mem::forget).map_err(|error| CudaError::Libtorch(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_always_there() {
        assert_eq!(open(DeviceChoice::Cpu).ok(), Some(Device::Cpu));
    }

    #[test]
    fn automatic_choice_and_demand_agree() {
        let automatic = open(DeviceChoice::Auto).expect("automatic choice cannot fail");
        match open(DeviceChoice::Cuda) {
            Ok(device) => assert_eq!(device, automatic),
            Err(error) => {
                assert_eq!(automatic, Device::Cpu);
                let told = crate::error::render(&error);
                assert!(
                    told.starts_with("error: no GPU to compute on: ") && told.contains("\nhint: "),
                    "{told}"
                );
            }
        }
    }

    #[test]
    fn an_old_gpu_is_told_what_is_missing() {
        if IMAGES.is_empty() {
            assert!(matches!(runs_kernels("any", (9, 0)), Err(CudaError::NoKernels)));
            return;
        }
        assert!(runs_kernels("NVIDIA H100", (9, 0)).is_ok());
        assert!(runs_kernels("NVIDIA A100", (8, 0)).is_ok() && runs_kernels("RTX 5090", (12, 0)).is_ok());
        let error = runs_kernels("Tesla T4", (7, 5)).expect_err("no kernel is compiled for it").to_string();
        assert_eq!(error, "`Tesla T4` has compute capability 7.5, the kernels need 8.0 or newer");
    }
}
