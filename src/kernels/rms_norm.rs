//! RMSNorm (Zhang & Sennrich 2019, eq. 4) with a frozen weight.
//!
//! Forward `y = round(x · rstd) · w` with `rstd = 1 / sqrt(mean(x²) + eps)` in f32; the rounding to the
//! dtype of `x` before the weight is where transformers puts it.
//! Backward `dx = rstd · (g − x̂ · mean(g · x̂))` with `g = dy · w`, `x̂ = x · rstd`.

use tch::{Kind, Tensor};

/// What the forward pass leaves behind.
#[derive(Debug)]
pub struct RmsNormOut {
    /// The normalised rows, `[tokens, hidden]` in the dtype of `x`.
    pub y: Tensor,
    /// `1 / rms` of each row, `[tokens, 1]` f32: with `x` all that the backward pass needs.
    pub rstd: Tensor,
}

/// Normalises each row of `x` `[tokens, hidden]` and multiplies by `weight` `[hidden]`.
pub fn rms_norm_reference(x: &Tensor, weight: &Tensor, eps: f64) -> RmsNormOut {
    let wide = x.to_kind(Kind::Float);
    let rstd = (wide.square().mean_dim([-1i64].as_slice(), true, Kind::Float) + eps).rsqrt();
    let y = (wide * &rstd).to_kind(x.kind()) * weight;
    RmsNormOut { y, rstd }
}

/// Gradient of [`rms_norm_reference`] with respect to `x`, in the dtype of `dy`.
pub fn rms_norm_backward_reference(dy: &Tensor, x: &Tensor, weight: &Tensor, rstd: &Tensor) -> Tensor {
    let normed = x.to_kind(Kind::Float) * rstd; // [tokens, hidden] f32
    let g = dy.to_kind(Kind::Float) * weight.to_kind(Kind::Float); // [tokens, hidden] f32
    let along = (&g * &normed).mean_dim([-1i64].as_slice(), true, Kind::Float); // [tokens, 1]
    ((g - normed * along) * rstd).to_kind(dy.kind())
}
