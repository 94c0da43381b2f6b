//! From an embedded image to a launched kernel, on libtorch's memory and in its order.
//!
//! libtorch and this module share the GPU's primary context, so a tensor's address means the same to both. Kernels go to
//! the stream on which libtorch works: what it wrote before is there, what it does after waits, and its allocator may
//! hand a tensor's memory on as soon as the tensor is dropped.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, anyhow, bail};
use cudarc::driver::{CudaContext, LaunchConfig, result, sys};
use tch::{Device, Tensor};

use super::driver::describe;
use super::images::{Capability, IMAGES, fitting};

/// The GPUs in use. A GPU's context and modules belong to the process anyway; this keeps our handles to them.
static GPUS: Mutex<BTreeMap<usize, Arc<Gpu>>> = Mutex::new(BTreeMap::new());

/// A GPU with the kernels loaded so far.
#[derive(Debug)]
pub struct Gpu {
    context: Arc<CudaContext>,
    capability: Capability,
    loaded: Mutex<Loaded>,
}

#[derive(Debug, Default)]
struct Loaded {
    modules: HashMap<&'static str, Module>,
    kernels: HashMap<&'static str, Kernel>,
}

/// A loaded image. Never unloaded: it lives as long as the process.
#[derive(Debug, Clone, Copy)]
struct Module(sys::CUmodule);

/// A kernel, ready to launch.
#[derive(Debug, Clone, Copy)]
pub struct Kernel(sys::CUfunction);

// SAFETY: both are the driver's handles, never unloaded; the driver allows their use from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Send for Kernel {}

/// Bytes of dynamic shared memory that every kernel may have at launch; for more it must be allowed to. The limit is 48 KB
/// with the static part, which is small.
const SHARED_WITHOUT_ASKING: u32 = 32 << 10;

/// The single argument of a kernel.
///
/// # Safety
/// The type must be `#[repr(C)]`, without references, and equal in layout to the struct that the kernel takes; both
/// sides assert its size.
pub unsafe trait KernelParams: Copy {}

impl Gpu {
    /// The GPU that holds a tensor.
    ///
    /// # Errors
    /// When the tensor is not on a GPU, or the driver fails.
    pub fn of(tensor: &Tensor) -> Result<Arc<Self>> {
        match tensor.device() {
            Device::Cuda(index) => Self::at(index),
            other => bail!("a kernel of ours was given a tensor on {other:?}"),
        }
    }

