//! A frozen linear weight with an optional LoRA adapter (Hu et al. 2021), forward and backward.
//!
//! Forward `y = x·Wᵀ + s · drop(x)·Aᵀ·Bᵀ`.
//! Backward `dB += s · dyᵀ·(drop(x)·Aᵀ)`, `dA += s · (dy·B)ᵀ·drop(x)`, `dx = dy·W + drop'(s · dy·B·A)`.

use anyhow::Result;
use tch::{Kind, Tensor};

use super::params::ParamSet;
use crate::kernels::dropout::{DropoutKey, dropout};
use crate::kernels::nf4::Nf4Weight;

/// A frozen weight `[out, in]`.
#[derive(Debug)]
pub enum BaseWeight {
    /// In 4 bits, dequantised at every use.
    Nf4(Nf4Weight),
    /// Ready for products, in the activations' dtype.
    Dense(Tensor),
}

impl BaseWeight {
    /// The weight for a product, `[out, in]`.
    pub fn dense(&self, kind: Kind) -> Tensor {
        match self {
            Self::Nf4(weight) => weight.dequantize(kind),
            Self::Dense(weight) => weight.to_kind(kind),
        }
    }
}

/// The adapter of one projection: where it lies in the [`ParamSet`], and its copies for products.
#[derive(Debug)]
pub struct Adapter {
    pub(super) a_slot: usize,
    pub(super) b_slot: usize,
    /// `[rank, in]` in the activations' dtype, or in f32.
    pub(super) a: Tensor,
    /// `[out, rank]`, as `a`.
    pub(super) b: Tensor,
    pub(super) scale: f64,
    pub(super) dropout: f64,
}

impl Adapter {
    /// The adapter whose parameters are the slots `a_slot` and `b_slot`; `copies` holds all parameters for products.
    pub(super) fn new(
        params: &ParamSet,
        copies: &Tensor,
        (a_slot, b_slot): (usize, usize),
        scale: f64,
        dropout: f64,
    ) -> Self {
        let [a, b] = [a_slot, b_slot].map(|slot| params.view_of(copies, slot));
        Self { a_slot, b_slot, a, b, scale, dropout }
    }

    /// Takes another allocation for products.
    pub(super) fn take_copies(&mut self, params: &ParamSet, copies: &Tensor) {
        (self.a, self.b) = (params.view_of(copies, self.a_slot), params.view_of(copies, self.b_slot));
    }

    /// `s · B · A`, `[out, in]` f32.
    pub(super) fn delta(&self) -> Tensor {
        self.b.to_kind(Kind::Float).matmul(&self.a.to_kind(Kind::Float)) * self.scale
    }

    /// `x·Wᵀ + s · xa·Bᵀ`, `[tokens, out]`.
    ///
    /// In 16 bits as one product over `in + rank` columns: the sum is then rounded once. Added afterwards, an update
    /// smaller than half a unit in the last place of `x·Wᵀ` would vanish, and young adapters are all that small.
    fn joined(&self, x: &Tensor, weight: &Tensor, xa: &Tensor) -> Tensor {
        let xa = xa * self.scale;
        let b = self.b.to_kind(x.kind());
        if x.kind() == Kind::Float {
            return x.matmul(&weight.tr()) + xa.matmul(&b.tr());
        }
        Tensor::cat(&[x, &xa], 1).matmul(&Tensor::cat(&[weight, &b], 1).tr())
    }

    fn dropped(&self, x: &Tensor, key: Option<DropoutKey>) -> Result<Tensor> {
        match key {
            Some(key) if self.dropout > 0.0 => dropout(x, self.dropout, key),
            _ => Ok(x.shallow_clone()),
        }
    }
}

/// A projection of a layer.
#[derive(Debug)]
pub struct LoraLinear {
    pub(super) base: BaseWeight,
    pub(super) adapter: Option<Adapter>,
    /// Names the projection in dropout keys.
    pub(super) module: u32,
}

/// What a projection's forward pass leaves behind beside its input.
#[derive(Debug, Default)]
pub struct LoraSaved {
    /// `drop(x)·Aᵀ`, `[tokens, rank]`.
    xa: Option<Tensor>,
}

/// Which dropout masks a pass uses; without one (evaluation) nothing is dropped.
#[derive(Debug, Clone, Copy)]
pub struct DropoutStep {
    /// Seed of the run.
    pub seed: u64,
    /// Counter of the micro-batch.
    pub microbatch: u64,
}

impl LoraLinear {
    /// Names the projection's mask in a micro-batch.
    pub(super) fn key(&self, step: Option<DropoutStep>) -> Option<DropoutKey> {
        step.map(|DropoutStep { seed, microbatch }| DropoutKey { seed, microbatch, module: self.module })
    }

    /// `[tokens, in]` → `[tokens, out]`.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        step: Option<DropoutStep>,
        adapted: bool,
    ) -> Result<(Tensor, LoraSaved)> {
        let weight = self.base.dense(x.kind());
        let Some(adapter) = self.adapter.as_ref().filter(|_| adapted) else {
            return Ok((x.matmul(&weight.tr()), LoraSaved::default()));
        };
        let xa = adapter.dropped(x, self.key(step))?.matmul(&adapter.a.to_kind(x.kind()).tr()); // [tokens, rank]
        let y = adapter.joined(x, &weight, &xa);
        Ok((y, LoraSaved { xa: Some(xa) }))
    }

    /// `[tokens, out]` → `[tokens, in]`; the adapter's gradients are added into `grads`.
    pub(super) fn backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        saved: &LoraSaved,
        step: Option<DropoutStep>,
        grads: &mut ParamSet,
    ) -> Result<Tensor> {
        let dx = dy.matmul(&self.base.dense(dy.kind()));
        match self.adapter_backward(dy, x, saved, step, grads)? {
            Some(through_adapter) => Ok(dx + through_adapter),
            None => Ok(dx),
        }
    }

    /// Only the adapter's gradients and its part of `dx`: all there is to do where nothing below learns.
    pub(super) fn adapter_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        saved: &LoraSaved,
        step: Option<DropoutStep>,
        grads: &mut ParamSet,
    ) -> Result<Option<Tensor>> {
        let (Some(adapter), Some(xa)) = (&self.adapter, &saved.xa) else { return Ok(None) };
        let key = self.key(step);
        let dyb = dy.matmul(&adapter.b.to_kind(dy.kind())) * adapter.scale; // [tokens, rank]
        let d_b = dy.tr().matmul(xa) * adapter.scale; // [out, rank]
        let d_a = dyb.tr().matmul(&adapter.dropped(x, key)?); // [rank, in]
        add_into(grads, adapter.b_slot, &d_b);
        add_into(grads, adapter.a_slot, &d_a);
        // The mask and its scale are the same linear map in both directions.
        Ok(Some(adapter.dropped(&dyb.matmul(&adapter.a.to_kind(dy.kind())), key)?))
    }
}

fn add_into(grads: &mut ParamSet, slot: usize, gradient: &Tensor) {
    let mut sum = grads.view(slot);
    sum += gradient.to_kind(Kind::Float);
}
