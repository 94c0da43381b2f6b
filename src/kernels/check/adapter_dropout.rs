//! Adapters' products with dropped inputs, within the twins' own error.

use anyhow::{Context as _, Result};
use tch::{Device, Kind, Tensor};

use super::tolerance::{F32_NOISE, Framed, Layout, Reference};
use super::{Checks, Outcome};
use crate::kernels::adapter_dropout::{Products, Share};
use crate::kernels::dropout::{DropoutKey, dropout_reference};
use crate::kernels::gemm::Gemm;

/// Tokens, width of the input, ranks: less than a tile, more than one, more slices than a launch takes, more than one split.
const SHAPES: [(i64, i64, &[i64]); 9] = [
    (1, 64, &[8]),
    (7, 8, &[8]),
    (130, 72, &[64, 8, 16]),
    (300, 1544, &[12, 64]),
    (200, 512, &[136, 96]),
    (517, 1024, &[64, 24, 40]),
    (64, 4096, &[64]),
    (1100, 576, &[64, 64, 64]),
    (2049, 1536, &[64, 64]),
];

pub(super) fn checks(checks: &mut Checks<'_>) {
    checks.run("adapter_input", |device| each(device, input));
    checks.run("adapter_to_input", |device| each(device, to_input));
    checks.run("adapter_to_a", |device| each(device, to_a));
}

fn each(device: Device, check: fn(&Case) -> Result<()>) -> Result<Outcome> {
    let mut cases = 0;
    for (tokens, width, ranks) in SHAPES {
        for (gap, p) in [(0, 0.1), (8, 0.5)] {
            let case = Case::new(device, tokens, width, ranks, gap, p)?;
            check(&case)
                .with_context(|| format!("{tokens} tokens, {width} wide, ranks {ranks:?}, p = {p}"))?;
            cases += 1;
        }
    }
    Ok(Outcome::near(cases))
}

/// Fresh operands on a device, their rows `gap` elements apart.
struct Case {
    gap: i64,
    p: f64,
    shares: Vec<Share>,
    gemm: Gemm,
    x: Tensor,
    a: Tensor,
    d: Tensor,
    /// What is there before it is added to.
    dx: Tensor,
    gradients: Vec<Tensor>,
    scratch: Tensor,
}

/// Half of a unit in the last place of bf16, relative to the number.
const BF16_ROUNDING: f64 = 1.0 / 256.0;

/// Not one that a power of two would hide.
const FACTOR: f64 = 0.37;

impl Case {
    fn new(device: Device, tokens: i64, width: i64, ranks: &[i64], gap: i64, p: f64) -> Result<Self> {
        let mut shares: Vec<Share> = Vec::new();
        for (index, rank) in ranks.iter().enumerate() {
            let column = shares.last().map_or(0, |last| last.column + last.columns);
            let columns = (rank + 7).div_euclid(8) * 8;
            let key = DropoutKey {
                seed: 0x0123_4567_89ab_cdef,
                microbatch: (5 << 32) | 7,
                module: 40 + index as u32,
            };
            shares.push(Share { column, columns, rank: *rank, key });
        }
        let columns = shares.iter().map(|share| share.columns).sum();
        let random = |rows, columns, size: f64| -> Result<Tensor> {
            let values = Tensor::f_randn([rows, columns], (Kind::Float, Device::Cpu))? * size;
            Ok(values.f_to_kind(Kind::BFloat16)?.f_to_device(device)?)
        };
        let gradients = ranks.iter().map(|rank| {
            Ok(Tensor::f_randn([*rank, width], (Kind::Float, Device::Cpu))?.f_to_device(device)?)
        });
        Ok(Self {
            gap,
            p,
            shares,
            gemm: Gemm::new(device)?,
            x: random(tokens, width, 1.0)?,
            a: random(columns, width, 0.1)?,
            d: random(tokens, columns, 0.1)?,
            dx: random(tokens, width, 0.5)?,
            gradients: gradients.collect::<Result<_>>()?,
            scratch: random(tokens, width, 1.0)?,
        })
    }

    fn framed(&self, values: &Tensor) -> Result<Framed> {
        let (rows, columns) = values.size2()?;
        Framed::input(values, Layout::dense(rows, columns).strided(columns + self.gap))
    }

    fn products<'a>(&self, a: &'a Tensor) -> Products<'a> {
        Products { a, shares: self.shares.clone(), p: self.p }
    }

    /// Zeros and the scale where the mask of a share keeps, in f64.
    fn mask(&self, share: &Share) -> Result<Tensor> {
        let ones = Tensor::f_ones(self.x.size(), (Kind::Float, Device::Cpu))?;
        Ok(dropout_reference(&ones, self.p, share.key)?.f_to_device(self.x.device())?.to_kind(Kind::Double))
    }

    fn rows(&self, of: &Tensor, share: &Share) -> Tensor {
        of.narrow(0, share.column, share.columns).to_kind(Kind::Double)
    }

    fn columns(&self, of: &Tensor, share: &Share) -> Tensor {
        of.narrow(1, share.column, share.columns).to_kind(Kind::Double)
    }
}

