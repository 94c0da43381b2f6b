//! SwiGLU (Shazeer 2020): `y = silu(gate) · up`, with `silu(g) = g · σ(g)`.
//!
//! Backward: `dup = dy · silu(gate)`, `dgate = dy · up · σ(gate) · (1 + gate · (1 − σ(gate)))`.
//! Only gate and up are kept; σ is computed again rather than read.
//!
//! The kernels of cuda/swiglu.cu work on packed rows `[gate | up]`, in f32 with one rounding a result; the twin's
//! forward pass in bf16 also rounds `silu(gate)`.

use anyhow::{Context as _, Result};
use tch::{Kind, Tensor};

use super::gpu::KernelParams;
use super::host::twin_takes;
use super::rows::{Rows, gpu_of, grid, vectorised};

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

/// Writes `silu(gate) · up` to `y`, a bf16 view `[tokens, inter]`, of `gate_up`, a bf16 view `[tokens, 2 · inter]`.
///
/// # Errors
/// When an operand has another dtype, shape or layout, or they are not on one GPU.
pub fn swiglu_into(gate_up: &Tensor, y: &Tensor) -> Result<()> {
    if twin_takes(gate_up) {
        let [gate, up] = halves(gate_up);
        return Ok(y.shallow_clone().f_copy_(&swiglu_reference(&gate, &up))?);
    }
    let y = Rows::new("y", y, Kind::BFloat16)?;
    let gate_up = Rows::of("gate_up", gate_up, Kind::BFloat16, [y.rows, 2 * y.columns])?;
    launch(["swiglu_8", "swiglu_any"], None, &gate_up, Some(&y))
}

/// Replaces `gate_up`, a bf16 view `[tokens, 2 · inter]`, by the gradients `[dgate | dup]` of [`swiglu_into`] under the
/// output's gradient `dy`, a bf16 view `[tokens, inter]`. `y` is a view that takes `silu(gate) · up` once more on the way;
/// it may be `dy` itself.
///
/// # Errors
/// As [`swiglu_into`].
pub fn swiglu_backward_into(dy: &Tensor, gate_up: &Tensor, y: Option<&Tensor>) -> Result<()> {
    if twin_takes(gate_up) {
        let [mut gate, mut up] = halves(gate_up);
        let again = swiglu_reference(&gate, &up);
        let (d_gate, d_up) = swiglu_backward_reference(dy, &gate, &up);
        gate.f_copy_(&d_gate)?;
        up.f_copy_(&d_up)?;
        return y.map_or(Ok(()), |y| Ok(y.shallow_clone().f_copy_(&again)?));
    }
    let dy = Rows::new("dy", dy, Kind::BFloat16)?;
    let gate_up = Rows::of("gate_up", gate_up, Kind::BFloat16, [dy.rows, 2 * dy.columns])?;
    let y = y.map(|y| Rows::of("y", y, Kind::BFloat16, [dy.rows, dy.columns])).transpose()?;
    launch(["swiglu_backward_8", "swiglu_backward_any"], Some(&dy), &gate_up, y.as_ref())
}

/// Gate and up as views.
fn halves(gate_up: &Tensor) -> [Tensor; 2] {
    let inter = gate_up.size()[1] / 2;
    [gate_up.narrow(1, 0, inter), gate_up.narrow(1, inter, inter)]
}

/// Elements of a thread of the kernels, and its largest access.
const GROUP: u64 = 8;

/// Threads of a block of the kernels.
const THREADS: u64 = 256;

