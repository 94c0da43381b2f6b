//! Our CUDA kernels, their launchers and their slow twins: tensors, not layers.

pub mod device;
pub mod dropout;
pub mod nf4;
