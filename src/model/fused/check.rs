//! The fused passes against the twins, on the GPU at hand: `granite doctor --kernels` runs this.
//!
//! Three decoders have the same weights: the twin in f32 on the processor, which is the truth; the twin in bf16 on the GPU,
//! which shows what bf16 costs; and the fused passes. Losses and every adapter's gradient may be no farther from the truth
//! than the bf16 twin's, times [`SLACK`]. What is computed again must come out the same bit for bit.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::kernels::nf4::Nf4Weight;
use crate::model::batch::{Batch, Sequence};
use crate::model::config::ModelConfig;
use crate::model::decoder::{Decoder, GradOptions, LoadOptions, Loss};
use crate::model::fused::plan::{Limits, MemoryLayout};
use crate::model::params::ParamSet;
use crate::model::random::RandomWeights;
use crate::model::weights::TensorSource;
use crate::recipe::{LoraSpec, Projection, Quantization, Recompute};

/// How much farther from the truth than the twin a result may be: it rounds in other places, and errors are random.
const SLACK: f64 = 1.5;

/// One shape of model, adapter and batch.
#[derive(Clone)]
struct Case {
    name: &'static str,
    /// Strength of noise on the embeddings: only where both sides draw it with one generator.
    noise: f64,
    lora: LoraSpec,
    lengths: &'static [usize],
    head_dim: i64,
}

/// Compares and counts the comparisons.
///
/// # Errors
/// What differed, by how much, and by how much it may.
pub fn against_twins(device: Device) -> Result<usize> {
    let mut compared = 0;
    for case in &cases() {
        compared += compare(case, device).with_context(|| format!("case `{}`", case.name))?;
    }
    Ok(compared)
}

fn cases() -> [Case; 5] {
    let lora = |rank, dropout, targets: &[Projection]| LoraSpec {
        rank,
        alpha: 16.0,
        dropout,
        targets: targets.to_vec(),
        ..LoraSpec::default()
    };
    use Projection::{DownProj, QProj, UpProj, VProj};
    [
        Case {
            noise: 0.0,
            name: "packed",
            lora: lora(8, 0.0, &Projection::ALL),
            lengths: &[1, 33, 130, 7, 64, 200],
            head_dim: 64,
        },
        Case {
            noise: 0.0,
            name: "equal lengths",
            lora: lora(16, 0.0, &Projection::ALL),
            lengths: &[128, 128, 128],
            head_dim: 128,
        },
        Case {
            noise: 0.0,
            name: "heads that libtorch takes",
            lora: lora(8, 0.0, &Projection::ALL),
            lengths: &[1, 33, 130],
            head_dim: 32,
        },
        Case {
            noise: 0.0,
            name: "dropout",
            lora: lora(8, 0.1, &Projection::ALL),
            lengths: &[65, 300, 2],
            head_dim: 64,
        },
        Case {
            noise: 0.0,
            name: "some projections, rank 12",
            lora: lora(12, 0.1, &[QProj, VProj, UpProj, DownProj]),
            lengths: &[97, 100],
            head_dim: 64,
        },
    ]
}

fn compare(case: &Case, device: Device) -> Result<usize> {
    let config = config(case.head_dim)?;
    let weights = Fixed::new(&config)?;
    let truth = Trained::new(case, &config, &weights, Device::Cpu, None)?;
    let twin = Trained::new(case, &config, &weights, device, None)?;
    let fused = Trained::new(case, &config, &weights, device, Some(Recompute::None.into()))?;
    for layout in MemoryLayout::all() {
        let other = Trained::new(case, &config, &weights, device, Some(layout))?;
        ensure!(
            other.gradients.flat().equal(fused.gradients.flat()) && other.loss == fused.loss,
            "{layout} gives other bits than none of it"
        );
    }
    let errors = |one: &Trained| -> f64 {
        let pairs = one.loss.per_sequence.iter().zip(&truth.loss.per_sequence);
        pairs.map(|(found, wanted)| (found - wanted).powi(2)).sum::<f64>().sqrt()
    };
    let (allowed, found) = (errors(&twin) * SLACK + 1e-3 * truth.loss.sum(), errors(&fused));
    ensure!(found <= allowed, "losses are {found:.2e} from the truth, allowed are {allowed:.2e}");
    let mut compared = 3;
    for ((name, wanted), ((_, of_twin), (_, found))) in
        truth.gradients.iter().zip(twin.gradients.iter().zip(fused.gradients.iter()))
    {
        let norm = wanted.norm().double_value(&[]);
        let error = |one: &Tensor| (one.to_device(Device::Cpu) - &wanted).norm().double_value(&[]) / norm;
        let (allowed, found) = (error(&of_twin) * SLACK, error(&found));
        ensure!(norm > 0.0, "the gradient of `{name}` vanishes");
        ensure!(
            found <= allowed,
            "the gradient of `{name}` is {found:.2e} of its norm from the truth, allowed are {allowed:.2e}"
        );
        compared += 1;
    }
    Ok(compared)
}

/// One decoder after a backward pass.
struct Trained {
    loss: Loss,
    gradients: ParamSet,
}

