//! What a model is: dimensions and multipliers, read from and written to `config.json`.
//!
//! Reading is strict: a key that is not known is refused, because a key that is passed over silently
//! (a scaling of the rotary angles, a window, a multiplier) gives a model that runs and is wrong.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{HintExt as _, user_error};

use crate::recipe::Projection;

/// The family; it decides which configuration keys are required, nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Architecture {
    /// `GraniteForCausalLM`: Llama with four multipliers.
    Granite,
    /// `LlamaForCausalLM`.
    Llama,
}

/// A dense decoder. Llama is Granite with multipliers 1, 1, 1 and attention scale `1/sqrt(head_dim)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: i64,
    /// Key and value heads.
    pub num_key_value_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Width of the MLP.
    pub intermediate_size: i64,
    /// Rows of the embedding.
    pub vocab_size: i64,
    /// Longest position.
    pub max_position_embeddings: i64,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// Term under the root of RMSNorm.
    pub rms_norm_eps: f64,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// Embeddings are multiplied by this.
    pub embedding_multiplier: f64,
    /// Scores are multiplied by this, in place of `1/sqrt(head_dim)`.
    pub attention_multiplier: f64,
    /// Both branches are multiplied by this before they join the residual stream.
    pub residual_multiplier: f64,
    /// Logits are divided by this.
    pub logits_scaling: f64,
    /// Beginning-of-text token.
    pub bos_token_id: Option<u32>,
    /// End tokens.
    pub eos_token_ids: Vec<u32>,
}

/// `config.json` of Granite-3.1-8B-Instruct, as far as it is read.
const GRANITE_8B: &str = r#"{
    "architectures": ["GraniteForCausalLM"], "model_type": "granite", "hidden_size": 4096, "intermediate_size": 12800,
    "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 49155,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 10000000.0, "tie_word_embeddings": true,
    "embedding_multiplier": 12.0, "attention_multiplier": 0.0078125, "residual_multiplier": 0.22,
    "logits_scaling": 16.0, "hidden_act": "silu", "attention_bias": false, "mlp_bias": false,
    "bos_token_id": 0, "eos_token_id": 0
}"#;

impl ModelConfig {
    /// Granite-3.1-8B-Instruct, of whose shape plans and benchmarks speak where no model is at hand.
    ///
    /// # Errors
    /// Never: what it parses is part of the program.
    pub fn granite_8b() -> Result<Self> {
        Self::from_hugging_face(&serde_json::from_str(GRANITE_8B)?, Path::new("granite-3.1-8b-instruct"))
    }

    /// `[out, in]` of a projection.
    pub fn projection_shape(&self, projection: Projection) -> [i64; 2] {
        let (hidden, inter) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        match projection {
            Projection::QProj => [q, hidden],
            Projection::KProj | Projection::VProj => [kv, hidden],
            Projection::OProj => [hidden, q],
            Projection::GateProj | Projection::UpProj => [inter, hidden],
            Projection::DownProj => [hidden, inter],
        }
    }

    /// Elements of all tensors of a checkpoint.
    pub fn parameters(&self) -> i64 {
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        let projection = |one: &Projection| self.projection_shape(*one).iter().product::<i64>();
        let layer = Projection::ALL.iter().map(projection).sum::<i64>() + 2 * self.hidden_size;
        tables * self.vocab_size * self.hidden_size + self.num_hidden_layers as i64 * layer + self.hidden_size
    }

    /// Names of all tensors of a checkpoint.
    pub fn tensor_names(&self) -> Vec<String> {
        let mut names = vec!["model.embed_tokens.weight".to_string(), "model.norm.weight".to_string()];
        if !self.tie_word_embeddings {
            names.push("lm_head.weight".to_string());
        }
        for layer in 0..self.num_hidden_layers {
            names.extend(
                Projection::ALL.iter().map(|projection| format!("{}.weight", projection.path(layer))),
            );
            names.push(format!("model.layers.{layer}.input_layernorm.weight"));
            names.push(format!("model.layers.{layer}.post_attention_layernorm.weight"));
        }
        names
    }
}

/// Keys that decide what is computed; all are read below.
const MEANINGFUL: &[&str] = &[
    "architectures",
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "rope_interleaved",
    "rms_norm_eps",
    "tie_word_embeddings",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "use_sliding_window",
    "quantization_config",
];

/// Keys that change nothing in the forward pass of a frozen, dense decoder.
const IRRELEVANT: &[&str] = &[
    "_attn_implementation_autoset",
    "_name_or_path",
    "attention_dropout",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
];

/// Larger than any dense decoder's axis; a configuration beyond it is damaged, and products of two stay in an `i64`.
const LARGEST_AXIS: i64 = 1 << 26;

impl Architecture {
    /// The class that `config.json` names.
    pub fn class(self) -> &'static str {
        match self {
            Self::Granite => "GraniteForCausalLM",
            Self::Llama => "LlamaForCausalLM",
        }
    }

    fn model_type(self) -> &'static str {
        match self {
            Self::Granite => "granite",
            Self::Llama => "llama",
        }
    }
}

