//! The real SmolLM2-135M-Instruct, as GGUF: its folder is named by `GRANITE_SMOLLM2`.

use std::path::PathBuf;

use granite::checkpoint::base::{BaseModel, open_tokenizer};
use granite::model::config::Architecture;
use tch::Kind;

/// The folder, or `None` with a word on stderr.
pub fn folder() -> Option<PathBuf> {
    let folder = std::env::var_os("GRANITE_SMOLLM2").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("skipped: GRANITE_SMOLLM2 does not name the folder of SmolLM2's GGUF file");
    }
    folder
}

#[test]
fn its_metadata_become_a_configuration() {
    let Some(folder) = folder() else { return };
    let model = BaseModel::open(folder.to_str().unwrap()).unwrap();
    let config = &model.config;
    assert_eq!(config.architecture, Architecture::Llama);
    assert_eq!((config.hidden_size, config.intermediate_size, config.num_hidden_layers), (576, 1536, 30));
    assert_eq!((config.num_attention_heads, config.num_key_value_heads, config.head_dim), (9, 3, 64));
    assert_eq!((config.vocab_size, config.max_position_embeddings), (49152, 8192));
    assert_eq!((config.rope_theta, config.rms_norm_eps), (100_000.0, 1e-5));
    assert!(config.tie_word_embeddings);
    assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(1), [2].as_slice()));
    assert_eq!(model.tokenizer.eos_token.as_deref(), Some("<|im_end|>"));
    assert_eq!(model.hash.len(), 64);
    let mut expected = config.tensor_names();
    expected.sort();
    assert_eq!(model.tensors.names(), expected);
    let (tokenizer, again) = open_tokenizer(folder.to_str().unwrap()).unwrap();
    assert_eq!((tokenizer, again.as_ref()), (model.tokenizer, Some(config)));
}

#[test]
fn its_tensors_have_the_shapes_of_the_configuration() {
    let Some(folder) = folder() else { return };
    let model = BaseModel::open(folder.to_str().unwrap()).unwrap();
    let embedding = model.tensors.tensor("model.embed_tokens.weight").unwrap();
    assert_eq!((embedding.size(), embedding.kind()), (vec![49152, 576], Kind::Float));
    let key = model.tensors.tensor("model.layers.29.self_attn.k_proj.weight").unwrap();
    assert_eq!(key.size(), [192, 576]);
    assert!(bool::try_from(key.isfinite().all()).unwrap());
    let quantised = model.tensors.nf4("model.layers.29.mlp.down_proj.weight").unwrap();
    assert_eq!(quantised.shape, [576, 1536]);
}
