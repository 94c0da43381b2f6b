//! AdamW (Loshchilov & Hutter 2019) with 32-bit moments, or with 8-bit blockwise ones (Dettmers et al. 2022).
//!
//! Tensor operations on any device. The 8-bit form is bitsandbytes': blocks of 256 within a parameter, the signed
//! dynamic code for the first moment and the unsigned one for the second, 32-bit moments for parameters below
//! 4,096 elements; the update uses the moments before they are rounded. As in its CPU form (and in torch), weights
//! decay before the update, and a moment takes the nearest level. Zero is a level, so no moment changes its sign; its
//! CUDA kernel goes further and moves negative moments that round to zero to the level below.

use anyhow::{Context as _, Result, ensure};
use tch::{Device, Kind, Tensor};

use crate::checkpoint::tensor_file::NamedTensors;
use crate::kernels::dynamic_map::dynamic_map;
use crate::model::params::{ParamSet, ParamSlot};
use crate::recipe::{Optimizer, TrainSpec};

/// Elements that share a scale.
const BLOCK: i64 = 256;
/// Smaller parameters keep 32-bit moments.
const MIN_8BIT_SIZE: i64 = 4096;

/// AdamW over all parameters of an adapter.
#[derive(Debug)]
pub struct AdamW {
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    /// One per parameter for 8 bits, one for all of them for 32.
    moments: Vec<Moments>,
    codes: [Code; 2],
}

#[derive(Debug)]
struct Moments {
    /// `model.layers.0.self_attn.q_proj.lora_A.weight`, or [`ALL`].
    name: String,
    offset: i64,
    len: i64,
    /// First and second.
    held: [Held; 2],
}

/// The name of moments that cover every parameter.
const ALL: &str = "all";

/// A moment as it is kept between steps.
#[derive(Debug)]
enum Held {
    /// `[len]` f32.
    Wide(Tensor),
    /// Codes `[len]` u8 and scales `[ceil(len / 256)]` f32.
    Coded { codes: Tensor, absmax: Tensor },
}

/// A code's 256 levels and the midpoints between them.
#[derive(Debug)]
struct Code {
    levels: Tensor,
    midpoints: Tensor,
}

impl AdamW {
    /// Zero moments for the layout of `parameters`.
    pub fn new(parameters: &ParamSet, spec: &TrainSpec) -> Self {
        let device = parameters.flat().device();
        let codes = [Code::new(true, device), Code::new(false, device)];
        let moments = match spec.optimizer {
            Optimizer::AdamW => {
                let len = parameters.flat().size()[0];
                vec![Moments::wide(ALL.to_string(), 0, len, device)]
            }
            Optimizer::AdamW8bit => {
                parameters.slots().iter().map(|slot| Moments::of(slot, device, &codes)).collect()
            }
        };
        Self { betas: spec.betas, eps: spec.eps, weight_decay: spec.weight_decay, moments, codes }
    }

    /// One update of `parameters` by `gradients` (same layout); `step` counts from 1.
    pub fn step(&mut self, parameters: &ParamSet, gradients: &ParamSet, lr: f64, step: u64) {
        tch::no_grad(|| {
            for index in 0..self.moments.len() {
                self.update(index, parameters, gradients, lr, step);
            }
        });
    }

    fn update(&mut self, index: usize, parameters: &ParamSet, gradients: &ParamSet, lr: f64, step: u64) {
        let [beta1, beta2] = self.betas;
        let moments = &mut self.moments[index];
        let mut p = parameters.flat().narrow(0, moments.offset, moments.len);
        let g = gradients.flat().narrow(0, moments.offset, moments.len);
        let m = moments.held[0].wide(&self.codes[0]).lerp(&g, 1.0 - beta1);
        let v = moments.held[1].wide(&self.codes[1]) * beta2 + g.square() * (1.0 - beta2);
        let steps = i32::try_from(step).unwrap_or(i32::MAX);
        let correction1 = 1.0 - beta1.powi(steps);
        let correction2 = (1.0 - beta2.powi(steps)).sqrt();
        let denominator = v.sqrt() / correction2 + self.eps;
        let _ = p.g_mul_scalar_(1.0 - lr * self.weight_decay);
        p -= &m / denominator * (lr / correction1);
        moments.held[0].hold(m, &self.codes[0]);
        moments.held[1].hold(v, &self.codes[1]);
    }

