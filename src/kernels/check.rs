//! Each kernel against its twin, on the GPU at hand: `granite doctor --kernels` and the tests run this.
//!
//! Sizes include one, odd ones and ones that no block divides; operands begin at aligned and at unaligned addresses; inputs
//! are made anew from the seed; outputs are poisoned first and lie between guards that must stay as they were.

use std::time::Instant;

use anyhow::{Result, bail, ensure};
use tch::{Cuda, Device, Kind, Tensor};

use super::bitsandbytes::CudaLibrary;
use super::dropout::{self, DropoutKey, Mask, dropout_reference};
use super::nf4::{BLOCK, LEVELS, Nf4Weight};

/// What became of one check.
#[derive(Debug)]
pub struct Check {
    /// The kernel, or what was compared.
    pub name: &'static str,
    /// Comparisons made.
    pub cases: usize,
    /// What differed, when something did.
    pub failure: Option<String>,
    /// GB/s of memory traffic at a size beyond every cache, where that bounds the kernel.
    pub bandwidth: Option<f64>,
}

impl Check {
    fn new(name: &'static str, outcome: Result<Outcome>) -> Self {
        match outcome {
            Ok(Outcome { cases, bandwidth }) => Self { name, cases, failure: None, bandwidth },
            Err(error) => Self { name, cases: 0, failure: Some(format!("{error:#}")), bandwidth: None },
        }
    }
}

struct Outcome {
    cases: usize,
    bandwidth: Option<f64>,
}

/// Checks everything on a GPU; the same seed makes the same inputs.
pub fn all(device: Device, seed: i64, bitsandbytes: Option<&CudaLibrary>) -> Vec<Check> {
    tch::manual_seed(seed);
    let mut checks = vec![
        Check::new("dropout_f32", dropout_kernel(device, Kind::Float)),
        Check::new("dropout_bf16", dropout_kernel(device, Kind::BFloat16)),
        Check::new("nf4 on the GPU, as on the processor", nf4_across_devices(device)),
    ];
    if let Some(library) = bitsandbytes {
        checks.push(Check::new("nf4, as bitsandbytes on the GPU", nf4_as_bitsandbytes(device, library)));
    }
    checks
}

/// Elements before and after an output that the kernel must leave alone.
const GUARD: i64 = 64;

fn dropout_kernel(device: Device, kind: Kind) -> Result<Outcome> {
    let key = DropoutKey { seed: 0xfeed_beef_dead_cafe, microbatch: (7 << 32) | 9, module: 41 };
    let mut cases = 0;
    for elements in [1, 2, 3, 4, 7, 8, 9, 31, 255, 1024, 2047, 2048, 2049, 100_003] {
        for (from, to) in [(0, 0), (1, 1), (0, 1), (3, 0)] {
            for p in [0.1, 0.5, 1.0 - 1e-12] {
                dropout_case(device, kind, elements, (from, to), p, key)?;
                cases += 1;
            }
        }
    }
    Ok(Outcome { cases, bandwidth: Some(dropout_bandwidth(device, kind)?) })
}

/// One comparison, bit for bit; `x` and `y` begin so many elements behind an aligned address.
fn dropout_case(
    device: Device,
    kind: Kind,
    elements: i64,
    (from, to): (i64, i64),
    p: f64,
    key: DropoutKey,
) -> Result<()> {
    let x = random_bits(kind, from + elements);
    let on_gpu = x.f_to_device(device)?.narrow(0, from, elements);
    let x = x.narrow(0, from, elements);
    let poison = random_bits(kind, GUARD + to + elements + GUARD);
    let buffer = poison.to_device(device);
    dropout::launch(&on_gpu, &buffer.narrow(0, GUARD + to, elements), Mask::new(p, key))?;

    let wanted = poison.copy();
    wanted.narrow(0, GUARD + to, elements).copy_(&dropout_reference(&x, p, key)?);
    match first_difference(&wanted, &buffer.f_to_device(Device::Cpu)?) {
        None => Ok(()),
        Some(difference) => bail!(
            "{elements} elements, x at {from}, y at {to}, p = {p}, output from element {} on: {difference}",
            GUARD + to
        ),
    }
}

