//! How fast each kernel moves memory at the sizes of Granite-3.1-8B, beside what the device can do at most.
//!
//! `granite bench kernels` runs this; [`all`](super::all) runs the same timings beside its comparisons.

use anyhow::{Context as _, Result};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::adamw::{self, Form};
use super::bandwidth::{bandwidth, seconds};
use super::{cross_entropy, dropout, nf4, rms_norm, rope, swiglu};

/// Bytes that the copy reads, and as many that it writes.
const COPIED: i64 = 1 << 30;

/// Tokens, inner and outer width of the product: the up-projection of a micro-step.
const PRODUCT: [i64; 3] = [8192, 4096, 12_800];

/// What nothing on the device does faster, measured and not looked up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ceilings {
    /// GB/s of the device's own copy, 1 GiB read and 1 GiB written.
    pub copy_gb_per_s: f64,
    /// TFLOP/s of libtorch's product of bf16 matrices, 8192 × 4096 × 12800.
    pub gemm_tflop_per_s: f64,
}

impl Ceilings {
    /// Measures them.
    ///
    /// # Errors
    /// When the memory does not suffice or libtorch fails.
    pub fn measure(device: Device) -> Result<Self> {
        Ok(Self {
            copy_gb_per_s: copy(device).context("cannot time the device copy")?,
            gemm_tflop_per_s: product(device).context("cannot time the product")?,
        })
    }
}

fn copy(device: Device) -> Result<f64> {
    let x = Tensor::f_ones([COPIED / 2], (Kind::BFloat16, device))?;
    let mut y = x.f_zeros_like()?;
    bandwidth(device, 2 * COPIED, 1, |_| {
        y.f_copy_(&x)?;
        Ok(())
    })
}

fn product(device: Device) -> Result<f64> {
    let [tokens, inner, outer] = PRODUCT;
    // Numbers of every size: zeros would be multiplied on less power, and so on faster clocks.
    let random = |shape: [i64; 2]| Tensor::f_randn(shape, (Kind::BFloat16, device));
    let (x, weight) = (random([tokens, inner])?, random([outer, inner])?);
    let mut y = Tensor::f_empty([tokens, outer], (Kind::BFloat16, device))?;
    let one = seconds(device, 1, |_| {
        y = x.f_matmul(&weight.f_tr()?)?;
        Ok(())
    })?;
    Ok(2.0 * PRODUCT.map(|size| size as f64).iter().product::<f64>() / one / 1e12)
}

/// A kernel at a size.
#[derive(Debug, Clone, Copy)]
pub struct Measure {
    /// Its name.
    pub kernel: &'static str,
    /// The size.
    pub shape: &'static str,
    /// Operations of its definition on an element, an exponential counted as one, and bytes that it must move for it.
    work: (f64, f64),
    /// GB/s.
    rate: fn(Device) -> Result<f64>,
}

/// What a kernel reached.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rate {
    /// Its name.
    pub kernel: &'static str,
    /// The size.
    pub shape: &'static str,
    /// GB/s of the bytes that it must move.
    pub gb_per_s: f64,
    /// Operations of its definition over these bytes.
    pub flop_per_byte: f64,
}

impl Measure {
    /// Times the kernel.
    ///
    /// # Errors
    /// When the memory does not suffice or the kernel fails.
    pub fn run(&self, device: Device) -> Result<Rate> {
        let Self { kernel, shape, work: (flop, bytes), rate } = *self;
        let gb_per_s = rate(device).with_context(|| format!("cannot time `{kernel}`"))?;
        Ok(Rate { kernel, shape, gb_per_s, flop_per_byte: flop / bytes })
    }
}

/// Every kernel that memory bounds, in the order of a training step.
pub const ALL: [Measure; 17] = [
    Measure {
        kernel: "nf4_dequantize_bf16",
        shape: "12800 × 4096",
        work: (1.0, 2.516),
        rate: |device| nf4::dequantize_rate(device, Kind::BFloat16),
    },
    Measure {
        kernel: "nf4_dequantize_f32",
        shape: "12800 × 4096",
        work: (1.0, 4.516),
        rate: |device| nf4::dequantize_rate(device, Kind::Float),
    },
    Measure {
        kernel: "rms_norm", shape: "8192 × 4096 bf16", work: (4.0, 4.0), rate: rms_norm::forward_rate
    },
    Measure {
        kernel: "add_rms_norm", shape: "8192 × 4096 bf16", work: (6.0, 8.0), rate: rms_norm::add_rate
    },
    Measure {
        kernel: "rms_norm_backward",
        shape: "8192 × 4096 bf16",
        work: (7.0, 8.0),
        rate: rms_norm::backward_rate,
    },
    Measure { kernel: "rope", shape: "8192 × 40 heads × 128 bf16", work: (3.0, 4.1), rate: rope::rate },
    Measure { kernel: "swiglu", shape: "8192 × 12800 bf16", work: (5.0, 6.0), rate: swiglu::forward_rate },
    Measure {
        kernel: "swiglu_backward",
        shape: "8192 × 12800 bf16",
        work: (13.0, 12.0),
        rate: swiglu::backward_rate,
    },
    Measure {
        kernel: "dropout_bf16",
        shape: "134217728 bf16",
        work: (1.0, 4.0),
        rate: |device| dropout::rate(device, Kind::BFloat16),
    },
    Measure {
        kernel: "dropout_f32",
        shape: "67108864 f32",
        work: (1.0, 8.0),
        rate: |device| dropout::rate(device, Kind::Float),
    },
    Measure {
        kernel: "dropout_rows_bf16",
        shape: "16384 × 8192 bf16",
        work: (1.0, 4.0),
        rate: |device| dropout::rows_rate(device, Kind::BFloat16, false),
    },
    Measure {
        kernel: "dropout_add_rows_bf16",
        shape: "16384 × 8192 bf16",
        work: (2.0, 6.0),
        rate: |device| dropout::rows_rate(device, Kind::BFloat16, true),
    },
    Measure {
        kernel: "cross_entropy",
        shape: "2048 × 49155 bf16",
        work: (5.0, 2.0),
        rate: |device| cross_entropy::rate(device, None),
    },
    Measure {
        kernel: "cross_entropy, with its gradient",
        shape: "2048 × 49155 bf16",
        work: (9.0, 4.0),
        rate: |device| cross_entropy::rate(device, Some(1.0)),
    },
    Measure { kernel: "grad_norm", shape: "134217728 f32", work: (2.0, 4.0), rate: adamw::norm_rate },
    Measure {
        kernel: "adamw_32bit",
        shape: "67108864 f32",
        work: (16.0, 30.0),
        rate: |device| adamw::rate(device, Form::Wide),
    },
    Measure {
        kernel: "adamw_8bit",
        shape: "67108864 f32",
        work: (18.0, 18.0625),
        rate: |device| adamw::rate(device, Form::Coded),
    },
];
