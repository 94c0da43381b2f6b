//! The NF4 form of a base model, kept on disk: quantised once, mapped on every later start.
//!
//! ```text
//! <folder>/<hash of the base>/manifest.json       format version, base, digest of the tensors
//! <folder>/<hash of the base>/nf4.safetensors     per weight: codes, scales, nested scales, offset
//! ```
//!
//! The file is written tensor by tensor while the model loads (memory holds one weight at a time) and appears by
//! rename when the last linear weight is in. It is trusted only when its digest fits; otherwise it is
//! written anew, with a note. A cache that cannot be written costs the next start its time and nothing else.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tch::{Device, Tensor};

use super::hugging_face::read_json;
use super::safetensors::MappedTensors;
use crate::hex::hex;
use crate::kernels::dynamic_map::dynamic_map;
use crate::kernels::host;
use crate::kernels::nf4::{BLOCK, NESTED_BLOCK, Nf4Weight};
use crate::model::config::ModelConfig;
use crate::model::weights::TensorSource;
use crate::output::Staged;
use crate::progress;
use crate::recipe::Projection;

/// Raised whenever the quantiser or the layout changes, so that no old file is read as a new one.
const FORMAT_VERSION: u32 = 1;

const MANIFEST: &str = "manifest.json";
const TENSORS: &str = "nf4.safetensors";

/// Where caches lie unless the caller says otherwise.
pub const DEFAULT_FOLDER: &str = "checkpoints/base/.nf4";

/// Bytes that one task digests.
const DIGEST_CHUNK: usize = 1 << 20;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    format_version: u32,
    base: String,
    digest: String,
}

/// A source of tensors whose linear weights come quantised from a cache, or go there.
pub struct Nf4Cache {
    inner: Box<dyn TensorSource>,
    state: State,
}

enum State {
    /// Mapped and verified.
    Ready(MappedTensors),
    /// Being written; `None` once it is whole, or when writing failed.
    Writing(Mutex<Option<Writer>>),
}

impl Nf4Cache {
    /// Puts a cache in `folder` before the tensors of the base model that `base_hash` names.
    pub fn new(inner: Box<dyn TensorSource>, config: &ModelConfig, base_hash: &str, folder: &Path) -> Self {
        let folder = folder.join(base_hash);
        let state = match read(&folder, base_hash) {
            Ok(Some(file)) => State::Ready(file),
            Ok(None) => State::Writing(Mutex::new(begin(&folder, config, base_hash))),
            Err(error) => {
                progress::note(format!(
                    "NF4 cache `{}` is not used and written anew: {error:#}",
                    folder.display()
                ));
                State::Writing(Mutex::new(begin(&folder, config, base_hash)))
            }
        };
        Self { inner, state }
    }

    /// Whether the weights come from the cache.
    pub fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready(_))
    }
}

