//! The bitsandbytes libraries, loaded at run time: an independent second opinion on [`super::nf4`].
//!
//! Nothing is computed with them in training or serving: on a CUDA error they end the process, and their quantisers know
//! only the null stream.

use std::ffi::c_void;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, ensure};
use bitsandbytes_sys::BitsAndBytes;
use half::bf16;
use tch::{Device, Kind, Tensor};

use super::host;
use super::nf4::BLOCK;

/// File names of the two libraries.
pub const LIBRARIES: [&str; 2] = ["libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"];

/// Where the libraries may lie: where the user says, beside the program (a bundle), beside libtorch (scripts/setup, or
/// the Python that holds torch).
pub fn folders(given: Option<&Path>, libtorch: Option<&Path>) -> Vec<PathBuf> {
    if let Some(folder) = given {
        return vec![folder.to_path_buf()];
    }
    let program = std::env::current_exe().ok();
    let beside_program = program.as_deref().and_then(Path::parent).into_iter().flat_map(|folder| {
        [folder.to_path_buf(), folder.join("lib"), folder.join("../lib"), folder.join("bitsandbytes")]
    });
    let beside_libtorch = libtorch.and_then(|folder| folder.ancestors().nth(2));
    beside_program.chain(beside_libtorch.map(|folder| folder.join("bitsandbytes"))).collect()
}

/// The first of `folders` that holds `library`, joined with it.
pub fn find(folders: &[PathBuf], library: &str) -> Option<PathBuf> {
    folders.iter().map(|folder| folder.join(library)).find(|file| file.is_file())
}

/// `libbitsandbytes_cpu.so`.
#[derive(Debug)]
pub struct CpuLibrary(Library);

/// `libbitsandbytes_cuda130.so`; [`super::device::cuda`] must have succeeded before.
#[derive(Debug)]
pub struct CudaLibrary(Library);

struct Library(BitsAndBytes);

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BitsAndBytes")
    }
}

fn load(file: &Path) -> Result<BitsAndBytes> {
    // SAFETY: the library's initialisers only register its own kernels.
    unsafe { BitsAndBytes::new(file) }.with_context(|| format!("cannot load `{}`", file.display()))
}

/// A missing symbol would panic when called.
fn present<T>(symbol: &Result<T, libloading::Error>, file: &Path) -> Result<()> {
    symbol
        .as_ref()
        .map(|_| ())
        .map_err(|error| anyhow!("`{}` is not bitsandbytes 0.50: {error}", file.display()))
}

impl CpuLibrary {
    /// Loads the library.
    ///
    /// # Errors
    /// When the file cannot be loaded or lacks a function.
    pub fn open(file: &Path) -> Result<Self> {
        let library = load(file)?;
        present(&library.cquantize_blockwise_cpu_fp32, file)?;
        present(&library.cdequantize_blockwise_cpu_fp32, file)?;
        present(&library.cdequantize_blockwise_cpu_nf4_fp32, file)?;
        present(&library.cdequantize_blockwise_cpu_nf4_bf16, file)?;
        Ok(Self(Library(library)))
    }

    /// Dequantises NF4: `packed` `[out * in / 2]` u8, `scales` `[blocks]` f32, both on the CPU, to `[out, in]` f32 or bf16.
    ///
    /// # Errors
    /// When the parts do not fit the shape, or `in` is no multiple of the block: the library counts blocks by row.
    pub fn dequantize_nf4(
        &self,
        packed: &Tensor,
        scales: &Tensor,
        shape: [i64; 2],
        kind: Kind,
    ) -> Result<Tensor> {
        let [out, input] = shape;
        let codes = host::slice::<u8>(packed)?;
        let scales = host::slice::<f32>(scales)?;
        check_sizes(codes.len() * 2, scales.len(), shape)?;
        ensure!(
            input % BLOCK as i64 == 0,
            "bitsandbytes' CPU library needs rows of a multiple of {BLOCK}, got {input}"
        );
        let (codes, scales, block) = (codes.as_ptr().cast_mut(), scales.as_ptr(), BLOCK as i64);
        let library = &self.0.0;
        match kind {
            // SAFETY: out * in codes and their scales are readable (checked), and as many elements writable; the
            // library only reads its inputs.
            Kind::Float => Ok(host::filled(&shape, |y: &mut [f32]| unsafe {
                library.cdequantize_blockwise_cpu_nf4_fp32(codes, scales, y.as_mut_ptr(), block, out, input);
            })),
            // SAFETY: as above; a bf16 is two bytes.
            Kind::BFloat16 => Ok(host::filled(&shape, |y: &mut [bf16]| unsafe {
                library.cdequantize_blockwise_cpu_nf4_bf16(
                    codes,
                    scales,
                    y.as_mut_ptr().cast(),
                    block,
                    out,
                    input,
                );
            })),
            other => Err(anyhow!("bitsandbytes dequantises to f32 and bf16 here, not to {other:?}")),
        }
    }

