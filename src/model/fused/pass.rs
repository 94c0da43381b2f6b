//! A batch on its way through the layers and back.

use anyhow::{Context as _, Result};
use tch::Tensor;

use super::Fused;
use super::attention::{Attended, Packed};
use super::group::GroupName;
use super::plan::Sizes;
use super::product::AdapterOperands;
use super::workspace::{Kept, matrix};
use crate::kernels::cross_entropy::cross_entropy_into;
use crate::kernels::rms_norm::{add_rms_norm_into, rms_norm_backward_into, rms_norm_into};
use crate::kernels::rope::{RotaryTable, rotate_in_place};
use crate::kernels::swiglu::{swiglu_backward_into, swiglu_into};
use crate::model::batch::Batch;
use crate::model::decoder::Frozen;
use crate::model::layer::DecoderLayer;
use crate::model::linear::DropoutStep;
use crate::model::noise::{NoiseStep, add_noise};
use crate::model::params::ParamSet;
use crate::recipe::Recompute;

/// What every layer of a pass shares.
pub(super) struct Pass<'a> {
    pub(super) tokens: i64,
    pub(super) frozen: Frozen<'a>,
    pub(super) packed: Packed,
    table: RotaryTable,
    /// `None` where nothing is dropped.
    pub(super) dropout: Option<DropoutStep>,
    pub(super) adapted: bool,
}

impl<'a> Pass<'a> {
    pub(super) fn new(
        sizes: &Sizes,
        frozen: Frozen<'a>,
        batch: &Batch,
        dropout: Option<DropoutStep>,
        adapted: bool,
    ) -> Result<Self> {
        let config = frozen.config;
        let device = frozen.embed_tokens.device();
        Ok(Self {
            tokens: batch.tokens(),
            frozen,
            packed: Packed::new(sizes, &batch.cu_seqlens, device)?,
            table: RotaryTable::new(&batch.position_ids, config.head_dim, config.rope_theta)?,
            dropout,
            adapted,
        })
    }
}

impl Fused {
    fn kept(&self, layer: usize, tokens: i64) -> Kept {
        self.workspace.kept[layer].rows(tokens)
    }

    fn branch(&self, columns: i64, tokens: i64) -> Tensor {
        matrix(&self.workspace.branch, tokens, columns)
    }

    fn inner(&self, columns: i64, tokens: i64) -> Tensor {
        matrix(&self.workspace.inner, tokens, columns)
    }

    fn gradient(&self, tokens: i64) -> Tensor {
        self.workspace.gradient.narrow(0, 0, tokens)
    }

    /// All layers; gives what attention kept of each that keeps it. The stream's last sum is left to the head.
    pub(super) fn forward(
        &self,
        batch: &Batch,
        pass: &Pass<'_>,
        noise: Option<NoiseStep>,
    ) -> Result<Vec<Attended>> {
        let Frozen { config, embed_tokens, layers, .. } = pass.frozen;
        let first = self.kept(0, pass.tokens);
        if let Some(offload) = &self.offload {
            offload.wait(0)?;
        }
        let _ = embed_tokens.f_index_select_out(&first.x, 0, &batch.input_ids)?;
        if let Some(step) = noise {
            add_noise(&first.x, batch, step, &self.inner(config.hidden_size, pass.tokens))?;
        }
        if config.embedding_multiplier != 1.0 {
            let _ = first.x.shallow_clone().f_mul_scalar_(config.embedding_multiplier)?;
        }
        let mut kept = Vec::new();
        for (index, layer) in layers.iter().enumerate() {
            if let Some(offload) = &self.offload {
                offload.wait(index)?;
            }
            self.bring_adapter(index, index + 1, pass)?;
            self.enter_layer(index, layer, pass)?;
            if let Some(offload) = &self.offload {
                offload.store(index, &self.kept(index, pass.tokens).x)?;
            }
            let attended = self.attend(index, layer, pass)?;
            self.feed_forward(index, layer, pass)?;
            if !self.sizes.layout.recompute.is_layer() {
                kept.push(attended);
            }
        }
        Ok(kept)
    }

