//! The decoder: embedding, layers, head; loss, gradients and logits. Generation is in [`super::continuation`].

use anyhow::{Context as _, Result, bail, ensure};
use tch::{Device, Kind, Tensor};

use super::batch::Batch;
use super::config::ModelConfig;
use super::fused::Fused;
use super::fused::plan::{Limits, MemoryLayout, Sizes};
use super::init;
use super::layer::{DecoderLayer, LayerSaved, PassContext};
use super::linear::{Adapter, DropoutStep, LoraLinear};
use super::load::{Loader, Weights};
use super::noise::{NoiseStep, noisy};
use super::params::ParamSet;
use super::weights::TensorSource;
use crate::kernels::bridge;
use crate::kernels::cross_entropy::{
    cross_entropy_reference, cross_entropy_with_grad_reference, logits_reference,
};
use crate::kernels::rms_norm::{RmsNormOut, rms_norm_backward_reference, rms_norm_reference};
use crate::kernels::rope::RotaryAngles;
use crate::recipe::{LoraSpec, Projection, Quantization};

/// How to hold the frozen weights.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// NF4, or as stored.
    pub quantization: Quantization,
    /// Where.
    pub device: Device,
    /// What to compute in.
    pub precision: Precision,
}

impl LoadOptions {
    /// To compute in the device's own precision.
    pub fn new(quantization: Quantization, device: Device) -> Self {
        Self { quantization, device, precision: Precision::Native }
    }
}

/// What a decoder computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// f32 on the CPU, bf16 on a GPU.
    Native,
    /// f32 on either: slow on a GPU, and four bytes a weight that is not in NF4.
    Full,
}

impl Precision {
    /// The dtype of activations, and of weights that are not in NF4.
    fn kind(self, device: Device) -> Kind {
        if self == Self::Native && device.is_cuda() { Kind::BFloat16 } else { Kind::Float }
    }
}

/// The loss of a batch, summed: divide by `supervised` for the mean.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Loss {
    /// Sum of the losses of each sequence in nats, `[seqs]`.
    pub per_sequence: Vec<f64>,
    /// Supervised tokens of each sequence, `[seqs]`.
    pub supervised: Vec<i64>,
}

impl Loss {
    /// Sum over all sequences.
    pub fn sum(&self) -> f64 {
        self.per_sequence.iter().sum()
    }

    /// Supervised tokens of all sequences.
    pub fn tokens(&self) -> i64 {
        self.supervised.iter().sum()
    }
}

/// How a micro-batch's gradient is taken.
#[derive(Debug, Clone, Copy)]
pub struct GradOptions {
    /// Factor of every token's loss: one over the supervised tokens of the whole optimiser step.
    pub scale: f64,
    /// Seed of the run, for dropout.
    pub seed: u64,
    /// Counter of the micro-batch since the start of the run, for dropout.
    pub microbatch: u64,
    /// Strength of the noise on embeddings ([`super::noise`]); 0 without.
    pub noise: f64,
}

impl GradOptions {
    pub(super) fn noise_step(&self) -> Option<NoiseStep> {
        let Self { seed, microbatch, noise: alpha, .. } = *self;
        (alpha > 0.0).then_some(NoiseStep { alpha, seed, microbatch })
    }
}

/// A decoder with frozen weights and, when attached, a LoRA adapter.
#[derive(Debug)]
pub struct Decoder {
    config: ModelConfig,
    device: Device,
    /// Of activations.
    kind: Kind,
    /// `[vocab, hidden]`.
    embed_tokens: Tensor,
    layers: Vec<DecoderLayer>,
    /// `[hidden]`.
    norm: Tensor,
    /// `[vocab, hidden]`; the embedding itself when the configuration ties them. On a GPU filled up with zero rows.
    lm_head: Tensor,
    adapters: Option<Adapters>,
    adapters_on: bool,
    /// Kernels and fixed memory for training on a GPU, once prepared.
    fused: Option<Fused>,
}

/// An adapter's parameters.
#[derive(Debug)]
struct Adapters {
    spec: LoraSpec,
    params: ParamSet,
    /// The same in the activations' dtype, flat; in f32, and once prepared, the parameters themselves. On the host beside
    /// them where the passes fetch a layer's part at a time.
    copies: Tensor,
}

