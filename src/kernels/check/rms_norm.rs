//! RMSNorm, alone and with its neighbours on the residual stream.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::bandwidth::bandwidth;
use super::inputs::{Flavour, TOKENS};
use super::tolerance::{Framed, Layout, Reference};
use super::{Checks, Outcome};
use crate::kernels::rms_norm::{
    add_rms_norm_into, rms_norm_backward_into, rms_norm_backward_reference, rms_norm_into, rms_norm_reference,
};

const EPS: f64 = 1e-5;

/// Of the rounding to bf16 before the weight (stretched by up to two, as a weight's significand is) and the one after.
const TWO_ROUNDINGS: f64 = 3.0;

/// Rows, columns, elements from a row to the next, elements by which the first misses an aligned address.
const SHAPES: [Layout; 14] = [
    Layout { rows: 1, columns: 64, stride: 64, offset: 0 },
    Layout { rows: 3, columns: 1, stride: 1, offset: 0 },
    Layout { rows: 3, columns: 7, stride: 9, offset: 1 },
    Layout { rows: 127, columns: 576, stride: 576, offset: 0 },
    Layout { rows: 5, columns: 577, stride: 577, offset: 0 },
    Layout { rows: 3, columns: 2048, stride: 2048, offset: 0 },
    Layout { rows: 3, columns: 2056, stride: 2064, offset: 8 },
    Layout { rows: 1000, columns: 4096, stride: 4096, offset: 0 },
    Layout { rows: 127, columns: 4096, stride: 4160, offset: 64 },
    Layout { rows: 127, columns: 4096, stride: 4161, offset: 0 },
    Layout { rows: 3, columns: 8192, stride: 8192, offset: 0 },
    Layout { rows: 3, columns: 8200, stride: 8200, offset: 0 },
    Layout { rows: 3, columns: 16_384, stride: 16_384, offset: 0 },
    Layout { rows: 3, columns: 16_383, stride: 16_400, offset: 3 },
];

/// Calls `case` for every shape and kind of input; the number of calls.
fn cases(mut case: impl FnMut(Layout, Flavour) -> Result<()>) -> Result<usize> {
    for layout in SHAPES {
        for flavour in Flavour::ALL {
            case(layout, flavour)?;
        }
    }
    Ok(SHAPES.len() * Flavour::ALL.len())
}

/// The norm of `x` in f64, `(y, rstd)`, `rstd` `[tokens, 1]`.
fn exact(x: &Tensor, weight: &Tensor) -> (Tensor, Tensor) {
    let (x, weight) = (x.to_kind(Kind::Double), weight.to_kind(Kind::Double));
    let rstd = (x.square().mean_dim([-1i64].as_slice(), true, Kind::Double) + EPS).rsqrt();
    (x * &rstd * weight, rstd)
}

/// Judges `y` and `rstd` as the norm of `x`.
fn judge(what: &str, x: &Tensor, weight: &Tensor, y: &Framed, rstd: &Framed) -> Result<()> {
    let (value, value_rstd) = exact(x, weight);
    let twin = rms_norm_reference(x, weight, EPS);
    Reference { value: &value, twin: &twin.y, terms: None, halves: TWO_ROUNDINGS }
        .judge(&format!("{what}: y"), &y.view())?;
    // Rounding aside, rstd carries half of the relative noise of a sum in f32.
    Reference { value: &value_rstd, twin: &twin.rstd, terms: None, halves: 2.0 }
        .judge(&format!("{what}: rstd"), &rstd.flat().unsqueeze(1))?;
    y.intact(&format!("{what}: y"))?;
    rstd.intact(&format!("{what}: rstd"))
}

pub(super) fn checks(checks: &mut Checks<'_>) {
    checks.run("rms_norm", forward);
    checks.run("add_rms_norm", add_forward);
    checks.run("rms_norm_backward", backward);
}

fn forward(device: Device) -> Result<Outcome> {
    let cases = cases(|layout, flavour| {
        let Layout { rows, columns, .. } = layout;
        let what = format!("{layout:?}, {flavour:?}");
        let x = flavour.matrix(rows, columns, device);
        let weight = Flavour::Normal.matrix(1, columns, device).squeeze_dim(0);
        let (framed_x, y) = (Framed::input(&x, layout)?, Framed::output(Kind::BFloat16, layout, device)?);
        let framed_weight = Framed::input(&weight, Layout::dense(1, columns).at(layout.offset))?;
        let rstd = Framed::output(Kind::Float, Layout::dense(1, rows), device)?;
        rms_norm_into(&framed_x.view(), &framed_weight.flat(), EPS, &y.view(), &rstd.flat())?;
        judge(&what, &x, &weight, &y, &rstd)
    })?;
    Ok(Outcome::near(cases).timed(move || forward_rate(device)))
}

fn add_forward(device: Device) -> Result<Outcome> {
    let mut in_place = false;
    let cases = cases(|layout, flavour| {
        for multiplier in [1.0, 0.22] {
            add_case(device, layout, flavour, multiplier, in_place)?;
            in_place = !in_place;
        }
        Ok(())
    })?;
    Ok(Outcome::near(2 * cases).timed(move || add_rate(device)))
}

