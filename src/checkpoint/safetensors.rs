//! Large safetensors files, mapped: tensors are copied once, when asked for.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors};
use serde_json::Value;
use tch::{Kind, Tensor};

use super::mapped::Mapped;
use crate::error::user_error;

/// A mapped safetensors file.
#[derive(Debug)]
pub struct MappedTensors {
    file: Mapped,
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<i64>,
    bytes: Range<usize>,
}

impl MappedTensors {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    /// When it is no safetensors file, or shorter than its header says; the message names the first tensor that is cut.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Mapped::open(path)?;
        let (header, metadata) =
            SafeTensors::read_metadata(file.bytes()).map_err(|error| explain(&file, error))?;
        let data_start = header + size_of::<u64>();
        let entries = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| {
                let (start, end) = info.data_offsets;
                let shape = info.shape.iter().map(|axis| i64::try_from(*axis)).collect::<Result<_, _>>()?;
                let bytes = data_start + start..data_start + end;
                Ok((name, Entry { dtype: info.dtype, shape, bytes }))
            })
            .collect::<Result<_>>()
            .with_context(|| format!("`{}` has a shape beyond all measure", path.display()))?;
        Ok(Self { file, entries })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        self.file.bytes()
    }

    /// Names in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[i64]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// Dtype as the file names it, and bytes as they lie there.
    pub fn raw(&self, name: &str) -> Option<(String, &[u8])> {
        let entry = self.entries.get(name)?;
        Some((format!("{:?}", entry.dtype), self.file.bytes().get(entry.bytes.clone())?))
    }

    /// A copy of a tensor, in the dtype it has there.
    ///
    /// # Errors
    /// When there is none of that name or its dtype is not one of F32, BF16, F16, U8.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let read = || {
            let entry = self.entries.get(name).context("there is no such tensor")?;
            let bytes = self.file.bytes().get(entry.bytes.clone()).context("the file ends before it")?;
            Ok::<_, anyhow::Error>(Tensor::f_from_data_size(bytes, &entry.shape, kind(entry.dtype)?)?)
        };
        read().with_context(|| format!("tensor `{name}` of `{}`", self.path().display()))
    }
}

fn kind(dtype: Dtype) -> Result<Kind> {
    Ok(match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
        Dtype::U8 => Kind::Uint8,
        other => bail!("dtype {other:?} is not supported, expected F32, BF16 or F16"),
    })
}

fn explain(file: &Mapped, error: SafeTensorError) -> anyhow::Error {
    let path = file.path().display();
    match first_cut_tensor(file.bytes()) {
        Some((name, end)) => user_error(
            format!(
                "`{path}` is cut: tensor `{name}` ends at byte {end}, the file at {}",
                file.bytes().len()
            ),
            "fetch the file again",
        ),
        None => anyhow!(error).context(format!("`{path}` is no whole safetensors file")),
    }
}

/// The first tensor that lies beyond the end of the file, when the header itself can be read.
fn first_cut_tensor(bytes: &[u8]) -> Option<(String, u64)> {
    let length = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    let data_start = usize::try_from(length).ok()?.checked_add(8)?;
    let header: Value = serde_json::from_slice(bytes.get(8..data_start)?).ok()?;
    header
        .as_object()?
        .iter()
        .filter_map(|(name, info)| {
            let end = info.get("data_offsets")?.get(1)?.as_u64()?;
            Some((name.clone(), end.checked_add(data_start as u64)?))
        })
        .filter(|(_, end)| *end > bytes.len() as u64)
        .min_by_key(|(_, end)| *end)
}
