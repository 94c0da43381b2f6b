//! The loop: steps, validation, checkpoints.

use std::thread::Scope;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use indicatif::ProgressBar;

use super::feed::{Fed, Feed, largest};
use super::guard::{self, At};
use super::memory;
use super::optimizer::AdamW;
use super::plan::Plan;
use super::report;
use super::run::{RunOptions, Summary};
use super::saver::{Keep, Saver};
use crate::checkpoint::adapter;
use crate::checkpoint::run::{State, Validations};
use crate::error::user_error;
use crate::losses::{self, LossOf};
use crate::metrics::Metrics;
use crate::metrics::event::{Event, StepEvent};
use crate::model::batch::Batch;
use crate::model::decoder::{Decoder, GradOptions};
use crate::model::fused::plan::MemoryLayout;
use crate::model::params::ParamSet;
use crate::progress;

/// A training under way.
pub(super) struct Training<'scope, 'env> {
    plan: &'scope Plan,
    options: &'scope RunOptions,
    decoder: Decoder,
    optimizer: AdamW,
    /// `None` on the CPU.
    layout: Option<MemoryLayout>,
    gradients: ParamSet,
    metrics: Option<Metrics>,
    saver: Saver<'scope, 'env>,
    /// When the run began.
    begun: Instant,
    /// Steps taken.
    step: u64,
    /// Sum of losses and supervised tokens of the running epoch.
    epoch_loss: (f64, i64),
    validations: Validations,
    /// The step of the newest checkpoint that was begun.
    saved: Option<u64>,
    summary: Summary,
}

impl<'scope, 'env> Training<'scope, 'env> {
    pub(super) fn new(
        scope: &'scope Scope<'scope, 'env>,
        plan: &'scope Plan,
        options: &'scope RunOptions,
        decoder: Decoder,
        layout: Option<MemoryLayout>,
        begun: Instant,
    ) -> Result<Self> {
        let adapters = decoder.adapters().context("the decoder took no adapter")?;
        let optimizer = if layout.is_some_and(|layout| layout.recompute.offloads()) {
            AdamW::with_moments_on_host(adapters, &plan.recipe.train, decoder.device())?
        } else {
            AdamW::new(adapters, &plan.recipe.train)
        };
        let folder = options.folder.path().to_path_buf();
        let (lora, base) = (plan.recipe.lora.clone(), plan.recipe.model.base.clone());
        Ok(Self {
            optimizer,
            layout,
            gradients: adapters.zeros_on(decoder.device()),
            plan,
            options,
            decoder,
            metrics: None,
            saver: Saver::new(scope, options.folder.clone(), lora, base),
            begun,
            step: 0,
            epoch_loss: (0.0, 0),
            validations: Validations::default(),
            saved: None,
            summary: Summary {
                checkpoint: folder.clone(),
                folder,
                steps: 0,
                finished: false,
                best: None,
                best_checkpoint: None,
                train_loss: None,
                first_validation: None,
                last_validation: None,
                tokens: 0,
                step_seconds: 0.0,
                seconds_to_first_step: 0.0,
            },
        })
    }

    /// Goes on from a checkpoint.
    ///
    /// # Errors
    /// When one of its files is missing or damaged.
    pub(super) fn restore(&mut self, state: &State) -> Result<()> {
        let folder = self.options.folder.step(state.step);
        let saved = adapter::load(&folder)?;
        let adapters = self.decoder.adapters().context("the decoder took no adapter")?;
        let in_folder = || format!("checkpoint `{}`", folder.display());
        saved.copy_into(adapters).with_context(in_folder)?;
        self.decoder.adapters_changed()?;
        self.optimizer.restore(&self.options.folder.load_optimizer(state.step)?).with_context(in_folder)?;
        self.step = state.step;
        self.epoch_loss = state.epoch_loss;
        self.validations = state.validations;
        self.saved = Some(state.step);
        self.saver.goes_on_from(state.step);
        // A process that was killed between a checkpoint and the end of its tidying left older ones.
        let Keep { last, best } = self.keep();
        self.options.folder.prune(last, best)?;
        progress::note(format!("resuming after step {} of {}", state.step, self.plan.steps));
        Ok(())
    }

