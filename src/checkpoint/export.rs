//! Writing Hugging Face folders: sharded safetensors, one tensor at a time, and what transformers wants beside them.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::base::BaseModel;
use super::form::Form;
use super::prequantized;
use crate::data::tokenizer::TokenizerFiles;

/// Largest shard in bytes, as transformers splits by default.
const SHARD_BYTES: u64 = 5_000_000_000;

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// What it is stored as.
    pub dtype: Kind,
}

/// Writes `planned` tensors in their order, each made by `make` when its turn comes and brought to the dtype that is
/// planned; gives the number of bytes of the weights.
///
/// # Errors
/// When a tensor cannot be made, has another shape than planned, or a file cannot be written.
pub fn write_weights(
    folder: &Path,
    planned: &[Planned],
    make: impl FnMut(&str) -> Result<Tensor>,
) -> Result<u64> {
    write_shards(folder, planned, SHARD_BYTES, make)
}

fn write_shards(
    folder: &Path,
    planned: &[Planned],
    shard_bytes: u64,
    mut make: impl FnMut(&str) -> Result<Tensor>,
) -> Result<u64> {
    let shards = split(planned, shard_bytes);
    let mut places = Map::new();
    for (index, shard) in shards.iter().enumerate() {
        let file = shard_name(index, shards.len());
        write_shard(&folder.join(&file), shard, &mut make)?;
        places.extend(shard.iter().map(|tensor| (tensor.name.clone(), json!(file))));
    }
    let total = planned.iter().map(bytes_of).sum();
    if shards.len() > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": places });
        write_json(&folder.join("model.safetensors.index.json"), &index)?;
    }
    Ok(total)
}

/// Consecutive tensors, as many as fit; a larger one has a shard to itself.
fn split(planned: &[Planned], shard_bytes: u64) -> Vec<&[Planned]> {
    let mut shards = Vec::new();
    let (mut start, mut size) = (0, 0);
    for (at, tensor) in planned.iter().enumerate() {
        let bytes = bytes_of(tensor);
        if at > start && size + bytes > shard_bytes {
            shards.push(&planned[start..at]);
            (start, size) = (at, 0);
        }
        size += bytes;
    }
    shards.push(&planned[start..]);
    shards
}

fn shard_name(index: usize, shards: usize) -> String {
    if shards == 1 {
        "model.safetensors".to_string()
    } else {
        format!("model-{:05}-of-{shards:05}.safetensors", index + 1)
    }
}

fn bytes_of(tensor: &Planned) -> u64 {
    tensor.shape.iter().product::<i64>().unsigned_abs() * tensor.dtype.elt_size_in_bytes() as u64
}

fn write_shard(
    path: &Path,
    tensors: &[Planned],
    make: &mut impl FnMut(&str) -> Result<Tensor>,
) -> Result<()> {
    let in_file = || format!("cannot write `{}`", path.display());
    let mut file = BufWriter::new(File::create(path).with_context(in_file)?);
    file.write_all(&header(tensors)?).with_context(in_file)?;
    for planned in tensors {
        let tensor = make(&planned.name)?;
        let shape = tensor.size();
        ensure!(
            shape == planned.shape,
            "`{}` has shape {shape:?}, expected {:?}",
            planned.name,
            planned.shape
        );
        file.write_all(&stored_bytes(&tensor, planned.dtype)?).with_context(in_file)?;
    }
    file.flush().with_context(in_file)
}

/// Length and text of a safetensors header, padded so that the data begins at a multiple of 8.
fn header(tensors: &[Planned]) -> Result<Vec<u8>> {
    // Readers of the Hugging Face family refuse a file that does not say which framework's layout it has.
    let mut entries = Map::from_iter([("__metadata__".to_string(), json!({ "format": "pt" }))]);
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + bytes_of(tensor);
        let entry = json!({ "dtype": safetensors_name(tensor.dtype)?, "shape": tensor.shape, "data_offsets": [offset, end] });
        entries.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut text = serde_json::to_vec(&Value::Object(entries))?;
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok([(text.len() as u64).to_le_bytes().as_slice(), &text].concat())
}

fn stored_bytes(tensor: &Tensor, dtype: Kind) -> Result<Vec<u8>> {
    let tensor = tensor.f_to_kind(dtype)?.f_to_device(Device::Cpu)?.f_contiguous()?;
    let mut bytes = vec![0; tensor.numel() * dtype.elt_size_in_bytes()];
    tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
    Ok(bytes)
}

fn safetensors_name(dtype: Kind) -> Result<&'static str> {
    match dtype {
        Kind::BFloat16 => Ok("BF16"),
        Kind::Half => Ok("F16"),
        Kind::Float => Ok("F32"),
        Kind::Uint8 => Ok("U8"),
        other => anyhow::bail!("weights cannot be stored as {other:?}"),
    }
}

/// As `config.json` spells a dtype.
fn torch_name(dtype: Kind) -> &'static str {
    match dtype {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    }
}

/// The files of a tokenizer that a base folder may have; each is taken over as it is.
const TAKEN_OVER: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];

