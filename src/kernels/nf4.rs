//! NF4: 4-bit NormalFloat in blocks of 64 with doubly quantised scales, in bitsandbytes' stored layout.
//!
//! Dettmers et al., *QLoRA*, section 3. A block of 64 consecutive weights is divided by its largest magnitude
//! (`absmax`) and each quotient replaced by the nearest of 16 levels. The scales, less their mean, are
//! quantised again: blocks of 256 in the signed dynamic 8-bit code.
//!
//! ```text
//! absmax[b] = nested_code[absmax_code[b]] * nested_absmax[b / 256] + nested_offset      each step rounded to f32
//! weight[i] = LEVELS[nibble[i]] * absmax[i / 64]                                        f32, then rounded once
//! ```
//!
//! On the CPU both directions are Rust over all cores, on a GPU kernels of ours; [`Nf4Weight::dequantize_reference`] is
//! the twin in tensor operations for any device.

#[expect(unsafe_code, reason = "kernel launches")]
mod gpu;

use anyhow::{Context as _, Result, ensure};
use half::{bf16, f16};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::dynamic_map::dynamic_map;
use super::host::{self, Element};

/// Weights that share a scale.
pub const BLOCK: usize = 64;

/// Scales that share a scale.
pub const NESTED_BLOCK: usize = 256;

/// The 16 levels, as bitsandbytes publishes them: quantiles of the normal distribution, scaled to `[-1, 1]`.
pub const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Blocks that one task takes: 4,096 weights, enough to forget the cost of a task.
const BLOCKS_PER_TASK: usize = 64;

/// Below this the reciprocal of a scale would overflow; bitsandbytes clamps there too, so a zero block gives zeros.
const SMALLEST_SCALE: f32 = 1e-38;

/// A linear weight in NF4.
#[derive(Debug)]
pub struct Nf4Weight {
    /// Two codes a byte, the first in the high nibble; `[out * in / 2]` u8.
    pub packed: Tensor,
    /// Scale of each block of 64 as a code of `nested_code`; `[blocks]` u8.
    pub absmax: Tensor,
    /// Scale of each 256 scales; `[ceil(blocks / 256)]` f32.
    pub nested_absmax: Tensor,
    /// The 256 levels of a scale's code; `[256]` f32.
    pub nested_code: Tensor,
    /// Mean of the scales, taken off before they were quantised.
    pub nested_offset: f32,
    /// `[out, in]`.
    pub shape: [i64; 2],
}

impl Nf4Weight {
    /// Quantises a weight `[out, in]` of any float dtype where it lies, with the same bits on the CPU and on a GPU.
    ///
    /// # Errors
    /// When the weight is not two-dimensional, its size is no multiple of 64, or a value is not finite.
    pub fn quantize(weight: &Tensor) -> Result<Self> {
        let shape = check_shape(weight)?;
        if weight.device().is_cuda() {
            return gpu::quantize(weight, shape);
        }
        let weight = weight.to_device(Device::Cpu).contiguous();
        let (packed, scales) = match weight.kind() {
            Kind::Float => quantize_blocks(host::slice::<f32>(&weight)?),
            Kind::BFloat16 => quantize_blocks(host::slice::<bf16>(&weight)?),
            Kind::Half => quantize_blocks(host::slice::<f16>(&weight)?),
            Kind::Double => quantize_blocks(host::slice::<f32>(&weight.to_kind(Kind::Float))?),
            kind => anyhow::bail!("cannot quantise a weight of dtype {kind:?} to NF4"),
        };
        let nested = NestedScales::quantize(&scales)?;
        Ok(Self {
            packed,
            absmax: Tensor::from_slice(&nested.codes),
            nested_absmax: Tensor::from_slice(&nested.absmax),
            nested_code: Tensor::from_slice(&nested.levels),
            nested_offset: nested.offset,
            shape,
        })
    }

    /// The weight `[out, in]`: `level * absmax`, unrounded in f32, rounded to nearest even in bf16 and f16.
    pub fn dequantize(&self, kind: Kind) -> Tensor {
        let made = match (self.packed.device(), kind) {
            (Device::Cpu, Kind::Float) => self.dequantize_on_host(|value| value),
            (Device::Cpu, Kind::BFloat16) => self.dequantize_on_host(bf16::from_f32),
            (Device::Cpu, Kind::Half) => self.dequantize_on_host(f16::from_f32),
            (device, Kind::Float | Kind::BFloat16) => {
                let out = Tensor::empty(self.shape, (kind, device));
                dequantize_into(self, &out).map(|()| out)
            }
            _ => return self.dequantize_reference(kind),
        };
        // Parts that are not plain memory (a strided view, say) are left to the twin.
        made.unwrap_or_else(|_| self.dequantize_reference(kind))
    }

