//! Hugging Face folders: `config.json`, one or several safetensors files, tokenizer files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::fingerprint::Fingerprint;
use super::prequantized::{self, QuantState};
use super::safetensors::MappedTensors;
use crate::error::user_error;
use crate::kernels::nf4::Nf4Weight;
use crate::model::config::ModelConfig;
use crate::model::weights::TensorSource;
use crate::recipe::Quantization;

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The weights of a folder: one file, or shards with an index.
#[derive(Debug)]
pub struct FolderTensors {
    files: Vec<MappedTensors>,
    /// Name of a tensor to the file that holds it.
    place: BTreeMap<String, usize>,
    /// The weights that are stored in 4 bits, and what lies beside them.
    quantized: BTreeMap<String, QuantState>,
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
            return Self::of_one(MappedTensors::open(&folder.join(SINGLE))?).with_quantized();
        }
        if folder.join(INDEX).exists() {
            return Self::of_shards(folder)?.with_quantized();
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
        Self { files: vec![file], place, quantized: BTreeMap::new() }
    }

    fn with_quantized(mut self) -> Result<Self> {
        for (key, at) in &self.place {
            if let Some(name) = key.strip_suffix(prequantized::STATE) {
                ensure!(
                    self.place.get(name) == Some(at),
                    "`{key}` lies in another file than `{name}`, or alone"
                );
                self.quantized.insert(name.to_string(), QuantState::read(&self.files[*at], name)?);
            }
        }
        Ok(self)
    }

    /// How the projections are stored: NF4 when some of them are.
    pub fn quantization(&self) -> Quantization {
        if self.quantized.is_empty() { Quantization::None } else { Quantization::Nf4 }
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
        Ok(Self { files, place, quantized: BTreeMap::new() })
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
        let beside =
            |name: &str| prequantized::owner(name).is_some_and(|owner| self.quantized.contains_key(owner));
        self.place.keys().filter(|name| !beside(name)).cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<i64>> {
        if let Some(state) = self.quantized.get(name) {
            return Some(state.shape.to_vec());
        }
        self.file(name)?.shape(name).map(<[i64]>::to_vec)
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        let Some(file) = self.file(name) else {
            let files: Vec<String> =
                self.files.iter().map(|file| format!("`{}`", file.path().display())).collect();
            anyhow::bail!("there is no tensor `{name}` in {}", files.join(", "));
        };
        if let Some(state) = self.quantized.get(name) {
            return state.dequantize(file, name);
        }
        let tensor = file.tensor(name)?;
        ensure!(
            matches!(tensor.kind(), Kind::Float | Kind::BFloat16 | Kind::Half),
            "tensor `{name}` of `{}` is {:?}, expected F32, BF16 or F16",
            file.path().display(),
            tensor.kind()
        );
        Ok(tensor)
    }

    /// As stored where it is stored so; scales that were not quantised twice are quantised now.
    fn nf4(&self, name: &str, device: Device) -> Result<Nf4Weight> {
        match (self.quantized.get(name), self.file(name)) {
            (Some(state), Some(file)) if state.is_nested() => Ok(state.nested(file, name)?.to_device(device)),
            _ => Nf4Weight::quantize(&self.tensor(name)?.f_to_device(device)?),
        }
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
