//! A run: what it needs, and how it goes on from a checkpoint. The steps are in [`super::steps`].

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::Value;
use tch::Device;

use super::interrupt::Interrupt;
use super::memory;
use super::plan::Plan;
use super::steps::Training;
use crate::checkpoint::nf4_cache;
use crate::checkpoint::run::{RunFolder, State};
use crate::error::user_error;
use crate::losses::LossReport;
use crate::model::decoder::{Decoder, LoadOptions};
use crate::progress;

/// How to run a plan.
#[derive(Debug)]
pub struct RunOptions {
    /// Where its files go.
    pub folder: RunFolder,
    /// Where to compute.
    pub device: Device,
    /// Go on from the newest checkpoint.
    pub resume: bool,
    /// Write a checkpoint after this step and end there.
    pub stop_after: Option<u64>,
    /// Bytes of GPU memory to stay within; what is free when `None`.
    pub gpu_memory: Option<i64>,
    /// Ends the run at the next step boundary when asked.
    pub interrupt: Interrupt,
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// The run's folder.
    pub folder: PathBuf,
    /// The newest checkpoint.
    pub checkpoint: PathBuf,
    /// Optimiser steps taken in all.
    pub steps: u64,
    /// Whether these are all steps of the plan, or validation ended it early.
    pub finished: bool,
    /// The step of the least validation loss and that loss, where something was validated.
    pub best: Option<(u64, f64)>,
    /// The checkpoint of that step, where there is one.
    pub best_checkpoint: Option<PathBuf>,
    /// Mean training loss of the last step.
    pub train_loss: Option<f64>,
    /// Validation before the first step of this process, when there was one.
    pub first_validation: Option<LossReport>,
    /// The last validation.
    pub last_validation: Option<LossReport>,
    /// Tokens that went through training in this process.
    pub tokens: i64,
    /// Seconds of this process' steps, validation and saving left out.
    pub step_seconds: f64,
    /// Seconds from the beginning of the run to its first step, loading and first validation included.
    pub seconds_to_first_step: f64,
}

/// Runs a plan to its end, to `stop_after`, or to an interrupt.
///
/// # Errors
/// When a file cannot be read or written, the checkpoint is of another run, or a loss is not finite.
pub fn run(mut plan: Plan, options: &RunOptions) -> Result<Summary> {
    let begun = Instant::now();
    let resumed = if options.resume { resume_point(&plan, &options.folder)? } else { None };
    let _lock = if options.resume {
        let lock = options.folder.lock()?;
        match &resumed {
            Some(_) => options.folder.keep_recipe(&plan.recipe)?,
            None => options.folder.begin_again(&plan.recipe)?,
        }
        lock
    } else {
        options.folder.begin(&plan.recipe)?
    };
    plan.base = plan.base.with_nf4_cache(std::path::Path::new(nf4_cache::DEFAULT_FOLDER));
    // Too little memory is told before anything is loaded.
    let layout = memory::choose(&plan, options.device, options.gpu_memory)?;
    let load = LoadOptions::new(plan.recipe.model.quantization, options.device);
    let mut decoder = Decoder::load(plan.base.tensors.as_ref(), &plan.base.config, &load)
        .with_context(|| format!("cannot load model `{}`", plan.base.path.display()))?;
    decoder.attach_lora(&plan.recipe.lora, plan.recipe.train.seed)?;
    if let Some(layout) = layout {
        decoder.prepare(plan.largest_microbatch(), layout)?;
    }
    let state = resumed.as_ref();
    std::thread::scope(|scope| {
        let mut training = Training::new(scope, &plan, options, decoder, layout, begun)?;
        if let Some(state) = state {
            training.restore(state)?;
        }
        training.run(scope)
    })
}

/// The newest checkpoint's state, when it continues this plan; `None` when the run ended before its first one.
fn resume_point(plan: &Plan, folder: &RunFolder) -> Result<Option<State>> {
    let Some(step) = folder.checkpoints()?.pop() else {
        if folder.is_begun() {
            progress::note("the run ended before its first checkpoint: it begins again");
            return Ok(None);
        }
        return Err(user_error(
            format!("run folder `{}` holds no checkpoint to resume", folder.path().display()),
            "start the run without `--resume`",
        ));
    };
    let state = folder.load_state(step)?;
    if let Some((field, saved, now)) = first_difference("", &state.identity, &plan.identity()) {
        return Err(user_error(
            format!(
                "checkpoint `{}` was made with `{field}` = {saved}, now it is {now}",
                folder.step(step).display()
            ),
            "resume with the recipe, dataset and base model of the run, or start another run with `--out FOLDER`",
        ));
    }
    if state.threads != tch::get_num_threads() {
        progress::note(format!(
            "note: the run used {} threads, now there are {}: sums may round differently",
            state.threads,
            tch::get_num_threads()
        ));
    }
    Ok(Some(state))
}

/// The first field in which two identities differ, with both values.
fn first_difference(path: &str, saved: &Value, now: &Value) -> Option<(String, Value, Value)> {
    let (Value::Object(old), Value::Object(new)) = (saved, now) else {
        return (saved != now).then(|| (path.to_string(), saved.clone(), now.clone()));
    };
    let names = old.keys().chain(new.keys().filter(|name| !old.contains_key(*name)));
    for name in names {
        let below = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let value = |map: &serde_json::Map<String, Value>| map.get(name).cloned().unwrap_or(Value::Null);
        if let Some(found) = first_difference(&below, &value(old), &value(new)) {
            return Some(found);
        }
    }
    None
}
