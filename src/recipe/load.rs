//! Reading a recipe: overrides are laid over the text's table, then everything is checked at once.

use std::fs;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result};

use super::{Projection, Recipe};
use crate::error::{is_missing_file, with_hint};

/// What to do without a recipe.
const MISSING: &str =
    "name a recipe that is there; the folder `recipes` beside the README holds some to begin with";

/// `--set train.lr=1e-4`: a dotted key and a TOML value; what is no TOML value is a string.
#[derive(Debug, Clone, PartialEq)]
pub struct Override {
    key: Vec<String>,
    value: toml::Value,
}

impl FromStr for Override {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = text.split_once('=').ok_or_else(|| format!("`{text}` is not `key=value`"))?;
        let key: Vec<String> = key.trim().split('.').map(str::to_string).collect();
        if key.iter().any(String::is_empty) {
            return Err(format!("`{text}` has an empty key"));
        }
        Ok(Self { key, value: parse_value(value.trim()) })
    }
}

fn parse_value(text: &str) -> toml::Value {
    let table: Result<toml::Table, _> = toml::from_str(&format!("value = {text}"));
    table
        .ok()
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| toml::Value::String(text.to_string()))
}

/// What is wrong with a recipe.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// The text is no TOML, or names or values are wrong.
    #[error("recipe `{}`: line {line}: {message}", path.display())]
    Parse {
        /// The recipe.
        path: PathBuf,
        /// 1-based.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// An override does not fit.
    #[error("override `--set {key}`: {message}")]
    Override {
        /// The dotted key.
        key: String,
        /// What is wrong.
        message: String,
    },
    /// A value is outside its range.
    #[error("recipe `{}`: `{key}` is {value}, expected {expected}", path.display())]
    Range {
        /// The recipe.
        path: PathBuf,
        /// The dotted key.
        key: &'static str,
        /// What it is.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
}

impl Recipe {
    /// Reads a recipe and lays `overrides` over it.
    ///
    /// # Errors
    /// When the file cannot be read, and as [`Recipe::parse`].
    pub fn load(path: &Path, overrides: &[Override]) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read recipe `{}`", path.display()))
            .map_err(|error| if is_missing_file(&error) { with_hint(error, MISSING) } else { error })?;
        Ok(Self::parse(&text, path, overrides)?)
    }

    /// As [`Recipe::load`], from text; `path` is named in errors.
    ///
    /// # Errors
    /// When the text is no TOML, holds an unknown field or a value outside its range, or lacks a field that no
    /// override gives.
    pub fn parse(text: &str, path: &Path, overrides: &[Override]) -> Result<Self, RecipeError> {
        let typed = toml::from_str(text).map_err(|error| parse_error(path, text, &error));
        let recipe = if overrides.is_empty() { typed? } else { overlay(text, path, overrides, typed)? };
        recipe.check(path)?;
        Ok(recipe)
    }

    fn check(&self, path: &Path) -> Result<(), RecipeError> {
        let (lora, train) = (&self.lora, &self.train);
        let rules: Vec<(&'static str, String, bool, &'static str)> = vec![
            (
                "name",
                format!("`{}`", self.name),
                is_plain_name(&self.name),
                "letters, digits, `-`, `_` and `.`, not starting with `.`",
            ),
            (
                "data.sequence_length",
                self.data.sequence_length.to_string(),
                (16..=1 << 20).contains(&self.data.sequence_length),
                "16 to 1048576",
            ),
            (
                "data.validation_fraction",
                self.data.validation_fraction.to_string(),
                (0.0..1.0).contains(&self.data.validation_fraction),
                "a number in [0, 1)",
            ),
            (
                "data.duplicates.question_similarity",
                self.data.duplicates.question_similarity.to_string(),
                is_share(self.data.duplicates.question_similarity),
                "a number in (0, 1]",
            ),
            (
                "data.duplicates.response_similarity",
                self.data.duplicates.response_similarity.to_string(),
                is_share(self.data.duplicates.response_similarity),
                "a number in (0, 1]",
            ),
            (
                "data.contamination.ngram",
                self.data.contamination.ngram.to_string(),
                (3..=1000).contains(&self.data.contamination.ngram),
                "3 to 1000",
            ),
            (
                "data.contamination.response_share",
                self.data.contamination.response_share.to_string(),
                is_share(self.data.contamination.response_share),
                "a number in (0, 1]",
            ),
            ("lora.rank", lora.rank.to_string(), COUNTS.contains(&lora.rank), "1 to 65536"),
            (
                "lora.alpha",
                lora.alpha.to_string(),
                lora.alpha != 0.0 && (lora.alpha as f32).is_finite(),
                "a number of 32 bits, not 0: with 0 nothing would learn",
            ),
            (
                "lora.dropout",
                self.lora.dropout.to_string(),
                DROPOUTS.contains(&self.lora.dropout),
                "a number in [0, 1) that does not round to 1 in steps of 1/32768",
            ),
            (
                "lora.targets",
                format!("{:?}", self.lora.targets),
                is_a_set(&self.lora.targets),
                "at least one projection, each once",
            ),
            ("train.epochs", train.epochs.to_string(), is_positive(train.epochs), "a number above 0"),
            (
                "train.max_steps",
                train.max_steps.map_or_else(|| "none".to_string(), |steps| steps.to_string()),
                train.max_steps != Some(0),
                "1 or more",
            ),
            (
                "train.rows_per_microbatch",
                self.train.rows_per_microbatch.to_string(),
                COUNTS.contains(&train.rows_per_microbatch),
                "1 to 65536",
            ),
            (
                "train.accumulation",
                self.train.accumulation.to_string(),
                COUNTS.contains(&train.accumulation),
                "1 to 65536",
            ),
            ("train.lr", train.lr.to_string(), is_positive(train.lr), "a number above 0"),
            ("train.warmup", train.warmup.to_string(), is_not_negative(train.warmup), "0 or more"),
            (
                "train.betas",
                format!("{:?}", train.betas),
                train.betas.iter().all(|beta| (0.0..1.0).contains(beta)),
                "two numbers in [0, 1)",
            ),
            (
                "train.eps",
                train.eps.to_string(),
                train.eps as f32 > 0.0 && (train.eps as f32).is_finite(),
                "a number above 0 in 32 bits",
            ),
            ("train.keep_last", train.keep_last.to_string(), train.keep_last > 0, "1 or more"),
            (
                "train.weight_decay",
                train.weight_decay.to_string(),
                is_not_negative(train.weight_decay),
                "0 or more",
            ),
            (
                "train.max_grad_norm",
                train.max_grad_norm.to_string(),
                is_not_negative(train.max_grad_norm),
                "0 or more",
            ),
            (
                "train.neftune_noise_alpha",
                optional(train.neftune_noise_alpha),
                train.neftune_noise_alpha.is_none_or(is_positive),
                "a number above 0",
            ),
            (
                "train.loraplus_lr_ratio",
                optional(train.loraplus_lr_ratio),
                train.loraplus_lr_ratio.is_none_or(is_positive),
                "a number above 0",
            ),
        ];
        let answers =
            self.eval.answer_tokens().map(|(key, tokens)| (key, tokens.to_string(), tokens > 0, "1 or more"));
        for (key, value, holds, expected) in rules.into_iter().chain(answers) {
            if !holds {
                return Err(RecipeError::Range { path: path.to_path_buf(), key, value, expected });
            }
        }
        Ok(())
    }
}

