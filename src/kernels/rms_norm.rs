//! RMSNorm (Zhang & Sennrich 2019, eq. 4) with a frozen weight.
//!
//! Forward `y = round(x · rstd) · w` with `rstd = 1 / sqrt(mean(x²) + eps)` in f32; the rounding to the
//! dtype of `x` before the weight is where transformers puts it.
//! Backward `dx = rstd · (g − x̂ · mean(g · x̂))` with `g = dy · w`, `x̂ = x · rstd`.
//!
//! The kernels of cuda/rms_norm.cu join each with its neighbour on the residual stream; they write into given tensors on
//! libtorch's stream. A view is bf16 with contiguous rows, any distance apart.

use anyhow::{Result, ensure};
use cudarc::driver::LaunchConfig;
use tch::{Kind, Tensor};

use super::gpu::KernelParams;
use super::host::twin_takes;
use super::rows::{Rows, gpu_of, grid, vectorised};

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

/// Writes the norm of `x` (view `[tokens, hidden]`) with `weight` `[hidden]` bf16 to `y` (view) and `1 / rms` of each row
/// to `rstd` `[tokens]` f32.
///
/// # Errors
/// When an operand has another dtype, shape or layout, is not on the GPU of `x`, or `hidden` is above 16,384.
pub fn rms_norm_into(x: &Tensor, weight: &Tensor, eps: f64, y: &Tensor, rstd: &Tensor) -> Result<()> {
    if twin_takes(x) {
        let out = rms_norm_reference(x, weight, eps);
        y.shallow_clone().f_copy_(&out.y)?;
        return Ok(rstd.shallow_clone().f_copy_(&out.rstd.view_as(rstd))?);
    }
    let x = Rows::new("x", x, Kind::BFloat16)?;
    let shape = [x.rows, x.columns];
    let weight = Rows::of("weight", weight, Kind::BFloat16, [1, x.columns])?;
    let y = Rows::of("y", y, Kind::BFloat16, shape)?;
    let rstd = Rows::of("rstd", rstd, Kind::Float, [1, x.rows])?;
    let operands = [&x, &weight, &y];
    let Some(plan) = Plan::new(shape, vectorised(&operands))? else { return Ok(()) };
    let gpu = gpu_of(&[&x, &weight, &y, &rstd])?;
    let params = RmsNormParams {
        x: x.address(),
        branch: 0,
        weight: weight.address(),
        sum: 0,
        y: y.address(),
        rstd: rstd.address(),
        x_stride: x.stride(),
        branch_stride: 0,
        sum_stride: 0,
        y_stride: y.stride(),
        columns: plan.columns,
        multiplier: 1.0,
        eps: eps as f32,
        inverse_columns: plan.inverse_columns(),
    };
    let kernel =
        gpu.kernel("rms_norm", plan.name(["rms_norm_1", "rms_norm_2", "rms_norm_4", "rms_norm_any"]))?;
    // SAFETY: shapes, dtypes and layouts were checked above to be the kernel's, all on this GPU; the kernel of the plan
    // uses vector accesses only where all operands allow them; what it reads and writes is ordered by libtorch's stream.
    unsafe { gpu.launch(kernel, plan.launch, &params) }
}

/// Adds a branch to the residual stream and normalises what results: `sum = x + multiplier · branch`, the product rounded
/// to bf16 (with a multiplier of one that changes nothing) and then the sum, and of this rounded sum what
/// [`rms_norm_into`] does. All views `[tokens, hidden]`; `sum` may be `x` or `branch` itself.
///
/// # Errors
/// As [`rms_norm_into`].
#[expect(clippy::too_many_arguments, reason = "operands of one kernel, in the order of its formula")]
pub fn add_rms_norm_into(
    x: &Tensor,
    branch: &Tensor,
    multiplier: f64,
    weight: &Tensor,
    eps: f64,
    sum: &Tensor,
    y: &Tensor,
    rstd: &Tensor,
) -> Result<()> {
    if twin_takes(x) {
        sum.shallow_clone().f_copy_(&(x + branch * multiplier))?;
        return rms_norm_into(sum, weight, eps, y, rstd);
    }
    let x = Rows::new("x", x, Kind::BFloat16)?;
    let shape = [x.rows, x.columns];
    let branch = Rows::of("branch", branch, Kind::BFloat16, shape)?;
    let weight = Rows::of("weight", weight, Kind::BFloat16, [1, x.columns])?;
    let sum = Rows::of("sum", sum, Kind::BFloat16, shape)?;
    let y = Rows::of("y", y, Kind::BFloat16, shape)?;
    let rstd = Rows::of("rstd", rstd, Kind::Float, [1, x.rows])?;
    let operands = [&x, &branch, &weight, &sum, &y];
    let Some(plan) = Plan::new(shape, vectorised(&operands))? else { return Ok(()) };
    let gpu = gpu_of(&[&x, &branch, &weight, &sum, &y, &rstd])?;
    let params = RmsNormParams {
        x: x.address(),
        branch: branch.address(),
        weight: weight.address(),
        sum: sum.address(),
        y: y.address(),
        rstd: rstd.address(),
        x_stride: x.stride(),
        branch_stride: branch.stride(),
        sum_stride: sum.stride(),
        y_stride: y.stride(),
        columns: plan.columns,
        multiplier: multiplier as f32,
        eps: eps as f32,
        inverse_columns: plan.inverse_columns(),
    };
    let names = ["add_rms_norm_1", "add_rms_norm_2", "add_rms_norm_4", "add_rms_norm_any"];
    let kernel = gpu.kernel("rms_norm", plan.name(names))?;
    // SAFETY: as in `rms_norm_into`; `sum` may be an input, because a thread reads its elements before it writes them.
    unsafe { gpu.launch(kernel, plan.launch, &params) }
}

