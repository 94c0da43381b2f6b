//! AdamW over all parameters of an adapter, with 32-bit or with 8-bit moments.
//!
//! The arithmetic is in [`crate::kernels::adamw`]; here is which parameters share a call. Blocks of 8-bit moments begin
//! anew with every parameter, so neighbours whose lengths are multiples of a block are one flat run, on a GPU one launch.
//! Parameters below 4,096 elements keep 32-bit moments, as in bitsandbytes.

use anyhow::{Context as _, Result, ensure};
use tch::{Cuda, Device, Kind, Tensor};

use crate::checkpoint::tensor_file::NamedTensors;
use crate::kernels::adamw::{
    AdamWStep, BLOCK, GRAD_PARTIALS, adamw_8bit, adamw_32bit, blocks_of, norm_squared, zero_codes,
};
use crate::kernels::bridge;
use crate::model::params::{ParamSet, ParamSlot};
use crate::recipe::{Optimizer, TrainSpec};

/// Smaller parameters keep 32-bit moments.
const MIN_8BIT_SIZE: i64 = 4096;

/// AdamW over all parameters of an adapter.
#[derive(Debug)]
pub struct AdamW {
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    max_grad_norm: f64,
    runs: Vec<Run>,
    /// Scratch of the norm, `[GRAD_PARTIALS]` f64.
    partials: Tensor,
    /// The gradients' norm, squared; `[1]` f64.
    norm_squared: Tensor,
}

/// Neighbouring parameters whose moments are one allocation.
#[derive(Debug)]
struct Run {
    /// First element.
    offset: i64,
    len: i64,
    /// Names, and where each lies behind `offset`.
    parts: Vec<Part>,
    /// First and second.
    moments: [Moment; 2],
    /// Of the learning rate.
    factor: f64,
}

/// A parameter within a run.
#[derive(Debug, Clone)]
struct Part {
    /// `model.layers.0.self_attn.q_proj.lora_A.weight`, or [`ALL`].
    name: String,
    /// First element, counted from the run's.
    offset: i64,
    len: i64,
}

/// The name of moments that cover every parameter.
const ALL: &str = "all";

/// A moment as it is kept between steps.
#[derive(Debug)]
enum Moment {
    /// `[len]` f32.
    Wide(Tensor),
    /// Codes `[len]` u8 and scales `[ceil(len / 256)]` f32.
    Coded { codes: Tensor, absmax: Tensor },
}

/// The norm of the gradients of a step before they were clipped. Still on the device: to read it waits for the step.
#[derive(Debug)]
pub struct GradNorm(Tensor);

impl GradNorm {
    /// The number; not finite when the step changed nothing.
    pub fn value(&self) -> f64 {
        self.0.double_value(&[0]).sqrt()
    }
}

impl AdamW {
    /// Zero moments for the layout of `parameters`.
    pub fn new(parameters: &ParamSet, spec: &TrainSpec) -> Self {
        let device = parameters.flat().device();
        Self::build(parameters, spec, device, device)
    }

    fn build(parameters: &ParamSet, spec: &TrainSpec, device: Device, moments_on: Device) -> Self {
        let ratio = spec.loraplus_lr_ratio.unwrap_or(1.0);
        let runs = match spec.optimizer {
            Optimizer::AdamW if ratio == 1.0 => {
                let len = parameters.flat().size()[0];
                let whole = Part { name: ALL.to_string(), offset: 0, len };
                vec![Run::new(0, vec![whole], false, 1.0, moments_on)]
            }
            Optimizer::AdamW => runs(parameters.slots(), i64::MAX, ratio, moments_on),
            Optimizer::AdamW8bit => runs(parameters.slots(), MIN_8BIT_SIZE, ratio, moments_on),
        };
        Self {
            betas: spec.betas,
            eps: spec.eps,
            weight_decay: spec.weight_decay,
            max_grad_norm: spec.max_grad_norm,
            runs,
            partials: Tensor::zeros([GRAD_PARTIALS], (Kind::Double, device)),
            norm_squared: Tensor::zeros([1], (Kind::Double, device)),
        }
    }