impl TensorSource for Nf4Cache {
    fn names(&self) -> Vec<String> {
        self.inner.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<i64>> {
        self.inner.shape(name)
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.inner.tensor(name)
    }

    fn nf4(&self, name: &str, device: Device) -> Result<Nf4Weight> {
        match &self.state {
            State::Ready(file) if file.shape(name).is_some() => {
                Ok(read_weight(file, name, self.inner.shape(name))?.to_device(device))
            }
            State::Ready(_) => self.inner.nf4(name, device),
            State::Writing(writer) => {
                let weight = self.inner.nf4(name, device)?;
                store(writer, name, &weight.to_device(Device::Cpu));
                Ok(weight)
            }
        }
    }
}

/// Maps a cache, `None` where there is none.
fn read(folder: &Path, base_hash: &str) -> Result<Option<MappedTensors>> {
    if !folder.exists() {
        return Ok(None);
    }
    let manifest: Manifest = serde_json::from_value(read_json(&folder.join(MANIFEST))?)?;
    ensure!(
        manifest.format_version == FORMAT_VERSION,
        "format version {}, expected {FORMAT_VERSION}",
        manifest.format_version
    );
    ensure!(manifest.base == base_hash, "it belongs to the base model {}", manifest.base);
    let file = MappedTensors::open(&folder.join(TENSORS))?;
    ensure!(digest(file.bytes()) == manifest.digest, "the digest of `{TENSORS}` does not fit");
    Ok(Some(file))
}

fn read_weight(file: &MappedTensors, name: &str, shape: Option<Vec<i64>>) -> Result<Nf4Weight> {
    let shape = shape.and_then(|shape| <[i64; 2]>::try_from(shape).ok());
    let offset = file.tensor(&Part::NestedOffset.key(name))?;
    let weight = Nf4Weight {
        packed: file.tensor(&Part::Packed.key(name))?,
        absmax: file.tensor(&Part::Absmax.key(name))?,
        nested_absmax: file.tensor(&Part::NestedAbsmax.key(name))?,
        nested_code: Tensor::from_slice(&dynamic_map(true)),
        nested_offset: host::slice::<f32>(&offset)?.first().copied().context("the offset is empty")?,
        shape: shape.with_context(|| format!("`{name}` is no matrix"))?,
    };
    weight.check().with_context(|| format!("NF4 cache `{}`: `{name}`", file.path().display()))?;
    Ok(weight)
}

/// A digest over all cores: the hash of the hashes of the chunks.
fn digest(bytes: &[u8]) -> String {
    let chunks: Vec<_> = bytes.par_chunks(DIGEST_CHUNK).map(Sha256::digest).collect();
    let mut whole = Sha256::new();
    for chunk in chunks {
        whole.update(chunk);
    }
    hex(&whole.finalize())
}

/// A cache that cannot be begun is noted and done without.
fn begin(folder: &Path, config: &ModelConfig, base_hash: &str) -> Option<Writer> {
    Writer::begin(folder, config, base_hash).map_err(|error| note_unwritten(folder, &error)).ok()
}

/// Adds a weight; commits after the last one.
fn store(writer: &Mutex<Option<Writer>>, name: &str, weight: &Nf4Weight) {
    let mut slot = writer.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut writer) = slot.take() else { return };
    let folder = writer.folder.clone();
    let stored = writer.write(name, weight).and_then(|()| {
        if writer.missing.is_empty() { writer.finish().map(|()| None) } else { Ok(Some(writer)) }
    });
    match stored {
        Ok(rest) => *slot = rest,
        Err(error) => note_unwritten(&folder, &error),
    }
}

fn note_unwritten(folder: &Path, error: &anyhow::Error) {
    progress::note(format!("NF4 cache `{}` is not written: {error:#}", folder.display()));
}

/// What is stored of a weight.
#[derive(Debug, Clone, Copy)]
enum Part {
    NestedOffset,
    NestedAbsmax,
    Packed,
    Absmax,
}

impl Part {
    /// Floats first, so that they are aligned.
    const ALL: [Self; 4] = [Self::NestedOffset, Self::NestedAbsmax, Self::Packed, Self::Absmax];

    fn key(self, name: &str) -> String {
        match self {
            Self::NestedOffset => format!("{name}.nested_offset"),
            Self::NestedAbsmax => format!("{name}.nested_absmax"),
            Self::Packed => name.to_string(),
            Self::Absmax => format!("{name}.absmax"),
        }
    }

    /// Dtype and number of values for a weight of so many elements.
    fn layout(self, elements: usize) -> (Dtype, usize) {
        let blocks = elements / BLOCK;
        match self {
            Self::NestedOffset => (Dtype::F32, 1),
            Self::NestedAbsmax => (Dtype::F32, blocks.div_ceil(NESTED_BLOCK)),
            Self::Packed => (Dtype::U8, elements / 2),
            Self::Absmax => (Dtype::U8, blocks),
        }
    }
}

