//! Tensor maps: how TMA finds an operand's boxes.

use anyhow::{Context as _, Result, anyhow};
use cudarc::driver::{result, sys};

use crate::kernels::driver::describe;
use crate::kernels::gpu::Gpu;

/// Columns of a box: 128 bytes, which is what is swizzled.
const COLUMNS: u32 = 64;

/// The map of bf16 `[tokens, heads, head_dim]` at `address`, tokens `stride` elements apart, in boxes of 64 columns, one head and
/// so many rows. `size` is head_dim, heads, tokens. Address and strides are multiples of 16 bytes.
///
/// # Errors
/// When the driver refuses it.
pub(super) fn encode(
    gpu: &Gpu,
    name: &str,
    address: u64,
    size: [u64; 3],
    stride: u64,
    rows: u32,
) -> Result<sys::CUtensorMap> {
    // The first call into the driver on a thread may be this one.
    gpu.bind()?;
    let strides = [2 * size[0], 2 * stride];
    let (box_size, steps) = ([COLUMNS, 1, rows], [1; 3]);
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: the arrays hold as many numbers as the rank asks for, and live through the call; the address is only noted.
    let encoded = unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            3,
            std::ptr::with_exposed_provenance_mut(usize::try_from(address)?),
            size.as_ptr(),
            strides.as_ptr(),
            box_size.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    encoded
        .result()
        .map_err(|error: result::DriverError| anyhow!("the NVIDIA driver says {}", describe(error)))
        .with_context(|| {
            format!("cannot map `{name}`: head_dim, heads, tokens {size:?}, {stride} elements apart, at {address:#x}")
        })?;
    Ok(map)
}
