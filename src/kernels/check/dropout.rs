//! Dropout, bit for bit.

use anyhow::{Context as _, Result, bail};
use tch::{Device, Kind, Tensor};

use super::bandwidth::bandwidth;
use super::exact::{first_difference, random_bits};
use super::tolerance::{Framed, GUARD, Layout};
use super::{BEYOND_CACHES, Outcome};
use crate::kernels::dropout::{
    self, DropoutKey, Mask, dropout_add_rows, dropout_add_rows_reference, dropout_reference,
    dropout_rows_into,
};

pub(super) fn kernel(device: Device, kind: Kind) -> Result<Outcome> {
    let key = DropoutKey { seed: 0xfeed_beef_dead_cafe, microbatch: (7 << 32) | 9, module: 41 };
    let mut cases = 0;
    for elements in [1, 2, 3, 4, 7, 8, 9, 31, 255, 1024, 2047, 2048, 2049, 100_003] {
        for (from, to) in [(0, 0), (1, 1), (0, 1), (3, 0)] {
            for p in [0.1, 0.5, 1.0 - 1e-4] {
                case(device, kind, elements, (from, to), p, key)?;
                cases += 1;
            }
        }
    }
    Ok(Outcome::exact(cases).timed(move || rate(device, kind)))
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
pub(super) fn rate(device: Device, kind: Kind) -> Result<f64> {
    let elements = BEYOND_CACHES / kind.elt_size_in_bytes() as i64;
    let x = Tensor::f_zeros([elements], (kind, device))?;
    let y = x.f_empty_like()?;
    let mask = Mask::new(0.1, DropoutKey { seed: 1, microbatch: 2, module: 3 });
    bandwidth(device, 2 * BEYOND_CACHES, 1, |_| dropout::launch(&x, &y, mask))
}

/// Rows of one element, of no whole vector, of one in one dtype only, of vectors.
const SHAPES: [[i64; 2]; 7] = [[1, 1], [7, 1], [3, 13], [5, 100], [129, 64], [3, 4096], [67, 1032]];

pub(super) fn rows(device: Device, kind: Kind, adds: bool) -> Result<Outcome> {
    Ok(Outcome::exact(rows_cases(device, kind, adds)?).timed(move || rows_rate(device, kind, adds)))
}

fn rows_cases(device: Device, kind: Kind, adds: bool) -> Result<usize> {
    let key = DropoutKey { seed: 0x0dd_ba11, microbatch: (3 << 33) | 5, module: 17 };
    let mut cases = 0;
    for [rows, columns] in SHAPES {
        let dense = Layout::dense(rows, columns);
        let wide = dense.strided(columns + 8);
        for layouts in [
            [dense, dense],
            [wide, dense.strided(columns + 64)],
            [dense.at(1), wide],
            [dense.strided(columns + 3), dense.at(8)],
        ] {
            for p in [0.0, 0.1, 0.5] {
                rows_case(device, kind, adds, layouts, p, key)
                    .with_context(|| format!("from and to {layouts:?}, p = {p}"))?;
                cases += 1;
            }
        }
    }
    Ok(cases)
}

fn rows_case(
    device: Device,
    kind: Kind,
    adds: bool,
    [from, to]: [Layout; 2],
    p: f64,
    key: DropoutKey,
) -> Result<()> {
    let shape = [from.rows, from.columns];
    let numbers = || Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
    // Which bits of no number remain is not told where nothing is dropped, or of a sum.
    let x = if adds || p == 0.0 { numbers() } else { random_bits(kind, shape[0] * shape[1]).view(shape) };
    let y = numbers();
    let (found_x, found_y) =
        (Framed::input(&x.to_device(device), from)?, Framed::input(&y.to_device(device), to)?);
    if adds {
        dropout_add_rows(&found_y.view(), &found_x.view(), p, key)?;
        dropout_add_rows_reference(&y, &x, p, key)?;
    } else {
        dropout_rows_into(&found_x.view(), &found_y.view(), p, key)?;
        y.shallow_clone().copy_(&dropout_reference(&x, p, key)?);
    }
    found_y.intact("y")?;
    match first_difference(&y, &found_y.view().to_device(Device::Cpu)) {
        None => Ok(()),
        Some(difference) => bail!("{difference}"),
    }
}

/// GB/s over rows with a gap between them, as many bytes read (twice when adding) as written.
pub(super) fn rows_rate(device: Device, kind: Kind, adds: bool) -> Result<f64> {
    let columns = 8192;
    let rows = BEYOND_CACHES / kind.elt_size_in_bytes() as i64 / columns;
    let buffer = || Tensor::f_zeros([rows, columns + 64], (kind, device));
    let (x, y) = (buffer()?.narrow(1, 0, columns), buffer()?.narrow(1, 0, columns));
    let key = DropoutKey { seed: 1, microbatch: 2, module: 3 };
    let moved = if adds { 3 } else { 2 } * BEYOND_CACHES;
    bandwidth(device, moved, 1, |_| {
        if adds { dropout_add_rows(&y, &x, 0.1, key) } else { dropout_rows_into(&x, &y, 0.1, key) }
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn the_processor_passes_the_same_check() {
        for (kind, adds) in
            [(Kind::Float, false), (Kind::BFloat16, false), (Kind::Float, true), (Kind::BFloat16, true)]
        {
            assert_eq!(rows_cases(Device::Cpu, kind, adds).unwrap(), SHAPES.len() * 4 * 3);
        }
    }
}
