//! Databricks Dolly 15k: `instruction, context, response, category`.

use anyhow::Result;
use serde::Deserialize;

use super::instruction::{Siblings, example};
use super::{Outcome, Source};

/// Names of the file in an archive.
pub const MEMBERS: &[&str] = &["databricks-dolly-15k.jsonl", "train.jsonl", "train.json"];

/// A record.
#[derive(Debug, Deserialize)]
pub(super) struct Record {
    instruction: String,
    #[serde(default)]
    context: Option<String>,
    response: String,
}

/// The source.
pub(super) struct Dolly {
    pub separator: &'static str,
}

impl Source for Dolly {
    type Record = Record;

    fn example(&self, number: u32, record: Record) -> Result<Outcome> {
        let context = record.context.unwrap_or_default();
        let parts = [record.instruction.as_str(), &context, &record.response];
        Ok(example(number, parts, self.separator, Siblings::ShareContext))
    }
}
