//! How far one model's predictions lie from another's, on the supervised tokens of packed rows.
//!
//! The Kullback–Leibler divergence of a position is `Σ p · (ln p − ln q)` over the vocabulary, in nats: `p` is the
//! reference's distribution, `q` the other's. Sums are in f64: the divergence of a good merge is far below what sums
//! over a vocabulary in f32 can tell.
//!
//! Two models need not be in memory together: of the reference its head and what goes into the head are kept.

use anyhow::{Result, ensure};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::data::store::PackedRow;
use crate::model::batch::Batch;
use crate::model::decoder::Decoder;
use crate::progress;

/// Positions whose logits are in memory at once: of 49,155 words in f64, for two models, 100 MB.
const CHUNK: i64 = 128;

/// A model's predictions on rows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Divergence {
    /// Supervised tokens.
    pub tokens: i64,
    /// Mean loss of a supervised token, in nats.
    pub loss: f64,
    /// Mean divergence of the reference from this model, in nats a token.
    pub kl_mean: f64,
    /// What 99 of 100 tokens stay within.
    pub kl_p99: f64,
    /// The largest.
    pub kl_max: f64,
    /// Tokens whose most likely word is another than the reference's.
    pub flipped: i64,
    /// Their share.
    pub flipped_share: f64,
    /// The parts of each row with a supervised token: intervals need them.
    #[serde(skip)]
    pub rows: Vec<RowParts>,
}

/// What a row adds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowParts {
    /// Supervised tokens.
    pub tokens: f64,
    /// Sum of their losses, in nats.
    pub nats: f64,
    /// Sum of their divergences, in nats.
    pub divergence: f64,
    /// How many are flipped.
    pub flipped: f64,
}

/// What the reference predicts on some rows.
pub struct Reference {
    rows: Vec<Seen>,
    /// Logits `[positions, vocab]` of `[positions, hidden]`.
    head: Box<dyn Fn(&Tensor) -> Tensor>,
}

struct Seen {
    /// `[supervised, hidden]`.
    hidden: Tensor,
    /// `[supervised]` i64.
    labels: Tensor,
}

impl std::fmt::Debug for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reference").field("rows", &self.rows.len()).finish_non_exhaustive()
    }
}

impl Reference {
    /// Takes what `decoder` predicts on `rows`; of the decoder its head stays in memory.
    ///
    /// # Errors
    /// When a row does not fit the model.
    pub fn take(decoder: &Decoder, rows: &[PackedRow]) -> Result<Self> {
        let seen = rows.iter().map(|row| Seen::of(decoder, row)).collect::<Result<_>>()?;
        Ok(Self { rows: seen, head: Box::new(decoder.head_of()) })
    }

    /// Compares `decoder` on the same rows; `None` when no token is supervised.
    ///
    /// # Errors
    /// When a row does not fit the model, or its vocabulary is another.
    pub fn compare(&self, decoder: &Decoder, rows: &[PackedRow]) -> Result<Option<Divergence>> {
        ensure!(rows.len() == self.rows.len(), "{} rows, the reference has {}", rows.len(), self.rows.len());
        let bar = progress::bar(rows.len() as u64, "compare", "rows");
        let mut tally = Tally::default();
        for (row, seen) in rows.iter().zip(&self.rows) {
            let mut of_row = Tally::default();
            self.add_row(&mut of_row, seen, decoder, row)?;
            tally.join(of_row);
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(tally.told())
    }

    fn add_row(&self, tally: &mut Tally, seen: &Seen, decoder: &Decoder, row: &PackedRow) -> Result<()> {
        let ours = Seen::of(decoder, row)?;
        let supervised = seen.labels.numel() as i64;
        for start in (0..supervised).step_by(CHUNK as usize) {
            let count = CHUNK.min(supervised - start);
            let part = |tensor: &Tensor| tensor.narrow(0, start, count);
            let reference = (self.head)(&part(&seen.hidden));
            let other = decoder.head_logits(&part(&ours.hidden));
            ensure!(
                reference.size() == other.size(),
                "logits have shape {:?}, the reference's {:?}",
                other.size(),
                reference.size()
            );
            tally.add(&reference, &other, &part(&seen.labels))?;
        }
        Ok(())
    }
}

impl Seen {
    fn of(decoder: &Decoder, row: &PackedRow) -> Result<Self> {
        let batch = Batch::pack(&row.sequences, decoder.device());
        let labels = batch.labels.index_select(0, &batch.rows);
        Ok(Self { hidden: decoder.supervised_hidden(&batch)?, labels })
    }
}

/// Per token.
#[derive(Debug, Default)]
struct Tally {
    divergences: Vec<f64>,
    nats: f64,
    flipped: i64,
    rows: Vec<RowParts>,
}

impl Tally {
    /// Takes what was counted of a row.
    fn join(&mut self, row: Self) {
        if row.divergences.is_empty() {
            return;
        }
        self.rows.push(RowParts {
            tokens: row.divergences.len() as f64,
            nats: row.nats,
            divergence: row.divergences.iter().sum(),
            flipped: row.flipped as f64,
        });
        self.nats += row.nats;
        self.flipped += row.flipped;
        self.divergences.extend(row.divergences);
    }

