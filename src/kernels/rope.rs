//! Rotary position embedding (Su et al. 2021), in the half-split layout of Llama checkpoints:
//! element `i` of a head turns together with element `i + head_dim / 2`.
//!
//! The kernel of cuda/rope.cu turns all query and key heads of packed rows in place, with angles in f32.

use anyhow::{Context as _, Result, bail, ensure};
use tch::{Kind, Tensor};

use super::gpu::KernelParams;
use super::host::twin_takes;
use super::rows::{Rows, gpu_of, grid, vectorised};

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

/// Cosine and sine of each position's angles for the kernel: as [`RotaryAngles`], but always in f32.
#[derive(Debug)]
pub struct RotaryTable {
    /// `[tokens, head_dim / 2]` f32, contiguous.
    pub(super) cos: Tensor,
    /// As `cos`.
    pub(super) sin: Tensor,
}

impl RotaryTable {
    /// The table of `positions` `[tokens]` i64, on their device.
    ///
    /// # Errors
    /// When `positions` are something else, `head_dim` is not even, or memory is short.
    pub fn new(positions: &Tensor, head_dim: i64, theta: f64) -> Result<Self> {
        let (kind, dimensions) = (positions.kind(), positions.dim());
        ensure!(
            kind == Kind::Int64 && dimensions == 1,
            "positions are {kind:?} in {dimensions} dimensions, expected Int64 in one"
        );
        ensure!(head_dim > 0 && head_dim % 2 == 0, "head_dim is {head_dim}, expected an even number");
        let RotaryAngles { cos, sin } = RotaryAngles::new(positions, head_dim, theta, Kind::Float);
        Ok(Self { cos: cos.f_squeeze_dim(1)?.f_contiguous()?, sin: sin.f_squeeze_dim(1)?.f_contiguous()? })
    }
}

/// Turns the heads of `x` in place: forward, or with `backward` back, which is the gradient. Arithmetic is in f32, each
/// element rounded once.
///
/// `x` is a bf16 view `[tokens, heads, head_dim]`, the heads of a token side by side, any distance between tokens: the
/// query and key heads of packed rows `[q | k | v]` turn in one call. Heads of 64 and 128 are fast.
///
/// # Errors
/// When `x` has another dtype, layout, number of tokens or `head_dim` than the table, or is not on its GPU.
pub fn rotate_in_place(x: &Tensor, table: &RotaryTable, backward: bool) -> Result<()> {
    let size = x.size();
    let &[tokens, heads, head_dim] = size.as_slice() else {
        bail!("`x` is {size:?}, expected [tokens, heads, head_dim]");
    };
    if twin_takes(x) {
        let (cos, sin) = (table.cos.unsqueeze(1), table.sin.unsqueeze(1));
        let angles = RotaryAngles { cos, sin };
        let turned = if backward { angles.rotate_backward(x) } else { angles.rotate(x) };
        return Ok(x.shallow_clone().f_copy_(&turned)?);
    }
    let half = table.cos.size()[1];
    ensure!(head_dim == 2 * half, "heads of `x` have {head_dim} elements, the table is for {}", 2 * half);
    let flat = x
        .f_view([tokens, heads * head_dim])
        .with_context(|| format!("the heads of `x` do not lie side by side: strides {:?}", x.stride()))?;
    let x = Rows::new("x", &flat, Kind::BFloat16)?;
    let cos = Rows::of("cos", &table.cos, Kind::Float, [tokens, half])?;
    let sin = Rows::of("sin", &table.sin, Kind::Float, [tokens, half])?;
    if x.rows == 0 || x.columns == 0 {
        return Ok(());
    }
    let gpu = gpu_of(&[&x, &cos, &sin])?;
    let name = match half {
        32 if vectorised(&[&x, &cos, &sin]) => "rope_4",
        64 if vectorised(&[&x, &cos, &sin]) => "rope_8",
        _ => "rope_any",
    };
    let params = RopeParams {
        x: x.address(),
        cos: cos.address(),
        sin: sin.address(),
        token_stride: x.stride(),
        heads: u32::try_from(heads)?,
        half: u32::try_from(half)?,
        sign: if backward { -1.0 } else { 1.0 },
        reserved: 0,
    };
    let kernel = gpu.kernel("rope", name)?;
    // SAFETY: x is bf16 rows of `heads` heads that do not overlap, cos and sin are contiguous f32 of as many rows, all on
    // this GPU (checked above); the fast kernels run only on their half and alignment.
    unsafe { gpu.launch(kernel, grid(tokens, THREADS)?, &params) }
}

