//! What was merged and what came of it: `merge_report.json` and `merge_report.html`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;

use super::page;
use crate::checkpoint::form::Form;
use crate::checkpoint::merge::{Step, UpdateSize};
use crate::eval::statistics::{self, Interval};
use crate::losses::divergence::{Divergence, RowParts};
use crate::output;
use crate::progress::note;

/// Version of the JSON; 2 has several forms and their divergence.
pub const FORMAT_VERSION: u32 = 2;

/// The report's file name, by which a merged folder is known.
pub const JSON: &str = "merge_report.json";
/// The page's file name.
pub const PAGE: &str = "merge_report.html";

/// The whole report.
#[derive(Debug, Serialize)]
pub struct MergeReport {
    pub format_version: u32,
    pub program: String,
    pub recipe: String,
    pub base: String,
    pub base_hash: String,
    pub adapter: PathBuf,
    pub rank: usize,
    pub scale: f64,
    /// `dequantized` or `original`.
    pub merged_onto: &'static str,
    pub forms: Vec<FormReport>,
    /// Absent where the dataset is not there or is another model's.
    pub measured: Option<Measured>,
    pub limits: Limits,
    /// What is beyond a limit, in words; nothing is merged then.
    pub beyond: Vec<String>,
}

/// One form.
#[derive(Debug, Serialize)]
pub struct FormReport {
    pub form: Form,
    pub folder: PathBuf,
    /// Of the weights.
    pub bytes: u64,
    pub updates: Vec<UpdateSize>,
    pub matrices: Vec<Step>,
}

/// Models on the same held-out rows.
#[derive(Debug, Serialize)]
pub struct Measured {
    pub rows: usize,
    /// The dtype of activations, `f32` or `bf16`. In bf16 a form's weights are rounded to it before they are used, so that
    /// `fp32` cannot be told from `bf16`, and what rounding activations does is part of every divergence.
    pub computed_in: &'static str,
    /// Base, base + adapter, then the forms; divergences are from base + adapter.
    pub models: Vec<Model>,
}

/// One of them.
#[derive(Debug, Serialize)]
pub struct Model {
    pub name: String,
    #[serde(flatten)]
    pub divergence: Divergence,
    pub intervals: Intervals,
}

/// What resamples of the rows give; absent where a figure is no number.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Intervals {
    pub loss: Option<Interval>,
    pub kl_mean: Option<Interval>,
    pub flipped_share: Option<Interval>,
}

impl Intervals {
    fn of(rows: &[RowParts], seed: u64) -> Self {
        let ratio = |part: fn(&RowParts) -> f64| {
            let parts: Vec<(f64, f64)> = rows.iter().map(|row| (part(row), row.tokens)).collect();
            statistics::ratio(&parts, seed).filter(|found| found.estimate.is_finite())
        };
        Self {
            loss: ratio(|row| row.nats),
            kl_mean: ratio(|row| row.divergence),
            flipped_share: ratio(|row| row.flipped),
        }
    }
}

impl Model {
    /// A model under a name; `seed` chooses the resamples of its intervals.
    pub fn new(name: &str, divergence: Divergence, seed: u64) -> Self {
        let intervals = Intervals::of(&divergence.rows, seed);
        Self { name: name.to_string(), divergence, intervals }
    }

    /// Whether the others' divergence is from this one.
    pub fn is_reference(&self) -> bool {
        self.name == REFERENCE
    }
}

/// What was trained, as the others are measured from it.
pub const REFERENCE: &str = "base + adapter";

/// The first two models are what the forms are measured beside.
const YARDSTICKS: usize = 2;

/// How far a form may lie from base and adapter.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Limits {
    /// Mean divergence, in nats a token.
    pub kl: Option<f64>,
    /// Share of tokens whose most likely word is another.
    pub flips: Option<f64>,
}

impl Limits {
    /// Whether there is one.
    pub fn any(&self) -> bool {
        self.kl.is_some() || self.flips.is_some()
    }