    /// Where the adapter lies on the host: waits for a layer's part, and begins to fetch the one that is needed `next`.
    fn bring_adapter(&self, index: usize, next: usize, pass: &Pass<'_>) -> Result<()> {
        match &self.host_adapter {
            // Resident weights hold it already.
            Some(host) if pass.adapted && self.resident.is_none() => {
                host.bring(index)?;
                host.fetch(next)
            }
            _ => Ok(()),
        }
    }

    /// The stream before a layer, and its norm as input of the first product.
    fn enter_layer(&self, index: usize, layer: &DecoderLayer, pass: &Pass<'_>) -> Result<()> {
        let config = pass.frozen.config;
        let group = self.sizes.group(GroupName::Qkv);
        let y = self.input_of(group, pass.tokens).narrow(1, 0, group.input);
        let here = self.kept(index, pass.tokens);
        let (weight, eps) = (&layer.input_layernorm, config.rms_norm_eps);
        if index == 0 {
            rms_norm_into(&here.x, weight, eps, &y, &here.x_rstd)?;
        } else {
            let before = self.kept(index - 1, pass.tokens);
            let branch = self.branch(config.hidden_size, pass.tokens);
            let by = config.residual_multiplier;
            add_rms_norm_into(&before.middle, &branch, by, weight, eps, &here.x, &y, &here.x_rstd)?;
        }
        self.clock.mark("norms")
    }

    /// From the normed stream in the workspace to the stream between the blocks and its norm.
    fn attend(&self, index: usize, layer: &DecoderLayer, pass: &Pass<'_>) -> Result<Attended> {
        let (config, tokens) = (pass.frozen.config, pass.tokens);
        let kept = self.kept(index, tokens);
        let qkv = self.at(GroupName::Qkv, index, layer);
        self.forward_product(qkv, &self.input_of(qkv.group, tokens), &kept.xa, &kept.qkv, pass)?;
        rotate_in_place(&rotated(&kept.qkv, config), &pass.table, false)?;
        self.clock.mark("rotary")?;
        let (input, attended) = self.attention(&kept, pass)?;
        let branch = self.branch(config.hidden_size, tokens);
        self.forward_product(self.at(GroupName::O, index, layer), &input, &kept.xa, &branch, pass)?;
        let group = self.sizes.group(GroupName::GateUp);
        let y = self.input_of(group, tokens).narrow(1, 0, group.input);
        add_rms_norm_into(
            &kept.x,
            &branch,
            config.residual_multiplier,
            &layer.post_attention_layernorm,
            config.rms_norm_eps,
            &kept.middle,
            &y,
            &kept.middle_rstd,
        )?;
        self.clock.mark("norms")?;
        Ok(attended)
    }

    /// From the normed stream in the workspace to what the second block adds, in the workspace too.
    fn feed_forward(&self, index: usize, layer: &DecoderLayer, pass: &Pass<'_>) -> Result<()> {
        let (config, tokens) = (pass.frozen.config, pass.tokens);
        let kept = self.kept(index, tokens);
        let gate_up = self.gate_up(index, layer, pass)?;
        let group = self.sizes.group(GroupName::Down);
        let input = self.input_of(group, tokens);
        swiglu_into(&gate_up, &input.narrow(1, 0, group.input))?;
        self.clock.mark("swiglu")?;
        let branch = self.branch(config.hidden_size, tokens);
        self.forward_product(self.at(GroupName::Down, index, layer), &input, &kept.xa, &branch, pass)
    }

    /// Gate and up, `[tokens, 2 · inter]`, of the normed stream in the workspace.
    fn gate_up(&self, index: usize, layer: &DecoderLayer, pass: &Pass<'_>) -> Result<Tensor> {
        let kept = self.kept(index, pass.tokens);
        let at = self.at(GroupName::GateUp, index, layer);
        let gate_up = kept.gate_up.narrow(1, 0, at.group.output());
        self.forward_product(at, &self.input_of(at.group, pass.tokens), &kept.xa, &gate_up, pass)?;
        Ok(gate_up)
    }

