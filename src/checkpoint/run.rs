//! The folder of a run: `recipe.toml`, `metrics.jsonl`, `step-000500/`, `merged/`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::adapter;
use super::tensor_file::{self, NamedTensors};
use crate::error::user_error;
use crate::model::params::ParamSet;
use crate::output::{self, Staged};
use crate::recipe::{LoraSpec, Quantization, Recipe};

/// Where runs are kept.
pub const RUNS: &str = "checkpoints/runs";
/// The version of a checkpoint's files.
const FORMAT_VERSION: u32 = 1;
const STATE_FILE: &str = "state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const RECIPE_FILE: &str = "recipe.toml";
const LOCK_FILE: &str = ".lock";

/// A run's folder.
#[derive(Debug, Clone)]
pub struct RunFolder {
    path: PathBuf,
}

/// Held by the process that trains.
#[derive(Debug)]
pub struct RunLock {
    _file: fs::File,
}

/// What a checkpoint holds beside adapter and moments: enough to refuse what does not continue it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// See `FORMAT_VERSION`.
    pub format_version: u32,
    /// Optimiser steps taken.
    pub step: u64,
    /// Sum of the running epoch's losses and its supervised tokens.
    pub epoch_loss: (f64, i64),
    /// How the validations went so far.
    #[serde(default)]
    pub validations: Validations,
    /// The choices that decide the numbers: recipe sections, dataset, base model.
    pub identity: serde_json::Value,
    /// Threads of the tensor library: another number may round differently.
    pub threads: i32,
}

/// The base model that a checkpoint's adapter learned on.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct TrainedOn {
    /// A hash of the weights.
    pub hash: String,
    /// How they were held.
    pub quantization: Quantization,
}

/// What a checkpoint's state says of its base; `None` for an adapter without one, from elsewhere.
pub fn trained_on(checkpoint: &Path) -> Option<TrainedOn> {
    let text = fs::read_to_string(checkpoint.join(STATE_FILE)).ok()?;
    let mut state: serde_json::Value = serde_json::from_str(&text).ok()?;
    serde_json::from_value(state.pointer_mut("/identity/model")?.take()).ok()
}

/// The least validation loss of a run, and what came after it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Validations {
    /// The step of the least loss, and that loss; the validation before the first step does not count.
    pub best: Option<(u64, f64)>,
    /// Validations since.
    pub since: u64,
}

impl Validations {
    /// Takes note of a validation after `step`; whether it is the best so far.
    pub fn add(&mut self, step: u64, loss: f64) -> bool {
        if self.best.is_none_or(|(_, best)| loss < best) {
            *self = Self { best: Some((step, loss)), since: 0 };
            return true;
        }
        self.since += 1;
        false
    }

    /// Whether they have not improved for as long as `patience` allows; never, where that is 0.
    pub fn ends(&self, patience: u64) -> bool {
        patience > 0 && self.since >= patience
    }
}

impl State {
    /// The state after `step` steps.
    pub fn new(
        step: u64,
        epoch_loss: (f64, i64),
        validations: Validations,
        identity: serde_json::Value,
        threads: i32,
    ) -> Self {
        Self { format_version: FORMAT_VERSION, step, epoch_loss, validations, identity, threads }
    }
}

impl RunFolder {
    /// The folder of a recipe's run, or the one given.
    pub fn of(recipe: &Recipe, given: Option<&Path>) -> Self {
        Self { path: given.map_or_else(|| Path::new(RUNS).join(&recipe.name), Path::to_path_buf) }
    }

