//! Base plus adapter as one model: `W + scale · B · A`, tensor by tensor, into a Hugging Face folder.
//!
//! An adapter belongs on the weights it was trained on. With 4-bit training these are the dequantised ones:
//! merging onto the original weights adds the quantisation error to what was trained, with the sign turned.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::adapter::Adapter;
use super::base::BaseModel;
use super::export::{self, Planned};
use super::form::Form;
use super::prequantized;
use crate::error::user_error;
use crate::kernels::nf4::Nf4Weight;
use crate::progress;
use crate::recipe::{Projection, Quantization};

/// How to merge.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MergeOptions {
    /// What a weight starts from: `Nf4` quantises and dequantises it first, `None` takes it as stored.
    pub from: Quantization,
    /// How the merged weights are stored.
    pub form: Form,
    /// Where to compute.
    pub device: Device,
}

/// How far a projection's weights moved, as Frobenius norms relative to the weight's own; over its layers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct UpdateSize {
    /// `q_proj`.
    pub projection: String,
    /// Mean of `|scale·B·A| / |W|`.
    pub mean: f64,
    /// The largest.
    pub max: f64,
    /// The layer that has it.
    pub layer_of_max: usize,
    /// Mean of what storing changes: `|stored − merged| / |W|`.
    pub rounding: f64,
}

/// The same of one matrix.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    /// Counted from 0.
    pub layer: usize,
    /// `q_proj`.
    pub projection: &'static str,
    /// `|scale·B·A| / |W|`; 0 where the adapter has nothing.
    pub update: f64,
    /// `|stored − merged| / |W|`.
    pub rounding: f64,
}

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// Bytes of the weights.
    pub bytes: u64,
    /// One for each adapted projection, in the order of the forward pass.
    pub updates: Vec<UpdateSize>,
    /// One for each projection of each layer, adapted or not, by layer and in the order of the forward pass.
    pub steps: Vec<Step>,
}

/// Writes the merged model into an existing folder: weights, configuration, tokenizer.
///
/// # Errors
/// When the adapter does not fit the base, a tensor is missing or damaged, a weight is beyond what the form can hold, or
/// a file cannot be written.
pub fn write(folder: &Path, base: &BaseModel, adapter: &Adapter, options: &MergeOptions) -> Result<Merged> {
    let projections = projections(base);
    let planned = plan(base, options.form, &projections)?;
    check_fit(base, adapter)?;
    let bar = progress::bar(planned.len() as u64, "merge", "tensors");
    let mut steps = Vec::new();
    // The parts of a weight in 4 bits that are still to be written, the next one last.
    let mut parts: Vec<Tensor> = Vec::new();
    let bytes = export::write_weights(folder, &planned, |name| {
        bar.inc(1);
        if let Some(part) = parts.pop() {
            return Ok(part);
        }
        let weight =
            prequantized::owner(name).filter(|owner| projections.contains_key(*owner)).unwrap_or(name);
        let Some((layer, projection)) = projections.get(weight) else {
            return in_range(base.tensors.tensor(name)?, name, options.form);
        };
        let merged = merge_one(base, adapter, options, *layer, *projection)?;
        steps.push(merged.step);
        match merged.stored {
            Stored::Dense(tensor) => Ok(tensor),
            Stored::Nf4(weight) => {
                parts.extend(prequantized::tensors(&weight)?.into_iter().rev());
                parts.pop().context("a weight has no parts")
            }
        }
    })?;
    bar.finish_and_clear();
    export::write_companions(folder, base, options.form)?;
    let updates = adapter.spec.targets.iter().map(|projection| summary(*projection, &steps)).collect();
    Ok(Merged { bytes, updates, steps })
}

fn plan(base: &BaseModel, form: Form, projections: &Projections) -> Result<Vec<Planned>> {
    let mut planned = Vec::new();
    for name in base.config.tensor_names() {
        let shape = base.tensors.shape(&name);
        let shape = shape.with_context(|| format!("`{name}` is missing in `{}`", base.path.display()))?;
        match <[i64; 2]>::try_from(shape.as_slice()) {
            Ok(matrix) if form == Form::Nf4 && projections.contains_key(&name) => {
                planned.extend(prequantized::parts(&name, matrix).map(|(name, dtype, shape)| Planned {
                    name,
                    shape,
                    dtype,
                }))
            }
            _ => planned.push(Planned { name, shape, dtype: form.kind() }),
        }
    }
    Ok(planned)
}

/// Layer and projection by the name of the weight.
type Projections = BTreeMap<String, (usize, Projection)>;

/// The weights that an adapter may change, by name.
fn projections(base: &BaseModel) -> Projections {
    (0..base.config.num_hidden_layers)
        .flat_map(|layer| Projection::ALL.map(|projection| (layer, projection)))
        .map(|(layer, projection)| (format!("{}.weight", projection.path(layer)), (layer, projection)))
        .collect()
}

/// Refuses an adapter of another model before anything is written.
fn check_fit(base: &BaseModel, adapter: &Adapter) -> Result<()> {
    let mut halves = 0;
    for layer in 0..base.config.num_hidden_layers {
        for projection in &adapter.spec.targets {
            let [out, input] = base.config.projection_shape(*projection);
            let rank = adapter.spec.rank as i64;
            check_half(adapter, &half(layer, *projection, 'A'), [rank, input])?;
            check_half(adapter, &half(layer, *projection, 'B'), [out, rank])?;
            halves += 2;
        }
    }
    ensure!(
        adapter.tensors.len() == halves,
        "adapter `{}` has {} tensors, the base model has room for {halves}: it is of a model with another number of layers",
        adapter.folder.display(),
        adapter.tensors.len()
    );
    Ok(())
}