    /// Losses of the supervised positions, `[supervised]` f32; with `scale` also the gradient of the stream after the
    /// layers, in the workspace.
    pub(super) fn head(&self, batch: &Batch, pass: &Pass<'_>, scale: Option<f64>) -> Result<Tensor> {
        let Frozen { config, lm_head, norm, layers, .. } = pass.frozen;
        let (tokens, hidden) = (pass.tokens, config.hidden_size);
        let last = self.workspace.last.narrow(0, 0, tokens);
        let rstd = self.workspace.last_rstd.narrow(0, 0, tokens);
        let normed = self.inner(hidden, tokens);
        add_rms_norm_into(
            &self.kept(layers.len() - 1, tokens).middle,
            &self.branch(hidden, tokens),
            config.residual_multiplier,
            norm,
            config.rms_norm_eps,
            &last,
            &normed,
            &rstd,
        )?;
        self.clock.mark("norms")?;
        let rows = &batch.rows;
        let supervised = rows.size()[0];
        let whole = supervised == tokens;
        let y = if whole {
            normed
        } else {
            let y = self.workspace.inner.narrow(0, tokens * hidden, supervised * hidden);
            let y = y.view([supervised, hidden]);
            let _ = normed.f_index_select_out(&y, 0, rows)?;
            y
        };
        let losses = self.losses(&y, &batch.labels.f_index_select(0, rows)?, lm_head, pass, scale)?;
        if scale.is_some() {
            let d_normed = if whole {
                y
            } else {
                let mut spread = self.branch(hidden, tokens);
                let _ = spread.f_zero_()?;
                let _ = spread.f_index_copy_(0, rows, &y)?;
                spread
            };
            let mut gradient = self.gradient(tokens).narrow(1, 0, hidden);
            let _ = gradient.f_zero_()?;
            rms_norm_backward_into(&d_normed, &last, norm, &rstd, &gradient, &gradient)?;
        }
        self.clock.mark("head")?;
        Ok(losses)
    }

    /// Losses of normed rows `y` `[rows, hidden]`, whose gradient takes their place; a chunk of logits at a time.
    fn losses(
        &self,
        y: &Tensor,
        labels: &Tensor,
        lm_head: &Tensor,
        pass: &Pass<'_>,
        scale: Option<f64>,
    ) -> Result<Tensor> {
        let config = pass.frozen.config;
        let (rows, width) = (y.size()[0], lm_head.size()[0]);
        let losses = Tensor::f_empty([rows], (tch::Kind::Float, y.device()))?;
        // Whole tiles of a product, where there is room.
        let room = self.workspace.input.size()[0] / width;
        let chunk = if room >= 256 { room / 128 * 128 } else { room };
        for start in (0..rows).step_by(chunk as usize) {
            let count = chunk.min(rows - start);
            let logits = matrix(&self.workspace.input, count, width);
            let y = y.narrow(0, start, count);
            self.gemm.multiply(&y, &lm_head.tr(), &logits, 1.0, 0.0)?;
            cross_entropy_into(
                &logits,
                &labels.narrow(0, start, count),
                config.vocab_size,
                1.0 / config.logits_scaling,
                scale,
                &losses.narrow(0, start, count),
            )?;
            if scale.is_some() {
                self.gemm.multiply(&logits, lm_head, &y, 1.0, 0.0)?;
            }
        }
        Ok(losses)
    }