impl Adapters {
    /// Parameters and copies become pinned host memory, which a GPU's kernels reach; an optimiser writes both.
    fn move_to_host(&mut self, kind: Kind) -> Result<()> {
        let moved = |kind: Kind| -> Result<Tensor> {
            let host = bridge::pinned(&self.params.flat().size(), kind)?;
            host.shallow_clone().f_copy_(self.params.flat())?;
            Ok(host)
        };
        let (flat, copies) = (moved(Kind::Float)?, moved(kind)?);
        self.params = self.params.over(flat).with_rounded(copies.shallow_clone());
        self.copies = copies;
        Ok(())
    }
}

/// The frozen part of a decoder.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frozen<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) embed_tokens: &'a Tensor,
    pub(super) layers: &'a [DecoderLayer],
    pub(super) norm: &'a Tensor,
    pub(super) lm_head: &'a Tensor,
}

impl Decoder {
    /// Loads the weights, tensor by tensor.
    ///
    /// # Errors
    /// When a tensor is missing, unknown or has another shape than the configuration says.
    pub fn load(source: &dyn TensorSource, config: &ModelConfig, options: &LoadOptions) -> Result<Self> {
        let LoadOptions { quantization, device, precision } = *options;
        let kind = precision.kind(device);
        let loader = Loader { source, config, quantization, device, kind };
        let Weights { embed_tokens, layers, norm, lm_head } = loader.load()?;
        let config = config.clone();
        Ok(Self {
            config,
            device,
            kind,
            embed_tokens,
            layers,
            norm,
            lm_head,
            adapters: None,
            adapters_on: true,
            fused: None,
        })
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The dtype of activations.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Adds an adapter: `lora_A` Kaiming-uniform from `seed` as in PEFT, `lora_B` zero.
    ///
    /// # Errors
    /// When one is attached already.
    pub fn attach_lora(&mut self, spec: &LoraSpec, seed: u64) -> Result<()> {
        ensure!(self.adapters.is_none(), "the decoder has an adapter already");
        let targets: Vec<(usize, Projection)> = (0..self.layers.len())
            .flat_map(|layer| Projection::ALL.map(|projection| (layer, projection)))
            .filter(|(_, projection)| spec.targets.contains(projection))
            .collect();
        let params = ParamSet::zeros(
            targets
                .iter()
                .flat_map(|(layer, projection)| self.lora_parameters(*layer, *projection, spec.rank)),
            self.device,
        );
        // Each A, followed by its B.
        (0..targets.len()).for_each(|index| initialise(&params, 2 * index, seed));
        let copies = params.flat().to_kind(self.kind());
        for (index, (layer, projection)) in targets.into_iter().enumerate() {
            let slots = (2 * index, 2 * index + 1);
            let adapter = Adapter::new(&params, &copies, slots, spec.scale(), spec.dropout);
            self.projection_mut(layer, projection).adapter = Some(adapter);
        }
        self.adapters = Some(Adapters { spec: spec.clone(), params, copies });
        Ok(())
    }

    fn lora_parameters(&self, layer: usize, projection: Projection, rank: usize) -> [(String, Vec<i64>); 2] {
        let [out, input] = self.config.projection_shape(projection);
        let path = projection.path(layer);
        let rank = rank as i64;
        [
            (format!("{path}.lora_A.weight"), vec![rank, input]),
            (format!("{path}.lora_B.weight"), vec![out, rank]),
        ]
    }

    /// The adapter's parameters, f32; [`adapters_changed`](Self::adapters_changed) must be called after writing to them.
    pub fn adapters(&self) -> Option<&ParamSet> {
        self.adapters.as_ref().map(|adapters| &adapters.params)
    }

    /// Renews what is derived from the adapter (copies for products) after it was written to.
    ///
    /// # Errors
    /// When a copy fails.
    pub fn adapters_changed(&mut self) -> Result<()> {
        if let Some(Adapters { params, copies, .. }) = &mut self.adapters
            && copies.kind() != Kind::Float
        {
            tch::no_grad(|| copies.f_copy_(params.flat()))?;
        }
        self.adapters_stepped()
    }

    /// As [`adapters_changed`](Self::adapters_changed), after an optimiser's step, which has written the
    /// [rounded copy](ParamSet::rounded) where there is one.
    ///
    /// # Errors
    /// As there.
    pub fn adapters_stepped(&self) -> Result<()> {
        match &self.fused {
            Some(fused) => tch::no_grad(|| fused.adapters_changed(&self.layers)),
            None => Ok(()),
        }
    }

    /// Takes the memory for training on a GPU in micro-batches within `limits`, once; training then runs through our
    /// kernels. Meant for a GPU; on the CPU it is for tests.
    ///
    /// # Errors
    /// When no adapter is attached, the decoder computes in f32 on a GPU, or the memory does not suffice.
    pub fn prepare(&mut self, limits: Limits, layout: impl Into<MemoryLayout>) -> Result<()> {
        let (kind, device, layout) = (self.kind, self.device, layout.into());
        ensure!(!device.is_cuda() || kind == Kind::BFloat16, "kernels for training compute in bf16");
        let adapters = self.adapters.as_mut().context("no adapter is attached: there is nothing to train")?;
        if layout.recompute.offloads_adapter() && device.is_cuda() {
            adapters.move_to_host(kind)?;
        } else {
            // The passes take the parameters themselves.
            adapters.copies = adapters.params.flat().shallow_clone();
        }
        for adapter in self.layers.iter_mut().flat_map(DecoderLayer::adapters_mut) {
            adapter.take_copies(&adapters.params, &adapters.copies);
        }
        if adapters.params.rounded().is_some() {
            // What the adapter took on the GPU goes back whole: later buffers would not fit into it.
            bridge::empty_cache()?;
        }
        let sizes = Sizes::new(&self.config, &adapters.spec, limits, layout);
        let adapter = (adapters.params.slots(), &adapters.copies);
        self.fused = Some(Fused::new(sizes, &mut self.layers, adapter, kind, device)?);
        Ok(())
    }

    /// The passes over our kernels, once [prepared](Self::prepare).
    pub fn fused(&self) -> Option<&Fused> {
        self.fused.as_ref()
    }

    fn frozen(&self) -> Frozen<'_> {
        let Self { config, embed_tokens, layers, norm, lm_head, .. } = self;
        Frozen { config, embed_tokens, layers, norm, lm_head }
    }

