//! Our CUDA kernels, their launchers and their slow twins: tensors, not layers.
//!
//! The one place for `unsafe`: memory that tch or the driver lends, and calls into libraries loaded at run time.

pub mod adamw;
#[expect(unsafe_code, reason = "kernel launches")]
pub mod adapter_dropout;
pub mod attention;
#[expect(unsafe_code, reason = "calls into a foreign library on tensor memory")]
pub mod bitsandbytes;
#[expect(unsafe_code, reason = "calls through our C++ bridge to libtorch")]
pub mod bridge;
pub mod check;
#[expect(unsafe_code, reason = "kernel launches")]
pub mod cross_entropy;
#[expect(unsafe_code, reason = "libtorch's CUDA half is loaded at run time")]
pub mod device;
#[expect(unsafe_code, reason = "calls into the driver")]
pub mod driver;
#[expect(unsafe_code, reason = "a kernel launch, a function compiled for AVX2")]
pub mod dropout;
pub mod dynamic_map;
#[expect(unsafe_code, reason = "ends the process without destructors")]
mod exit;
pub mod fused_attention;
#[expect(unsafe_code, reason = "calls into cuBLAS on tensor memory")]
pub mod gemm;
#[expect(unsafe_code, reason = "calls into the driver: modules and launches")]
pub mod gpu;
#[expect(unsafe_code, reason = "tensor memory as slices; each block says why it is sound")]
pub mod host;
#[expect(unsafe_code, reason = "calls into the driver: streams, events, copies")]
pub mod host_copies;
pub mod images;
pub mod libtorch;
pub mod nf4;
pub mod philox;
#[expect(unsafe_code, reason = "kernel launches")]
pub mod rms_norm;
#[expect(unsafe_code, reason = "kernel launches")]
pub mod rope;
mod rows;
#[expect(unsafe_code, reason = "calls into the driver: events")]
pub mod stopwatch;
#[expect(unsafe_code, reason = "kernel launches")]
pub mod swiglu;

pub use exit::exit_now;
