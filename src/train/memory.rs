//! What a training on a GPU will need, and the fastest way that fits.

use anyhow::Result;
use tch::Device;

use super::plan::Plan;
use crate::error::user_error;
use crate::kernels::bridge;
use crate::kernels::gpu::Gpu;
use crate::model::config::ModelConfig;
use crate::model::fused::plan::{Limits, MemoryLayout, MemoryPlan, Sizes};
use crate::progress;
use crate::recipe::{LoraSpec, Quantization, Recipe, TrainSpec};

/// Taken beside the plan: the libraries' own memory and what the allocator cannot use of its blocks.
const OVERHEAD: i64 = 768 << 20;

/// What the memory of a training depends on.
struct Needs<'a> {
    config: &'a ModelConfig,
    recipe: &'a Recipe,
    /// The largest batch with so many rows in a micro-batch.
    largest: &'a dyn Fn(usize) -> Limits,
}

impl Needs<'_> {
    fn plan(&self, lora: &LoraSpec, rows: usize, layout: MemoryLayout) -> MemoryPlan {
        let sizes = Sizes::new(self.config, lora, (self.largest)(rows), layout);
        MemoryPlan::new(&sizes, self.recipe.model.quantization, self.recipe.train.optimizer)
    }

    /// Bytes with this layout and what is taken beside the plan.
    fn bytes(&self, lora: &LoraSpec, rows: usize, layout: MemoryLayout) -> i64 {
        self.plan(lora, rows, layout).total + OVERHEAD
    }

    /// Layouts that the recipe allows, the fastest first.
    fn layouts(&self) -> Vec<MemoryLayout> {
        let TrainSpec { recompute, resident_weights, .. } = self.recipe.train;
        // Weights that were never quantised lie there in 16 bits anyway.
        let resident =
            resident_weights.or((self.recipe.model.quantization == Quantization::None).then_some(true));
        MemoryLayout::all()
            .filter(|layout| recompute.fixed().is_none_or(|fixed| fixed == layout.recompute))
            .filter(|layout| resident.is_none_or(|resident| resident == layout.resident_weights))
            .collect()
    }

    /// The fastest layout that fits `free` bytes.
    ///
    /// # Errors
    /// When none does, with the change that would.
    fn fitting(&self, free: i64) -> Result<MemoryLayout> {
        let (lora, rows) = (&self.recipe.lora, self.recipe.train.rows_per_microbatch);
        let layouts = self.layouts();
        if let Some(fits) = layouts.iter().find(|layout| self.bytes(lora, rows, **layout) <= free) {
            return Ok(*fits);
        }
        let least = layouts.iter().map(|layout| self.bytes(lora, rows, *layout)).min().unwrap_or(0);
        Err(user_error(
            format!(
                "the training needs {} MiB of GPU memory, {} MiB are free",
                (least >> 20) + 1,
                free >> 20
            ),
            self.way_out(free),
        ))
    }

    /// The smallest change to the recipe with which the training fits, found by planning it.
    fn way_out(&self, free: i64) -> String {
        let TrainSpec { rows_per_microbatch: rows, accumulation, recompute, resident_weights, .. } =
            self.recipe.train;
        let lora = &self.recipe.lora;
        let fits =
            |lora: &LoraSpec, rows| MemoryLayout::all().any(|layout| self.bytes(lora, rows, layout) <= free);
        if fits(lora, rows) {
            let (auto, dequantised) = ("`train.recompute = \"auto\"`", "`train.resident_weights = false`");
            let with_auto = |layout: &MemoryLayout| {
                resident_weights.is_none_or(|resident| resident == layout.resident_weights)
                    && self.bytes(lora, rows, *layout) <= free
            };
            let asked = match recompute.fixed() {
                Some(_) if MemoryLayout::all().any(|layout| with_auto(&layout)) => auto.to_string(),
                Some(_) => format!("{auto} and {dequantised}"),
                None => dequantised.to_string(),
            };
            return format!("set {asked}: with less kept it fits");
        }
        // The rows of a step stay the same.
        let fewer = (1..rows).rev().find(|fewer| rows * accumulation % fewer == 0 && fits(lora, *fewer));
        if let Some(fewer) = fewer {
            let accumulation = rows * accumulation / fewer;
            return format!(
                "set `train.rows_per_microbatch = {fewer}` and `train.accumulation = {accumulation}`: the same steps in less memory"
            );
        }
        let ranks =
            std::iter::successors(Some(lora.rank / 2), |rank| Some(rank / 2)).take_while(|rank| *rank > 0);
        let smaller = ranks.map(|rank| LoraSpec { rank, ..lora.clone() }).find(|lora| fits(lora, 1));
        if let Some(LoraSpec { rank, .. }) = smaller {
            let accumulation = rows * accumulation;
            return format!(
                "set `lora.rank = {rank}`, `train.rows_per_microbatch = 1` and `train.accumulation = {accumulation}`"
            );
        }
        "prepare the dataset with a smaller `data.sequence_length`, take a smaller base model, or a GPU with more memory"
            .to_string()
    }
}

