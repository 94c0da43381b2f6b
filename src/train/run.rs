//! The loop: steps, validation, checkpoints; and how a run goes on from one.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::Value;
use tch::{Device, Tensor};

use super::interrupt::Interrupt;
use super::memory;
use super::optimizer::AdamW;
use super::plan::Plan;
use super::report;
use crate::checkpoint::run::{RunFolder, State};
use crate::checkpoint::{adapter, nf4_cache};
use crate::error::user_error;
use crate::losses::{self, LossOf, LossReport};
use crate::metrics::event::{Event, StepEvent};
use crate::metrics::jsonl::JsonLines;
use crate::model::batch::{Batch, Sequence};
use crate::model::decoder::{Decoder, GradOptions, LoadOptions};
use crate::model::params::ParamSet;
use crate::progress;
use crate::recipe::Recompute;

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
    /// Whether these are all steps of the plan.
    pub finished: bool,
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
}

/// Runs a plan to its end, to `stop_after`, or to an interrupt.
///
/// # Errors
/// When a file cannot be read or written, the checkpoint is of another run, or a loss is not finite.
pub fn run(mut plan: Plan, options: &RunOptions) -> Result<Summary> {
    let resumed = if options.resume { resume_point(&plan, &options.folder)? } else { None };
    match (&resumed, options.resume) {
        (Some(_), _) => {}
        (None, true) => options.folder.begin_again(&plan.recipe)?,
        (None, false) => options.folder.begin(&plan.recipe)?,
    }
    plan.base = plan.base.with_nf4_cache(std::path::Path::new(nf4_cache::DEFAULT_FOLDER));
    let load = LoadOptions { quantization: plan.recipe.model.quantization, device: options.device };
    let mut decoder = Decoder::load(plan.base.tensors.as_ref(), &plan.base.config, &load)
        .with_context(|| format!("cannot load model `{}`", plan.base.path.display()))?;
    decoder.attach_lora(&plan.recipe.lora, plan.recipe.train.seed)?;
    let recompute = memory::choose(&plan, options.device, options.gpu_memory)?;
    if options.device.is_cuda() {
        decoder.prepare(plan.largest_microbatch(), recompute)?;
    }
    let mut training = Training::new(&plan, options, decoder, recompute)?;
    if let Some(state) = resumed {
        training.restore(state)?;
    }
    training.run()
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

struct Training<'a> {
    plan: &'a Plan,
    options: &'a RunOptions,
    decoder: Decoder,
    optimizer: AdamW,
    recompute: Recompute,
    gradients: ParamSet,
    metrics: Option<JsonLines>,
    /// Steps taken.
    step: u64,
    /// Sum of losses and supervised tokens of the running epoch.
    epoch_loss: (f64, i64),
    /// The step of the newest checkpoint.
    saved: Option<u64>,
    summary: Summary,
}

impl<'a> Training<'a> {
    fn new(plan: &'a Plan, options: &'a RunOptions, decoder: Decoder, recompute: Recompute) -> Result<Self> {
        let adapters = decoder.adapters().context("the decoder took no adapter")?;
        let optimizer = if recompute.offloads() {
            AdamW::with_moments_on_host(adapters, &plan.recipe.train)?
        } else {
            AdamW::new(adapters, &plan.recipe.train)
        };
        let folder = options.folder.path().to_path_buf();
        Ok(Self {
            optimizer,
            recompute,
            gradients: adapters.zeros_like(),
            plan,
            options,
            decoder,
            metrics: None,
            step: 0,
            epoch_loss: (0.0, 0),
            saved: None,
            summary: Summary {
                checkpoint: folder.clone(),
                folder,
                steps: 0,
                finished: false,
                train_loss: None,
                first_validation: None,
                last_validation: None,
                tokens: 0,
                step_seconds: 0.0,
            },
        })
    }

    fn restore(&mut self, state: State) -> Result<()> {
        let folder = self.options.folder.step(state.step);
        let saved = adapter::load(&folder)?;
        let adapters = self.decoder.adapters().context("the decoder took no adapter")?;
        let in_folder = || format!("checkpoint `{}`", folder.display());
        saved.copy_into(adapters).with_context(in_folder)?;
        self.decoder.adapters_changed();
        self.optimizer.restore(&self.options.folder.load_optimizer(state.step)?).with_context(in_folder)?;
        self.step = state.step;
        self.epoch_loss = state.epoch_loss;
        self.saved = Some(state.step);
        progress::note(format!("resuming after step {} of {}", state.step, self.plan.steps));
        Ok(())
    }

