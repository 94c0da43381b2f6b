//! Losses and gradients over the logits.

use anyhow::{Context as _, Result, ensure};
use tch::{Device, Kind, Tensor};

use super::bandwidth::bandwidth;
use super::inputs::Flavour;
use super::tolerance::{Framed, Layout, Reference};
use super::{Checks, Outcome};
use crate::kernels::cross_entropy::{IGNORE, cross_entropy_into, cross_entropy_logits_reference};

pub(super) fn checks(checks: &mut Checks<'_>) {
    checks.run("cross_entropy", |device| cross_entropy(device, None));
    checks.run("cross_entropy, with its gradient", |device| cross_entropy(device, Some(0.37)));
}

/// One rounding, and a hundredth for the fast exponential: 2⁻¹⁶ against 2⁻⁹.
const ONE_ROUNDING: f64 = 1.01;

/// Exponentials below the smallest normal f32 count as none: this times the noise that f32 is forgiven.
const UNDERFLOW: f64 = 2e-32;

/// Rows, vocabulary, columns: Granite's as it is padded and as it is not, Llama 2's, Llama 3's (too long for shared
/// memory), GPT-2's, SmolLM2's, and some of no model.
const SHAPES: [[i64; 3]; 10] = [
    [127, 49_155, 49_280],
    [3, 49_155, 49_155],
    [3, 32_000, 32_000],
    [3, 128_256, 128_256],
    [3, 50_257, 50_304],
    [1000, 1000, 1024],
    [127, 49_152, 49_152],
    [5, 1, 8],
    [5, 7, 7],
    [3, 16_385, 16_400],
];

fn cross_entropy(device: Device, gradient: Option<f64>) -> Result<Outcome> {
    let mut cases = 0;
    for [rows, vocab, columns] in SHAPES {
        let dense = Layout::dense(rows, columns);
        for layout in [dense, dense.strided(columns + 24).at(8), dense.strided(columns + 3).at(1)] {
            for flavour in Flavour::ALL {
                // Powers of two and others, as models have them.
                for inverse_scaling in [1.0, 1.0 / 6.0] {
                    case(device, layout, vocab, flavour, inverse_scaling, gradient).with_context(|| {
                        format!("{layout:?}, vocabulary {vocab}, {flavour:?}, times {inverse_scaling}")
                    })?;
                    cases += 1;
                }
            }
        }
    }
    Ok(Outcome::near(cases).timed(move || rate(device, gradient)))
}

fn case(
    device: Device,
    layout: Layout,
    vocab: i64,
    flavour: Flavour,
    inverse_scaling: f64,
    gradient: Option<f64>,
) -> Result<()> {
    let values = logits(layout, vocab, flavour, device);
    let labels = labels(layout.rows, vocab, device);
    let framed = Framed::input(&values, layout)?;
    let losses = Framed::output(Kind::Float, Layout::dense(1, layout.rows), device)?;
    cross_entropy_into(&framed.view(), &labels, vocab, inverse_scaling, gradient, &losses.flat())?;
    framed.intact("logits")?;
    losses.intact("losses")?;

    let wide = values.to_kind(Kind::Double);
    let (value, value_gradient) =
        cross_entropy_logits_reference(&wide, &labels, vocab, inverse_scaling, gradient);
    let (twin, twin_gradient) =
        cross_entropy_logits_reference(&values, &labels, vocab, inverse_scaling, gradient);
    let lse = (wide.narrow(1, 0, vocab) * inverse_scaling).logsumexp([-1i64].as_slice(), false);
    // A loss is lse − z[label], and z[label] = lse − loss.
    let terms = lse.abs() * 2.0 + value.abs();
    Reference { value: &value, twin: &twin, terms: Some(&terms), halves: 2.0 }
        .judge("losses", &losses.flat())?;
    match (value_gradient, twin_gradient, gradient) {
        (Some(value), Some(twin), Some(weight)) => {
            let factor = weight * inverse_scaling;
            // At the label a gradient is (p − 1)·factor, of terms that may cancel.
            let at_label = labels.clamp(0, vocab - 1).unsqueeze(1);
            let terms = value.zeros_like().scatter_value(1, &at_label, 2.0 * factor) + value.abs();
            let terms = terms + UNDERFLOW * factor;
            Reference { value: &value, twin: &twin, terms: Some(&terms), halves: ONE_ROUNDING }
                .judge("gradient", &framed.view())
        }
        _ => {
            let same = framed.view().eq_tensor(&values).logical_or(&values.isnan());
            ensure!(bool::try_from(&same.all())?, "logits were changed although no gradient was asked for");
            Ok(())
        }
    }
}

/// Logits with what may not be used in the padding, and minus infinity in one column, as masks leave it.
fn logits(layout: Layout, vocab: i64, flavour: Flavour, device: Device) -> Tensor {
    let values = flavour.matrix(layout.rows, layout.columns, device);
    let _ = values.narrow(1, vocab, layout.columns - vocab).fill_(f64::NAN);
    if vocab > 8 {
        let _ = values.narrow(1, vocab / 3, 1).fill_(f64::NEG_INFINITY);
    }
    values
}

/// Labels, some of which are none, or none that there is.
fn labels(rows: i64, vocab: i64, device: Device) -> Tensor {
    let labels = Tensor::randint(vocab, [rows], (Kind::Int64, device));
    let strange = [IGNORE, vocab, -1, i64::MAX, i64::MIN, IGNORE - 1, 1 << 32];
    // Never the first: a single row has a label.
    for (row, label) in (1..rows).step_by(3).zip(strange) {
        let _ = labels.get(row).fill_(label);
    }
    labels
}

/// A chunk of Granite's logits: 202 MB.
pub(super) fn rate(device: Device, gradient: Option<f64>) -> Result<f64> {
    let (rows, vocab, columns) = (2048, 49_155, 49_280);
    let logits = Flavour::Normal.matrix(rows, columns, device);
    let labels = Tensor::f_randint(vocab, [rows], (Kind::Int64, device))?;
    let losses = Tensor::f_empty([rows], (Kind::Float, device))?;
    let passes = if gradient.is_some() { 2 } else { 1 };
    bandwidth(device, passes * 2 * rows * columns, 1, |_| {
        cross_entropy_into(&logits, &labels, vocab, 1.0 / 6.0, gradient, &losses)
    })
}
