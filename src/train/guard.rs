//! What must not go on: numbers that are no numbers, gradients that never arrive, an adapter that stays where it was.
//!
//! Each ends the run with the cause named; the last checkpoint is whole.

use anyhow::Result;
use tch::Tensor;

use crate::error::user_error;
use crate::model::params::ParamSet;
use crate::progress;

/// Where a run stands.
#[derive(Debug, Clone, Copy)]
pub(super) struct At {
    /// Optimiser steps taken.
    pub(super) step: u64,
    /// The step of the newest whole checkpoint.
    pub(super) saved: Option<u64>,
}

impl At {
    /// What is left when the run ends here.
    fn kept(self) -> String {
        self.saved.map_or_else(
            || "no checkpoint was written before".to_string(),
            |step| format!("the checkpoint of step {step} stays"),
        )
    }

    /// Before the first step the learning rate has changed nothing yet.
    pub(super) fn way_out(self) -> &'static str {
        match self.step {
            0 => {
                "no step was taken yet: the base model's weights are damaged, or its config.json is another model's; `granite eval --model base` tries it alone"
            }
            _ => "lower `train.lr`, lengthen `train.warmup`, or look at the step's rows for damaged text",
        }
    }
}

/// A step on such gradients changed nothing, on such a loss it spoilt the adapter.
///
/// # Errors
/// When loss or norm is not finite, with the first gradient that is not.
pub(super) fn finite(at: At, loss: f64, grad_norm: f64, gradients: &ParamSet) -> Result<()> {
    if loss.is_finite() && grad_norm.is_finite() {
        return Ok(());
    }
    let what = if loss.is_finite() { broken(gradients, grad_norm) } else { format!("loss is {loss}") };
    Err(user_error(format!("step {}: the {what}; {}", at.step + 1, at.kept()), at.way_out()))
}

/// The gradient that is not finite: the last in the order of the forward pass, where the backward pass met it first.
fn broken(gradients: &ParamSet, grad_norm: f64) -> String {
    let is_broken = |gradient: &Tensor| gradient.isfinite().all().int64_value(&[]) == 0;
    let broken = gradients.iter().filter(|(_, gradient)| is_broken(gradient)).last();
    broken.map_or_else(
        || format!("gradient norm is {grad_norm}"),
        |(name, _)| format!("gradient of `{name}` is not finite"),
    )
}

/// After a step's backward pass: a gradient must have come. While B is zero only B has one.
///
/// # Errors
/// When none came though tokens were supervised.
pub(super) fn arrived(at: At, grad_norm: f64, supervised: i64, gradients: &ParamSet) -> Result<()> {
    if grad_norm == 0.0 && supervised > 0 {
        return Err(user_error(
            format!(
                "step {}: every gradient is zero though {supervised} tokens are supervised; {}",
                at.step + 1,
                at.kept()
            ),
            "the losses do not depend on the adapter: `lora.alpha` is too small for this dtype, or the base model's weights are damaged",
        ));
    }
    if at.step == 0 && supervised > 0 {
        let unmoved = without_gradient(gradients);
        if let [first, ..] = unmoved.as_slice() {
            progress::note(format!(
                "warning: no gradient reaches {} of the adapter's {} matrices B, `{first}` the first: they will not learn",
                unmoved.len(),
                gradients.slots().len() / 2
            ));
        }
    }
    Ok(())
}

/// Names of matrices B whose gradient is zero throughout.
fn without_gradient(gradients: &ParamSet) -> Vec<&str> {
    let b = gradients.iter().filter(|(name, _)| name.ends_with("lora_B.weight"));
    // One reading for all: a reading waits for the device.
    let (names, norms): (Vec<&str>, Vec<Tensor>) = b.map(|(name, gradient)| (name, gradient.norm())).unzip();
    if norms.is_empty() {
        return Vec::new();
    }
    let norms =
        Vec::<f32>::try_from(Tensor::stack(&norms, 0).to_device(tch::Device::Cpu)).unwrap_or_default();
    names.into_iter().zip(norms).filter(|(_, norm)| *norm == 0.0).map(|(name, _)| name).collect()
}

/// Once the learning rate has risen: an adapter whose B is still zero is the base model.
///
/// # Errors
/// When it is.
pub(super) fn moved(at: At, lr: f64, adapters: &ParamSet) -> Result<()> {
    let b: Vec<Tensor> = adapters
        .iter()
        .filter(|(name, _)| name.ends_with("lora_B.weight"))
        .map(|(_, b)| b.abs().max())
        .collect();
    if b.is_empty() || Tensor::stack(&b, 0).max().double_value(&[]) > 0.0 {
        return Ok(());
    }
    Err(user_error(
        format!(
            "step {}: the adapter has not moved in its warm-up, the learning rate is {lr:.1e}; {}",
            at.step,
            at.kept()
        ),
        "raise `train.lr`, or shorten `train.warmup`",
    ))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use tch::Device;

    use super::*;

    const AT: At = At { step: 0, saved: None };

    fn adapter() -> ParamSet {
        let shapes = ["x.lora_A.weight", "x.lora_B.weight", "y.lora_A.weight", "y.lora_B.weight"];
        ParamSet::zeros(shapes.map(|name| (name.to_string(), vec![2, 3])), Device::Cpu)
    }

    #[test]
    fn a_gradient_that_never_comes_ends_the_run() {
        let gradients = adapter();
        let told = arrived(AT, 0.0, 5, &gradients).unwrap_err();
        let told = crate::error::render(&told);
        assert!(told.contains("step 1: every gradient is zero though 5 tokens"), "{told}");
        arrived(AT, 0.0, 0, &gradients).unwrap();
        let _ = gradients.view(1).fill_(1.0);
        arrived(AT, 1.0, 5, &gradients).unwrap();
        assert_eq!(without_gradient(&gradients), ["y.lora_B.weight"]);
    }

    #[test]
    fn an_adapter_that_stays_ends_the_run() {
        let adapters = adapter();
        let _ = adapters.view(0).fill_(1.0);
        let at = At { step: 7, saved: Some(4) };
        let told = moved(at, 1e-30, &adapters).unwrap_err();
        let told = crate::error::render(&told);
        assert!(told.contains("step 7") && told.contains("the checkpoint of step 4 stays"), "{told}");
        let _ = adapters.view(3).narrow(0, 1, 1).fill_(-1e-20);
        moved(at, 1e-30, &adapters).unwrap();
    }

    #[test]
    fn the_broken_gradient_is_named() {
        let gradients = adapter();
        let _ = gradients.view(2).fill_(f64::NAN);
        let _ = gradients.view(1).fill_(f64::INFINITY);
        let told = finite(AT, 1.0, f64::NAN, &gradients).unwrap_err();
        let told = crate::error::render(&told);
        assert!(told.contains("gradient of `y.lora_A.weight` is not finite"), "{told}");
        finite(AT, 1.0, 2.0, &gradients).unwrap();
    }
}
