//! Sources: records of dumps to examples. Five are built in; any other has a card that says what its fields mean.

pub mod card;
mod carded;
pub mod code_alpaca;
pub mod convfinqa;
pub mod dolly;
pub mod finance_alpaca;
pub(crate) mod finqa;
mod gather;
pub mod instruction;
pub mod spider;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Error, Result, anyhow};
use rayon::prelude::*;
use serde::de::DeserializeOwned;

use self::card::SourceCard;
use self::carded::Carded;
use self::gather::{Candidate, Gather, Sampling};
use super::clean::Cleaned;
use super::example::{Example, Role};
use super::manifest::{InputFile, SkippedRecord};
use super::reader::{Fingerprint, files_of, fingerprint, fingerprint_beside, read_tolerant};
use super::template::ALPACA_INPUT;
use crate::error::{is_missing_file, render, with_hint};
use crate::recipe::{CardSpec, DataSpec, Paths, SourcesSpec, SpiderSpec, TemplateFormat};

/// A source that is built in, named as in the recipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BuiltIn {
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

impl BuiltIn {
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
    /// A turn whose conversation a later record holds whole.
    EarlierTurn,
    /// Turns that are not question and answer in turn.
    OddTurns,
    /// It could not be read, and `--skip-bad` tolerates that.
    Bad,
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
            Self::EarlierTurn => "earlier_turn",
            Self::OddTurns => "odd_turns",
            Self::Bad => "bad_record",
            Self::TooLong => "too_long",
            Self::Unsupervised => "unsupervised",
            Self::Refused => "refused",
        }
    }
}

/// What a record becomes.
pub type Outcome = Result<Example, Reason>;

/// How a source's records become examples, many at the same time.
trait Source: Sync {
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
    /// The source's name, as in the recipe.
    pub name: String,
    /// What is known of it.
    pub card: SourceCard,
    /// How many examples the recipe asks for; `None`: all.
    pub asked: Option<usize>,
    /// Records in the files.
    pub read: usize,
    /// Those that can be used, in the order of the files; of very many, those that come first in the sample.
    pub examples: Vec<Example>,
    /// How many more can be used.
    pub passed_over: usize,
    /// Those that cannot, by reason.
    pub dropped: BTreeMap<Reason, usize>,
    /// Those that could not be read, and were tolerated.
    pub skipped: Vec<SkippedRecord>,
    /// Characters that were removed from their texts.
    pub cleaned: Cleaned,
    /// The files that were read: those of the records first.
    pub inputs: Vec<InputFile>,
}

/// What parts an instruction from its context.
pub fn context_separator(format: TemplateFormat) -> &'static str {
    match format {
        TemplateFormat::Model => "\n\n",
        TemplateFormat::Alpaca => ALPACA_INPUT,
    }
}

/// Reads every source of a recipe, at the same time; first those that are built in, then the others by name.
///
/// # Errors
/// When there is no source, or a file cannot be read: the error names source, file and record.
pub fn collect(spec: &DataSpec) -> Result<Vec<Collected>> {
    let names = asked_for(&spec.sources);
    if names.is_empty() {
        return Err(anyhow!("the recipe names no source in `data.sources`"));
    }
    let found: Vec<Option<Collected>> = names
        .into_par_iter()
        .map(|name| {
            collect_one(spec, name)
                .map_err(|error| with_way_to_file(error, name))
                .with_context(|| format!("source `{name}`"))
        })
        .collect::<Result<_>>()?;
    Ok(found.into_iter().flatten().collect())
}

/// The names of a recipe's sources, in the order of the manifest.
fn asked_for(spec: &SourcesSpec) -> Vec<&str> {
    let is_asked = |source: &BuiltIn| match source {
        BuiltIn::Dolly => spec.dolly.is_some(),
        BuiltIn::FinanceAlpaca => spec.finance_alpaca.is_some(),
        BuiltIn::ConvFinQa => spec.convfinqa.is_some(),
        BuiltIn::Spider => spec.spider.is_some(),
        BuiltIn::CodeAlpaca => spec.code_alpaca.is_some(),
    };
    let mut names: Vec<&str> = BuiltIn::ALL.into_iter().filter(is_asked).map(BuiltIn::name).collect();
    names.extend(spec.others.keys().map(String::as_str));
    names
}

fn built_in(name: &str) -> Option<BuiltIn> {
    BuiltIn::ALL.into_iter().find(|source| source.name() == name)
}