    /// As [`new`](Self::new) for gradients on `device`, with the moments in the host's memory, where a GPU's kernels reach
    /// them too. The parameters may lie there as well, pinned.
    ///
    /// # Errors
    /// When there is not enough of it.
    pub fn with_moments_on_host(parameters: &ParamSet, spec: &TrainSpec, device: Device) -> Result<Self> {
        let mut adamw = Self::build(parameters, spec, device, Device::Cpu);
        if !device.is_cuda() {
            return Ok(adamw);
        }
        let moved = |tensor: &mut Tensor| -> Result<()> {
            let host = bridge::pinned(&tensor.size(), tensor.kind())?;
            host.shallow_clone().f_copy_(tensor)?;
            *tensor = host;
            Ok(())
        };
        for moment in adamw.runs.iter_mut().flat_map(|run| &mut run.moments) {
            match moment {
                Moment::Wide(tensor) => moved(tensor)?,
                Moment::Coded { codes, absmax } => {
                    moved(codes)?;
                    moved(absmax)?;
                }
            }
        }
        Ok(adamw)
    }

    /// One update of `parameters`, and of their rounded copy, by `gradients` (same layout), clipped to the recipe's norm;
    /// `step` counts from 1. Gradients that are not finite change nothing, and their norm shows it.
    ///
    /// On a GPU the update is queued and nothing is read back: parameters and moments on the host are new once the norm
    /// has been read.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn step(
        &mut self,
        parameters: &ParamSet,
        gradients: &ParamSet,
        lr: f64,
        step: u64,
    ) -> Result<GradNorm> {
        tch::no_grad(|| {
            norm_squared(gradients.flat(), &self.partials, &self.norm_squared)?;
            let step = self.settings(lr, step);
            for run in &self.runs {
                run.update(parameters, gradients.flat(), &self.norm_squared, &step)?;
            }
            Ok(GradNorm(self.norm_squared.shallow_clone()))
        })
    }

    fn settings(&self, lr: f64, step: u64) -> AdamWStep {
        let [beta1, beta2] = self.betas;
        let steps = i32::try_from(step).unwrap_or(i32::MAX);
        AdamWStep {
            lr,
            beta1,
            beta2,
            eps: self.eps,
            weight_decay: self.weight_decay,
            correction1: 1.0 - beta1.powi(steps),
            correction2: (1.0 - beta2.powi(steps)).sqrt(),
            max_norm: self.max_grad_norm,
        }
    }

    /// The moments under names that [`restore`](Self::restore) knows.
    pub fn state(&self) -> NamedTensors {
        // Moments on the host are written by kernels that may still be running.
        if let Device::Cuda(index) = self.norm_squared.device() {
            Cuda::synchronize(index as i64);
        }
        self.tensors().collect()
    }

    /// Takes the moments of [`state`](Self::state).
    ///
    /// # Errors
    /// When a tensor is missing, left over or of another shape or dtype; the moments are then partly replaced.
    pub fn restore(&mut self, state: &NamedTensors) -> Result<()> {
        let expected = self.tensors().count();
        ensure!(
            state.len() == expected,
            "the optimiser's state holds {} tensors, expected {expected}",
            state.len()
        );
        for (name, mut tensor) in self.tensors() {
            let saved = state.get(&name).with_context(|| format!("the optimiser's state has no `{name}`"))?;
            let (found, wanted) = ((saved.kind(), saved.size()), (tensor.kind(), tensor.size()));
            ensure!(found == wanted, "`{name}` of the optimiser's state is {found:?}, expected {wanted:?}");
            tensor.f_copy_(saved)?;
        }
        Ok(())
    }

    /// Views of all moments, a parameter's under its name.
    fn tensors(&self) -> impl Iterator<Item = (String, Tensor)> + '_ {
        self.runs.iter().flat_map(|run| {
            run.parts.iter().flat_map(|part| {
                run.moments.iter().zip(["moment1", "moment2"]).flat_map(|(moment, label)| {
                    let named = |suffix: &str| format!("{}.{label}{suffix}", part.name);
                    match moment.narrow(part) {
                        Moment::Wide(tensor) => vec![(named(""), tensor)],
                        Moment::Coded { codes, absmax } => {
                            vec![(named(".codes"), codes), (named(".absmax"), absmax)]
                        }
                    }
                })
            })
        })
    }
}

