//! The documents of a service: a folder of `.txt`, `.md` and `.json` files.
//!
//! A text file is one document: its title is its first heading, else the file's stem; its category is the name of
//! the folder that holds it; its id is its path below the documents folder. A JSON file is one object or an array
//! of objects with `content` and, where given, `id`, `title`, `category`, `metadata`; further fields are kept in
//! the metadata. The order is that of the ids, so the same folder gives the same list on every machine.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{HintExt as _, user_error};
use crate::progress;

/// One document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Document {
    /// Unique in its folder.
    pub id: String,
    /// What it is called.
    pub title: String,
    /// What it says; lines end in `\n`.
    pub content: String,
    /// Where it belongs.
    pub category: String,
    /// What else is known about it.
    pub metadata: Map<String, Value>,
}

/// Reads every document below `folder`, ordered by file and record.
///
/// Hidden files and other extensions are passed over; a document without text is passed over with a note.
///
/// # Errors
/// When the folder or a file cannot be read, is not UTF-8 or no such JSON, when two documents share an id, or when
/// there is no document at all. The file and the record are named.
pub fn load_folder(folder: &Path) -> Result<Vec<Document>> {
    let mut files = Vec::new();
    list_files(folder, "", &mut files)
        .with_context(|| format!("cannot read the documents folder `{}`", folder.display()))?;
    files.sort_by(|a, b| a.relative.cmp(&b.relative));
    let mut documents = Vec::new();
    for file in &files {
        documents.extend(read_file(file)?);
    }
    check_ids(&documents)?;
    let documents = drop_empty(documents);
    if documents.is_empty() {
        return Err(user_error(
            format!("no document in `{}`", folder.display()),
            "put `.txt`, `.md` or `.json` files there, or leave `serve.documents` out to answer without documents",
        ));
    }
    Ok(documents)
}

/// A file that holds documents.
struct File {
    path: PathBuf,
    /// Path below the documents folder, with `/`.
    relative: String,
    category: String,
}

/// A document and where it was read: `faq.json`, record 3.
struct Located {
    document: Document,
    place: String,
}

fn list_files(folder: &Path, prefix: &str, files: &mut Vec<File>) -> Result<()> {
    let category = folder_name(folder);
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list `{}`", folder.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list `{}`", folder.display()))?;
        let path = entry.path();
        let Ok(name) = entry.file_name().into_string() else {
            bail!("the file name `{}` is not UTF-8", path.display());
        };
        let relative = format!("{prefix}{name}");
        if name.starts_with('.') {
            continue;
        }
        // A link to a folder is not followed: it may lead back up.
        if entry.file_type().with_context(|| format!("cannot read `{}`", path.display()))?.is_dir() {
            list_files(&path, &format!("{relative}/"), files)?;
        } else if matches!(extension(&path).as_str(), "txt" | "md" | "json") && path.is_file() {
            files.push(File { path, relative, category: category.clone() });
        }
    }
    Ok(())
}

