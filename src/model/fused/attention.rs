//! Attention inside the passes: by our kernels, into the workspace, or by libtorch where the heads are of another size.

use anyhow::{Context as _, Result};
use tch::{Device, Tensor};

use super::Fused;
use super::group::GroupName;
use super::pass::Pass;
use super::plan::Sizes;
use super::workspace::{Kept, KeptAttention};
use crate::kernels::attention::{AttentionPlan, AttentionShape, attention_backward_into, attention_into};
use crate::kernels::fused_attention::{self, AttentionKept, Packing};

/// A batch's sequences as attention takes them.
pub(super) enum Packed {
    Ours(AttentionPlan),
    Libtorch(Packing),
}

impl Packed {
    pub(super) fn new(sizes: &Sizes, cu_seqlens: &[i64], device: Device) -> Result<Self> {
        if sizes.attends_by_kernels() {
            let plan = AttentionPlan::new(cu_seqlens, sizes.attention_shape(), device)?;
            return Ok(Self::Ours(plan));
        }
        Ok(Self::Libtorch(Packing::new(cu_seqlens, device)?))
    }
}

/// What attention keeps of a layer beside the workspace.
pub(super) enum Attended {
    /// Nothing.
    Ours,
    Libtorch(AttentionKept),
}

impl Attended {
    /// The output, `[tokens, heads · head_dim]`.
    pub(super) fn o(&self, kept: &Kept, width: i64) -> Result<Tensor> {
        match self {
            Self::Ours => Ok(output(in_workspace(kept)?, width)),
            Self::Libtorch(attended) => Ok(flat(attended.o())),
        }
    }
}

impl Fused {
    /// From rotated queries and keys, and values, to the input of the output's projection, `[tokens, in + ranks]`.
    pub(super) fn attention(&self, kept: &Kept, pass: &Pass<'_>) -> Result<(Tensor, Attended)> {
        let scale = pass.frozen.config.attention_multiplier;
        let [q, k, v] = self.heads(&kept.qkv);
        match &pass.packed {
            Packed::Ours(plan) => {
                let to = in_workspace(kept)?;
                let o = self.by_head(&output(to, self.attention_width()));
                attention_into([&q, &k, &v], plan, scale, &o, &to.lse)?;
                self.clock.mark("attention")?;
                Ok((to.o.shallow_clone(), Attended::Ours))
            }
            Packed::Libtorch(packing) => {
                let attended = fused_attention::attention(&q, &k, &v, packing, scale)?;
                self.clock.mark("attention")?;
                let group = self.sizes.group(GroupName::O);
                let input = self.input_of(group, pass.tokens);
                input.narrow(1, 0, group.input).f_copy_(&flat(attended.o()))?;
                self.clock.mark("copies")?;
                Ok((input, Attended::Libtorch(attended)))
            }
        }
    }

    /// From the gradient of attention's output, `[tokens, heads · head_dim]`, to those of queries, keys and values, side by
    /// side in `to`.
    pub(super) fn attention_backward(
        &self,
        d_o: &Tensor,
        attended: Attended,
        kept: &Kept,
        to: &Tensor,
        pass: &Pass<'_>,
    ) -> Result<()> {
        let scale = pass.frozen.config.attention_multiplier;
        let ([q, k, v], gradients) = (self.heads(&kept.qkv), self.heads(to));
        let d_o = self.by_head(d_o);
        match (&pass.packed, attended) {
            (Packed::Ours(plan), _) => {
                let from = in_workspace(kept)?;
                let o = self.by_head(&output(from, self.attention_width()));
                let scratch =
                    self.workspace.attention.as_ref().context("attention has no memory to work in")?;
                let gradients = gradients.each_ref();
                attention_backward_into(&d_o, [&q, &k, &v], &o, &from.lse, plan, scale, scratch, gradients)?;
                self.clock.mark("attention")
            }
            (Packed::Libtorch(packing), Attended::Libtorch(attended)) => {
                let found =
                    fused_attention::attention_backward(&d_o, [&q, &k, &v], &attended, packing, scale)?;
                self.clock.mark("attention")?;
                for (to, from) in gradients.iter().zip(&found) {
                    to.shallow_clone().f_copy_(from)?;
                }
                self.clock.mark("copies")
            }
            (Packed::Libtorch(_), Attended::Ours) => {
                anyhow::bail!("a layer kept nothing of its attention")
            }
        }
    }

    /// Columns of attention's output.
    fn attention_width(&self) -> i64 {
        self.sizes.group(GroupName::O).input
    }

    /// Queries, keys and values of packed rows, `[tokens, heads, head_dim]` each.
    fn heads(&self, rows: &Tensor) -> [Tensor; 3] {
        let AttentionShape { heads, kv_heads, head_dim } = self.sizes.attention_shape();
        [(0, heads), (heads, kv_heads), (heads + kv_heads, kv_heads)]
            .map(|(first, count)| self.by_head(&rows.narrow(1, first * head_dim, count * head_dim)))
    }

    /// `[tokens, heads · head_dim]` → `[tokens, heads, head_dim]`.
    fn by_head(&self, rows: &Tensor) -> Tensor {
        let head_dim = self.sizes.attention_shape().head_dim;
        rows.unflatten(1, [rows.size()[1] / head_dim, head_dim])
    }
}

fn in_workspace(kept: &Kept) -> Result<&KeptAttention> {
    kept.attention.as_ref().context("a layer has no room for its attention")
}

/// Without the adapters' columns.
fn output(attention: &KeptAttention, width: i64) -> Tensor {
    attention.o.narrow(1, 0, width)
}

/// `[tokens, heads, head_dim]` → `[tokens, heads · head_dim]`.
fn flat(x: &Tensor) -> Tensor {
    x.reshape([x.size()[0], -1])
}
