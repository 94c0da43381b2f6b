//! GGUF files: llama.cpp's single-file format, weights, tokenizer and template in one.
//!
//! The reader is ours: candle-core has one, but brings a second tensor framework and minutes of build for
//! what is a few hundred lines. The format is described in ggml's `docs/gguf.md`.

mod blocks;
mod header;
mod metadata;
mod tokenizer;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use half::{bf16, f16};
use rayon::prelude::*;
use tch::Tensor;

use super::fingerprint::Fingerprint;
use super::mapped::Mapped;
use crate::data::tokenizer::TokenizerFiles;
use crate::kernels::host;
use crate::model::config::ModelConfig;
use crate::model::weights::TensorSource;

pub use blocks::BlockType;
use header::{Header, TensorEntry};

/// A GGUF file, opened.
#[derive(Debug)]
pub struct GgufFile {
    file: Mapped,
    header: Header,
    config: ModelConfig,
    /// Tensors under their Hugging Face names.
    tensors: BTreeMap<String, TensorEntry>,
}

impl GgufFile {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    /// When it is no GGUF file, damaged, or of a model that is not supported; the message names the file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Mapped::open(path)?;
        Self::read(file).with_context(|| format!("GGUF file `{}`", path.display()))
    }

    fn read(file: Mapped) -> Result<Self> {
        let header = Header::read(file.bytes())?;
        let config = metadata::read_config(&header)?;
        let tensors = header
            .tensors
            .iter()
            .map(|(name, entry)| {
                let known = metadata::hugging_face_name(name);
                Ok((known.with_context(|| format!("unexpected tensor `{name}`"))?, entry.clone()))
            })
            .collect::<Result<_>>()?;
        Ok(Self { file, header, config, tensors })
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The tokenizer and the chat template, rebuilt from the metadata.
    ///
    /// # Errors
    /// When the tokenizer is of a kind that is not known.
    pub fn tokenizer(&self) -> Result<TokenizerFiles> {
        tokenizer::rebuild(metadata::Metadata::new(&self.header.metadata), self.config.architecture)
            .with_context(|| format!("tokenizer of GGUF file `{}`", self.file.path().display()))
    }

    /// A hash of what the file holds.
    pub fn fingerprint(&self) -> String {
        let mut fingerprint = Fingerprint::default();
        for (name, entry) in &self.tensors {
            let bytes = self.file.bytes().get(entry.bytes.clone()).unwrap_or_default();
            fingerprint.add(name, &format!("{:?}", entry.format), &entry.shape, bytes);
        }
        fingerprint.finish()
    }

    /// Rows of queries and keys are reordered by llama.cpp's converter, for Granite as for Llama: a head's
    /// two halves, which Hugging Face rotates against each other, become neighbours. This finds the row of
    /// the file that holds a row of the Hugging Face tensor.
    fn row_order(&self, name: &str, entry: &TensorEntry) -> Result<impl Fn(usize) -> usize + Sync + 'static> {
        let reordered = name.ends_with(".q_proj.weight") || name.ends_with(".k_proj.weight");
        // `ModelConfig::check` made the width of a head even and positive.
        let head_dim = self.config.head_dim as usize;
        let rows = entry.rows();
        ensure!(
            !reordered || rows.is_multiple_of(head_dim),
            "tensor `{name}` of `{}` has {rows} rows, no multiple of the head's width {head_dim}",
            self.file.path().display()
        );
        Ok(move |row| {
            if !reordered {
                return row;
            }
            let (head, within) = (row / head_dim, row % head_dim);
            let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
            head * head_dim + pair * 2 + half
        })
    }
}

impl TensorSource for GgufFile {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<i64>> {
        self.tensors.get(name).map(|entry| entry.shape.clone())
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        let missing = || format!("there is no tensor `{name}` in `{}`", self.file.path().display());
        let entry = self.tensors.get(name).with_context(missing)?;
        let packed = self.file.bytes().get(entry.bytes.clone()).with_context(missing)?;
        let order = self.row_order(name, entry)?;
        Ok(match entry.format {
            BlockType::F16 => copy_rows(entry, packed, order, |pair| f16::from_le_bytes([pair[0], pair[1]])),
            BlockType::BF16 => {
                copy_rows(entry, packed, order, |pair| bf16::from_le_bytes([pair[0], pair[1]]))
            }
            format => fill_rows(entry, packed, order, |row, out| format.unpack(row, out)),
        })
    }
}

/// A 16-bit tensor as it is stored.
fn copy_rows<T: host::Element>(
    entry: &TensorEntry,
    packed: &[u8],
    order: impl Fn(usize) -> usize + Sync,
    read: impl Fn(&[u8]) -> T + Sync,
) -> Tensor {
    fill_rows(entry, packed, order, |row, out: &mut [T]| {
        for (out, pair) in out.iter_mut().zip(row.chunks_exact(2)) {
            *out = read(pair);
        }
    })
}

/// A tensor whose rows `unpack` writes, each from its row of the file, over all cores.
fn fill_rows<T: host::Element>(
    entry: &TensorEntry,
    packed: &[u8],
    order: impl Fn(usize) -> usize + Sync,
    unpack: impl Fn(&[u8], &mut [T]) + Sync,
) -> Tensor {
    // The header was checked: axes are positive, rows are whole blocks and all of them lie in `packed`.
    let row_len = entry.row_len();
    let row_bytes = row_len / entry.format.block_len() * entry.format.block_bytes();
    host::filled(&entry.shape, |out: &mut [T]| {
        out.par_chunks_mut(row_len).enumerate().for_each(|(row, out)| {
            unpack(&packed[order(row) * row_bytes..][..row_bytes], out);
        });
    })
}
