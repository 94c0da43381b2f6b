//! What a prepared dataset says about itself: where every token came from and what became of every record.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::audit::MaskAudit;
use super::clean::Cleaned;
use super::screen::Finding;
use crate::recipe::DataSpec;

/// The format that this program writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// `manifest.json`. Holds no time and no machine: the same inputs and choices give the same bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// See [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Name and version of the program that wrote it.
    pub program: String,
    /// The recipe's data section.
    pub recipe: DataSpec,
    /// The base model as the recipe names it.
    pub model: String,
    /// Rows of the model's embedding, where its configuration was at hand.
    pub model_vocab_size: Option<i64>,
    /// One more than the tokenizer's largest id.
    pub tokenizer_vocab_size: usize,
    /// SHA-256 over tokenizer, template and choices: see [`ChatTokenizer::hash`](super::tokenizer::ChatTokenizer::hash).
    pub tokenizer_hash: String,
    /// Longest row in tokens.
    pub sequence_length: usize,
    /// The sources; a sequence names its own by index into this list.
    pub sources: Vec<SourceReport>,
    /// What is trained on.
    pub train: SplitReport,
    /// What is held out.
    pub validation: SplitReport,
    /// The files that were read.
    pub inputs: Vec<InputFile>,
}

/// What became of a source's records: `read = taken + not_sampled + sum of dropped`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct SourceReport {
    /// Name, as in the recipe.
    pub name: String,
    /// Licence of the data.
    pub licence: String,
    /// Whether the licence allows commercial use.
    pub commercial_use: bool,
    /// Examples asked for; absent: all.
    pub asked: Option<usize>,
    /// Records in the file.
    pub read: usize,
    /// Usable, but not among those asked for.
    pub not_sampled: usize,
    /// Examples in the dataset.
    pub taken: usize,
    /// Of these, how many lost context to fit.
    pub shortened: usize,
    /// Records left out, by reason.
    pub dropped: BTreeMap<String, usize>,
    /// Examples found to be duplicates or contaminated, and kept because the recipe says so, by reason.
    #[serde(default)]
    pub kept: BTreeMap<String, usize>,
    /// The first few duplicates and contaminated examples; all of them are in `screened.jsonl`.
    #[serde(default)]
    pub findings: Vec<Finding>,
    /// Records that could not be read, and were tolerated.
    #[serde(default)]
    pub skipped: Vec<SkippedRecord>,
    /// Characters that were removed.
    #[serde(default)]
    pub cleaned: Cleaned,
    /// Share of the tokens that is supervised, in `[0, 1]`; 0 where there is none.
    #[serde(default)]
    pub supervised_share: f64,
    /// What the mask was found to be.
    #[serde(default)]
    pub audit: MaskAudit,
    /// What is trained on.
    pub train: Counts,
    /// What is held out.
    pub validation: Counts,
}

/// A record that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedRecord {
    /// The file, as the recipe names it or its folder.
    pub file: String,
    /// Counted from 1.
    pub record: u32,
    /// What is wrong with it.
    pub reason: String,
}

/// Sizes of a part of the dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Examples.
    pub examples: usize,
    /// Tokens.
    pub tokens: u64,
    /// Tokens that the model is asked to predict.
    pub supervised_tokens: u64,
}

impl Counts {
    /// Adds an example of so many tokens.
    pub fn add(&mut self, tokens: usize, supervised: usize) {
        self.examples += 1;
        self.tokens += tokens as u64;
        self.supervised_tokens += supervised as u64;
    }
}

/// Sizes of a split.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct SplitReport {
    /// Packed rows.
    pub rows: usize,
    /// Examples, tokens, supervised tokens.
    #[serde(flatten)]
    pub counts: Counts,
    /// Share of the rows' places that hold a token, in `[0, 1]`; 0 where there is no row.
    pub packing_efficiency: f64,
}

/// A file that was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputFile {
    /// The source that read it.
    pub source: String,
    /// As the recipe names it.
    pub path: String,
    /// Size in bytes, as stored.
    pub bytes: u64,
    /// Of the file as stored, in hex.
    pub sha256: String,
}