/// Where two tensors of one shape on the CPU differ in their bits, in words; `None` where they do not.
fn first_difference(wanted: &Tensor, found: &Tensor) -> Option<String> {
    let (wanted, found) = (bits(wanted).view([-1]), bits(found).view([-1]));
    let different = wanted.not_equal_tensor(&found).nonzero(); // [different, 1] i64
    let count = different.size()[0];
    if count == 0 {
        return None;
    }
    let first = different.int64_value(&[0, 0]);
    let (wanted, found) = (wanted.int64_value(&[first]), found.int64_value(&[first]));
    Some(format!(
        "{count} differ, the first is element {first} with bits {found:#x}, the twin's are {wanted:#x}"
    ))
}

/// Any bits at all: subnormal numbers, infinities and NaN among them. On the CPU.
fn random_bits(kind: Kind, elements: i64) -> Tensor {
    let (integer, half_range) = integer_of(kind);
    Tensor::randint_low(-half_range, half_range, [elements], (integer, Device::Cpu)).view_dtype(kind)
}

fn bits(tensor: &Tensor) -> Tensor {
    tensor.contiguous().view_dtype(integer_of(tensor.kind()).0)
}

/// The integer type as wide as a float type, and half the number of its values.
fn integer_of(kind: Kind) -> (Kind, i64) {
    if kind == Kind::Float { (Kind::Int, 1 << 31) } else { (Kind::Int16, 1 << 15) }
}

/// GB/s at 256 MiB read and as much written, the best of ten.
fn dropout_bandwidth(device: Device, kind: Kind) -> Result<f64> {
    let bytes: i64 = 256 << 20;
    let x = Tensor::f_zeros([bytes / kind.elt_size_in_bytes() as i64], (kind, device))?;
    let y = x.f_empty_like()?;
    let mask = Mask::new(0.1, DropoutKey { seed: 1, microbatch: 2, module: 3 });
    let mut best = f64::INFINITY;
    for _ in 0..11 {
        synchronize(device);
        let start = Instant::now();
        dropout::launch(&x, &y, mask)?;
        synchronize(device);
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * bytes as f64 / best / 1e9)
}

fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

const NF4_SHAPES: [[i64; 2]; 4] = [[1, 64], [3, 64], [577, 192], [1024, 1088]];

fn nf4_across_devices(device: Device) -> Result<Outcome> {
    let mut cases = 0;
    for shape in NF4_SHAPES {
        let weight = Nf4Weight::quantize(&Tensor::randn(shape, (Kind::Float, Device::Cpu)))?;
        for kind in [Kind::Float, Kind::BFloat16] {
            let found = weight.to_device(device).dequantize(kind).f_to_device(Device::Cpu)?;
            let difference = first_difference(&weight.dequantize(kind), &found);
            ensure!(difference.is_none(), "{shape:?} {kind:?}: {}", difference.unwrap_or_default());
            cases += 1;
        }
    }
    Ok(Outcome { cases, bandwidth: None })
}

/// Their quantisation on the GPU against ours on the processor, and both dequantisations on the GPU.
///
/// Codes must agree but where a weight lies on the boundary of two levels as nearly as f32 division can tell; the weights
/// made from the same codes and scales must agree bit for bit.
fn nf4_as_bitsandbytes(device: Device, library: &CudaLibrary) -> Result<Outcome> {
    let mut cases = 0;
    for shape in NF4_SHAPES {
        let weight = Tensor::randn(shape, (Kind::Float, device));
        let ours = Nf4Weight::quantize(&weight)?.to_device(device);
        let (codes, scales) = library.quantize_nf4(&weight)?;
        let beyond = codes_beyond_boundary(&weight, &scales, &ours.packed, &codes, 1e-6);
        ensure!(beyond == 0, "{shape:?}: {beyond} codes differ from ours and lie on no boundary");
        for kind in [Kind::Float, Kind::BFloat16] {
            let theirs = library.dequantize_nf4(&ours.packed, &ours.scales(), shape, kind)?;
            let difference = first_difference(
                &theirs.to_device(Device::Cpu),
                &ours.dequantize(kind).to_device(Device::Cpu),
            );
            ensure!(difference.is_none(), "{shape:?} {kind:?}: {}", difference.unwrap_or_default());
            cases += 1;
        }
        cases += 1;
    }
    Ok(Outcome { cases, bandwidth: None })
}

