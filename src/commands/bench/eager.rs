//! What an attention takes that writes its scores out, in the way of transformers' eager one: scores in bf16, the mask added,
//! softmax in f32, probabilities in bf16, gradients by autograd.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::kernels::attention::AttentionShape;
use crate::kernels::bridge;

/// Tokens of the sequence at which it is measured: enough that scores are nearly all of it.
const LENGTH: i64 = 2048;

/// Bytes at most beside operands and their gradients, over the scores, forward and backward.
///
/// # Errors
/// When the GPU has not the memory.
pub(super) fn bytes_per_score(shape: AttentionShape, device: Device) -> Result<f64> {
    let AttentionShape { heads, head_dim, .. } = shape;
    let operand = || Tensor::f_randn([heads, LENGTH, head_dim], (Kind::BFloat16, device));
    // Their gradients come on top of them, as the output and its gradient do; they are counted off below.
    let [q, k, v] = [operand()?, operand()?, operand()?].map(|x| x.set_requires_grad(true));
    let mask = Tensor::f_full([LENGTH, LENGTH], f64::NEG_INFINITY, (Kind::BFloat16, device))?.f_triu(1)?;
    let before = bridge::memory(device)?.allocated;
    bridge::reset_peak(device)?;
    let scores = (q.f_bmm(&k.f_transpose(1, 2)?)? * (head_dim as f64).powf(-0.5)).f_add(&mask)?;
    let probabilities = scores.f_softmax(-1, Kind::Float)?.f_to_kind(Kind::BFloat16)?;
    probabilities.f_bmm(&v)?.f_sum(Kind::Float)?.f_backward()?;
    let operands = 5 * heads * LENGTH * head_dim * 2;
    let beside = bridge::memory(device)?.allocated_peak - before - operands;
    Ok(beside as f64 / (heads * LENGTH * LENGTH) as f64)
}
