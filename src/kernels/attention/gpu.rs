//! The launches of cuda/attention_*.cu. Operands are checked where they are made, by [`Heads::of`].

use anyhow::{Result, bail, ensure};
use cudarc::driver::{LaunchConfig, sys};
use tch::{Kind, Tensor};

use super::plan::{AttentionKernel, AttentionPlan};
use super::scratch::{AttentionScratch, Buffers};
use super::{Accumulation, tensor_map};
use crate::kernels::gpu::{Gpu, KernelParams};

/// Elements of 16 bytes.
const VECTOR: i64 = 8;

/// Threads of a block of each kernel.
const HOPPER_THREADS: u32 = 384;
const PORTABLE_FORWARD_THREADS: u32 = 128;
const PORTABLE_BACKWARD_THREADS: u32 = 256;
const GRADIENT_THREADS: u32 = 128;

/// Bytes of dynamic shared memory, for heads of 64 and 128; the sources assert the same numbers.
const HOPPER_FORWARD_BYTES: [u32; 2] = [82_056, 163_976];
const HOPPER_BACKWARD_BYTES: [u32; 2] = [124_344, 214_456];
const PORTABLE_FORWARD_BYTES: [u32; 2] = [32_768, 65_536];
const PORTABLE_BACKWARD_BYTES: [u32; 2] = [66_688, 164_992];

/// Of the kernels for heads of 128 on GPUs whose multiprocessors have 100 KB of shared memory.
const COMPACT_FORWARD_BYTES: u32 = 49_152;
const COMPACT_BACKWARD_BYTES: u32 = 82_560;

/// Such a GPU lets a block have less than this.
const COMPACT_BELOW: u32 = 128 << 10;

/// A bf16 operand, `[tokens, heads, head_dim]`, the heads of a token side by side.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads<'a> {
    name: &'static str,
    tensor: &'a Tensor,
    tokens: i64,
    heads: i64,
    head_dim: i64,
    /// Elements from a token to the next.
    stride: u64,
}

impl<'a> Heads<'a> {
    /// The operand of a plan with so many heads.
    ///
    /// # Errors
    /// When dtype, shape, layout, alignment or device are other than kernels take.
    pub(super) fn of(
        name: &'static str,
        tensor: &'a Tensor,
        plan: &AttentionPlan,
        heads: i64,
    ) -> Result<Self> {
        plan.ensure_device(name, tensor)?;
        Self::new(name, tensor, [plan.tokens(), heads, plan.shape.head_dim])
    }

    fn new(name: &'static str, tensor: &'a Tensor, shape: [i64; 3]) -> Result<Self> {
        let [tokens, heads, head_dim] = shape;
        let (kind, size, strides) = (tensor.kind(), tensor.size(), tensor.stride());
        ensure!(kind == Kind::BFloat16, "`{name}` is {kind:?}, expected BFloat16");
        ensure!(size == shape, "`{name}` is {size:?}, expected {shape:?}");
        let &[by_token, by_head, step] = strides.as_slice() else {
            bail!("`{name}` has strides {strides:?}")
        };
        let width = heads * head_dim;
        ensure!(
            step == 1 && (heads == 1 || by_head == head_dim),
            "the heads of `{name}` do not lie side by side: strides {strides:?}"
        );
        // libtorch gives the stride of a dimension of one any value.
        let stride = if tokens <= 1 { width } else { by_token };
        ensure!(stride >= width, "tokens of `{name}` overlap: strides {strides:?}");
        let address = tensor.data_ptr() as u64;
        ensure!(
            stride % VECTOR == 0 && head_dim % VECTOR == 0 && address.is_multiple_of(16),
            "`{name}` begins at address {address:#x} with {stride} elements from token to token; the kernels take multiples of \
             16 bytes"
        );
        Ok(Self { name, tensor, tokens, heads, head_dim, stride: stride.unsigned_abs() })
    }

    fn address(&self) -> u64 {
        self.tensor.data_ptr() as u64
    }