    /// All layers back, from the gradient of the stream in the workspace.
    pub(super) fn backward(&self, mut kept: Vec<Attended>, pass: &Pass<'_>, grads: &ParamSet) -> Result<()> {
        for (index, layer) in pass.frozen.layers.iter().enumerate().rev() {
            if let Some(offload) = &self.offload {
                offload.wait(index)?;
            }
            self.bring_adapter(index, index.wrapping_sub(1), pass)?;
            let attended = if self.sizes.layout.recompute.is_layer() {
                self.again(index, layer, pass)?
            } else {
                kept.pop().context("a layer kept nothing of its attention")?
            };
            self.feed_forward_backward(index, layer, pass, grads)?;
            self.attend_backward(index, layer, attended, pass, grads)?;
            if let Some(offload) = &self.offload {
                offload.fetch_after(index, &self.kept(index, pass.tokens).x)?;
            }
        }
        Ok(())
    }

    /// The layer's forward pass again, up to its gate and up.
    fn again(&self, index: usize, layer: &DecoderLayer, pass: &Pass<'_>) -> Result<Attended> {
        let _ = self.normed_x(index, layer, pass)?;
        let attended = self.attend(index, layer, pass)?;
        let _ = self.gate_up(index, layer, pass)?;
        Ok(attended)
    }

    /// The normed stream before a layer, in the workspace as the input of query, key and value.
    fn normed_x(&self, index: usize, layer: &DecoderLayer, pass: &Pass<'_>) -> Result<Tensor> {
        let kept = self.kept(index, pass.tokens);
        let group = self.sizes.group(GroupName::Qkv);
        let y = self.input_of(group, pass.tokens).narrow(1, 0, group.input);
        let eps = pass.frozen.config.rms_norm_eps;
        rms_norm_into(&kept.x, &layer.input_layernorm, eps, &y, &kept.x_rstd)?;
        self.clock.mark("norms")?;
        Ok(y)
    }

    /// The normed stream between the blocks, in the workspace as the input of gate and up.
    fn normed_middle(&self, index: usize, layer: &DecoderLayer, pass: &Pass<'_>) -> Result<Tensor> {
        let kept = self.kept(index, pass.tokens);
        let group = self.sizes.group(GroupName::GateUp);
        let y = self.input_of(group, pass.tokens).narrow(1, 0, group.input);
        let eps = pass.frozen.config.rms_norm_eps;
        rms_norm_into(&kept.middle, &layer.post_attention_layernorm, eps, &y, &kept.middle_rstd)?;
        self.clock.mark("norms")?;
        Ok(y)
    }

    /// From after a layer to between its blocks.
    fn feed_forward_backward(
        &self,
        index: usize,
        layer: &DecoderLayer,
        pass: &Pass<'_>,
        grads: &ParamSet,
    ) -> Result<()> {
        let (config, tokens) = (pass.frozen.config, pass.tokens);
        let (hidden, inter) = (config.hidden_size, config.intermediate_size);
        let factor = config.residual_multiplier;
        let kept = self.kept(index, tokens);
        if self.sizes.layout.recompute == Recompute::Mlp {
            let _ = self.normed_middle(index, layer, pass)?;
            let _ = self.gate_up(index, layer, pass)?;
        }
        let down = self.at(GroupName::Down, index, layer);
        let dy = self.gradient(tokens).narrow(1, 0, hidden + down.group.ranks());
        let d_inner = self.inner(inter, tokens);
        self.through_b(down, &dy)?;
        // The input is not needed before it is computed again, so its place is free.
        let spare = matrix(&self.workspace.input, tokens, inter);
        self.input_gradient(down, &dy, &d_inner, &spare, factor, pass)?;
        let whole_input = self.input_of(down.group, tokens);
        let input = whole_input.narrow(1, 0, inter);
        let gate_up = kept.gate_up.narrow(1, 0, 2 * inter);
        swiglu_backward_into(&d_inner, &gate_up, Some(&input))?;
        self.clock.mark("swiglu")?;
        if self.sizes.layout.recompute.is_layer() {
            // The layer was computed again only up to gate and up.
            self.adapter_input(down, &whole_input, &kept.xa, pass)?;
        }
        {
            let operands = AdapterOperands { dy: &dy, x: &input, xa: &kept.xa, spare: &d_inner };
            self.adapter_gradients(down, operands, factor, pass, grads)
        }?;

        let gate_and_up = self.at(GroupName::GateUp, index, layer);
        let dy = &kept.gate_up;
        let d_normed = self.branch(hidden, tokens);
        let spare = self.inner(hidden, tokens);
        self.through_b(gate_and_up, dy)?;
        self.input_gradient(gate_and_up, dy, &d_normed, &spare, 1.0, pass)?;
        let normed = self.normed_middle(index, layer, pass)?;
        {
            let operands = AdapterOperands { dy, x: &normed, xa: &kept.xa, spare: &spare };
            self.adapter_gradients(gate_and_up, operands, 1.0, pass, grads)
        }?;
        let gradient = self.gradient(tokens).narrow(1, 0, hidden);
        let weight = &layer.post_attention_layernorm;
        rms_norm_backward_into(&d_normed, &kept.middle, weight, &kept.middle_rstd, &gradient, &gradient)?;
        self.clock.mark("norms")
    }

