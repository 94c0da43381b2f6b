//! Base models: Hugging Face folders, GGUF files, hub names.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::gguf::GgufFile;
use super::hugging_face::{self, FolderTensors};
use super::nf4_cache::Nf4Cache;
use super::{hub, tokenizer_files};
use crate::data::tokenizer::TokenizerFiles;
use crate::error::user_error;
use crate::model::config::ModelConfig;
use crate::model::weights::TensorSource;
use crate::recipe::Quantization;

/// A base model, opened: its configuration is read and its tensors are known, none is loaded.
pub struct BaseModel {
    /// The folder or file.
    pub path: PathBuf,
    /// What it is.
    pub config: ModelConfig,
    /// Its tokenizer and chat template.
    pub tokenizer: TokenizerFiles,
    /// SHA-256 that names the content of the weights (names, shapes, sizes and sampled bytes), in hex.
    pub hash: String,
    /// How its projections are stored: in bitsandbytes' 4 bits, or not quantised (GGUF's own blocks are read as f32).
    pub stored: Quantization,
    /// Its tensors; quantised ones come from a cache after [`with_nf4_cache`](Self::with_nf4_cache).
    pub tensors: Box<dyn TensorSource>,
}

impl std::fmt::Debug for BaseModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BaseModel")
            .field("path", &self.path)
            .field("hash", &self.hash)
            .finish_non_exhaustive()
    }
}

impl BaseModel {
    /// Opens a Hugging Face folder, a GGUF file, or a hub name (`organisation/model`), which is downloaded where there is network.
    ///
    /// # Errors
    /// When it is none of these, or a file is missing, damaged or of an architecture that is not known.
    pub fn open(reference: &str) -> Result<Self> {
        match Place::find(reference)? {
            Place::Folder(folder) => Self::open_folder(folder),
            Place::File(file) => Self::open_gguf(file),
            Place::Hub => Self::open_folder(hub::download(reference, hub::Wanted::Everything)?),
        }
    }

    /// Keeps the quantised weights in `folder` (a folder of the model's own within it), and takes them from there
    /// when they are there and whole.
    pub fn with_nf4_cache(mut self, folder: &Path) -> Self {
        self.tensors = Box::new(Nf4Cache::new(self.tensors, &self.config, &self.hash, folder));
        self
    }

    fn open_folder(folder: PathBuf) -> Result<Self> {
        if let Some(file) = lone_gguf(&folder)? {
            return Self::open_gguf(file);
        }
        let config = hugging_face::read_config(&folder)?
            .with_context(|| format!("folder `{}` holds no `config.json`", folder.display()))?;
        let tensors = FolderTensors::open(&folder)?;
        Ok(Self {
            tokenizer: tokenizer_files::read(&folder, Some(&config))?,
            config,
            hash: tensors.fingerprint(),
            stored: tensors.quantization(),
            tensors: Box::new(tensors),
            path: folder,
        })
    }

    fn open_gguf(path: PathBuf) -> Result<Self> {
        let file = GgufFile::open(&path)?;
        Ok(Self {
            config: file.config().clone(),
            tokenizer: file.tokenizer()?,
            hash: file.fingerprint(),
            stored: Quantization::None,
            tensors: Box::new(file),
            path,
        })
    }
}

/// Opens only the tokenizer of a base model: also of a folder that holds nothing else, as for preparing data
/// where the weights are not at hand. The configuration comes along when there is one.
///
/// # Errors
/// As [`BaseModel::open`], but for the weights.
pub fn open_tokenizer(reference: &str) -> Result<(TokenizerFiles, Option<ModelConfig>)> {
    let folder = match Place::find(reference)? {
        Place::File(file) => return open_gguf_tokenizer(&file),
        Place::Folder(folder) => folder,
        Place::Hub => hub::download(reference, hub::Wanted::Tokenizer)?,
    };
    if let Some(file) = lone_gguf(&folder)? {
        return open_gguf_tokenizer(&file);
    }
    let config = hugging_face::read_config(&folder)?;
    Ok((tokenizer_files::read(&folder, config.as_ref())?, config))
}

fn open_gguf_tokenizer(path: &Path) -> Result<(TokenizerFiles, Option<ModelConfig>)> {
    let file = GgufFile::open(path)?;
    Ok((file.tokenizer()?, Some(file.config().clone())))
}

/// What a reference means.
enum Place {
    Folder(PathBuf),
    File(PathBuf),
    Hub,
}

impl Place {
    /// A path that exists is a path, whatever it looks like; only then is it a name on the hub.
    fn find(reference: &str) -> Result<Self> {
        let path = PathBuf::from(reference);
        if path.is_dir() {
            return Ok(Self::Folder(path));
        }
        if path.is_file() {
            return Ok(Self::File(path));
        }
        if hub::is_name(reference) {
            return Ok(Self::Hub);
        }
        Err(user_error(
            format!("there is no folder or file `{reference}`"),
            "give a Hugging Face folder, a GGUF file, or a hub name `organisation/model`",
        ))
    }
}

/// The GGUF file of a folder that holds one and no `config.json`.
fn lone_gguf(folder: &Path) -> Result<Option<PathBuf>> {
    if folder.join("config.json").exists() || folder.join("tokenizer.json").exists() {
        return Ok(None);
    }
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("cannot read folder `{}`", folder.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot read folder `{}`", folder.display()))?.path();
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            files.push(path);
        }
    }
    match files.as_slice() {
        [] => Ok(None),
        [file] => Ok(Some(file.clone())),
        files => Err(user_error(
            format!("folder `{}` holds {} GGUF files", folder.display(), files.len()),
            "name the one to open",
        )),
    }
}