fn add_case(device: Device, layout: Layout, flavour: Flavour, multiplier: f64, in_place: bool) -> Result<()> {
    let Layout { rows, columns, .. } = layout;
    let what = format!("{layout:?}, {flavour:?}, multiplier {multiplier}, in place: {in_place}");
    let (x, branch) = (flavour.matrix(rows, columns, device), flavour.matrix(rows, columns, device));
    let weight = Flavour::Normal.matrix(1, columns, device).squeeze_dim(0);
    let (framed_x, framed_branch) =
        (Framed::input(&x, layout)?, Framed::input(&branch, Layout::dense(rows, columns))?);
    let (y, apart) =
        (Framed::output(Kind::BFloat16, layout, device)?, Framed::output(Kind::BFloat16, layout, device)?);
    let rstd = Framed::output(Kind::Float, Layout::dense(1, rows), device)?;
    let sum = if in_place { &framed_x } else { &apart };
    let (from, to) = (framed_x.view(), sum.view());
    add_rms_norm_into(&from, &framed_branch.view(), multiplier, &weight, EPS, &to, &y.view(), &rstd.flat())?;
    // The sum is the twin's bit for bit, as two rounded operations must be; the norm is then judged as that of the sum.
    let wanted = &x + &branch * multiplier;
    Reference { value: &wanted.to_kind(Kind::Double), twin: &wanted, terms: None, halves: 0.0 }
        .judge(&format!("{what}: sum"), &to)?;
    sum.intact(&format!("{what}: sum"))?;
    judge(&what, &wanted, &weight, &y, &rstd)
}

fn backward(device: Device) -> Result<Outcome> {
    let mut in_place = false;
    let cases = cases(|layout, flavour| {
        in_place = !in_place;
        backward_case(device, layout, flavour, in_place)
    })?;
    Ok(Outcome::near(cases).timed(move || backward_rate(device)))
}

fn backward_case(device: Device, layout: Layout, flavour: Flavour, in_place: bool) -> Result<()> {
    let Layout { rows, columns, .. } = layout;
    let what = format!("{layout:?}, {flavour:?}, in place: {in_place}");
    let x = flavour.matrix(rows, columns, device);
    let (dy, residual) =
        (Flavour::Normal.matrix(rows, columns, device), Flavour::Normal.matrix(rows, columns, device));
    let weight = Flavour::Normal.matrix(1, columns, device).squeeze_dim(0);
    let rstd = rms_norm_reference(&x, &weight, EPS).rstd; // [rows, 1]
    let (framed_x, framed_dy) = (Framed::input(&x, layout)?, Framed::input(&dy, layout)?);
    let framed_residual = Framed::input(&residual, layout)?;
    let apart = Framed::output(Kind::BFloat16, layout, device)?;
    let dx = if in_place { &framed_residual } else { &apart };
    rms_norm_backward_into(
        &framed_dy.view(),
        &framed_x.view(),
        &weight,
        &rstd.squeeze_dim(1),
        &framed_residual.view(),
        &dx.view(),
    )?;

    let wide = |tensor: &Tensor| tensor.to_kind(Kind::Double);
    let (normed, g) = (wide(&x) * wide(&rstd), wide(&dy) * wide(&weight));
    let mean = |product: Tensor| product.mean_dim([-1i64].as_slice(), true, Kind::Double);
    let value = wide(&residual) + (&g - &normed * mean(&g * &normed)) * wide(&rstd);
    let along = mean((&g * &normed).abs());
    let terms = wide(&residual).abs() + (g.abs() + normed.abs() * along) * wide(&rstd);
    let twin = &residual + rms_norm_backward_reference(&dy, &x, &weight, &rstd);
    Reference { value: &value, twin: &twin, terms: Some(&terms), halves: 1.0 }
        .judge(&format!("{what}: dx"), &dx.view())?;
    dx.intact(&format!("{what}: dx"))
}

/// Columns at which bandwidth is measured.
const COLUMNS: i64 = 4096;

/// Sets of operands that follow each other: one alone may stay in the L2 cache in part.
const SETS: usize = 3;

/// `SETS` lists of `operands` matrices.
fn operands(device: Device, operands: usize) -> Vec<Vec<Tensor>> {
    let matrix = |_| Flavour::Normal.matrix(TOKENS, COLUMNS, device);
    (0..SETS).map(|_| (0..operands).map(matrix).collect()).collect()
}

fn weight_and_rstd(device: Device) -> (Tensor, Tensor) {
    (Tensor::ones([COLUMNS], (Kind::BFloat16, device)), Tensor::ones([TOKENS], (Kind::Float, device)))
}

pub(super) fn forward_rate(device: Device) -> Result<f64> {
    let sets = operands(device, 2);
    let (weight, rstd) = weight_and_rstd(device);
    bandwidth(device, 4 * TOKENS * COLUMNS, SETS, |set| {
        rms_norm_into(&sets[set][0], &weight, EPS, &sets[set][1], &rstd)
    })
}

pub(super) fn add_rate(device: Device) -> Result<f64> {
    let sets = operands(device, 4);
    let (weight, rstd) = weight_and_rstd(device);
    bandwidth(device, 8 * TOKENS * COLUMNS, SETS, |set| {
        let [x, branch, sum, y] = [0, 1, 2, 3].map(|operand| &sets[set][operand]);
        add_rms_norm_into(x, branch, 0.22, &weight, EPS, sum, y, &rstd)
    })
}

pub(super) fn backward_rate(device: Device) -> Result<f64> {
    let sets = operands(device, 4);
    let (weight, rstd) = weight_and_rstd(device);
    bandwidth(device, 8 * TOKENS * COLUMNS, SETS, |set| {
        let [dy, x, residual, dx] = [0, 1, 2, 3].map(|operand| &sets[set][operand]);
        rms_norm_backward_into(dy, x, &weight, &rstd, residual, dx)
    })
}