    /// For loads of 64 columns of one head and so many rows.
    fn map(&self, gpu: &Gpu, rows: u32) -> Result<sys::CUtensorMap> {
        let size = [self.head_dim, self.heads, self.tokens].map(i64::unsigned_abs);
        tensor_map::encode(gpu, self.name, self.address(), size, self.stride, rows)
    }
}

/// The operands of a backward pass.
#[derive(Debug)]
pub(super) struct Backward<'a> {
    pub q: Heads<'a>,
    pub k: Heads<'a>,
    pub v: Heads<'a>,
    pub o: Heads<'a>,
    pub d_o: Heads<'a>,
    pub dq: Heads<'a>,
    pub dk: Heads<'a>,
    pub dv: Heads<'a>,
    /// `[heads, tokens]` f32, contiguous.
    pub lse: &'a Tensor,
    pub scale: f32,
}

/// Rows of a box of queries, and of keys.
const QUERY_ROWS: u32 = 64;
const KEY_ROWS: u32 = 128;

pub(super) fn forward(
    plan: &AttentionPlan,
    [q, k, v]: [&Heads<'_>; 3],
    scale: f64,
    o: &Heads<'_>,
    lse: &Tensor,
) -> Result<()> {
    let tiles = u32::try_from(plan.counts().forward)?;
    if tiles == 0 {
        return Ok(());
    }
    let (gpu, addresses) = (plan.gpu()?, plan.addresses());
    let (heads, kv_heads) = (u32::try_from(plan.shape.heads)?, u32::try_from(plan.shape.kv_heads)?);
    let (works, tokens, scale) = (tiles * heads, plan.tokens().unsigned_abs(), scale as f32);
    let wide = wide(plan);
    if plan.kernel == AttentionKernel::Hopper {
        let params = HopperForwardParams {
            q: q.map(&gpu, QUERY_ROWS)?,
            k: k.map(&gpu, KEY_ROWS)?,
            v: v.map(&gpu, KEY_ROWS)?,
            o: o.address(),
            lse: lse.data_ptr() as u64,
            tiles: addresses.forward,
            tickets: addresses.forward_tickets,
            o_stride: o.stride,
            tokens,
            tile_count: tiles,
            heads,
            kv_heads,
            scale,
            reserved: [0; 8],
        };
        let name = ["attention_hopper_forward_64", "attention_hopper_forward_128"][wide];
        let kernel = gpu.kernel("attention_hopper_forward", name)?;
        let shape = persistent(&gpu, works, HOPPER_FORWARD_BYTES[wide])?;
        // SAFETY: operands are of the plan's shape on its GPU, aligned and strided as the kernel asks (`Heads::of`); lse
        // holds a number a head and token; the lists and tickets are the plan's. Nothing that is written is shared.
        return unsafe { gpu.launch(kernel, shape, &params) };
    }
    let params = ForwardParams {
        q: q.address(),
        k: k.address(),
        v: v.address(),
        o: o.address(),
        lse: lse.data_ptr() as u64,
        tiles: addresses.forward,
        tickets: addresses.forward_tickets,
        q_stride: q.stride,
        k_stride: k.stride,
        v_stride: v.stride,
        o_stride: o.stride,
        tokens,
        tile_count: tiles,
        heads,
        kv_heads,
        scale,
    };
    let (name, bytes) = if compact(&gpu, plan)? {
        ("attention_forward_compact_128", COMPACT_FORWARD_BYTES)
    } else {
        (["attention_forward_64", "attention_forward_128"][wide], PORTABLE_FORWARD_BYTES[wide])
    };
    let kernel = gpu.kernel("attention_forward", name)?;
    let shape = launch((works, 1), PORTABLE_FORWARD_THREADS, bytes);
    // SAFETY: as above.
    unsafe { gpu.launch(kernel, shape, &params) }
}

pub(super) fn backward(
    plan: &AttentionPlan,
    operands: &Backward<'_>,
    scratch: &AttentionScratch,
    accumulation: Accumulation,
) -> Result<()> {
    if plan.counts().backward == 0 {
        return Ok(());
    }
    let gpu = plan.gpu()?;
    let buffers = scratch.for_blocks(plan.counts().blocks)?;
    plan.ensure_device("scratch", &buffers.dq_sums)?;
    ensure!(scratch.fits(plan.shape), "the scratch memory is for heads of another number or size");
    if accumulation == Accumulation::Unordered {
        let _ = buffers.dq_sums.shallow_clone().f_zero_()?;
    }
    prepare(&gpu, plan, operands, &buffers)?;
    match plan.kernel {
        AttentionKernel::Hopper => backward_hopper(&gpu, plan, operands, &buffers, accumulation)?,
        AttentionKernel::Portable => backward_portable(&gpu, plan, operands, &buffers, accumulation)?,
        AttentionKernel::Libtorch => bail!("a plan for libtorch was given to our kernels"),
    }
    finish(&gpu, plan, operands, &buffers)
}

/// Index into what is given for heads of 64 and of 128.
fn wide(plan: &AttentionPlan) -> usize {
    usize::from(plan.shape.head_dim == 128)
}

/// Whether the portable kernels need their forms for little shared memory.
fn compact(gpu: &Gpu, plan: &AttentionPlan) -> Result<bool> {
    Ok(plan.shape.head_dim == 128 && gpu.shared_memory()? < COMPACT_BELOW)
}

fn prepare(gpu: &Gpu, plan: &AttentionPlan, operands: &Backward<'_>, buffers: &Buffers) -> Result<()> {
    let Backward { o, d_o, lse, .. } = operands;
    let params = PrepareParams {
        o: o.address(),
        d_o: d_o.address(),
        lse: lse.data_ptr() as u64,
        lse2: buffers.lse2.data_ptr() as u64,
        delta: buffers.delta.data_ptr() as u64,
        blocks: plan.addresses().blocks,
        o_stride: o.stride,
        d_o_stride: d_o.stride,
        tokens: plan.tokens().unsigned_abs(),
        heads: u32::try_from(plan.shape.heads)?,
        reserved: 0,
    };
    let name = ["attention_prepare_64", "attention_prepare_128"][wide(plan)];
    let kernel = gpu.kernel("attention_gradient", name)?;
    // SAFETY: as in `forward`; the buffers have room for all blocks of the plan.
    unsafe { gpu.launch(kernel, each_block(plan)?, &params) }
}

fn finish(gpu: &Gpu, plan: &AttentionPlan, operands: &Backward<'_>, buffers: &Buffers) -> Result<()> {
    let params = FinishParams {
        dq_sums: buffers.dq_sums.data_ptr() as u64,
        dq: operands.dq.address(),
        blocks: plan.addresses().blocks,
        dq_stride: operands.dq.stride,
        heads: u32::try_from(plan.shape.heads)?,
        scale: operands.scale,
    };
    let name = ["attention_finish_64", "attention_finish_128"][wide(plan)];
    let kernel = gpu.kernel("attention_gradient", name)?;
    // SAFETY: as in `prepare`.
    unsafe { gpu.launch(kernel, each_block(plan)?, &params) }
}

fn backward_hopper(
    gpu: &Gpu,
    plan: &AttentionPlan,
    operands: &Backward<'_>,
    buffers: &Buffers,
    accumulation: Accumulation,
) -> Result<()> {
    let Backward { q, k, v, d_o, dk, dv, scale, .. } = operands;
    let addresses = plan.addresses();
    let (heads, kv_heads) = (u32::try_from(plan.shape.heads)?, u32::try_from(plan.shape.kv_heads)?);
    let tiles = u32::try_from(plan.counts().backward)?;
    let params = HopperBackwardParams {
        q: q.map(gpu, QUERY_ROWS)?,
        k: k.map(gpu, KEY_ROWS)?,
        v: v.map(gpu, KEY_ROWS)?,
        d_o: d_o.map(gpu, QUERY_ROWS)?,
        lse2: buffers.lse2.data_ptr() as u64,
        delta: buffers.delta.data_ptr() as u64,
        dq_sums: buffers.dq_sums.data_ptr() as u64,
        semaphores: buffers.semaphores.data_ptr() as u64,
        dk: dk.address(),
        dv: dv.address(),
        tiles: addresses.backward,
        tickets: addresses.backward_tickets,
        dk_stride: dk.stride,
        dv_stride: dv.stride,
        tile_count: tiles,
        heads,
        kv_heads,
        scale: *scale,
        reserved: [0; 4],
    };
    let wide = wide(plan);
    let name = match accumulation {
        Accumulation::Ordered => ["attention_hopper_backward_64", "attention_hopper_backward_128"][wide],
        Accumulation::Unordered => {
            ["attention_hopper_backward_unordered_64", "attention_hopper_backward_unordered_128"][wide]
        }
    };
    let kernel = gpu.kernel("attention_hopper_backward", name)?;
    let shape = persistent(gpu, tiles, HOPPER_BACKWARD_BYTES[wide])?;
    // SAFETY: as in `prepare`; dq_sums is zero before an unordered pass, semaphores are before every one.
    unsafe { gpu.launch(kernel, shape, &params) }
}

fn backward_portable(
    gpu: &Gpu,
    plan: &AttentionPlan,
    operands: &Backward<'_>,
    buffers: &Buffers,
    accumulation: Accumulation,
) -> Result<()> {
    let Backward { q, k, v, d_o, dk, dv, scale, .. } = operands;
    let addresses = plan.addresses();
    let (heads, kv_heads) = (u32::try_from(plan.shape.heads)?, u32::try_from(plan.shape.kv_heads)?);
    let tiles = u32::try_from(plan.counts().backward)?;
    let params = BackwardParams {
        q: q.address(),
        k: k.address(),
        v: v.address(),
        d_o: d_o.address(),
        lse2: buffers.lse2.data_ptr() as u64,
        delta: buffers.delta.data_ptr() as u64,
        dq_sums: buffers.dq_sums.data_ptr() as u64,
        semaphores: buffers.semaphores.data_ptr() as u64,
        dk: dk.address(),
        dv: dv.address(),
        tiles: addresses.backward,
        tickets: addresses.backward_tickets,
        q_stride: q.stride,
        k_stride: k.stride,
        v_stride: v.stride,
        d_o_stride: d_o.stride,
        dk_stride: dk.stride,
        dv_stride: dv.stride,
        tile_count: tiles,
        heads,
        kv_heads,
        scale: *scale,
    };
    let wide = wide(plan);
    let (name, bytes) = match accumulation {
        Accumulation::Ordered if compact(gpu, plan)? => {
            ("attention_backward_compact_128", COMPACT_BACKWARD_BYTES)
        }
        Accumulation::Ordered => {
            (["attention_backward_64", "attention_backward_128"][wide], PORTABLE_BACKWARD_BYTES[wide])
        }
        Accumulation::Unordered => (
            ["attention_backward_unordered_64", "attention_backward_unordered_128"][wide],
            PORTABLE_BACKWARD_BYTES[wide],
        ),
    };
    let kernel = gpu.kernel("attention_backward", name)?;
    let shape = launch((tiles, 1), PORTABLE_BACKWARD_THREADS, bytes);
    // SAFETY: as in `backward_hopper`.
    unsafe { gpu.launch(kernel, shape, &params) }
}

fn launch(grid: (u32, u32), threads: u32, shared: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (grid.0, grid.1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: shared }
}

/// A block a multiprocessor at most; each takes tiles until none is left.
fn persistent(gpu: &Gpu, works: u32, shared: u32) -> Result<LaunchConfig> {
    Ok(launch((gpu.multiprocessors()?.min(works), 1), HOPPER_THREADS, shared))
}

/// A block for every 64 query rows and head.
fn each_block(plan: &AttentionPlan) -> Result<LaunchConfig> {
    let grid = (u32::try_from(plan.counts().blocks)?, u32::try_from(plan.shape.heads)?);
    Ok(launch(grid, GRADIENT_THREADS, 0))
}

/// The arguments, field by field as in cuda/include/attention.cuh and attention_hopper.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct ForwardParams {
    q: u64,
    k: u64,
    v: u64,
    o: u64,
    lse: u64,
    tiles: u64,
    tickets: u64,
    q_stride: u64,
    k_stride: u64,
    v_stride: u64,
    o_stride: u64,
    tokens: u64,
    tile_count: u32,
    heads: u32,
    kv_heads: u32,
    scale: f32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct PrepareParams {
    o: u64,
    d_o: u64,
    lse: u64,
    lse2: u64,
    delta: u64,
    blocks: u64,
    o_stride: u64,
    d_o_stride: u64,
    tokens: u64,
    heads: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct BackwardParams {
    q: u64,
    k: u64,
    v: u64,
    d_o: u64,
    lse2: u64,
    delta: u64,
    dq_sums: u64,
    semaphores: u64,
    dk: u64,
    dv: u64,
    tiles: u64,
    tickets: u64,
    q_stride: u64,
    k_stride: u64,
    v_stride: u64,
    d_o_stride: u64,
    dk_stride: u64,
    dv_stride: u64,
    tile_count: u32,
    heads: u32,
    kv_heads: u32,
    scale: f32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct FinishParams {
    dq_sums: u64,
    dq: u64,
    blocks: u64,
    dq_stride: u64,
    heads: u32,
    scale: f32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct HopperForwardParams {
    q: sys::CUtensorMap,
    k: sys::CUtensorMap,
    v: sys::CUtensorMap,
    o: u64,
    lse: u64,
    tiles: u64,
    tickets: u64,
    o_stride: u64,
    tokens: u64,
    tile_count: u32,
    heads: u32,
    kv_heads: u32,
    scale: f32,
    reserved: [u64; 8],
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct HopperBackwardParams {
    q: sys::CUtensorMap,
    k: sys::CUtensorMap,
    v: sys::CUtensorMap,
    d_o: sys::CUtensorMap,
    lse2: u64,
    delta: u64,
    dq_sums: u64,
    semaphores: u64,
    dk: u64,
    dv: u64,
    tiles: u64,
    tickets: u64,
    dk_stride: u64,
    dv_stride: u64,
    tile_count: u32,
    heads: u32,
    kv_heads: u32,
    scale: f32,
    reserved: [u64; 4],
}

const _: () = assert!(size_of::<ForwardParams>() == 112, "cuda/include/attention.cuh asserts the same size");
const _: () = assert!(size_of::<PrepareParams>() == 80, "cuda/include/attention.cuh asserts the same size");
const _: () = assert!(size_of::<BackwardParams>() == 160, "cuda/include/attention.cuh asserts the same size");
const _: () = assert!(size_of::<FinishParams>() == 40, "cuda/include/attention.cuh asserts the same size");
const _: () = assert!(
    size_of::<HopperForwardParams>() == 512,
    "cuda/include/attention_hopper.cuh asserts the same size"
);
const _: () = assert!(
    size_of::<HopperBackwardParams>() == 640,
    "cuda/include/attention_hopper.cuh asserts the same size"
);

// SAFETY: `repr(C)`, numbers only, the same fields in the same order as in cuda/include/attention.cuh.
unsafe impl KernelParams for ForwardParams {}
// SAFETY: as above.
unsafe impl KernelParams for PrepareParams {}
// SAFETY: as above.
unsafe impl KernelParams for BackwardParams {}
// SAFETY: as above.
unsafe impl KernelParams for FinishParams {}
// SAFETY: as above, in attention_hopper.cuh; the maps are the driver's own type.
unsafe impl KernelParams for HopperForwardParams {}
// SAFETY: as above.
unsafe impl KernelParams for HopperBackwardParams {}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use std::collections::BTreeSet;

    use tch::Device;

    use super::*;
    use crate::kernels::images::{IMAGES, NVCC};

    fn zeros(shape: &[i64]) -> Tensor {
        Tensor::zeros(shape, (Kind::BFloat16, Device::Cpu))
    }

    #[test]
    fn operands_are_views_of_packed_rows() {
        let rows = zeros(&[5, 8 * 64]);
        let q = rows.narrow(1, 0, 4 * 64).unflatten(1, [4, 64]);
        let k = rows.narrow(1, 4 * 64, 2 * 64).unflatten(1, [2, 64]);
        let q = Heads::new("q", &q, [5, 4, 64]).unwrap();
        let k = Heads::new("k", &k, [5, 2, 64]).unwrap();
        assert_eq!((q.stride, k.stride), (512, 512));
        assert_eq!(k.address() - q.address(), 4 * 64 * 2);
        let dense = zeros(&[1, 1, 64]);
        assert_eq!(Heads::new("q", &dense, [1, 1, 64]).unwrap().stride, 64);
    }

    /// Names in quotes in this file that end like a kernel's.
    fn named() -> BTreeSet<&'static str> {
        let words = include_str!("gpu.rs").split('"');
        words
            .filter(|word| {
                word.starts_with("attention_") && (word.ends_with("_64") || word.ends_with("_128"))
            })
            .collect()
    }

    #[test]
    fn every_kernel_is_launched_and_every_launch_has_a_kernel() {
        let families: BTreeSet<&str> = [AttentionKernel::Hopper, AttentionKernel::Portable]
            .into_iter()
            .flat_map(AttentionKernel::families)
            .copied()
            .collect();
        let images = || IMAGES.iter().filter(|image| families.contains(image.family));
        let compiled: BTreeSet<&str> =
            images().flat_map(|image| image.kernels).map(|kernel| kernel.name).collect();
        if NVCC.is_some() {
            assert_eq!(compiled, named());
            assert!(families.iter().all(|family| images().any(|image| image.family == *family)));
        }
    }

    /// A launch with less shared memory than its kernel uses would be an illegal access on the GPU.
    #[test]
    fn shared_memory_is_what_the_sources_assert() {
        let hopper = |[narrow, wide]: [u32; 2]| format!("kBytes<128> == {wide} && kBytes<64> == {narrow}");
        let forward = include_str!("../../../cuda/attention_hopper_forward.cu");
        assert!(forward.contains(&hopper(HOPPER_FORWARD_BYTES)));
        let backward = include_str!("../../../cuda/attention_hopper_backward.cu");
        assert!(backward.contains(&hopper(HOPPER_BACKWARD_BYTES)));
        let portable = include_str!("../../../cuda/attention_forward.cu");
        let [narrow, wide] = PORTABLE_FORWARD_BYTES;
        for (kernel, bytes) in [("128, 64", wide), ("128, 32", COMPACT_FORWARD_BYTES), ("64, 64", narrow)] {
            assert!(portable.contains(&format!("kBytes<{kernel}> == {bytes}")), "{kernel}");
        }
        let portable = include_str!("../../../cuda/attention_backward.cu");
        let [narrow, wide] = PORTABLE_BACKWARD_BYTES;
        for (kernel, bytes) in
            [("128, 2, true", wide), ("128, 1, false", COMPACT_BACKWARD_BYTES), ("64, 2, false", narrow)]
        {
            assert!(portable.contains(&format!("Shared<{kernel}>::kBytes == {bytes}")), "{kernel}");
        }
    }

    #[test]
    fn refuses_operands_that_do_not_fit() {
        let told = |tensor: &Tensor| Heads::new("q", tensor, [5, 4, 64]).unwrap_err().to_string();
        assert!(told(&zeros(&[5, 4, 64]).to_kind(Kind::Half)).contains("expected BFloat16"));
        assert_eq!(told(&zeros(&[5, 4, 32])), "`q` is [5, 4, 32], expected [5, 4, 64]");
        assert!(told(&zeros(&[5, 64, 4]).transpose(1, 2)).contains("side by side"));
        assert!(told(&zeros(&[4, 5, 64]).transpose(0, 1)).contains("side by side"));
        assert!(told(&zeros(&[1, 4, 64]).expand([5, 4, 64], false)).contains("overlap"));
        let moved = zeros(&[5, 4 * 64 + 8]).narrow(1, 4, 4 * 64).unflatten(1, [4, 64]);
        assert!(told(&moved).contains("multiples of 16 bytes"));
        let odd = zeros(&[5, 4 * 64 + 4]).narrow(1, 0, 4 * 64).unflatten(1, [4, 64]);
        assert!(told(&odd).contains("260 elements from token to token"));
    }
}
