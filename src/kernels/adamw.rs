//! AdamW (Loshchilov & Hutter 2019) over flat parameters, with 32-bit moments or with 8-bit blockwise ones (Dettmers et al.
//! 2022), and the norm by which gradients are clipped.
//!
//! ```text
//! g' = g · min(1, max_norm / (norm + 1e-6))
//! m' = β1·m + (1-β1)·g'        v' = β2·v + (1-β2)·g'²
//! p' = p · (1 - lr·decay) - (lr / correction1) · m' / (√v' / correction2 + eps)
//! ```
//!
//! A moment in 8 bits is kept in blocks of 256 as bitsandbytes keeps it: the largest magnitude of the block, and for each
//! element the nearest level of the dynamic code, signed for the first moment and unsigned for the second. The update
//! uses the moments before they are rounded. As in bitsandbytes' CPU form (and in torch) weights decay before the
//! update, and zero is a level, so no moment changes its sign; its CUDA kernel goes further and moves negative moments that round to zero
//! to the level below.
//!
//! On a GPU these are kernels of ours (`cuda/adamw.cu`); the functions `*_reference` are their twins in tensor operations, and
//! what runs on the CPU. Gradients whose norm is not finite change nothing.

#[expect(unsafe_code, reason = "kernel launches")]
mod gpu;

use anyhow::{Result, ensure};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::bridge;
use super::dynamic_map::dynamic_map;
use super::host;

/// Elements that share the scale of an 8-bit moment.
pub const BLOCK: i64 = 256;

/// Elements of the scratch that [`norm_squared`] needs.
pub const GRAD_PARTIALS: i64 = 1024;

/// What an update depends on beside tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay; the learning rate scales it.
    pub weight_decay: f64,
    /// `1 - β1^t` at step `t` from 1 on.
    pub correction1: f64,
    /// `√(1 - β2^t)`.
    pub correction2: f64,
    /// Gradients are scaled down to this norm; 0 leaves them as they are.
    pub max_norm: f64,
}

/// A moment in 8 bits: codes `[n]` u8 and scales `[ceil(n / 256)]` f32.
pub type Coded<'a> = (&'a Tensor, &'a Tensor);

/// A moment of zeros in 8 bits, `[len]`.
pub fn zero_codes(len: i64, signed: bool, device: Device) -> (Tensor, Tensor) {
    let zero = if signed { 127 } else { 0 };
    (Tensor::full([len], zero, (Kind::Uint8, device)), Tensor::zeros([blocks_of(len)], (Kind::Float, device)))
}

/// Blocks of a moment of `len` elements.
pub fn blocks_of(len: i64) -> i64 {
    (len + BLOCK - 1).div_euclid(BLOCK)
}

/// Writes the sum of the squares of `gradients` (`[n]` f32) to `out` (`[1]` f64), added up in f64 in an order that is always
/// the same on a device. `partials` (`[GRAD_PARTIALS]` f64) is scratch. Nothing is read back.
///
/// # Errors
/// When a tensor is of another shape, dtype or device, or the driver fails.
pub fn norm_squared(gradients: &Tensor, partials: &Tensor, out: &Tensor) -> Result<()> {
    let device = gradients.device();
    let len = gradients.numel() as i64;
    check("gradients", gradients, Kind::Float, len, device)?;
    check("partials", partials, Kind::Double, GRAD_PARTIALS, device)?;
    check("norm_squared", out, Kind::Double, 1, device)?;
    if device.is_cuda() {
        return gpu::norm_squared(gradients, partials, out);
    }
    let _ = out.shallow_clone().f_fill_(sum_of_squares(host::slice::<f32>(gradients)?))?;
    Ok(())
}

/// In pieces of a fixed length, so that the sum is the same on any number of cores.
fn sum_of_squares(values: &[f32]) -> f64 {
    let square = |value: &f32| f64::from(*value) * f64::from(*value);
    let pieces: Vec<f64> = values.par_chunks(1 << 14).map(|piece| piece.iter().map(square).sum()).collect();
    pieces.iter().sum()
}