    /// The moments under names that [`restore`](Self::restore) knows.
    pub fn state(&self) -> NamedTensors {
        self.tensors().map(|(name, tensor)| (name, tensor.shallow_clone())).collect()
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

    fn tensors(&self) -> impl Iterator<Item = (String, Tensor)> + '_ {
        self.moments.iter().flat_map(|moments| {
            moments.held.iter().zip(["moment1", "moment2"]).flat_map(|(held, moment)| {
                let named = |suffix: &str| format!("{}.{moment}{suffix}", moments.name);
                match held {
                    Held::Wide(tensor) => vec![(named(""), tensor.shallow_clone())],
                    Held::Coded { codes, absmax } => vec![
                        (named(".codes"), codes.shallow_clone()),
                        (named(".absmax"), absmax.shallow_clone()),
                    ],
                }
            })
        })
    }
}

impl Moments {
    fn wide(name: String, offset: i64, len: i64, device: Device) -> Self {
        let zeros = || Held::Wide(Tensor::zeros([len], (Kind::Float, device)));
        Self { name, offset, len, held: [zeros(), zeros()] }
    }

    fn of(slot: &ParamSlot, device: Device, codes: &[Code; 2]) -> Self {
        let mut moments = Self::wide(slot.name.clone(), slot.offset, slot.len(), device);
        if slot.len() >= MIN_8BIT_SIZE {
            moments.held = [&codes[0], &codes[1]].map(|code| Held::zeros(slot.len(), code));
        }
        moments
    }
}

impl Held {
    fn zeros(len: i64, code: &Code) -> Self {
        let device = code.levels.device();
        let mut held = Self::Coded {
            codes: Tensor::zeros([len], (Kind::Uint8, device)),
            absmax: Tensor::zeros(
                [len.div_euclid(BLOCK) + i64::from(len % BLOCK != 0)],
                (Kind::Float, device),
            ),
        };
        held.hold(Tensor::zeros([len], (Kind::Float, device)), code);
        held
    }

    /// The moment in f32, `[len]`.
    fn wide(&self, code: &Code) -> Tensor {
        match self {
            Self::Wide(tensor) => tensor.shallow_clone(),
            Self::Coded { codes, absmax } => {
                let levels = code.levels.index_select(0, &codes.to_kind(Kind::Int64));
                unblock(&(blocks(&levels) * absmax.unsqueeze(1)), codes.size()[0])
            }
        }
    }

    fn hold(&mut self, moment: Tensor, code: &Code) {
        match self {
            Self::Wide(tensor) => tensor.copy_(&moment),
            Self::Coded { codes, absmax } => {
                let blocked = blocks(&moment); // [blocks, 256]
                let scale = blocked.abs().amax([1i64].as_slice(), true); // [blocks, 1]
                // A block of zeros has no scale; any positive divisor gives the code of zero.
                let divisor = scale.where_self(&scale.gt(0.0), &scale.ones_like());
                codes.copy_(&code.nearest(&unblock(&(blocked / divisor), moment.size()[0])));
                absmax.copy_(&scale.squeeze_dim(1));
            }
        }
    }
}

impl Code {
    fn new(signed: bool, device: Device) -> Self {
        let levels = Tensor::from_slice(&dynamic_map(signed)).to_device(device);
        let midpoints = (levels.narrow(0, 0, 255) + levels.narrow(0, 1, 255)) / 2.0;
        Self { levels, midpoints }
    }

    /// The code nearest to each of `normed` in [-1, 1], the lower one of two as near.
    fn nearest(&self, normed: &Tensor) -> Tensor {
        normed.bucketize(&self.midpoints, false, false).to_kind(Kind::Uint8)
    }
}

/// `[len]` → `[ceil(len / 256), 256]`, padded with zeros.
fn blocks(flat: &Tensor) -> Tensor {
    let missing = (BLOCK - flat.size()[0] % BLOCK) % BLOCK;
    let padded = if missing == 0 { flat.shallow_clone() } else { flat.constant_pad_nd([0, missing]) };
    padded.view([-1, BLOCK])
}

/// The first `len` elements of blocks.
fn unblock(blocked: &Tensor, len: i64) -> Tensor {
    blocked.reshape([-1]).narrow(0, 0, len)
}

/// Scales gradients down to `max_norm` as `torch.nn.utils.clip_grad_norm_` does and gives their norm before;
/// a `max_norm` of 0 leaves them as they are.
pub fn clip_grad_norm(gradients: &ParamSet, max_norm: f64) -> f64 {
    tch::no_grad(|| {
        let norm = gradients.flat().norm().double_value(&[]);
        let factor = max_norm / (norm + 1e-6);
        if max_norm > 0.0 && factor < 1.0 {
            let _ = gradients.flat().shallow_clone().g_mul_scalar_(factor);
        }
        norm
    })
}
