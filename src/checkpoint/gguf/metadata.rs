//! Metadata of a GGUF file as a [`ModelConfig`], and its tensors' names as Hugging Face's.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};

use super::header::{Header, Value};
use crate::error::user_error;
use crate::model::config::{Architecture, ModelConfig};

/// Metadata by key, read as types.
#[derive(Debug, Clone, Copy)]
pub struct Metadata<'a> {
    map: &'a BTreeMap<String, Value>,
}

impl<'a> Metadata<'a> {
    /// Reads this metadata.
    pub fn new(map: &'a BTreeMap<String, Value>) -> Self {
        Self { map }
    }

    /// Whether there is such a key.
    pub fn contains(self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// An integer, `None` when absent.
    ///
    /// # Errors
    /// When it is of another type or does not fit.
    pub fn integer<T: TryFrom<i128>>(self, key: &str) -> Result<Option<T>> {
        match self.map.get(key) {
            None => Ok(None),
            Some(Value::Integer(value)) => T::try_from(*value)
                .ok()
                .map(Some)
                .with_context(|| format!("`{key}` is {value}, which is out of range")),
            Some(Value::List(_)) => bail!("`{key}` differs from layer to layer, which is not supported"),
            Some(other) => bail!("`{key}` is {other:?}, expected an integer"),
        }
    }

    /// A number, `None` when absent. A 32-bit float is read by its shortest decimal, so that 0.22 is 0.22
    /// as in the `config.json` that was converted.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn float(self, key: &str) -> Result<Option<f64>> {
        match self.map.get(key) {
            None => Ok(None),
            Some(Value::Float32(value)) => Ok(Some(value.to_string().parse()?)),
            Some(Value::Float64(value)) => Ok(Some(*value)),
            Some(Value::Integer(value)) => Ok(Some(*value as f64)),
            Some(other) => bail!("`{key}` is {other:?}, expected a number"),
        }
    }

    /// A truth value, `None` when absent.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn bool(self, key: &str) -> Result<Option<bool>> {
        match self.map.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => bail!("`{key}` is {other:?}, expected true or false"),
        }
    }

    /// A text, `None` when absent.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn text(self, key: &str) -> Result<Option<&'a str>> {
        match self.map.get(key) {
            None => Ok(None),
            Some(Value::Text(value)) => Ok(Some(value)),
            Some(other) => bail!("`{key}` is {other:?}, expected a text"),
        }
    }

    /// A list of texts.
    ///
    /// # Errors
    /// When it is absent or of another type.
    pub fn texts(self, key: &str) -> Result<&'a [String]> {
        match self.map.get(key) {
            Some(Value::Texts(values)) => Ok(values),
            _ => bail!("`{key}` is missing or no list of texts"),
        }
    }

    /// A list of integers, `None` when absent.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn integers(self, key: &str) -> Result<Option<Vec<i128>>> {
        let integer = |value: &Value| match value {
            Value::Integer(value) => Ok(*value),
            other => bail!("`{key}` has {other:?}, expected integers"),
        };
        match self.map.get(key) {
            None => Ok(None),
            Some(Value::List(values)) => values.iter().map(integer).collect::<Result<_>>().map(Some),
            Some(_) => bail!("`{key}` is no list of integers"),
        }
    }

    /// The model's family.
    ///
    /// # Errors
    /// When it is neither Granite nor Llama, or the file is one of several parts.
    pub fn architecture(self) -> Result<Architecture> {
        let parts = self.integer::<u64>("split.count")?.unwrap_or(1);
        if parts > 1 {
            return Err(user_error(
                format!("the file is one of {parts} parts"),
                "join them with `llama-gguf-split --merge`",
            ));
        }
        match self.text("general.architecture")? {
            Some("granite") => Ok(Architecture::Granite),
            Some("llama") => Ok(Architecture::Llama),
            other => Err(user_error(
                format!(
                    "architecture `{}` is not supported, expected `granite` or `llama`",
                    other.unwrap_or("none")
                ),
                "use a dense Granite 3.x or Llama model",
            )),
        }
    }
}

