//! Attention on a GPU by libtorch's best, for heads that our kernels do not take: cuDNN where all sequences are equally long,
//! else FlashAttention-2, packed. The benchmark measures ours against it.
//!
//! What it computes is told in [`super::attention`], whose functions are the twins, and the CPU path.

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use super::attention::{Accumulation, attention_backward_reference, attention_reference};
use super::bridge::{self, Kept};

/// How a batch's tokens fall into sequences; made once a batch, used by all layers and both passes.
#[derive(Debug)]
pub struct Packing {
    /// `[seqs + 1]` i32 on the GPU.
    cu_seqlens: Tensor,
    longest: i64,
    /// How many sequences, where all are equally long.
    equal: Option<i64>,
    /// `cu_seqlens` as it came.
    on_host: Vec<i64>,
}

impl Packing {
    /// From `cu_seqlens` `[seqs + 1]`, which ascends from 0.
    ///
    /// # Errors
    /// When there is no sequence, or libtorch fails.
    pub fn new(cu_seqlens: &[i64], device: Device) -> Result<Self> {
        let lengths = || cu_seqlens.windows(2).map(|pair| pair[1] - pair[0]);
        let longest = lengths().max().unwrap_or(0);
        ensure!(longest > 0, "the batch is empty");
        let equal = lengths().all(|length| length == longest).then_some(cu_seqlens.len() as i64 - 1);
        let on_device = Tensor::f_from_slice(cu_seqlens)?.f_to_kind(Kind::Int)?.f_to_device(device)?;
        Ok(Self { cu_seqlens: on_device, longest, equal, on_host: cu_seqlens.to_vec() })
    }

    /// The same sequences for FlashAttention-2, however long they are.
    pub fn for_flash(self) -> Self {
        Self { equal: None, ..self }
    }
}

/// What the backward pass needs.
#[derive(Debug)]
pub struct AttentionKept(Kept);

impl AttentionKept {
    /// The output, `[tokens, heads, head_dim]`.
    pub fn o(&self) -> &Tensor {
        &self.0[0]
    }
}

/// Causal attention of `q` `[tokens, heads, head_dim]` to `k`, `v` `[tokens, kv_heads, head_dim]`, bf16, contiguous in the
/// last dimension.
///
/// # Errors
/// When libtorch has no kernel for these shapes on this GPU.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, packing: &Packing, scale: f64) -> Result<AttentionKept> {
    if !q.device().is_cuda() {
        let o = attention_reference(q, k, v, &packing.on_host, scale);
        return Ok(AttentionKept([o, Tensor::new(), Tensor::new(), Tensor::new()]));
    }
    let kept = match packing.equal {
        Some(batch) => bridge::cudnn_attention([q, k, v], batch, scale)?,
        None => bridge::flash_attention([q, k, v], &packing.cu_seqlens, packing.longest, scale)?,
    };
    Ok(AttentionKept(kept))
}

/// Gradients `[dq, dk, dv]` of [`attention`], the same bits every time.
///
/// # Errors
/// As [`attention`].
pub fn attention_backward(
    d_o: &Tensor,
    qkv: [&Tensor; 3],
    kept: &AttentionKept,
    packing: &Packing,
    scale: f64,
) -> Result<[Tensor; 3]> {
    backward(d_o, qkv, kept, packing, scale, Accumulation::Ordered)
}

/// As [`attention_backward`], with sums added as asked.
///
/// # Errors
/// As [`attention`].
pub fn backward(
    d_o: &Tensor,
    [q, k, v]: [&Tensor; 3],
    kept: &AttentionKept,
    packing: &Packing,
    scale: f64,
    accumulation: Accumulation,
) -> Result<[Tensor; 3]> {
    let same_bits = accumulation == Accumulation::Ordered;
    if !q.device().is_cuda() {
        let (dq, dk, dv) = attention_backward_reference(d_o, q, k, v, kept.o(), &packing.on_host, scale);
        return Ok([dq, dk, dv]);
    }
    match packing.equal {
        Some(batch) => bridge::cudnn_attention_backward(d_o, [q, k, v], &kept.0, batch, scale, same_bits),
        None => bridge::flash_attention_backward(
            d_o,
            [q, k, v],
            &kept.0,
            &packing.cu_seqlens,
            packing.longest,
            scale,
            same_bits,
        ),
    }
}
