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
use crate::progress;
use crate::recipe::{Projection, Quantization};

/// How to merge.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MergeOptions {
    /// What a weight starts from: `Nf4` quantises and dequantises it first, `None` takes it as stored.
    pub from: Quantization,
    /// What the merged weights are stored as.
    pub dtype: Kind,
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
    /// Mean of what storing as 16 bits changes: `|stored − merged| / |W|`.
    pub rounding: f64,
}

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// Bytes of the weights.
    pub bytes: u64,
    /// One for each adapted projection, in the order of the forward pass.
    pub updates: Vec<UpdateSize>,
}

/// Writes the merged model into an existing folder: weights, configuration, tokenizer.
///
/// # Errors
/// When the adapter does not fit the base, a tensor is missing or damaged, or a file cannot be written.
pub fn write(folder: &Path, base: &BaseModel, adapter: &Adapter, options: &MergeOptions) -> Result<Merged> {
    let planned = plan(base)?;
    check_fit(base, adapter)?;
    let bar = progress::bar(planned.len() as u64, "merge", "tensors");
    let projections = projections(base);
    let mut moved = BTreeMap::new();
    let bytes = export::write_weights(folder, &planned, options.dtype, |name| {
        bar.inc(1);
        let Some((layer, projection)) = projections.get(name) else { return base.tensors.tensor(name) };
        let merged = merge_one(base, adapter, options, *layer, *projection)?;
        if let Some(step) = merged.step {
            moved.entry(*projection).or_insert_with(Vec::new).push((*layer, step));
        }
        Ok(merged.weight)
    })?;
    bar.finish_and_clear();
    export::write_companions(folder, base, options.dtype)?;
    let updates = moved.into_iter().map(|(projection, steps)| summary(projection, &steps)).collect();
    Ok(Merged { bytes, updates })
}

fn plan(base: &BaseModel) -> Result<Vec<Planned>> {
    let shape = |name: String| {
        let shape = base.tensors.shape(&name);
        let shape = shape.with_context(|| format!("`{name}` is missing in `{}`", base.path.display()))?;
        Ok(Planned { name, shape })
    };
    base.config.tensor_names().into_iter().map(shape).collect()
}

/// The weights that an adapter may change, by name.
fn projections(base: &BaseModel) -> BTreeMap<String, (usize, Projection)> {
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

/// A merged weight and, where it was adapted, how far it moved.
struct MergedWeight {
    /// `[out, in]` in the dtype of the file.
    weight: Tensor,
    step: Option<Step>,
}

/// Norms relative to the weight's.
#[derive(Debug, Clone, Copy)]
struct Step {
    update: f64,
    rounding: f64,
}

fn merge_one(
    base: &BaseModel,
    adapter: &Adapter,
    options: &MergeOptions,
    layer: usize,
    projection: Projection,
) -> Result<MergedWeight> {
    let name = format!("{}.weight", projection.path(layer));
    let weight = match options.from {
        Quantization::Nf4 => base.tensors.nf4(&name)?.to_device(options.device).dequantize(Kind::Float),
        Quantization::None => base.tensors.tensor(&name)?.to_device(options.device).to_kind(Kind::Float),
    }; // [out, in] f32
    if !adapter.spec.targets.contains(&projection) {
        return Ok(MergedWeight { weight: weight.to_kind(options.dtype), step: None });
    }
    let part = |which| {
        let name = half(layer, projection, which);
        let tensor = adapter.tensors.get(&name).with_context(|| format!("the adapter has no `{name}`"))?;
        anyhow::Ok(tensor.to_device(options.device))
    };
    // Products of f32 on a GPU may be rounded to 10 bits (TF32); this is computed once, so in f64.
    let update =
        part('B')?.to_kind(Kind::Double).matmul(&part('A')?.to_kind(Kind::Double)) * adapter.spec.scale();
    let exact = &weight + update.to_kind(Kind::Float);
    let stored = exact.to_kind(options.dtype);
    let size = norm(&weight).max(f64::MIN_POSITIVE);
    let step =
        Step { update: norm(&update) / size, rounding: norm(&(stored.to_kind(Kind::Float) - exact)) / size };
    Ok(MergedWeight { weight: stored, step: Some(step) })
}

fn norm(tensor: &Tensor) -> f64 {
    tensor.norm().double_value(&[])
}

fn summary(projection: Projection, steps: &[(usize, Step)]) -> UpdateSize {
    let mean =
        |of: fn(&Step) -> f64| steps.iter().map(|(_, step)| of(step)).sum::<f64>() / steps.len() as f64;
    let largest = steps.iter().max_by(|a, b| a.1.update.total_cmp(&b.1.update));
    UpdateSize {
        projection: projection.name().to_string(),
        mean: mean(|step| step.update),
        max: largest.map_or(0.0, |(_, step)| step.update),
        layer_of_max: largest.map_or(0, |(layer, _)| *layer),
        rounding: mean(|step| step.rounding),
    }
}
