//! Folders of shards: what `datasets` saves, and what the hub holds.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::packing::ENDINGS;
use super::quoted;
use crate::error::user_error;

/// Folders inside a folder that are looked into.
const DEPTH: usize = 4;

const PACKINGS: [&str; 3] = ["gz", "zst", "zip"];

/// Notes beside the data.
const NOTES: [&str; 5] =
    ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"];

/// What `Dataset.save_to_disk` writes beside its Arrow files.
#[derive(Debug, Deserialize)]
struct State {
    #[serde(rename = "_data_files")]
    data_files: Vec<DataFile>,
    #[serde(rename = "_indices_files", alias = "_indices_data_files")]
    indices_files: Option<Vec<serde::de::IgnoredAny>>,
}

#[derive(Debug, Deserialize)]
struct DataFile {
    filename: String,
}

/// What `DatasetDict.save_to_disk` writes.
#[derive(Debug, Deserialize)]
struct Splits {
    splits: Vec<String>,
}

/// The data files at `path`, in the order of their names: itself, unless it is a folder.
///
/// Of a folder with several splits, the training split; `members` are names that decide before that.
///
/// # Errors
/// When the folder holds no data, data of several kinds, several splits but no `train`, or lacks a shard.
pub fn files_of(path: &Path, members: &[&str]) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let files = in_folder(path, members).with_context(|| format!("in folder `{}`", path.display()))?;
    check_shards(&files).with_context(|| format!("in folder `{}`", path.display()))?;
    Ok(files)
}

fn in_folder(path: &Path, members: &[&str]) -> Result<Vec<PathBuf>> {
    if let Some(splits) = note::<Splits>(&path.join("dataset_dict.json"))? {
        let name = training_split(&splits.splits)?;
        return saved(&path.join(name));
    }
    if path.join("state.json").is_file() {
        return saved(path);
    }
    let mut found = Vec::new();
    walk(path, DEPTH, &mut found)?;
    found.sort();
    let named = members.iter().find_map(|member| found.iter().find(|file| base(file) == *member));
    match named {
        Some(file) => Ok(vec![file.clone()]),
        None => training_files(path, found),
    }
}

/// A file of notes; `None` where there is none.
fn note<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = fs::read(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    serde_json::from_slice(&text).map(Some).with_context(|| format!("cannot read `{}`", path.display()))
}

/// The Arrow files of what `Dataset.save_to_disk` wrote.
fn saved(path: &Path) -> Result<Vec<PathBuf>> {
    let state = note::<State>(&path.join("state.json"))?;
    let state = state.with_context(|| format!("`{}` has no `state.json`", path.display()))?;
    if state.indices_files.is_some_and(|files| !files.is_empty()) {
        return Err(user_error(
            format!("`{}` is a selection of rows that lie elsewhere", path.display()),
            "call `flatten_indices()` and save it again",
        ));
    }
    if state.data_files.is_empty() {
        return Err(user_error(
            format!("`{}` names no data file", path.join("state.json").display()),
            "save it again",
        ));
    }
    Ok(state.data_files.iter().map(|file| path.join(&file.filename)).collect())
}

fn training_split(splits: &[String]) -> Result<&str> {
    match splits {
        [only] => Ok(only),
        _ if splits.iter().any(|split| split == "train") => Ok("train"),
        _ => Err(user_error(
            format!("it holds the splits {}, none of them `train`", quoted(splits)),
            "name the folder of the split that you mean",
        )),
    }
}

fn walk(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read folder `{}`", folder.display()))?;
    for entry in entries {
        let path = entry.with_context(|| format!("cannot read folder `{}`", folder.display()))?.path();
        let name = base(&path);
        if name.starts_with('.') || name == "__MACOSX" {
            continue;
        }
        if path.is_dir() {
            if depth > 0 {
                walk(&path, depth - 1, found)?;
            }
        } else if kind_of(&name).is_some() && !NOTES.contains(&name.as_str()) {
            found.push(path);
        }
    }
    Ok(())
}

fn base(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The ending of a data file's name, without that of its packing.
fn kind_of(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_lowercase();
    let packed = name.rsplit_once('.').filter(|(_, ending)| PACKINGS.contains(ending));
    let plain = packed.map_or(name.as_str(), |(rest, _)| rest);
    let (_, ending) = plain.rsplit_once('.')?;
    ENDINGS.into_iter().find(|known| *known == ending)
}

/// Those of the training split, where names tell splits apart; all, where they do not.
fn training_files(folder: &Path, files: Vec<PathBuf>) -> Result<Vec<PathBuf>> {
    let mut splits: BTreeMap<Option<&'static str>, Vec<PathBuf>> = BTreeMap::new();
    for file in files {
        let inside = file.strip_prefix(folder).unwrap_or(&file).to_string_lossy().into_owned();
        splits.entry(split_of(&inside)).or_default().push(file);
    }
    let chosen = if splits.len() == 1 {
        splits.pop_first().map(|(_, files)| files)
    } else {
        splits.remove(&Some("train"))
    };
    let Some(chosen) = chosen else {
        let names: Vec<String> = splits.values().flatten().map(|file| base(file)).collect();
        let (message, next) = if names.is_empty() {
            (
                format!("it holds no data file (of {})", quoted(&ENDINGS)),
                "name the folder or file that holds the records",
            )
        } else {
            (
                format!("it holds {}, and no training split", quoted(&names)),
                "name the files that you mean in a list",
            )
        };
        return Err(user_error(message, next));
    };
    let kinds: BTreeSet<&str> = chosen.iter().filter_map(|file| kind_of(&base(file))).collect();
    if kinds.len() > 1 {
        let kinds: Vec<&str> = kinds.into_iter().collect();
        return Err(user_error(
            format!("it holds files of several kinds: {}", quoted(&kinds)),
            "name those that you mean in a list: one set is often there twice",
        ));
    }
    Ok(chosen)
}

/// The split that a path's words tell.
fn split_of(path: &str) -> Option<&'static str> {
    let words = || path.split(|c: char| !c.is_ascii_alphanumeric()).map(str::to_ascii_lowercase);
    let has = |names: &[&str]| words().any(|word| names.contains(&word.as_str()));
    if has(&["train", "training"]) {
        Some("train")
    } else if has(&["validation", "valid", "val", "dev"]) {
        Some("validation")
    } else if has(&["test", "testing", "eval", "evaluation"]) {
        Some("test")
    } else {
        None
    }
}

