//! The five sources: records of a dump to examples.

pub mod card;
pub mod code_alpaca;
pub mod convfinqa;
pub mod dolly;
pub mod finance_alpaca;
pub mod instruction;
pub mod spider;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Error, Result, anyhow};
use rayon::prelude::*;
use serde::de::DeserializeOwned;

use self::card::SourceCard;
use super::clean::Cleaned;
use super::example::{Example, Role};
use super::manifest::InputFile;
use super::reader::{fingerprint, read_records};
use super::template::ALPACA_INPUT;
use crate::error::{is_missing_file, with_hint};
use crate::recipe::{SourceSpec, SourcesSpec, SpiderSpec, TemplateFormat};

/// A source, named as in the recipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SourceKind {
    /// Databricks Dolly 15k.
    Dolly,
    /// Finance-Alpaca.
    FinanceAlpaca,
    /// ConvFinQA.
    ConvFinQa,
    /// Spider.
    Spider,
    /// CodeAlpaca.
    CodeAlpaca,
}

impl SourceKind {
    /// All, in the order of the manifest.
    pub const ALL: [Self; 5] =
        [Self::Dolly, Self::FinanceAlpaca, Self::ConvFinQa, Self::Spider, Self::CodeAlpaca];

    /// As the recipe spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dolly => "dolly",
            Self::FinanceAlpaca => "finance_alpaca",
            Self::ConvFinQa => "convfinqa",
            Self::Spider => "spider",
            Self::CodeAlpaca => "code_alpaca",
        }
    }
}

/// Why a record is not in the dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// Nothing is asked.
    EmptyQuestion,
    /// Nothing is answered.
    EmptyResponse,
    /// Said word for word by an earlier record.
    Duplicate,
    /// Question and response say what an earlier record says, but for trifles.
    NearDuplicate,
    /// An evaluation set that the recipe names holds it.
    Contaminated,
    /// Questions, programs and answers differ in number.
    TurnsDisagree,
    /// Question and response alone are longer than a row.
    TooLong,
    /// None of its tokens is supervised.
    Unsupervised,
    /// The chat template refuses it, or its end would not be learned.
    Refused,
}

impl Reason {
    /// As the manifest spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::EmptyQuestion => "empty_question",
            Self::EmptyResponse => "empty_response",
            Self::Duplicate => "duplicate",
            Self::NearDuplicate => "near_duplicate",
            Self::Contaminated => "contaminated",
            Self::TurnsDisagree => "turns_disagree",
            Self::TooLong => "too_long",
            Self::Unsupervised => "unsupervised",
            Self::Refused => "refused",
        }
    }
}

/// What a record becomes.
pub type Outcome = Result<Example, Reason>;

/// How a source's records become examples.
trait Source {
    /// A record as it lies in the file; fields that are not needed are passed over.
    type Record: DeserializeOwned;

    /// Makes the example of a record.
    ///
    /// The outer error stops the run: the files do not belong together.
    fn example(&self, number: u32, record: Self::Record) -> Result<Outcome>;
}

/// What a source's files hold.
#[derive(Debug, Clone)]
pub struct Collected {
    /// The source.
    pub kind: SourceKind,
    /// How many examples the recipe asks for; `None`: all.
    pub asked: Option<usize>,
    /// Records in the file.
    pub read: usize,
    /// Those that can be used, in the order of the file.
    pub examples: Vec<Example>,
    /// Those that cannot, by reason.
    pub dropped: BTreeMap<Reason, usize>,
    /// Characters that were removed from their texts.
    pub cleaned: Cleaned,
    /// The files that were read.
    pub inputs: Vec<InputFile>,
}

/// What parts an instruction from its context.
pub fn context_separator(format: TemplateFormat) -> &'static str {
    match format {
        TemplateFormat::Model => "\n\n",
        TemplateFormat::Alpaca => ALPACA_INPUT,
    }
}

/// Reads every source of a recipe, at the same time; in the order of [`SourceKind`].
///
/// # Errors
/// When there is no source, or a file cannot be read: the error names source, file and record.
pub fn collect(spec: &SourcesSpec, format: TemplateFormat) -> Result<Vec<Collected>> {
    let kinds: Vec<SourceKind> = SourceKind::ALL.into_iter().filter(|kind| is_asked(spec, *kind)).collect();
    if kinds.is_empty() {
        return Err(anyhow!("the recipe names no source in `data.sources`"));
    }
    let found: Vec<Option<Collected>> = kinds
        .into_par_iter()
        .map(|kind| {
            collect_one(spec, kind, context_separator(format))
                .map_err(|error| with_way_to_file(error, kind))
                .with_context(|| format!("source `{}`", kind.name()))
        })
        .collect::<Result<_>>()?;
    Ok(found.into_iter().flatten().collect())
}