/// One update of `p` (`[n]` f32) by the gradient `g` (`[n]` f32) with 8-bit moments `m` and `v`, whose blocks count from the first
/// element; `copy` (`[n]` bf16) takes the rounded parameters. `norm_squared` (`[1]` f64) is what gradients are clipped by;
/// where it is not finite nothing changes. With the gradient on a GPU, `p`, `copy` and the moments may also lie in pinned host
/// memory ([`bridge::pinned`](super::bridge::pinned)): slower, but no GPU memory.
///
/// # Errors
/// When a tensor is of another shape, dtype or device or not contiguous, or the driver fails.
pub fn adamw_8bit(
    p: &Tensor,
    copy: Option<&Tensor>,
    g: &Tensor,
    m: Coded<'_>,
    v: Coded<'_>,
    norm_squared: &Tensor,
    step: &AdamWStep,
) -> Result<()> {
    if !g.device().is_cuda() {
        return adamw_8bit_reference(p, copy, g, m, v, norm_squared, step);
    }
    check_8bit(p, copy, g, [m, v], norm_squared)?;
    gpu::adamw_8bit(p, copy, g, m, v, norm_squared, step)
}

/// As [`adamw_8bit`], with moments in f32 (`[n]`).
///
/// # Errors
/// As [`adamw_8bit`].
pub fn adamw_32bit(
    p: &Tensor,
    copy: Option<&Tensor>,
    g: &Tensor,
    m: &Tensor,
    v: &Tensor,
    norm_squared: &Tensor,
    step: &AdamWStep,
) -> Result<()> {
    if !g.device().is_cuda() {
        return adamw_32bit_reference(p, copy, g, m, v, norm_squared, step);
    }
    check_32bit(p, copy, g, [m, v], norm_squared)?;
    gpu::adamw_32bit(p, copy, g, m, v, norm_squared, step)
}

/// The twin of [`adamw_8bit`], on any device.
///
/// # Errors
/// As [`adamw_8bit`].
pub fn adamw_8bit_reference(
    p: &Tensor,
    copy: Option<&Tensor>,
    g: &Tensor,
    m: Coded<'_>,
    v: Coded<'_>,
    norm_squared: &Tensor,
    step: &AdamWStep,
) -> Result<()> {
    check_8bit(p, copy, g, [m, v], norm_squared)?;
    let Some(g) = clipped(g, norm_squared, step.max_norm) else { return Ok(()) };
    let codes = [true, false].map(|signed| Code::new(signed, p.device()));
    let moments = step.advance(&codes[0].decode(m), &codes[1].decode(v), &g);
    step.apply(p, copy, &moments);
    codes[0].encode(&moments.0, m);
    codes[1].encode(&moments.1, v);
    Ok(())
}

/// The twin of [`adamw_32bit`], on any device.
///
/// # Errors
/// As [`adamw_8bit`].
pub fn adamw_32bit_reference(
    p: &Tensor,
    copy: Option<&Tensor>,
    g: &Tensor,
    m: &Tensor,
    v: &Tensor,
    norm_squared: &Tensor,
    step: &AdamWStep,
) -> Result<()> {
    check_32bit(p, copy, g, [m, v], norm_squared)?;
    let Some(g) = clipped(g, norm_squared, step.max_norm) else { return Ok(()) };
    let moments = step.advance(m, v, &g);
    step.apply(p, copy, &moments);
    m.shallow_clone().copy_(&moments.0);
    v.shallow_clone().copy_(&moments.1);
    Ok(())
}

/// `g` scaled as `torch.nn.utils.clip_grad_norm_` scales it; `None` when the norm is not finite.
fn clipped(g: &Tensor, norm_squared: &Tensor, max_norm: f64) -> Option<Tensor> {
    let squared = norm_squared.double_value(&[0]);
    let factor = max_norm / (squared.sqrt() + 1e-6);
    let scaled = || if max_norm > 0.0 && factor < 1.0 { g * factor } else { g.shallow_clone() };
    squared.is_finite().then(scaled)
}

impl AdamWStep {
    /// Both moments after `g`.
    fn advance(&self, m: &Tensor, v: &Tensor, g: &Tensor) -> (Tensor, Tensor) {
        (m.lerp(g, 1.0 - self.beta1), v * self.beta2 + g.square() * (1.0 - self.beta2))
    }

    fn apply(&self, p: &Tensor, copy: Option<&Tensor>, (m, v): &(Tensor, Tensor)) {
        let mut p = p.shallow_clone();
        let denominator = v.sqrt() / self.correction2 + self.eps;
        let _ = p.g_mul_scalar_(1.0 - self.lr * self.weight_decay);
        p -= m / denominator * (self.lr / self.correction1);
        if let Some(copy) = copy {
            copy.shallow_clone().copy_(&p);
        }
    }
}