    pub(super) fn layers(&self) -> &[DecoderLayer] {
        &self.layers
    }

    /// The head without the rows that fill it up, `[vocab, hidden]`.
    pub(super) fn head(&self) -> Tensor {
        self.lm_head.narrow(0, 0, self.config.vocab_size)
    }

    /// Switches the attached adapter on or off: off is the base model.
    pub fn enable_adapters(&mut self, on: bool) {
        self.adapters_on = on;
    }

    /// The loss, without dropout.
    ///
    /// # Errors
    /// When a token id or a position is beyond the model's.
    pub fn loss(&self, batch: &Batch) -> Result<Loss> {
        self.check(batch)?;
        if batch.supervised == 0 {
            return Ok(empty_loss(batch));
        }
        tch::no_grad(|| {
            if let Some(fused) = self.fused.as_ref().filter(|fused| fused.takes(batch)) {
                return per_sequence(batch, &fused.loss(self.frozen(), batch, self.adapters_on)?);
            }
            ensure!(
                self.adapters().is_none_or(|adapters| adapters.rounded().is_none()),
                "a batch of {} tokens is larger than memory was taken for, and the adapter lies on the host",
                batch.tokens()
            );
            let pass = self.pass(batch, None);
            let hidden = self.forward(batch, &pass, None, |_| {})?;
            let normed = self.final_norm(&hidden.index_select(0, &batch.rows)).y;
            let labels = batch.labels.index_select(0, &batch.rows);
            let losses = cross_entropy_reference(&normed, &self.head(), &labels, self.config.logits_scaling);
            per_sequence(batch, &losses)
        })
    }