/// Of `x-00001-of-00003`, all three must be there.
fn check_shards(files: &[PathBuf]) -> Result<()> {
    let mut sets: BTreeMap<(PathBuf, String, usize), BTreeSet<usize>> = BTreeMap::new();
    for file in files {
        if let Some((stem, at, of)) = shard_of(&base(file)) {
            let folder = file.parent().unwrap_or(Path::new("")).to_path_buf();
            sets.entry((folder, stem, of)).or_default().insert(at);
        }
    }
    for ((_, stem, of), there) in sets {
        if let Some(missing) = (0..of).find(|at| !there.contains(at)) {
            return Err(user_error(
                format!("it holds {} of the {of} shards of `{stem}`: {missing:05} is missing", there.len()),
                "fetch the rest, or name the files that you mean in a list",
            ));
        }
    }
    Ok(())
}

/// `train-00001-of-00003.parquet`: what it is a shard of, which, and of how many.
fn shard_of(name: &str) -> Option<(String, usize, usize)> {
    let (before, after) = name.split_once("-of-")?;
    let (stem, at) = before.rsplit_once('-')?;
    let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
    (at.len() == 5 && digits.len() == 5).then_some(())?;
    Some((stem.to_string(), at.parse().ok()?, digits.parse().ok()?))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    fn names(files: &[(&str, &str)]) -> Result<Vec<String>> {
        let folder = folder(files);
        let found = files_of(folder.path(), &["known.json"])?;
        Ok(found.iter().map(|file| file.strip_prefix(folder.path()).unwrap().display().to_string()).collect())
    }

    fn told(files: &[(&str, &str)]) -> String {
        crate::error::render(&names(files).unwrap_err())
    }

    #[test]
    fn what_datasets_saved_is_found_by_its_notes() {
        let state = r#"{"_data_files": [{"filename": "data-00000-of-00002.arrow"}, {"filename": "data-00001-of-00002.arrow"}],
            "_fingerprint": "x", "_format_columns": null, "_output_all_columns": false, "_split": "train"}"#;
        let wanted = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"];
        assert_eq!(names(&[("state.json", state), ("dataset_info.json", "{}")]).unwrap(), wanted);
        let dict = r#"{"splits": ["test", "train"]}"#;
        let found =
            names(&[("dataset_dict.json", dict), ("train/state.json", state), ("test/state.json", "{}")]);
        assert_eq!(found.unwrap(), wanted.map(|name| format!("train/{name}")));
        let text = told(&[("dataset_dict.json", r#"{"splits": ["test", "dev"]}"#)]);
        assert!(text.contains("the splits `test`, `dev`, none of them `train`"), "{text}");
        let selected = state
            .replace("\"_fingerprint\"", "\"_indices_files\": [{\"filename\": \"i\"}], \"_fingerprint\"");
        assert!(told(&[("state.json", &selected)]).contains("flatten_indices()"));
        assert!(told(&[("state.json", "{}")]).contains("missing field `_data_files`"));
    }

    #[test]
    fn of_a_hub_s_folder_the_training_shards_are_read_in_order() {
        let hub = [
            ("README.md", ""),
            (".gitattributes", ""),
            ("data/train-00001-of-00002.parquet", ""),
            ("data/train-00000-of-00002.parquet", ""),
            ("data/test-00000-of-00001.parquet", ""),
            ("dataset_infos.json", "{}"),
        ];
        assert_eq!(
            names(&hub).unwrap(),
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
        );
        let text = told(&hub[..3]);
        assert!(text.contains("1 of the 2 shards of `train`: 00000 is missing"), "{text}");
        assert_eq!(names(&[("b.jsonl.gz", ""), ("a.jsonl.zst", "")]).unwrap(), ["a.jsonl.zst", "b.jsonl.gz"]);
        assert_eq!(names(&[("x.json", ""), ("sub/known.json", "")]).unwrap(), ["sub/known.json"]);
    }

    #[test]
    fn a_folder_that_leaves_a_choice_is_not_guessed_at() {
        assert!(told(&[("README.md", "")]).contains("it holds no data file"));
        assert!(told(&[("a.csv", ""), ("a.json", "")]).contains("several kinds: `csv`, `json`"));
        let text = told(&[("test.json", ""), ("dev.json", "")]);
        assert!(text.contains("and no training split"), "{text}");
    }
}