    /// The twin of [`dequantize`](Self::dequantize) in tensor operations, on any device.
    pub fn dequantize_reference(&self, kind: Kind) -> Tensor {
        let device = self.packed.device();
        // A byte picks both of its levels at once: half the indices, and no interleaving afterwards.
        let pairs = Tensor::from_slice(&level_pairs()).view([256, 2]).to_device(device);
        let levels = pairs.index_select(0, &self.packed.to_kind(Kind::Int)); // [out * in / 2, 2] f32
        let scaled = levels.view([-1, BLOCK as i64]) * self.scales().unsqueeze(1); // [blocks, 64] f32
        scaled.to_kind(kind).view(self.shape)
    }

    /// The scale of each block, `[blocks]` f32.
    pub fn scales(&self) -> Tensor {
        let levels = self.nested_code.index_select(0, &self.absmax.to_kind(Kind::Int)); // [blocks] f32
        let blocks = self.absmax.size1().unwrap_or(0);
        let spread = self.nested_absmax.repeat_interleave_self_int(NESTED_BLOCK as i64, 0, None);
        // Product and sum are rounded one after the other, as bitsandbytes does; a fused form would differ.
        levels * spread.narrow(0, 0, blocks) + f64::from(self.nested_offset)
    }

    /// The same on another device.
    pub fn to_device(&self, device: Device) -> Self {
        Self {
            packed: self.packed.to_device(device),
            absmax: self.absmax.to_device(device),
            nested_absmax: self.nested_absmax.to_device(device),
            nested_code: self.nested_code.to_device(device),
            nested_offset: self.nested_offset,
            shape: self.shape,
        }
    }

    /// Checks that the parts fit each other, as after reading them from a file.
    ///
    /// # Errors
    /// When a part has another size or dtype than `shape` asks for.
    pub fn check(&self) -> Result<()> {
        let [out, input] = self.shape;
        let elements =
            out.checked_mul(input).filter(|elements| *elements > 0).context("the shape is empty")?;
        let blocks = elements / BLOCK as i64;
        ensure!(elements % BLOCK as i64 == 0, "{elements} weights are no multiple of {BLOCK}");
        let expected = [
            (&self.packed, "packed", Kind::Uint8, elements / 2),
            (&self.absmax, "absmax", Kind::Uint8, blocks),
            (
                &self.nested_absmax,
                "nested_absmax",
                Kind::Float,
                (blocks + NESTED_BLOCK as i64 - 1) / NESTED_BLOCK as i64,
            ),
            (&self.nested_code, "nested_code", Kind::Float, 256),
        ];
        for (part, name, kind, length) in expected {
            ensure!(
                part.kind() == kind && part.size() == [length],
                "`{name}` is {:?} {:?}, expected {kind:?} [{length}]",
                part.kind(),
                part.size()
            );
        }
        Ok(())
    }

    fn dequantize_on_host<T: Element>(&self, round: impl Fn(f32) -> T + Sync) -> Result<Tensor> {
        let packed = host::slice::<u8>(&self.packed)?;
        let scales = self.scales();
        let scales = host::slice::<f32>(&scales)?;
        Ok(host::filled(&self.shape, |weights: &mut [T]| {
            weights
                .par_chunks_mut(BLOCK * BLOCKS_PER_TASK)
                .zip(packed.par_chunks(BLOCK / 2 * BLOCKS_PER_TASK))
                .zip(scales.par_chunks(BLOCKS_PER_TASK))
                .for_each(|((weights, packed), scales)| dequantize_task(weights, packed, scales, &round));
        }))
    }
}

/// Writes the weight to `out`, a view `[out, in]` in f32 or bf16 on the weight's device: rows may lie any distance apart that
/// keeps them from overlapping, a row's elements lie together. The same bits as [`Nf4Weight::dequantize`], into a buffer
/// that exists.
///
/// # Errors
/// When `out` is of another shape, dtype or device or its elements are spread, the weight's parts do not fit its shape, or the
/// driver fails.
pub fn dequantize_into(weight: &Nf4Weight, out: &Tensor) -> Result<()> {
    weight.check()?;
    check_output(weight, out)?;
    if out.device() == Device::Cpu {
        return Ok(out.shallow_clone().f_copy_(&weight.dequantize(out.kind()))?);
    }
    gpu::dequantize(weight, out)
}

