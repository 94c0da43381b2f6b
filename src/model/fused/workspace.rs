//! The memory of a pass, allocated once: what layers keep, and the buffers between them.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::group::GroupName;
use super::plan::Sizes;
use crate::kernels::attention::AttentionScratch;

/// What a layer keeps for its backward pass. Layers that compute a value again share one tensor for it.
#[derive(Debug)]
pub(super) struct Kept {
    /// The residual stream before the layer, `[tokens, hidden]`, and one over its root mean square, `[tokens]`.
    pub(super) x: Tensor,
    pub(super) x_rstd: Tensor,
    /// Rotated queries and keys, and values, side by side, `[tokens, (heads + 2 · kv_heads) · head_dim]`.
    pub(super) qkv: Tensor,
    /// The residual stream between the blocks.
    pub(super) middle: Tensor,
    pub(super) middle_rstd: Tensor,
    /// Gate and up side by side; their gradients afterwards, with room for the adapters' columns.
    pub(super) gate_up: Tensor,
    /// `s · drop(x)·Aᵀ` of the four groups side by side.
    pub(super) xa: Tensor,
    /// `None` where libtorch computes attention and keeps this itself.
    pub(super) attention: Option<KeptAttention>,
}

/// What attention leaves.
#[derive(Debug)]
pub(super) struct KeptAttention {
    /// The output, with room for the columns of the adapters that read it, `[tokens, heads · head_dim + ranks]`.
    pub(super) o: Tensor,
    /// `[heads, tokens]` f32.
    pub(super) lse: Tensor,
}

impl KeptAttention {
    fn shallow_clone(&self) -> Self {
        Self { o: self.o.shallow_clone(), lse: self.lse.shallow_clone() }
    }

    fn empty_like(&self) -> Result<Self> {
        Ok(Self { o: self.o.f_empty_like()?, lse: self.lse.f_empty_like()? })
    }

    /// For the first `tokens`; the log-sum-exp is contiguous.
    fn rows(&self, tokens: i64) -> Self {
        let heads = self.lse.size()[0];
        let lse = self.lse.view([-1]).narrow(0, 0, heads * tokens).view([heads, tokens]);
        Self { o: self.o.narrow(0, 0, tokens), lse }
    }
}

impl Kept {
    fn shallow_clone(&self) -> Self {
        let Self { x, x_rstd, qkv, middle, middle_rstd, gate_up, xa, attention } = self;
        Self {
            x: x.shallow_clone(),
            x_rstd: x_rstd.shallow_clone(),
            qkv: qkv.shallow_clone(),
            middle: middle.shallow_clone(),
            middle_rstd: middle_rstd.shallow_clone(),
            gate_up: gate_up.shallow_clone(),
            xa: xa.shallow_clone(),
            attention: attention.as_ref().map(KeptAttention::shallow_clone),
        }
    }

    /// The first `tokens` rows of each.
    pub(super) fn rows(&self, tokens: i64) -> Self {
        let rows = |tensor: &Tensor| tensor.narrow(0, 0, tokens);
        let Self { x, x_rstd, qkv, middle, middle_rstd, gate_up, xa, attention } = self;
        Self {
            x: rows(x),
            x_rstd: rows(x_rstd),
            qkv: rows(qkv),
            middle: rows(middle),
            middle_rstd: rows(middle_rstd),
            gate_up: rows(gate_up),
            xa: rows(xa),
            attention: attention.as_ref().map(|attention| attention.rows(tokens)),
        }
    }
}

/// All buffers.
#[derive(Debug)]
pub(super) struct Workspace {
    /// One a layer.
    pub(super) kept: Vec<Kept>,
    /// A group's weights with its adapters; empty where weights are resident.
    pub(super) weight: Tensor,
    /// A product's input; a chunk of logits.
    pub(super) input: Tensor,
    /// Gradients inside a layer; the head's rows; a dropped input.
    pub(super) inner: Tensor,
    /// What a block adds to the stream; the gradient of a block's input.
    pub(super) branch: Tensor,
    /// The stream after the layers, `[tokens, hidden]`.
    pub(super) last: Tensor,
    pub(super) last_rstd: Tensor,
    /// Gradient of the stream, with room for adapters' columns.
    pub(super) gradient: Tensor,
    /// What attention's backward pass works in; `None` as in [`Kept`].
    pub(super) attention: Option<AttentionScratch>,
}

impl Workspace {
    pub(super) fn new(sizes: &Sizes, kind: Kind, device: Device) -> Result<Self> {
        let [streams, blocks, gates] = sizes.kept_layers().map(|count| count as usize);
        let values = |shape: &[i64]| Tensor::f_empty(shape, (kind, device));
        let f32 = |shape: &[i64]| Tensor::f_empty(shape, (Kind::Float, device));
        let (tokens, hidden) = (sizes.tokens, sizes.config.hidden_size);
        let mut kept: Vec<Kept> = Vec::new();
        for layer in 0..sizes.config.num_hidden_layers {
            let mut one = match kept.first() {
                Some(first) => first.shallow_clone(),
                None => Kept {
                    x: values(&[tokens, hidden])?,
                    x_rstd: f32(&[tokens])?,
                    qkv: values(&[tokens, sizes.group(GroupName::Qkv).output()])?,
                    middle: values(&[tokens, hidden])?,
                    middle_rstd: f32(&[tokens])?,
                    gate_up: values(&[tokens, sizes.gate_up_columns()])?,
                    xa: values(&[tokens, sizes.adapter_columns()])?,
                    attention: sizes
                        .attends_by_kernels()
                        .then(|| -> Result<KeptAttention> {
                            let lse = f32(&[sizes.attention_shape().heads, tokens])?;
                            Ok(KeptAttention { o: values(&[tokens, sizes.attention_columns()])?, lse })
                        })
                        .transpose()?,
                },
            };
            if layer > 0 && layer < streams {
                one.x = one.x.f_empty_like()?;
                one.x_rstd = one.x_rstd.f_empty_like()?;
            } else if layer >= streams {
                // Slots take turns; where there is but one stream it is the first layer's.
                let slot: &Kept = &kept[layer % streams];
                one.x = slot.x.shallow_clone();
                one.x_rstd = slot.x_rstd.shallow_clone();
            }
            if layer > 0 && layer < blocks {
                one.qkv = one.qkv.f_empty_like()?;
                one.middle = one.middle.f_empty_like()?;
                one.middle_rstd = one.middle_rstd.f_empty_like()?;
                one.xa = one.xa.f_empty_like()?;
                one.attention = one.attention.as_ref().map(KeptAttention::empty_like).transpose()?;
            }
            if layer > 0 && layer < gates {
                one.gate_up = one.gate_up.f_empty_like()?;
            }
            kept.push(one);
        }
        Ok(Self {
            kept,
            weight: values(&[if sizes.layout.resident_weights { 0 } else { sizes.weight_elements() }])?,
            input: values(&[sizes.input_elements()])?,
            inner: values(&[sizes.inner_elements()])?,
            branch: values(&[sizes.branch_elements()])?,
            last: values(&[tokens, hidden])?,
            last_rstd: f32(&[tokens])?,
            gradient: values(&[tokens, sizes.gradient_columns()])?,
            attention: sizes
                .attends_by_kernels()
                .then(|| AttentionScratch::new(sizes.attention_shape(), tokens, sizes.sequences(), device))
                .transpose()?,
        })
    }
}

/// The beginning of a flat buffer as a matrix.
pub(super) fn matrix(buffer: &Tensor, rows: i64, columns: i64) -> Tensor {
    buffer.narrow(0, 0, rows * columns).view([rows, columns])
}