/// The folder's own name, also for `.` and `..`.
fn folder_name(folder: &Path) -> String {
    let whole = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
    whole.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn extension(path: &Path) -> String {
    path.extension().map(|extension| extension.to_string_lossy().to_lowercase()).unwrap_or_default()
}

fn read_file(file: &File) -> Result<Vec<Located>> {
    let name = file.path.display();
    let bytes = fs::read(&file.path).with_context(|| format!("cannot read `{name}`"))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        user_error(
            format!("`{name}` is not UTF-8 at byte {}", error.utf8_error().valid_up_to()),
            "convert it: `iconv -t UTF-8`",
        )
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    if extension(&file.path) == "json" {
        json_documents(file, text)
    } else {
        let document = text_document(file, text);
        Ok(vec![Located { document, place: format!("`{name}`") }])
    }
}

fn text_document(file: &File, text: &str) -> Document {
    let content = unix_lines(text);
    Document {
        id: file.relative.clone(),
        title: first_heading(&content).unwrap_or_else(|| stem(&file.path)),
        content,
        category: file.category.clone(),
        metadata: Map::new(),
    }
}

fn unix_lines(text: &str) -> String {
    text.replace("\r\n", "\n").replace('\r', "\n")
}

fn stem(path: &Path) -> String {
    path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The first Markdown heading outside a fenced block, where `#` would be a comment of some program.
fn first_heading(text: &str) -> Option<String> {
    let mut fenced = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with("```") || line.starts_with("~~~") {
            fenced = !fenced;
        }
        let title = line.trim_start_matches('#');
        let depth = line.len() - title.len();
        if !fenced && (1..=6).contains(&depth) && title.starts_with([' ', '\t']) {
            let title = title.trim().trim_end_matches('#').trim_end();
            if !title.is_empty() {
                return Some(title.to_string());
            }
        }
    }
    None
}

fn json_documents(file: &File, text: &str) -> Result<Vec<Located>> {
    let name = file.path.display();
    let value: Value = serde_json::from_str(text)
        .with_context(|| format!("`{name}` is no JSON"))
        .hint("a `.json` file holds one document or an array of documents")?;
    match value {
        Value::Array(records) => records
            .into_iter()
            .enumerate()
            .map(|(at, record)| {
                let place = format!("`{name}`, record {}", at + 1);
                json_document(file, record, format!("{}#{}", file.relative, at + 1), place)
            })
            .collect(),
        record => Ok(vec![json_document(file, record, file.relative.clone(), format!("`{name}`"))?]),
    }
}

fn json_document(file: &File, record: Value, default_id: String, place: String) -> Result<Located> {
    let Value::Object(mut fields) = record else {
        return Err(user_error(
            format!("{place}: expected a JSON object, found {}", kind(&record)),
            "a document is an object with `content` and, where known, `id`, `title`, `category`, `metadata`",
        ));
    };
    let read = || -> Result<Document> {
        let content = unix_lines(&text_field(&mut fields, "content")?.context("`content` is missing")?);
        let id = id_field(&mut fields)?.unwrap_or(default_id);
        let title = text_field(&mut fields, "title")?;
        let category = text_field(&mut fields, "category")?.unwrap_or_else(|| file.category.clone());
        let mut metadata = metadata_field(&mut fields)?;
        for (key, value) in std::mem::take(&mut fields) {
            metadata.entry(key).or_insert(value);
        }
        let title = title.or_else(|| first_heading(&content)).unwrap_or_else(|| stem(&file.path));
        Ok(Document { id, title, content, category, metadata })
    };
    let document = read().with_context(|| format!("{place} is no document"))?;
    Ok(Located { document, place })
}

fn text_field(fields: &mut Map<String, Value>, key: &str) -> Result<Option<String>> {
    match fields.shift_remove(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => bail!("`{key}` is {}, expected a string", kind(&other)),
    }
}

fn id_field(fields: &mut Map<String, Value>) -> Result<Option<String>> {
    match fields.shift_remove("id") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if !text.is_empty() => Ok(Some(text)),
        Some(Value::Number(number)) => Ok(Some(number.to_string())),
        Some(other) => bail!("`id` is {}, expected a number or a string that is not empty", kind(&other)),
    }
}

fn metadata_field(fields: &mut Map<String, Value>) -> Result<Map<String, Value>> {
    match fields.shift_remove("metadata") {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(map)) => Ok(map),
        Some(other) => bail!("`metadata` is {}, expected an object", kind(&other)),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(text) if text.is_empty() => "an empty string",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn check_ids(documents: &[Located]) -> Result<()> {
    let mut seen: HashMap<&str, &str> = HashMap::new();
    for Located { document, place } in documents {
        if let Some(other) = seen.insert(&document.id, place) {
            return Err(user_error(
                format!("two documents have the id `{}`: {other} and {place}", document.id),
                "give each document an id of its own",
            ));
        }
    }
    Ok(())
}

fn drop_empty(documents: Vec<Located>) -> Vec<Document> {
    let (full, empty): (Vec<_>, Vec<_>) =
        documents.into_iter().partition(|located| !located.document.content.trim().is_empty());
    for Located { place, .. } in &empty {
        progress::note(format!("note: {place} has no text and is left out"));
    }
    full.into_iter().map(|located| located.document).collect()
}