fn double(x: &Tensor) -> Tensor {
    x.to_kind(Kind::Double)
}

fn input(case: &Case) -> Result<()> {
    let product = |x: &Tensor, a: &Tensor| -> Result<Tensor> {
        let parts = case
            .shares
            .iter()
            .map(|share| Ok((x * case.mask(share)?).matmul(&case.rows(a, share).tr()) * FACTOR));
        Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 1))
    };
    let (value, terms) =
        (product(&double(&case.x), &case.a)?, product(&double(&case.x).abs(), &case.a.abs())?);
    let (x, a) = (case.framed(&case.x)?, case.framed(&case.a)?);
    let (out, kept) = (case.framed(&case.d)?, case.framed(&case.d)?);
    let (twin, unused) = (case.d.f_zeros_like()?, case.d.f_zeros_like()?);
    let a = a.view();
    let products = case.products(&a);
    products.input_reference(&case.gemm, &x.view(), [&twin, &unused], FACTOR, &case.scratch)?;
    products.input(&case.gemm, &x.view(), [&out.view(), &kept.view()], FACTOR, &case.scratch)?;
    for (what, found) in [("out", &out), ("kept", &kept)] {
        found.intact(what)?;
        let reference = Reference { value: &value, twin: &twin, terms: Some(&terms), halves: 2.0 };
        reference.judge(what, &found.view())?;
    }
    Ok(())
}

fn to_input(case: &Case) -> Result<()> {
    let sum = |dx: Tensor, d: &Tensor, a: &Tensor| -> Result<Tensor> {
        case.shares.iter().try_fold(dx, |sum, share| {
            Ok(sum + case.columns(d, share).matmul(&case.rows(a, share)) * case.mask(share)? * FACTOR)
        })
    };
    let value = sum(double(&case.dx), &case.d, &case.a)?;
    let terms = sum(double(&case.dx).abs(), &case.d.abs(), &case.a.abs())?;
    // More slices than a launch takes are rounded in between, at a size that may cancel afterwards.
    let roundings = case.shares.iter().map(|share| (share.columns + 63).div_euclid(64)).sum::<i64>() > 3;
    let terms = if roundings { terms * (BF16_ROUNDING / F32_NOISE) } else { terms };
    let (d, a, dx) = (case.framed(&case.d)?, case.framed(&case.a)?, case.framed(&case.dx)?);
    let (a, twin) = (a.view(), case.dx.copy());
    let products = case.products(&a);
    products.to_input_reference(&case.gemm, &d.view(), &twin, FACTOR, &case.scratch)?;
    products.to_input(&case.gemm, &d.view(), &dx.view(), FACTOR, &case.scratch)?;
    dx.intact("dx")?;
    Reference { value: &value, twin: &twin, terms: Some(&terms), halves: 2.0 }.judge("dx", &dx.view())
}

fn to_a(case: &Case) -> Result<()> {
    let (d, x, a) = (case.framed(&case.d)?, case.framed(&case.x)?, case.a.shallow_clone());
    let frame = |values: &Tensor| Framed::input(values, Layout::dense(values.size()[0], values.size()[1]));
    let framed = case.gradients.iter().map(frame).collect::<Result<Vec<_>>>()?;
    let found: Vec<Tensor> = framed.iter().map(Framed::view).collect();
    let twins: Vec<Tensor> = case.gradients.iter().map(Tensor::copy).collect();
    let products = case.products(&a);
    products.to_a_reference(&case.gemm, &d.view(), &x.view(), &twins, FACTOR, &case.scratch)?;
    products.to_a(&case.gemm, &d.view(), &x.view(), &found, FACTOR, &case.scratch)?;
    for (index, share) in case.shares.iter().enumerate() {
        let mask = case.mask(share)?;
        let sum = |before: Tensor, d: &Tensor, x: Tensor| {
            let d = case.columns(d, share).narrow(1, 0, share.rank);
            before + d.tr().matmul(&(x * &mask)) * FACTOR
        };
        let value = sum(double(&case.gradients[index]), &case.d, double(&case.x));
        let terms = sum(double(&case.gradients[index]).abs(), &case.d.abs(), double(&case.x).abs());
        framed[index].intact("the gradient")?;
        Reference { value: &value, twin: &twins[index], terms: Some(&terms), halves: 2.0 }
            .judge("the gradient", &found[index])?;
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn the_twins_pass_the_same_checks() {
        for (tokens, width, ranks) in SHAPES {
            let case = Case::new(Device::Cpu, tokens.min(40), width.min(256), ranks, 8, 0.1).unwrap();
            input(&case).unwrap();
            to_input(&case).unwrap();
            to_a(&case).unwrap();
        }
    }
}
