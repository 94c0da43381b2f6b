//! Hugging Face folders: `config.json`, one or several safetensors files, tokenizer files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use serde_json::Value;
use tch::{Kind, Tensor};

use super::fingerprint::Fingerprint;
use super::safetensors::MappedTensors;
use crate::error::user_error;
use crate::model::config::ModelConfig;
use crate::model::weights::TensorSource;

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The weights of a folder: one file, or shards with an index.
#[derive(Debug)]
pub struct FolderTensors {
    files: Vec<MappedTensors>,
    /// Name of a tensor to the file that holds it.
    place: BTreeMap<String, usize>,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl FolderTensors {
    /// Maps the weight files of a folder.
    ///
    /// # Errors
    /// When there are none, a shard is missing or damaged, or the index names a tensor that its shard lacks.
    pub fn open(folder: &Path) -> Result<Self> {
        if folder.join(SINGLE).exists() {
            return Ok(Self::of_one(MappedTensors::open(&folder.join(SINGLE))?));
        }
        if folder.join(INDEX).exists() {
            return Self::of_shards(folder);
        }
        Err(user_error(
            format!("folder `{}` holds neither `{SINGLE}` nor `{INDEX}`", folder.display()),
            if folder.join("pytorch_model.bin").exists()
                || folder.join("pytorch_model.bin.index.json").exists()
            {
                "it holds PyTorch pickles; save the model again with `safe_serialization=True`"
            } else {
                "give the folder that `save_pretrained` wrote, or a GGUF file"
            },
        ))
    }

    fn of_one(file: MappedTensors) -> Self {
        let place = file.names().map(|name| (name.to_string(), 0)).collect();
        Self { files: vec![file], place }
    }

    fn of_shards(folder: &Path) -> Result<Self> {
        let path = folder.join(INDEX);
        let index: ShardIndex = serde_json::from_value(read_json(&path)?)
            .with_context(|| format!("`{}` has no usable `weight_map`", path.display()))?;
        let shards: Vec<&String> = index.weight_map.values().collect::<BTreeSet<_>>().into_iter().collect();
        let files = shards.iter().map(|shard| open_shard(folder, shard)).collect::<Result<Vec<_>>>()?;
        let mut place = BTreeMap::new();
        for (name, shard) in &index.weight_map {
            let at = shards.binary_search(&shard).unwrap_or_default();
            ensure!(
                files[at].shape(name).is_some(),
                "`{}` places tensor `{name}` in `{shard}`, which does not hold it",
                path.display()
            );
            place.insert(name.clone(), at);
        }
        Ok(Self { files, place })
    }

    /// A hash of what the files hold, however it is split into shards.
    pub fn fingerprint(&self) -> String {
        let mut fingerprint = Fingerprint::default();
        for (name, at) in &self.place {
            let file = &self.files[*at];
            if let (Some(shape), Some((format, bytes))) = (file.shape(name), file.raw(name)) {
                fingerprint.add(name, &format, shape, bytes);
            }
        }
        fingerprint.finish()
    }

    fn file(&self, name: &str) -> Option<&MappedTensors> {
        self.place.get(name).map(|at| &self.files[*at])
    }
}

impl TensorSource for FolderTensors {
    fn names(&self) -> Vec<String> {
        self.place.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<i64>> {
        self.file(name)?.shape(name).map(<[i64]>::to_vec)
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        let Some(file) = self.file(name) else {
            let files: Vec<String> =
                self.files.iter().map(|file| format!("`{}`", file.path().display())).collect();
            anyhow::bail!("there is no tensor `{name}` in {}", files.join(", "));
        };
        let tensor = file.tensor(name)?;
        ensure!(
            matches!(tensor.kind(), Kind::Float | Kind::BFloat16 | Kind::Half),
            "tensor `{name}` of `{}` is {:?}, expected F32, BF16 or F16",
            file.path().display(),
            tensor.kind()
        );
        Ok(tensor)
    }
}

fn open_shard(folder: &Path, shard: &str) -> Result<MappedTensors> {
    let mut parts = Path::new(shard).components();
    let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
    ensure!(plain, "`{}` names the shard `{shard}`, expected a file name", folder.join(INDEX).display());
    MappedTensors::open(&folder.join(shard))
}

/// Reads the `config.json` of a folder, or `None` where there is none.
///
/// # Errors
/// When it is damaged or of a model that is not supported.
pub fn read_config(folder: &Path) -> Result<Option<ModelConfig>> {
    let path = folder.join(CONFIG);
    if !path.exists() {
        return Ok(None);
    }
    ModelConfig::from_hugging_face(&read_json(&path)?, &path).map(Some)
}

/// Reads a JSON file.
///
/// # Errors
/// When it cannot be read or parsed; the message names the file.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("`{}` is no valid JSON", path.display()))
}