    /// Steps to the end of the plan, to where the options say, or until asked to end.
    ///
    /// # Errors
    /// When a file cannot be written, or the training must not go on.
    pub(super) fn run(mut self, scope: &'scope Scope<'scope, 'env>) -> Result<Summary> {
        let folder = &self.options.folder;
        let tensorboard = self.plan.recipe.metrics.tensorboard.then(|| folder.tensorboard());
        self.metrics = Some(Metrics::open(&folder.metrics(), tensorboard.as_deref(), self.step)?);
        self.try_largest()?;
        if self.step == 0 {
            self.validate()?;
            self.summary.first_validation.clone_from(&self.summary.last_validation);
        }
        let bar = progress::bar(self.plan.steps, "train", "steps");
        bar.set_position(self.step);
        bar.reset_eta();
        let stop = self.options.stop_after.unwrap_or(u64::MAX).min(self.plan.steps);
        let feed = Feed::spawn(scope, self.plan, self.step..stop, self.options.device)?;
        while self.step < stop && !self.options.interrupt.is_asked() && !self.is_stopped_early() {
            let fed = feed.next()?;
            self.take_step(fed, &bar)?;
            self.after_step(stop)?;
        }
        bar.finish_and_clear();
        self.finish()
    }

    /// Runs the largest batches once, on a GPU: memory that does not suffice shows now and not in the last epoch.
    fn try_largest(&mut self) -> Result<()> {
        if self.layout.is_none() {
            return Ok(());
        }
        let [train, validation] = largest(self.plan, self.options.device);
        if train.supervised > 0 {
            let _ = self.accumulate(&[train], 1)?;
        }
        if validation.tokens() > 0 {
            let _ = self.decoder.loss(&validation)?;
        }
        Ok(())
    }

    /// Whether validations have not improved for as long as the recipe allows.
    fn is_stopped_early(&self) -> bool {
        self.validations.ends(self.plan.recipe.train.early_stopping_patience)
    }

    /// Where the run stands. When it is about to end badly, the checkpoint that is being written is waited for, so that the
    /// error names the newest.
    fn at(&mut self, is_well: bool) -> Result<At> {
        if !is_well {
            self.saver.finish()?;
        }
        Ok(At { step: self.step, saved: self.saver.newest() })
    }

