//! Products of adapters with an input that drops elements, without the dropped input ever being in memory.
//!
//! Projections that share an input share the passes over it; each has a mask of its own. Shapes, sums and rounding are in
//! cuda/adapter_dropout.cu. Where its kernels do not apply (on the CPU, in f32, for widths that are no multiple of 8) the
//! twins of [`Products`] do the same one after the other: drop, multiply, add.

use anyhow::{Context as _, Result, ensure};
use cudarc::driver::LaunchConfig;
use tch::{Kind, Tensor};

use super::dropout::{DropoutKey, Mask, dropout_add_rows, dropout_rows_into};
use super::gemm::Gemm;
use super::gpu::{Gpu, Kernel, KernelParams};
use super::philox::{ROUNDS, key_schedule};
use super::rows::{Rows, gpu_of, vectorised};

/// Columns of a slice.
const SLICE: i64 = 64;

/// Slices that a launch takes.
const MAX_SLICES: usize = 3;

/// Stages of copies under way in `adapter_input` and `adapter_to_a`.
const STAGES: u32 = 4;

/// Blocks of one, two and three slices that an H100 holds at a time. Sums are split among as many, and on every GPU alike: how
/// they are split decides the bits.
const RESIDENT: [i64; MAX_SLICES] = [528, 264, 132];

/// Adapters of one group: projections that share an input.
#[derive(Debug)]
pub struct Products<'a> {
    /// Their rows of A below each other, `[columns, width]`; rows may lie apart.
    pub a: &'a Tensor,
    /// Which of these rows belong to which projection.
    pub shares: Vec<Share>,
    /// Probability that an element of the input is dropped.
    pub p: f64,
}

/// A projection's part of a group.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    /// Rows of A before its own.
    pub column: i64,
    /// Its rows of A, at least its rank; the others are zeros.
    pub columns: i64,
    /// Rank of its adapter.
    pub rank: i64,
    /// Names its mask.
    pub key: DropoutKey,
}