    /// The loss, and its gradient times `options.scale` added into `grads` (layout of [`adapters`](Self::adapters)).
    ///
    /// # Errors
    /// As [`loss`](Self::loss), or when no adapter is attached.
    pub fn loss_and_grad(&self, batch: &Batch, options: &GradOptions, grads: &mut ParamSet) -> Result<Loss> {
        ensure!(
            self.adapters.is_some() && self.adapters_on,
            "no adapter is attached: there is nothing to train"
        );
        self.check(batch)?;
        if batch.supervised == 0 {
            return Ok(empty_loss(batch));
        }
        tch::no_grad(|| {
            if let Some(fused) = &self.fused {
                return per_sequence(batch, &fused.loss_and_grad(self.frozen(), batch, options, grads)?);
            }
            let GradOptions { scale, seed, microbatch, .. } = *options;
            let pass = self.pass(batch, Some(DropoutStep { seed, microbatch }));
            let mut saved = Vec::with_capacity(self.layers.len());
            let hidden = self.forward(batch, &pass, options.noise_step(), |layer| saved.push(layer))?;
            let (losses, d_hidden) = self.head_with_grad(&hidden, batch, scale);
            self.backward(d_hidden, saved, &pass, grads)?;
            per_sequence(batch, &losses)
        })
    }

    /// Losses of the supervised rows and the gradient of the residual stream after the last layer.
    fn head_with_grad(&self, hidden: &Tensor, batch: &Batch, scale: f64) -> (Tensor, Tensor) {
        let rows = &batch.rows;
        let x = hidden.index_select(0, rows);
        let RmsNormOut { y, rstd } = self.final_norm(&x);
        let labels = batch.labels.index_select(0, rows);
        let scaling = self.config.logits_scaling;
        let (losses, dy) = cross_entropy_with_grad_reference(&y, &self.head(), &labels, scaling, scale);
        let dx = rms_norm_backward_reference(&dy, &x, &self.norm, &rstd);
        let mut d_hidden = hidden.zeros_like();
        let _ = d_hidden.index_copy_(0, rows, &dx);
        (losses, d_hidden)
    }

    fn backward(
        &self,
        mut gradient: Tensor,
        mut saved: Vec<LayerSaved>,
        pass: &PassContext<'_>,
        grads: &mut ParamSet,
    ) -> Result<()> {
        for (index, layer) in self.layers.iter().enumerate().rev() {
            // Taken off the list, so that a layer's memory is free once its gradient is known.
            let kept = saved.pop().context("a layer kept nothing for its backward pass")?;
            if index == 0 {
                layer.backward_first(&gradient, &kept, pass, grads)?;
            } else {
                gradient = layer.backward(&gradient, &kept, pass, grads)?;
            }
        }
        Ok(())
    }

    /// Logits at the positions `rows` (i64 indices into the packed tokens), `[rows, vocab]` f32.
    ///
    /// # Errors
    /// As [`loss`](Self::loss).
    pub fn logits(&self, batch: &Batch, rows: &Tensor) -> Result<Tensor> {
        self.check(batch)?;
        tch::no_grad(|| {
            let pass = self.pass(batch, None);
            let hidden = self.forward(batch, &pass, None, |_| {})?;
            let normed = self.final_norm(&hidden.index_select(0, rows)).y;
            Ok(logits_reference(&normed, &self.head(), self.config.logits_scaling))
        })
    }

    /// What the head takes at the positions that are supervised, `[supervised, hidden]`: much smaller than their logits,
    /// which [`head_logits`](Self::head_logits) makes some at a time.
    ///
    /// # Errors
    /// As [`loss`](Self::loss).
    pub fn supervised_hidden(&self, batch: &Batch) -> Result<Tensor> {
        self.check(batch)?;
        tch::no_grad(|| {
            let pass = self.pass(batch, None);
            let hidden = self.forward(batch, &pass, None, |_| {})?;
            Ok(self.final_norm(&hidden.index_select(0, &batch.rows)).y)
        })
    }

    /// Logits of some rows of [`supervised_hidden`](Self::supervised_hidden), `[rows, vocab]` f32.
    pub fn head_logits(&self, hidden: &Tensor) -> Tensor {
        self.head_of()(hidden)
    }

