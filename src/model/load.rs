//! From a checkpoint's tensors to a decoder's weights, one tensor at a time.

use std::collections::BTreeSet;

use anyhow::{Result, bail, ensure};
use tch::{Device, Kind, Tensor};

use super::config::ModelConfig;
use super::fused::plan::padded_vocab;
use super::layer::DecoderLayer;
use super::linear::{BaseWeight, LoraLinear};
use super::weights::TensorSource;
use crate::progress;
use crate::recipe::{Projection, Quantization};

/// On the CPU dequantised weights stay in memory up to this size: dequantising at every use would cost
/// a third of a step, and small models are what a CPU trains.
const RESIDENT_BYTES: i64 = 8 << 30;

/// Reads weights, checks their shapes and brings them to the device.
pub(super) struct Loader<'a> {
    pub(super) source: &'a dyn TensorSource,
    pub(super) config: &'a ModelConfig,
    pub(super) quantization: Quantization,
    pub(super) device: Device,
    pub(super) kind: Kind,
}

/// All weights of a decoder.
pub(super) struct Weights {
    pub(super) embed_tokens: Tensor,
    pub(super) layers: Vec<DecoderLayer>,
    pub(super) norm: Tensor,
    pub(super) lm_head: Tensor,
}

impl Loader<'_> {
    pub(super) fn load(&self) -> Result<Weights> {
        self.check_names()?;
        let ModelConfig { hidden_size, vocab_size, num_hidden_layers, .. } = *self.config;
        let bar = progress::bar(num_hidden_layers as u64, "load", "layers");
        let embed_tokens =
            self.filled_up(self.tensor("model.embed_tokens.weight", &[vocab_size, hidden_size])?);
        let lm_head = if self.config.tie_word_embeddings {
            embed_tokens.shallow_clone()
        } else {
            self.filled_up(self.tensor("lm_head.weight", &[vocab_size, hidden_size])?)
        };
        let mut layers = Vec::with_capacity(num_hidden_layers);
        for layer in 0..num_hidden_layers {
            layers.push(self.layer(layer)?);
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(Weights { embed_tokens, layers, norm: self.tensor("model.norm.weight", &[hidden_size])?, lm_head })
    }

    fn layer(&self, layer: usize) -> Result<DecoderLayer> {
        let norm = |name: &str| {
            self.tensor(&format!("model.layers.{layer}.{name}.weight"), &[self.config.hidden_size])
        };
        let linear = |projection| self.linear(layer, projection);
        Ok(DecoderLayer {
            input_layernorm: norm("input_layernorm")?,
            q_proj: linear(Projection::QProj)?,
            k_proj: linear(Projection::KProj)?,
            v_proj: linear(Projection::VProj)?,
            o_proj: linear(Projection::OProj)?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            gate_proj: linear(Projection::GateProj)?,
            up_proj: linear(Projection::UpProj)?,
            down_proj: linear(Projection::DownProj)?,
        })
    }

    fn linear(&self, layer: usize, projection: Projection) -> Result<LoraLinear> {
        let name = format!("{}.weight", projection.path(layer));
        let shape = self.config.projection_shape(projection);
        let base = match self.quantization {
            Quantization::None => BaseWeight::Dense(self.tensor(&name, &shape)?),
            Quantization::Nf4 => {
                self.check_shape(&name, &shape)?;
                let weight = self.source.nf4(&name, self.device)?;
                if self.keeps_dequantised() {
                    BaseWeight::Dense(weight.dequantize(self.kind))
                } else {
                    BaseWeight::Nf4(weight)
                }
            }
        };
        let index = Projection::ALL.iter().position(|one| *one == projection).unwrap_or(0);
        Ok(LoraLinear { base, adapter: None, module: (layer * Projection::ALL.len() + index) as u32 })
    }

    /// On a GPU the head's rows are filled up with zeros: its product is five times faster at a width that is a multiple
    /// of 128. Who takes logits leaves the rest out.
    fn filled_up(&self, table: Tensor) -> Tensor {
        if !self.device.is_cuda() {
            return table;
        }
        let rows = table.size()[0];
        table.constant_pad_nd([0, 0, 0, padded_vocab(rows) - rows])
    }

    fn keeps_dequantised(&self) -> bool {
        let elements: i64 = Projection::ALL
            .iter()
            .map(|projection| self.config.projection_shape(*projection).iter().product::<i64>())
            .sum::<i64>()
            .saturating_mul(self.config.num_hidden_layers as i64);
        self.device == Device::Cpu && elements.saturating_mul(4) <= RESIDENT_BYTES
    }

    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        self.check_shape(name, shape)?;
        Ok(self.source.tensor(name)?.to_device(self.device).to_kind(self.kind))
    }

    fn check_shape(&self, name: &str, expected: &[i64]) -> Result<()> {
        match self.source.shape(name) {
            Some(shape) => {
                ensure!(shape == expected, "`{name}` has shape {shape:?}, expected {expected:?}");
                Ok(())
            }
            None => bail!("`{name}` is missing"),
        }
    }

    /// Missing and unexpected tensors are reported together: one of each usually is a renamed one.
    fn check_names(&self) -> Result<()> {
        let expected: BTreeSet<String> = self.config.tensor_names().into_iter().collect();
        let found: BTreeSet<String> =
            self.source.names().into_iter().filter(|name| !self.is_redundant(name)).collect();
        let missing: Vec<&String> = expected.difference(&found).collect();
        let unexpected: Vec<&String> = found.difference(&expected).collect();
        if missing.is_empty() && unexpected.is_empty() {
            return Ok(());
        }
        bail!(
            "the checkpoint does not fit its configuration: {}; {}",
            told("missing", &missing),
            told("unexpected", &unexpected)
        )
    }

    /// Stored by some exporters, derived here: a tied head and the rotary frequencies.
    fn is_redundant(&self, name: &str) -> bool {
        (self.config.tie_word_embeddings && name == "lm_head.weight") || name.ends_with("rotary_emb.inv_freq")
    }
}

fn told(what: &str, names: &[&String]) -> String {
    let shown: Vec<String> = names.iter().take(3).map(|name| format!("`{name}`")).collect();
    let more = if names.len() > 3 { ", …" } else { "" };
    format!("{} tensors {what} {}{more}", names.len(), shown.join(", "))
}
