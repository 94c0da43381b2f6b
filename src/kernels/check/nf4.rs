//! The kernels of cuda/nf4.cu, bit for bit.

use anyhow::{Context as _, Result, bail};
use tch::{Device, Kind, Tensor};

use super::bandwidth::bandwidth;
use super::exact::first_difference;
use super::tolerance::{Framed, Layout};
use super::{Check, Outcome};
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

fn dequantize(device: Device, kind: Kind) -> Result<Outcome> {
    let mut cases = 0;
    for [rows, columns] in SHAPES {
        let dense = Layout::dense(rows, columns);
        let strided = |gap: i64| dense.strided(columns + gap);
        for layout in [dense, dense.at(1), dense.at(8), strided(64), strided(8).at(8), strided(3)] {
            dequantize_case(device, kind, layout).with_context(|| format!("{layout:?}"))?;
            cases += 1;
        }
    }
    Ok(Outcome::exact(cases).at(dequantize_rate(device, kind)?))
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
fn dequantize_rate(device: Device, kind: Kind) -> Result<f64> {
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
