//! The large products, by cuBLAS: written into memory that is there, scaled and added in the same pass.
//!
//! `c = alpha · a · b + beta · c`, accumulated in f32. On one stream with a workspace of its own, and without sums in 16
//! bits, cuBLAS gives the same bits every time. The twin is libtorch's product in f32, which is also the CPU path.

use std::ffi::c_void;
use std::sync::Mutex;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use cudarc::cublas::{result, sys};
use tch::{Device, Kind, Tensor};

/// What cuBLAS asks for on Hopper.
const WORKSPACE: i64 = 32 << 20;

/// Products on a device.
#[derive(Debug)]
pub struct Gemm {
    /// `None` on the CPU.
    cublas: Option<Cublas>,
}

#[derive(Debug)]
struct Cublas {
    handle: Mutex<Handle>,
    /// Held because cuBLAS works in it.
    _workspace: Tensor,
}

#[derive(Debug)]
struct Handle(sys::cublasHandle_t);

// SAFETY: a handle may be used from any thread, by one at a time; the mutex around it sees to that.
unsafe impl Send for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle was created by us and is not used after this.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

/// A matrix as cuBLAS takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    /// Whether columns, not rows, are contiguous: a transposed view.
    transposed: bool,
    /// Elements from one row (or column) to the next.
    stride: i32,
}

impl Gemm {
    /// Bytes of its workspace.
    pub const WORKSPACE: i64 = WORKSPACE;

    /// Products on `device`; on a GPU by cuBLAS, on libtorch's stream.
    ///
    /// # Errors
    /// When cuBLAS does not start.
    pub fn new(device: Device) -> Result<Self> {
        let cublas = device.is_cuda().then(|| Cublas::new(device)).transpose()?;
        Ok(Self { cublas })
    }

    /// `c = alpha · a · b + beta · c` for `a` `[m, k]`, `b` `[k, n]`, `c` `[m, n]`; `a` and `b` bf16 and row-major or
    /// transposed views of such, `c` bf16 or f32 and row-major; rows may lie apart. With `beta` 0 nothing of `c` is read.
    ///
    /// # Errors
    /// When the shapes do not fit, a matrix is laid out otherwise, or cuBLAS fails.
    pub fn multiply(&self, a: &Tensor, b: &Tensor, c: &Tensor, alpha: f64, beta: f64) -> Result<()> {
        let ([m, k], [k_of_b, n], [m_of_c, n_of_c]) = (size(a)?, size(b)?, size(c)?);
        ensure!(
            k == k_of_b && m == m_of_c && n == n_of_c,
            "a product of [{m}, {k}] and [{k_of_b}, {n}] does not fit [{m_of_c}, {n_of_c}]"
        );
        if m == 0 || n == 0 || k == 0 {
            return Ok(());
        }
        match &self.cublas {
            Some(cublas) => cublas.multiply(a, b, c, [m, n, k], alpha, beta),
            None => multiply_reference(a, b, c, alpha, beta),
        }
    }
}

/// The twin of [`Gemm::multiply`], on any device.
///
/// # Errors
/// When libtorch refuses.
pub fn multiply_reference(a: &Tensor, b: &Tensor, c: &Tensor, alpha: f64, beta: f64) -> Result<()> {
    let mut product = a.to_kind(Kind::Float).f_matmul(&b.to_kind(Kind::Float))? * alpha;
    // What `c` held is not read with a `beta` of 0: it may be no number.
    if beta != 0.0 {
        product += c.to_kind(Kind::Float) * beta;
    }
    c.shallow_clone().f_copy_(&product)?;
    Ok(())
}

impl Cublas {
    fn new(device: Device) -> Result<Self> {
        let workspace = Tensor::f_empty([WORKSPACE], (Kind::Uint8, device))?;
        // cudarc panics where a library is missing.
        // SAFETY: loading cuBLAS runs its initialisers, which have no preconditions; libtorch has loaded it before.
        ensure!(unsafe { sys::is_culib_present() }, "cuBLAS (libcublas.so.13) cannot be loaded");
        let handle = Handle(result::create_handle().map_err(refused)?);
        // SAFETY: the handle is live, the workspace lives as long as it, and the null stream is always valid.
        unsafe {
            result::set_stream(handle.0, std::ptr::null_mut()).map_err(refused)?;
            let pointer = workspace.data_ptr();
            sys::cublasSetWorkspace_v2(handle.0, pointer, WORKSPACE as usize).result().map_err(refused)?;
            let exact = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
            sys::cublasSetMathMode(handle.0, exact).result().map_err(refused)?;
        }
        Ok(Self { handle: Mutex::new(handle), _workspace: workspace })
    }