    fn run(mut self) -> Result<Summary> {
        self.metrics = Some(JsonLines::after(&self.options.folder.metrics(), self.step)?);
        if self.step == 0 {
            self.validate()?;
            self.summary.first_validation.clone_from(&self.summary.last_validation);
        }
        let bar = progress::bar(self.plan.steps, "train", "steps");
        bar.set_position(self.step);
        bar.reset_eta();
        let stop = self.options.stop_after.unwrap_or(u64::MAX).min(self.plan.steps);
        while self.step < stop && !self.options.interrupt.is_asked() {
            self.take_step(&bar)?;
            self.after_step(stop)?;
        }
        bar.finish_and_clear();
        self.finish()
    }

    /// One optimiser step over its micro-batches.
    fn take_step(&mut self, bar: &ProgressBar) -> Result<()> {
        let begun = Instant::now();
        let order = self.plan.order.step(self.step);
        let batches = self.batches(&order);
        let supervised: i64 = batches.iter().map(|batch| batch.supervised).sum();
        let tokens: i64 = batches.iter().map(Batch::tokens).sum();
        let sum = self.accumulate(&batches, supervised)?;
        let loss = sum / supervised.max(1) as f64;
        self.check_finite(loss, 0.0)?;
        let lr = self.plan.rate.at(self.step);
        let adapters = self.decoder.adapters().context("the decoder took no adapter")?;
        let grad_norm = self.optimizer.step(adapters, &self.gradients, lr, self.step + 1)?.value();
        self.check_finite(loss, grad_norm)?;
        self.decoder.adapters_changed();
        self.step += 1;
        self.epoch_loss = (self.epoch_loss.0 + sum, self.epoch_loss.1 + supervised);
        let seconds = begun.elapsed().as_secs_f64();
        self.summary.tokens += tokens;
        self.summary.step_seconds += seconds;
        self.summary.train_loss = Some(loss);
        let epoch = self.step as f64 / self.plan.order.steps_per_epoch() as f64;
        let event = StepEvent {
            step: self.step,
            epoch,
            loss,
            lr,
            grad_norm,
            rows: order.concat(),
            tokens,
            supervised_tokens: supervised,
            seconds,
        };
        self.tell(&event, bar);
        self.record(&Event::Step(event))
    }

    fn batches(&self, order: &[Vec<usize>]) -> Vec<Batch> {
        let sequences = |rows: &[usize]| -> Vec<&Sequence> {
            rows.iter().flat_map(|row| &self.plan.train[*row].sequences).collect()
        };
        order.iter().map(|rows| Batch::pack(sequences(rows), self.options.device)).collect()
    }

    /// Gradients of the mean loss over all supervised tokens of the step; gives the sum of the losses.
    fn accumulate(&mut self, batches: &[Batch], supervised: i64) -> Result<f64> {
        let _ = self.gradients.flat().shallow_clone().zero_();
        let mut sum = 0.0;
        for (index, batch) in batches.iter().enumerate() {
            let options = GradOptions {
                scale: 1.0 / supervised.max(1) as f64,
                seed: self.plan.recipe.train.seed,
                // Only told apart, never counted with: a run of 2^64 micro-batches may come round.
                microbatch: self
                    .step
                    .wrapping_mul(self.plan.recipe.train.accumulation as u64)
                    .wrapping_add(index as u64),
            };
            sum += self.decoder.loss_and_grad(batch, &options, &mut self.gradients)?.sum();
        }
        Ok(sum)
    }

    /// A step on such gradients changed nothing, on such a loss it spoilt the adapter; the last checkpoint is whole.
    fn check_finite(&self, loss: f64, grad_norm: f64) -> Result<()> {
        if loss.is_finite() && grad_norm.is_finite() {
            return Ok(());
        }
        let what = if loss.is_finite() { self.broken_gradient(grad_norm) } else { format!("loss is {loss}") };
        let kept = self.saved.map_or_else(
            || "no checkpoint was written before".to_string(),
            |step| format!("the checkpoint of step {step} stays"),
        );
        Err(user_error(format!("step {}: the {what}; {kept}", self.step + 1), self.way_out()))
    }

