//! SwiGLU and its gradient on packed rows.

use anyhow::{Context as _, Result};
use tch::{Device, Kind, Tensor};

use super::bandwidth::bandwidth;
use super::inputs::{Flavour, TOKENS};
use super::tolerance::{Framed, Layout, Reference};
use super::{Checks, Outcome};
use crate::kernels::swiglu::{
    swiglu_backward_into, swiglu_backward_reference, swiglu_into, swiglu_reference,
};

pub(super) fn checks(checks: &mut Checks<'_>) {
    checks.run("swiglu", forward);
    checks.run("swiglu_backward", backward);
}

/// One rounding, and a hundredth for the fast exponential: 2⁻¹⁶ against 2⁻⁹.
const ONE_ROUNDING: f64 = 1.01;

/// Tokens, width of gate and of up.
const SHAPES: [[i64; 2]; 8] =
    [[1, 1536], [3, 12_800], [127, 1536], [127, 1537], [1000, 12_800], [3, 7], [5, 1], [127, 24]];

/// Calls `case` for every shape, layout of gate and up (that of the other operands follows) and kind of input.
fn cases(mut case: impl FnMut(Layout, Flavour) -> Result<()>) -> Result<usize> {
    let mut count = 0;
    for [rows, inter] in SHAPES {
        let dense = Layout::dense(rows, 2 * inter);
        for layout in [dense, dense.strided(2 * inter + 64).at(8), dense.strided(2 * inter + 3).at(1)] {
            for flavour in Flavour::ALL {
                case(layout, flavour).with_context(|| format!("{layout:?}, {flavour:?}"))?;
                count += 1;
            }
        }
    }
    Ok(count)
}

/// The layout of one half as wide, with the same gap between rows.
fn half(layout: Layout) -> Layout {
    let inter = layout.columns / 2;
    Layout { columns: inter, stride: layout.stride - inter, ..layout }
}

/// `(gate, up)` in f64.
fn wide_halves(gate_up: &Tensor) -> (Tensor, Tensor) {
    let halves = gate_up.to_kind(Kind::Double).chunk(2, 1);
    (halves[0].shallow_clone(), halves[1].shallow_clone())
}

/// Judges `y` as the activation of `gate_up`.
fn judge_forward(gate_up: &Tensor, y: &Framed) -> Result<()> {
    let (gate, up) = wide_halves(gate_up);
    let halves = gate_up.chunk(2, 1);
    let twin = swiglu_reference(&halves[0], &halves[1]);
    let value = &gate * gate.sigmoid() * up;
    Reference { value: &value, twin: &twin, terms: None, halves: ONE_ROUNDING }.judge("y", &y.view())?;
    y.intact("y")
}

fn forward(device: Device) -> Result<Outcome> {
    let cases = cases(|layout, flavour| {
        let gate_up = flavour.matrix(layout.rows, layout.columns, device);
        let (framed, y) =
            (Framed::input(&gate_up, layout)?, Framed::output(Kind::BFloat16, half(layout), device)?);
        swiglu_into(&framed.view(), &y.view())?;
        judge_forward(&gate_up, &y)
    })?;
    Ok(Outcome::near(cases).timed(move || forward_rate(device)))
}

fn backward(device: Device) -> Result<Outcome> {
    let mut turn = 0;
    let cases = cases(|layout, flavour| {
        turn += 1;
        // Over the gradient that came in, elsewhere, not at all.
        let activation = [Some(true), Some(false), None][turn % 3];
        backward_case(device, layout, flavour, activation)
            .with_context(|| format!("y over dy: {activation:?}"))
    })?;
    Ok(Outcome::near(cases).timed(move || backward_rate(device)))
}

/// `y_over_dy` says whether the activation, where it is wanted, is written over `dy`.
fn backward_case(device: Device, layout: Layout, flavour: Flavour, y_over_dy: Option<bool>) -> Result<()> {
    let gate_up = flavour.matrix(layout.rows, layout.columns, device);
    let dy = Flavour::Normal.matrix(layout.rows, layout.columns / 2, device);
    let (framed, framed_dy) = (Framed::input(&gate_up, layout)?, Framed::input(&dy, half(layout))?);
    let apart = Framed::output(Kind::BFloat16, half(layout), device)?;
    let y = y_over_dy.map(|over| if over { &framed_dy } else { &apart });
    swiglu_backward_into(&framed_dy.view(), &framed.view(), y.map(Framed::view).as_ref())?;
    framed.intact("gate_up")?;
    y.map_or(Ok(()), |y| judge_forward(&gate_up, y))?;

    let found = framed.view().chunk(2, 1);
    let (value, terms) = exact_gradients(&dy, &gate_up);
    let halves = gate_up.chunk(2, 1);
    let (dgate, dup) = swiglu_backward_reference(&dy, &halves[0], &halves[1]);
    Reference { value: &value[0], twin: &dgate, terms: Some(&terms), halves: ONE_ROUNDING }
        .judge("dgate", &found[0])?;
    Reference { value: &value[1], twin: &dup, terms: None, halves: ONE_ROUNDING }.judge("dup", &found[1])
}

/// `[dgate, dup]` in f64, and the magnitudes that make up `dgate`.
fn exact_gradients(dy: &Tensor, gate_up: &Tensor) -> ([Tensor; 2], Tensor) {
    let dy = dy.to_kind(Kind::Double);
    let (gate, up) = wide_halves(gate_up);
    let sigmoid = gate.sigmoid();
    let complement = (-&gate).sigmoid();
    let dgate = &dy * &up * &sigmoid * (&gate * &complement + 1.0);
    let terms = &dy * &up * &sigmoid * ((&gate * &complement).abs() + 1.0);
    ([dgate, dy * gate * sigmoid], terms)
}

/// Width at which bandwidth is measured; one set of operands is beyond every cache.
const INTER: i64 = 12_800;

pub(super) fn forward_rate(device: Device) -> Result<f64> {
    let gate_up = Flavour::Normal.matrix(TOKENS, 2 * INTER, device);
    let y = Tensor::f_empty([TOKENS, INTER], (Kind::BFloat16, device))?;
    bandwidth(device, 6 * TOKENS * INTER, 1, |_| swiglu_into(&gate_up, &y))
}

/// With the activation once more, elsewhere.
pub(super) fn backward_rate(device: Device) -> Result<f64> {
    let gate_up = Flavour::Normal.matrix(TOKENS, 2 * INTER, device);
    let dy = Flavour::Normal.matrix(TOKENS, INTER, device);
    let y = dy.f_empty_like()?;
    bandwidth(device, 12 * TOKENS * INTER, 1, |_| swiglu_backward_into(&dy, &gate_up, Some(&y)))
}