impl ModelConfig {
    /// Reads a `config.json`; `origin` is its path, for messages. Absent keys take transformers' defaults,
    /// but the dimensions and Granite's four multipliers must be there.
    ///
    /// # Errors
    /// When a key is unknown, missing, out of range, or asks for what the decoder does not compute.
    pub fn from_hugging_face(config: &Value, origin: &Path) -> Result<Self> {
        let keys = Keys::new(config).with_context(|| format!("configuration `{}`", origin.display()))?;
        let config = keys.read().with_context(|| format!("configuration `{}`", origin.display()))?;
        config.check().with_context(|| format!("configuration `{}`", origin.display()))?;
        Ok(config)
    }

    /// The `config.json` that transformers reads as this model, stored in `dtype` (`bfloat16`).
    pub fn to_hugging_face(&self, dtype: &str) -> Value {
        let mut config = json!({
            "architectures": [self.architecture.class()],
            "model_type": self.architecture.model_type(),
            "attention_bias": false,
            "mlp_bias": false,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": null,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": one_or_many(&self.eos_token_ids),
            "torch_dtype": dtype,
        });
        if self.architecture == Architecture::Granite {
            config["embedding_multiplier"] = json!(self.embedding_multiplier);
            config["attention_multiplier"] = json!(self.attention_multiplier);
            config["residual_multiplier"] = json!(self.residual_multiplier);
            config["logits_scaling"] = json!(self.logits_scaling);
        }
        config
    }

    /// Checks that dimensions are positive and divide each other, and that multipliers are usable.
    ///
    /// # Errors
    /// Names the key that is out of range, with its value.
    pub fn check(&self) -> Result<()> {
        let axes = [
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", i64::try_from(self.num_hidden_layers).unwrap_or(i64::MAX)),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("intermediate_size", self.intermediate_size),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (name, value) in axes {
            ensure!((1..=LARGEST_AXIS).contains(&value), "`{name}` is {value}, expected 1 to {LARGEST_AXIS}");
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        ensure!(
            heads % kv_heads == 0,
            "`num_attention_heads` {heads} is no multiple of `num_key_value_heads` {kv_heads}"
        );
        ensure!(self.head_dim % 2 == 0, "`head_dim` {} is odd; rotary angles turn pairs", self.head_dim);
        let factors = [
            ("rope_theta", self.rope_theta),
            ("rms_norm_eps", self.rms_norm_eps),
            ("embedding_multiplier", self.embedding_multiplier),
            ("attention_multiplier", self.attention_multiplier),
            ("residual_multiplier", self.residual_multiplier),
            ("logits_scaling", self.logits_scaling),
        ];
        for (name, value) in factors {
            ensure!(value.is_finite() && value > 0.0, "`{name}` is {value}, expected a positive number");
        }
        Ok(())
    }
}

/// One id as a number, several as a list, none as null: as transformers writes them.
fn one_or_many(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [id] => json!(id),
        ids => json!(ids),
    }
}

