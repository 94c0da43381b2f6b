//! Losses of a model on held-out rows, sequence by sequence: intervals need the parts of a mean.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::results::Results;
use crate::data::store::PackedRow;
use crate::model::batch::Batch;
use crate::model::decoder::{Decoder, Loss};
use crate::progress;

/// The losses of a packed row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RowLosses {
    /// The row, counted from 0.
    pub row: usize,
    /// Its sequences.
    pub sequences: Vec<SequenceLoss>,
}

/// The loss of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SequenceLoss {
    /// Index into the dataset's sources.
    pub source: u16,
    /// Sum over its supervised tokens, in nats.
    pub nats: f64,
    /// Its supervised tokens.
    pub tokens: i64,
}

/// Measures the rows that are not among the results yet.
///
/// # Errors
/// When a row does not fit the model, a loss is no number, or a result cannot be written.
pub fn measure(decoder: &Decoder, rows: &[PackedRow], results: &mut Results<RowLosses>) -> Result<()> {
    let done = results.all().len();
    let bar = progress::bar(rows.len() as u64, "losses", "rows");
    bar.inc(done.min(rows.len()) as u64);
    for (row, packed) in rows.iter().enumerate().skip(done) {
        let batch = Batch::pack(&packed.sequences, decoder.device());
        let Loss { per_sequence, supervised } = decoder.loss(&batch)?;
        let parts = batch.sources.iter().zip(per_sequence).zip(supervised);
        let sequences: Vec<SequenceLoss> =
            parts.map(|((source, nats), tokens)| SequenceLoss { source: *source, nats, tokens }).collect();
        if sequences.iter().any(|one| !one.nats.is_finite()) {
            bail!("the loss of validation row {row} is no number");
        }
        results.push(RowLosses { row, sequences })?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}
