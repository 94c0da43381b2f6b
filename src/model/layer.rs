//! One decoder layer: attention and MLP around a residual stream, forward and backward written out.

use anyhow::Result;
use tch::Tensor;

use super::config::ModelConfig;
use super::kv_cache::KvCache;
use super::linear::{Adapter, DropoutStep, LoraLinear, LoraSaved};
use super::params::ParamSet;
use crate::kernels::attention::{attention_backward_reference, attention_reference};
use crate::kernels::rms_norm::{RmsNormOut, rms_norm_backward_reference, rms_norm_reference};
use crate::kernels::rope::RotaryAngles;
use crate::kernels::swiglu::{swiglu_backward_reference, swiglu_reference};
use crate::recipe::Projection;

/// The weights of one layer; fields are the checkpoint's keys.
#[derive(Debug)]
pub struct DecoderLayer {
    pub(super) input_layernorm: Tensor,
    pub(super) q_proj: LoraLinear,
    pub(super) k_proj: LoraLinear,
    pub(super) v_proj: LoraLinear,
    pub(super) o_proj: LoraLinear,
    pub(super) post_attention_layernorm: Tensor,
    pub(super) gate_proj: LoraLinear,
    pub(super) up_proj: LoraLinear,
    pub(super) down_proj: LoraLinear,
}

/// What every layer of a pass shares.
#[derive(Debug)]
pub struct PassContext<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) angles: RotaryAngles,
    pub(super) cu_seqlens: &'a [i64],
    pub(super) dropout: Option<DropoutStep>,
    pub(super) adapted: bool,
}

/// What a layer keeps for its backward pass: memory is the sum of these.
#[derive(Debug)]
pub struct LayerSaved {
    /// The residual stream before the layer, `[tokens, hidden]`.
    x: Tensor,
    attention_norm: RmsNormOut,
    /// Rotated, `[tokens, heads, head_dim]`.
    q: Tensor,
    /// Rotated, `[tokens, kv_heads, head_dim]`.
    k: Tensor,
    /// `[tokens, kv_heads, head_dim]`.
    v: Tensor,
    /// `[tokens, heads, head_dim]`.
    attention: Tensor,
    /// The residual stream between the blocks, `[tokens, hidden]`.
    middle: Tensor,
    mlp_norm: RmsNormOut,
    /// `[tokens, inter]`.
    gate: Tensor,
    /// `[tokens, inter]`.
    up: Tensor,
    lora: [LoraSaved; 7],
}

impl DecoderLayer {
    pub(super) fn projection(&self, projection: Projection) -> &LoraLinear {
        match projection {
            Projection::QProj => &self.q_proj,
            Projection::KProj => &self.k_proj,
            Projection::VProj => &self.v_proj,
            Projection::OProj => &self.o_proj,
            Projection::GateProj => &self.gate_proj,
            Projection::UpProj => &self.up_proj,
            Projection::DownProj => &self.down_proj,
        }
    }

    pub(super) fn projection_mut(&mut self, projection: Projection) -> &mut LoraLinear {
        match projection {
            Projection::QProj => &mut self.q_proj,
            Projection::KProj => &mut self.k_proj,
            Projection::VProj => &mut self.v_proj,
            Projection::OProj => &mut self.o_proj,
            Projection::GateProj => &mut self.gate_proj,
            Projection::UpProj => &mut self.up_proj,
            Projection::DownProj => &mut self.down_proj,
        }
    }

    /// The adapters of its projections.
    pub(super) fn adapters_mut(&mut self) -> impl Iterator<Item = &mut Adapter> {
        let projections = [
            &mut self.q_proj,
            &mut self.k_proj,
            &mut self.v_proj,
            &mut self.o_proj,
            &mut self.gate_proj,
            &mut self.up_proj,
            &mut self.down_proj,
        ];
        projections.into_iter().filter_map(|projection| projection.adapter.as_mut())
    }

