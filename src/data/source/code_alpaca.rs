//! CodeAlpaca: `instruction, input, output`; answers are code, so their layout stays as it is.

use anyhow::Result;

use super::instruction::{AlpacaRecord, Siblings, example};
use super::{Outcome, Source};

/// Names of the file in an archive.
pub const MEMBERS: &[&str] = &["code_alpaca_20k.json", "code_alpaca_2k.json", "train.json"];

/// The source.
pub(super) struct CodeAlpaca {
    pub separator: &'static str,
}

impl Source for CodeAlpaca {
    type Record = AlpacaRecord;

    fn example(&self, number: u32, record: AlpacaRecord) -> Result<Outcome> {
        let input = record.input.unwrap_or_default();
        let parts = [record.instruction.as_str(), &input, &record.output];
        Ok(example(number, parts, self.separator, Siblings::ShareQuestion))
    }
}
