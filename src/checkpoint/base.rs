//! Base models: Hugging Face folders, GGUF files, hub names.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::data::tokenizer::TokenizerFiles;
use crate::model::config::ModelConfig;
use crate::model::weights::TensorSource;

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
    /// Its tensors; NF4 ones come from the cache when there is one.
    pub tensors: Box<dyn TensorSource>,
}

impl BaseModel {
    /// Opens a Hugging Face folder, a GGUF file, or a hub name (`organisation/model`), which is downloaded where there is network.
    ///
    /// # Errors
    /// When it is none of these, or a file is missing, damaged or of an architecture that is not known.
    pub fn open(reference: &str) -> Result<Self> {
        bail!("cannot open `{reference}`: not built yet")
    }
}
