//! Checkpoints beside the training: a step is copied to the host, and a thread writes it while the next are computed.

use std::thread::{Scope, ScopedJoinHandle};

use anyhow::{Context as _, Result, anyhow};
use tch::Device;

use crate::checkpoint::run::{RunFolder, State};
use crate::checkpoint::tensor_file::NamedTensors;
use crate::kernels::bridge;
use crate::model::params::ParamSet;
use crate::recipe::LoraSpec;

/// What a checkpoint is made of, on the host.
#[derive(Debug)]
pub(super) struct Snapshot {
    adapters: ParamSet,
    moments: NamedTensors,
}

impl Snapshot {
    /// Room for copies of these. A GPU copies into it directly.
    fn like(adapters: &ParamSet, moments: &NamedTensors) -> Result<Self> {
        let device = adapters.flat().device();
        let room = |tensor: &tch::Tensor| match device {
            Device::Cuda(_) => {
                bridge::pinned(&tensor.size(), tensor.kind()).context("cannot pin host memory")
            }
            _ => Ok(tensor.f_empty_like()?),
        };
        let moments = moments.iter().map(|(name, tensor)| Ok((name.clone(), room(tensor)?)));
        Ok(Self { adapters: adapters.over(room(adapters.flat())?), moments: moments.collect::<Result<_>>()? })
    }

    fn copy(&mut self, adapters: &ParamSet, moments: &NamedTensors) -> Result<()> {
        self.adapters.flat().shallow_clone().f_copy_(adapters.flat())?;
        for (name, tensor) in moments {
            let room = self.moments.get_mut(name).with_context(|| format!("no room for `{name}`"))?;
            room.f_copy_(tensor)?;
        }
        Ok(())
    }
}

/// What stays of a run's checkpoints.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keep {
    /// The newest.
    pub(super) last: usize,
    /// The step of the best, which stays too.
    pub(super) best: Option<u64>,
}

/// Writes checkpoints one after the other.
pub(super) struct Saver<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    folder: RunFolder,
    lora: LoraSpec,
    base: String,
    /// The snapshot that is not being written.
    spare: Option<Snapshot>,
    underway: Option<Underway<'scope>>,
    /// The step of the newest whole checkpoint.
    newest: Option<u64>,
}

/// A checkpoint on its way to disk.
struct Underway<'scope> {
    step: u64,
    thread: ScopedJoinHandle<'scope, (Snapshot, Result<()>)>,
}

impl<'scope, 'env> Saver<'scope, 'env> {
    /// A saver for a run without a checkpoint.
    pub(super) fn new(
        scope: &'scope Scope<'scope, 'env>,
        folder: RunFolder,
        lora: LoraSpec,
        base: String,
    ) -> Self {
        Self { scope, folder, lora, base, spare: None, underway: None, newest: None }
    }

    /// The run has a checkpoint of this step.
    pub(super) fn goes_on_from(&mut self, step: u64) {
        self.newest = Some(step);
    }

    /// The step of the newest whole checkpoint.
    pub(super) fn newest(&self) -> Option<u64> {
        self.newest
    }

    /// Begins a checkpoint; waits for the one before it first.
    ///
    /// # Errors
    /// When the one before it could not be written, or there is no memory for the copy.
    pub(super) fn begin(
        &mut self,
        state: State,
        adapters: &ParamSet,
        moments: &NamedTensors,
        keep: Keep,
    ) -> Result<()> {
        self.finish()?;
        let mut snapshot = match self.spare.take() {
            Some(snapshot) => snapshot,
            None => Snapshot::like(adapters, moments)?,
        };
        snapshot.copy(adapters, moments)?;
        let (folder, lora, base, step) =
            (self.folder.clone(), self.lora.clone(), self.base.clone(), state.step);
        let write = move || {
            let Snapshot { adapters, moments } = &snapshot;
            let saved = folder.save(&state, &lora, adapters, &base, moments);
            let outcome = saved.and_then(|()| folder.prune(keep.last, keep.best));
            (snapshot, outcome)
        };
        let thread =
            std::thread::Builder::new().name("checkpoint".to_string()).spawn_scoped(self.scope, write);
        let thread = thread.context("cannot start the thread that writes checkpoints")?;
        self.underway = Some(Underway { step, thread });
        Ok(())
    }

    /// Takes note of a checkpoint that was written meanwhile; waits for none.
    ///
    /// # Errors
    /// When it could not be written.
    pub(super) fn poll(&mut self) -> Result<()> {
        match &self.underway {
            Some(underway) if underway.thread.is_finished() => self.finish(),
            _ => Ok(()),
        }
    }

    /// Waits for the checkpoint that is being written.
    ///
    /// # Errors
    /// When it could not be written.
    pub(super) fn finish(&mut self) -> Result<()> {
        let Some(Underway { step, thread }) = self.underway.take() else { return Ok(()) };
        let (snapshot, outcome) =
            thread.join().map_err(|_| anyhow!("the thread that writes checkpoints failed"))?;
        self.spare = Some(snapshot);
        outcome.with_context(|| format!("the checkpoint of step {step} was not written"))?;
        self.newest = Some(step);
        Ok(())
    }
}