/// A cache that is being written. All sizes follow from the configuration, so the header comes first and
/// each part goes to its place when it is known.
struct Writer {
    staged: Staged,
    file: File,
    folder: PathBuf,
    base_hash: String,
    places: HashMap<String, u64>,
    missing: BTreeSet<String>,
}

impl Writer {
    fn begin(folder: &Path, config: &ModelConfig, base_hash: &str) -> Result<Self> {
        let weights = linear_weights(config);
        let (header, places) = header(&weights)?;
        let staged = Staged::folder(folder, &[])?;
        let path = staged.path().join(TENSORS);
        let file = File::create_new(&path).with_context(|| format!("cannot write `{}`", path.display()))?;
        file.write_all_at(&header, 0)?;
        Ok(Self {
            staged,
            file,
            folder: folder.to_path_buf(),
            base_hash: base_hash.to_string(),
            places,
            missing: weights.into_keys().collect(),
        })
    }

    fn write(&mut self, name: &str, weight: &Nf4Weight) -> Result<()> {
        if !self.missing.contains(name) {
            return Ok(());
        }
        let offset = Tensor::from_slice(&[weight.nested_offset]);
        self.write_part(&Part::NestedOffset.key(name), &floats(&offset)?)?;
        self.write_part(&Part::NestedAbsmax.key(name), &floats(&weight.nested_absmax)?)?;
        self.write_part(&Part::Packed.key(name), host::slice::<u8>(&weight.packed)?)?;
        self.write_part(&Part::Absmax.key(name), host::slice::<u8>(&weight.absmax)?)?;
        self.missing.remove(name);
        Ok(())
    }

    fn write_part(&self, key: &str, bytes: &[u8]) -> Result<()> {
        let place = self.places.get(key).with_context(|| format!("`{key}` has no place in the file"))?;
        Ok(self.file.write_all_at(bytes, *place)?)
    }

    fn finish(self) -> Result<()> {
        self.file.sync_all()?;
        let whole = MappedTensors::open(&self.staged.path().join(TENSORS))?;
        let manifest =
            Manifest { format_version: FORMAT_VERSION, base: self.base_hash, digest: digest(whole.bytes()) };
        std::fs::write(self.staged.path().join(MANIFEST), serde_json::to_vec_pretty(&manifest)?)?;
        self.staged.commit()
    }
}

/// The linear weights of a model with their numbers of elements.
fn linear_weights(config: &ModelConfig) -> BTreeMap<String, usize> {
    (0..config.num_hidden_layers)
        .flat_map(|layer| Projection::ALL.map(|projection| (layer, projection)))
        .map(|(layer, projection)| {
            let elements: i64 = config.projection_shape(projection).iter().product();
            (format!("{}.weight", projection.path(layer)), elements as usize)
        })
        .collect()
}

/// The header of the file, and where each part begins in it.
fn header(weights: &BTreeMap<String, usize>) -> Result<(Vec<u8>, HashMap<String, u64>)> {
    let mut infos = Vec::new();
    let mut end = 0;
    for part in Part::ALL {
        for (name, elements) in weights {
            let (dtype, length) = part.layout(*elements);
            let start = end;
            end += length * dtype.bitsize() / 8;
            infos.push((
                part.key(name),
                TensorInfo { dtype, shape: vec![length], data_offsets: (start, end) },
            ));
        }
    }
    let starts: Vec<(String, usize)> =
        infos.iter().map(|(key, info)| (key.clone(), info.data_offsets.0)).collect();
    let mut text = serde_json::to_vec(&Metadata::new(None, infos)?)?;
    // The format pads with spaces, so that data begin at a multiple of 8.
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    let data_start = header.len();
    let places = starts.into_iter().map(|(key, start)| (key, (data_start + start) as u64)).collect();
    Ok((header, places))
}

fn floats(tensor: &Tensor) -> Result<Vec<u8>> {
    Ok(host::slice::<f32>(tensor)?.iter().flat_map(|value| value.to_le_bytes()).collect())
}
