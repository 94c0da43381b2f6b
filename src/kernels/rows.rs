//! Matrices as kernels take them: where the rows lie, whether 16-byte accesses may be used, on which GPU.

use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use cudarc::driver::LaunchConfig;
use tch::{Kind, Tensor};

use super::gpu::Gpu;

/// Bytes of a vector access.
const VECTOR_BYTES: u64 = 16;

/// Threads that execute together; blocks are whole numbers of these.
const WARP: u32 = 32;

/// Rows of a tensor of known dtype, each contiguous, any distance apart but not overlapping.
#[derive(Debug)]
pub(super) struct Rows<'a> {
    name: &'static str,
    tensor: &'a Tensor,
    pub rows: i64,
    pub columns: i64,
    stride: i64,
}

impl<'a> Rows<'a> {
    /// The rows of `tensor` `[rows, columns]`, or the one row of `[columns]`; `name` is for messages.
    ///
    /// # Errors
    /// When the dtype or the number of dimensions is another, a row is not contiguous or rows overlap.
    pub fn new(name: &'static str, tensor: &'a Tensor, kind: Kind) -> Result<Self> {
        ensure!(tensor.kind() == kind, "`{name}` is {:?}, expected {kind:?}", tensor.kind());
        let (size, strides) = (tensor.size(), tensor.stride());
        let (rows, columns, stride, step) = match (size.as_slice(), strides.as_slice()) {
            (&[columns], &[step]) => (1, columns, columns, step),
            (&[rows, columns], &[stride, step]) => (rows, columns, stride, step),
            _ => bail!("`{name}` is {size:?}, expected a matrix"),
        };
        ensure!(columns <= 1 || step == 1, "a row of `{name}` is not contiguous: strides {strides:?}");
        // libtorch gives the stride of a dimension of one any value.
        let stride = if rows <= 1 { columns } else { stride };
        ensure!(stride >= columns, "rows of `{name}` overlap: {columns} columns, strides {strides:?}");
        Ok(Self { name, tensor, rows, columns, stride })
    }

    /// As [`new`](Self::new), of this shape.
    ///
    /// # Errors
    /// As [`new`](Self::new), and when the shape is another.
    pub fn of(name: &'static str, tensor: &'a Tensor, kind: Kind, shape: [i64; 2]) -> Result<Self> {
        let found = Self::new(name, tensor, kind)?;
        ensure!([found.rows, found.columns] == shape, "`{name}` is {:?}, expected {shape:?}", tensor.size());
        Ok(found)
    }

    /// Where the first element lies.
    pub fn address(&self) -> u64 {
        self.tensor.data_ptr() as u64
    }

    /// Elements from a row to the next.
    pub fn stride(&self) -> u64 {
        self.stride as u64
    }

    /// Whether every row begins at a vector and is a whole number of vectors.
    fn takes_vectors(&self) -> bool {
        let element = self.tensor.kind().elt_size_in_bytes() as u64;
        let bytes = |elements: i64| elements as u64 * element;
        (self.address() | bytes(self.stride) | bytes(self.columns)).is_multiple_of(VECTOR_BYTES)
    }
}

/// Whether all of `operands` can be moved by 16-byte accesses.
pub(super) fn vectorised(operands: &[&Rows<'_>]) -> bool {
    operands.iter().all(|operand| operand.takes_vectors())
}

/// The GPU that holds all of `operands`, at least one.
///
/// # Errors
/// When one is elsewhere than the first, or none is on a GPU.
pub(super) fn gpu_of(operands: &[&Rows<'_>]) -> Result<Arc<Gpu>> {
    let [first, others @ ..] = operands else { bail!("a kernel without operands") };
    let device = first.tensor.device();
    for other in others {
        let found = other.tensor.device();
        ensure!(found == device, "`{}` is on {device:?}, `{}` on {found:?}", first.name, other.name);
    }
    Gpu::of(first.tensor)
}

/// One block of `threads`, rounded up to whole warps, for each of `blocks`.
///
/// # Errors
/// When that is more than a grid can hold.
pub(super) fn grid(blocks: i64, threads: u64) -> Result<LaunchConfig> {
    let (blocks, threads) = (i32::try_from(blocks)?.unsigned_abs(), u32::try_from(threads)?);
    let threads = threads.max(1).next_multiple_of(WARP);
    Ok(LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use tch::Device;

    use super::*;

    fn zeros(shape: &[i64]) -> Tensor {
        Tensor::zeros(shape, (Kind::BFloat16, Device::Cpu))
    }

    fn rows(tensor: &Tensor) -> Result<Rows<'_>> {
        Rows::new("x", tensor, Kind::BFloat16)
    }

    #[test]
    fn reads_how_rows_lie() {
        let buffer = zeros(&[6, 40]);
        let view = buffer.narrow(1, 8, 16);
        let found = rows(&view).unwrap();
        assert_eq!((found.rows, found.columns, found.stride()), (6, 16, 40));
        assert_eq!(found.address(), buffer.data_ptr() as u64 + 16);
        assert!(vectorised(&[&found]));
        let one = buffer.narrow(0, 2, 1);
        assert_eq!(rows(&one).unwrap().stride(), 40);
        let vector = buffer.get(0);
        assert_eq!(rows(&vector).unwrap().rows, 1);
    }

    #[test]
    fn vectors_need_address_stride_and_width() {
        let buffer = zeros(&[6, 40]);
        assert!(!vectorised(&[&rows(&buffer.narrow(1, 4, 16)).unwrap()]), "address");
        assert!(!vectorised(&[&rows(&buffer.narrow(1, 0, 12)).unwrap()]), "width");
        let odd = zeros(&[6, 41]);
        let narrow = odd.narrow(1, 0, 16);
        assert!(!vectorised(&[&rows(&buffer).unwrap(), &rows(&narrow).unwrap()]), "stride");
        assert!(vectorised(&[&rows(&narrow.narrow(0, 0, 1)).unwrap()]), "one row has no stride");
    }

    #[test]
    fn refuses_other_layouts() {
        let told = |tensor: &Tensor| rows(tensor).unwrap_err().to_string();
        assert!(told(&zeros(&[4, 6]).tr()).contains("not contiguous"));
        assert!(told(&zeros(&[1, 6]).expand([4, 6], false)).contains("overlap"));
        assert!(told(&zeros(&[4, 6, 2])).contains("expected a matrix"));
        assert!(told(&zeros(&[4, 6]).to_kind(Kind::Float)).contains("expected BFloat16"));
        let x = zeros(&[4, 6]);
        assert!(Rows::of("x", &x, Kind::BFloat16, [4, 7]).unwrap_err().to_string().contains("[4, 7]"));
        assert!(gpu_of(&[&rows(&x).unwrap()]).unwrap_err().to_string().contains("Cpu"));
        assert!(grid(1 << 31, 32).is_err());
        assert_eq!(grid(3, 33).unwrap().block_dim.0, 64);
    }
}
