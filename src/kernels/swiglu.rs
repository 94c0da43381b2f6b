//! SwiGLU (Shazeer 2020): `y = silu(gate) · up`, with `silu(g) = g · σ(g)`.
//!
//! Backward: `dup = dy · silu(gate)`, `dgate = dy · up · σ(gate) · (1 + gate · (1 − σ(gate)))`.
//! Only gate and up are kept; σ is computed again rather than read.

use tch::{Kind, Tensor};

/// `silu(gate) · up`, all `[tokens, inter]`.
pub fn swiglu_reference(gate: &Tensor, up: &Tensor) -> Tensor {
    gate.silu() * up
}

/// Gradients `(dgate, dup)` of [`swiglu_reference`], in the dtype of `dy`.
pub fn swiglu_backward_reference(dy: &Tensor, gate: &Tensor, up: &Tensor) -> (Tensor, Tensor) {
    let kind = dy.kind();
    let (dy, gate, up) = (dy.to_kind(Kind::Float), gate.to_kind(Kind::Float), up.to_kind(Kind::Float));
    let sigmoid = gate.sigmoid();
    let dup = &dy * &gate * &sigmoid;
    let slope: Tensor = (&gate * (1.0 - &sigmoid) + 1.0) * sigmoid;
    let dgate: Tensor = dy * up * slope;
    (dgate.to_kind(kind), dup.to_kind(kind))
}
