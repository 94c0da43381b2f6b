//! From a token of a packed row back to where it came from.

use anyhow::{Result, anyhow};
use serde::Serialize;

use super::manifest::InputFile;
use super::store::{Dataset, Lineage, PackedRow, Split};
use super::tokenizer::ChatTokenizer;
use crate::error::user_error;

/// Tokens before and after the one asked about that are shown.
const NEIGHBOURS: usize = 16;

/// Where a token came from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Trace {
    /// `train` or `validation`.
    pub split: &'static str,
    /// Row of the split, counted from 0.
    pub row: usize,
    /// Token of the row, counted from 0.
    pub token: usize,
    /// Its id.
    pub id: u32,
    /// Its text.
    pub text: String,
    /// Text of the tokens before it, within its example.
    pub before: String,
    /// Text of the tokens after it, within its example.
    pub after: String,
    /// Whether training asks for it.
    pub supervised: bool,
    /// Whose words it belongs to: `system`, `user` or `assistant`; absent for what the template puts around them.
    pub role: Option<String>,
    /// The message of the example, counted from 1, where it belongs to one.
    pub message: Option<usize>,
    /// Row of `examples.parquet`, counted from 0.
    pub example: u32,
    /// Its place in the example, counted from 0.
    pub place: usize,
    /// Tokens of the example.
    pub example_tokens: usize,
    /// The example lost context to fit.
    pub shortened: bool,
    /// The source.
    pub source: String,
    /// The source's licence.
    pub licence: String,
    /// The file of the source; absent where the manifest names none.
    pub file: Option<InputFile>,
    /// Record of the file, counted from 1.
    pub record: u32,
    /// The document that decided the split.
    pub document: String,
}

/// Says where a token of a row came from.
///
/// # Errors
/// When there is no such row or token, the files are damaged, or an older program wrote them without lineage of turns.
pub fn trace(
    dataset: &Dataset,
    tokenizer: &ChatTokenizer,
    split: Split,
    row: usize,
    token: usize,
) -> Result<Trace> {
    dataset.check_tokenizer(tokenizer)?;
    let found = dataset.row(split, row)?;
    let (at, place) = locate(&found, token).ok_or_else(|| no_token(split, row, token, found.tokens()))?;
    let damaged = || anyhow!("row {row} of `{}` is damaged", split.name());
    let sequence = found.sequences.get(at).ok_or_else(damaged)?;
    let example = *found.examples.get(at).ok_or_else(damaged)?;
    let lineage = dataset.example(example)?;
    let manifest = &dataset.manifest;
    let source = manifest.sources.get(usize::from(lineage.source)).ok_or_else(|| {
        anyhow!("example {example} is of source {}, which the manifest lacks", lineage.source)
    })?;
    let text = |from: usize, to: usize| {
        let ids = sequence.input_ids.get(from..to.min(sequence.input_ids.len())).unwrap_or_default();
        tokenizer.decode(ids, false)
    };
    let turn = turn_of(&lineage, place);
    Ok(Trace {
        split: split.name(),
        row,
        token,
        id: *sequence.input_ids.get(place).ok_or_else(damaged)?,
        text: text(place, place + 1)?,
        before: text(place.saturating_sub(NEIGHBOURS), place)?,
        after: text(place + 1, place + 1 + NEIGHBOURS)?,
        supervised: sequence.loss_mask.get(place) == Some(&true),
        role: turn.map(|(_, role)| role.to_string()),
        message: turn.map(|(message, _)| message),
        example,
        place,
        example_tokens: sequence.input_ids.len(),
        shortened: lineage.shortened,
        source: source.name.clone(),
        licence: source.licence.clone(),
        file: manifest.inputs.get(lineage.input as usize).cloned(),
        record: lineage.record,
        document: lineage.document,
    })
}

/// The sequence of a row's token, and the token's place in it.
fn locate(row: &PackedRow, token: usize) -> Option<(usize, usize)> {
    let mut place = token;
    for (at, sequence) in row.sequences.iter().enumerate() {
        if place < sequence.input_ids.len() {
            return Some((at, place));
        }
        place -= sequence.input_ids.len();
    }
    None
}

fn turn_of(lineage: &Lineage, place: usize) -> Option<(usize, &'static str)> {
    let turn = lineage.turns.iter().find(|turn| (turn.start as usize..turn.end as usize).contains(&place))?;
    Some((turn.message as usize + 1, turn.role.as_str()))
}

fn no_token(split: Split, row: usize, token: usize, tokens: usize) -> anyhow::Error {
    user_error(
        format!("row {row} of `{}` has no token {token}", split.name()),
        format!("name a token from 0 to {}", tokens.saturating_sub(1)),
    )
}

impl Trace {
    /// For people, a line for each fact.
    pub fn told(&self) -> String {
        let of_message = match (&self.role, self.message) {
            (Some(role), Some(message)) => format!("message {message}, {role}"),
            _ => "the template's own".to_string(),
        };
        let supervised = if self.supervised { "supervised" } else { "not supervised" };
        let file = self
            .file
            .as_ref()
            .map_or_else(|| "unknown".to_string(), |file| format!("{} (sha256 {})", file.path, file.sha256));
        let lines = [
            (
                "token",
                format!(
                    "{} of row {} of {}: id {} {:?}",
                    self.token, self.row, self.split, self.id, self.text
                ),
            ),
            ("text", format!("{}⟦{}⟧{}", self.before, self.text, self.after)),
            ("mask", supervised.to_string()),
            ("of", of_message),
            ("source", format!("{}, {}", self.source, self.licence)),
            ("file", file),
            ("record", self.record.to_string()),
            ("document", self.document.clone()),
            (
                "example",
                format!(
                    "{}: token {} of {}{}",
                    self.example,
                    self.place,
                    self.example_tokens,
                    if self.shortened { ", context shortened" } else { "" }
                ),
            ),
        ];
        lines.iter().map(|(name, value)| format!("{name:<10}{value}\n")).collect()
    }
}
