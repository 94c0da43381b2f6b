//! The memory of CPU tensors as slices, so that Rust and rayon can read and fill it.

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

/// A Rust type that is the element of a tensor.
pub trait Element: Copy + Send + Sync + 'static {
    /// The tensor's dtype.
    const KIND: Kind;
}

impl Element for f32 {
    const KIND: Kind = Kind::Float;
}

impl Element for half::bf16 {
    const KIND: Kind = Kind::BFloat16;
}

impl Element for half::f16 {
    const KIND: Kind = Kind::Half;
}

impl Element for u8 {
    const KIND: Kind = Kind::Uint8;
}

/// The elements of a contiguous CPU tensor, in row-major order. Nothing may write to the tensor meanwhile.
///
/// # Errors
/// When the tensor is elsewhere, of another dtype or not contiguous.
pub fn slice<T: Element>(tensor: &Tensor) -> Result<&[T]> {
    ensure!(
        tensor.device() == Device::Cpu && tensor.kind() == T::KIND && tensor.is_contiguous(),
        "expected a contiguous {:?} tensor on the CPU, got {:?} on {:?}",
        T::KIND,
        tensor.kind(),
        tensor.device()
    );
    if tensor.numel() == 0 {
        return Ok(&[]);
    }
    // SAFETY: dtype, device and contiguity were checked, so `numel` elements of `T` lie at the data pointer,
    // which libtorch aligns to 64 bytes (a view starts at a multiple of its element). The storage lives as
    // long as the borrowed tensor; `Tensor` is not `Sync`, so no other thread writes through it.
    Ok(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<T>(), tensor.numel()) })
}

/// A new contiguous CPU tensor whose elements `fill` writes, all of them.
pub fn filled<T: Element>(shape: &[i64], fill: impl FnOnce(&mut [T])) -> Tensor {
    let tensor = Tensor::empty(shape, (T::KIND, Device::Cpu));
    if tensor.numel() > 0 {
        // SAFETY: the tensor is fresh, contiguous and unshared; the allocation comes from libtorch, every bit
        // pattern is a value of the plain number `T`, and `fill` has the only reference until it returns.
        fill(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<T>(), tensor.numel()) });
    }
    tensor
}

/// Whether a kernel leaves an operand to its twin: f32 in the processor's memory, where fused passes are tested.
pub(super) fn twin_takes(operand: &Tensor) -> bool {
    operand.device() == Device::Cpu && operand.kind() == Kind::Float
}
