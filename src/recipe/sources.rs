//! `data.sources`: the sources of the mixture and where their files lie.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// The sources of the mixture; one that is absent contributes nothing.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct SourcesSpec {
    /// Databricks Dolly 15k.
    pub dolly: Option<SourceSpec>,
    /// Finance-Alpaca.
    pub finance_alpaca: Option<SourceSpec>,
    /// ConvFinQA.
    pub convfinqa: Option<ConvFinQaSpec>,
    /// Spider, with its schemas.
    pub spider: Option<SpiderSpec>,
    /// CodeAlpaca.
    pub code_alpaca: Option<SourceSpec>,
    /// Any further source under a name of its own; its card says what its fields mean.
    #[serde(flatten)]
    pub others: BTreeMap<String, CardSpec>,
}

/// The files of a source: one path or several, each a file or a folder of shards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a path or a list of paths")]
pub enum Paths {
    /// `path = "a.jsonl"`
    One(PathBuf),
    /// `path = ["a.jsonl", "b.jsonl"]`
    Several(Vec<PathBuf>),
}

impl Paths {
    /// All of them, in their order.
    pub fn as_slice(&self) -> &[PathBuf] {
        match self {
            Self::One(path) => std::slice::from_ref(path),
            Self::Several(paths) => paths,
        }
    }
}

impl From<&str> for Paths {
    fn from(path: &str) -> Self {
        Self::One(PathBuf::from(path))
    }
}

/// A source that needs nothing but its files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceSpec {
    /// The dump: JSON array or lines, CSV, TSV, parquet or Arrow, plain, `.gz`, `.zst` or `.zip`; or folders of it.
    pub path: Paths,
    /// How many examples to sample; `None` takes all.
    pub examples: Option<usize>,
}

/// ConvFinQA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConvFinQaSpec {
    /// `train.json` or `train_turn.json` in the upstream form, the upstream `data.zip`, or a re-packaging.
    pub path: Paths,
    /// How many examples (conversations) to sample; `None` takes all.
    pub examples: Option<usize>,
    /// What an assistant turn says.
    #[serde(default)]
    pub target: ConvFinQaTarget,
}

/// What an assistant turn of ConvFinQA says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConvFinQaTarget {
    /// The program, then the executed answer.
    #[default]
    ProgramThenAnswer,
    /// The executed answer.
    Answer,
}

/// Spider.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpiderSpec {
    /// `train_spider.json`, `train_others.json` or both, full or slim form; or the upstream folder.
    pub path: Paths,
    /// `tables.json`: the schemas, or the folder that holds it. Without it a question cannot be answered.
    pub tables: PathBuf,
    /// How many examples to sample; `None` takes all.
    pub examples: Option<usize>,
}

/// A source that a card describes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CardSpec {
    /// A TOML file like those in `datasets`, with a section `[fields]`.
    pub card: PathBuf,
    /// The dump, as of any other source.
    pub path: Paths,
    /// How many examples to sample; `None` takes all.
    pub examples: Option<usize>,
}

/// The section of a source that is not built in, before it is known to name a card.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Other {
    card: Option<PathBuf>,
    path: Paths,
    examples: Option<usize>,
}

impl<'de> Deserialize<'de> for SourcesSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(SourcesVisitor)
    }
}

struct SourcesVisitor;

impl<'de> Visitor<'de> for SourcesVisitor {
    type Value = SourcesSpec;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("the sources by their names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<SourcesSpec, A::Error> {
        let mut sources = SourcesSpec::default();
        while let Some(name) = map.next_key::<String>()? {
            match name.as_str() {
                "dolly" => sources.dolly = map.next_value()?,
                "finance_alpaca" => sources.finance_alpaca = map.next_value()?,
                "convfinqa" => sources.convfinqa = map.next_value()?,
                "spider" => sources.spider = map.next_value()?,
                "code_alpaca" => sources.code_alpaca = map.next_value()?,
                _ => {
                    let Other { card, path, examples } = map.next_value()?;
                    let card = card.ok_or_else(|| A::Error::custom(needs_card(&name)))?;
                    sources.others.insert(name, CardSpec { card, path, examples });
                }
            }
        }
        Ok(sources)
    }
}

fn needs_card(name: &str) -> String {
    format!(
        "`{name}` is not built in (`dolly`, `finance_alpaca`, `convfinqa`, `spider`, `code_alpaca` are), \
         so it needs a `card` that says what its fields mean"
    )
}
