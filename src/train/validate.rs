//! Validation: the loss on held-out rows, per source.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::data::store::PackedRow;
use crate::model::batch::Batch;
use crate::model::decoder::{Decoder, Loss};
use crate::progress;

/// A loss over some tokens.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct MeanLoss {
    /// Mean over supervised tokens, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Supervised tokens.
    pub tokens: i64,
}

impl MeanLoss {
    fn new(sum: f64, tokens: i64) -> Self {
        let loss = sum / tokens as f64;
        // JSON has no infinity: a line of `metrics.jsonl` with one could not be read again.
        Self { loss, perplexity: loss.exp().min(f64::MAX), tokens }
    }
}

/// The losses of a validation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Over all supervised tokens.
    #[serde(flatten)]
    pub all: MeanLoss,
    /// By source, in the sources' order of name.
    pub sources: BTreeMap<String, MeanLoss>,
}

/// Measures `rows`, row by row; `None` when they hold no supervised token.
///
/// # Errors
/// When a row does not fit the model.
pub fn validate(decoder: &Decoder, rows: &[PackedRow], names: &[&str]) -> Result<Option<Validation>> {
    let mut sums: BTreeMap<String, (f64, i64)> = BTreeMap::new();
    let bar = progress::bar(rows.len() as u64, "validate", "rows");
    for row in rows {
        let batch = Batch::pack(&row.sequences, decoder.device());
        add_up(&mut sums, &batch, &decoder.loss(&batch)?, names);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let (sum, tokens) = sums.values().fold((0.0, 0), |(sum, tokens), one| (sum + one.0, tokens + one.1));
    Ok((tokens > 0).then(|| Validation {
        all: MeanLoss::new(sum, tokens),
        sources: sums.into_iter().map(|(name, (sum, tokens))| (name, MeanLoss::new(sum, tokens))).collect(),
    }))
}

fn add_up(sums: &mut BTreeMap<String, (f64, i64)>, batch: &Batch, loss: &Loss, names: &[&str]) {
    for (index, source) in batch.sources.iter().enumerate() {
        if loss.supervised[index] > 0 {
            let name = names.get(usize::from(*source)).copied().unwrap_or("unknown");
            let sum = sums.entry(name.to_string()).or_default();
            sum.0 += loss.per_sequence[index];
            sum.1 += loss.supervised[index];
        }
    }
}
