//! The adapter in the host's memory: what `recompute = "layer+offload+adapter"` needs no GPU memory for.
//!
//! Masters and their rounded copy lie in pinned memory, where the optimiser's kernel reads and writes them. The passes need
//! one layer's part at a time: two slots on the GPU take turns, and the next layer's part is fetched while one computes.

use std::sync::{Mutex, MutexGuard};

use anyhow::{Context as _, Result, anyhow, ensure};
use tch::{Device, Tensor};

use crate::kernels::host_copies::{Copying, HostCopies};
use crate::model::params::ParamSlot;

/// Layers whose adapters are on the GPU at a time: one in use, one on its way.
pub(super) const SLOTS: usize = 2;

/// An adapter on the host, and the slots.
#[derive(Debug)]
pub(super) struct HostAdapter {
    copies: HostCopies,
    /// All parameters as products take them, `[elements]`.
    host: Tensor,
    /// Those of each layer, which are neighbours.
    layers: Vec<Vec<ParamSlot>>,
    /// `[elements of a layer]` each.
    slots: [Tensor; SLOTS],
    held: Mutex<[Held; SLOTS]>,
}

/// What a slot holds.
#[derive(Debug, Default)]
struct Held {
    /// `None`: nothing, or what the adapter was before it changed.
    layer: Option<usize>,
    /// The copy that brings it, until it is waited for.
    underway: Option<Copying>,
}

impl HostAdapter {
    /// For parameters in the order of their layers, as many in each; `host` is pinned where the passes run on a GPU.
    pub(super) fn new(slots: &[ParamSlot], host: &Tensor, layers: usize, device: Device) -> Result<Self> {
        let of_a_layer = slots.len() / layers.max(1);
        ensure!(
            of_a_layer > 0 && of_a_layer * layers == slots.len(),
            "layers have adapters of their own number"
        );
        let layers: Vec<Vec<ParamSlot>> = slots.chunks(of_a_layer).map(<[ParamSlot]>::to_vec).collect();
        let lengths: Vec<i64> = layers.iter().map(|layer| layer.iter().map(ParamSlot::len).sum()).collect();
        ensure!(lengths.windows(2).all(|pair| pair[0] == pair[1]), "layers have adapters of their own size");
        let slot = || Tensor::f_empty([lengths[0]], (host.kind(), device));
        Ok(Self {
            copies: HostCopies::new(device)?,
            host: host.shallow_clone(),
            layers,
            slots: [slot()?, slot()?],
            held: Mutex::default(),
        })
    }

    fn held(&self) -> Result<MutexGuard<'_, [Held; SLOTS]>> {
        self.held.lock().map_err(|_| anyhow!("a copy failed before"))
    }

    /// What the slots hold is of an adapter that has changed since.
    pub(super) fn forget(&self) -> Result<()> {
        for held in self.held()?.iter_mut() {
            held.layer = None;
        }
        Ok(())
    }

    /// Begins to fetch a layer's part, unless it is there or on its way, or there is no such layer. Its slot is the one of
    /// the layer before or after its neighbour: what was queued before this is the last that reads it.
    pub(super) fn fetch(&self, layer: usize) -> Result<()> {
        let Some(parameters) = self.layers.get(layer) else { return Ok(()) };
        let held = &mut self.held()?[layer % SLOTS];
        if held.layer == Some(layer) {
            return Ok(());
        }
        let slot = &self.slots[layer % SLOTS];
        let from = self.host.narrow(0, parameters[0].offset, slot.size()[0]);
        *held = Held { layer: Some(layer), underway: Some(self.copies.start(&from, slot)?) };
        Ok(())
    }

    /// Lets the computation queued from here on find a layer's part in its slot.
    pub(super) fn bring(&self, layer: usize) -> Result<()> {
        self.fetch(layer)?;
        match self.held()?[layer % SLOTS].underway.take() {
            Some(copying) => self.copies.finish(&copying),
            None => Ok(()),
        }
    }

    /// Parameters of a layer that was [brought](Self::bring), by their indices among all.
    pub(super) fn of<const N: usize>(&self, layer: usize, indices: [usize; N]) -> Result<[Tensor; N]> {
        ensure!(self.held()?[layer % SLOTS].layer == Some(layer), "layer {layer}'s adapter is not there");
        let parameters = &self.layers[layer];
        let view = |index: usize| -> Result<Tensor> {
            let within =
                index.checked_sub(layer * parameters.len()).and_then(|within| parameters.get(within));
            let slot = within.with_context(|| format!("parameter {index} is not layer {layer}'s"))?;
            let flat = self.slots[layer % SLOTS].narrow(0, slot.offset - parameters[0].offset, slot.len());
            Ok(flat.view(slot.shape.as_slice()))
        };
        let views: Vec<Tensor> = indices.into_iter().map(view).collect::<Result<_>>()?;
        views.try_into().map_err(|_| anyhow!("as many views as indices"))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::model::params::ParamSet;

    fn adapter(layers: usize) -> ParamSet {
        let names = (0..layers)
            .flat_map(|layer| [(format!("{layer}.a"), vec![2, 3]), (format!("{layer}.b"), vec![4, 2])]);
        let set = ParamSet::zeros(names, Device::Cpu);
        set.flat().shallow_clone().copy_(&Tensor::arange(14 * layers as i64, (Kind::Float, Device::Cpu)));
        set
    }

    #[test]
    fn layers_take_turns_and_a_changed_adapter_is_fetched_again() {
        let params = adapter(5);
        let host = HostAdapter::new(params.slots(), params.flat(), 5, Device::Cpu).unwrap();
        let there = |layer: usize| {
            let indices = [2 * layer, 2 * layer + 1];
            host.of(layer, indices)
                .unwrap()
                .iter()
                .zip(indices)
                .all(|(one, index)| one.equal(&params.view(index)))
        };
        for layer in (0..5).chain((0..5).rev()) {
            host.bring(layer).unwrap();
            assert!(there(layer), "{layer}");
        }
        host.fetch(1).unwrap();
        let _ = params.flat().shallow_clone().g_add_scalar_(100.0);
        host.bring(1).unwrap();
        assert!(!there(1));
        host.forget().unwrap();
        assert!(host.of(1, [2]).is_err());
        host.bring(1).unwrap();
        assert!(there(1));
        host.fetch(5).unwrap();
        assert!(host.of(1, [1]).is_err() && host.of(1, [4]).is_err());
    }

    #[test]
    fn layers_of_different_adapters_are_refused() {
        let params = adapter(3);
        assert!(HostAdapter::new(&params.slots()[1..], params.flat(), 3, Device::Cpu).is_err());
        assert!(HostAdapter::new(&params.slots()[1..5], params.flat(), 4, Device::Cpu).is_err());
    }
}
