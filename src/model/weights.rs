//! Names to tensors: what a decoder is built from, whatever file holds it.

use anyhow::Result;
use tch::{Device, Tensor};

use crate::kernels::nf4::Nf4Weight;

/// A checkpoint's tensors under their Hugging Face names (`model.layers.0.self_attn.q_proj.weight`).
pub trait TensorSource: Send + Sync {
    /// All names, sorted.
    fn names(&self) -> Vec<String>;

    /// Shape of a tensor, or `None` when there is no such tensor.
    fn shape(&self, name: &str) -> Option<Vec<i64>>;

    /// The tensor on the CPU, in f32, bf16 or f16 as stored; quantised formats come as f32.
    ///
    /// # Errors
    /// When there is no such tensor or the file is damaged; the message names the file and the tensor.
    fn tensor(&self, name: &str) -> Result<Tensor>;

    /// The tensor in NF4 on `device`: from a cache where there is one, else quantised there, with the same bits on every device.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor), or when the tensor cannot be quantised.
    fn nf4(&self, name: &str, device: Device) -> Result<Nf4Weight> {
        Nf4Weight::quantize(&self.tensor(name)?.f_to_device(device)?)
    }
}