    /// From between the blocks to before the layer; below the first layer nothing learns, so no gradient leaves it.
    fn attend_backward(
        &self,
        index: usize,
        layer: &DecoderLayer,
        attended: Attended,
        pass: &Pass<'_>,
        grads: &ParamSet,
    ) -> Result<()> {
        let (config, tokens) = (pass.frozen.config, pass.tokens);
        let hidden = config.hidden_size;
        let factor = config.residual_multiplier;
        let kept = self.kept(index, tokens);
        let o = self.at(GroupName::O, index, layer);
        let dy = self.gradient(tokens).narrow(1, 0, hidden + o.group.ranks());
        let d_o = self.branch(o.group.input, tokens);
        let spare = self.inner(o.group.input, tokens);
        self.through_b(o, &dy)?;
        self.input_gradient(o, &dy, &d_o, &spare, factor, pass)?;
        {
            let x = attended.o(&kept, o.group.input)?;
            let operands = AdapterOperands { dy: &dy, x: &x, xa: &kept.xa, spare: &spare };
            self.adapter_gradients(o, operands, factor, pass, grads)
        }?;

        let qkv = self.at(GroupName::Qkv, index, layer);
        let dy = self.inner(qkv.group.output() + qkv.group.ranks(), tokens);
        self.attention_backward(&d_o, attended, &kept, &dy.narrow(1, 0, qkv.group.output()), pass)?;
        rotate_in_place(&rotated(&dy, config), &pass.table, true)?;
        self.clock.mark("rotary")?;
        self.through_b(qkv, &dy)?;
        let d_normed = self.branch(hidden, tokens);
        // Not the buffer of `dy`: the input's place is free until it is computed again.
        let spare = matrix(&self.workspace.input, tokens, hidden);
        if index > 0 {
            self.input_gradient(qkv, &dy, &d_normed, &spare, 1.0, pass)?;
        }
        let normed = self.normed_x(index, layer, pass)?;
        let spare = self.workspace.last.narrow(0, 0, tokens);
        {
            let operands = AdapterOperands { dy: &dy, x: &normed, xa: &kept.xa, spare: &spare };
            self.adapter_gradients(qkv, operands, 1.0, pass, grads)
        }?;
        if index > 0 {
            let gradient = self.gradient(tokens).narrow(1, 0, hidden);
            let weight = &layer.input_layernorm;
            rms_norm_backward_into(&d_normed, &kept.x, weight, &kept.x_rstd, &gradient, &gradient)?;
        }
        self.clock.mark("norms")
    }
}

/// Queries and keys together: what turns with the position.
fn rotated(qkv: &Tensor, config: &crate::model::config::ModelConfig) -> Tensor {
    let (count, head_dim) = (config.num_attention_heads + config.num_key_value_heads, config.head_dim);
    qkv.narrow(1, 0, count * head_dim).unflatten(1, [count, head_dim])
}