/// Adds where the file comes from when it is not there.
fn with_way_to_file(error: Error, name: &str) -> Error {
    if !is_missing_file(&error) {
        return error;
    }
    match built_in(name).map(SourceCard::of) {
        Some(Ok(SourceCard { file, homepage, .. })) => {
            let next = format!("mend its path in `data.sources.{name}`, or fetch {file} from {homepage}");
            with_hint(error, next)
        }
        Some(Err(damaged)) => damaged,
        None => with_hint(error, format!("mend its path in `data.sources.{name}`")),
    }
}

fn collect_one(spec: &DataSpec, name: &str) -> Result<Option<Collected>> {
    let separator = context_separator(spec.template.format);
    let sources = &spec.sources;
    let Some(source) = built_in(name) else {
        return sources.others.get(name).map(|one| read_carded(spec, name, one, separator)).transpose();
    };
    let reading = |paths, members, asked| {
        let card = SourceCard::of(source)?;
        Ok::<_, Error>(Reading { spec, name, card, paths, members, asked })
    };
    let plain = |one: &Option<crate::recipe::SourceSpec>, members: &'static [&'static str]| {
        one.as_ref().map(|one| (one.path.clone(), members, one.examples))
    };
    Ok(Some(match source {
        BuiltIn::Dolly => {
            let Some((paths, members, asked)) = plain(&sources.dolly, dolly::MEMBERS) else {
                return Ok(None);
            };
            reading(&paths, members, asked)?.read(&dolly::Dolly { separator })?
        }
        BuiltIn::FinanceAlpaca => {
            let Some((paths, members, asked)) = plain(&sources.finance_alpaca, finance_alpaca::MEMBERS)
            else {
                return Ok(None);
            };
            reading(&paths, members, asked)?.read(&finance_alpaca::FinanceAlpaca { separator })?
        }
        BuiltIn::CodeAlpaca => {
            let Some((paths, members, asked)) = plain(&sources.code_alpaca, code_alpaca::MEMBERS) else {
                return Ok(None);
            };
            reading(&paths, members, asked)?.read(&code_alpaca::CodeAlpaca { separator })?
        }
        BuiltIn::ConvFinQa => {
            let Some(one) = &sources.convfinqa else { return Ok(None) };
            let source = convfinqa::ConvFinQa { target: one.target };
            reading(&one.path, convfinqa::MEMBERS, one.examples)?.read(&source)?
        }
        BuiltIn::Spider => {
            let Some(one) = &sources.spider else { return Ok(None) };
            read_spider(reading(&one.path, spider::MEMBERS, one.examples)?, one)?
        }
    }))
}

fn read_spider(reading: Reading<'_>, spec: &SpiderSpec) -> Result<Collected> {
    let tables = spider::tables_file(&spec.tables);
    let schemas = spider::Schemas::read(&tables)?;
    let name = reading.name;
    let mut found = reading.read(&spider::Spider { schemas: &schemas })?;
    found.inputs.push(input_file(name, &tables, fingerprint(&tables)?));
    Ok(found)
}

fn read_carded(spec: &DataSpec, name: &str, one: &CardSpec, separator: &'static str) -> Result<Collected> {
    let card = SourceCard::read(&one.card)?;
    let fields = card.fields.clone().unwrap_or_default();
    let source = Carded { fields, card: one.card.display().to_string(), separator };
    Reading { spec, name, card, paths: &one.path, members: &[], asked: one.examples }.read(&source)
}

/// Keys under which an object may hold the records.
const WRAPPERS: [&str; 4] = ["train", "dev", "test", "data"];

/// A source's files on their way to examples.
struct Reading<'a> {
    spec: &'a DataSpec,
    name: &'a str,
    card: SourceCard,
    paths: &'a Paths,
    /// Names of the file in an archive or a folder.
    members: &'a [&'a str],
    asked: Option<usize>,
}

