//! Opening a model for use: what `eval`, `merge` and `serve` run.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result};
use tch::Device;

use super::base::BaseModel;
use super::{adapter, nf4_cache, run};
use crate::error::user_error;
use crate::hex::short;
use crate::model::decoder::{Decoder, LoadOptions, Precision};
use crate::progress;
use crate::recipe::{Quantization, Recipe};

/// The folder of a run that `granite merge` writes.
pub const MERGED: &str = "merged";

/// Which model of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelChoice {
    /// The recipe's base model, without adapter.
    Base,
    /// The base model with an adapter: of this folder, or of the run's newest checkpoint.
    Adapter(Option<PathBuf>),
    /// The run's merged model.
    Merged,
    /// A Hugging Face folder, or the folder of a PEFT adapter for the recipe's base model.
    Folder(PathBuf),
}

impl FromStr for ModelChoice {
    type Err = std::convert::Infallible;

    /// `base`, `adapter`, `merged`, or a folder. A folder of one of these names is written `./base`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "base" => Self::Base,
            "adapter" => Self::Adapter(None),
            "merged" => Self::Merged,
            folder => Self::Folder(PathBuf::from(folder)),
        })
    }
}

/// A model, loaded.
#[derive(Debug)]
pub struct OpenModel {
    /// The weights, with the adapter attached where one was asked for.
    pub decoder: Decoder,
    /// Where they come from, with the tokenizer.
    pub base: BaseModel,
    /// How the decoder holds its weights.
    pub quantization: Quantization,
    /// How to call it in reports: `base`, `adapter step-000500`, `merged`, or the folder.
    pub label: String,
}

/// Opens the model that `which` names. The base model is held as the recipe says (NF4 through the cache); a
/// merged model or another folder is held as stored.
///
/// # Errors
/// When there is no such model, or one of its files is missing or damaged.
pub fn open(recipe: &Recipe, which: &ModelChoice, run_folder: &Path, device: Device) -> Result<OpenModel> {
    open_in(recipe, which, run_folder, Place { device, precision: Precision::Native })
}

/// Where a model is held, and what it computes in.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Where.
    pub device: Device,
    /// What it computes in.
    pub precision: Precision,
}

/// As [`open`], in a precision of one's own.
///
/// # Errors
/// As [`open`].
pub fn open_in(recipe: &Recipe, which: &ModelChoice, run_folder: &Path, place: Place) -> Result<OpenModel> {
    match which {
        ModelChoice::Base => open_base(recipe, place),
        ModelChoice::Adapter(None) => open_adapter(recipe, &newest_checkpoint(run_folder)?, place),
        ModelChoice::Adapter(Some(folder)) => open_adapter(recipe, folder, place),
        ModelChoice::Merged => open_merged(run_folder, place),
        ModelChoice::Folder(folder) if folder.join(adapter::CONFIG_FILE).exists() => {
            open_adapter(recipe, folder, place)
        }
        ModelChoice::Folder(folder) => open_stored(folder, folder.display().to_string(), place),
    }
}

/// The newest checkpoint of a run: the folder `step-N` with the largest `N` that holds an adapter.
///
/// # Errors
/// When there is none.
pub fn newest_checkpoint(run_folder: &Path) -> Result<PathBuf> {
    let none = || {
        user_error(
            format!("run folder `{}` holds no checkpoint", run_folder.display()),
            "train first, or name the folder of an adapter",
        )
    };
    let entries = std::fs::read_dir(run_folder).map_err(|_| none())?;
    let mut newest = None;
    for entry in entries {
        let path = entry.with_context(|| format!("cannot read folder `{}`", run_folder.display()))?.path();
        newest = newest.max(step_of(&path).map(|step| (step, path)));
    }
    newest.map(|(_, path)| path).ok_or_else(none)
}

fn step_of(folder: &Path) -> Option<u64> {
    let step = folder.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()?;
    folder.join(adapter::CONFIG_FILE).exists().then_some(step)
}

fn open_base(recipe: &Recipe, place: Place) -> Result<OpenModel> {
    let base = BaseModel::open(&recipe.model.base)?.with_nf4_cache(Path::new(nf4_cache::DEFAULT_FOLDER));
    load(base, recipe.model.quantization, "base".to_string(), place)
}

fn open_adapter(recipe: &Recipe, folder: &Path, place: Place) -> Result<OpenModel> {
    // First: a damaged adapter is told before minutes are spent on the base model.
    let adapter = adapter::load(folder)?;
    let mut model = open_base(recipe, place)?;
    if let Some(difference) = other_base(folder, &model.base, model.quantization) {
        progress::note(format!("warning: {difference}"));
    }
    adapter.apply(&mut model.decoder)?;
    let step = folder.file_name().unwrap_or(folder.as_os_str());
    model.label = format!("adapter {}", step.display());
    Ok(model)
}

/// How the base model differs from the one that an adapter of ours was trained on, both named; `None` where it does not,
/// and for an adapter from elsewhere.
pub fn other_base(adapter: &Path, base: &BaseModel, quantization: Quantization) -> Option<String> {
    let trained = run::trained_on(adapter)?;
    let (folder, path) = (adapter.display(), base.path.display());
    if trained.hash != base.hash {
        let (one, other) = (short(&trained.hash), short(&base.hash));
        return Some(format!(
            "adapter `{folder}` was trained on weights of hash {one}, `{path}` has {other}"
        ));
    }
    (trained.quantization != quantization).then(|| {
        let held = trained.quantization;
        format!(
            "adapter `{folder}` was trained with `model.quantization` = {held}, the recipe says {quantization}"
        )
    })
}

fn open_merged(run_folder: &Path, place: Place) -> Result<OpenModel> {
    let folder = run_folder.join(MERGED);
    if !folder.is_dir() {
        return Err(user_error(
            format!("there is no merged model `{}`", folder.display()),
            "run `granite merge` first",
        ));
    }
    open_stored(&folder, MERGED.to_string(), place)
}

fn open_stored(folder: &Path, label: String, place: Place) -> Result<OpenModel> {
    let reference = folder.to_str().with_context(|| format!("path `{}` is not UTF-8", folder.display()))?;
    let base = BaseModel::open(reference)?;
    let stored = base.stored;
    load(base, stored, label, place)
}

fn load(base: BaseModel, quantization: Quantization, label: String, place: Place) -> Result<OpenModel> {
    let Place { device, precision } = place;
    let options = LoadOptions { quantization, device, precision };
    let decoder = Decoder::load(base.tensors.as_ref(), &base.config, &options)
        .with_context(|| format!("cannot load model `{}`", base.path.display()))?;
    Ok(OpenModel { decoder, base, quantization, label })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail loudly")]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_adapter_is_told_before_the_base_model_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(adapter::CONFIG_FILE), "{").unwrap();
        let text = "name = \"x\"\n[model]\nbase = \"/no/such/base\"\n";
        let recipe = Recipe::parse(text, Path::new("r.toml"), &[]).unwrap();
        let choice = ModelChoice::Adapter(Some(folder.path().to_path_buf()));
        let error = open(&recipe, &choice, folder.path(), Device::Cpu).unwrap_err();
        let text = crate::error::render(&error);
        assert!(text.contains(adapter::CONFIG_FILE) && !text.contains("/no/such/base"), "{text}");
    }
}
