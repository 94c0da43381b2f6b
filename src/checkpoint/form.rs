//! In which form a merged model is stored.

use serde::Serialize;
use tch::Kind;

/// How the weights of a Hugging Face folder are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// 32 bits: nothing is rounded.
    Fp32,
    /// 16 bits with the exponent of f32.
    Bf16,
    /// 16 bits up to 65504; a weight beyond it is an error.
    Fp16,
    /// Projections in 4 bits as bitsandbytes stores them, the rest in bf16.
    Nf4,
}

impl Form {
    /// As reports and folders spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Bf16 => "bf16",
            Self::Fp16 => "fp16",
            Self::Nf4 => "nf4",
        }
    }

    /// The dtype of what is not quantised.
    pub fn kind(self) -> Kind {
        match self {
            Self::Fp32 => Kind::Float,
            Self::Bf16 | Self::Nf4 => Kind::BFloat16,
            Self::Fp16 => Kind::Half,
        }
    }
}