impl Products<'_> {
    /// `out = kept = factor · drop(x)·Aᵀ` for `x` `[tokens, width]`, `out` and `kept` `[tokens, columns]`; `scratch`, a contiguous
    /// buffer of `x`'s dtype with at least `tokens * width` elements, is overwritten.
    ///
    /// # Errors
    /// When shapes, dtypes or devices do not fit, or the driver fails.
    pub fn input(
        &self,
        gemm: &Gemm,
        x: &Tensor,
        [out, kept]: [&Tensor; 2],
        factor: f64,
        scratch: &Tensor,
    ) -> Result<()> {
        if !self.runs_on(&[x, self.a, out, kept])? {
            return self.input_reference(gemm, x, [out, kept], factor, scratch);
        }
        let launch = Launch { x: Some(x), out: Some(out), kept: Some(kept), ..Launch::new(self, x, factor)? };
        launch.each(|slices, params| {
            let pass = SplitPass {
                names: ["adapter_input_1", "adapter_input_2", "adapter_input_3"],
                steps: ceil(launch.width, 32),
                blocks: ceil(launch.tokens, 128),
                shared: STAGES * (8192 + 4096 * slices as u32),
                sums: slices * launch.tokens * SLICE,
                add: "adapter_input_sum",
                add_grid: [ceil(launch.tokens, 16), slices, 1],
            };
            launch.run_split(slices, &pass, params, scratch)
        })
    }

    /// The twin of [`input`](Self::input).
    ///
    /// # Errors
    /// As [`input`](Self::input).
    pub fn input_reference(
        &self,
        gemm: &Gemm,
        x: &Tensor,
        [out, kept]: [&Tensor; 2],
        factor: f64,
        scratch: &Tensor,
    ) -> Result<()> {
        let dropped = shaped(scratch, x)?;
        for share in &self.shares {
            dropout_rows_into(x, &dropped, self.p, share.key)?;
            let to = out.narrow(1, share.column, share.columns);
            gemm.multiply(&dropped, &self.a.narrow(0, share.column, share.columns).tr(), &to, factor, 0.0)?;
        }
        Ok(kept.shallow_clone().f_copy_(out)?)
    }

    /// Adds `factor · drop(d·A)` to `dx` `[tokens, width]` for `d` `[tokens, columns]`; `scratch` as in [`input`](Self::input).
    ///
    /// # Errors
    /// As [`input`](Self::input).
    pub fn to_input(
        &self,
        gemm: &Gemm,
        d: &Tensor,
        dx: &Tensor,
        factor: f64,
        scratch: &Tensor,
    ) -> Result<()> {
        if !self.runs_on(&[d, self.a, dx])? {
            return self.to_input_reference(gemm, d, dx, factor, scratch);
        }
        let launch = Launch { d: Some(d), dx: Some(dx), ..Launch::new(self, dx, factor)? };
        launch.each(|slices, params| {
            let name = ["adapter_to_input_1", "adapter_to_input_2", "adapter_to_input_3"];
            let grid = [ceil(launch.width, 64), ceil(launch.tokens, 128)];
            launch.run(name, slices, grid, 256, 25_600 * slices as u32, &params)
        })
    }

    /// The twin of [`to_input`](Self::to_input).
    ///
    /// # Errors
    /// As [`input`](Self::input).
    pub fn to_input_reference(
        &self,
        gemm: &Gemm,
        d: &Tensor,
        dx: &Tensor,
        factor: f64,
        scratch: &Tensor,
    ) -> Result<()> {
        let product = shaped(scratch, dx)?;
        for share in &self.shares {
            let d = d.narrow(1, share.column, share.columns);
            gemm.multiply(&d, &self.a.narrow(0, share.column, share.columns), &product, factor, 0.0)?;
            dropout_add_rows(dx, &product, self.p, share.key)?;
        }
        Ok(())
    }

    /// Adds `factor · dᵀ·drop(x)` to the gradients of A, `[rank, width]` f32 for each share; `d` `[tokens, columns]`, `x`
    /// `[tokens, width]`, `scratch` as in [`input`](Self::input).
    ///
    /// # Errors
    /// As [`input`](Self::input).
    pub fn to_a(
        &self,
        gemm: &Gemm,
        d: &Tensor,
        x: &Tensor,
        gradients: &[Tensor],
        factor: f64,
        scratch: &Tensor,
    ) -> Result<()> {
        if !self.runs_on(&[d, x])? {
            return self.to_a_reference(gemm, d, x, gradients, factor, scratch);
        }
        for (share, gradient) in self.shares.iter().zip(gradients) {
            ensure!(
                gradient.is_contiguous()
                    && gradient.kind() == Kind::Float
                    && gradient.size() == [share.rank, x.size()[1]],
                "the gradient of A is {:?} {:?}",
                gradient.kind(),
                gradient.size()
            );
        }
        let launch = Launch { x: Some(x), d: Some(d), gradients, ..Launch::new(self, x, factor)? };
        launch.each(|slices, params| {
            let pass = SplitPass {
                names: ["adapter_to_a_1", "adapter_to_a_2", "adapter_to_a_3"],
                steps: ceil(launch.tokens, 32),
                blocks: ceil(launch.width, 128),
                shared: STAGES * (4096 * slices as u32 + 9216),
                sums: slices * SLICE * launch.width,
                add: "adapter_to_a_sum",
                add_grid: [ceil(launch.width, 256), SLICE, slices],
            };
            launch.run_split(slices, &pass, params, scratch)
        })
    }

    /// The twin of [`to_a`](Self::to_a).
    ///
    /// # Errors
    /// As [`input`](Self::input).
    pub fn to_a_reference(
        &self,
        gemm: &Gemm,
        d: &Tensor,
        x: &Tensor,
        gradients: &[Tensor],
        factor: f64,
        scratch: &Tensor,
    ) -> Result<()> {
        let dropped = shaped(scratch, x)?;
        for (share, gradient) in self.shares.iter().zip(gradients) {
            dropout_rows_into(x, &dropped, self.p, share.key)?;
            gemm.multiply(&d.narrow(1, share.column, share.rank).tr(), &dropped, gradient, factor, 1.0)?;
        }
        Ok(())
    }

    /// Whether the kernels take these operands: bf16 on a GPU, rows at vectors, and something to drop.
    fn runs_on(&self, operands: &[&Tensor]) -> Result<bool> {
        let [first, ..] = operands else { return Ok(false) };
        if !first.device().is_cuda() || first.kind() != Kind::BFloat16 || self.p == 0.0 {
            return Ok(false);
        }
        let rows: Vec<Rows<'_>> =
            operands.iter().map(|one| Rows::new("operand", one, Kind::BFloat16)).collect::<Result<_>>()?;
        let rows: Vec<&Rows<'_>> = rows.iter().collect();
        let _ = gpu_of(&rows)?;
        let whole = |share: &Share| share.column % 8 == 0 && share.columns % 8 == 0;
        Ok(vectorised(&rows) && self.shares.iter().all(whole))
    }
}

