//! The residual streams before layers, kept on the host: what `recompute = "layer+offload"` needs no GPU memory for.
//!
//! A few slots on the GPU take turns. After a layer has its stream, a copy goes to the host while the layer computes; on the
//! way back a stream is fetched as soon as the slot's last user is done, some layers ahead of its own turn. The last layers'
//! streams are still in their slots when the way back begins.

use std::sync::Mutex;

use anyhow::{Result, anyhow};
use tch::{Device, Kind, Tensor};

use crate::kernels::host_copies::{Copying, HostCopies};

/// Streams that are on the GPU at a time: one in use, one on its way, one to spare.
pub(super) const SLOTS: usize = 3;

/// Streams on the host and their copies.
#[derive(Debug)]
pub(super) struct Offload {
    copies: HostCopies,
    /// One `[tokens, hidden]` a layer, but for those that stay in their slots.
    host: Vec<Tensor>,
    /// The newest copy from or to each slot.
    underway: Mutex<[Option<Copying>; SLOTS]>,
}

impl Offload {
    pub(super) fn new(layers: usize, tokens: i64, hidden: i64, kind: Kind, device: Device) -> Result<Self> {
        let copies = HostCopies::new(device)?;
        let stored = layers.saturating_sub(SLOTS);
        let host = (0..stored).map(|_| copies.buffer(&[tokens, hidden], kind)).collect::<Result<Vec<_>>>()?;
        Ok(Self { copies, host, underway: Mutex::default() })
    }

    /// Waits until nothing is copied from or to the slot of a layer.
    pub(super) fn wait(&self, layer: usize) -> Result<()> {
        let mut underway = self.underway.lock().map_err(|_| anyhow!("a copy failed before"))?;
        match underway[layer % SLOTS].take() {
            Some(copying) => self.copies.finish(&copying),
            None => Ok(()),
        }
    }

    /// Begins to store the stream `x` of a layer.
    pub(super) fn store(&self, layer: usize, x: &Tensor) -> Result<()> {
        match self.host.get(layer) {
            Some(host) => {
                let copying = self.copies.start(x, &host.narrow(0, 0, x.size()[0]))?;
                self.note(layer, copying)
            }
            None => Ok(()),
        }
    }

    /// After a layer's way back: begins to fetch the stream that will need its slot next, into `slot`.
    pub(super) fn fetch_after(&self, layer: usize, slot: &Tensor) -> Result<()> {
        let Some(next) = layer.checked_sub(SLOTS) else { return Ok(()) };
        let copying = self.copies.start(&self.host[next].narrow(0, 0, slot.size()[0]), slot)?;
        self.note(next, copying)
    }

    fn note(&self, layer: usize, copying: Copying) -> Result<()> {
        let mut underway = self.underway.lock().map_err(|_| anyhow!("a copy failed before"))?;
        underway[layer % SLOTS] = Some(copying);
        Ok(())
    }
}