/// A code's 256 levels and the midpoints between them.
struct Code {
    levels: Tensor,
    midpoints: Tensor,
}

impl Code {
    fn new(signed: bool, device: Device) -> Self {
        let levels = Tensor::from_slice(&dynamic_map(signed)).to_device(device);
        let midpoints = (levels.narrow(0, 0, 255) + levels.narrow(0, 1, 255)) / 2.0;
        Self { levels, midpoints }
    }

    /// The moment in f32, `[n]`.
    fn decode(&self, (codes, absmax): Coded<'_>) -> Tensor {
        let levels = self.levels.index_select(0, &codes.to_kind(Kind::Int64));
        unblock(&(blocks(&levels) * absmax.unsqueeze(1)), codes.size()[0])
    }

    fn encode(&self, moment: &Tensor, (codes, absmax): Coded<'_>) {
        let blocked = blocks(moment); // [blocks, 256]
        let scale = blocked.abs().amax([1i64].as_slice(), true); // [blocks, 1]
        // A block of zeros has no scale; any positive divisor gives the code of zero.
        let divisor = scale.where_self(&scale.gt(0.0), &scale.ones_like());
        let normed = unblock(&(blocked / divisor), moment.size()[0]);
        codes.shallow_clone().copy_(&self.nearest(&normed));
        absmax.shallow_clone().copy_(&scale.squeeze_dim(1));
    }

    /// The code nearest to each of `normed` in [-1, 1], the lower one of two as near.
    fn nearest(&self, normed: &Tensor) -> Tensor {
        normed.bucketize(&self.midpoints, false, false).to_kind(Kind::Uint8)
    }
}

/// `[n]` → `[ceil(n / 256), 256]`, padded with zeros.
fn blocks(flat: &Tensor) -> Tensor {
    let missing = blocks_of(flat.size()[0]) * BLOCK - flat.size()[0];
    let padded = if missing == 0 { flat.shallow_clone() } else { flat.constant_pad_nd([0, missing]) };
    padded.view([-1, BLOCK])
}

/// The first `len` elements of blocks.
fn unblock(blocked: &Tensor, len: i64) -> Tensor {
    blocked.reshape([-1]).narrow(0, 0, len)
}