/// Adds where the file comes from when it is not there.
fn with_way_to_file(error: Error, kind: SourceKind) -> Error {
    if !is_missing_file(&error) {
        return error;
    }
    let name = kind.name();
    match SourceCard::of(kind) {
        Ok(SourceCard { file, homepage, .. }) => {
            let next = format!("mend its path in `data.sources.{name}`, or fetch {file} from {homepage}");
            with_hint(error, next)
        }
        Err(damaged) => damaged,
    }
}

fn is_asked(spec: &SourcesSpec, kind: SourceKind) -> bool {
    match kind {
        SourceKind::Dolly => spec.dolly.is_some(),
        SourceKind::FinanceAlpaca => spec.finance_alpaca.is_some(),
        SourceKind::ConvFinQa => spec.convfinqa.is_some(),
        SourceKind::Spider => spec.spider.is_some(),
        SourceKind::CodeAlpaca => spec.code_alpaca.is_some(),
    }
}

fn collect_one(spec: &SourcesSpec, kind: SourceKind, separator: &'static str) -> Result<Option<Collected>> {
    let plain = |source: &dyn Fn(&SourceSpec) -> Result<Collected>, spec: &Option<SourceSpec>| {
        spec.as_ref().map(source).transpose()
    };
    match kind {
        SourceKind::Dolly => plain(
            &|one| read(kind, &dolly::Dolly { separator }, &one.path, dolly::MEMBERS, one.examples),
            &spec.dolly,
        ),
        SourceKind::FinanceAlpaca => plain(
            &|one| {
                let source = finance_alpaca::FinanceAlpaca { separator };
                read(kind, &source, &one.path, finance_alpaca::MEMBERS, one.examples)
            },
            &spec.finance_alpaca,
        ),
        SourceKind::CodeAlpaca => plain(
            &|one| {
                let source = code_alpaca::CodeAlpaca { separator };
                read(kind, &source, &one.path, code_alpaca::MEMBERS, one.examples)
            },
            &spec.code_alpaca,
        ),
        SourceKind::ConvFinQa => spec
            .convfinqa
            .as_ref()
            .map(|one| {
                let source = convfinqa::ConvFinQa { target: one.target };
                read(kind, &source, &one.path, convfinqa::MEMBERS, one.examples)
            })
            .transpose(),
        SourceKind::Spider => spec.spider.as_ref().map(read_spider).transpose(),
    }
}

fn read_spider(spec: &SpiderSpec) -> Result<Collected> {
    let schemas = spider::Schemas::read(&spec.tables)?;
    let source = spider::Spider { schemas: &schemas };
    let mut found = read(SourceKind::Spider, &source, &spec.path, spider::MEMBERS, spec.examples)?;
    found.inputs.push(input_file(SourceKind::Spider, &spec.tables)?);
    Ok(found)
}

fn read<S: Source>(
    kind: SourceKind,
    source: &S,
    path: &Path,
    members: &[&str],
    asked: Option<usize>,
) -> Result<Collected> {
    let (mut examples, mut read, mut cleaned) = (Vec::new(), 0, Cleaned::default());
    let mut dropped = BTreeMap::new();
    read_records::<S::Record>(path, members, &["train", "dev", "test", "data"], &mut |number, record| {
        read += 1;
        match source.example(number, record)? {
            Ok(mut example) => {
                cleaned.clean(&mut example);
                match empty_turn(&example) {
                    None => examples.push(example),
                    Some(reason) => *dropped.entry(reason).or_default() += 1,
                }
            }
            Err(reason) => *dropped.entry(reason).or_default() += 1,
        }
        Ok(())
    })?;
    Ok(Collected { kind, asked, read, examples, dropped, cleaned, inputs: vec![input_file(kind, path)?] })
}

/// A turn that says nothing once what nobody sees is gone.
fn empty_turn(example: &Example) -> Option<Reason> {
    let empty = example.messages.iter().find(|message| message.content.is_empty())?;
    Some(if empty.role == Role::Assistant { Reason::EmptyResponse } else { Reason::EmptyQuestion })
}

fn input_file(kind: SourceKind, path: &Path) -> Result<InputFile> {
    let found = fingerprint(path)?;
    Ok(InputFile {
        source: kind.name().to_string(),
        path: path.display().to_string(),
        bytes: found.bytes,
        sha256: found.sha256,
    })
}

/// Case and white space folded away: what makes two texts the same document.
fn folded(text: &str) -> String {
    text.split_whitespace().map(str::to_lowercase).collect::<Vec<_>>().join(" ")
}