/// Runs `with` on what a plan's memory depends on.
fn with_needs<T>(plan: &Plan, with: impl FnOnce(&Needs<'_>) -> T) -> T {
    let largest = |rows| plan.largest_of(rows);
    with(&Needs { config: &plan.base.config, recipe: &plan.recipe, largest: &largest })
}

/// The memory of a training with this layout.
pub fn plan_for(plan: &Plan, layout: MemoryLayout) -> MemoryPlan {
    with_needs(plan, |needs| needs.plan(&plan.recipe.lora, plan.recipe.train.rows_per_microbatch, layout))
}

/// What the recipe asks for, or the fastest that fits `limit` bytes, or what is free of the GPU's memory.
///
/// # Errors
/// When nothing fits, with what would.
pub fn choose(plan: &Plan, device: Device, limit: Option<i64>) -> Result<Option<MemoryLayout>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    let free = i64::try_from(Gpu::at(index)?.memory()?.0).unwrap_or(i64::MAX);
    let free = limit.map_or(free, |limit| limit.min(free));
    let chosen = with_needs(plan, |needs| needs.fitting(free))?;
    let needed = plan_for(plan, chosen).total;
    progress::note(format!(
        "memory on the GPU: {:.2} GiB planned of {:.2} free, {chosen}",
        gib(needed),
        gib(free),
    ));
    Ok(Some(chosen))
}

