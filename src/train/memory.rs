//! What a training on a GPU will need, and the fastest way that fits.

use anyhow::Result;
use tch::Device;

use super::plan::Plan;
use crate::error::user_error;
use crate::kernels::bridge;
use crate::kernels::gpu::Gpu;
use crate::model::fused::plan::{MemoryPlan, Sizes};
use crate::progress;
use crate::recipe::{Recompute, RecomputeChoice};

/// Taken beside the plan: the libraries' own memory and what the allocator cannot use of its blocks.
const OVERHEAD: i64 = 768 << 20;

/// The plan of a training whose backward pass computes so much again.
pub fn plan_for(plan: &Plan, recompute: Recompute) -> MemoryPlan {
    let recipe = &plan.recipe;
    let sizes = Sizes::new(&plan.base.config, &recipe.lora, plan.largest_microbatch(), recompute);
    MemoryPlan::new(&sizes, recipe.model.quantization, recipe.train.optimizer)
}

/// What the recipe asks for, or the fastest that fits `limit` bytes, or what is free of the GPU's memory.
///
/// # Errors
/// When nothing fits, with what would.
pub fn choose(plan: &Plan, device: Device, limit: Option<i64>) -> Result<Recompute> {
    let Device::Cuda(index) = device else { return Ok(Recompute::None) };
    let free = i64::try_from(Gpu::at(index)?.memory()?.0).unwrap_or(i64::MAX);
    let free = limit.map_or(free, |limit| limit.min(free));
    let chosen = fitting(plan, free)?;
    let needed = plan_for(plan, chosen).total;
    progress::note(format!(
        "memory on the GPU: {:.2} GiB planned of {:.2} free, recompute {}",
        gib(needed),
        gib(free),
        chosen.name()
    ));
    Ok(chosen)
}

/// Says how the plan and what was measured agree, at the end of a run.
///
/// # Errors
/// When the driver or libtorch fails.
pub fn tell_peak(plan: &Plan, recompute: Recompute, device: Device) -> Result<()> {
    let Device::Cuda(index) = device else { return Ok(()) };
    let planned = plan_for(plan, recompute).total;
    let memory = bridge::memory(device)?;
    let (free, total) = Gpu::at(index)?.memory()?;
    progress::note(format!(
        "memory on the GPU: {:.2} GiB planned, {:.2} GiB in tensors at most, {:.2} GiB beside them (context, libraries)",
        gib(planned),
        gib(memory.allocated_peak),
        gib((total - free) as i64 - memory.reserved)
    ));
    Ok(())
}

/// What each way would need, as a plan tells it: `none 34.35 GiB, mlp 19.04 GiB, …`.
pub fn told(plan: &Plan) -> String {
    let one =
        |recompute: &Recompute| format!("{} {:.2}", recompute.name(), gib(plan_for(plan, *recompute).total));
    Recompute::ALL.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// As [`choose`], for `free` bytes.
fn fitting(plan: &Plan, free: i64) -> Result<Recompute> {
    let candidates: &[Recompute] = match plan.recipe.train.recompute {
        RecomputeChoice::Auto => &Recompute::ALL,
        RecomputeChoice::None => &[Recompute::None],
        RecomputeChoice::Mlp => &[Recompute::Mlp],
        RecomputeChoice::Layer => &[Recompute::Layer],
        RecomputeChoice::LayerOffload => &[Recompute::LayerOffload],
    };
    let needs = |recompute: &Recompute| plan_for(plan, *recompute).total + OVERHEAD;
    if let Some(chosen) = candidates.iter().find(|recompute| needs(recompute) <= free) {
        return Ok(*chosen);
    }
    let least = candidates.iter().map(needs).min().unwrap_or(0);
    let next = if candidates.len() == 1 && needs(&Recompute::LayerOffload) <= free {
        "set `train.recompute = \"auto\"`: with more computed again it fits".to_string()
    } else if plan.recipe.train.rows_per_microbatch > 1 {
        "lower `train.rows_per_microbatch` and raise `train.accumulation` by as much".to_string()
    } else {
        "lower `lora.rank` or `data.sequence_length`, or use a GPU with more memory".to_string()
    };
    Err(user_error(
        format!("the training needs {:.2} GiB of GPU memory, {:.2} GiB are free", gib(least), gib(free)),
        next,
    ))
}

fn gib(bytes: i64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}
