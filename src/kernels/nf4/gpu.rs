//! The launchers of cuda/nf4.cu.

use anyhow::{Result, bail, ensure};
use cudarc::driver::LaunchConfig;
use tch::{Device, Kind, Tensor};

use super::{BLOCK, NESTED_BLOCK, Nf4Weight, mean};
use crate::kernels::dynamic_map::dynamic_map;
use crate::kernels::gpu::{Gpu, Kernel, KernelParams};

/// Threads of a block of the kernels.
const THREADS: u64 = 256;

/// Chunks that a thread of the fast kernel takes.
const CHUNKS_PER_THREAD: u64 = 4;

/// Bytes of an output chunk of the fast kernel, and what its rows are aligned to.
const CHUNK_BYTES: u64 = 16;

/// The argument of the kernels in cuda/nf4.cu that dequantise, field by field as there.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct DequantizeParams {
    packed: u64,
    absmax: u64,
    nested_absmax: u64,
    nested_code: u64,
    out: u64,
    elements: u64,
    columns: u64,
    row_stride: u64,
    chunks_per_row: u32,
    row_multiplier: u32,
    row_shift: u32,
    nested_offset: f32,
}

const _: () = assert!(size_of::<DequantizeParams>() == 80, "cuda/nf4.cu asserts the same size");

// SAFETY: `repr(C)`, numbers only, the same fields in the same order as in cuda/nf4.cu.
unsafe impl KernelParams for DequantizeParams {}

/// Writes `weight` to `out` on their GPU. The weight has passed [`Nf4Weight::check`] and is contiguous, `out` has passed
/// [`check_output`](super::check_output).
pub(super) fn dequantize(weight: &Nf4Weight, out: &Tensor) -> Result<()> {
    let width = out.kind().elt_size_in_bytes() as u64;
    let chunk = CHUNK_BYTES / width;
    let [rows, columns] = weight.shape.map(|length| length as u64);
    let elements = rows * columns;
    // A single row is as long as it is, whatever stride libtorch notes for it.
    let row_stride = if rows == 1 { columns } else { out.stride()[0] as u64 };
    let (packed, to) = (weight.packed.data_ptr() as u64, out.data_ptr() as u64);
    let fast = columns.is_multiple_of(chunk)
        && to.is_multiple_of(CHUNK_BYTES)
        && (row_stride * width).is_multiple_of(CHUNK_BYTES)
        && packed.is_multiple_of(chunk / 2)
        && elements / chunk < Divider::LIMIT;
    let by_row = if fast { Divider::new((columns / chunk) as u32) } else { Divider::new(1) };
    let params = DequantizeParams {
        packed,
        absmax: weight.absmax.data_ptr() as u64,
        nested_absmax: weight.nested_absmax.data_ptr() as u64,
        nested_code: weight.nested_code.data_ptr() as u64,
        out: to,
        elements,
        columns,
        row_stride,
        chunks_per_row: by_row.divisor,
        row_multiplier: by_row.multiplier,
        row_shift: by_row.shift,
        nested_offset: weight.nested_offset,
    };
    let name = match (out.kind(), fast) {
        (Kind::Float, true) => "nf4_dequantize_f32",
        (Kind::Float, false) => "nf4_dequantize_any_f32",
        (_, true) => "nf4_dequantize_bf16",
        (_, false) => "nf4_dequantize_any_bf16",
    };
    let threads = if fast { (elements / chunk).div_ceil(CHUNKS_PER_THREAD) } else { elements / 2 };
    let shape = launch_shape(threads)?;
    let gpu = Gpu::of(out)?;
    let kernel = gpu.kernel("nf4", name)?;
    // SAFETY: the parts of the weight have the sizes that its shape asks for, `out` has room for each of its rows, all lie on
    // this GPU (checked by the caller), and nobody else writes `out`; libtorch orders their release after this launch.
    unsafe { gpu.launch(kernel, shape, &params) }
}

/// Threads of a warp, which takes a block of weights or a block of scales.
const WARP: u64 = 32;

/// The argument of the kernels in cuda/nf4.cu that quantise, field by field as there.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct QuantizeParams {
    weights: u64,
    packed: u64,
    scales: u64,
    sums: u64,
    nested_code: u64,
    absmax: u64,
    nested_absmax: u64,
    blocks: u64,
    nested_blocks: u64,
    nested_offset: f32,
    unused: u32,
}

const _: () = assert!(size_of::<QuantizeParams>() == 80, "cuda/nf4.cu asserts the same size");

// SAFETY: `repr(C)`, numbers only, the same fields in the same order as in cuda/nf4.cu.
unsafe impl KernelParams for QuantizeParams {}