/// Dropout masks have steps of 2⁻¹⁵: a probability that rounds to 1 would leave nothing.
const DROPOUTS: Range<f64> = 0.0..1.0 - 1.0 / 65_536.0;

/// What numbers of rows and ranks may be: beyond, estimates of memory would no longer fit 64 bits.
const COUNTS: RangeInclusive<usize> = 1..=65536;

fn optional(value: Option<f64>) -> String {
    value.map_or_else(|| "none".to_string(), |value| value.to_string())
}

/// A number above zero, neither infinite nor NaN.
fn is_positive(value: f64) -> bool {
    value > 0.0 && value.is_finite()
}

fn is_a_set(targets: &[Projection]) -> bool {
    !targets.is_empty() && targets.iter().enumerate().all(|(at, one)| !targets[..at].contains(one))
}

fn is_share(value: f64) -> bool {
    value > 0.0 && value <= 1.0
}

fn is_not_negative(value: f64) -> bool {
    value >= 0.0 && value.is_finite()
}

/// The name becomes a folder, so it may not climb out of its parent.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

/// Lays overrides over the text's table; `typed` is what the text alone came to.
///
/// All are laid before anything is checked: one may give what the text, or another, leaves open. The text's own errors
/// have lines, those of a table have none, so an error that both make is told as the text's.
fn overlay(
    text: &str,
    path: &Path,
    overrides: &[Override],
    typed: Result<Recipe, RecipeError>,
) -> Result<Recipe, RecipeError> {
    let table: toml::Table = toml::from_str(text).map_err(|error| parse_error(path, text, &error))?;
    let message = match laid(&table, overrides.iter())? {
        Ok(recipe) => return Ok(recipe),
        Err(message) => message,
    };
    if let Err(RecipeError::Parse { path, line, message: of_text }) = typed {
        let both_lack = [&message, &of_text].iter().all(|message| message.starts_with("missing field"));
        if message == of_text || both_lack {
            return Err(RecipeError::Parse { path, line, message });
        }
    }
    Err(RecipeError::Override { key: culprit(&table, overrides, &message)?, message })
}

