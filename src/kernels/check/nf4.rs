//! The kernels of cuda/nf4.cu, bit for bit.

use anyhow::{Context as _, Result, bail, ensure};
use tch::{Device, Kind, Tensor};

use super::bandwidth::bandwidth;
use super::exact::{first_difference, random_bits};
use super::tolerance::{Framed, Layout};
use super::{Checks, Outcome};
use crate::kernels::dynamic_map::dynamic_map;
use crate::kernels::nf4::{BLOCK, LEVELS, NESTED_BLOCK, Nf4Weight, dequantize_into};

/// The checks of this module.
pub(super) fn checks(checks: &mut Checks<'_>) {
    checks.run("nf4_dequantize_f32", |device| dequantize(device, Kind::Float));
    checks.run("nf4_dequantize_bf16", |device| dequantize(device, Kind::BFloat16));
    checks.run("nf4_quantize_f32", |device| quantize(device, Kind::Float).map(Outcome::exact));
    checks.run("nf4_quantize_bf16", |device| quantize(device, Kind::BFloat16).map(Outcome::exact));
    checks.run("nf4_quantize_f16", |device| quantize(device, Kind::Half).map(Outcome::exact));
}

/// Rows of one element, of no whole chunk, of a chunk in one dtype only; less and more than a block's work; whole layers.
const SHAPES: [[i64; 2]; 13] = [
    [64, 1],
    [1, 64],
    [64, 3],
    [3, 64],
    [2, 96],
    [32, 70],
    [16, 100],
    [128, 8],
    [577, 192],
    [1024, 1088],
    [5, 4096],
    [3, 12_800],
    [9, 8256],
];

fn dequantize(device: Device, kind: Kind) -> Result<Outcome> {
    Ok(Outcome::exact(dequantize_cases(device, kind)?).timed(move || dequantize_rate(device, kind)))
}

fn dequantize_cases(device: Device, kind: Kind) -> Result<usize> {
    let mut cases = 0;
    for [rows, columns] in SHAPES {
        let dense = Layout::dense(rows, columns);
        let strided = |gap: i64| dense.strided(columns + gap);
        for layout in [dense, dense.at(1), dense.at(8), strided(64), strided(8).at(8), strided(3)] {
            dequantize_case(device, kind, layout).with_context(|| format!("{layout:?}"))?;
            cases += 1;
        }
    }
    Ok(cases)
}

fn dequantize_case(device: Device, kind: Kind, layout: Layout) -> Result<()> {
    let weight = random_weight([layout.rows, layout.columns]);
    let out = Framed::output(kind, layout, device)?;
    dequantize_into(&weight.to_device(device), &out.view())?;
    out.intact("the weight")?;
    let found = out.view().f_to_device(Device::Cpu)?;
    match first_difference(&weight.dequantize_reference(kind), &found) {
        None => Ok(()),
        Some(difference) => bail!("{difference}"),
    }
}

/// Any codes at all, on the CPU.
fn random_weight(shape: [i64; 2]) -> Nf4Weight {
    let elements = shape[0] * shape[1];
    let blocks = elements / BLOCK as i64;
    let bytes = |length| Tensor::randint(256, [length], (Kind::Uint8, Device::Cpu));
    let groups = (blocks as usize).div_ceil(NESTED_BLOCK) as i64;
    Nf4Weight {
        packed: bytes(elements / 2),
        absmax: bytes(blocks),
        nested_absmax: Tensor::randn([groups], (Kind::Float, Device::Cpu)).exp(),
        nested_code: Tensor::from_slice(&dynamic_map(true)),
        nested_offset: Tensor::randn([1], (Kind::Float, Device::Cpu)).double_value(&[0]) as f32,
        shape,
    }
}

/// Over the largest weight of Granite 3.1 8B, three of them in turn.
pub(super) fn dequantize_rate(device: Device, kind: Kind) -> Result<f64> {
    let shape = [12_800, 4096];
    let weight = random_weight(shape);
    let weights: Vec<Nf4Weight> = (0..3).map(|_| weight.to_device(device)).collect();
    let out = || Ok(Tensor::f_empty(shape, (kind, device))?);
    let outs: Vec<Tensor> = weights.iter().map(|_| out()).collect::<Result<_>>()?;
    let elements = shape[0] * shape[1];
    let read = elements / 2 + elements / BLOCK as i64 + elements / (BLOCK * NESTED_BLOCK) as i64 * 4;
    let written = elements * kind.elt_size_in_bytes() as i64;
    bandwidth(device, read + written, 3, |set| dequantize_into(&weights[set], &outs[set]))
}