/// Writes `config.json`, `generation_config.json` and the tokenizer of `base`, for weights stored in `form`.
///
/// # Errors
/// When a file cannot be written or copied.
pub fn write_companions(folder: &Path, base: &BaseModel, form: Form) -> Result<()> {
    let mut config = base.config.to_hugging_face(torch_name(form.kind()));
    if form == Form::Nf4 {
        config["quantization_config"] = prequantized::config();
    }
    write_json(&folder.join("config.json"), &config)?;
    write_json(&folder.join("generation_config.json"), &generation_config(base)?)?;
    if base.path.is_dir() {
        for name in TAKEN_OVER {
            let path = base.path.join(name);
            if path.is_file() {
                fs::copy(&path, folder.join(name))
                    .with_context(|| format!("cannot copy `{}` to `{}`", path.display(), folder.display()))?;
            }
        }
        return Ok(());
    }
    write_tokenizer(folder, &base.tokenizer, base.config.max_position_embeddings)
}

/// The base folder's own, when there is one; the end ids are the model's in any case.
fn generation_config(base: &BaseModel) -> Result<Value> {
    let path = base.path.join("generation_config.json");
    let mut config = if path.is_file() { super::hugging_face::read_json(&path)? } else { json!({}) };
    config["bos_token_id"] = json!(base.config.bos_token_id);
    config["eos_token_id"] = match base.tokenizer.eos_token_ids.as_slice() {
        [one] => json!(one),
        several => json!(several),
    };
    Ok(config)
}

/// The files of a tokenizer that came out of another format.
fn write_tokenizer(folder: &Path, files: &TokenizerFiles, longest: i64) -> Result<()> {
    write(&folder.join("tokenizer.json"), &files.tokenizer_json)?;
    if let Some(template) = &files.chat_template {
        write(&folder.join("chat_template.jinja"), template.as_bytes())?;
    }
    let settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": files.bos_token,
        "eos_token": files.eos_token,
        "pad_token": files.pad_token,
        "model_max_length": longest,
        "clean_up_tokenization_spaces": false,
    });
    write_json(&folder.join("tokenizer_config.json"), &settings)
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    write(path, &text)
}

fn write(path: &Path, contents: &[u8]) -> Result<()> {
    fs::write(path, contents).with_context(|| format!("cannot write `{}`", path.display()))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]
mod tests {
    use super::*;
    use crate::checkpoint::hugging_face::FolderTensors;
    use crate::model::weights::TensorSource as _;

    fn planned(dtype: Kind) -> Vec<Planned> {
        [("b", vec![3, 5]), ("a", vec![7]), ("empty", vec![0, 4]), ("c", vec![2, 2, 2])]
            .map(|(name, shape)| Planned { name: name.to_string(), shape, dtype })
            .to_vec()
    }

    fn value(name: &str) -> Tensor {
        let planned = planned(Kind::Float).into_iter().find(|planned| planned.name == name).unwrap();
        let elements: i64 = planned.shape.iter().product();
        let start = i64::from(name.as_bytes()[0]);
        (Tensor::arange_start(start, start + elements, (Kind::Float, Device::Cpu)) * 0.37)
            .view(planned.shape.as_slice())
    }

    #[test]
    fn what_is_written_is_read_back_whatever_the_shards() {
        for (shard_bytes, files) in [(u64::MAX, 1), (40, 2), (1, 3)] {
            for dtype in [Kind::BFloat16, Kind::Float, Kind::Half] {
                let folder = tempfile::tempdir().unwrap();
                let total = write_shards(folder.path(), &planned(dtype), shard_bytes, |name| Ok(value(name)))
                    .unwrap();
                assert_eq!(total, 30 * dtype.elt_size_in_bytes() as u64);
                let tensors = FolderTensors::open(folder.path()).unwrap();
                assert_eq!(tensors.names(), ["a", "b", "c", "empty"]);
                for name in tensors.names() {
                    assert!(tensors.tensor(&name).unwrap().equal(&value(&name).to_kind(dtype)), "{name}");
                }
                let found = fs::read_dir(folder.path()).unwrap().count();
                let has_index = folder.path().join("model.safetensors.index.json").exists();
                assert_eq!(has_index, files > 1);
                assert!(found >= files, "{found} files for shards of {shard_bytes} bytes");
            }
        }
    }

    #[test]
    fn another_shape_than_planned_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let wrong = |_: &str| Ok(Tensor::zeros([5, 3], (Kind::Float, Device::Cpu)));
        let error = write_shards(folder.path(), &planned(Kind::Float), u64::MAX, wrong).unwrap_err();
        assert!(error.to_string().contains("`b` has shape [5, 3], expected [3, 5]"), "{error}");
    }

    #[test]
    fn data_begins_at_a_multiple_of_eight() {
        for count in 0..4 {
            let bytes = header(&planned(Kind::BFloat16)[..count]).unwrap();
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            assert_eq!(length as usize + 8, bytes.len());
            assert_eq!(bytes.len() % 8, 0);
        }
    }
}