/// Says how the plan and what was measured agree, at the end of a run.
///
/// # Errors
/// When the driver or libtorch fails.
pub fn tell_peak(plan: &Plan, layout: MemoryLayout, device: Device) -> Result<()> {
    let Device::Cuda(index) = device else { return Ok(()) };
    let planned = plan_for(plan, layout).total;
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

/// What each way would need, as a plan tells it: `none 34.35, mlp 19.04, …; with resident weights 46.57, 31.26, …`.
pub fn told(plan: &Plan) -> String {
    let of = |resident: bool| {
        let one = |layout: MemoryLayout| {
            format!("{} {:.2}", layout.recompute.name(), gib(plan_for(plan, layout).total))
        };
        let layouts = MemoryLayout::all().filter(|layout| layout.resident_weights == resident);
        layouts.map(one).collect::<Vec<_>>().join(", ")
    };
    format!("{}; with resident weights {}", of(false), of(true))
}

fn gib(bytes: i64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::recipe::{Recompute, RecomputeChoice};

    const GIB: i64 = 1 << 30;

    /// The standard recipe with these settings, of a model of 8 billion weights.
    fn fitting(settings: &[&str], free: i64) -> Result<MemoryLayout> {
        let text = include_str!("../../recipes/granite-3.1-8b-qlora.toml");
        let overrides: Vec<_> = settings.iter().map(|setting| setting.parse().unwrap()).collect();
        let recipe = Recipe::parse(text, Path::new("recipe.toml"), &overrides).unwrap();
        let length = recipe.data.sequence_length as i64;
        let largest = |rows| Limits { tokens: rows as i64 * length, sequences: 10 * rows as i64 };
        Needs { config: &ModelConfig::granite_8b().unwrap(), recipe: &recipe, largest: &largest }
            .fitting(free)
    }

    fn told(settings: &[&str], free: i64) -> String {
        crate::error::render(&fitting(settings, free).unwrap_err())
    }

    #[test]
    fn the_fastest_that_fits_is_taken() {
        for (free, recompute, resident_weights) in [
            (80, Recompute::None, true),
            (40, Recompute::None, false),
            (24, Recompute::Mlp, false),
            (12, Recompute::Layer, false),
            (9, Recompute::LayerOffload, false),
            (8, Recompute::LayerOffloadAdapter, false),
        ] {
            let layout = fitting(&[], free * GIB).unwrap();
            assert_eq!(layout, MemoryLayout { recompute, resident_weights }, "{free} GiB");
        }
    }

    #[test]
    fn what_is_asked_for_is_taken_or_refused() {
        let layout = fitting(&["train.recompute=layer"], 80 * GIB).unwrap();
        assert_eq!(layout, MemoryLayout { recompute: Recompute::Layer, resident_weights: true });
        let layout = fitting(&["train.resident_weights=false"], 80 * GIB).unwrap();
        assert_eq!(layout, Recompute::None.into());
        // Weights that are not quantised lie there in 16 bits, ready.
        let layout = fitting(&["model.quantization=none"], 40 * GIB).unwrap();
        assert!(layout.resident_weights);
        let text = told(&["train.recompute=none"], 24 * GIB);
        assert!(
            text.contains("24576 MiB are free") && text.contains("`train.recompute = \"auto\"`"),
            "{text}"
        );
        let text = told(&["train.recompute=none", "train.resident_weights=true"], 12 * GIB);
        assert!(text.contains("`train.recompute = \"auto\"` and `train.resident_weights = false`"), "{text}");
        let text = told(&["train.resident_weights=true"], 10 * GIB);
        assert!(text.contains("`train.resident_weights = false`"), "{text}");
    }

    /// What is proposed must be true: applied to the recipe, the training fits.
    #[test]
    fn the_way_out_fits() {
        let free = 15 * GIB / 2;
        let text = told(&[], free);
        assert!(text.contains("`train.rows_per_microbatch = "), "{text}");
        let number = |key: &str| -> usize {
            let (_, rest) = text.split_once(&format!("`{key} = ")).unwrap();
            rest.split_once('`').unwrap().0.parse().unwrap()
        };
        let (rows, accumulation) = (number("train.rows_per_microbatch"), number("train.accumulation"));
        assert_eq!(rows * accumulation, 16);
        let settings =
            [format!("train.rows_per_microbatch={rows}"), format!("train.accumulation={accumulation}")];
        fitting(&[&settings[0], &settings[1]], free).unwrap();
        let text = told(&["train.rows_per_microbatch=1"], 6 * GIB);
        assert!(text.contains("`lora.rank = "), "{text}");
        assert!(told(&[], GIB).contains("a GPU with more memory"));
    }

    #[test]
    fn a_byte_too_few_shows() {
        let text = "name = \"r\"\n[model]\nbase = \"b\"\n";
        let recipe = Recipe::parse(text, Path::new("recipe.toml"), &[]).unwrap();
        assert_eq!(recipe.train.recompute, RecomputeChoice::Auto);
        let (config, limits) = (ModelConfig::granite_8b().unwrap(), Limits { tokens: 2048, sequences: 1 });
        let needs = Needs { config: &config, recipe: &recipe, largest: &|_| limits };
        let least = MemoryLayout::all().map(|layout| needs.bytes(&recipe.lora, 4, layout)).min().unwrap();
        needs.fitting(least).unwrap();
        let text = crate::error::render(&needs.fitting(least - 1).unwrap_err());
        let numbers: Vec<i64> = text.split(' ').filter_map(|word| word.parse().ok()).collect();
        assert!(numbers[0] > numbers[1], "{text}");
    }
}