/// On the GPU as on the CPU, bit for bit.
fn quantize(device: Device, kind: Kind) -> Result<usize> {
    let mut cases = 0;
    for shape in SHAPES {
        let numbers = Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 0.02;
        // Any bits that are numbers, the smallest among them.
        let bits = random_bits(kind, shape[0] * shape[1]).view(shape);
        let bits = bits.where_self(&bits.isfinite(), &bits.zeros_like());
        for weight in [with_corners(&numbers).to_kind(kind), bits] {
            let (wanted, found) =
                (Nf4Weight::quantize(&weight)?, Nf4Weight::quantize(&weight.to_device(device))?);
            same_parts(&wanted, &found, device).with_context(|| format!("{shape:?}"))?;
            cases += 1;
        }
    }
    for broken in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let weight = Tensor::zeros([9, 64], (kind, device));
        let _ = weight.get(5).get(17).fill_(broken);
        ensure!(Nf4Weight::quantize(&weight).is_err(), "a weight that holds {broken} was quantised");
        cases += 1;
    }
    Ok(cases)
}

/// The first blocks of a matrix replaced: zeros, one value, an outlier, every boundary of two levels.
fn with_corners(weight: &Tensor) -> Tensor {
    let weight = weight.copy();
    let blocks = weight.view([-1, BLOCK as i64]);
    let fill = |index: i64, values: Tensor| {
        if index < blocks.size()[0] {
            blocks.get(index).copy_(&values);
        }
    };
    let block = || Tensor::zeros([BLOCK as i64], (Kind::Float, Device::Cpu));
    fill(0, block());
    fill(1, block() - 0.37);
    let outlier = Tensor::randn([BLOCK as i64], (Kind::Float, Device::Cpu));
    let _ = outlier.get(5).fill_(1e4);
    fill(2, outlier);
    let levels = Tensor::from_slice(&LEVELS);
    let boundaries = (levels.narrow(0, 0, 15) + levels.narrow(0, 1, 15)) / 2.0;
    fill(3, Tensor::cat(&[&levels, &boundaries, &levels, &boundaries.neg(), &boundaries.narrow(0, 0, 2)], 0));
    weight
}

fn same_parts(wanted: &Nf4Weight, found: &Nf4Weight, device: Device) -> Result<()> {
    ensure!(found.packed.device() == device, "the result is on {:?}", found.packed.device());
    found.check()?;
    let parts = [
        ("packed", &wanted.packed, &found.packed),
        ("absmax", &wanted.absmax, &found.absmax),
        ("nested_absmax", &wanted.nested_absmax, &found.nested_absmax),
        ("nested_code", &wanted.nested_code, &found.nested_code),
    ];
    for (name, wanted, found) in parts {
        let difference = first_difference(wanted, &found.to_device(Device::Cpu));
        ensure!(difference.is_none(), "`{name}`: {}", difference.unwrap_or_default());
    }
    let (wanted, found) = (wanted.nested_offset, found.nested_offset);
    ensure!(wanted.to_bits() == found.to_bits(), "the offset is {found:e}, the twin's {wanted:e}");
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn the_processor_passes_the_same_check() {
        for kind in [Kind::Float, Kind::BFloat16] {
            assert_eq!(dequantize_cases(Device::Cpu, kind).unwrap(), SHAPES.len() * 6);
        }
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            assert_eq!(quantize(Device::Cpu, kind).unwrap(), SHAPES.len() * 2 + 3);
        }
    }

    #[test]
    fn a_changed_part_is_found() {
        let weight = random_weight([4, 64]);
        same_parts(&weight, &weight, Device::Cpu).unwrap();
        let other = weight.to_device(Device::Cpu);
        let other = Nf4Weight { absmax: other.absmax.copy(), nested_offset: 0.5, ..other };
        assert!(same_parts(&weight, &other, Device::Cpu).unwrap_err().to_string().contains("offset"));
        let _ = other.absmax.get(2).bitwise_xor_(4);
        assert!(same_parts(&weight, &other, Device::Cpu).unwrap_err().to_string().contains("`absmax`"));
    }
}