/// Launches the first of `names` where all operands allow vector accesses, else the second.
fn launch(
    names: [&'static str; 2],
    dy: Option<&Rows<'_>>,
    gate_up: &Rows<'_>,
    y: Option<&Rows<'_>>,
) -> Result<()> {
    let inter = (gate_up.columns / 2) as u64;
    let groups_of_row = inter.div_ceil(GROUP);
    let groups = gate_up.rows as u64 * groups_of_row;
    if groups == 0 {
        return Ok(());
    }
    let fits = u32::try_from(groups).ok().filter(|groups| *groups <= u32::MAX - THREADS as u32);
    let groups =
        fits.with_context(|| format!("{} rows of {inter} are too many for one launch", gate_up.rows))?;
    let operands: Vec<&Rows<'_>> = [Some(gate_up), dy, y].into_iter().flatten().collect();
    let gpu = gpu_of(&operands)?;
    // The second half of a row of `gate_up` must begin at a vector too.
    let vectors = vectorised(&operands) && inter.is_multiple_of(GROUP);
    let address = |operand: Option<&Rows<'_>>| operand.map_or(0, Rows::address);
    let stride = |operand: Option<&Rows<'_>>| operand.map_or(0, Rows::stride);
    let params = SwigluParams {
        dy: address(dy),
        gate_up: gate_up.address(),
        y: address(y),
        dy_stride: stride(dy),
        gate_up_stride: gate_up.stride(),
        y_stride: stride(y),
        groups,
        groups_of_row: u32::try_from(groups_of_row)?,
        inter: u32::try_from(inter)?,
        reserved: 0,
    };
    let kernel = gpu.kernel("swiglu", names[usize::from(!vectors)])?;
    let shape = grid(i64::from(groups.div_ceil(THREADS as u32)), THREADS)?;
    // SAFETY: the callers have checked that the operands are bf16 rows of matching shapes, here that they are on one GPU
    // and, for vector accesses, aligned; a thread reads its elements before it writes any, so `y` may be `dy`.
    unsafe { gpu.launch(kernel, shape, &params) }
}

/// The argument of the kernels in cuda/swiglu.cu, field by field as there.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct SwigluParams {
    dy: u64,
    gate_up: u64,
    y: u64,
    dy_stride: u64,
    gate_up_stride: u64,
    y_stride: u64,
    groups: u32,
    groups_of_row: u32,
    inter: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<SwigluParams>() == 64, "cuda/swiglu.cu asserts the same size");

// SAFETY: `repr(C)`, numbers only, the same fields in the same order as in cuda/swiglu.cu.
unsafe impl KernelParams for SwigluParams {}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn the_twin_is_the_definition() {
        let double = || Tensor::randn([7, 33], (Kind::Double, Device::Cpu)) * 3.0;
        let (gate, up, dy): (Tensor, Tensor, Tensor) = (double(), double(), double());
        let (gate, up) = (gate.set_requires_grad(true), up.set_requires_grad(true));
        let y = &gate * gate.sigmoid() * &up;
        (&y * &dy).sum(Kind::Double).backward();
        let f32s = |x: &Tensor| x.detach().to_kind(Kind::Float);
        let near = |a: &Tensor, b: &Tensor| (a - b.detach()).abs().max().double_value(&[]) < 1e-4;
        assert!(near(&swiglu_reference(&f32s(&gate), &f32s(&up)), &y));
        let (dgate, dup) = swiglu_backward_reference(&f32s(&dy), &f32s(&gate), &f32s(&up));
        assert!(near(&dgate, &gate.grad()) && near(&dup, &up.grad()));
    }

    #[test]
    fn refuses_operands_that_do_not_fit() {
        let bf16 = |shape: &[i64]| Tensor::zeros(shape, (Kind::BFloat16, Device::Cpu));
        let (gate_up, y) = (bf16(&[3, 64]), bf16(&[3, 32]));
        let told = |outcome: Result<()>| outcome.unwrap_err().to_string();
        assert!(told(swiglu_into(&bf16(&[3, 62]), &y)).contains("`gate_up` is [3, 62], expected [3, 64]"));
        assert!(told(swiglu_into(&bf16(&[2, 64]), &y)).contains("`gate_up`"));
        assert!(told(swiglu_into(&gate_up, &y.to_kind(Kind::Float))).contains("`y` is Float"));
        assert!(told(swiglu_backward_into(&y, &gate_up, Some(&bf16(&[3, 31])))).contains("`y`"));
        assert!(told(swiglu_backward_into(&y, &gate_up, None)).contains("Cpu"));
        assert!(told(swiglu_into(&gate_up, &y)).contains("Cpu"));
        let nothing = swiglu_into(&bf16(&[0, 64]), &bf16(&[0, 32]));
        assert!(nothing.is_ok());
    }
}