fn check_output(weight: &Nf4Weight, out: &Tensor) -> Result<()> {
    let device = weight.packed.device();
    for part in [&weight.packed, &weight.absmax, &weight.nested_absmax, &weight.nested_code] {
        ensure!(part.is_contiguous() && part.device() == device, "the parts of an NF4 weight lie apart");
    }
    ensure!(
        out.device() == device
            && out.size() == weight.shape
            && matches!(out.kind(), Kind::Float | Kind::BFloat16),
        "an NF4 weight {:?} on {device:?} is written as f32 or bf16, its output is {:?} {:?} on {:?}",
        weight.shape,
        out.kind(),
        out.size(),
        out.device()
    );
    let ([rows, columns], stride) = (weight.shape, out.stride());
    ensure!(
        (columns == 1 || stride[1] == 1) && (rows == 1 || stride[0] >= columns),
        "an NF4 weight {:?} is written row by row, its output has strides {stride:?}",
        weight.shape
    );
    Ok(())
}

fn check_shape(weight: &Tensor) -> Result<[i64; 2]> {
    let size = weight.size();
    let shape: [i64; 2] =
        size.as_slice().try_into().ok().with_context(|| format!("NF4 takes a matrix, got shape {size:?}"))?;
    let elements = weight.numel();
    ensure!(
        elements > 0 && elements.is_multiple_of(BLOCK),
        "NF4 takes a multiple of {BLOCK} weights, got shape {size:?}"
    );
    Ok(shape)
}

/// Codes `[elements / 2]` u8 and scales `[blocks]`. A value that is not finite leaves a scale that is not.
fn quantize_blocks<T: Element + Into<f32>>(weights: &[T]) -> (Tensor, Vec<f32>) {
    let mut scales = vec![0f32; weights.len() / BLOCK];
    let packed = host::filled(&[weights.len() as i64 / 2], |packed: &mut [u8]| {
        packed
            .par_chunks_mut(BLOCK / 2)
            .zip(weights.par_chunks(BLOCK))
            .zip(&mut scales)
            .with_min_len(BLOCKS_PER_TASK)
            .for_each(|((packed, weights), scale)| *scale = quantize_block(weights, packed));
    });
    (packed, scales)
}

