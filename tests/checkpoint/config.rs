//! `config.json`: read strictly, written back as it was meant.

use std::path::Path;

use granite::model::config::{Architecture, ModelConfig};
use serde_json::{Value, json};

fn granite_config() -> Value {
    json!({
        "architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_bias": false,
        "attention_dropout": 0.1, "attention_multiplier": 0.0078125, "bos_token_id": 0,
        "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 12800, "logits_scaling": 16.0,
        "max_position_embeddings": 131_072, "mlp_bias": false, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0, "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10_000_000.0, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 49155,
    })
}

fn llama_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
    })
}

fn read(config: &Value) -> anyhow::Result<ModelConfig> {
    ModelConfig::from_hugging_face(config, Path::new("somewhere/config.json"))
}

fn refusal(mut config: Value, key: &str, value: Value) -> String {
    config[key] = value;
    let message = granite::error::render(&read(&config).unwrap_err());
    assert!(message.contains("somewhere/config.json"), "{message}");
    message
}

#[test]
fn granite_is_read_whole() {
    let config = read(&granite_config()).unwrap();
    assert_eq!(config.architecture, Architecture::Granite);
    assert_eq!((config.head_dim, config.num_hidden_layers, config.vocab_size), (128, 40, 49155));
    assert_eq!(config.attention_multiplier, 0.0078125);
    assert_eq!((config.embedding_multiplier, config.residual_multiplier), (12.0, 0.22));
    assert_eq!((config.logits_scaling, config.rope_theta), (16.0, 1e7));
    assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(0), vec![0]));
}

#[test]
fn llama_takes_the_defaults_of_transformers() {
    let config = read(&llama_config()).unwrap();
    assert_eq!((config.num_key_value_heads, config.head_dim), (4, 16));
    assert_eq!(
        (config.rope_theta, config.rms_norm_eps, config.max_position_embeddings),
        (10_000.0, 1e-6, 2048)
    );
    assert_eq!((config.attention_multiplier, config.logits_scaling), (0.25, 1.0));
    assert!(!config.tie_word_embeddings);
}

#[test]
fn what_is_written_is_read_back() {
    for config in [granite_config(), llama_config()] {
        let mut config = read(&config).unwrap();
        for eos_token_ids in [vec![], vec![7], vec![7, 9]] {
            config.eos_token_ids = eos_token_ids;
            assert_eq!(read(&config.to_hugging_face("bfloat16")).unwrap(), config);
        }
    }
}

#[test]
fn every_granite_multiplier_is_required() {
    for key in ["attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"] {
        let message = refusal(granite_config(), key, Value::Null);
        assert!(message.contains(&format!("missing key `{key}`")), "{message}");
        assert!(refusal(llama_config(), key, json!(2.0)).contains(key));
        for value in [json!(0.0), json!(-1.0), json!("x")] {
            assert!(refusal(granite_config(), key, value).contains(key));
        }
    }
}

#[test]
fn the_base_of_the_angles_may_lie_in_rope_parameters() {
    let mut config = llama_config();
    config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 5e5});
    assert_eq!(read(&config).unwrap().rope_theta, 5e5);
    config["rope_parameters"] = json!({"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0});
    assert!(read(&config).is_err());
    let scaled = refusal(llama_config(), "rope_scaling", json!({"type": "linear", "factor": 2.0}));
    assert!(scaled.contains("scaled rotary angles"), "{scaled}");
    assert!(refusal(llama_config(), "rope_scaling", json!([])).contains("expected an object"));
    assert!(refusal(llama_config(), "rope_parameters", json!({"rope_theta": "big"})).contains("rope_theta"));
}

#[test]
fn what_the_decoder_does_not_compute_is_refused() {
    let cases = [
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
        ("rope_interleaved", json!(true)),
        ("hidden_act", json!("gelu")),
        ("sliding_window", json!(4096)),
        ("quantization_config", json!({"load_in_4bit": true})),
        ("architectures", json!(["MistralForCausalLM"])),
        ("partial_rotary_factor", json!(0.5)),
        ("num_local_experts", json!(8)),
        ("head_dim", json!(15)),
        ("num_key_value_heads", json!(3)),
        ("num_attention_heads", json!(0)),
        ("num_attention_heads", json!(5)),
        ("hidden_size", json!(-64)),
        ("hidden_size", json!(1e3)),
        ("hidden_size", json!(i64::MAX)),
        ("vocab_size", json!("many")),
        ("num_hidden_layers", json!(-1)),
        ("rms_norm_eps", json!(0.0)),
        ("eos_token_id", json!(-1)),
        ("eos_token_id", json!(["x"])),
    ];
    for (key, value) in cases {
        let message = refusal(llama_config(), key, value.clone());
        assert!(message.contains(key) || message.contains("architecture"), "{key} {value}: {message}");
    }
    for key in ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
    {
        assert!(refusal(llama_config(), key, Value::Null).contains(&format!("missing key `{key}`")));
    }
    assert!(read(&json!([])).is_err());
}

#[test]
fn parameters_are_the_elements_of_all_tensors() {
    // As its model card counts them.
    assert_eq!(ModelConfig::granite_8b().unwrap().parameters(), 8_170_848_256);
}
