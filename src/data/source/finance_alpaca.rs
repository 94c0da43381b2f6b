//! Finance-Alpaca: `instruction, input, output`; many answers to one question, which stay in one split.

use anyhow::Result;

use super::instruction::{AlpacaRecord, Siblings, example};
use super::{Outcome, Source};

/// Names of the file in an archive.
pub const MEMBERS: &[&str] = &["Cleaned_date.json", "train.json"];

/// The source.
pub(super) struct FinanceAlpaca {
    pub separator: &'static str,
}

impl Source for FinanceAlpaca {
    type Record = AlpacaRecord;

    fn example(&self, number: u32, record: AlpacaRecord) -> Result<Outcome> {
        let input = record.input.unwrap_or_default();
        // The forum part parts its words with two spaces; that is its only layout.
        let [instruction, output] = [&record.instruction, &record.output].map(|text| single_spaced(text));
        Ok(example(number, [&instruction, &input, &output], self.separator, Siblings::ShareQuestion))
    }
}

/// Two spaces between words become one, where nearly all are so: elsewhere they are indents or tables.
fn single_spaced(text: &str) -> String {
    let doubled = text.matches("  ").count();
    if doubled * 2 > text.split_whitespace().count() { text.replace("  ", " ") } else { text.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_text_that_is_doubled_throughout_is_mended() {
        assert_eq!(single_spaced("all  words  are  parted  so"), "all words are parted so");
        assert_eq!(
            single_spaced("a sentence.  Another one follows it."),
            "a sentence.  Another one follows it."
        );
        assert_eq!(single_spaced(""), "");
    }
}