    /// `x` `[tokens, hidden]` → the residual stream after the layer, and what the backward pass needs.
    pub(super) fn forward(&self, x: &Tensor, pass: &PassContext<'_>) -> Result<(Tensor, LayerSaved)> {
        let ModelConfig { rms_norm_eps: eps, residual_multiplier, .. } = *pass.config;
        let attention_norm = rms_norm_reference(x, &self.input_layernorm, eps);
        let (q, k, v, [q_saved, k_saved, v_saved]) = self.heads(&attention_norm.y, pass)?;
        let attention = attention_reference(&q, &k, &v, pass.cu_seqlens, pass.config.attention_multiplier);
        let (branch, o_saved) = self.o_proj.forward(&flatten(&attention), pass.dropout, pass.adapted)?;
        let middle = add_scaled(x, &branch, residual_multiplier);
        let mlp_norm = rms_norm_reference(&middle, &self.post_attention_layernorm, eps);
        let (gate, gate_saved) = self.gate_proj.forward(&mlp_norm.y, pass.dropout, pass.adapted)?;
        let (up, up_saved) = self.up_proj.forward(&mlp_norm.y, pass.dropout, pass.adapted)?;
        let (branch, down_saved) =
            self.down_proj.forward(&swiglu_reference(&gate, &up), pass.dropout, pass.adapted)?;
        let y = add_scaled(&middle, &branch, residual_multiplier);
        let lora = [q_saved, k_saved, v_saved, o_saved, gate_saved, up_saved, down_saved];
        let saved = LayerSaved {
            x: x.shallow_clone(),
            attention_norm,
            q,
            k,
            v,
            attention,
            middle,
            mlp_norm,
            gate,
            up,
            lora,
        };
        Ok((y, saved))
    }

    /// Rotated queries and keys, and values, by head.
    fn heads(
        &self,
        normed: &Tensor,
        pass: &PassContext<'_>,
    ) -> Result<(Tensor, Tensor, Tensor, [LoraSaved; 3])> {
        let head_dim = pass.config.head_dim;
        let split = |y: Tensor| y.view([-1, y.size()[1] / head_dim, head_dim]);
        let (q, q_saved) = self.q_proj.forward(normed, pass.dropout, pass.adapted)?;
        let (k, k_saved) = self.k_proj.forward(normed, pass.dropout, pass.adapted)?;
        let (v, v_saved) = self.v_proj.forward(normed, pass.dropout, pass.adapted)?;
        let (q, k) = (pass.angles.rotate(&split(q)), pass.angles.rotate(&split(k)));
        Ok((q, k, split(v), [q_saved, k_saved, v_saved]))
    }

    /// As [`forward`](Self::forward) for the next tokens of some sequences, which lie in `x` as `pass` says; this is layer
    /// `index` of their caches, which take the new keys and values.
    pub(super) fn forward_cached(
        &self,
        x: &Tensor,
        pass: &PassContext<'_>,
        index: usize,
        caches: &[&KvCache],
    ) -> Result<Tensor> {
        let ModelConfig { rms_norm_eps: eps, residual_multiplier, attention_multiplier, .. } = *pass.config;
        let (q, k, v, _) = self.heads(&rms_norm_reference(x, &self.input_layernorm, eps).y, pass)?;
        let attended = caches.iter().zip(pass.cu_seqlens.windows(2)).map(|(cache, bounds)| {
            let [q, k, v] = [&q, &k, &v].map(|x| x.narrow(0, bounds[0], bounds[1] - bounds[0]));
            cache.attend(index, &q, &k, &v, attention_multiplier)
        });
        let o = Tensor::cat(&attended.collect::<Vec<_>>(), 0);
        let (branch, _) = self.o_proj.forward(&flatten(&o), None, pass.adapted)?;
        let middle = add_scaled(x, &branch, residual_multiplier);
        let normed = rms_norm_reference(&middle, &self.post_attention_layernorm, eps).y;
        let (gate, _) = self.gate_proj.forward(&normed, None, pass.adapted)?;
        let (up, _) = self.up_proj.forward(&normed, None, pass.adapted)?;
        let (branch, _) = self.down_proj.forward(&swiglu_reference(&gate, &up), None, pass.adapted)?;
        Ok(add_scaled(&middle, &branch, residual_multiplier))
    }