    fn multiply(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        [m, n, k]: [i64; 3],
        alpha: f64,
        beta: f64,
    ) -> Result<()> {
        ensure!(
            a.kind() == Kind::BFloat16 && b.kind() == Kind::BFloat16,
            "products take bf16, got {:?} and {:?}",
            a.kind(),
            b.kind()
        );
        let (of_a, of_b, of_c) = (layout(a)?, layout(b)?, layout(c)?);
        ensure!(!of_c.transposed, "a product is written row by row, got strides {:?}", c.stride());
        let bf16 = sys::cudaDataType::CUDA_R_16BF;
        let to = match c.kind() {
            Kind::BFloat16 => bf16,
            Kind::Float => sys::cudaDataType::CUDA_R_32F,
            other => bail!("a product is written as bf16 or f32, got {other:?}"),
        };
        let (alpha, beta) = (alpha as f32, beta as f32);
        let handle = self.handle.lock().map_err(|_| anyhow!("a product failed before"))?;
        // cuBLAS counts columns first, so it is told of the transposed product, `cᵀ = bᵀ · aᵀ`.
        // SAFETY: shapes, strides and dtypes are those of live tensors, checked above.
        let done = unsafe {
            result::gemm_ex(
                handle.0,
                operation(of_b),
                operation(of_a),
                n as i32,
                m as i32,
                k as i32,
                std::ptr::from_ref(&alpha).cast::<c_void>(),
                b.data_ptr().cast_const(),
                bf16,
                of_b.stride,
                a.data_ptr().cast_const(),
                bf16,
                of_a.stride,
                std::ptr::from_ref(&beta).cast::<c_void>(),
                c.data_ptr(),
                to,
                of_c.stride,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        done.map_err(refused).with_context(|| format!("a product of [{m}, {k}] and [{k}, {n}]"))
    }
}

fn operation(layout: Layout) -> sys::cublasOperation_t {
    if layout.transposed { sys::cublasOperation_t::CUBLAS_OP_T } else { sys::cublasOperation_t::CUBLAS_OP_N }
}

fn size(matrix: &Tensor) -> Result<[i64; 2]> {
    matrix.size().try_into().map_err(|size| anyhow!("a product takes matrices, got shape {size:?}"))
}

/// How a matrix lies. One row or one column lies both ways; the stride then must only be long enough.
fn layout(matrix: &Tensor) -> Result<Layout> {
    let ([rows, columns], strides) = (size(matrix)?, matrix.stride());
    let (by_row, by_column) = (strides[0], strides[1]);
    let (transposed, stride) = if by_column == 1 || columns == 1 {
        (false, if rows == 1 { columns } else { by_row })
    } else if by_row == 1 || rows == 1 {
        (true, if columns == 1 { rows } else { by_column })
    } else {
        bail!("a product takes matrices whose rows or columns are contiguous, got strides {strides:?}");
    };
    let least = if transposed { rows } else { columns };
    ensure!(stride >= least, "rows of {least} elements overlap: they lie {stride} apart");
    Ok(Layout { transposed, stride: i32::try_from(stride)? })
}

fn refused(error: result::CublasError) -> anyhow::Error {
    anyhow!("cuBLAS says {:?}", error.0)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn matrices_lie_by_rows_or_by_columns() {
        let x = Tensor::zeros([6, 10], (Kind::BFloat16, Device::Cpu));
        assert_eq!(layout(&x).unwrap(), Layout { transposed: false, stride: 10 });
        assert_eq!(layout(&x.tr()).unwrap(), Layout { transposed: true, stride: 10 });
        assert_eq!(layout(&x.narrow(1, 2, 4)).unwrap(), Layout { transposed: false, stride: 10 });
        assert_eq!(layout(&x.narrow(1, 2, 1)).unwrap(), Layout { transposed: false, stride: 10 });
        assert_eq!(layout(&x.narrow(0, 2, 1)).unwrap(), Layout { transposed: false, stride: 10 });
        assert!(layout(&x.slice(1, 0, 10, 2)).is_err());
        assert!(layout(&x.select(0, 0)).is_err());
    }

    #[test]
    fn products_are_scaled_and_added() {
        let gemm = Gemm::new(Device::Cpu).unwrap();
        let options = (Kind::Float, Device::Cpu);
        let (a, b) = (Tensor::randn([5, 7], options), Tensor::randn([3, 7], options));
        let c = Tensor::full([5, 3], f64::NAN, options);
        gemm.multiply(&a, &b.tr(), &c, 2.0, 0.0).unwrap();
        gemm.multiply(&a, &b.tr(), &c, 1.0, -0.5).unwrap();
        assert!(c.abs().max().double_value(&[]) < 1e-5, "{c}");
        assert!(gemm.multiply(&a, &b, &c, 1.0, 0.0).is_err());
    }
}
