//! NF4: 4-bit NormalFloat in blocks of 64 with doubly quantised scales, in bitsandbytes' stored layout.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

/// A linear weight in NF4.
#[derive(Debug)]
pub struct Nf4Weight {
    /// Two codes a byte, the first in the high nibble; `[out * in / 2]` u8.
    pub packed: Tensor,
    /// Scale of each block of 64 as a code of `nested_code`; `[blocks]` u8.
    pub absmax: Tensor,
    /// Scale of each 256 scales; `[ceil(blocks / 256)]` f32.
    pub nested_absmax: Tensor,
    /// The 256 levels of a scale's code; `[256]` f32.
    pub nested_code: Tensor,
    /// Mean of the scales, taken off before they were quantised.
    pub nested_offset: f32,
    /// `[out, in]`.
    pub shape: [i64; 2],
}

impl Nf4Weight {
    /// Quantises a weight `[out, in]` of any float dtype.
    ///
    /// # Errors
    /// When the weight is not two-dimensional or its size is no multiple of 64.
    pub fn quantize(weight: &Tensor) -> Result<Self> {
        let _ = weight;
        anyhow::bail!("not built yet")
    }

    /// The weight `[out, in]`: `codebook[nibble] * absmax`, unrounded in f32, rounded to nearest even in bf16.
    pub fn dequantize(&self, kind: Kind) -> Tensor {
        let _ = kind;
        Tensor::zeros(self.shape, (Kind::Float, Device::Cpu))
    }

    /// The same on another device.
    pub fn to_device(&self, device: Device) -> Self {
        Self {
            packed: self.packed.to_device(device),
            absmax: self.absmax.to_device(device),
            nested_absmax: self.nested_absmax.to_device(device),
            nested_code: self.nested_code.to_device(device),
            nested_offset: self.nested_offset,
            shape: self.shape,
        }
    }
}
