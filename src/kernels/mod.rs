//! Our CUDA kernels, their launchers and their slow twins: tensors, not layers.
//!
//! The one place for `unsafe`: memory that tch or the driver lends, and calls into libraries loaded at run time.

#![allow(
    unsafe_code,
    reason = "raw tensor memory, kernel launches and foreign libraries live here and nowhere else"
)]

pub mod attention;
pub mod cross_entropy;
pub mod device;
pub mod dropout;
pub mod dynamic_map;
#[expect(unsafe_code, reason = "tensor memory as slices; each block says why it is sound")]
pub mod host;
pub mod images;
pub mod nf4;
pub mod philox;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
