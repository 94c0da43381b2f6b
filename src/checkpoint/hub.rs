//! Models by their name on the Hugging Face hub, fetched into its own cache.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};

use crate::error::{HintExt as _, user_error};
use crate::progress;

/// How much of a model to fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Configuration, tokenizer and weights.
    Everything,
    /// Configuration and tokenizer.
    Tokenizer,
}

/// Small files, by name; those that a model lacks are passed over.
const SMALL_FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// Whether a reference has the form of a hub name: `organisation/model`, letters, digits, `-`, `_` and `.`.
pub fn is_name(reference: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_.".contains(letter))
    };
    matches!(reference.split_once('/'), Some((organisation, model)) if part(organisation) && part(model))
        && !reference.ends_with(".gguf")
}

/// Fetches a model, or finds it in the cache, and gives its folder.
///
/// # Errors
/// When there is no network, no such model, or it is not open to this user.
pub fn download(name: &str, wanted: Wanted) -> Result<PathBuf> {
    fetch(name, wanted)
        .with_context(|| format!("there is no folder or file `{name}`, and the hub does not give a model of that name"))
        .hint("without network, copy the model's folder here and give its path; for a gated model, set `HF_TOKEN`")
}

fn fetch(name: &str, wanted: Wanted) -> Result<PathBuf> {
    let api: Api = ApiBuilder::from_env().with_progress(!progress::is_quiet()).build()?;
    let repo = api.model(name.to_string());
    let listing = repo.info().context("cannot list its files")?;
    let files: Vec<String> = listing.siblings.into_iter().map(|file| file.rfilename).collect();
    let mut folder = None;
    for file in select(&files, wanted)? {
        progress::note(format!("fetching `{name}`: {file}"));
        folder = Some(get(&repo, file)?);
    }
    folder.context("it has none of the files of a model")
}

/// The files to fetch: small ones, then the weights as one file or as shards.
fn select(files: &[String], wanted: Wanted) -> Result<Vec<&str>> {
    let mut selected: Vec<&str> =
        SMALL_FILES.iter().copied().filter(|name| files.iter().any(|file| file == name)).collect();
    if wanted == Wanted::Tokenizer {
        return Ok(selected);
    }
    let whole = files.iter().find(|file| *file == "model.safetensors");
    let weights: Vec<&str> = match whole {
        Some(file) => vec![file],
        None => files.iter().map(String::as_str).filter(|file| is_shard(file)).collect(),
    };
    if weights.is_empty() {
        return Err(user_error(
            "it has no safetensors weights",
            "take a model that is published as safetensors",
        ));
    }
    selected.extend(weights);
    Ok(selected)
}

fn is_shard(file: &str) -> bool {
    file == "model.safetensors.index.json" || (file.starts_with("model-") && file.ends_with(".safetensors"))
}

/// Fetches one file and gives the folder it lies in; all files of a revision lie in one.
fn get(repo: &ApiRepo, file: &str) -> Result<PathBuf> {
    let path = repo.get(file).with_context(|| format!("cannot fetch `{file}`"))?;
    path.parent().map(Path::to_path_buf).context("the cache has no folder")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn only_two_plain_parts_are_a_name() {
        for name in ["ibm-granite/granite-3.1-8b-instruct", "a/b", "HuggingFaceTB/SmolLM2_135M"] {
            assert!(is_name(name), "{name}");
        }
        for path in ["a", "a/b/c", "./a", "../a", "/a/b", "a/", "/b", "a b/c", "~/model", "models/x.gguf", ""]
        {
            assert!(!is_name(path), "{path}");
        }
    }

    #[test]
    fn weights_come_as_one_file_or_as_shards() {
        let files = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let both =
            files(&["README.md", "config.json", "model.safetensors", "model-00001-of-00002.safetensors"]);
        assert_eq!(select(&both, Wanted::Everything).unwrap(), ["config.json", "model.safetensors"]);
        let shards =
            files(&["model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]);
        assert_eq!(
            select(&shards, Wanted::Everything).unwrap(),
            ["tokenizer.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
        );
        let pickles = files(&["config.json", "pytorch_model.bin"]);
        assert_eq!(select(&pickles, Wanted::Tokenizer).unwrap(), ["config.json"]);
        assert!(select(&pickles, Wanted::Everything).is_err());
    }
}