    /// `reference` and `other` are logits `[positions, vocab]`, `labels` `[positions]` i64.
    fn add(&mut self, reference: &Tensor, other: &Tensor, labels: &Tensor) -> Result<()> {
        let differs = reference.argmax(-1, false).ne_tensor(&other.argmax(-1, false));
        self.flipped += differs.sum(Kind::Int64).int64_value(&[]);
        let ln_p = reference.log_softmax(-1, Kind::Double); // [positions, vocab]
        let ln_q = other.log_softmax(-1, Kind::Double);
        self.nats -= ln_q.gather(1, &labels.unsqueeze(1), false).sum(Kind::Double).double_value(&[]);
        let p = ln_p.exp();
        let terms = &p * (ln_p - ln_q);
        // A word that both exclude adds nothing, not 0 · (−∞ + ∞).
        let terms = terms.where_self(&p.ne(0.0), &Tensor::zeros([1], (Kind::Double, p.device())));
        let divergences = terms.sum_dim_intlist(-1, false, Kind::Double).to_device(Device::Cpu);
        self.divergences.extend(Vec::<f64>::try_from(divergences)?);
        Ok(())
    }

    fn told(mut self) -> Option<Divergence> {
        // What is no number comes last: it is then the largest, and cannot pass for a small one.
        self.divergences.sort_by(f64::total_cmp);
        let tokens = self.divergences.len();
        let kl_max = *self.divergences.last()?;
        let rank = (tokens * 99).div_ceil(100).saturating_sub(1);
        Some(Divergence {
            tokens: tokens as i64,
            loss: self.nats / tokens as f64,
            kl_mean: self.divergences.iter().sum::<f64>() / tokens as f64,
            kl_p99: self.divergences.get(rank).copied().unwrap_or(kl_max),
            kl_max,
            flipped: self.flipped,
            flipped_share: self.flipped as f64 / tokens as f64,
            rows: self.rows,
        })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]
mod tests {
    use super::*;

    fn tally(reference: &[f32], other: &[f32], words: i64) -> Tally {
        let mut tally = Tally::default();
        let logits = |values: &[f32]| Tensor::from_slice(values).view([-1, words]);
        let labels = Tensor::zeros([reference.len() as i64 / words], (Kind::Int64, Device::Cpu));
        tally.add(&logits(reference), &logits(other), &labels).unwrap();
        tally
    }

    #[test]
    fn the_divergence_of_two_coins() {
        // p = (1/2, 1/2), q = (3/4, 1/4): KL = ½ ln(2/3) + ½ ln 2 = ½ ln(4/3).
        let told = tally(&[0.0, 0.0], &[3f32.ln(), 0.0], 2).told().unwrap();
        assert!((told.kl_mean - 0.5 * (4f64 / 3.0).ln()).abs() < 1e-7, "{told:?}");
        assert!((told.loss + 0.75f64.ln()).abs() < 1e-7);
        assert_eq!((told.tokens, told.flipped), (1, 0));
    }

    #[test]
    fn equal_models_do_not_diverge_and_turned_ones_flip() {
        let told = tally(&[1.0, 2.0, 0.5, 0.25], &[1.0, 2.0, 0.5, 0.25], 2).told().unwrap();
        assert_eq!((told.kl_max, told.flipped_share), (0.0, 0.0));
        let told = tally(&[1.0, 2.0, 0.5, 0.25], &[2.0, 1.0, 0.5, 0.25], 2).told().unwrap();
        assert_eq!((told.flipped, told.flipped_share), (1, 0.5));
        assert!(told.kl_max > 0.0 && (told.kl_mean - told.kl_max / 2.0).abs() < 1e-15);
    }

    #[test]
    fn rows_are_kept_apart_and_summed_up() {
        let mut whole = Tally::default();
        whole.join(tally(&[0.0, 0.0, 0.0, 0.0], &[3f32.ln(), 0.0, 0.0, 0.0], 2));
        // A row in which nothing is supervised.
        whole.join(Tally::default());
        whole.join(tally(&[1.0, 0.0], &[0.0, 1.0], 2));
        let told = whole.told().unwrap();
        assert_eq!((told.tokens, told.flipped, told.rows.len()), (3, 1, 2));
        let sum = |of: fn(&RowParts) -> f64| told.rows.iter().map(of).sum::<f64>() / 3.0;
        assert_eq!((sum(|row| row.tokens), sum(|row| row.flipped)), (1.0, told.flipped_share));
        assert!((sum(|row| row.nats) - told.loss).abs() < 1e-12);
        assert!((sum(|row| row.divergence) - told.kl_mean).abs() < 1e-12);
    }

    #[test]
    fn what_is_no_number_is_not_hidden() {
        let told = tally(&[1.0, 2.0, 1.0, 2.0], &[f32::NAN, 1.0, 1.0, 2.0], 2).told().unwrap();
        assert!(told.kl_max.is_nan() && told.kl_mean.is_nan() && told.loss.is_nan(), "{told:?}");
        let excluded = f32::NEG_INFINITY;
        let told = tally(&[1.0, excluded], &[2.0, excluded], 2).told().unwrap();
        assert_eq!(told.kl_max, 0.0);
    }

    #[test]
    fn the_99th_of_100_is_not_the_largest() {
        let mut tally = Tally { divergences: (0..100).map(f64::from).collect(), ..Tally::default() };
        tally.divergences.reverse();
        let told = tally.told().unwrap();
        assert_eq!((told.kl_p99, told.kl_max), (98.0, 99.0));
        assert_eq!(Tally::default().told(), None);
    }
}