fn check_half(adapter: &Adapter, name: &str, expected: [i64; 2]) -> Result<()> {
    let folder = adapter.folder.display();
    let tensor = adapter.tensors.get(name).with_context(|| format!("adapter `{folder}` has no `{name}`"))?;
    let shape = tensor.size();
    ensure!(
        shape == expected,
        "`{name}` of adapter `{folder}` has shape {shape:?}, expected {expected:?}: it is of another model"
    );
    Ok(())
}

fn half(layer: usize, projection: Projection, which: char) -> String {
    format!("{}.lora_{which}.weight", projection.path(layer))
}

/// A merged weight and how far it moved.
struct MergedWeight {
    stored: Stored,
    step: Step,
}

/// A weight `[out, in]` as it is written.
enum Stored {
    Dense(Tensor),
    Nf4(Nf4Weight),
}

impl Stored {
    fn of(exact: &Tensor, name: &str, form: Form) -> Result<Self> {
        if form != Form::Nf4 {
            return Ok(Self::Dense(in_range(exact.shallow_clone(), name, form)?.to_kind(form.kind())));
        }
        let weight = Nf4Weight::quantize(exact).with_context(|| format!("merged weight `{name}`"))?;
        Ok(Self::Nf4(weight.to_device(Device::Cpu)))
    }

    /// What a reader gets, `[out, in]` f32.
    fn value(&self) -> Tensor {
        match self {
            Self::Dense(tensor) => tensor.to_kind(Kind::Float),
            Self::Nf4(weight) => weight.dequantize(Kind::Float),
        }
    }
}

/// The largest number of 16 bits with the exponent of f16.
const LARGEST_FP16: f64 = 65504.0;

/// Refuses what f16 would store as infinity.
fn in_range(tensor: Tensor, name: &str, form: Form) -> Result<Tensor> {
    if form == Form::Fp16 && tensor.numel() > 0 {
        let largest = tensor.abs().max().double_value(&[]);
        // Written so that a value that is no number is refused too.
        let fits = largest <= LARGEST_FP16;
        if !fits {
            return Err(user_error(
                format!("`{name}` holds {largest:e}, fp16 ends at {LARGEST_FP16}"),
                "merge to bf16, which has the range of f32",
            ));
        }
    }
    Ok(tensor)
}

fn merge_one(
    base: &BaseModel,
    adapter: &Adapter,
    options: &MergeOptions,
    layer: usize,
    projection: Projection,
) -> Result<MergedWeight> {
    let name = format!("{}.weight", projection.path(layer));
    let adapted = adapter.spec.targets.contains(&projection);
    let step = |update, rounding| Step { layer, projection: projection.name(), update, rounding };
    if options.from == Quantization::Nf4 && options.form == Form::Nf4 && !adapted {
        // Its codes as they are: quantised a second time they would be others.
        return Ok(MergedWeight {
            stored: Stored::Nf4(base.tensors.nf4(&name, Device::Cpu)?),
            step: step(0.0, 0.0),
        });
    }
    let weight = match options.from {
        Quantization::Nf4 => base.tensors.nf4(&name, options.device)?.dequantize(Kind::Float),
        Quantization::None => base.tensors.tensor(&name)?.to_device(options.device).to_kind(Kind::Float),
    }; // [out, in] f32
    let size = norm(&weight).max(f64::MIN_POSITIVE);
    let update = if adapted { Some(update(adapter, layer, projection, options.device)?) } else { None };
    let exact = update
        .as_ref()
        .map_or_else(|| weight.shallow_clone(), |update| &weight + update.to_kind(Kind::Float));
    ensure!(
        norm(&exact).is_finite(),
        "`{name}` is no longer finite with the adapter of `{}`, whose scale is {:e}",
        adapter.folder.display(),
        adapter.spec.scale()
    );
    let stored = Stored::of(&exact, &name, options.form)?;
    let rounding = norm(&(stored.value().to_device(options.device) - exact)) / size;
    Ok(MergedWeight { stored, step: step(update.map_or(0.0, |update| norm(&update)) / size, rounding) })
}

/// `scale · B · A`, `[out, in]` f64: products of f32 on a GPU may be rounded to 10 bits (TF32), and this is computed once.
fn update(adapter: &Adapter, layer: usize, projection: Projection, device: Device) -> Result<Tensor> {
    let part = |which| {
        let name = half(layer, projection, which);
        let tensor = adapter.tensors.get(&name).with_context(|| format!("the adapter has no `{name}`"))?;
        anyhow::Ok(tensor.to_device(device).to_kind(Kind::Double))
    };
    Ok(part('B')?.matmul(&part('A')?) * adapter.spec.scale())
}

fn norm(tensor: &Tensor) -> f64 {
    tensor.norm().double_value(&[])
}

fn summary(projection: Projection, steps: &[Step]) -> UpdateSize {
    let steps: Vec<&Step> = steps.iter().filter(|step| step.projection == projection.name()).collect();
    let mean =
        |of: fn(&Step) -> f64| steps.iter().map(|step| of(step)).sum::<f64>() / steps.len().max(1) as f64;
    let largest = steps.iter().max_by(|a, b| a.update.total_cmp(&b.update));
    UpdateSize {
        projection: projection.name().to_string(),
        mean: mean(|step| step.update),
        max: largest.map_or(0.0, |step| step.update),
        layer_of_max: largest.map_or(0, |step| step.layer),
        rounding: mean(|step| step.rounding),
    }
}
