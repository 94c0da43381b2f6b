//! Hugging Face folders: whole and sharded, with every way to spell a tokenizer's settings, and broken ones.

use std::fs;
use std::path::Path;

use granite::checkpoint::base::{BaseModel, open_tokenizer};
use granite::error::render;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::tiny;

/// A copy of tiny Llama that a test may break.
fn copy() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(format!("{}/{file}", tiny("llama")), folder.path().join(file)).unwrap();
    }
    folder
}

fn open(folder: &Path) -> anyhow::Result<BaseModel> {
    BaseModel::open(folder.to_str().unwrap())
}

fn refusal(folder: &Path) -> String {
    render(&open(folder).unwrap_err())
}

fn edit(folder: &Path, file: &str, change: impl FnOnce(&mut Value)) {
    let path = folder.join(file);
    let mut value: Value =
        fs::read(&path).map(|bytes| serde_json::from_slice(&bytes).unwrap()).unwrap_or_else(|_| json!({}));
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// Splits `model.safetensors` in two shards with an index.
fn shard(folder: &Path) {
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut map = serde_json::Map::new();
    for (number, half) in [0, 1].into_iter().enumerate() {
        let name = format!("model-0000{}-of-00002.safetensors", number + 1);
        let mut tensors = file.tensors();
        tensors.sort_by(|one, other| one.0.cmp(&other.0));
        let tensors: Vec<_> =
            tensors.into_iter().enumerate().filter(|(at, _)| at % 2 == half).map(|(_, one)| one).collect();
        map.extend(tensors.iter().map(|(tensor, _)| (tensor.clone(), json!(name))));
        safetensors::serialize_to_file(tensors, None, &folder.join(&name)).unwrap();
    }
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn shards_hold_the_same_model_as_one_file() {
    let (whole, sharded) = (copy(), copy());
    shard(sharded.path());
    let (whole, sharded) = (open(whole.path()).unwrap(), open(sharded.path()).unwrap());
    assert_eq!(whole.hash, sharded.hash);
    assert_eq!(whole.tensors.names(), sharded.tensors.names());
    for name in whole.tensors.names() {
        assert_eq!(whole.tensors.shape(&name), sharded.tensors.shape(&name));
        let (one, other) = (whole.tensors.tensor(&name).unwrap(), sharded.tensors.tensor(&name).unwrap());
        assert!(one.kind() == other.kind() && one.equal(&other), "{name}");
    }
}

#[test]
fn the_hash_follows_the_weights() {
    let folder = copy();
    let before = open(folder.path()).unwrap().hash;
    let path = folder.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    assert_ne!(open(folder.path()).unwrap().hash, before);
}

#[test]
fn a_cut_file_names_the_tensor_that_is_missing() {
    let folder = copy();
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
    let message = refusal(folder.path());
    assert!(
        message.contains("model.safetensors` is cut: tensor `") && message.contains("hint: "),
        "{message}"
    );
    for length in [1, 7, 9, 100] {
        fs::write(&path, &bytes[..length]).unwrap();
        assert!(refusal(folder.path()).contains("model.safetensors"));
    }
    fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n").unwrap();
    assert!(refusal(folder.path()).contains("git lfs pull"));
}

#[test]
fn a_broken_index_is_told() {
    let folder = copy();
    shard(folder.path());
    let index = "model.safetensors.index.json";
    let good = fs::read(folder.path().join(index)).unwrap();
    edit(folder.path(), index, |index| {
        index["weight_map"]["model.norm.weight"] = json!("../model.safetensors")
    });
    assert!(refusal(folder.path()).contains("expected a file name"));
    fs::write(folder.path().join(index), &good).unwrap();
    edit(folder.path(), index, |index| {
        index["weight_map"]["nothing"] = json!("model-00001-of-00002.safetensors")
    });
    assert!(refusal(folder.path()).contains("places tensor `nothing`"));
    fs::write(folder.path().join(index), &good).unwrap();
    fs::remove_file(folder.path().join("model-00002-of-00002.safetensors")).unwrap();
    assert!(refusal(folder.path()).contains("model-00002-of-00002.safetensors"));
    fs::remove_file(folder.path().join(index)).unwrap();
    assert!(refusal(folder.path()).contains("holds neither"));
    fs::write(folder.path().join("pytorch_model.bin"), "x").unwrap();
    assert!(refusal(folder.path()).contains("safe_serialization"));
}

#[test]
fn settings_of_a_tokenizer_are_read_in_every_spelling() {
    let folder = copy();
    edit(folder.path(), "tokenizer_config.json", |settings| {
        *settings = json!({
            "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
            "eos_token": {"content": "</s>", "lstrip": false},
            "pad_token": null,
        });
    });
    edit(folder.path(), "special_tokens_map.json", |map| {
        *map = json!({"bos_token": "<s>", "eos_token": "other"})
    });
    edit(folder.path(), "generation_config.json", |generation| *generation = json!({"eos_token_id": [2, 5]}));
    let files = open(folder.path()).unwrap().tokenizer;
    assert_eq!(files.chat_template.as_deref(), Some("D"));
    assert_eq!((files.eos_token.as_deref(), files.bos_token.as_deref()), (Some("</s>"), Some("<s>")));
    assert_eq!((files.pad_token, files.eos_token_ids), (None, vec![2, 5]));
    fs::write(folder.path().join("chat_template.jinja"), "J").unwrap();
    edit(folder.path(), "generation_config.json", |generation| *generation = json!({"eos_token_id": null}));
    let files = open(folder.path()).unwrap().tokenizer;
    assert_eq!((files.chat_template.as_deref(), files.eos_token_ids), (Some("J"), vec![2]));
    edit(folder.path(), "generation_config.json", |generation| *generation = json!({"eos_token_id": "end"}));
    assert!(refusal(folder.path()).contains("expected a token id"));
    fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    assert!(refusal(folder.path()).contains("tokenizer.json"));
}

#[test]
fn a_folder_of_tokenizer_files_alone_gives_a_tokenizer() {
    let folder = copy();
    fs::remove_file(folder.path().join("config.json")).unwrap();
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    let (files, config) = open_tokenizer(folder.path().to_str().unwrap()).unwrap();
    assert!(config.is_none());
    assert!(files.eos_token.is_some());
    assert_eq!(files.eos_token_ids.len(), 1);
    assert!(refusal(folder.path()).contains("config.json"));
}

#[test]
fn the_real_granite_tokenizer_opens() {
    let Some(data) = std::env::var_os("GRANITE_TEST_DATA") else {
        eprintln!("skipped: GRANITE_TEST_DATA does not name the folder of real data");
        return;
    };
    let folder = Path::new(&data).join("granite/tokenizer");
    let (files, config) = open_tokenizer(folder.to_str().unwrap()).unwrap();
    assert!(config.is_none());
    assert_eq!(files.eos_token.as_deref(), Some("<|end_of_text|>"));
    assert_eq!(files.eos_token_ids, [0]);
    assert!(files.chat_template.unwrap().contains("start_of_role"));
}

#[test]
fn what_is_no_model_is_told() {
    let message = |reference: &str| render(&BaseModel::open(reference).unwrap_err());
    let nowhere = message("no/such/folder");
    assert!(nowhere.contains("`no/such/folder`") && nowhere.contains("hint: give"), "{nowhere}");
    let empty = tempfile::tempdir().unwrap();
    assert!(refusal(empty.path()).contains("config.json"));
    fs::write(empty.path().join("a.gguf"), "x").unwrap();
    assert!(refusal(empty.path()).contains("a.gguf"));
    fs::write(empty.path().join("b.GGUF"), "x").unwrap();
    assert!(refusal(empty.path()).contains("2 GGUF files"));
}
