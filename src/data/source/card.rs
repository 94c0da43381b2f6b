//! What is known of a source before its files are read: `datasets/*.toml`.

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::SourceKind;

/// A source's card.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceCard {
    /// Its full name.
    pub title: String,
    /// What it is.
    pub description: String,
    /// Where it is published.
    pub homepage: String,
    /// Its licence, as an SPDX expression where there is one.
    pub licence: String,
    /// Whether the licence allows commercial use.
    pub commercial_use: bool,
    /// What else to know of the licence.
    pub licence_note: String,
    /// The file that the recipe names.
    pub file: String,
    /// How the file is laid out.
    pub form: String,
    /// Records upstream.
    pub records: usize,
}

impl SourceCard {
    /// The card of a source.
    ///
    /// # Errors
    /// When the embedded card is damaged, which the tests rule out.
    pub fn of(kind: SourceKind) -> Result<Self> {
        let text = match kind {
            SourceKind::Dolly => include_str!("../../../datasets/dolly.toml"),
            SourceKind::FinanceAlpaca => include_str!("../../../datasets/finance_alpaca.toml"),
            SourceKind::ConvFinQa => include_str!("../../../datasets/convfinqa.toml"),
            SourceKind::Spider => include_str!("../../../datasets/spider.toml"),
            SourceKind::CodeAlpaca => include_str!("../../../datasets/code_alpaca.toml"),
        };
        toml::from_str(text).with_context(|| format!("the card of `{}`", kind.name()))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use super::*;

    #[test]
    fn every_source_has_a_card_and_non_commercial_licences_say_so() {
        for kind in SourceKind::ALL {
            let card = SourceCard::of(kind).unwrap();
            assert!(card.records > 0 && !card.licence.is_empty());
            assert_eq!(card.commercial_use, !card.licence.contains("-NC-"), "{}", card.title);
        }
    }
}