impl Reading<'_> {
    fn read<S: Source>(self, source: &S) -> Result<Collected> {
        let files = self.files()?;
        let Self { spec, name, card, members, asked, .. } = self;
        let mut found = Collected {
            name: name.to_string(),
            card,
            asked,
            read: 0,
            examples: Vec::new(),
            passed_over: 0,
            dropped: BTreeMap::new(),
            skipped: Vec::new(),
            cleaned: Cleaned::default(),
            inputs: Vec::new(),
        };
        let sampling = Sampling::new(spec.seed, name, spec.duplicates.keep);
        let mut gather = Gather::new(&sampling, asked);
        for (number, file) in (0..).zip(&files) {
            let (mut read, mut bad) = (0, 0);
            let (dropped, skipped) = (&mut found.dropped, &mut found.skipped);
            let mut tolerate = |record: u32, error: Error| {
                if skipped.len() >= spec.skip_bad {
                    return Err(past_tolerance(error, spec.skip_bad));
                }
                bad += 1;
                skipped.push(SkippedRecord {
                    file: file.display().to_string(),
                    record,
                    reason: one_line(&error),
                });
                Ok(())
            };
            let cleaned = &mut found.cleaned;
            let make = |record, one| Ok(Made::of(source.example(record, one)?, number, &sampling));
            let mut each = |_, made: Made| {
                // Counted once it is known that it can be read: a bad record is counted by itself.
                read += 1;
                cleaned.add(made.cleaned);
                match made.outcome {
                    Ok(candidate) => gather.push(candidate),
                    Err(reason) => *dropped.entry(reason).or_default() += 1,
                }
                Ok(())
            };
            let hashed = fingerprint_beside(file, || {
                read_tolerant::<S::Record, _>(file, members, &WRAPPERS, &make, &mut tolerate, &mut each)
            })?;
            found.read += read + bad;
            if bad > 0 {
                *found.dropped.entry(Reason::Bad).or_default() += bad;
            }
            found.inputs.push(input_file(name, file, hashed));
        }
        (found.examples, found.passed_over) = gather.finish();
        Ok(found)
    }

    /// The files of all paths, in their order.
    fn files(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for path in self.paths.as_slice() {
            let upstream =
                (self.name == BuiltIn::Spider.name()).then(|| spider::upstream_files(path)).flatten();
            files.extend(match upstream {
                Some(upstream) => upstream,
                None => files_of(path, self.members)?,
            });
        }
        Ok(files)
    }
}

/// What becomes of a record, but for what depends on those before it.
struct Made {
    outcome: Result<Option<Candidate>, Reason>,
    cleaned: Cleaned,
}

impl Made {
    /// Cleans the example of a record of the file of this number.
    fn of(outcome: Outcome, file: u32, sampling: &Sampling<'_>) -> Self {
        let mut cleaned = Cleaned::default();
        let outcome = outcome.and_then(|mut example| {
            example.file = file;
            cleaned.clean(&mut example);
            match empty_turn(&example) {
                None => Ok(sampling.candidate(example)),
                Some(reason) => Err(reason),
            }
        });
        Self { outcome, cleaned }
    }
}

/// An error without its hint, on one line.
fn one_line(error: &Error) -> String {
    let told = render(error);
    let lines = told.lines().filter(|line| !line.starts_with("hint: "));
    lines.map(|line| line.trim_start_matches("error: ").trim()).collect::<Vec<_>>().join(" ")
}

/// Says that more would have to be tolerated.
fn past_tolerance(error: Error, tolerated: usize) -> Error {
    if tolerated == 0 { error } else { error.context(format!("more than {tolerated} records are bad")) }
}

/// A turn that says nothing once what nobody sees is gone.
fn empty_turn(example: &Example) -> Option<Reason> {
    let empty = example.messages.iter().find(|message| message.content.is_empty())?;
    Some(if empty.role == Role::Assistant { Reason::EmptyResponse } else { Reason::EmptyQuestion })
}

fn input_file(source: &str, path: &Path, Fingerprint { bytes, sha256 }: Fingerprint) -> InputFile {
    InputFile { source: source.to_string(), path: path.display().to_string(), bytes, sha256 }
}

/// Case and white space folded away: what makes two texts the same document.
fn folded(text: &str) -> String {
    let mut folded = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        if !folded.is_empty() {
            folded.push(' ');
        }
        // A string for each word would take a third of the time in which a dump is read.
        if word.is_ascii() { folded.push_str(word) } else { folded.push_str(&word.to_lowercase()) }
    }
    folded.make_ascii_lowercase();
    folded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_and_white_space_are_folded_word_by_word() {
        assert_eq!(folded(" The\u{a0}END\n of\tΣΊΣΥΦΟΣ,  İ \u{212a}"), "the end of σίσυφος, i\u{307} k");
        assert_eq!(folded(" \n"), "");
    }
}