impl Trained {
    fn new(
        case: &Case,
        config: &ModelConfig,
        weights: &Fixed,
        device: Device,
        fused: Option<MemoryLayout>,
    ) -> Result<Self> {
        let load = LoadOptions::new(Quantization::Nf4, device);
        let mut decoder = Decoder::load(weights, config, &load)?;
        decoder.attach_lora(&case.lora, 5)?;
        let params = decoder.adapters().context("no adapter")?;
        // B begins at zero, which would hide half of the gradients.
        tch::manual_seed(11);
        let noise = Tensor::randn([params.flat().size()[0]], (Kind::Float, Device::Cpu)) * 0.02;
        tch::no_grad(|| params.flat().shallow_clone().copy_(&noise));
        decoder.adapters_changed()?;
        let batch = batch(case, config, device);
        if let Some(layout) = fused {
            // More room than the batch needs, so that buffers are used in part; too little for its sequences.
            let limits = Limits { tokens: batch.tokens() + 37, sequences: batch.sources.len() as i64 - 1 };
            decoder.prepare(limits, layout)?;
        }
        let mut gradients = decoder.adapters().context("no adapter")?.zeros_on(device);
        let options =
            GradOptions { scale: 1.0 / batch.supervised as f64, seed: 17, microbatch: 3, noise: case.noise };
        let loss = decoder.loss_and_grad(&batch, &options, &mut gradients)?;
        Ok(Self { loss, gradients })
    }
}

fn config(head_dim: i64) -> Result<ModelConfig> {
    let value = json!({
        "architectures": ["GraniteForCausalLM"], "model_type": "granite", "hidden_size": 4 * head_dim,
        "intermediate_size": 640, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 515, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "tie_word_embeddings": true, "embedding_multiplier": 12.0, "attention_multiplier": 1.0 / head_dim as f64,
        "residual_multiplier": 0.22, "logits_scaling": 4.0, "hidden_act": "silu", "attention_bias": false,
        "mlp_bias": false, "bos_token_id": 0, "eos_token_id": 0
    });
    ModelConfig::from_hugging_face(&value, "the check's model".as_ref())
}

/// Every third token unsupervised, ids in no order.
fn batch(case: &Case, config: &ModelConfig, device: Device) -> Batch {
    let sequences: Vec<Sequence> = case
        .lengths
        .iter()
        .map(|length| Sequence {
            input_ids: (0..*length)
                .map(|at| ((at * 7919 + length * 31) % config.vocab_size as usize) as u32)
                .collect(),
            loss_mask: (0..*length).map(|at| at % 3 != 0).collect(),
            source: 0,
        })
        .collect();
    Batch::pack(&sequences, device)
}

/// Random weights that stay the same. The locks make them `Sync`, which tensors are not.
struct Fixed {
    dense: Mutex<BTreeMap<String, Tensor>>,
    nf4: Mutex<BTreeMap<String, Nf4Weight>>,
}

impl Fixed {
    fn new(config: &ModelConfig) -> Result<Self> {
        let source = RandomWeights::new(config, Device::Cpu);
        let (mut dense, mut nf4) = (BTreeMap::new(), BTreeMap::new());
        for name in source.names() {
            if name.contains("_proj") {
                nf4.insert(name.clone(), source.nf4(&name, Device::Cpu)?);
            } else {
                dense.insert(name.clone(), source.tensor(&name)?);
            }
        }
        Ok(Self { dense: Mutex::new(dense), nf4: Mutex::new(nf4) })
    }

    fn with<T, R>(map: &Mutex<T>, look: impl FnOnce(&T) -> R) -> R {
        look(&map.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl TensorSource for Fixed {
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = Self::with(&self.dense, |map| map.keys().cloned().collect());
        names.extend(Self::with(&self.nf4, |map| map.keys().cloned().collect::<Vec<_>>()));
        names.sort();
        names
    }

    fn shape(&self, name: &str) -> Option<Vec<i64>> {
        Self::with(&self.dense, |map| map.get(name).map(Tensor::size))
            .or_else(|| Self::with(&self.nf4, |map| map.get(name).map(|weight| weight.shape.to_vec())))
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        Self::with(&self.dense, |map| map.get(name).map(Tensor::shallow_clone))
            .with_context(|| format!("there is no `{name}`"))
    }

    fn nf4(&self, name: &str, device: Device) -> Result<Nf4Weight> {
        Self::with(&self.nf4, |map| map.get(name).map(|weight| weight.to_device(device)))
            .with_context(|| format!("there is no `{name}`"))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    /// In f32 both ways round alike, so that a wrong line shows far above the noise.
    #[test]
    fn the_passes_are_the_layers_in_f32() {
        let noisy = Case { name: "noise on the embeddings", noise: 5.0, ..cases()[0].clone() };
        for case in cases().into_iter().chain([noisy]) {
            let config = config(case.head_dim).unwrap();
            let weights = Fixed::new(&config).unwrap();
            let truth = Trained::new(&case, &config, &weights, Device::Cpu, None).unwrap();
            for layout in MemoryLayout::all() {
                let fused = Trained::new(&case, &config, &weights, Device::Cpu, Some(layout)).unwrap();
                let name = case.name;
                for (found, wanted) in fused.loss.per_sequence.iter().zip(&truth.loss.per_sequence) {
                    assert!((found - wanted).abs() <= 1e-5 * wanted, "{name}, {layout}: {found} {wanted}");
                }
                for ((slot, found), (_, wanted)) in fused.gradients.iter().zip(truth.gradients.iter()) {
                    let norm = wanted.norm().double_value(&[]);
                    let error = (found - &wanted).norm().double_value(&[]) / norm;
                    assert!(norm > 0.0 && error < 2e-5, "{name}, {layout}, {slot}: {error:e}");
                }
            }
        }
    }
}
