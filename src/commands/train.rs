//! `granite train`: recipe and dataset to adapter.

use anyhow::Result;
use tch::Device;

use crate::checkpoint::run::RunFolder;
use crate::cli::TrainArgs;
use crate::kernels::device;
use crate::progress;
use crate::recipe::Recipe;
use crate::stdout;
use crate::train::interrupt::Interrupt;
use crate::train::memory::told;
use crate::train::plan::Plan;
use crate::train::run::{RunOptions, Summary, run as train};

/// Runs the subcommand.
///
/// # Errors
/// What is wrong with the recipe, the base model, the dataset or the run's folder.
pub fn run(args: &TrainArgs) -> Result<()> {
    let recipe = Recipe::load(&args.recipe.recipe, &args.recipe.overrides)?;
    let folder = RunFolder::of(&recipe, args.out.as_deref());
    let plan = Plan::new(recipe)?;
    if args.dry_run {
        return print_plan(&plan, args.json);
    }
    progress::note(plan.figures.to_string().trim_end());
    let device = device::open(args.device)?;
    if device == Device::Cpu {
        progress::note(format!("{:<12}{}", "threads", tch::get_num_threads()));
    }
    let options = RunOptions {
        folder,
        device,
        resume: args.resume,
        stop_after: args.stop_after,
        gpu_memory: args.gpu_memory.map(|gib| (gib * f64::from(1 << 30)) as i64),
        interrupt: Interrupt::listen(),
    };
    let summary = train(plan, &options)?;
    print_summary(&summary, args.json)
}

fn print_plan(plan: &Plan, json: bool) -> Result<()> {
    if json {
        return stdout::json(&plan.figures);
    }
    let on_gpu = format!("on a GPU    {} GiB, by what is computed again", told(plan));
    stdout::text(&format!("{}\n{on_gpu}", plan.figures.to_string().trim_end()))
}

fn print_summary(summary: &Summary, json: bool) -> Result<()> {
    if json {
        return stdout::json(summary);
    }
    let speed = summary.tokens as f64 / summary.step_seconds.max(1e-9);
    progress::note(format!("{} steps, {speed:.0} tokens/s: {}", summary.steps, summary.checkpoint.display()));
    if !summary.finished {
        progress::note("not all steps were taken: go on with `--resume`");
    }
    Ok(())
}