fn check_8bit(
    p: &Tensor,
    copy: Option<&Tensor>,
    g: &Tensor,
    moments: [Coded<'_>; 2],
    norm_squared: &Tensor,
) -> Result<()> {
    let (len, device) = check_common(p, copy, g, norm_squared)?;
    for (codes, absmax) in moments {
        check("a moment's codes", codes, Kind::Uint8, len, reach(codes, device)?)?;
        check("a moment's scales", absmax, Kind::Float, blocks_of(len), reach(absmax, device)?)?;
    }
    Ok(())
}

/// Where an operand but the gradient may lie: on the device, or, for a GPU's kernels, in the host's pinned memory.
fn reach(operand: &Tensor, device: Device) -> Result<Device> {
    let on_host = device.is_cuda() && operand.device() == Device::Cpu && bridge::is_pinned(operand)?;
    Ok(if on_host { Device::Cpu } else { device })
}

fn check_32bit(
    p: &Tensor,
    copy: Option<&Tensor>,
    g: &Tensor,
    moments: [&Tensor; 2],
    norm_squared: &Tensor,
) -> Result<()> {
    let (len, device) = check_common(p, copy, g, norm_squared)?;
    moments
        .into_iter()
        .try_for_each(|moment| check("a moment", moment, Kind::Float, len, reach(moment, device)?))
}

fn check_common(
    p: &Tensor,
    copy: Option<&Tensor>,
    g: &Tensor,
    norm_squared: &Tensor,
) -> Result<(i64, Device)> {
    let (len, device) = (p.numel() as i64, g.device());
    check("the parameters", p, Kind::Float, len, reach(p, device)?)?;
    check("the gradient", g, Kind::Float, len, device)?;
    check("the norm", norm_squared, Kind::Double, 1, device)?;
    if let Some(copy) = copy {
        check("the rounded parameters", copy, Kind::BFloat16, len, reach(copy, device)?)?;
    }
    Ok((len, device))
}

fn check(what: &str, tensor: &Tensor, kind: Kind, len: i64, device: Device) -> Result<()> {
    ensure!(
        tensor.kind() == kind
            && tensor.size() == [len]
            && tensor.device() == device
            && tensor.is_contiguous(),
        "AdamW: {what}: {:?} {:?} on {:?}, expected {kind:?} [{len}] on {device:?}, contiguous",
        tensor.kind(),
        tensor.size(),
        tensor.device()
    );
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    const CPU: Device = Device::Cpu;

    const STEP: AdamWStep = AdamWStep {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.05,
        correction1: 0.1,
        correction2: 0.1,
        max_norm: 0.0,
    };

    fn floats(len: i64) -> Tensor {
        Tensor::randn([len], (Kind::Float, CPU))
    }

    fn scalar(value: f64) -> Tensor {
        Tensor::from_slice(&[value])
    }

    #[test]
    fn the_norm_is_added_up_in_f64() {
        let partials = Tensor::zeros([GRAD_PARTIALS], (Kind::Double, CPU));
        for len in [0, 1, 1000, 50_001] {
            let (g, out) = (floats(len) * 1e20, scalar(f64::NAN));
            norm_squared(&g, &partials, &out).unwrap();
            let wanted = g.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]);
            assert!((out.double_value(&[0]) - wanted).abs() <= 1e-12 * wanted, "{len}");
        }
    }

    #[test]
    fn a_moment_of_zeros_is_coded_as_zero() {
        for signed in [true, false] {
            let (codes, absmax) = zero_codes(300, signed, CPU);
            let (found, scales) = (codes.zeros_like(), absmax.ones_like());
            Code::new(signed, CPU).encode(&floats(300).zeros_like(), (&found, &scales));
            assert!(found.equal(&codes) && scales.equal(&absmax), "{signed}");
        }
    }

    #[test]
    fn clipping_equals_scaled_gradients() {
        let (g, norm) = (floats(600), 30.0f64);
        let run = |g: &Tensor, max_norm: f64| {
            let (p, m, v) = (floats(600).ones_like(), floats(600).zeros_like(), floats(600).zeros_like());
            let step = AdamWStep { max_norm, ..STEP };
            adamw_32bit(&p, None, g, &m, &v, &scalar(norm * norm), &step).unwrap();
            (p, m, v)
        };
        let (clipped, scaled) = (run(&g, 7.5), run(&(&g * (7.5 / (norm + 1e-6))), 0.0));
        assert!(clipped.0.equal(&scaled.0) && clipped.1.equal(&scaled.1) && clipped.2.equal(&scaled.2));
        assert!(run(&g, 31.0).0.equal(&run(&g, 0.0).0));
    }

    #[test]
    fn gradients_that_are_no_numbers_change_nothing() {
        let (p, g, m, v) = (floats(5), floats(5), floats(5), floats(5).abs());
        let before = [&p, &m, &v].map(Tensor::copy);
        for norm in [f64::NAN, f64::INFINITY] {
            adamw_32bit(&p, None, &g, &m, &v, &scalar(norm), &STEP).unwrap();
            assert!([&p, &m, &v].into_iter().zip(&before).all(|(now, before)| now.equal(before)));
        }
    }

    #[test]
    fn the_copy_is_the_rounded_parameters() {
        let (p, copy) = (floats(777), Tensor::zeros([777], (Kind::BFloat16, CPU)));
        let (m, v) = (zero_codes(777, true, CPU), zero_codes(777, false, CPU));
        adamw_8bit(&p, Some(&copy), &floats(777), (&m.0, &m.1), (&v.0, &v.1), &scalar(1.0), &STEP).unwrap();
        assert!(copy.equal(&p.to_kind(Kind::BFloat16)));
    }

    #[test]
    fn operands_that_do_not_fit_are_refused() {
        let (p, m, v) = (floats(300), zero_codes(300, true, CPU), zero_codes(299, false, CPU));
        let told = adamw_8bit(&p, None, &p, (&m.0, &m.1), (&v.0, &v.1), &scalar(1.0), &STEP).unwrap_err();
        assert!(told.to_string().contains("a moment's codes: Uint8 [299]"), "{told}");
        let told = adamw_32bit(&p, Some(&p), &p, &p, &p, &scalar(1.0), &STEP).unwrap_err();
        assert!(told.to_string().contains("the rounded parameters: Float [300]"), "{told}");
        let strided = floats(600).view([300, 2]).select(1, 0);
        let told = adamw_32bit(&p, None, &strided, &p, &p, &scalar(1.0), &STEP).unwrap_err();
        assert!(
            told.to_string().contains("the gradient") && told.to_string().contains("contiguous"),
            "{told}"
        );
    }
}
