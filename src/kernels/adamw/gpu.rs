//! The launchers of cuda/adamw.cu. Their operands have been checked.

use anyhow::{Context as _, Result};
use cudarc::driver::LaunchConfig;
use tch::Tensor;

use super::{AdamWStep, BLOCK, Coded, GRAD_PARTIALS, blocks_of};
use crate::kernels::gpu::{Gpu, KernelParams};

/// Threads of a block of all kernels but that of 8-bit moments.
const THREADS: u32 = 256;

/// Threads of a block of the kernels of 8-bit moments, a warp for each block of moments.
const THREADS_8BIT: u32 = 512;

/// Blocks of those kernels that a multiprocessor holds.
const RESIDENT_8BIT: u32 = 2;

/// The argument of the kernels in cuda/adamw.cu that make the norm, field by field as there.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct GradNormParams {
    g: u64,
    partials: u64,
    out: u64,
    elements: u64,
    vectorised: u64,
}

/// The argument of the other kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct AdamWParams {
    p: u64,
    copy: u64,
    g: u64,
    m: u64,
    m_absmax: u64,
    v: u64,
    v_absmax: u64,
    norm_squared: u64,
    max_norm: f64,
    elements: u64,
    beta1: f32,
    beta1_rest: f32,
    beta2: f32,
    beta2_rest: f32,
    decay: f32,
    rate: f32,
    root_scale: f32,
    eps: f32,
    vectorised: u64,
}

const _: () = assert!(size_of::<GradNormParams>() == 40, "cuda/adamw.cu asserts the same size");
const _: () = assert!(size_of::<AdamWParams>() == 120, "cuda/adamw.cu asserts the same size");

// SAFETY: `repr(C)`, numbers only, the same fields in the same order as in cuda/adamw.cu.
unsafe impl KernelParams for GradNormParams {}
// SAFETY: as above.
unsafe impl KernelParams for AdamWParams {}

pub(super) fn norm_squared(g: &Tensor, partials: &Tensor, out: &Tensor) -> Result<()> {
    let gpu = Gpu::of(g)?;
    let params = GradNormParams {
        g: address(g),
        partials: address(partials),
        out: address(out),
        elements: g.numel() as u64,
        vectorised: u64::from(address(g).is_multiple_of(16)),
    };
    for (name, blocks) in [("grad_norm_partials", GRAD_PARTIALS as u32), ("grad_norm_sum", 1)] {
        let kernel = gpu.kernel("adamw", name)?;
        // SAFETY: the operands have the kernel's dtypes and lengths and this GPU reaches them (checked by the caller), and nobody
        // else writes `partials` and `out`; libtorch orders their release after these launches.
        unsafe { gpu.launch(kernel, shape(blocks, THREADS), &params)? };
    }
    Ok(())
}

pub(super) fn adamw_8bit(
    p: &Tensor,
    copy: Option<&Tensor>,
    g: &Tensor,
    m: Coded<'_>,
    v: Coded<'_>,
    norm_squared: &Tensor,
    step: &AdamWStep,
) -> Result<()> {
    let params = AdamWParams {
        m_absmax: address(m.1),
        v_absmax: address(v.1),
        ..AdamWParams::new(p, copy, g, [m.0, v.0], norm_squared, step)
    };
    let (whole, rest) = params.whole_blocks();
    let gpu = Gpu::of(g)?;
    for (name, params) in [("adamw_8bit", whole), ("adamw_8bit_any", rest)] {
        if params.elements == 0 {
            continue;
        }
        let blocks = blocks_of(params.elements as i64) as u64;
        let warps = u64::from(THREADS_8BIT / 32);
        let resident = u64::from(RESIDENT_8BIT * gpu.multiprocessors()?);
        // At most `resident`, which is a small number.
        let grid = blocks.div_ceil(warps).min(resident) as u32;
        let kernel = gpu.kernel("adamw", name)?;
        // SAFETY: the operands have the kernel's dtypes and lengths and this GPU reaches them (checked by the caller), are aligned
        // as the kernel wants them (`whole_blocks`), and nobody else touches what it writes; libtorch orders their
        // release after this launch.
        unsafe { gpu.launch(kernel, shape(grid, THREADS_8BIT), &params)? };
    }
    Ok(())
}

pub(super) fn adamw_32bit(
    p: &Tensor,
    copy: Option<&Tensor>,
    g: &Tensor,
    m: &Tensor,
    v: &Tensor,
    norm_squared: &Tensor,
    step: &AdamWStep,
) -> Result<()> {
    let mut params = AdamWParams::new(p, copy, g, [m, v], norm_squared, step);
    if params.elements == 0 {
        return Ok(());
    }
    let wide = [params.p, params.g, params.m, params.v];
    params.vectorised =
        u64::from(wide.iter().all(|at| at.is_multiple_of(16)) && params.copy.is_multiple_of(8));
    let blocks = params.elements.div_ceil(u64::from(THREADS) * 4);
    let blocks = u32::try_from(blocks).context("so many parameters do not fit one launch")?;
    let gpu = Gpu::of(g)?;
    let kernel = gpu.kernel("adamw", "adamw_32bit")?;
    // SAFETY: the operands have the kernel's dtypes and lengths and this GPU reaches them (checked by the caller), and nobody else
    // touches what it writes; libtorch orders their release after this launch.
    unsafe { gpu.launch(kernel, shape(blocks, THREADS), &params) }
}

impl AdamWParams {
    fn new(
        p: &Tensor,
        copy: Option<&Tensor>,
        g: &Tensor,
        [m, v]: [&Tensor; 2],
        norm_squared: &Tensor,
        step: &AdamWStep,
    ) -> Self {
        Self {
            p: address(p),
            copy: copy.map_or(0, address),
            g: address(g),
            m: address(m),
            m_absmax: 0,
            v: address(v),
            v_absmax: 0,
            norm_squared: address(norm_squared),
            max_norm: step.max_norm,
            elements: p.numel() as u64,
            beta1: step.beta1 as f32,
            beta1_rest: (1.0 - step.beta1) as f32,
            beta2: step.beta2 as f32,
            beta2_rest: (1.0 - step.beta2) as f32,
            decay: (1.0 - step.lr * step.weight_decay) as f32,
            rate: (step.lr / step.correction1) as f32,
            root_scale: (1.0 / step.correction2) as f32,
            eps: step.eps as f32,
            vectorised: 0,
        }
    }

    /// The part for `adamw_8bit`, whole blocks of aligned operands, and what is left for `adamw_8bit_any`.
    fn whole_blocks(self) -> (Self, Self) {
        let aligned = self.p.is_multiple_of(16)
            && self.g.is_multiple_of(16)
            && self.copy.is_multiple_of(8)
            && self.m.is_multiple_of(4)
            && self.v.is_multiple_of(4);
        let blocks = if aligned { self.elements / BLOCK as u64 } else { 0 };
        let elements = blocks * BLOCK as u64;
        let rest = Self {
            p: self.p + 4 * elements,
            copy: if self.copy == 0 { 0 } else { self.copy + 2 * elements },
            g: self.g + 4 * elements,
            m: self.m + elements,
            m_absmax: self.m_absmax + 4 * blocks,
            v: self.v + elements,
            v_absmax: self.v_absmax + 4 * blocks,
            elements: self.elements - elements,
            ..self
        };
        (Self { elements, ..self }, rest)
    }
}

fn address(tensor: &Tensor) -> u64 {
    tensor.data_ptr() as u64
}

fn shape(blocks: u32, threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}
