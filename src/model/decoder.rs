//! The decoder: embedding, layers, head; loss, gradients, logits and cached generation.

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use super::batch::Batch;
use super::config::ModelConfig;
use super::kv_cache::KvCache;
use super::params::ParamSet;
use super::weights::TensorSource;
use crate::recipe::{LoraSpec, Projection, Quantization};

/// How to hold the frozen weights.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// NF4, or as stored.
    pub quantization: Quantization,
    /// Where.
    pub device: Device,
}

/// The loss of a batch, summed: divide by `supervised` for the mean.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Loss {
    /// Sum of the losses of each sequence in nats, `[seqs]`.
    pub per_sequence: Vec<f64>,
    /// Supervised tokens of each sequence, `[seqs]`.
    pub supervised: Vec<i64>,
}

impl Loss {
    /// Sum over all sequences.
    pub fn sum(&self) -> f64 {
        self.per_sequence.iter().sum()
    }

    /// Supervised tokens of all sequences.
    pub fn tokens(&self) -> i64 {
        self.supervised.iter().sum()
    }
}

/// How a micro-batch's gradient is taken.
#[derive(Debug, Clone, Copy)]
pub struct GradOptions {
    /// Factor of every token's loss: one over the supervised tokens of the whole optimiser step.
    pub scale: f64,
    /// Seed of the run, for dropout.
    pub seed: u64,
    /// Counter of the micro-batch since the start of the run, for dropout.
    pub microbatch: u64,
}

/// A decoder with frozen weights and, when attached, a LoRA adapter.
#[derive(Debug)]
pub struct Decoder {
    config: ModelConfig,
    device: Device,
}

impl Decoder {
    /// Loads the weights, tensor by tensor.
    ///
    /// # Errors
    /// When a tensor is missing, unknown or has another shape than the configuration says.
    pub fn load(_source: &dyn TensorSource, config: &ModelConfig, options: &LoadOptions) -> Result<Self> {
        Ok(Self { config: config.clone(), device: options.device })
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The dtype of activations: f32 on the CPU, bf16 on a GPU.
    pub fn kind(&self) -> Kind {
        if self.device.is_cuda() { Kind::BFloat16 } else { Kind::Float }
    }

    /// Adds an adapter: `lora_A` Kaiming-uniform from `seed` as in PEFT, `lora_B` zero.
    ///
    /// # Errors
    /// When one is attached already.
    pub fn attach_lora(&mut self, _spec: &LoraSpec, _seed: u64) -> Result<()> {
        bail!("not built yet")
    }

    /// The adapter's parameters, f32; [`adapters_changed`](Self::adapters_changed) must be called after writing to them.
    pub fn adapters(&self) -> Option<&ParamSet> {
        None
    }

    /// Renews what is derived from the adapter (compute copies).
    pub fn adapters_changed(&mut self) {}

    /// Switches the attached adapter on or off: off is the base model.
    pub fn enable_adapters(&mut self, _on: bool) {}

    /// The loss, without dropout.
    ///
    /// # Errors
    /// When a token id or a position is beyond the model's.
    pub fn loss(&self, _batch: &Batch) -> Result<Loss> {
        bail!("not built yet")
    }

    /// The loss, and its gradient times `options.scale` added into `grads` (layout of [`adapters`](Self::adapters)).
    ///
    /// # Errors
    /// As [`loss`](Self::loss), or when no adapter is attached.
    pub fn loss_and_grad(
        &self,
        _batch: &Batch,
        _options: &GradOptions,
        _grads: &mut ParamSet,
    ) -> Result<Loss> {
        bail!("not built yet")
    }

    /// Logits at the positions `rows` (i64 indices into the packed tokens), `[rows, vocab]` f32.
    ///
    /// # Errors
    /// As [`loss`](Self::loss).
    pub fn logits(&self, _batch: &Batch, _rows: &Tensor) -> Result<Tensor> {
        bail!("not built yet")
    }

    /// Appends `input_ids` to the sequence in `cache` and gives the logits after the last of them, `[vocab]` f32.
    ///
    /// # Errors
    /// When the cache is too small, or as [`loss`](Self::loss).
    pub fn forward_cached(&self, _input_ids: &[u32], _cache: &mut KvCache) -> Result<Tensor> {
        bail!("not built yet")
    }

    /// The frozen weight of a projection, dequantised, `[out, in]` f32 on the decoder's device.
    pub fn base_weight(&self, _layer: usize, _projection: Projection) -> Tensor {
        Tensor::new()
    }

    /// `scale · B · A` of a projection, `[out, in]` f32, or `None` where there is no adapter.
    pub fn lora_delta(&self, _layer: usize, _projection: Projection) -> Option<Tensor> {
        None
    }
}