/// Quantises 64 weights into 32 bytes and gives their scale.
fn quantize_block<T: Element + Into<f32>>(weights: &[T], packed: &mut [u8]) -> f32 {
    let mut values = [0f32; BLOCK];
    for (value, weight) in values.iter_mut().zip(weights) {
        *value = (*weight).into();
    }
    // `f32::max` would drop a NaN; this keeps it, so that the caller sees it.
    let scale =
        values.iter().fold(0f32, |scale, value| if value.abs() <= scale { scale } else { value.abs() });
    let reciprocal = 1.0 / scale.max(SMALLEST_SCALE);
    let mut codes = [0u8; BLOCK];
    for (code, value) in codes.iter_mut().zip(values) {
        *code = nearest_level(value * reciprocal);
    }
    for (byte, pair) in packed.iter_mut().zip(codes.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    if values.iter().any(|value| value.is_nan()) { f32::NAN } else { scale }
}

/// How many boundaries lie below `value`. A value on a boundary takes the lower level, as in bitsandbytes'
/// tree of `>` comparisons; counting has no branches, so the compiler does several values at a time.
fn nearest_level(value: f32) -> u8 {
    const BOUNDARIES: [f32; 15] = boundaries();
    BOUNDARIES.iter().map(|boundary| u8::from(value > *boundary)).sum()
}

/// The middle between each level and the next.
const fn boundaries() -> [f32; 15] {
    let mut boundaries = [0.0; 15];
    let mut index = 0;
    while index < 15 {
        boundaries[index] = (LEVELS[index] + LEVELS[index + 1]) / 2.0;
        index += 1;
    }
    boundaries
}

/// The two levels of every byte, `[256, 2]`.
fn level_pairs() -> Vec<f32> {
    (0..256).flat_map(|byte| [LEVELS[byte >> 4], LEVELS[byte & 15]]).collect()
}

/// Dequantises some whole blocks: the 16 products of a block are taken once, then looked up.
fn dequantize_task<T: Element>(weights: &mut [T], packed: &[u8], scales: &[f32], round: &impl Fn(f32) -> T) {
    for ((weights, packed), scale) in
        weights.chunks_exact_mut(BLOCK).zip(packed.chunks_exact(BLOCK / 2)).zip(scales)
    {
        let products = LEVELS.map(|level| round(level * scale));
        for (pair, byte) in weights.chunks_exact_mut(2).zip(packed) {
            pair[0] = products[usize::from(byte >> 4)];
            pair[1] = products[usize::from(byte & 15)];
        }
    }
}

/// Scales, quantised in their turn.
struct NestedScales {
    codes: Vec<u8>,
    absmax: Vec<f32>,
    levels: [f32; 256],
    offset: f32,
}

impl NestedScales {
    fn quantize(scales: &[f32]) -> Result<Self> {
        let sum = |block: &[f32]| block.iter().map(|scale| f64::from(*scale)).sum::<f64>();
        let sums: Vec<f64> = scales.chunks(NESTED_BLOCK).map(sum).collect();
        let offset = mean(&sums, scales.len())?;
        let levels = dynamic_map(true);
        let mut codes = Vec::with_capacity(scales.len());
        let mut absmax = Vec::with_capacity(scales.len().div_ceil(NESTED_BLOCK));
        for block in scales.chunks(NESTED_BLOCK) {
            let largest = block.iter().map(|scale| (scale - offset).abs()).fold(0f32, f32::max);
            let reciprocal = 1.0 / largest.max(SMALLEST_SCALE);
            codes.extend(block.iter().map(|scale| nearest_code(&levels, (scale - offset) * reciprocal)));
            absmax.push(largest);
        }
        Ok(Self { codes, absmax, levels, offset })
    }
}

/// The mean of so many scales, from the sum of each [`NESTED_BLOCK`] in f64: one order on every device and any number of cores.
///
/// Scales are magnitudes, so the sum is finite just when every weight is.
fn mean(sums: &[f64], scales: usize) -> Result<f32> {
    let sum: f64 = sums.iter().sum();
    ensure!(sum.is_finite(), "the weight holds a value that is not finite");
    Ok((sum / scales.max(1) as f64) as f32)
}

/// The nearest of ascending `levels`; a value in the middle takes the even code, which is where
/// bitsandbytes' binary search over 256 levels ends.
fn nearest_code(levels: &[f32; 256], value: f32) -> u8 {
    let above = levels.partition_point(|level| *level < value).clamp(1, 255);
    let below = above - 1;
    let middle = (levels[below] + levels[above]) * 0.5;
    let takes_above = value > middle || (value == middle && above % 2 == 0);
    // `above` is at most 255.
    (if takes_above { above } else { below }) as u8
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    fn weight(shape: [i64; 2]) -> Nf4Weight {
        Nf4Weight::quantize(&Tensor::randn(shape, (Kind::Float, Device::Cpu))).unwrap()
    }

    #[test]
    fn a_view_is_filled_and_its_surroundings_are_not() {
        let weight = weight([6, 96]);
        for kind in [Kind::Float, Kind::BFloat16] {
            let buffer = Tensor::full([8, 100], 7.0, (kind, Device::Cpu));
            let out = buffer.narrow(0, 1, 6).narrow(1, 3, 96);
            dequantize_into(&weight, &out).unwrap();
            assert!(out.equal(&weight.dequantize_reference(kind)));
            assert_eq!(buffer.eq(7.0).sum(Kind::Int64).int64_value(&[]), 800 - 6 * 96, "{kind:?}");
        }
    }

    #[test]
    fn outputs_that_do_not_fit_are_refused() {
        let weight = weight([6, 96]);
        let options = |kind| (kind, Device::Cpu);
        let refused = |out: &Tensor| dequantize_into(&weight, out).unwrap_err().to_string();
        assert!(
            refused(&Tensor::zeros([96, 6], options(Kind::Float))).contains("its output is Float [96, 6]")
        );
        assert!(refused(&Tensor::zeros([6, 96], options(Kind::Half))).contains("f32 or bf16"));
        let spread = Tensor::zeros([96, 6], options(Kind::Float)).tr();
        assert!(refused(&spread).contains("strides [1, 6]"));
        let overlapping = Tensor::zeros([1, 96], options(Kind::Float)).expand([6, 96], false);
        assert!(refused(&overlapping).contains("strides [0, 1]"));
        let broken = Nf4Weight { nested_absmax: Tensor::zeros([2], options(Kind::Float)), ..weight };
        let out = Tensor::zeros([6, 96], options(Kind::Float));
        assert!(dequantize_into(&broken, &out).unwrap_err().to_string().contains("`nested_absmax`"));
    }
}
