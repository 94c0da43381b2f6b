//! Calls through `cuda/libtorch/bridge.cpp`: what libtorch has and tch does not bind.

use std::ffi::{CStr, c_char};

use anyhow::{Result, bail};
use tch::{Device, Tensor};
use torch_sys::C_tensor;

unsafe extern "C" {
    fn granite_free(text: *mut c_char);
    fn granite_memory(device: i8, figures: *mut i64) -> *mut c_char;
    fn granite_reset_peak(device: i8) -> *mut c_char;
    fn granite_empty_cache() -> *mut c_char;
    fn granite_is_pinned(x: *const C_tensor, pinned: *mut bool) -> *mut c_char;
    fn granite_pinned(like: *const C_tensor, pinned: *mut *mut C_tensor) -> *mut c_char;
    fn granite_cudnn_attention(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        batch: i64,
        scale: f64,
        kept: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn granite_cudnn_attention_backward(
        d_o: *const C_tensor,
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        kept: *const *const C_tensor,
        batch: i64,
        scale: f64,
        same_bits: bool,
        gradients: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn granite_flash_attention(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        cu_seqlens: *const C_tensor,
        longest: i64,
        scale: f64,
        kept: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn granite_flash_attention_backward(
        d_o: *const C_tensor,
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        kept: *const *const C_tensor,
        cu_seqlens: *const C_tensor,
        longest: i64,
        scale: f64,
        same_bits: bool,
        gradients: *mut *mut C_tensor,
    ) -> *mut c_char;
}

/// What libtorch's allocator holds on a GPU, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// In tensors now.
    pub allocated: i64,
    /// In tensors at most since the last [`reset_peak`].
    pub allocated_peak: i64,
    /// Taken from the driver now.
    pub reserved: i64,
    /// Taken from the driver at most.
    pub reserved_peak: i64,
}

/// The allocator's figures for a GPU.
///
/// # Errors
/// When `device` is no GPU or libtorch's CUDA half is not loaded.
pub fn memory(device: Device) -> Result<Memory> {
    drop(Tensor::f_empty([1], (tch::Kind::Uint8, device))?);
    let mut figures = [0; 4];
    // SAFETY: four numbers are written, as many as there is room for.
    checked(unsafe { granite_memory(index(device)?, figures.as_mut_ptr()) })?;
    let [allocated, allocated_peak, reserved, reserved_peak] = figures;
    Ok(Memory { allocated, allocated_peak, reserved, reserved_peak })
}

/// Forgets the peaks so far.
///
/// # Errors
/// As [`memory`].
pub fn reset_peak(device: Device) -> Result<()> {
    // The allocator knows a GPU only once it has given memory on it.
    drop(Tensor::f_empty([1], (tch::Kind::Uint8, device))?);
    // SAFETY: no pointers.
    checked(unsafe { granite_reset_peak(index(device)?) })
}

/// Gives memory that no tensor uses back to the driver.
///
/// # Errors
/// When libtorch's CUDA half is not loaded.
pub fn empty_cache() -> Result<()> {
    // SAFETY: no pointers.
    checked(unsafe { granite_empty_cache() })
}

/// Memory on the host that GPUs read and write directly, `shape` of `kind`; its content is arbitrary.
///
/// # Errors
/// When there is not enough of it, or no GPU.
pub fn pinned(shape: &[i64], kind: tch::Kind) -> Result<Tensor> {
    // A shape without memory: one element, seen as many.
    let like = Tensor::f_empty([1], (kind, Device::Cpu))?.f_expand(shape, false)?;
    let [pinned] = given(|out| {
        // SAFETY: one tensor is read and one is written.
        unsafe { granite_pinned(like.as_ptr(), out) }
    })?;
    Ok(pinned)
}

/// Whether a tensor lies in memory of [`pinned`].
///
/// # Errors
/// When there is no GPU to ask.
pub fn is_pinned(x: &Tensor) -> Result<bool> {
    let mut pinned = false;
    // SAFETY: a tensor is read and a bool is written.
    checked(unsafe { granite_is_pinned(x.as_ptr(), &mut pinned) })?;
    Ok(pinned)
}

/// What fused attention leaves: the output and what its backward pass wants beside it (log-sum-exp, two states).
pub(super) type Kept = [Tensor; 4];

/// cuDNN's attention over `batch` sequences of one length; `q` `[tokens, heads, head_dim]`, `k`, `v`
/// `[tokens, kv_heads, head_dim]`.
pub(super) fn cudnn_attention(qkv: [&Tensor; 3], batch: i64, scale: f64) -> Result<Kept> {
    let [q, k, v] = qkv.map(Tensor::as_ptr);
    // SAFETY: tensors live through the call; four new ones are written on success.
    four(|kept| unsafe { granite_cudnn_attention(q, k, v, batch, scale, kept) })
}

/// Gradients of [`cudnn_attention`]; with `same_bits` the same ones every time.
pub(super) fn cudnn_attention_backward(
    d_o: &Tensor,
    qkv: [&Tensor; 3],
    kept: &Kept,
    batch: i64,
    scale: f64,
    same_bits: bool,
) -> Result<[Tensor; 3]> {
    let [q, k, v] = qkv.map(Tensor::as_ptr);
    let kept = kept.each_ref().map(Tensor::as_ptr);
    // SAFETY: as above; three are written.
    three(|out| unsafe {
        granite_cudnn_attention_backward(d_o.as_ptr(), q, k, v, kept.as_ptr(), batch, scale, same_bits, out)
    })
}

/// FlashAttention-2 over the sequences of `cu_seqlens` (`[seqs + 1]` i32 on the GPU).
pub(super) fn flash_attention(
    qkv: [&Tensor; 3],
    cu_seqlens: &Tensor,
    longest: i64,
    scale: f64,
) -> Result<Kept> {
    let [q, k, v] = qkv.map(Tensor::as_ptr);
    // SAFETY: as above.
    four(|kept| unsafe { granite_flash_attention(q, k, v, cu_seqlens.as_ptr(), longest, scale, kept) })
}

/// Gradients of [`flash_attention`]; with `same_bits` the same ones every time.
pub(super) fn flash_attention_backward(
    d_o: &Tensor,
    qkv: [&Tensor; 3],
    kept: &Kept,
    cu_seqlens: &Tensor,
    longest: i64,
    scale: f64,
    same_bits: bool,
) -> Result<[Tensor; 3]> {
    let [q, k, v] = qkv.map(Tensor::as_ptr);
    let kept = kept.each_ref().map(Tensor::as_ptr);
    let cu_seqlens = cu_seqlens.as_ptr();
    // SAFETY: as above.
    three(|out| unsafe {
        granite_flash_attention_backward(
            d_o.as_ptr(),
            q,
            k,
            v,
            kept.as_ptr(),
            cu_seqlens,
            longest,
            scale,
            same_bits,
            out,
        )
    })
}

fn four(call: impl FnOnce(*mut *mut C_tensor) -> *mut c_char) -> Result<[Tensor; 4]> {
    given(call)
}

fn three(call: impl FnOnce(*mut *mut C_tensor) -> *mut c_char) -> Result<[Tensor; 3]> {
    given(call)
}

/// Runs a call that writes `N` new tensors, and takes them.
fn given<const N: usize>(call: impl FnOnce(*mut *mut C_tensor) -> *mut c_char) -> Result<[Tensor; N]> {
    let mut pointers = [std::ptr::null_mut(); N];
    checked(call(pointers.as_mut_ptr()))?;
    // SAFETY: the call succeeded, so each is a new tensor that nobody else will free.
    Ok(pointers.map(|pointer| unsafe { Tensor::from_ptr(pointer) }))
}

fn checked(text: *mut c_char) -> Result<()> {
    if text.is_null() {
        return Ok(());
    }
    // SAFETY: the bridge gives null or a C string that is ours until it is freed, which happens once, below.
    let message = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    // SAFETY: as above.
    unsafe { granite_free(text) };
    bail!("libtorch says {}", message.trim_end())
}

fn index(device: Device) -> Result<i8> {
    match device {
        Device::Cuda(index) => Ok(i8::try_from(index)?),
        other => bail!("asked for a GPU's memory, got {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exception_becomes_an_error() {
        let q = Tensor::zeros([4, 2, 8], (tch::Kind::Float, Device::Cpu));
        let error = cudnn_attention([&q, &q, &q], 3, 1.0).expect_err("4 tokens are no 3 sequences");
        assert!(error.to_string().starts_with("libtorch says "), "{error}");
        assert!(memory(Device::Cpu).is_err());
    }
}