    /// The GPU of this number; [`device::cuda`](super::device::cuda) must have found one before.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn at(index: usize) -> Result<Arc<Self>> {
        let mut gpus = GPUS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = gpus.get(&index) {
            return Ok(gpu.clone());
        }
        let gpu = Arc::new(Self::new(index).with_context(|| format!("cannot use GPU {index}"))?);
        gpus.insert(index, gpu.clone());
        Ok(gpu)
    }

    fn new(index: usize) -> Result<Self> {
        let context = CudaContext::new(index).map_err(driver_error)?;
        let capability = context.compute_capability().map_err(driver_error)?;
        Ok(Self { context, capability, loaded: Mutex::default() })
    }

    /// Compute capability.
    pub fn capability(&self) -> Capability {
        self.capability
    }

    /// Multiprocessors: how many groups of blocks run at a time.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn multiprocessors(&self) -> Result<u32> {
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        Ok(u32::try_from(self.context.attribute(count).map_err(driver_error)?)?)
    }

    /// Bytes of memory, free and in all.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.context.mem_get_info().map_err(driver_error)
    }

    /// Bytes of shared memory that one block may have, when its kernel asks for them at launch.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn shared_memory(&self) -> Result<u32> {
        let limit = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        Ok(u32::try_from(self.context.attribute(limit).map_err(driver_error)?)?)
    }

    /// Makes the GPU's context the calling thread's, as the driver's own calls need it.
    ///
    /// # Errors
    /// When the driver fails.
    pub(super) fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(driver_error)
    }

    /// Whether the program carries `cuda/<family>.cu` for this GPU.
    pub fn has(&self, family: &str) -> bool {
        fitting(&IMAGES, family, self.capability).is_some()
    }

    /// The kernel `name` of `cuda/<family>.cu`, loaded at its first use.
    ///
    /// # Errors
    /// When the program carries no image of the family for this GPU, or the driver refuses it.
    pub fn kernel(&self, family: &'static str, name: &'static str) -> Result<Kernel> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = loaded.kernels.get(name) {
            return Ok(*kernel);
        }
        self.bind()?;
        let module = match loaded.modules.get(family) {
            Some(module) => *module,
            None => self.load(family)?,
        };
        loaded.modules.insert(family, module);
        // SAFETY: the module was loaded above or before, and is never unloaded.
        let function = unsafe { result::module::get_function(module.0, CString::new(name)?) };
        let kernel = Kernel(function.map_err(driver_error).with_context(|| format!("no kernel `{name}`"))?);
        loaded.kernels.insert(name, kernel);
        Ok(kernel)
    }

    fn load(&self, family: &str) -> Result<Module> {
        let (major, minor) = self.capability;
        let image = fitting(&IMAGES, family, self.capability).with_context(|| {
            format!("the program carries no kernel `{family}` for compute capability {major}.{minor}")
        })?;
        // A copy, because the driver may expect the alignment of an allocation, which embedded bytes do not have.
        let bytes = image.bytes.to_vec();
        // SAFETY: the bytes are a whole cubin, or PTX with a final NUL, as build.rs wrote it; the driver copies them.
        let module = unsafe { result::module::load_data(bytes.as_ptr().cast()) };
        let target = image.target;
        Ok(Module(
            module.map_err(driver_error).with_context(|| format!("cannot load `{family}` for {target}"))?,
        ))
    }

    /// Launches a kernel on libtorch's stream.
    ///
    /// # Errors
    /// When the driver refuses the launch. What goes wrong in a running kernel shows at the next synchronisation.
    ///
    /// # Safety
    /// `params` must be the kernel's argument; its pointers must be to memory of this GPU that libtorch's stream may
    /// use now, as large and as aligned as the kernel's contract says, and what the kernel writes must not be shared.
    pub unsafe fn launch<P: KernelParams>(
        &self,
        kernel: Kernel,
        shape: LaunchConfig,
        params: &P,
    ) -> Result<()> {
        self.bind()?;
        let LaunchConfig { grid_dim, block_dim, shared_mem_bytes } = shape;
        if shared_mem_bytes > SHARED_WITHOUT_ASKING {
            allow_shared_memory(kernel, shared_mem_bytes)?;
        }
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: the caller vouches for kernel and argument; the driver copies the argument before it returns.
        let launched = unsafe {
            result::launch_kernel(
                kernel.0,
                grid_dim,
                block_dim,
                shared_mem_bytes,
                current_stream(),
                &mut arguments,
            )
        };
        launched.map_err(driver_error).with_context(|| format!("cannot launch a kernel with {shape:?}"))
    }
}

/// Lets the launches of a kernel have so much shared memory.
fn allow_shared_memory(kernel: Kernel, bytes: u32) -> Result<()> {
    let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: the function belongs to a module that is never unloaded; the caller has bound its context.
    let allowed =
        unsafe { result::function::set_function_attribute(kernel.0, attribute, i32::try_from(bytes)?) };
    allowed
        .map_err(driver_error)
        .with_context(|| format!("a kernel may not have {bytes} bytes of shared memory"))
}

/// libtorch's current stream: the null stream, because tch has no call that sets another and nobody else here does.
/// Streams of our own will be answered here.
fn current_stream() -> sys::CUstream {
    std::ptr::null_mut()
}

fn driver_error(error: result::DriverError) -> anyhow::Error {
    anyhow!("the NVIDIA driver says {}", describe(error))
}