/// The recipe of a table with overrides over it, or what is wrong with it.
fn laid<'a>(
    table: &toml::Table,
    overrides: impl Iterator<Item = &'a Override>,
) -> Result<Result<Recipe, String>, RecipeError> {
    let mut table = table.clone();
    for one in overrides {
        insert(&mut table, &one.key, one.value.clone())
            .map_err(|message| RecipeError::Override { key: one.key.join("."), message })?;
    }
    Ok(table.try_into().map_err(|error: toml::de::Error| first_line(error.message())))
}

/// The first override without which something else, or nothing, is wrong.
fn culprit(table: &toml::Table, overrides: &[Override], message: &str) -> Result<String, RecipeError> {
    for (at, one) in overrides.iter().enumerate() {
        let others = overrides.iter().enumerate().filter(|(other, _)| *other != at).map(|(_, one)| one);
        if laid(table, others)?.err().as_deref() != Some(message) {
            return Ok(one.key.join("."));
        }
    }
    // Two of them make the same mistake.
    Ok(overrides.iter().map(|one| one.key.join(".")).collect::<Vec<_>>().join(" --set "))
}

fn insert(table: &mut toml::Table, key: &[String], value: toml::Value) -> Result<(), String> {
    let Some((last, parents)) = key.split_last() else { return Err("empty key".to_string()) };
    let mut at = table;
    for part in parents {
        at = at
            .entry(part.clone())
            .or_insert_with(|| toml::Value::Table(toml::Table::new()))
            .as_table_mut()
            .ok_or_else(|| format!("`{part}` is a value, not a table"))?;
    }
    at.insert(last.clone(), value);
    Ok(())
}

