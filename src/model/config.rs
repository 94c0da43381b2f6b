//! What a model is: dimensions and multipliers.

use serde::{Deserialize, Serialize};

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
