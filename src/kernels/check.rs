//! Each kernel against its twin, on the GPU at hand: `granite doctor --kernels` and the tests run this.
//!
//! Sizes include one, odd ones and ones that no block divides; operands begin at aligned and at unaligned addresses; inputs
//! are made anew from the seed; outputs are poisoned first and lie between guards that must stay as they were.
//! A kernel that can be exact must equal its twin bit for bit (`exact`), others keep to a tolerance (`tolerance`).

mod adamw;
mod attention;
mod bandwidth;
mod bitsandbytes;
mod cross_entropy;
mod dropout;
mod exact;
mod inputs;
mod nf4;
pub mod rates;
mod rms_norm;
mod rope;
mod swiglu;
mod tolerance;

use anyhow::Result;
use tch::{Device, Kind};

pub use self::bitsandbytes::codes_beyond_boundary;
use super::bitsandbytes::CudaLibrary;

/// What became of one check.
#[derive(Debug)]
pub struct Check {
    /// The kernel, or what was compared.
    pub name: &'static str,
    /// Comparisons made.
    pub cases: usize,
    /// Whether equality bit for bit was asked for, not nearness.
    pub exact: bool,
    /// What differed, when something did.
    pub failure: Option<String>,
    /// GB/s of memory traffic at a size beyond every cache, where that bounds the kernel.
    pub bandwidth: Option<f64>,
}

impl Check {
    fn new(name: &'static str, outcome: Result<Outcome>) -> Self {
        match outcome {
            Ok(Outcome { cases, exact, bandwidth }) => Self { name, cases, exact, failure: None, bandwidth },
            Err(error) => {
                Self { name, cases: 0, exact: false, failure: Some(format!("{error:#}")), bandwidth: None }
            }
        }
    }
}

/// What a check that found nothing wrong has to say.
struct Outcome {
    cases: usize,
    exact: bool,
    bandwidth: Option<f64>,
}

impl Outcome {
    /// So many comparisons bit for bit.
    fn exact(cases: usize) -> Self {
        Self { cases, exact: true, bandwidth: None }
    }

    /// So many comparisons within a tolerance.
    fn near(cases: usize) -> Self {
        Self { cases, exact: false, bandwidth: None }
    }

    /// With the bandwidth reached, in GB/s.
    fn at(self, bandwidth: f64) -> Self {
        Self { bandwidth: Some(bandwidth), ..self }
    }
}

/// Bytes that no cache of a GPU holds.
const BEYOND_CACHES: i64 = 256 << 20;

/// Checks everything on a GPU; the same seed makes the same inputs.
pub fn all(device: Device, seed: i64, library: Option<&CudaLibrary>) -> Vec<Check> {
    tch::manual_seed(seed);
    let mut checks = vec![
        Check::new("device copy, for comparison", bandwidth::copy(device)),
        Check::new("dropout_f32", dropout::kernel(device, Kind::Float)),
        Check::new("dropout_bf16", dropout::kernel(device, Kind::BFloat16)),
        Check::new("dropout_rows_f32", dropout::rows(device, Kind::Float, false)),
        Check::new("dropout_rows_bf16", dropout::rows(device, Kind::BFloat16, false)),
        Check::new("dropout_add_rows_f32", dropout::rows(device, Kind::Float, true)),
        Check::new("dropout_add_rows_bf16", dropout::rows(device, Kind::BFloat16, true)),
        Check::new("nf4 on the GPU, as on the processor", bitsandbytes::across_devices(device)),
    ];
    checks.extend(rms_norm::checks(device));
    checks.extend(rope::checks(device));
    checks.extend(swiglu::checks(device));
    checks.extend(attention::checks(device));
    checks.extend(cross_entropy::checks(device));
    checks.extend(nf4::checks(device));
    checks.extend(adamw::checks(device));
    if let Some(library) = library {
        let outcome = bitsandbytes::as_bitsandbytes(device, library);
        checks.push(Check::new("nf4, as bitsandbytes on the GPU", outcome));
    }
    checks
}