    /// Gradient of the residual stream after the layer → before it; the adapters' gradients are added into `grads`.
    pub(super) fn backward(
        &self,
        dy: &Tensor,
        saved: &LayerSaved,
        pass: &PassContext<'_>,
        grads: &mut ParamSet,
    ) -> Result<Tensor> {
        let d_middle = self.mlp_backward(dy, saved, pass, grads)?;
        let (dq, dk, dv) = self.attention_backward(&d_middle, saved, pass, grads)?;
        let [q_saved, k_saved, v_saved, ..] = &saved.lora;
        let normed = &saved.attention_norm.y;
        let d_normed = self.q_proj.backward(&dq, normed, q_saved, pass.dropout, grads)?
            + self.k_proj.backward(&dk, normed, k_saved, pass.dropout, grads)?
            + self.v_proj.backward(&dv, normed, v_saved, pass.dropout, grads)?;
        let RmsNormOut { rstd, .. } = &saved.attention_norm;
        Ok(d_middle + rms_norm_backward_reference(&d_normed, &saved.x, &self.input_layernorm, rstd))
    }

    /// As [`backward`](Self::backward) for the first layer, below which nothing learns: no gradient leaves it.
    pub(super) fn backward_first(
        &self,
        dy: &Tensor,
        saved: &LayerSaved,
        pass: &PassContext<'_>,
        grads: &mut ParamSet,
    ) -> Result<()> {
        let d_middle = self.mlp_backward(dy, saved, pass, grads)?;
        let (dq, dk, dv) = self.attention_backward(&d_middle, saved, pass, grads)?;
        let [q_saved, k_saved, v_saved, ..] = &saved.lora;
        let normed = &saved.attention_norm.y;
        self.q_proj.adapter_backward(&dq, normed, q_saved, pass.dropout, grads)?;
        self.k_proj.adapter_backward(&dk, normed, k_saved, pass.dropout, grads)?;
        self.v_proj.adapter_backward(&dv, normed, v_saved, pass.dropout, grads)?;
        Ok(())
    }

    /// From after the layer to between its blocks.
    fn mlp_backward(
        &self,
        dy: &Tensor,
        saved: &LayerSaved,
        pass: &PassContext<'_>,
        grads: &mut ParamSet,
    ) -> Result<Tensor> {
        let [.., gate_saved, up_saved, down_saved] = &saved.lora;
        let d_branch = scaled(dy, pass.config.residual_multiplier);
        // Computed again: keeping it would cost as much as gate or up.
        let activated = swiglu_reference(&saved.gate, &saved.up);
        let d_activated = self.down_proj.backward(&d_branch, &activated, down_saved, pass.dropout, grads)?;
        let (d_gate, d_up) = swiglu_backward_reference(&d_activated, &saved.gate, &saved.up);
        let normed = &saved.mlp_norm.y;
        let d_normed = self.gate_proj.backward(&d_gate, normed, gate_saved, pass.dropout, grads)?
            + self.up_proj.backward(&d_up, normed, up_saved, pass.dropout, grads)?;
        let RmsNormOut { rstd, .. } = &saved.mlp_norm;
        Ok(dy + rms_norm_backward_reference(&d_normed, &saved.middle, &self.post_attention_layernorm, rstd))
    }

    /// From between the blocks to the outputs of the query, key and value projections, `[tokens, out]` each.
    fn attention_backward(
        &self,
        d_middle: &Tensor,
        saved: &LayerSaved,
        pass: &PassContext<'_>,
        grads: &mut ParamSet,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let LayerSaved { q, k, v, attention, .. } = saved;
        let d_branch = scaled(d_middle, pass.config.residual_multiplier);
        let o = flatten(attention);
        let d_o =
            self.o_proj.backward(&d_branch, &o, &saved.lora[3], pass.dropout, grads)?.view_as(attention);
        let scale = pass.config.attention_multiplier;
        let (dq, dk, dv) = attention_backward_reference(&d_o, q, k, v, attention, pass.cu_seqlens, scale);
        let (dq, dk) = (pass.angles.rotate_backward(&dq), pass.angles.rotate_backward(&dk));
        Ok((flatten(&dq), flatten(&dk), flatten(&dv)))
    }
}

/// `[tokens, heads, head_dim]` → `[tokens, heads * head_dim]`.
fn flatten(x: &Tensor) -> Tensor {
    x.reshape([x.size()[0], -1])
}

/// `x + branch · multiplier`: how a branch joins the residual stream.
fn add_scaled(x: &Tensor, branch: &Tensor, multiplier: f64) -> Tensor {
    x + scaled(branch, multiplier)
}

/// The product with one is exact and would only cost a pass.
fn scaled(x: &Tensor, multiplier: f64) -> Tensor {
    if multiplier == 1.0 { x.shallow_clone() } else { x * multiplier }
}
