//! The tiny models of `tests/fixtures` and what the oracle wrote beside them (`scripts/oracle/models.py`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Result, anyhow};
use granite::model::batch::{Batch, IGNORE, Sequence};
use granite::model::config::{Architecture, ModelConfig};
use granite::model::decoder::{Decoder, LoadOptions};
use granite::model::weights::TensorSource;
use granite::recipe::{LoraSpec, Projection, Quantization};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// Tensors by name.
pub type Named = BTreeMap<String, Tensor>;

/// Both fixtures.
pub fn all() -> [Fixture; 2] {
    [Fixture::open("tiny-granite", granite_config()), Fixture::open("tiny-llama", llama_config())]
}

/// A tiny model, its adapter as PEFT saved it, and the references.
pub struct Fixture {
    pub name: &'static str,
    pub config: ModelConfig,
    pub weights: Named,
    /// Under the program's names: `model.layers.0.self_attn.q_proj.lora_A.weight`.
    pub adapter: Named,
    tensors: Named,
    pub notes: Value,
}

impl Fixture {
    fn open(name: &'static str, config: ModelConfig) -> Self {
        let folder = folder(name);
        let adapter = read(&folder.join("adapter/adapter_model.safetensors"))
            .into_iter()
            .map(|(name, tensor)| (name.strip_prefix("base_model.model.").unwrap().to_string(), tensor))
            .collect();
        Self {
            name,
            config,
            weights: read(&folder.join("model.safetensors")),
            adapter,
            tensors: read(&folder.join("oracle.safetensors")),
            notes: serde_json::from_slice(&fs::read(folder.join("oracle.json")).unwrap()).unwrap(),
        }
    }

    /// A reference, in float64 rounded once to float32.
    pub fn reference(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{} has no `{name}`", self.name))
    }

    /// How far the oracle's own float32 run is from [`reference`](Self::reference).
    pub fn yardstick(&self, name: &str) -> f64 {
        self.notes["errors"][name]
            .as_f64()
            .unwrap_or_else(|| panic!("{} has no error of `{name}`", self.name))
    }

    /// The adapter's settings.
    pub fn lora(&self) -> LoraSpec {
        let notes = &self.notes["lora"];
        LoraSpec {
            rank: notes["rank"].as_u64().unwrap() as usize,
            alpha: notes["alpha"].as_f64().unwrap(),
            dropout: 0.0,
            rslora: notes["rslora"].as_bool().unwrap(),
            targets: Projection::ALL.to_vec(),
        }
    }

    /// The decoder without an adapter.
    pub fn decoder(&self, quantization: Quantization) -> Decoder {
        let options = LoadOptions::new(quantization, Device::Cpu);
        Decoder::load(&Source::new(&self.weights), &self.config, &options).unwrap()
    }

    /// The decoder with the fixture's adapter, whose `lora_B` is not zero.
    pub fn adapted(&self, quantization: Quantization, dropout: f64) -> Decoder {
        let mut decoder = self.decoder(quantization);
        decoder.attach_lora(&LoraSpec { dropout, ..self.lora() }, 1).unwrap();
        let parameters = decoder.adapters().unwrap();
        assert_eq!(parameters.slots().len(), self.adapter.len(), "{}: parameters of the adapter", self.name);
        for (name, mut view) in parameters.iter() {
            view.copy_(&self.adapter[name]);
        }
        decoder.adapters_changed().expect("copies are made");
        decoder
    }

    /// The packed row of the references, through the program's own packing; asserted to be the oracle's.
    pub fn batch(&self) -> Batch {
        let ids = integers(self.reference("batch.input_ids"));
        let labels = integers(self.reference("batch.labels"));
        let starts = integers(self.reference("batch.cu_seqlens"));
        let sequences: Vec<Sequence> = starts
            .windows(2)
            .map(|bounds| {
                let (begin, end) = (bounds[0] as usize, bounds[1] as usize);
                let supervised = |at: usize| at > begin && labels[at - 1] != IGNORE;
                Sequence {
                    input_ids: ids[begin..end].iter().map(|id| *id as u32).collect(),
                    loss_mask: (begin..end).map(supervised).collect(),
                    source: 0,
                }
            })
            .collect();
        let batch = Batch::pack(&sequences, Device::Cpu);
        assert_eq!(integers(&batch.labels), labels, "{}: labels", self.name);
        assert_eq!(integers(&batch.position_ids), integers(self.reference("batch.position_ids")));
        assert_eq!(batch.cu_seqlens, starts);
        batch
    }
}

/// Where a fixture lies.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// All positions of a batch, as `Decoder::logits` wants them.
pub fn all_rows(batch: &Batch) -> Tensor {
    Tensor::arange(batch.tokens(), (Kind::Int64, Device::Cpu))
}

/// A tensor's elements.
pub fn integers(tensor: &Tensor) -> Vec<i64> {
    Vec::try_from(tensor.to_kind(Kind::Int64)).unwrap()
}

/// Tensors in memory as a checkpoint; behind a lock, since a tensor cannot be shared between threads.
pub struct Source(Mutex<Named>);

impl Source {
    /// Views of `weights`.
    pub fn new(weights: &Named) -> Self {
        Self(Mutex::new(shallow(weights)))
    }
}

impl TensorSource for Source {
    fn names(&self) -> Vec<String> {
        self.0.lock().unwrap().keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<i64>> {
        self.0.lock().unwrap().get(name).map(Tensor::size)
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        let tensors = self.0.lock().unwrap();
        tensors.get(name).map(Tensor::shallow_clone).ok_or_else(|| anyhow!("no tensor `{name}`"))
    }
}

/// The same tensors under the same names.
pub fn shallow(named: &Named) -> Named {
    named.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

fn read(path: &Path) -> Named {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let convert = |view: safetensors::tensor::TensorView| {
        let shape: Vec<i64> = view.shape().iter().map(|size| *size as i64).collect();
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::BF16 => Kind::BFloat16,
            Dtype::I64 => Kind::Int64,
            Dtype::U8 => Kind::Uint8,
            other => panic!("{}: no case for {other:?}", path.display()),
        };
        Tensor::from_data_size(view.data(), &shape, kind)
    };
    file.tensors().into_iter().map(|(name, view)| (name, convert(view))).collect()
}

/// What `tests/fixtures/tiny-granite/config.json` says.
pub fn granite_config() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Granite,
        hidden_size: 64,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 16,
        intermediate_size: 112,
        vocab_size: 259,
        max_position_embeddings: 4096,
        rope_theta: 1e7,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        embedding_multiplier: 1.3,
        attention_multiplier: 0.11,
        residual_multiplier: 0.6,
        logits_scaling: 1.7,
        bos_token_id: Some(0),
        eos_token_ids: vec![0],
    }
}

/// What `tests/fixtures/tiny-llama/config.json` says.
pub fn llama_config() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        hidden_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 3,
        num_key_value_heads: 1,
        head_dim: 32,
        intermediate_size: 80,
        vocab_size: 259,
        max_position_embeddings: 512,
        rope_theta: 500.0,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: false,
        embedding_multiplier: 1.0,
        attention_multiplier: 1.0 / 32f64.sqrt(),
        residual_multiplier: 1.0,
        logits_scaling: 1.0,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    }
}