/// The NF4 form of a weight on a GPU, on that GPU. The weight has passed [`check_shape`](super::check_shape).
pub(super) fn quantize(weight: &Tensor, shape: [i64; 2]) -> Result<Nf4Weight> {
    let device = weight.device();
    let weight = match weight.kind() {
        Kind::Double => weight.f_to_kind(Kind::Float)?.f_contiguous()?,
        _ => weight.f_contiguous()?,
    };
    let name = match weight.kind() {
        Kind::Float => "nf4_quantize_f32",
        Kind::BFloat16 => "nf4_quantize_bf16",
        Kind::Half => "nf4_quantize_f16",
        kind => bail!("cannot quantise a weight of dtype {kind:?} to NF4"),
    };
    let blocks = (weight.numel() / BLOCK) as i64;
    let nested_blocks = (blocks as usize).div_ceil(NESTED_BLOCK) as i64;
    let empty = |length, kind| Tensor::f_empty([length], (kind, device));
    let made = Nf4Weight {
        packed: empty(blocks * BLOCK as i64 / 2, Kind::Uint8)?,
        absmax: empty(blocks, Kind::Uint8)?,
        nested_absmax: empty(nested_blocks, Kind::Float)?,
        nested_code: Tensor::from_slice(&dynamic_map(true)).f_to_device(device)?,
        nested_offset: 0.0,
        shape,
    };
    let (scales, sums) = (empty(blocks, Kind::Float)?, empty(nested_blocks, Kind::Double)?);
    let gpu = Gpu::of(&weight)?;
    let mut params = QuantizeParams {
        weights: weight.data_ptr() as u64,
        packed: made.packed.data_ptr() as u64,
        scales: scales.data_ptr() as u64,
        sums: sums.data_ptr() as u64,
        nested_code: made.nested_code.data_ptr() as u64,
        absmax: made.absmax.data_ptr() as u64,
        nested_absmax: made.nested_absmax.data_ptr() as u64,
        blocks: blocks as u64,
        nested_blocks: nested_blocks as u64,
        nested_offset: 0.0,
        unused: 0,
    };
    let launch = |kernel: Kernel, threads: u64, params: &QuantizeParams| -> Result<()> {
        // SAFETY: the tensors above have the kernels' dtypes and lengths, are contiguous and on this GPU, and what is written is
        // ours alone; libtorch orders their release after these launches.
        unsafe { gpu.launch(kernel, launch_shape(threads)?, params) }
    };
    launch(gpu.kernel("nf4", name)?, params.blocks * WARP, &params)?;
    launch(gpu.kernel("nf4", "nf4_sum_scales")?, params.nested_blocks, &params)?;
    let sums: Vec<f64> = Vec::try_from(&sums.f_to_device(Device::Cpu)?)?;
    params.nested_offset = mean(&sums, params.blocks as usize)?;
    launch(gpu.kernel("nf4", "nf4_nest")?, params.nested_blocks * WARP, &params)?;
    Ok(Nf4Weight { nested_offset: params.nested_offset, ..made })
}

fn launch_shape(threads: u64) -> Result<LaunchConfig> {
    let blocks = threads.div_ceil(THREADS);
    ensure!(
        i32::try_from(blocks).is_ok(),
        "a weight of so many elements needs {blocks} blocks, more than a grid has"
    );
    Ok(LaunchConfig {
        grid_dim: (blocks as u32, 1, 1),
        block_dim: (THREADS as u32, 1, 1),
        shared_mem_bytes: 0,
    })
}

/// Division by a number that is known before the launch, as a multiplication (Granlund & Montgomery 1994, figure 4.1).
///
/// `n / divisor = (hi32(n * multiplier) + n) >> shift` for `n` below [`LIMIT`](Self::LIMIT), so that the sum fits 32 bits.
#[derive(Debug, Clone, Copy)]
struct Divider {
    divisor: u32,
    multiplier: u32,
    shift: u32,
}

impl Divider {
    /// The dividend lies below.
    const LIMIT: u64 = 1 << 31;

    /// For a divisor from 1 to 2³¹.
    const fn new(divisor: u32) -> Self {
        // ceil(log2(divisor))
        let shift = (divisor as u64).next_power_of_two().trailing_zeros();
        let excess = (1u64 << shift) - divisor as u64;
        let multiplier = ((excess << 32) / divisor as u64 + 1) as u32;
        Self { divisor, multiplier, shift }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel computes.
    fn quotient(n: u32, by: Divider) -> u32 {
        let high = (u64::from(n) * u64::from(by.multiplier)) >> 32;
        (high as u32).checked_add(n).expect("the sum fits") >> by.shift
    }

    #[test]
    fn a_divider_divides() {
        let most = (Divider::LIMIT - 1) as u32;
        for divisor in [1, 2, 3, 5, 7, 8, 24, 72, 511, 512, 513, 1600, 6160, 65_535, 1 << 30, most, most + 1]
        {
            let by = Divider::new(divisor);
            let near = (0..200u32)
                .map(|n| n.wrapping_mul(divisor))
                .flat_map(|n| [n.wrapping_sub(1), n, n.wrapping_add(1)]);
            let spread = (0..10_000u32).map(|n| n.wrapping_mul(0x9e37_79b9) & most);
            for n in near.chain(spread).chain([0, 1, most - 1, most]).filter(|n| *n <= most) {
                assert_eq!(quotient(n, by), n / divisor, "{n} / {divisor}");
            }
        }
    }
}
