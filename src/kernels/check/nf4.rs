//! The kernels of cuda/nf4.cu against their twins, bit for bit.

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use super::bandwidth::gigabytes_per_second;
use super::{Check, GUARD, Outcome, first_difference, random_bits};
use crate::kernels::dynamic_map::dynamic_map;
use crate::kernels::nf4::{BLOCK, NESTED_BLOCK, Nf4Weight, dequantize_into};

/// The checks of this module.
pub(super) fn checks(device: Device) -> Vec<Check> {
    vec![
        Check::new("nf4_dequantize_f32", dequantize(device, Kind::Float)),
        Check::new("nf4_dequantize_bf16", dequantize(device, Kind::BFloat16)),
    ]
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

/// How an output lies in its buffer: so many elements behind an aligned address, so many more from row to row.
const LAYOUTS: [(i64, i64); 5] = [(0, 0), (0, 64), (8, 8), (1, 0), (0, 3)];

fn dequantize(device: Device, kind: Kind) -> Result<Outcome> {
    let mut cases = 0;
    for shape in SHAPES {
        for layout in LAYOUTS {
            dequantize_case(device, kind, shape, layout)?;
            cases += 1;
        }
    }
    Ok(Outcome { cases, bandwidth: Some(dequantize_bandwidth(device, kind)?) })
}

fn dequantize_case(
    device: Device,
    kind: Kind,
    [rows, columns]: [i64; 2],
    (from, gap): (i64, i64),
) -> Result<()> {
    let weight = random_weight([rows, columns]);
    let length = rows * (columns + gap);
    let poison = random_bits(kind, GUARD + from + length + GUARD);
    let view = |buffer: &Tensor| {
        buffer.narrow(0, GUARD + from, length).view([rows, columns + gap]).narrow(1, 0, columns)
    };
    let found = poison.f_to_device(device)?;
    dequantize_into(&weight.to_device(device), &view(&found))?;

    let wanted = poison.copy();
    view(&wanted).copy_(&weight.dequantize_reference(kind));
    match first_difference(&wanted, &found.f_to_device(Device::Cpu)?) {
        None => Ok(()),
        Some(difference) => bail!(
            "[{rows}, {columns}] {kind:?}, rows {gap} apart, output from element {} on: {difference}",
            GUARD + from
        ),
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
fn dequantize_bandwidth(device: Device, kind: Kind) -> Result<f64> {
    let shape = [12_800, 4096];
    let weight = random_weight(shape);
    let weights: Vec<Nf4Weight> = (0..3).map(|_| weight.to_device(device)).collect();
    let outs: Vec<Tensor> =
        weights.iter().map(|_| Ok(Tensor::f_empty(shape, (kind, device))?)).collect::<Result<_>>()?;
    let elements = shape[0] * shape[1];
    let read = elements / 2 + elements / BLOCK as i64 + elements / (BLOCK * NESTED_BLOCK) as i64 * 4;
    let written = elements * kind.elt_size_in_bytes() as i64;
    gigabytes_per_second(device, read + written, |index| dequantize_into(&weights[index % 3], &outs[index % 3]))
}