/// A buffer's beginning in the shape of `like`.
fn shaped(scratch: &Tensor, like: &Tensor) -> Result<Tensor> {
    let (rows, columns) = like.size2()?;
    Ok(scratch.f_view([-1])?.f_narrow(0, 0, rows * columns)?.f_view([rows, columns])?)
}

/// How many f32 a buffer holds.
fn room(scratch: &Tensor) -> Result<i64> {
    ensure!(scratch.is_contiguous(), "a scratch buffer with gaps");
    ensure!((scratch.data_ptr() as u64).is_multiple_of(16), "a scratch buffer that begins between vectors");
    Ok((scratch.numel() * scratch.kind().elt_size_in_bytes() / size_of::<f32>()) as i64)
}

fn ceil(whole: i64, part: i64) -> i64 {
    (whole + part - 1) / part
}

/// The operands of a pass over a group, and the GPU they are on.
struct Launch<'a> {
    products: &'a Products<'a>,
    gpu: std::sync::Arc<Gpu>,
    tokens: i64,
    width: i64,
    factor: f64,
    x: Option<&'a Tensor>,
    d: Option<&'a Tensor>,
    dx: Option<&'a Tensor>,
    out: Option<&'a Tensor>,
    kept: Option<&'a Tensor>,
    gradients: &'a [Tensor],
}

impl<'a> Launch<'a> {
    /// For an input, or its gradient, of this shape. The factor takes up the masks' scale.
    fn new(products: &'a Products<'a>, input: &Tensor, factor: f64) -> Result<Self> {
        let (tokens, width) = input.size2()?;
        let key = products.shares.first().context("a group without adapters")?.key;
        let factor = factor * f64::from(Mask::new(products.p, key).scale);
        let gpu = Gpu::of(input)?;
        let gradients = &[];
        Ok(Self {
            products,
            gpu,
            tokens,
            width,
            factor,
            x: None,
            d: None,
            dx: None,
            out: None,
            kept: None,
            gradients,
        })
    }

    /// Slices of all shares, at most three at a time, with what all launches have in common.
    fn each(&self, run: impl Fn(i64, Params) -> Result<()>) -> Result<()> {
        if self.tokens == 0 {
            return Ok(());
        }
        let slices = self.slices();
        for some in slices.chunks(MAX_SLICES) {
            let mut params = self.params(some.len() as u32)?;
            params.slice[..some.len()].copy_from_slice(some);
            run(some.len() as i64, params)?;
        }
        Ok(())
    }

    fn slices(&self) -> Vec<Slice> {
        let of_share = |(index, share): (usize, &Share)| {
            let gradient = self.gradients.get(index).map_or(0, |gradient| gradient.data_ptr() as u64);
            let (share, width) = (*share, self.width);
            (0..share.columns).step_by(SLICE as usize).map(move |start| Slice {
                da: gradient + (start * width) as u64 * size_of::<f32>() as u64,
                column: (share.column + start) as u32,
                width: SLICE.min(share.columns - start) as u32,
                rank: SLICE.min((share.rank - start).max(0)) as u32,
                module: share.key.module,
            })
        };
        self.products.shares.iter().enumerate().flat_map(of_share).collect()
    }

    fn params(&self, slices: u32) -> Result<Params> {
        let rows = |tensor: Option<&Tensor>| match tensor {
            Some(tensor) => {
                Rows::new("operand", tensor, Kind::BFloat16).map(|rows| (rows.address(), rows.stride()))
            }
            None => Ok((0, 0)),
        };
        let key = self.products.shares.first().context("a group without adapters")?.key;
        let [x, a, d] = [rows(self.x)?, rows(Some(self.products.a))?, rows(self.d)?];
        let [dx, out, kept] = [rows(self.dx)?, rows(self.out)?, rows(self.kept)?];
        Ok(Params {
            x: x.0,
            a: a.0,
            d: d.0,
            dx: dx.0,
            out: out.0,
            kept: kept.0,
            partial: 0,
            x_stride: x.1,
            a_stride: a.1,
            d_stride: d.1,
            dx_stride: dx.1,
            out_stride: out.1,
            kept_stride: kept.1,
            microbatch: key.microbatch,
            tokens: u32::try_from(self.tokens)?,
            width: u32::try_from(self.width)?,
            slices,
            splits: 1,
            steps: 0,
            threshold: Mask::new(self.products.p, key).threshold,
            factor: self.factor as f32,
            unused: 0,
            keys: key_schedule([key.seed as u32, (key.seed >> 32) as u32]),
            slice: [Slice::default(); MAX_SLICES],
        })
    }