    /// As [`head_logits`](Self::head_logits), to go on when the rest of the model is no longer in memory.
    pub fn head_of(&self) -> impl Fn(&Tensor) -> Tensor + 'static {
        let (head, scaling) = (self.head(), self.config.logits_scaling);
        move |hidden| tch::no_grad(|| logits_reference(hidden, &head, scaling))
    }

    /// The frozen weight of a projection, dequantised, `[out, in]` f32 on the decoder's device.
    pub fn base_weight(&self, layer: usize, projection: Projection) -> Tensor {
        self.layers[layer].projection(projection).base.dense(Kind::Float)
    }

    /// `scale · B · A` of a projection, `[out, in]` f32, or `None` where there is no adapter.
    pub fn lora_delta(&self, layer: usize, projection: Projection) -> Option<Tensor> {
        let adapter = self.layers[layer].projection(projection).adapter.as_ref()?;
        Some(tch::no_grad(|| adapter.delta()))
    }

    fn forward(
        &self,
        batch: &Batch,
        pass: &PassContext<'_>,
        noise: Option<NoiseStep>,
        mut keep: impl FnMut(LayerSaved),
    ) -> Result<Tensor> {
        let mut x = match noise {
            Some(step) => {
                let rows = self.embed_tokens.index_select(0, &batch.input_ids);
                noisy(rows, batch, step)? * self.config.embedding_multiplier
            }
            None => self.embed(&batch.input_ids),
        }; // [tokens, hidden]
        for layer in &self.layers {
            let (y, saved) = layer.forward(&x, pass)?;
            keep(saved);
            x = y;
        }
        Ok(x)
    }

    pub(super) fn embed(&self, input_ids: &Tensor) -> Tensor {
        self.embed_tokens.index_select(0, input_ids) * self.config.embedding_multiplier
    }

    pub(super) fn final_norm(&self, x: &Tensor) -> RmsNormOut {
        rms_norm_reference(x, &self.norm, self.config.rms_norm_eps)
    }

    fn check(&self, batch: &Batch) -> Result<()> {
        if batch.tokens() == 0 {
            bail!("the batch is empty");
        }
        let longest = batch.cu_seqlens.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
        self.check_ids(batch.largest_id, longest)
    }

    fn pass<'a>(&'a self, batch: &'a Batch, dropout: Option<DropoutStep>) -> PassContext<'a> {
        self.pass_over(&batch.position_ids, &batch.cu_seqlens, dropout)
    }

    pub(super) fn pass_over<'a>(
        &'a self,
        position_ids: &Tensor,
        cu_seqlens: &'a [i64],
        dropout: Option<DropoutStep>,
    ) -> PassContext<'a> {
        let ModelConfig { head_dim, rope_theta, .. } = self.config;
        let angles = RotaryAngles::new(position_ids, head_dim, rope_theta, self.kind());
        PassContext { config: &self.config, angles, cu_seqlens, dropout, adapted: self.adapters_on }
    }

    pub(super) fn check_ids(&self, largest_id: i64, longest: i64) -> Result<()> {
        let ModelConfig { vocab_size, max_position_embeddings, .. } = self.config;
        ensure!(
            largest_id < vocab_size,
            "token id {largest_id} is beyond the model's vocabulary of {vocab_size}"
        );
        ensure!(
            longest <= max_position_embeddings,
            "a sequence of {longest} tokens is longer than the model's {max_position_embeddings} positions"
        );
        Ok(())
    }

    fn projection_mut(&mut self, layer: usize, projection: Projection) -> &mut LoraLinear {
        self.layers[layer].projection_mut(projection)
    }
}

/// PEFT's initial `lora_A`: Kaiming-uniform with slope √5, which is uniform within `1 / sqrt(in)`.
fn initialise(params: &ParamSet, a_slot: usize, seed: u64) {
    let slot = &params.slots()[a_slot];
    let bound = 1.0 / (slot.shape[1] as f64).sqrt();
    let values = init::uniform(seed, &slot.name, slot.len() as usize, bound);
    params.view(a_slot).copy_(&Tensor::from_slice(&values).view(slot.shape.as_slice()));
}

fn empty_loss(batch: &Batch) -> Loss {
    let seqs = batch.cu_seqlens.len().saturating_sub(1);
    Loss { per_sequence: vec![0.0; seqs], supervised: vec![0; seqs] }
}

/// Sums in f64, in order: the same whatever the row's neighbours are.
fn per_sequence(batch: &Batch, losses: &Tensor) -> Result<Loss> {
    let losses = Vec::<f32>::try_from(losses.to_device(Device::Cpu))?;
    let mut loss = empty_loss(batch);
    let mut sequence = 0;
    for (row, value) in batch.host_rows.iter().copied().zip(losses) {
        while row >= batch.cu_seqlens[sequence + 1] {
            sequence += 1;
        }
        loss.per_sequence[sequence] += f64::from(value);
        loss.supervised[sequence] += 1;
    }
    Ok(loss)
}