/// Writes `d_residual` plus the gradient of the norm with respect to `x` to `dx`, summed in f32 and rounded once. All
/// views `[tokens, hidden]` but `weight` `[hidden]` bf16 and `rstd` `[tokens]` f32, as the forward pass left it; `dx` may
/// be `d_residual` or `dy` itself.
///
/// # Errors
/// As [`rms_norm_into`].
pub fn rms_norm_backward_into(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    rstd: &Tensor,
    d_residual: &Tensor,
    dx: &Tensor,
) -> Result<()> {
    if twin_takes(dy) {
        let gradient = rms_norm_backward_reference(dy, x, weight, &rstd.unsqueeze(1));
        return Ok(dx.shallow_clone().f_copy_(&(d_residual + gradient))?);
    }
    let dy = Rows::new("dy", dy, Kind::BFloat16)?;
    let shape = [dy.rows, dy.columns];
    let x = Rows::of("x", x, Kind::BFloat16, shape)?;
    let weight = Rows::of("weight", weight, Kind::BFloat16, [1, dy.columns])?;
    let rstd = Rows::of("rstd", rstd, Kind::Float, [1, dy.rows])?;
    let d_residual = Rows::of("d_residual", d_residual, Kind::BFloat16, shape)?;
    let dx = Rows::of("dx", dx, Kind::BFloat16, shape)?;
    let operands = [&dy, &x, &weight, &d_residual, &dx];
    let Some(plan) = Plan::new(shape, vectorised(&operands))? else { return Ok(()) };
    let gpu = gpu_of(&[&dy, &x, &weight, &rstd, &d_residual, &dx])?;
    let params = RmsNormBackwardParams {
        dy: dy.address(),
        x: x.address(),
        weight: weight.address(),
        rstd: rstd.address(),
        d_residual: d_residual.address(),
        dx: dx.address(),
        dy_stride: dy.stride(),
        x_stride: x.stride(),
        d_residual_stride: d_residual.stride(),
        dx_stride: dx.stride(),
        columns: plan.columns,
        inverse_columns: plan.inverse_columns(),
    };
    let names =
        ["rms_norm_backward_1", "rms_norm_backward_2", "rms_norm_backward_4", "rms_norm_backward_any"];
    let kernel = gpu.kernel("rms_norm", plan.name(names))?;
    // SAFETY: as in `add_rms_norm_into`.
    unsafe { gpu.launch(kernel, plan.launch, &params) }
}

/// The argument of `rms_norm_*` and `add_rms_norm_*`, field by field as in cuda/rms_norm.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct RmsNormParams {
    x: u64,
    branch: u64,
    weight: u64,
    sum: u64,
    y: u64,
    rstd: u64,
    x_stride: u64,
    branch_stride: u64,
    sum_stride: u64,
    y_stride: u64,
    columns: u32,
    multiplier: f32,
    eps: f32,
    inverse_columns: f32,
}

const _: () = assert!(size_of::<RmsNormParams>() == 96, "cuda/rms_norm.cu asserts the same size");

// SAFETY: `repr(C)`, numbers only, the same fields in the same order as in cuda/rms_norm.cu.
unsafe impl KernelParams for RmsNormParams {}

/// The argument of `rms_norm_backward_*`, field by field as in cuda/rms_norm.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct RmsNormBackwardParams {
    dy: u64,
    x: u64,
    weight: u64,
    rstd: u64,
    d_residual: u64,
    dx: u64,
    dy_stride: u64,
    x_stride: u64,
    d_residual_stride: u64,
    dx_stride: u64,
    columns: u32,
    inverse_columns: f32,
}

const _: () = assert!(size_of::<RmsNormBackwardParams>() == 88, "cuda/rms_norm.cu asserts the same size");

// SAFETY: as above.
unsafe impl KernelParams for RmsNormBackwardParams {}

/// Elements of a vector.
const VECTOR: i64 = 8;

/// The longest row that a block can hold: 512 threads with four vectors each.
const MAX_COLUMNS: i64 = 512 * 4 * VECTOR;

/// Which of the four builds of a kernel to launch, and how.
#[derive(Debug)]
struct Plan {
    /// Index into `[_1, _2, _4, _any]`.
    build: usize,
    columns: u32,
    launch: LaunchConfig,
}

