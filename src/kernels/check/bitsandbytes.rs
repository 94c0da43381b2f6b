//! NF4 on the GPU against NF4 on the processor and against bitsandbytes' own kernels.

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use super::Outcome;
use super::exact::first_difference;
use crate::kernels::bitsandbytes::CudaLibrary;
use crate::kernels::nf4::{BLOCK, LEVELS, Nf4Weight};

const SHAPES: [[i64; 2]; 4] = [[1, 64], [3, 64], [577, 192], [1024, 1088]];

pub(super) fn across_devices(device: Device) -> Result<Outcome> {
    let mut cases = 0;
    for shape in SHAPES {
        let weight = Nf4Weight::quantize(&Tensor::randn(shape, (Kind::Float, Device::Cpu)))?;
        for kind in [Kind::Float, Kind::BFloat16] {
            let found = weight.to_device(device).dequantize(kind).f_to_device(Device::Cpu)?;
            let difference = first_difference(&weight.dequantize(kind), &found);
            ensure!(difference.is_none(), "{shape:?} {kind:?}: {}", difference.unwrap_or_default());
            cases += 1;
        }
    }
    Ok(Outcome::exact(cases))
}

/// Their quantisation on the GPU against ours on the processor, and both dequantisations on the GPU.
///
/// Codes must agree but where a weight lies on the boundary of two levels as nearly as f32 division can tell; the weights
/// made from the same codes and scales must agree bit for bit.
pub(super) fn as_bitsandbytes(device: Device, library: &CudaLibrary) -> Result<Outcome> {
    let mut cases = 0;
    for shape in SHAPES {
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
    Ok(Outcome::exact(cases))
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
    fn a_wrong_code_is_found() {
        // Levels themselves: no element lies near the middle of two.
        let weight = Tensor::from_slice(&LEVELS).repeat([4, 4]);
        let ours = Nf4Weight::quantize(&weight).unwrap();
        let scales = weight.abs().amax([1i64].as_slice(), false);
        assert_eq!(codes_beyond_boundary(&weight, &scales, &ours.packed, &ours.packed, 0.0), 0);
        let wrong = ours.packed.copy();
        let _ = wrong.get(3).bitwise_xor_(0x31);
        assert_eq!(codes_beyond_boundary(&weight, &scales, &ours.packed, &wrong, 1e-3), 2);
    }
}
