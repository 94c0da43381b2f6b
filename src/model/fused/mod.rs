//! Training passes for a GPU: our kernels, cuBLAS, and memory that is taken once.
//!
//! The same mathematics as [`super::layer`], whose functions are the twins; what differs is where numbers lie. Projections
//! that share an input are one product with their adapters ([`group`]), elementwise work is fused around the products, and
//! every buffer is a region of the memory plan ([`plan`]). They also run on the CPU, in f32 through the kernels' twins: slower
//! than the layers' own code, but every line of theirs can be tested there.

mod attention;
pub mod check;
pub mod group;
mod host_adapter;
mod offload;
mod pass;
pub mod plan;
mod product;
mod weights;
mod workspace;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use self::host_adapter::HostAdapter;
use self::offload::Offload;
use self::pass::Pass;
use self::plan::Sizes;
use self::weights::Resident;
use self::workspace::Workspace;
use super::batch::Batch;
use super::config::ModelConfig;
use super::decoder::{Frozen, GradOptions};
use super::layer::DecoderLayer;
use super::linear::DropoutStep;
use super::params::{ParamSet, ParamSlot};
use crate::kernels::gemm::Gemm;
use crate::kernels::stopwatch::Stopwatch;

/// The passes of a decoder with its memory.
#[derive(Debug)]
pub struct Fused {
    sizes: Sizes,
    /// Where streams are kept on the host; dropped before the memory that its copies go to.
    offload: Option<Offload>,
    /// Where the adapter is kept on the host.
    host_adapter: Option<HostAdapter>,
    workspace: Workspace,
    /// Weights that stay laid out.
    resident: Option<Resident>,
    gemm: Gemm,
    /// Times the parts of a pass when started.
    pub clock: Stopwatch,
}

impl Fused {
    /// Takes the memory. Where weights are to be resident, the layers' become views into them. `adapter`: names, and the
    /// parameters as products take them, `[elements]` of `kind`, on the host where the layout says so.
    ///
    /// # Errors
    /// When there is not enough of it.
    pub(super) fn new(
        sizes: Sizes,
        layers_of_model: &mut [DecoderLayer],
        adapter: (&[ParamSlot], &Tensor),
        kind: Kind,
        device: Device,
    ) -> Result<Self> {
        let ModelConfig { num_hidden_layers: layers, hidden_size: hidden, .. } = sizes.config;
        let offload = sizes
            .layout
            .recompute
            .offloads()
            .then(|| Offload::new(layers, sizes.tokens, hidden, kind, device))
            .transpose()?;
        let host_adapter = sizes
            .layout
            .recompute
            .offloads_adapter()
            .then(|| HostAdapter::new(adapter.0, adapter.1, layers, device))
            .transpose()?;
        let resident =
            sizes.layout.resident_weights.then(|| Resident::new(&sizes, layers_of_model, kind, device));
        let fused = Self {
            offload,
            host_adapter,
            resident: resident.transpose()?,
            workspace: Workspace::new(&sizes, kind, device)?,
            gemm: Gemm::new(device)?,
            clock: Stopwatch::default(),
            sizes,
        };
        fused.adapters_changed(layers_of_model)?;
        Ok(fused)
    }

    /// Whether a batch is no larger than the memory was taken for.
    pub(super) fn takes(&self, batch: &Batch) -> bool {
        batch.tokens() <= self.sizes.tokens
    }

    /// Losses of the supervised positions without dropout, `[supervised]` f32.
    pub(super) fn loss(&self, frozen: Frozen<'_>, batch: &Batch, adapted: bool) -> Result<Tensor> {
        let pass = Pass::new(&self.sizes, frozen, batch, None, adapted)?;
        drop(self.forward(batch, &pass, None)?);
        self.head(batch, &pass, None)
    }

    /// As [`loss`](Self::loss), with dropout, and the gradients added into `grads`.
    pub(super) fn loss_and_grad(
        &self,
        frozen: Frozen<'_>,
        batch: &Batch,
        options: &GradOptions,
        grads: &ParamSet,
    ) -> Result<Tensor> {
        ensure!(
            self.takes(batch),
            "a micro-batch of {} tokens is larger than the {} that memory was taken for",
            batch.tokens(),
            self.sizes.tokens
        );
        let GradOptions { scale, seed, microbatch, .. } = *options;
        let dropout = self.drops(&frozen).then_some(DropoutStep { seed, microbatch });
        let pass = Pass::new(&self.sizes, frozen, batch, dropout, true)?;
        let kept = self.forward(batch, &pass, options.noise_step())?;
        let losses = self.head(batch, &pass, Some(scale))?;
        self.backward(kept, &pass, grads)?;
        Ok(losses)
    }

    fn drops(&self, frozen: &Frozen<'_>) -> bool {
        let mut adapters = frozen
            .layers
            .iter()
            .flat_map(|layer| crate::recipe::Projection::ALL.map(|one| layer.projection(one)))
            .filter_map(|projection| projection.adapter.as_ref());
        adapters.any(|adapter| adapter.dropout > 0.0)
    }
}