    /// Before the first step the learning rate has changed nothing yet.
    fn way_out(&self) -> &'static str {
        match self.step {
            0 => {
                "no step was taken yet: the base model's weights are damaged, or its config.json is another model's; `granite eval --model base` tries it alone"
            }
            _ => "lower `train.lr`, lengthen `train.warmup`, or look at the step's rows for damaged text",
        }
    }

    /// The gradient that is not finite: the last in the order of the forward pass, where the backward pass met it first.
    fn broken_gradient(&self, grad_norm: f64) -> String {
        let is_broken = |gradient: &Tensor| gradient.isfinite().all().int64_value(&[]) == 0;
        let broken = self.gradients.iter().filter(|(_, gradient)| is_broken(gradient)).last();
        broken.map_or_else(
            || format!("gradient norm is {grad_norm}"),
            |(name, _)| format!("gradient of `{name}` is not finite"),
        )
    }

    fn after_step(&mut self, stop: u64) -> Result<()> {
        let spec = &self.plan.recipe.train;
        let per_epoch = self.plan.order.steps_per_epoch();
        let epoch_ends = self.step.is_multiple_of(per_epoch);
        let due = |every: u64| if every == 0 { epoch_ends } else { self.step.is_multiple_of(every) };
        let ends = self.step == self.plan.steps;
        let (validates, saves) = (due(spec.eval_every) || ends, due(spec.save_every) || self.step == stop);
        if epoch_ends {
            let (sum, tokens) = std::mem::take(&mut self.epoch_loss);
            let event = Event::Epoch {
                epoch: self.step / per_epoch,
                step: self.step,
                loss: sum / tokens.max(1) as f64,
            };
            self.record(&event)?;
        }
        if validates {
            self.validate()?;
        }
        if saves {
            self.save()?;
        }
        Ok(())
    }

    fn validate(&mut self) -> Result<()> {
        let names = self.plan.dataset.source_names();
        let Some(validation) = losses::measure(&self.decoder, &self.plan.validation, &names)? else {
            return Ok(());
        };
        let step = self.step;
        let LossOf { loss, perplexity, tokens, .. } = validation.overall;
        if !loss.is_finite() {
            return Err(user_error(format!("step {step}: the validation loss is {loss}"), self.way_out()));
        }
        let by_source: Vec<String> =
            validation.sources.iter().map(|one| format!("{} {:.4}", one.name, one.loss)).collect();
        progress::note(format!("step {step}: validation loss {loss:.4} ({})", by_source.join(", ")));
        let sources = validation.sources.iter().map(|one| (one.name.clone(), one.loss)).collect();
        self.summary.last_validation = Some(validation);
        self.record(&Event::Validation { step, loss, perplexity, tokens, sources })
    }

    fn save(&mut self) -> Result<()> {
        let adapters = self.decoder.adapters().context("the decoder took no adapter")?;
        let state = State::new(self.step, self.epoch_loss, self.plan.identity(), tch::get_num_threads());
        let (lora, base) = (&self.plan.recipe.lora, &self.plan.recipe.model.base);
        self.options.folder.save(&state, lora, adapters, base, &self.optimizer.state())?;
        self.saved = Some(self.step);
        self.options.folder.prune(self.plan.recipe.train.keep_last)
    }

    fn finish(mut self) -> Result<Summary> {
        if self.saved != Some(self.step) && self.step > 0 {
            self.save()?;
        }
        let Some(saved) = self.saved else { bail!("the training was ended before its first step") };
        report::write(&self.options.folder, &self.plan.recipe.name)?;
        memory::tell_peak(self.plan, self.recompute, self.options.device)?;
        self.summary.steps = self.step;
        self.summary.finished = self.step == self.plan.steps;
        self.summary.checkpoint = self.options.folder.step(saved);
        Ok(self.summary)
    }

    fn record(&mut self, event: &Event) -> Result<()> {
        self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.record(event))
    }

    fn tell(&self, event: &StepEvent, bar: &ProgressBar) {
        bar.inc(1);
        bar.set_message(format!("loss {:.4}", event.loss));
        if self.plan.recipe.metrics.console {
            let StepEvent { step, loss, lr, grad_norm, tokens, seconds, .. } = event;
            let speed = *tokens as f64 / seconds;
            let line = format!(
                "step {step}/{}  loss {loss:.4}  lr {lr:.2e}  grad norm {grad_norm:.3}  {speed:.0} tokens/s",
                self.plan.steps
            );
            bar.suspend(|| progress::note(line));
        }
    }
}