/// Reads the configuration. llama.cpp's converter writes the four multipliers as they stand in `config.json`:
/// `attention.scale`, `embedding_scale` and `residual_scale` multiply, `logit_scale` divides.
///
/// # Errors
/// When a key is missing, out of range, or asks for what the decoder does not compute.
pub fn read_config(header: &Header) -> Result<ModelConfig> {
    let metadata = Metadata::new(&header.metadata);
    let architecture = metadata.architecture()?;
    let keys = ModelKeys {
        metadata,
        prefix: if architecture == Architecture::Granite { "granite" } else { "llama" },
    };
    keys.refuse_variants(header)?;
    let hidden_size = keys.required("embedding_length")?;
    let heads: i64 = keys.required("attention.head_count")?;
    let head_dim = keys.head_dim(hidden_size, heads)?;
    let multiplier = |key: &str, of_llama: f64| match architecture {
        Architecture::Granite => keys.float(key)?.with_context(|| format!("missing key `granite.{key}`")),
        Architecture::Llama => Ok(of_llama),
    };
    let config = ModelConfig {
        architecture,
        hidden_size,
        num_hidden_layers: keys.required("block_count")?,
        num_attention_heads: heads,
        num_key_value_heads: keys.integer("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        intermediate_size: keys.required("feed_forward_length")?,
        vocab_size: vocab_size(header)?,
        max_position_embeddings: keys.required("context_length")?,
        rope_theta: keys.float("rope.freq_base")?.unwrap_or(10_000.0),
        rms_norm_eps: keys.float("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-6),
        tie_word_embeddings: !header.tensors.contains_key("output.weight"),
        embedding_multiplier: multiplier("embedding_scale", 1.0)?,
        attention_multiplier: multiplier("attention.scale", 1.0 / (head_dim as f64).sqrt())?,
        residual_multiplier: multiplier("residual_scale", 1.0)?,
        logits_scaling: multiplier("logit_scale", 1.0)?,
        bos_token_id: metadata.integer("tokenizer.ggml.bos_token_id")?,
        eos_token_ids: end_ids(metadata)?,
    };
    config.check()?;
    Ok(config)
}

/// The end token and, where it is another one, the end of a turn.
///
/// # Errors
/// When one of them is no token id.
pub fn end_ids(metadata: Metadata<'_>) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        ids.extend(metadata.integer::<u32>(key)?.filter(|id| !ids.contains(id)));
    }
    Ok(ids)
}

/// Rows of the embedding: the one size that the metadata do not always hold.
fn vocab_size(header: &Header) -> Result<i64> {
    let embedding =
        header.tensors.get("token_embd.weight").context("there is no tensor `token_embd.weight`")?;
    embedding.shape.first().copied().context("`token_embd.weight` has no axes")
}

/// The keys that begin with the architecture's name.
struct ModelKeys<'a> {
    metadata: Metadata<'a>,
    prefix: &'static str,
}

impl ModelKeys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn integer<T: TryFrom<i128>>(&self, key: &str) -> Result<Option<T>> {
        self.metadata.integer(&self.key(key))
    }

    fn required<T: TryFrom<i128>>(&self, key: &str) -> Result<T> {
        self.integer(key)?.with_context(|| format!("missing key `{}`", self.key(key)))
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        self.metadata.float(&self.key(key))
    }

    fn head_dim(&self, hidden_size: i64, heads: i64) -> Result<i64> {
        let head_dim = match self.integer("attention.key_length")? {
            Some(head_dim) => head_dim,
            None if heads > 0 && hidden_size % heads == 0 => hidden_size / heads,
            None => bail!("`{}` {hidden_size} is no multiple of {heads} heads", self.key("embedding_length")),
        };
        for key in ["attention.value_length", "rope.dimension_count"] {
            let other = self.integer::<i64>(key)?.unwrap_or(head_dim);
            ensure!(
                other == head_dim,
                "`{}` is {other}, expected the head's width {head_dim}",
                self.key(key)
            );
        }
        Ok(head_dim)
    }

    /// Refuses what llama.cpp computes and this decoder does not.
    fn refuse_variants(&self, header: &Header) -> Result<()> {
        let scaling = self.metadata.text(&self.key("rope.scaling.type"))?.unwrap_or("none");
        ensure!(
            scaling == "none" && !header.tensors.contains_key("rope_freqs.weight"),
            "rotary angles are scaled (`{scaling}`), which is not supported"
        );
        for key in ["expert_count", "attention.sliding_window"] {
            let value = self.integer::<i64>(key)?.unwrap_or(0);
            ensure!(value == 0, "`{}` is {value}, which is not supported", self.key(key));
        }
        if self.prefix == "llama" {
            for key in ["attention.scale", "embedding_scale", "residual_scale", "logit_scale"] {
                let value = self.float(key)?.unwrap_or(0.0);
                ensure!(value == 0.0, "`llama.{key}` is {value}: a multiplier that Llama does not have");
            }
        }
        Ok(())
    }
}

/// The Hugging Face name of a tensor, `None` for one that a dense Llama or Granite does not have.
pub fn hugging_face_name(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".to_string()),
        "output_norm.weight" => return Some("model.norm.weight".to_string()),
        "output.weight" => return Some("lm_head.weight".to_string()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let module = match rest.strip_suffix(".weight")? {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{module}.weight"))
}
