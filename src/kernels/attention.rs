//! Exact causal attention with grouped heads over packed sequences: twins, and our kernels where there is a GPU.
//!
//! Forward, per sequence and head: `S = scale · Q·Kᵀ` with −∞ above the diagonal, `P = softmax(S)`, `O = P·V`.
//! Backward (Dao et al. 2022, appendix B.2): with `D = rowsum(dO ∘ O)`,
//! `dV = Pᵀ·dO`, `dS = P ∘ (dO·Vᵀ − D)`, `dQ = scale · dS·K`, `dK = scale · dSᵀ·Q`; `P` is computed again, from the
//! scores and the log-sum-exp of each row.
//!
//! A batch is cut into tiles once ([`AttentionPlan`]); all layers and both passes use them. cuda/include/attention.cuh tells
//! what the kernels of both kinds share: those of Hopper (cuda/attention_hopper_*.cu) and those for every GPU from sm_80
//! on (cuda/attention_{forward,backward}.cu).

#[expect(unsafe_code, reason = "kernel launches")]
mod gpu;
mod lists;
mod order;
mod plan;
mod reference;
mod scratch;
#[expect(unsafe_code, reason = "a call into the driver")]
mod tensor_map;

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use self::gpu::Heads;
pub use self::plan::{AttentionKernel, AttentionPlan, AttentionShape};
pub use self::reference::{
    attention_backward_reference, attention_lse_reference, attention_reference, cached_attention_reference,
};
pub use self::scratch::AttentionScratch;
use super::host::twin_takes;

/// How the parts of the queries' gradient are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accumulation {
    /// In the order of the plan: the same bits every time.
    Ordered,
    /// As they come. For the benchmark alone, so that the price of the order is known.
    Unordered,
}

/// Writes attention of `q` `[tokens, heads, head_dim]` to `k`, `v` `[tokens, kv_heads, head_dim]` to `o`, of the shape of
/// `q`, and each row's natural logarithm of its sum of exponentials to `lse` `[heads, tokens]` f32, contiguous.
///
/// All but `lse` are bf16 views: the heads of a token side by side, tokens any multiple of 8 elements apart, beginning at
/// multiples of 16 bytes. f32 on the CPU goes to the twin.
///
/// # Errors
/// When an operand has another dtype, layout, shape or place than the plan asks for, or the launch is refused.
pub fn attention_into(
    [q, k, v]: [&Tensor; 3],
    plan: &AttentionPlan,
    scale: f64,
    o: &Tensor,
    lse: &Tensor,
) -> Result<()> {
    let AttentionShape { heads, kv_heads, .. } = plan.shape;
    if twin_takes(q) {
        plan.ensure_tokens("q", q)?;
        if plan.tokens() == 0 {
            return Ok(());
        }
        let cu_seqlens = plan.cu_seqlens();
        o.shallow_clone().f_copy_(&attention_reference(q, k, v, cu_seqlens, scale))?;
        return Ok(lse.shallow_clone().f_copy_(&attention_lse_reference(q, k, cu_seqlens, scale))?);
    }
    let of = |name, tensor, heads| Heads::of(name, tensor, plan, heads);
    let [q, o] = [of("q", q, heads)?, of("o", o, heads)?];
    let [k, v] = [of("k", k, kv_heads)?, of("v", v, kv_heads)?];
    ensure_rows("lse", lse, plan)?;
    gpu::forward(plan, [&q, &k, &v], scale, &o, lse)
}

/// Writes the gradients `[dq, dk, dv]` of [`attention_into`], of the shapes of `q`, `k` and `v` and laid out as they may be.
/// `o` and `lse` are what the forward pass wrote, `d_o` is the gradient of `o`.
///
/// # Errors
/// As [`attention_into`], and when memory is short for a batch larger than `scratch` was made for.
#[expect(clippy::too_many_arguments, reason = "operands of a kernel; a struct would only rename them")]
pub fn attention_backward_into(
    d_o: &Tensor,
    qkv: [&Tensor; 3],
    o: &Tensor,
    lse: &Tensor,
    plan: &AttentionPlan,
    scale: f64,
    scratch: &AttentionScratch,
    gradients: [&Tensor; 3],
) -> Result<()> {
    let [q, k, v] = qkv;
    if twin_takes(q) {
        plan.ensure_tokens("q", q)?;
        if plan.tokens() == 0 {
            return Ok(());
        }
        let (dq, dk, dv) = attention_backward_reference(d_o, q, k, v, o, plan.cu_seqlens(), scale);
        for (to, from) in gradients.iter().zip([dq, dk, dv]) {
            to.shallow_clone().f_copy_(&from)?;
        }
        return Ok(());
    }
    let operands = BackwardOperands { d_o, qkv, o, lse, gradients };
    backward(operands, plan, scale, scratch, Accumulation::Ordered)
}