/// The keys of a `config.json`, all of them known.
struct Keys<'a> {
    map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    fn new(config: &'a Value) -> Result<Self> {
        let map = config.as_object().context("expected a JSON object")?;
        for key in map.keys().map(String::as_str) {
            if !MEANINGFUL.contains(&key) && !IRRELEVANT.contains(&key) {
                return Err(user_error(
                    format!("unknown key `{key}`: it may change what the model computes"),
                    "use a dense Granite 3.x or Llama model; if the key is harmless, take it out of a copy of the file",
                ));
            }
        }
        Ok(Self { map })
    }

    fn read(&self) -> Result<ModelConfig> {
        let architecture = self.architecture()?;
        self.refuse_variants()?;
        let hidden_size = self.required("hidden_size")?;
        let num_attention_heads = self.required("num_attention_heads")?;
        let head_dim = match self.optional("head_dim")? {
            Some(head_dim) => head_dim,
            None => self.split_heads(hidden_size, num_attention_heads)?,
        };
        let multiplier = |key: &'static str, of_llama: f64| match architecture {
            Architecture::Granite => self
                .required(key)
                .hint("Granite needs all four multipliers; take the model's own `config.json`"),
            Architecture::Llama => self.only_granite(key).map(|()| of_llama),
        };
        Ok(ModelConfig {
            architecture,
            hidden_size,
            num_hidden_layers: self.required("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: self.optional("num_key_value_heads")?.unwrap_or(num_attention_heads),
            head_dim,
            intermediate_size: self.required("intermediate_size")?,
            vocab_size: self.required("vocab_size")?,
            max_position_embeddings: self.optional("max_position_embeddings")?.unwrap_or(2048),
            rope_theta: self.rope_theta()?,
            rms_norm_eps: self.optional("rms_norm_eps")?.unwrap_or(1e-6),
            tie_word_embeddings: self.optional("tie_word_embeddings")?.unwrap_or(false),
            embedding_multiplier: multiplier("embedding_multiplier", 1.0)?,
            attention_multiplier: multiplier("attention_multiplier", 1.0 / (head_dim as f64).sqrt())?,
            residual_multiplier: multiplier("residual_multiplier", 1.0)?,
            logits_scaling: multiplier("logits_scaling", 1.0)?,
            bos_token_id: self.optional("bos_token_id")?,
            eos_token_ids: self.eos_token_ids()?,
        })
    }

    fn architecture(&self) -> Result<Architecture> {
        let classes: Option<Vec<String>> = self.optional("architectures")?;
        let class = classes.and_then(|classes| classes.into_iter().next());
        let model_type: Option<String> = self.optional("model_type")?;
        for known in [Architecture::Granite, Architecture::Llama] {
            if class.as_deref() == Some(known.class())
                || (class.is_none() && model_type.as_deref() == Some(known.model_type()))
            {
                return Ok(known);
            }
        }
        let found = class.or(model_type).unwrap_or_else(|| "none".to_string());
        Err(user_error(
            format!(
                "architecture `{found}` is not supported, expected `GraniteForCausalLM` or `LlamaForCausalLM`"
            ),
            "use a dense Granite 3.x or Llama model",
        ))
    }

    /// Refuses what transformers computes and this decoder does not.
    fn refuse_variants(&self) -> Result<()> {
        let activation: Option<String> = self.optional("hidden_act")?;
        if let Some(activation) =
            activation.filter(|activation| !matches!(activation.as_str(), "silu" | "swish"))
        {
            bail!("`hidden_act` is `{activation}`, only `silu` is supported");
        }
        for key in ["attention_bias", "mlp_bias", "rope_interleaved", "use_sliding_window"] {
            ensure!(!self.optional::<bool>(key)?.unwrap_or(false), "`{key}` is true, which is not supported");
        }
        if let Some(window) = self.present("sliding_window") {
            // Written by some exporters beside `use_sliding_window = false`, where it has no effect.
            ensure!(
                self.map.contains_key("use_sliding_window"),
                "`sliding_window` is {window}, which is not supported"
            );
        }
        self.refuse_other_quantization()
    }

    /// Of quantised checkpoints only bitsandbytes' NF4 is read.
    fn refuse_other_quantization(&self) -> Result<()> {
        let Some(config) = self.present("quantization_config") else { return Ok(()) };
        let text = |key: &str| config.get(key).and_then(Value::as_str).unwrap_or("none");
        let four = config.get("load_in_4bit").and_then(Value::as_bool).unwrap_or(false);
        let (method, code) = (text("quant_method"), text("bnb_4bit_quant_type"));
        if four && method == "bitsandbytes" && code == "nf4" {
            return Ok(());
        }
        Err(user_error(
            format!(
                "the checkpoint is quantised in another way than bitsandbytes' NF4: `quantization_config` has \
                 `quant_method` {method}, `load_in_4bit` {four}, `bnb_4bit_quant_type` {code}"
            ),
            "give the 16-bit model; it is quantised to NF4 while loading",
        ))
    }

    fn split_heads(&self, hidden_size: i64, heads: i64) -> Result<i64> {
        ensure!(
            heads > 0 && hidden_size % heads == 0,
            "`hidden_size` {hidden_size} is no multiple of `num_attention_heads` {heads}"
        );
        Ok(hidden_size / heads)
    }

    /// A Llama configuration that carries one of Granite's multipliers is neither.
    fn only_granite(&self, key: &str) -> Result<()> {
        ensure!(self.present(key).is_none(), "`{key}` belongs to Granite, but the architecture is Llama");
        Ok(())
    }

    /// `rope_theta` lies at the top, or in `rope_parameters` since transformers 5.
    fn rope_theta(&self) -> Result<f64> {
        let mut theta = self.optional("rope_theta")?;
        for key in ["rope_scaling", "rope_parameters"] {
            let Some(rope) = self.present(key) else { continue };
            let rope = rope.as_object().with_context(|| format!("`{key}` is {rope}, expected an object"))?;
            for (name, value) in rope {
                match (name.as_str(), value) {
                    ("rope_type" | "type", Value::String(kind)) if kind == "default" => {}
                    ("rope_theta", value) => theta = Some(parse(value, "rope_theta")?),
                    _ => bail!("`{key}` has `{name}` = {value}: scaled rotary angles are not supported"),
                }
            }
        }
        Ok(theta.unwrap_or(10_000.0))
    }

    fn eos_token_ids(&self) -> Result<Vec<u32>> {
        match self.present("eos_token_id") {
            None => Ok(Vec::new()),
            Some(ids @ Value::Array(_)) => parse(ids, "eos_token_id"),
            Some(id) => Ok(vec![parse(id, "eos_token_id")?]),
        }
    }

    /// The value of a key, unless absent or null.
    fn present(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn optional<T: serde::de::DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        self.present(key).map(|value| parse(value, key)).transpose()
    }

    fn required<T: serde::de::DeserializeOwned>(&self, key: &str) -> Result<T> {
        self.optional(key)?.with_context(|| format!("missing key `{key}`"))
    }
}

fn parse<T: serde::de::DeserializeOwned>(value: &Value, key: &str) -> Result<T> {
    T::deserialize(value).with_context(|| format!("`{key}` is {value}"))
}
