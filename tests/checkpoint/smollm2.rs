//! The real SmolLM2-135M-Instruct, as GGUF: its folder is named by `GRANITE_SMOLLM2`.

use std::path::PathBuf;

use granite::checkpoint::base::{BaseModel, open_tokenizer};
use granite::hex::hex;
use granite::kernels::host;
use granite::model::config::Architecture;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tch::{Device, Kind};

/// Written by `scripts/oracle/gguf_smollm2.py`.
const FIXTURE: &str = include_str!("../fixtures/smollm2-gguf.json");

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
    let quantised = model.tensors.nf4("model.layers.29.mlp.down_proj.weight", Device::Cpu).unwrap();
    assert_eq!(quantised.shape, [576, 1536]);
}

#[test]
fn its_tensors_are_those_of_transformers() {
    let Some(folder) = folder() else { return };
    let model = BaseModel::open(folder.to_str().unwrap()).unwrap();
    let fixture: Value = serde_json::from_str(FIXTURE).unwrap();
    let expected = fixture["tensors"].as_object().unwrap();
    assert_eq!(expected.len(), 20);
    for (name, hash) in expected {
        let tensor = model.tensors.tensor(name).unwrap();
        let mut ours = Sha256::new();
        for values in host::slice::<f32>(&tensor).unwrap().chunks(4096) {
            ours.update(values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>());
        }
        assert_eq!(hash.as_str().unwrap(), hex(&ours.finalize()), "{name}");
    }
}

#[test]
fn its_rebuilt_tokenizer_equals_a_bpe_written_out() {
    let Some(folder) = folder() else { return };
    let (files, _) = open_tokenizer(folder.to_str().unwrap()).unwrap();
    let tokenizer = tokenizers::Tokenizer::from_bytes(&files.tokenizer_json).unwrap();
    let fixture: Value = serde_json::from_str(FIXTURE).unwrap();
    for case in fixture["strings"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        let encoding = tokenizer.encode(text, true).unwrap();
        assert_eq!(encoding.get_ids(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    }
    let Some(data) = std::env::var_os("GRANITE_TEST_DATA").map(PathBuf::from) else {
        eprintln!("skipped: GRANITE_TEST_DATA does not name the folder of real data");
        return;
    };
    let (mut hash, mut tokens, mut strings) = (Sha256::new(), 0, 0);
    for text in real_strings(&data) {
        let encoding = tokenizer.encode(text.as_str(), true).unwrap();
        let ids = encoding.get_ids();
        hash.update((ids.len() as u32).to_le_bytes());
        hash.update(ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>());
        (tokens, strings) = (tokens + ids.len() as u64, strings + 1);
    }
    let real = &fixture["real"];
    assert_eq!((real["strings"].as_u64(), real["tokens"].as_u64()), (Some(strings), Some(tokens)));
    assert_eq!(real["sha256"].as_str().unwrap(), hex(&hash.finalize()));
}

/// As the script takes them: all texts of the first 200 records of Dolly and of CodeAlpaca.
fn real_strings(data: &std::path::Path) -> Vec<String> {
    let dolly = std::fs::read_to_string(data.join("dumps/dolly/databricks-dolly-15k.jsonl")).unwrap();
    let code = std::fs::read(data.join("dumps/codealpaca/code_alpaca_2k.json")).unwrap();
    let code: Vec<Value> = serde_json::from_slice(&code).unwrap();
    let texts = |record: &Value, keys: [&str; 3]| keys.map(|key| record[key].as_str().unwrap().to_string());
    let dolly = dolly.split('\n').take(200).map(|line| serde_json::from_str::<Value>(line).unwrap());
    dolly
        .flat_map(|record| texts(&record, ["instruction", "context", "response"]))
        .chain(code.iter().take(200).flat_map(|record| texts(record, ["instruction", "input", "output"])))
        .collect()
}