/// Tensors of a backward pass.
#[derive(Debug, Clone, Copy)]
pub struct BackwardOperands<'a> {
    /// Gradient of the output.
    pub d_o: &'a Tensor,
    /// Queries, keys, values.
    pub qkv: [&'a Tensor; 3],
    /// The output.
    pub o: &'a Tensor,
    /// What the forward pass wrote beside it.
    pub lse: &'a Tensor,
    /// Where the gradients of queries, keys and values go.
    pub gradients: [&'a Tensor; 3],
}

/// As [`attention_backward_into`] on a GPU, with parts of the queries' gradient added as asked.
///
/// # Errors
/// As [`attention_backward_into`].
pub fn backward(
    operands: BackwardOperands<'_>,
    plan: &AttentionPlan,
    scale: f64,
    scratch: &AttentionScratch,
    accumulation: Accumulation,
) -> Result<()> {
    let BackwardOperands { d_o, qkv: [q, k, v], o, lse, gradients: [dq, dk, dv] } = operands;
    let AttentionShape { heads, kv_heads, .. } = plan.shape;
    let of = |name, tensor, heads| Heads::of(name, tensor, plan, heads);
    let [q, o, d_o, dq] =
        [("q", q), ("o", o), ("d_o", d_o), ("dq", dq)].map(|(name, tensor)| of(name, tensor, heads));
    let [k, v, dk, dv] =
        [("k", k), ("v", v), ("dk", dk), ("dv", dv)].map(|(name, tensor)| of(name, tensor, kv_heads));
    ensure_rows("lse", lse, plan)?;
    let operands = gpu::Backward {
        q: q?,
        k: k?,
        v: v?,
        o: o?,
        d_o: d_o?,
        dq: dq?,
        dk: dk?,
        dv: dv?,
        lse,
        scale: scale as f32,
    };
    gpu::backward(plan, &operands, scratch, accumulation)
}

/// That a number a head and token is where the kernels expect it.
fn ensure_rows(name: &str, tensor: &Tensor, plan: &AttentionPlan) -> Result<()> {
    let shape = [plan.shape.heads, plan.tokens()];
    ensure!(
        tensor.kind() == Kind::Float && tensor.size() == shape && tensor.is_contiguous(),
        "`{name}` is {:?} {:?} with strides {:?}, expected contiguous Float {shape:?}",
        tensor.kind(),
        tensor.size(),
        tensor.stride()
    );
    plan.ensure_device(name, tensor)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use tch::Device;

    use super::*;

    const SHAPE: AttentionShape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 6 };

    fn randn(heads: i64, tokens: i64) -> Tensor {
        Tensor::randn([tokens, heads, SHAPE.head_dim], (Kind::Float, Device::Cpu))
    }

    #[test]
    fn on_the_processor_the_twins_write_to_views() {
        let plan = AttentionPlan::new(&[0, 5, 5, 12], SHAPE, Device::Cpu).unwrap();
        let [q, k, v, d_o] = [4, 2, 2, 4].map(|heads| randn(heads, 12));
        let rows = Tensor::zeros([12, 8 * 6], (Kind::Float, Device::Cpu));
        let part = |first: i64, heads: i64| rows.narrow(1, first * 6, heads * 6).unflatten(1, [heads, 6]);
        let (o, lse) = (Tensor::zeros_like(&q), Tensor::zeros([4, 12], (Kind::Float, Device::Cpu)));
        attention_into([&q, &k, &v], &plan, 0.3, &o, &lse).unwrap();
        assert!(o.equal(&attention_reference(&q, &k, &v, &[0, 5, 12], 0.3)));
        // The first token of a sequence sees itself alone: its sum is its own exponential.
        let first = (q.get(5).get(3) * k.get(5).get(1)).sum(Kind::Float) * 0.3;
        assert!((lse.get(3).get(5) - first).abs().double_value(&[]) < 1e-6);
        assert!(
            lse.get(3).get(6).double_value(&[])
                > 0.3 * (q.get(6).get(3) * k.get(5).get(1)).sum(Kind::Float).double_value(&[])
        );

        let scratch = AttentionScratch::new(SHAPE, 12, 2, Device::Cpu).unwrap();
        let (dq, dk, dv) = (part(0, 4), part(4, 2), part(6, 2));
        attention_backward_into(&d_o, [&q, &k, &v], &o, &lse, &plan, 0.3, &scratch, [&dq, &dk, &dv]).unwrap();
        let wanted = attention_backward_reference(&d_o, &q, &k, &v, &o, &[0, 5, 12], 0.3);
        assert!(dq.equal(&wanted.0) && dk.equal(&wanted.1) && dv.equal(&wanted.2));
    }

    #[test]
    fn operands_of_another_batch_are_refused() {
        let plan = AttentionPlan::new(&[0, 12], SHAPE, Device::Cpu).unwrap();
        let (q, k) = (randn(4, 11), randn(2, 11));
        let lse = Tensor::zeros([4, 12], (Kind::Float, Device::Cpu));
        let told = attention_into([&q, &k, &k], &plan, 1.0, &q, &lse).unwrap_err().to_string();
        assert_eq!(told, "`q` has 11 tokens, the plan is for 12");
        let half = lse.to_kind(Kind::BFloat16);
        assert!(
            ensure_rows("lse", &half, &plan).unwrap_err().to_string().contains("contiguous Float [4, 12]")
        );
        assert!(ensure_rows("lse", &lse.transpose(0, 1), &plan).is_err());
        ensure_rows("lse", &lse, &plan).unwrap();
        let bf16 = Tensor::zeros([12, 4, 6], (Kind::BFloat16, Device::Cpu));
        assert!(
            attention_into([&bf16, &bf16, &bf16], &plan, 1.0, &bf16, &lse).is_err(),
            "no kernel on the processor"
        );
    }
}