    /// The 8-bit codes `[elements]` u8 and scales `[blocks]` f32 of `x` (f32) under an ascending codebook of 256.
    ///
    /// # Errors
    /// When `x` is not a contiguous f32 tensor on the CPU.
    pub fn quantize_8bit(&self, codebook: &[f32; 256], x: &Tensor, block: usize) -> Result<(Tensor, Tensor)> {
        let x = host::slice::<f32>(x)?;
        ensure!(block > 0, "a block holds at least one element");
        // The library takes it as mutable.
        let mut codebook = *codebook;
        let mut scales = vec![0f32; x.len().div_ceil(block)];
        let (source, block, length) = (x.as_ptr().cast_mut(), block as i64, x.len() as i64);
        let library = &self.0.0;
        // SAFETY: the codebook has 256 levels, x `length` elements, the scales one per block, the output `length`
        // bytes; the library writes to the last two only.
        let codes = host::filled(&[length], |codes: &mut [u8]| unsafe {
            let (code, scale) = (codebook.as_mut_ptr(), scales.as_mut_ptr());
            library.cquantize_blockwise_cpu_fp32(code, source, scale, codes.as_mut_ptr(), block, length);
        });
        Ok((codes, Tensor::from_slice(&scales)))
    }

    /// The inverse of [`quantize_8bit`](Self::quantize_8bit), `[elements]` f32.
    ///
    /// # Errors
    /// When the tensors are not contiguous on the CPU or there are too few scales.
    pub fn dequantize_8bit(
        &self,
        codebook: &[f32; 256],
        codes: &Tensor,
        scales: &Tensor,
        block: usize,
    ) -> Result<Tensor> {
        let codes = host::slice::<u8>(codes)?;
        let scales = host::slice::<f32>(scales)?;
        ensure!(
            block > 0 && scales.len() == codes.len().div_ceil(block),
            "{} codes in blocks of {block} do not go with {} scales",
            codes.len(),
            scales.len()
        );
        let mut codebook = *codebook;
        let (source, scales) = (codes.as_ptr().cast_mut(), scales.as_ptr());
        let (block, length) = (block as i64, codes.len() as i64);
        let library = &self.0.0;
        // SAFETY: 256 levels, `length` codes, a scale per block, `length` elements to write.
        Ok(host::filled(&[length], |y: &mut [f32]| unsafe {
            library.cdequantize_blockwise_cpu_fp32(
                codebook.as_mut_ptr(),
                source,
                scales,
                y.as_mut_ptr(),
                block,
                length,
            );
        }))
    }
}

impl CudaLibrary {
    /// Loads the library.
    ///
    /// # Errors
    /// When the file cannot be loaded or lacks a function.
    pub fn open(file: &Path) -> Result<Self> {
        let library = load(file)?;
        present(&library.cquantize_blockwise_fp32_nf4, file)?;
        present(&library.cquantize_blockwise_bf16_nf4, file)?;
        present(&library.cdequantize_blockwise_fp32_nf4, file)?;
        present(&library.cdequantize_blockwise_bf16_nf4, file)?;
        Ok(Self(Library(library)))
    }