    /// The run in this folder.
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_path_buf() }
    }

    /// The recipe that the run was begun with, or last gone on with.
    ///
    /// # Errors
    /// When the file is missing or damaged.
    pub fn recipe(&self) -> Result<Recipe> {
        Recipe::load(&self.path.join(RECIPE_FILE), &[])
    }

    /// Whether a process trains in it.
    pub fn is_locked(&self) -> bool {
        let lock = fs::File::open(self.path.join(LOCK_FILE)).map(|file| file.try_lock_shared());
        matches!(lock, Ok(Err(fs::TryLockError::WouldBlock)))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The run's measurements.
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// The folder of TensorBoard's event files.
    pub fn tensorboard(&self) -> PathBuf {
        self.path.join("tensorboard")
    }

    /// The folder of a step's checkpoint.
    pub fn step(&self, step: u64) -> PathBuf {
        self.path.join(format!("step-{step:06}"))
    }

    /// Begins a run: the folder must not hold one.
    ///
    /// # Errors
    /// When it does, with both ways out, or cannot be written.
    pub fn begin(&self, recipe: &Recipe) -> Result<RunLock> {
        if self.metrics().exists() || !self.checkpoints()?.is_empty() {
            return Err(user_error(
                format!("run folder `{}` holds a run already", self.path.display()),
                "continue it with `--resume`, or start another: `--set name=NAME` or `--out FOLDER`",
            ));
        }
        let lock = self.lock()?;
        self.begin_again(recipe)?;
        Ok(lock)
    }

    /// Begins the run of a folder that holds no checkpoint from its first step, whatever it measured before.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn begin_again(&self, recipe: &Recipe) -> Result<()> {
        let metrics = self.metrics();
        if metrics.exists() {
            fs::remove_file(&metrics).with_context(|| format!("cannot remove `{}`", metrics.display()))?;
        }
        self.keep_recipe(recipe)
    }

    /// Writes down the recipe that the run goes on with: more steps to go or more patience is asked of it from here on.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn keep_recipe(&self, recipe: &Recipe) -> Result<()> {
        // A run's folder is shown around; a key is not.
        let mut recipe = recipe.clone();
        recipe.serve.api_key = None;
        let text = toml::to_string(&recipe).context("cannot write the recipe")?;
        output::write_file(&self.path.join(RECIPE_FILE), text.as_bytes())
    }

    /// Keeps other processes out of the run for as long as the lock lives, and removes what a process that was killed
    /// left half written.
    ///
    /// # Errors
    /// When another process holds the lock, or the folder cannot be written.
    pub fn lock(&self) -> Result<RunLock> {
        fs::create_dir_all(&self.path)
            .with_context(|| format!("cannot create folder `{}`", self.path.display()))?;
        let path = self.path.join(LOCK_FILE);
        let file = fs::File::create(&path).with_context(|| format!("cannot write `{}`", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(user_error(
                    format!("another process trains in `{}`", self.path.display()),
                    "wait for it, end it, or start another run with `--out FOLDER`",
                ));
            }
            // A file system without locks: what cannot be told cannot be refused.
            Err(fs::TryLockError::Error(_)) => {}
        }
        output::sweep(&self.path)?;
        Ok(RunLock { _file: file })
    }

    /// Whether a run was begun here.
    pub fn is_begun(&self) -> bool {
        self.path.join(RECIPE_FILE).exists()
    }

    /// Steps of the whole checkpoints, ascending.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn checkpoints(&self) -> Result<Vec<u64>> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.with_context(|| format!("cannot read folder `{}`", self.path.display()))?,
        };
        let mut steps = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            let step = name.to_str().and_then(|name| name.strip_prefix("step-")?.parse().ok());
            steps.extend(step.filter(|step| self.step(*step).join(STATE_FILE).exists()));
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// Writes a checkpoint, whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(
        &self,
        state: &State,
        spec: &LoraSpec,
        adapter: &ParamSet,
        base: &str,
        optimizer: &NamedTensors,
    ) -> Result<()> {
        let staged = Staged::folder(&self.step(state.step), &[])?;
        adapter::save(staged.path(), spec, adapter, base)?;
        tensor_file::write(&staged.path().join(OPTIMIZER_FILE), optimizer)?;
        let text = serde_json::to_string_pretty(state)? + "\n";
        output::write_file(&staged.path().join(STATE_FILE), text.as_bytes())?;
        staged.commit()
    }

    /// Reads a checkpoint's state.
    ///
    /// # Errors
    /// When a file is missing or damaged, or of another version.
    pub fn load_state(&self, step: u64) -> Result<State> {
        let path = self.step(step).join(STATE_FILE);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        let state: State = serde_json::from_str(&text)
            .with_context(|| format!("`{}` is no checkpoint's state", path.display()))?;
        anyhow::ensure!(
            state.format_version == FORMAT_VERSION,
            "`{}` has format version {}, expected {FORMAT_VERSION}",
            path.display(),
            state.format_version
        );
        Ok(state)
    }

    /// Reads a checkpoint's moments.
    ///
    /// # Errors
    /// When the file is missing or damaged.
    pub fn load_optimizer(&self, step: u64) -> Result<NamedTensors> {
        tensor_file::read(&self.step(step).join(OPTIMIZER_FILE))
    }

    /// Removes all but the newest `keep` checkpoints and that of step `best`; at least one stays.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn prune(&self, keep: usize, best: Option<u64>) -> Result<()> {
        let mut steps = self.checkpoints()?;
        steps.retain(|step| Some(*step) != best);
        let surplus = steps.len().saturating_sub(keep.max(1));
        for step in &steps[..surplus] {
            output::remove_folder(&self.step(*step))?;
        }
        Ok(())
    }
}
