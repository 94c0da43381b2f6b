//! What is known of a source before its files are read: `datasets/*.toml`, or a file of the same form.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::BuiltIn;
use super::carded::Fields;
use crate::error::{HintExt as _, user_error};

/// A source's card.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceCard {
    /// Its full name.
    pub title: String,
    /// What it is.
    #[serde(default)]
    pub description: String,
    /// Where it is published.
    #[serde(default)]
    pub homepage: String,
    /// Its licence, as an SPDX expression where there is one.
    pub licence: String,
    /// Whether the licence allows commercial use.
    pub commercial_use: bool,
    /// What else to know of the licence.
    #[serde(default)]
    pub licence_note: String,
    /// The file that the recipe names.
    #[serde(default)]
    pub file: String,
    /// How the file is laid out.
    #[serde(default)]
    pub form: String,
    /// Records upstream.
    #[serde(default)]
    pub records: usize,
    /// Which field is what; the sources that are built in know their own.
    pub fields: Option<Fields>,
}

impl SourceCard {
    /// The card of a source that is built in.
    ///
    /// # Errors
    /// When the embedded card is damaged, which the tests rule out.
    pub fn of(source: BuiltIn) -> Result<Self> {
        let text = match source {
            BuiltIn::Dolly => include_str!("../../../datasets/dolly.toml"),
            BuiltIn::FinanceAlpaca => include_str!("../../../datasets/finance_alpaca.toml"),
            BuiltIn::ConvFinQa => include_str!("../../../datasets/convfinqa.toml"),
            BuiltIn::Spider => include_str!("../../../datasets/spider.toml"),
            BuiltIn::CodeAlpaca => include_str!("../../../datasets/code_alpaca.toml"),
        };
        toml::from_str(text).with_context(|| format!("the card of `{}`", source.name()))
    }

    /// Reads the card of a source that is not built in.
    ///
    /// # Errors
    /// When it cannot be read, holds an unknown key, or its `[fields]` do not make an example.
    pub fn read(path: &Path) -> Result<Self> {
        let read = || -> Result<Self> {
            let text = std::fs::read_to_string(path)?;
            let card: Self =
                toml::from_str(&text).map_err(|error| anyhow::anyhow!("{}", error.to_string().trim_end()))?;
            match &card.fields {
                Some(fields) => fields.check()?,
                None => {
                    return Err(user_error(
                        "it has no section `[fields]`",
                        "add one: `instruction = \"…\"` and `response = \"…\"`, or `messages = \"…\"`",
                    ));
                }
            }
            Ok(card)
        };
        read()
            .with_context(|| format!("cannot read card `{}`", path.display()))
            .hint("`datasets/README.md` explains cards")
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use super::*;

    #[test]
    fn every_source_has_a_card_and_non_commercial_licences_say_so() {
        for source in BuiltIn::ALL {
            let card = SourceCard::of(source).unwrap();
            assert!(card.records > 0 && !card.licence.is_empty());
            assert_eq!(card.commercial_use, !card.licence.contains("-NC-"), "{}", card.title);
        }
    }

    #[test]
    fn a_card_s_faults_are_told_with_its_file() {
        let told = |fields: &str| {
            let file = tempfile::NamedTempFile::new().unwrap();
            let text = format!("title = \"t\"\nlicence = \"MIT\"\ncommercial_use = true\n{fields}");
            std::fs::write(file.path(), text).unwrap();
            let text = crate::error::render(&SourceCard::read(file.path()).unwrap_err());
            assert!(text.contains(&file.path().display().to_string()), "{text}");
            text
        };
        assert!(told("").contains("no section `[fields]`"));
        assert!(told("[fields]\ninstruction = \"q\"").contains("names no `response`"));
        assert!(told("[fields]\nresponse = \"a\"").contains("names no `instruction`"));
        assert!(
            told("[fields]\nmessages = \"m\"\nresponse = \"a\"").contains("both `messages` and `response`")
        );
        assert!(told("[fields]\nmessages = \"m\"\nrole = \"\"").contains("`role` is empty"));
        assert!(told("[fields]\ninstruction = \"q\"\nresponse = \"r\"\nrole = \"x\"").contains("`role`"));
        let text = told("[fields]\nanswer = \"a\"");
        assert!(text.contains("unknown field `answer`") && text.contains("`instruction`"), "{text}");
    }
}