/// Counts the codes in which two quantisations of `weight` differ although the weight, in units of its block's scale, is
/// farther than `tolerance` from the middle of two neighbouring levels. Packed codes `[elements / 2]` u8, scales `[blocks]`.
pub fn codes_beyond_boundary(
    weight: &Tensor,
    scales: &Tensor,
    a: &Tensor,
    b: &Tensor,
    tolerance: f64,
) -> i64 {
    let (a, b) = (unpacked(a), unpacked(b)); // [elements] i64
    let unit =
        weight.to_kind(Kind::Double).view([-1, BLOCK as i64]) / scales.to_kind(Kind::Double).unsqueeze(1);
    let levels = Tensor::from_slice(&LEVELS).to_kind(Kind::Double).to_device(weight.device());
    let middle = (levels.index_select(0, &a) + levels.index_select(0, &b)) / 2.0; // where the two would meet
    let neighbours = (&a - &b).abs().le(1);
    let near = (unit.view([-1]) - middle).abs().le(tolerance).logical_and(&neighbours);
    a.not_equal_tensor(&b).logical_and(&near.logical_not()).sum(Kind::Int64).int64_value(&[])
}

/// One code an element, the high nibble first.
fn unpacked(packed: &Tensor) -> Tensor {
    let packed = packed.to_kind(Kind::Int64);
    let (high, low) = (packed.bitwise_right_shift_tensor_scalar(4), packed.bitwise_and(15));
    Tensor::stack(&[high, low], 1).view([-1])
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn a_changed_bit_is_found() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let wanted = random_bits(kind, 1000);
            assert_eq!(first_difference(&wanted, &wanted.copy()), None);
            let found = wanted.copy();
            let _ = bits(&found).get(617).bitwise_xor_(1);
            assert!(
                first_difference(&wanted, &found).unwrap().starts_with("1 differ, the first is element 617 ")
            );
        }
        // Zeros of both signs are equal as numbers, not as bits.
        let zeros = Tensor::from_slice(&[0.0f32, 0.0]);
        assert!(first_difference(&zeros, &zeros.neg()).is_some());
    }

    #[test]
    fn random_bits_reach_the_corners() {
        let x = random_bits(Kind::BFloat16, 1 << 20);
        let count = |mask: Tensor| mask.sum(Kind::Int64).int64_value(&[]);
        assert!(count(x.isnan()) > 0 && count(x.isinf()) > 0 && count(x.signbit()) > 0);
        assert!(count(x.abs().lt(1e-38).logical_and(&x.not_equal(0.0))) > 0, "subnormal numbers");
    }

    #[test]
    fn a_wrong_code_is_found() {
        let weight = Tensor::randn([4, 64], (Kind::Float, Device::Cpu));
        let ours = Nf4Weight::quantize(&weight).unwrap();
        let scales = weight.abs().amax([1i64].as_slice(), false);
        assert_eq!(codes_beyond_boundary(&weight, &scales, &ours.packed, &ours.packed, 0.0), 0);
        let wrong = ours.packed.copy();
        let _ = wrong.get(3).bitwise_xor_(0x31);
        assert_eq!(codes_beyond_boundary(&weight, &scales, &ours.packed, &wrong, 1e-3), 2);
    }
}