    /// What is beyond a limit, or is no number.
    pub fn beyond(&self, models: &[Model]) -> Vec<String> {
        let mut beyond = Vec::new();
        for Model { name, divergence, .. } in models.iter().skip(YARDSTICKS) {
            let found = [
                ("mean KL divergence", "--max-kl", divergence.kl_mean, self.kl),
                ("share of flipped words", "--max-flips", divergence.flipped_share, self.flips),
            ];
            for (what, flag, value, limit) in found {
                let Some(limit) = limit else { continue };
                // Written so that no number at all is beyond too.
                let within = value <= limit;
                if !within {
                    beyond.push(format!("{what} of {name} is {value:.3e}, `{flag}` is {limit:.3e}"));
                }
            }
        }
        beyond
    }
}

impl MergeReport {
    /// As it is written.
    pub fn json(&self) -> Result<String> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        Ok(text)
    }

    /// Writes JSON and page into a folder.
    pub fn write(&self, folder: &Path) -> Result<()> {
        output::write_file(&folder.join(JSON), self.json()?.as_bytes())?;
        output::write_file(&folder.join(PAGE), page::of(self).as_bytes())
    }

    /// Tells the figures that decide.
    pub fn tell(&self) {
        for FormReport { form, bytes, updates, .. } in &self.forms {
            note(format!("{} ({:.1} MB)", form.name(), *bytes as f64 / 1e6));
            for UpdateSize { projection, mean, max, layer_of_max, rounding } in updates {
                note(format!(
                    "  {projection:<10} moved by {mean:.2e} of its size (most in layer {layer_of_max}: {max:.2e}), rounding {rounding:.2e}"
                ));
            }
        }
        let Some(Measured { rows, computed_in, models }) = &self.measured else { return };
        let tokens = models.first().map_or(0, |model| model.divergence.tokens);
        note(format!("on {rows} held-out rows, {tokens} tokens, computed in {computed_in}:"));
        for Model { name, divergence, .. } in models {
            let Divergence { loss, kl_mean, kl_p99, kl_max, flipped_share, .. } = divergence;
            note(format!(
                "  {name:<15} loss {loss:.4}  KL mean {kl_mean:.2e}, p99 {kl_p99:.2e}, max {kl_max:.2e}  flipped {:.2} %",
                flipped_share * 100.0
            ));
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]
mod tests {
    use super::*;

    fn model(name: &str, kl_mean: f64, flipped_share: f64) -> Model {
        let divergence = Divergence {
            tokens: 100,
            loss: 1.0,
            kl_mean,
            kl_p99: kl_mean,
            kl_max: kl_mean,
            flipped: 0,
            flipped_share,
            rows: Vec::new(),
        };
        Model::new(name, divergence, 1)
    }

    #[test]
    fn intervals_are_of_rows_and_none_is_of_what_is_no_number() {
        let row = |nats, divergence| RowParts { tokens: 2.0, nats, divergence, flipped: 1.0 };
        let found = Intervals::of(&[row(2.0, 0.1), row(6.0, f64::NAN), row(4.0, 0.1)], 3);
        let loss = found.loss.unwrap();
        assert_eq!((loss.estimate, loss.low, loss.high), (2.0, 1.0, 3.0));
        assert_eq!(found.flipped_share.unwrap(), Interval { estimate: 0.5, low: 0.5, high: 0.5 });
        assert_eq!(found.kl_mean, None);
        assert_eq!(Intervals::of(&[], 3).loss, None);
    }

    #[test]
    fn limits_hold_for_the_forms_alone_and_for_what_is_no_number() {
        let models = [
            model("base", 9.0, 0.9),
            model("base + adapter", 0.0, 0.0),
            model("bf16", 1e-5, 0.01),
            model("nf4", 0.02, 0.3),
            model("fp16", f64::NAN, 0.0),
        ];
        let limits = |kl, flips| Limits { kl, flips }.beyond(&models);
        assert_eq!(limits(None, None), Vec::<String>::new());
        assert_eq!(
            limits(Some(0.02), Some(0.1)),
            [
                "share of flipped words of nf4 is 3.000e-1, `--max-flips` is 1.000e-1",
                "mean KL divergence of fp16 is NaN, `--max-kl` is 2.000e-2"
            ]
        );
    }
}
