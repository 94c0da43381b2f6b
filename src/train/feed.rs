//! Batches made ahead of the training, on a thread of their own: between two steps nothing is packed or copied.

use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;

use anyhow::{Context as _, Result};
use tch::Device;

use super::plan::Plan;
use crate::data::store::PackedRow;
use crate::model::batch::Batch;

/// Steps whose batches are ready at most, beside the one that is computed: what takes longest to pack is shorter than
/// any step.
const AHEAD: usize = 2;

/// The batches of a step.
pub(super) struct Fed {
    /// The micro-batches as row numbers.
    pub(super) rows: Vec<Vec<usize>>,
    /// The micro-batches on the device.
    pub(super) batches: Vec<Batch>,
}

/// Batches of one step after the other.
pub(super) struct Feed(Receiver<Fed>);

impl Feed {
    /// Begins to make the batches of `steps` (from 0); the thread ends with them, or when the feed is dropped.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(super) fn spawn<'scope>(
        scope: &'scope Scope<'scope, '_>,
        plan: &'scope Plan,
        steps: Range<u64>,
        device: Device,
    ) -> Result<Self> {
        let (sender, receiver) = sync_channel(AHEAD);
        let make = move || {
            for step in steps {
                let rows = plan.order.step(step);
                let batches = rows.iter().map(|rows| pack(plan, rows, device)).collect();
                if sender.send(Fed { rows, batches }).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("batches".to_string()).spawn_scoped(scope, make);
        thread.context("cannot start the thread that packs batches")?;
        Ok(Self(receiver))
    }

    /// The batches of the next step.
    ///
    /// # Errors
    /// When the thread failed.
    pub(super) fn next(&self) -> Result<Fed> {
        self.0.recv().context("the thread that packs batches ended")
    }
}

/// Rows of the training split as a batch.
fn pack(plan: &Plan, rows: &[usize], device: Device) -> Batch {
    Batch::pack(rows.iter().flat_map(|row| &plan.train[*row].sequences), device)
}

/// The largest micro-batch of the training, and the largest row of the validation: what needs most memory.
pub(super) fn largest(plan: &Plan, device: Device) -> [Batch; 2] {
    let by_size = |rows: &[PackedRow]| {
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|row| std::cmp::Reverse((rows[*row].tokens(), rows[*row].sequences.len(), *row)));
        order
    };
    let mut train = by_size(&plan.train);
    train.truncate(plan.recipe.train.rows_per_microbatch);
    let validation = by_size(&plan.validation);
    let held_out = validation.iter().take(1).flat_map(|row| &plan.validation[*row].sequences);
    [pack(plan, &train, device), Batch::pack(held_out, device)]
}
