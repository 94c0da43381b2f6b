//! Rotary position embedding (Su et al. 2021), in the half-split layout of Llama checkpoints:
//! element `i` of a head turns together with element `i + head_dim / 2`.

use tch::{Kind, Tensor};

/// Cosine and sine of each position's angles, shared by all layers and by both passes.
#[derive(Debug)]
pub struct RotaryAngles {
    /// `[tokens, 1, head_dim / 2]` in the activations' dtype.
    cos: Tensor,
    /// As `cos`.
    sin: Tensor,
}

impl RotaryAngles {
    /// Angles `position · theta^(−2i / head_dim)`, computed in f32, for `position_ids` `[tokens]` i64.
    pub fn new(position_ids: &Tensor, head_dim: i64, theta: f64, kind: Kind) -> Self {
        let device = position_ids.device();
        let exponents = Tensor::arange_start_step(0, head_dim, 2, (Kind::Float, device)) / head_dim as f64;
        let inverse_frequencies = Tensor::pow_scalar(theta, &exponents).reciprocal(); // [head_dim / 2] f32
        let angles = position_ids.to_kind(Kind::Float).unsqueeze(-1) * inverse_frequencies;
        let angles = angles.unsqueeze(1); // [tokens, 1, head_dim / 2] f32
        Self { cos: angles.cos().to_kind(kind), sin: angles.sin().to_kind(kind) }
    }

    /// Turns the heads of `x` `[tokens, heads, head_dim]` forward.
    pub fn rotate(&self, x: &Tensor) -> Tensor {
        turn(x, &self.cos, &self.sin)
    }

    /// Turns them back: the gradient of a rotation is the inverse rotation.
    pub fn rotate_backward(&self, dy: &Tensor) -> Tensor {
        turn(dy, &self.cos, &(-&self.sin))
    }
}

fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let halves = x.chunk(2, -1);
    let (first, second) = (&halves[0], &halves[1]); // [tokens, heads, head_dim / 2]
    Tensor::cat(&[first * cos - second * sin, second * cos + first * sin], -1)
}