/// Threads of a block of the kernels.
const THREADS: u64 = 128;

/// The argument of the kernels in cuda/rope.cu, field by field as there.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct RopeParams {
    x: u64,
    cos: u64,
    sin: u64,
    token_stride: u64,
    heads: u32,
    half: u32,
    sign: f32,
    reserved: u32,
}

const _: () = assert!(size_of::<RopeParams>() == 48, "cuda/rope.cu asserts the same size");

// SAFETY: `repr(C)`, numbers only, the same fields in the same order as in cuda/rope.cu.
unsafe impl KernelParams for RopeParams {}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use tch::Device;

    use super::*;

    fn positions(tokens: i64) -> Tensor {
        Tensor::arange(tokens, (Kind::Int64, Device::Cpu))
    }

    fn bf16(shape: &[i64]) -> Tensor {
        Tensor::zeros(shape, (Kind::BFloat16, Device::Cpu))
    }

    #[test]
    fn the_table_holds_the_angles_of_each_position() {
        let table = RotaryTable::new(&positions(100), 8, 10_000.0).unwrap();
        assert_eq!((table.cos.size(), table.sin.size()), (vec![100, 4], vec![100, 4]));
        for (token, pair) in [(0, 0), (1, 0), (7, 1), (99, 0), (99, 3)] {
            let angle = token as f64 * 10_000f64.powf(-2.0 * pair as f64 / 8.0);
            assert!((table.cos.double_value(&[token, pair]) - angle.cos()).abs() < 1e-5);
            assert!((table.sin.double_value(&[token, pair]) - angle.sin()).abs() < 1e-5);
        }
    }

    #[test]
    fn the_twin_turns_and_turns_back() {
        let x = Tensor::randn([9, 3, 6], (Kind::Float, Device::Cpu));
        let angles = RotaryAngles::new(&positions(9), 6, 10_000.0, Kind::Float);
        let turned = angles.rotate(&x);
        // As a complex number, a pair is multiplied by e^(i angle).
        let (re, im) = (x.double_value(&[5, 2, 1]), x.double_value(&[5, 2, 4]));
        let (sin, cos) = (5.0 * 10_000f64.powf(-1.0 / 3.0)).sin_cos();
        assert!((turned.double_value(&[5, 2, 1]) - (re * cos - im * sin)).abs() < 1e-5);
        assert!((turned.double_value(&[5, 2, 4]) - (im * cos + re * sin)).abs() < 1e-5);
        assert!((angles.rotate_backward(&turned) - x).abs().max().double_value(&[]) < 1e-5);
    }

    #[test]
    fn refuses_operands_that_do_not_fit() {
        let table = RotaryTable::new(&positions(5), 8, 10_000.0).unwrap();
        let told = |x: &Tensor| format!("{:#}", rotate_in_place(x, &table, false).unwrap_err());
        assert!(told(&bf16(&[5, 16])).contains("expected [tokens, heads, head_dim]"));
        assert!(told(&bf16(&[5, 2, 16])).contains("the table is for 8"));
        assert!(told(&bf16(&[4, 2, 8])).contains("`cos` is [5, 4], expected [4, 4]"));
        assert!(told(&bf16(&[5, 4, 8]).slice(1, 0, 4, 2)).contains("side by side"));
        assert!(told(&bf16(&[5, 2, 8]).to_kind(Kind::Half)).contains("expected BFloat16"));
        assert!(told(&bf16(&[5, 2, 8])).contains("Cpu"));
        assert!(RotaryTable::new(&positions(5), 7, 1e4).is_err());
        assert!(RotaryTable::new(&positions(5).to_kind(Kind::Float), 8, 1e4).is_err());
    }
}