    /// Quantises a weight `[out, in]` f32 or bf16 on the GPU: codes `[out * in / 2]` u8 and scales `[blocks]` f32.
    ///
    /// # Errors
    /// When the weight is not contiguous on a GPU, of another dtype, or its size no multiple of 64.
    pub fn quantize_nf4(&self, weight: &Tensor) -> Result<(Tensor, Tensor)> {
        let length = weight.numel() as i64;
        ensure!(length % BLOCK as i64 == 0, "NF4 takes a multiple of {BLOCK} weights, got {length}");
        check_on_gpu(weight, weight.kind())?;
        let packed = Tensor::f_empty([length / 2], (Kind::Uint8, weight.device()))?;
        let scales = Tensor::f_empty([length / BLOCK as i64], (Kind::Float, weight.device()))?;
        let (length, block) = (i32::try_from(length)?, BLOCK as i32);
        let (x, y, scale) = (weight.data_ptr(), packed.data_ptr().cast(), scales.data_ptr().cast());
        let library = &self.0.0;
        match weight.kind() {
            // SAFETY: `length` weights are readable, the outputs are fresh and of the sizes that the library fills;
            // libtorch works on the null stream too, so its order is ours. NF4 needs no codebook.
            Kind::Float => unsafe {
                library.cquantize_blockwise_fp32_nf4(std::ptr::null_mut(), x.cast(), scale, y, block, length);
            },
            // SAFETY: as above.
            Kind::BFloat16 => unsafe {
                library.cquantize_blockwise_bf16_nf4(std::ptr::null_mut(), x.cast(), scale, y, block, length);
            },
            other => return Err(anyhow!("bitsandbytes quantises f32 and bf16 here, not {other:?}")),
        }
        Ok((packed, scales))
    }

    /// As [`CpuLibrary::dequantize_nf4`], on the GPU.
    ///
    /// # Errors
    /// When the parts do not fit the shape or are not contiguous on a GPU.
    pub fn dequantize_nf4(
        &self,
        packed: &Tensor,
        scales: &Tensor,
        shape: [i64; 2],
        kind: Kind,
    ) -> Result<Tensor> {
        check_sizes(packed.numel() * 2, scales.numel(), shape)?;
        check_on_gpu(packed, Kind::Uint8)?;
        check_on_gpu(scales, Kind::Float)?;
        ensure!(packed.device() == scales.device(), "codes and scales are on different GPUs");
        let y = Tensor::f_empty(shape, (kind, packed.device()))?;
        let (length, block) = (i32::try_from(y.numel())?, BLOCK as i32);
        let (codes, scale, null) =
            (packed.data_ptr().cast(), scales.data_ptr().cast(), std::ptr::null_mut::<c_void>());
        let library = &self.0.0;
        match kind {
            // SAFETY: sizes and places were checked, the output is fresh; the null stream is libtorch's.
            Kind::Float => unsafe {
                library.cdequantize_blockwise_fp32_nf4(
                    null.cast(),
                    codes,
                    scale,
                    y.data_ptr().cast(),
                    block,
                    length,
                    null,
                );
            },
            // SAFETY: as above.
            Kind::BFloat16 => unsafe {
                library.cdequantize_blockwise_bf16_nf4(
                    null.cast(),
                    codes,
                    scale,
                    y.data_ptr().cast(),
                    block,
                    length,
                    null,
                );
            },
            other => return Err(anyhow!("bitsandbytes dequantises to f32 and bf16 here, not to {other:?}")),
        }
        Ok(y)
    }
}

fn check_sizes(codes: usize, scales: usize, [out, input]: [i64; 2]) -> Result<()> {
    let elements = usize::try_from(out)? * usize::try_from(input)?;
    ensure!(
        codes == elements && scales == elements / BLOCK && elements.is_multiple_of(BLOCK),
        "{codes} codes and {scales} scales do not make a weight [{out}, {input}]"
    );
    Ok(())
}

fn check_on_gpu(tensor: &Tensor, kind: Kind) -> Result<()> {
    ensure!(
        matches!(tensor.device(), Device::Cuda(_)) && tensor.kind() == kind && tensor.is_contiguous(),
        "expected a contiguous {kind:?} tensor on the GPU, got {:?} on {:?}",
        tensor.kind(),
        tensor.device()
    );
    Ok(())
}

// A bf16 crosses the interface as two bytes.
const _: () = assert!(size_of::<bf16>() == 2);