fn parse_error(path: &Path, text: &str, error: &toml::de::Error) -> RecipeError {
    let line = error.span().map_or(1, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
    RecipeError::Parse { path: path.to_path_buf(), line, message: first_line(error.message()) }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_string()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail loudly")]
mod tests {
    use super::*;

    const SMALL: &str = "name = \"x\"\n[model]\nbase = \"b\"\n[lora]\nrank = 8\n";

    fn parse(text: &str, overrides: &[&str]) -> Result<Recipe, String> {
        let overrides: Vec<Override> = overrides.iter().map(|text| text.parse().unwrap()).collect();
        Recipe::parse(text, Path::new("r.toml"), &overrides).map_err(|error| error.to_string())
    }

    #[test]
    fn an_unknown_field_is_told_with_its_line_and_the_known_ones() {
        let error = parse("name = \"x\"\n[model]\nbase = \"b\"\n\n[lora]\nrnak = 8\n", &[]).unwrap_err();
        assert!(
            error.starts_with("recipe `r.toml`: line 6: unknown field `rnak`, expected one of `rank`"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_table_and_a_wrong_type_have_lines_too() {
        assert!(parse("name = \"x\"\n", &[]).unwrap_err().contains("missing field `model`"));
        let error = parse("name = \"x\"\n[model]\nbase = 3\n", &[]).unwrap_err();
        assert!(error.contains("line 3") && error.contains("string"), "{error}");
        assert!(parse("name = \"x\n", &[]).unwrap_err().contains("line 1"));
    }

    #[test]
    fn overrides_lie_over_the_text_and_may_add_tables() {
        let recipe = parse(
            SMALL,
            &["lora.rank=16", "train.lr=1e-4", "model.base=a/b", "data.sources.dolly.path=d.jsonl"],
        )
        .unwrap();
        assert_eq!(recipe.lora.rank, 16);
        assert_eq!(recipe.train.lr, 1e-4);
        assert_eq!(recipe.model.base, "a/b");
        assert_eq!(recipe.data.sources.dolly.unwrap().path, crate::recipe::Paths::from("d.jsonl"));
    }

    #[test]
    fn the_wrong_override_is_named() {
        let error = parse(SMALL, &["lora.rank=16", "lora.rnak=8"]).unwrap_err();
        assert!(error.starts_with("override `--set lora.rnak`: unknown field"), "{error}");
        assert!(parse(SMALL, &["lora.rank.x=8"]).unwrap_err().contains("`rank` is a value, not a table"));
        assert!("lora.rank".parse::<Override>().is_err());
        assert!("=3".parse::<Override>().is_err());
    }

    #[test]
    fn an_override_gives_what_the_text_lacks() {
        let bare = "name = \"x\"\n[lora]\nrank = 8\n";
        assert_eq!(parse(bare, &["model.base=b"]).unwrap().model.base, "b");
        assert_eq!(parse("", &["model.base=b", "name=y"]).unwrap().name, "y");
        let both = ["data.sources.spider.tables=t.json", "data.sources.spider.path=s.json"];
        assert_eq!(parse(SMALL, &both).unwrap().data.sources.spider.unwrap().tables, PathBuf::from("t.json"));
        assert!(parse("[lora]\nrank = \"four\"\n", &["name=x", "model.base=b", "lora.rank=4"]).is_ok());
    }

    #[test]
    fn what_stays_wrong_is_told_of_text_or_override() {
        let error = parse("[model]\nbase = \"b\"\n", &["lora.rank=4"]).unwrap_err();
        assert_eq!(error, "recipe `r.toml`: line 1: missing field `name`");
        let error = parse("\n", &["name=x"]).unwrap_err();
        assert!(
            error.starts_with("recipe `r.toml`: line") && error.ends_with("missing field `model`"),
            "{error}"
        );
        let error = parse("name = \"x\"\n[lora]\nrnak = 8\n", &["model.base=b"]).unwrap_err();
        assert!(error.starts_with("recipe `r.toml`: line 3: unknown field `rnak`"), "{error}");
        let error = parse("name = \"x\"\n", &["model.base=b", "train.rate=1"]).unwrap_err();
        assert!(error.starts_with("override `--set train.rate`: unknown field `rate`"), "{error}");
        let error = parse(SMALL, &["data.sources.spider.path=s.json"]).unwrap_err();
        assert_eq!(error, "override `--set data.sources.spider.path`: missing field `tables`");
        let error = parse(SMALL, &["lora.rank=a", "lora.rank=a"]).unwrap_err();
        assert!(error.contains("lora.rank"), "{error}");
    }

    #[test]
    fn a_missing_recipe_is_told_with_the_next_step() {
        let error = Recipe::load(Path::new("/no/such.toml"), &[]).unwrap_err();
        let text = crate::error::render(&error);
        assert!(text.starts_with("error: cannot read recipe `/no/such.toml`\n"), "{text}");
        assert!(text.contains("hint: name a recipe that is there"), "{text}");
    }

    #[test]
    fn values_outside_their_range_are_told_with_both() {
        for (setting, expected) in [
            ("lora.dropout=1.0", "`lora.dropout` is 1, expected a number in [0, 1)"),
            (
                "lora.dropout=0.99999",
                "`lora.dropout` is 0.99999, expected a number in [0, 1) that does not round to 1",
            ),
            ("name=../up", "`name` is `../up`, expected letters"),
            ("train.lr=-1.0", "`train.lr` is -1, expected a number above 0"),
            ("train.accumulation=0", "`train.accumulation` is 0, expected 1 to 65536"),
        ] {
            let error = parse(SMALL, &[setting]).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
