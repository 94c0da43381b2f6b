//! What a model is: dimensions and multipliers.

use serde::{Deserialize, Serialize};

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

impl ModelConfig {
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