    /// Launches one of three kernels, by the number of slices, over a grid of two dimensions.
    fn run(
        &self,
        names: [&'static str; MAX_SLICES],
        slices: i64,
        [x, y]: [i64; 2],
        threads: i64,
        shared: u32,
        params: &Params,
    ) -> Result<()> {
        let kernel = self.gpu.kernel("adapter_dropout", names[slices as usize - 1])?;
        self.launch(kernel, [x, y, 1], threads, shared, params)
    }

    /// Launches a pass whose sums as many blocks share as the GPU holds and the scratch has room for, and adds these up.
    fn run_split(&self, slices: i64, pass: &SplitPass, params: Params, scratch: &Tensor) -> Result<()> {
        let wanted = RESIDENT[slices as usize - 1] / pass.blocks;
        let params = params.split(pass.steps, wanted, room(scratch)? / pass.sums, scratch);
        let grid = [pass.blocks, params.splits.into()];
        self.run(pass.names, slices, grid, 128 * slices, pass.shared, &params)?;
        if params.splits > 1 {
            let add = self.gpu.kernel("adapter_dropout", pass.add)?;
            self.launch(add, pass.add_grid, 256, 0, &params)?;
        }
        Ok(())
    }

    fn launch(
        &self,
        kernel: Kernel,
        grid: [i64; 3],
        threads: i64,
        shared: u32,
        params: &Params,
    ) -> Result<()> {
        let [x, y, z] = grid;
        ensure!(y <= 65_535, "{} tokens are more than a launch takes", self.tokens);
        let shape = LaunchConfig {
            grid_dim: (u32::try_from(x)?, u32::try_from(y)?, u32::try_from(z)?),
            block_dim: (threads as u32, 1, 1),
            shared_mem_bytes: shared,
        };
        // SAFETY: the operands are bf16 rows at vectors on this GPU (`runs_on`) of the shapes that the public functions' callers
        // vouch for by their views, gradients are contiguous f32, and the scratch holds the partial sums (`split`); what is
        // written is written by nobody else, and libtorch orders the release of all after this launch.
        unsafe { self.gpu.launch(kernel, shape, params) }
    }
}

/// A pass whose sums can be split among blocks.
struct SplitPass {
    /// Its kernels for one, two and three slices.
    names: [&'static str; MAX_SLICES],
    /// Steps that a sum takes.
    steps: i64,
    /// Blocks that the results take.
    blocks: i64,
    /// Bytes of shared memory of a block.
    shared: u32,
    /// How many f32 the sums of one split are.
    sums: i64,
    /// The kernel that adds the splits, in blocks of 256 threads.
    add: &'static str,
    add_grid: [i64; 3],
}

/// A slice in [`Params`].
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Slice {
    da: u64,
    column: u32,
    width: u32,
    rank: u32,
    module: u32,
}

/// The argument of the kernels in cuda/adapter_dropout.cu, field by field as there.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Params {
    x: u64,
    a: u64,
    d: u64,
    dx: u64,
    out: u64,
    kept: u64,
    partial: u64,
    x_stride: u64,
    a_stride: u64,
    d_stride: u64,
    dx_stride: u64,
    out_stride: u64,
    kept_stride: u64,
    microbatch: u64,
    tokens: u32,
    width: u32,
    slices: u32,
    splits: u32,
    steps: u32,
    threshold: u32,
    factor: f32,
    unused: u32,
    keys: [[u32; 2]; ROUNDS],
    slice: [Slice; MAX_SLICES],
}

const _: () = assert!(size_of::<Params>() == 272, "cuda/adapter_dropout.cu asserts the same size");

// SAFETY: `repr(C)`, numbers only, the same fields in the same order as in cuda/adapter_dropout.cu.
unsafe impl KernelParams for Params {}

impl Params {
    /// Divides `total` steps among `wanted` blocks, or as many as have `room` for their sums; none is left without a step.
    fn split(self, total: i64, wanted: i64, room: i64, scratch: &Tensor) -> Self {
        let steps = ceil(total, wanted.min(room).clamp(1, total));
        Self {
            steps: steps as u32,
            splits: ceil(total, steps) as u32,
            partial: scratch.data_ptr() as u64,
            ..self
        }
    }
}
