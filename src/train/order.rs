//! Which rows an optimiser step sees: a function of seed and step, so that resuming needs no state.

use sha2::{Digest as _, Sha256};

use crate::recipe::TrainSpec;

/// The order of a whole training.
#[derive(Debug, Clone)]
pub struct RowOrder {
    rows: usize,
    rows_per_microbatch: usize,
    rows_per_step: usize,
    seed: u64,
}

impl RowOrder {
    /// The order over `rows` rows, of which there is at least one.
    pub fn new(rows: usize, spec: &TrainSpec) -> Self {
        let rows_per_step = spec.rows_per_microbatch.saturating_mul(spec.accumulation);
        Self { rows, rows_per_microbatch: spec.rows_per_microbatch, rows_per_step, seed: spec.seed }
    }

    /// Optimiser steps of one epoch; the last takes the rows left.
    pub fn steps_per_epoch(&self) -> u64 {
        self.rows.div_ceil(self.rows_per_step) as u64
    }

    /// The micro-batches of a step (from 0), as row numbers.
    pub fn step(&self, step: u64) -> Vec<Vec<usize>> {
        let (epoch, within) = (step / self.steps_per_epoch(), (step % self.steps_per_epoch()) as usize);
        let order = self.epoch(epoch);
        let start = within * self.rows_per_step;
        let end = (start + self.rows_per_step).min(self.rows);
        order[start..end].chunks(self.rows_per_microbatch).map(<[usize]>::to_vec).collect()
    }

    /// Rows sorted by a keyed hash: a permutation that depends on nothing but seed and epoch.
    fn epoch(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.rows).collect();
        order.sort_by_cached_key(|row| self.key(epoch, *row));
        order
    }

    fn key(&self, epoch: u64, row: usize) -> [u8; 32] {
        let mut hash = Sha256::new();
        for number in [self.seed, epoch, row as u64] {
            hash.update(number.to_le_bytes());
        }
        hash.finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::RowOrder;
    use crate::recipe::TrainSpec;

    fn order(seed: u64) -> RowOrder {
        RowOrder::new(
            11,
            &TrainSpec { rows_per_microbatch: 2, accumulation: 2, seed, ..TrainSpec::default() },
        )
    }

    #[test]
    fn an_epoch_sees_every_row_once_and_ends_with_the_rows_left() {
        let order = order(1);
        assert_eq!(order.steps_per_epoch(), 3);
        for epoch in 0..3 {
            let steps: Vec<Vec<Vec<usize>>> = (0..3).map(|step| order.step(epoch * 3 + step)).collect();
            assert_eq!(steps[2].iter().map(Vec::len).collect::<Vec<_>>(), [2, 1]);
            let mut seen: Vec<usize> = steps.into_iter().flatten().flatten().collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..11).collect::<Vec<_>>());
        }
    }

    #[test]
    fn epochs_and_seeds_differ() {
        assert_ne!(order(1).step(0), order(1).step(3));
        assert_ne!(order(1).step(0), order(2).step(0));
        assert_eq!(order(1).step(4), order(1).step(4));
    }
}
