//! Dropout, bit for bit.

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use super::bandwidth::bandwidth;
use super::exact::{first_difference, random_bits};
use super::tolerance::GUARD;
use super::{BEYOND_CACHES, Outcome};
use crate::kernels::dropout::{self, DropoutKey, Mask, dropout_reference};

pub(super) fn kernel(device: Device, kind: Kind) -> Result<Outcome> {
    let key = DropoutKey { seed: 0xfeed_beef_dead_cafe, microbatch: (7 << 32) | 9, module: 41 };
    let mut cases = 0;
    for elements in [1, 2, 3, 4, 7, 8, 9, 31, 255, 1024, 2047, 2048, 2049, 100_003] {
        for (from, to) in [(0, 0), (1, 1), (0, 1), (3, 0)] {
            for p in [0.1, 0.5, 1.0 - 1e-12] {
                case(device, kind, elements, (from, to), p, key)?;
                cases += 1;
            }
        }
    }
    Ok(Outcome::exact(cases).at(rate(device, kind)?))
}

/// One comparison, bit for bit; `x` and `y` begin so many elements behind an aligned address.
fn case(
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

/// GB/s at as many bytes read as written.
fn rate(device: Device, kind: Kind) -> Result<f64> {
    let elements = BEYOND_CACHES / kind.elt_size_in_bytes() as i64;
    let x = Tensor::f_zeros([elements], (kind, device))?;
    let y = x.f_empty_like()?;
    let mask = Mask::new(0.1, DropoutKey { seed: 1, microbatch: 2, module: 3 });
    bandwidth(device, 2 * BEYOND_CACHES, 1, |_| dropout::launch(&x, &y, mask))
}