    /// One optimiser step over its micro-batches.
    fn take_step(&mut self, fed: Fed, bar: &ProgressBar) -> Result<()> {
        let begun = Instant::now();
        let Fed { rows, batches } = fed;
        let supervised: i64 = batches.iter().map(|batch| batch.supervised).sum();
        let tokens: i64 = batches.iter().map(Batch::tokens).sum();
        let sum = self.accumulate(&batches, supervised)?;
        let loss = sum / supervised.max(1) as f64;
        let at = self.at(loss.is_finite())?;
        guard::finite(at, loss, 0.0, &self.gradients)?;
        let lr = self.plan.rate.at(self.step);
        let adapters = self.decoder.adapters().context("the decoder took no adapter")?;
        let grad_norm = self.optimizer.step(adapters, &self.gradients, lr, self.step + 1)?.value();
        let at = self.at(grad_norm.is_finite() && grad_norm > 0.0)?;
        guard::finite(at, loss, grad_norm, &self.gradients)?;
        guard::arrived(at, grad_norm, supervised, &self.gradients)?;
        self.decoder.adapters_stepped()?;
        if self.summary.tokens == 0 {
            self.summary.seconds_to_first_step = self.begun.elapsed().as_secs_f64();
        }
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
            rows: rows.concat(),
            tokens,
            supervised_tokens: supervised,
            seconds,
        };
        self.tell(&event, bar);
        self.record(&Event::Step(event))
    }

    /// Gradients of the mean loss over all supervised tokens of the step; gives the sum of the losses.
    fn accumulate(&mut self, batches: &[Batch], supervised: i64) -> Result<f64> {
        let _ = self.gradients.flat().shallow_clone().zero_();
        let spec = &self.plan.recipe.train;
        let mut sum = 0.0;
        for (index, batch) in batches.iter().enumerate() {
            let options = GradOptions {
                scale: 1.0 / supervised.max(1) as f64,
                seed: spec.seed,
                // Only told apart, never counted with: a run of 2^64 micro-batches may come round.
                microbatch: self.step.wrapping_mul(spec.accumulation as u64).wrapping_add(index as u64),
                noise: spec.neftune_noise_alpha.unwrap_or(0.0),
            };
            sum += self.decoder.loss_and_grad(batch, &options, &mut self.gradients)?.sum();
        }
        Ok(sum)
    }

    fn after_step(&mut self, stop: u64) -> Result<()> {
        let spec = &self.plan.recipe.train;
        let per_epoch = self.plan.order.steps_per_epoch();
        let epoch_ends = self.step.is_multiple_of(per_epoch);
        let due = |every: u64| if every == 0 { epoch_ends } else { self.step.is_multiple_of(every) };
        let ends = self.step == self.plan.steps;
        let (validates, mut saves) =
            (due(spec.eval_every) || ends, due(spec.save_every) || self.step == stop);
        if self.step.checked_sub(1) == Some(self.plan.rate.warmup_steps()) {
            let at = self.at(false)?;
            let adapters = self.decoder.adapters().context("the decoder took no adapter")?;
            guard::moved(at, self.plan.rate.at(self.step - 1), adapters)?;
        }
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
            let is_best = self.validate()?;
            saves |= is_best && self.plan.recipe.train.keeps_best();
        }
        if saves {
            self.save()?;
        }
        self.saver.poll()
    }

    /// Measures the held-out rows; whether the loss is the least so far. What was measured before the first step is not
    /// compared with.
    fn validate(&mut self) -> Result<bool> {
        let names = self.plan.dataset.source_names();
        let Some(validation) = losses::measure(&self.decoder, &self.plan.validation, &names)? else {
            return Ok(false);
        };
        let step = self.step;
        let LossOf { loss, perplexity, tokens, .. } = validation.overall;
        if !loss.is_finite() {
            let at = self.at(false)?;
            return Err(user_error(format!("step {step}: the validation loss is {loss}"), at.way_out()));
        }
        let by_source: Vec<String> =
            validation.sources.iter().map(|one| format!("{} {:.4}", one.name, one.loss)).collect();
        progress::note(format!("step {step}: validation loss {loss:.4} ({})", by_source.join(", ")));
        let sources = validation.sources.iter().map(|one| (one.name.clone(), one.loss)).collect();
        self.summary.last_validation = Some(validation);
        self.record(&Event::Validation { step, loss, perplexity, tokens, sources })?;
        Ok(step > 0 && self.validations.add(step, loss))
    }

    fn save(&mut self) -> Result<()> {
        let adapters = self.decoder.adapters().context("the decoder took no adapter")?;
        let state = State::new(
            self.step,
            self.epoch_loss,
            self.validations,
            self.plan.identity(),
            tch::get_num_threads(),
        );
        self.saver.begin(state, adapters, &self.optimizer.state(), self.keep())?;
        self.saved = Some(self.step);
        Ok(())
    }

    fn keep(&self) -> Keep {
        let spec = &self.plan.recipe.train;
        let best = self.validations.best.filter(|_| spec.keeps_best()).map(|(step, _)| step);
        Keep { last: spec.keep_last, best }
    }

    fn finish(mut self) -> Result<Summary> {
        if self.saved != Some(self.step) && self.step > 0 {
            self.save()?;
        }
        self.saver.finish()?;
        let Some(saved) = self.saver.newest() else { bail!("the training was ended before its first step") };
        report::write(&self.options.folder, &self.plan.recipe.name)?;
        if let Some(layout) = self.layout {
            memory::tell_peak(self.plan, layout, self.options.device)?;
        }
        let is_early = self.is_stopped_early();
        if is_early {
            progress::note(format!(
                "step {}: {} validations without a smaller loss end the training",
                self.step, self.validations.since
            ));
        }
        self.summary.steps = self.step;
        self.summary.finished = self.step == self.plan.steps || is_early;
        self.summary.checkpoint = self.options.folder.step(saved);
        self.summary.best = self.validations.best;
        let best = self.validations.best.map(|(step, _)| self.options.folder.step(step));
        self.summary.best_checkpoint = best.filter(|folder| folder.exists());
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