impl Plan {
    /// For rows and columns; `None` where there is nothing to do.
    fn new([rows, columns]: [i64; 2], vectorised: bool) -> Result<Option<Self>> {
        ensure!(columns <= MAX_COLUMNS, "the norm's kernel holds rows of up to {MAX_COLUMNS}, got {columns}");
        if rows == 0 || columns == 0 {
            return Ok(None);
        }
        let vectors = u64::try_from(columns)?.div_ceil(VECTOR as u64);
        let (build, held) = match vectors {
            _ if !vectorised => (3, 4),
            ..=256 => (0, 1),
            257..=1024 => (1, 2),
            _ => (2, 4),
        };
        let launch = grid(rows, vectors.div_ceil(held))?;
        Ok(Some(Self { build, columns: u32::try_from(columns)?, launch }))
    }

    fn name(&self, builds: [&'static str; 4]) -> &'static str {
        builds[self.build]
    }

    fn inverse_columns(&self) -> f32 {
        (1.0 / f64::from(self.columns)) as f32
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use tch::Device;

    use super::*;

    /// Build, threads and columns that those threads hold.
    fn planned(columns: i64, vectorised: bool) -> (usize, u32, i64) {
        let plan = Plan::new([7, columns], vectorised).unwrap().unwrap();
        assert_eq!(plan.launch.grid_dim, (7, 1, 1));
        let threads = plan.launch.block_dim.0;
        (plan.build, threads, i64::from(threads) * [1, 2, 4, 4][plan.build] * VECTOR)
    }

    #[test]
    fn every_row_fits_its_block() {
        assert_eq!(planned(4096, true), (1, 256, 4096));
        assert_eq!(planned(576, true).0, 0);
        assert_eq!(planned(MAX_COLUMNS, true), (2, 512, MAX_COLUMNS));
        for columns in 1..=MAX_COLUMNS {
            for vectorised in [columns % VECTOR == 0, false] {
                let (build, threads, held) = planned(columns, vectorised);
                assert!(held >= columns, "{columns} columns, {held} held");
                assert!(threads <= [256, 512, 512, 512][build], "{columns} columns, {threads} threads");
            }
        }
        assert!(Plan::new([1, MAX_COLUMNS + 1], true).is_err());
        assert!(Plan::new([0, 64], true).unwrap().is_none());
    }

    #[test]
    fn refuses_operands_that_do_not_fit() {
        let bf16 = |shape: &[i64]| Tensor::zeros(shape, (Kind::BFloat16, Device::Cpu));
        let (x, weight, rstd) = (bf16(&[3, 64]), bf16(&[64]), Tensor::zeros([3], (Kind::Float, Device::Cpu)));
        let told = |weight: &Tensor, y: &Tensor, rstd: &Tensor| {
            rms_norm_into(&x, weight, 1e-6, y, rstd).unwrap_err().to_string()
        };
        assert!(told(&bf16(&[63]), &x, &rstd).contains("`weight` is [63], expected [1, 64]"));
        assert!(told(&weight, &bf16(&[4, 64]), &rstd).contains("`y` is [4, 64]"));
        assert!(told(&weight, &x, &bf16(&[3])).contains("`rstd` is BFloat16"));
        assert!(told(&weight, &x.to_kind(Kind::Float), &rstd).contains("`y` is Float"));
        assert!(told(&weight, &x, &rstd).contains("Cpu"));
        let sums = add_rms_norm_into(&x, &bf16(&[3, 32]), 1.0, &weight, 1e-6, &x, &x, &rstd);
        assert!(sums.unwrap_err().to_string().contains("`branch`"));
        let gradient = rms_norm_backward_into(&x, &x, &weight, &rstd, &x.tr(), &x);
        assert!(gradient.unwrap_err().to_string().contains("`d_residual`"));
    }

    #[test]
    fn the_twin_is_the_definition() {
        let double = |shape: &[i64]| Tensor::randn(shape, (Kind::Double, Device::Cpu));
        let (x, weight, dy) = (double(&[5, 96]), double(&[96]), double(&[5, 96]));
        let eps = 1e-5;
        let rstd = (x.square().mean_dim([-1i64].as_slice(), true, Kind::Double) + eps).rsqrt();
        let x_grad = x.copy().set_requires_grad(true);
        let y = &x_grad
            * (x_grad.square().mean_dim([-1i64].as_slice(), true, Kind::Double) + eps).rsqrt()
            * &weight;
        (&y * &dy).sum(Kind::Double).backward();
        let f32s = |x: &Tensor| x.to_kind(Kind::Float);
        let near = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]) < 1e-5;

        let found = rms_norm_reference(&f32s(&x), &f32s(&weight), eps);
        assert!(near(&found.y, &y) && near(&found.rstd, &rstd));
        let dx = rms_norm_backward_reference(&f32s(&dy), &f32s(&x), &f32s(&weight), &found.rstd);
        assert!(near(&dx, &x_grad.grad()));
    }
}