/// Neighbours with moments of one form and one learning rate, as long as blocks begin with each of them. Parameters of
/// `coded_from` elements and more have 8-bit moments; a B's learning rate is `ratio` times the others'.
fn runs(slots: &[ParamSlot], coded_from: i64, ratio: f64, device: Device) -> Vec<Run> {
    let coded = |slot: &ParamSlot| slot.len() >= coded_from;
    let factor = |slot: &ParamSlot| if slot.name.ends_with("lora_B.weight") { ratio } else { 1.0 };
    let together = |a: &ParamSlot, b: &ParamSlot| {
        coded(a) == coded(b)
            && factor(a) == factor(b)
            && (!coded(a) || a.len() % BLOCK == 0)
            && a.offset + a.len() == b.offset
    };
    slots
        .chunk_by(together)
        .map(|slots| {
            let (offset, coded, factor) = (slots[0].offset, coded(&slots[0]), factor(&slots[0]));
            let part = |slot: &ParamSlot| Part {
                name: slot.name.clone(),
                offset: slot.offset - offset,
                len: slot.len(),
            };
            Run::new(offset, slots.iter().map(part).collect(), coded, factor, device)
        })
        .collect()
}

impl Run {
    fn new(offset: i64, parts: Vec<Part>, coded: bool, factor: f64, device: Device) -> Self {
        let len = parts.iter().map(|part| part.len).sum();
        let moments = [true, false].map(|signed| {
            if coded {
                let (codes, absmax) = zero_codes(len, signed, device);
                Moment::Coded { codes, absmax }
            } else {
                Moment::Wide(Tensor::zeros([len], (Kind::Float, device)))
            }
        });
        Self { offset, len, parts, moments, factor }
    }

    /// Whole on a GPU; part by part on the CPU, where tensor operations make copies of what they work on.
    fn update(&self, p: &ParamSet, g: &Tensor, norm_squared: &Tensor, step: &AdamWStep) -> Result<()> {
        let step = &AdamWStep { lr: step.lr * self.factor, ..*step };
        let whole = [Part { name: String::new(), offset: 0, len: self.len }];
        for part in if g.device().is_cuda() { &whole } else { self.parts.as_slice() } {
            let within = |flat: &Tensor| flat.f_narrow(0, self.offset + part.offset, part.len);
            let copy = p.rounded().map(within).transpose()?;
            let (p, g, copy) = (within(p.flat())?, within(g)?, copy.as_ref());
            let moments = [self.moments[0].narrow(part), self.moments[1].narrow(part)];
            match &moments {
                [
                    Moment::Coded { codes: m, absmax: m_absmax },
                    Moment::Coded { codes: v, absmax: v_absmax },
                ] => {
                    adamw_8bit(&p, copy, &g, (m, m_absmax), (v, v_absmax), norm_squared, step)?;
                }
                [Moment::Wide(m), Moment::Wide(v)] => {
                    adamw_32bit(&p, copy, &g, m, v, norm_squared, step)?;
                }
                _ => unreachable!("both moments of a run have one form"),
            }
        }
        Ok(())
    }
}

impl Moment {
    /// The part's view.
    fn narrow(&self, part: &Part) -> Self {
        match self {
            Self::Wide(tensor) => Self::Wide(tensor.narrow(0, part.offset, part.len)),
            Self::Coded { codes, absmax } => Self::Coded {
                codes: codes.narrow(0, part.offset, part.len),
                // Whole blocks lie before every part.
                absmax: absmax.narrow(0, part.offset / BLOCK, blocks_of(part.len)),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs_of(lengths: &[i64]) -> Vec<(i64, i64, bool, usize)> {
        let shapes = lengths.iter().enumerate().map(|(index, len)| (index.to_string(), vec![*len]));
        let parameters = ParamSet::zeros(shapes, Device::Cpu);
        let describe =
            |run: Run| (run.offset, run.len, matches!(run.moments[0], Moment::Coded { .. }), run.parts.len());
        runs(parameters.slots(), MIN_8BIT_SIZE, 1.0, Device::Cpu).into_iter().map(describe).collect()
    }

    #[test]
    fn an_adapter_of_whole_blocks_is_one_run() {
        assert_eq!(runs_of(&[4096, 8192, 262_144]), [(0, 274_432, true, 3)]);
    }

    #[test]
    fn a_broken_block_or_another_form_ends_a_run() {
        assert_eq!(
            runs_of(&[4096, 4097, 8192, 100, 0, 4095, 4096]),
            [(0, 8193, true, 2), (8193, 8192, true, 1), (16_385, 4195, false, 3), (20_580, 4096, true, 1)]
        );
        assert_eq!(runs_of(&[]), []);
    }
}
