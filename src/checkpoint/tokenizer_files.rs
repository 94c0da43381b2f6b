//! The tokenizer files of a Hugging Face folder.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::hugging_face::read_json;
use crate::data::tokenizer::TokenizerFiles;
use crate::error::HintExt as _;
use crate::model::config::ModelConfig;

/// Reads `tokenizer.json`, the chat template, the special tokens and the end ids of a folder.
///
/// # Errors
/// When `tokenizer.json` is missing, or a file that is there cannot be understood.
pub fn read(folder: &Path, config: Option<&ModelConfig>) -> Result<TokenizerFiles> {
    let path = folder.join("tokenizer.json");
    let tokenizer_json = std::fs::read(&path)
        .with_context(|| format!("cannot read `{}`", path.display()))
        .hint("the folder needs the fast tokenizer's file; transformers writes it with `AutoTokenizer.from_pretrained(…).save_pretrained(…)`")?;
    let settings = optional_json(&folder.join("tokenizer_config.json"))?;
    let special = optional_json(&folder.join("special_tokens_map.json"))?;
    let token = |key: &str| token_text(&settings, key).or_else(|| token_text(&special, key));
    let mut files = TokenizerFiles {
        chat_template: chat_template(folder, &settings)?,
        bos_token: token("bos_token"),
        eos_token: token("eos_token"),
        pad_token: token("pad_token"),
        eos_token_ids: Vec::new(),
        tokenizer_json,
    };
    files.eos_token_ids = end_ids(folder, config, &files)?;
    Ok(files)
}

/// `chat_template.jinja` when there is one, as in transformers; else the setting, a text or a list of named ones.
fn chat_template(folder: &Path, settings: &Value) -> Result<Option<String>> {
    let path = folder.join("chat_template.jinja");
    if path.exists() {
        let template =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        return Ok(Some(template));
    }
    match settings.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(template)) => Ok(Some(template.clone())),
        Some(Value::Array(templates)) => default_template(templates)
            .with_context(|| format!("`{}`", folder.join("tokenizer_config.json").display()))
            .map(Some),
        Some(_) => bail!(
            "`{}`: `chat_template` is neither a text nor a list",
            folder.join("tokenizer_config.json").display()
        ),
    }
}

fn default_template(templates: &[Value]) -> Result<String> {
    templates
        .iter()
        .find(|template| template.get("name").and_then(Value::as_str) == Some("default"))
        .and_then(|template| template.get("template").and_then(Value::as_str))
        .map(str::to_string)
        .context("the list `chat_template` has no template named `default`")
}

/// A special token is a text, or an object with its text in `content`.
fn token_text(settings: &Value, key: &str) -> Option<String> {
    let token = settings.get(key)?;
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_string)
}

/// Where generation ends: `generation_config.json`, else `config.json`, else the end token's id.
fn end_ids(folder: &Path, config: Option<&ModelConfig>, files: &TokenizerFiles) -> Result<Vec<u32>> {
    let path = folder.join("generation_config.json");
    let ids = match optional_json(&path)?.get("eos_token_id") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(ids)) => ids.iter().map(|id| token_id(id, &path)).collect::<Result<_>>()?,
        Some(id) => vec![token_id(id, &path)?],
    };
    if !ids.is_empty() {
        return Ok(ids);
    }
    if let Some(config) = config.filter(|config| !config.eos_token_ids.is_empty()) {
        return Ok(config.eos_token_ids.clone());
    }
    let Some(end) = &files.eos_token else { return Ok(Vec::new()) };
    let tokenizer: Value = serde_json::from_slice(&files.tokenizer_json)
        .with_context(|| format!("`{}` is no valid JSON", folder.join("tokenizer.json").display()))?;
    Ok(id_of(&tokenizer, end).into_iter().collect())
}

fn token_id(value: &Value, path: &Path) -> Result<u32> {
    value
        .as_u64()
        .and_then(|id| u32::try_from(id).ok())
        .with_context(|| format!("`{}`: `eos_token_id` has {value}, expected a token id", path.display()))
}

fn id_of(tokenizer: &Value, text: &str) -> Option<u32> {
    let added = tokenizer.get("added_tokens").and_then(Value::as_array);
    let added = added.and_then(|tokens| {
        tokens.iter().find(|token| token.get("content").and_then(Value::as_str) == Some(text))
    });
    let id = match added {
        Some(token) => token.get("id")?,
        None => tokenizer.get("model")?.get("vocab")?.get(text)?,
    };
    u32::try_from(id.as_u64()?).ok()
}

/// The file as JSON, or null where there is none.
fn optional_json(path: &Path) -> Result<Value> {
    if path.exists() { read_json(path) } else { Ok(Value::Null) }
}
