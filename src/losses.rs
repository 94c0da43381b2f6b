//! Loss and perplexity of a decoder on packed rows, per source and over all: validation, `eval` and `merge`.

pub mod divergence;

use std::collections::BTreeMap;

use anyhow::Result;
use serde::Serialize;

use crate::data::store::PackedRow;
use crate::model::batch::Batch;
use crate::model::decoder::{Decoder, Loss};
use crate::progress;

/// Losses of a model on a dataset's rows; only supervised tokens count.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LossReport {
    /// Packed rows that were measured.
    pub rows: usize,
    /// All of them together: the mean over tokens, not over sources.
    pub overall: LossOf,
    /// Per source, in the order of the dataset's list; a source without a row is left out.
    pub sources: Vec<LossOf>,
}

/// The loss of a part.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LossOf {
    /// Name of the source, or `all`.
    pub name: String,
    /// Mean loss of a supervised token, in nats.
    pub loss: f64,
    /// `exp(loss)`, at most `f64::MAX`: JSON has no infinity, and a file with one could not be read again.
    pub perplexity: f64,
    /// Supervised tokens.
    pub tokens: i64,
    /// Sequences.
    pub sequences: usize,
}

#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    nats: f64,
    tokens: i64,
    sequences: usize,
}

impl Tally {
    fn add(&mut self, nats: f64, tokens: i64) {
        self.nats += nats;
        self.tokens += tokens;
        self.sequences += 1;
    }

    fn told(self, name: &str) -> LossOf {
        let loss = self.nats / self.tokens as f64;
        let Self { tokens, sequences, .. } = self;
        LossOf { name: name.to_string(), loss, perplexity: loss.exp().min(f64::MAX), tokens, sequences }
    }
}

/// Measures `rows` one after the other; `names` are the dataset's sources. `None` when no token is supervised.
///
/// # Errors
/// When a row does not fit the model.
pub fn measure(decoder: &Decoder, rows: &[PackedRow], names: &[&str]) -> Result<Option<LossReport>> {
    let bar = progress::bar(rows.len() as u64, "losses", "rows");
    let mut sources: BTreeMap<u16, Tally> = BTreeMap::new();
    for row in rows {
        let batch = Batch::pack(&row.sequences, decoder.device());
        let Loss { per_sequence, supervised } = decoder.loss(&batch)?;
        for ((source, nats), tokens) in batch.sources.iter().zip(per_sequence).zip(supervised) {
            sources.entry(*source).or_default().add(nats, tokens);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(told(rows.len(), &sources, names))
}

fn told(rows: usize, sources: &BTreeMap<u16, Tally>, names: &[&str]) -> Option<LossReport> {
    let mut all = Tally::default();
    for tally in sources.values() {
        all.nats += tally.nats;
        all.tokens += tally.tokens;
        all.sequences += tally.sequences;
    }
    let name = |source: u16| names.get(usize::from(source)).copied().unwrap_or("unknown");
    let supervised = sources.iter().filter(|(_, tally)| tally.tokens > 0);
    let sources = supervised.map(|(source, tally)| tally.told(name(*source))).collect();
    (all.tokens > 0).then(|| LossReport { rows, overall: all.told("all"), sources })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]
mod tests {
    use super::*;

    #[test]
    fn sources_sum_to_the_whole() {
        let tally = |nats, tokens| Tally { nats, tokens, sequences: 2 };
        let sources = BTreeMap::from([(0, tally(3.0, 6)), (2, tally(5.0, 2)), (3, tally(0.0, 0))]);
        let report = told(4, &sources, &["a", "b", "c", "d"]).unwrap();
        let names: Vec<&str> = report.sources.iter().map(|source| source.name.as_str()).collect();
        assert_eq!(names, ["a", "c"]);
        assert_eq!((report.overall.loss, report.overall.tokens, report.overall.sequences), (1.0, 8, 6));
        let nats: f64 = report.sources.iter().map(|source| source.loss * source.tokens as f64).sum();
        assert_eq!(nats, 8.0);
        assert!((report.sources[1].perplexity - 2.5f64.exp()).abs() < 1e-12);
    }

    #[test]
    fn a_perplexity_beyond_all_numbers_is_still_json() {
        let sources = BTreeMap::from([(0, Tally { nats: 2000.0, tokens: 2, sequences: 1 })]);
        let overall = told(1, &sources, &["a"]).unwrap().overall;
        assert_eq!((overall.loss, overall.perplexity), (1000.0, f64::MAX));
        let json = serde_json::to_value(&overall).unwrap();
        assert_eq!(json["perplexity"].as_f64(), Some(f64::MAX));
    }

    #[test]
    fn without_a_supervised_token_there_is_no_loss() {
        assert_eq!(told(1, &BTreeMap::new(), &[]), None);
        assert_eq!(told(1, &BTreeMap::from([(0, Tally::default())]), &["a"]), None);
    }
}
