//! `Plan`: what a training will do. Everything is found and checked before a weight is loaded.

use std::fmt;

use anyhow::{Result, ensure};
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::order::RowOrder;
use super::schedule::LearningRate;
use crate::checkpoint::base::BaseModel;
use crate::data::store::{Dataset, PackedRow, Split};
use crate::data::tokenizer::ChatTokenizer;
use crate::error::user_error;
use crate::hex::hex;
use crate::model::config::ModelConfig;
use crate::model::fused::plan::Limits;
use crate::recipe::{Quantization, Recipe};

/// What a training will do.
#[derive(Debug)]
pub struct Plan {
    /// The recipe.
    pub recipe: Recipe,
    /// The base model, opened.
    pub base: BaseModel,
    /// The dataset, opened.
    pub dataset: Dataset,
    /// Rows to train on.
    pub train: Vec<PackedRow>,
    /// Rows to validate on.
    pub validation: Vec<PackedRow>,
    /// SHA-256 of the rows to train on, in hex: what was learnt from cannot change under a run.
    pub rows_hash: String,
    /// Which rows each step sees.
    pub order: RowOrder,
    /// Optimiser steps in all.
    pub steps: u64,
    /// The learning rate of each.
    pub rate: LearningRate,
    /// The numbers that `--dry-run` prints.
    pub figures: Figures,
}

/// The plan in numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// Name of the run.
    pub run: String,
    /// The base model.
    pub base: String,
    /// Parameters of the base model.
    pub base_parameters: i64,
    /// Parameters of the adapter.
    pub trainable_parameters: i64,
    /// Packed rows to train on.
    pub train_rows: usize,
    /// Packed rows to validate on.
    pub validation_rows: usize,
    /// Tokens of an epoch.
    pub tokens_per_epoch: usize,
    /// Rows of an optimiser step.
    pub rows_per_step: usize,
    /// Optimiser steps of an epoch.
    pub steps_per_epoch: u64,
    /// Optimiser steps in all.
    pub steps: u64,
    /// Of these, warm-up.
    pub warmup_steps: u64,
    /// Bytes of the base model's weights.
    pub base_bytes: i64,
    /// Bytes of adapter, gradients and moments.
    pub adapter_bytes: i64,
    /// Bytes kept for the backward pass of one micro-batch.
    pub activation_bytes: i64,
}

impl Plan {
    /// Finds and checks everything.
    ///
    /// # Errors
    /// When the base model or the dataset is missing, or they do not belong together.
    pub fn new(recipe: Recipe) -> Result<Self> {
        let base = BaseModel::open(&recipe.model.base)?;
        let dataset = Dataset::open(&recipe.data.dataset)?;
        dataset.check_tokenizer(&ChatTokenizer::new(&base.tokenizer, &recipe.data.template)?)?;
        let (train, validation) = (dataset.rows(Split::Train)?, dataset.rows(Split::Validation)?);
        check_rows(&dataset, &train, &base.config)?;
        check_rows(&dataset, &validation, &base.config)?;
        if train.is_empty() {
            let text = format!("dataset `{}` has no row to train on", dataset.folder.display());
            return Err(user_error(
                text,
                "run `granite prepare` with more examples or a smaller `data.validation_fraction`",
            ));
        }
        if recipe.train.keeps_best() && !validation.iter().any(PackedRow::is_supervised) {
            let text = format!(
                "`train.keep_best` and `train.early_stopping_patience` go by held-out rows, and dataset `{}` has none",
                dataset.folder.display()
            );
            return Err(user_error(text, "run `granite prepare` with a larger `data.validation_fraction`"));
        }
        let order = RowOrder::new(train.len(), &recipe.train);
        let by_epochs = (recipe.train.epochs * order.steps_per_epoch() as f64).ceil() as u64;
        let steps = recipe.train.max_steps.unwrap_or(by_epochs).max(1);
        let rate = LearningRate::new(&recipe.train, steps);
        let figures = figures(&recipe, &base.config, &train, &validation, &order, &rate, steps);
        let rows_hash = hash_rows(&train);
        Ok(Self { recipe, base, dataset, train, validation, rows_hash, order, steps, rate, figures })
    }

    /// The largest batch, in training or in validation.
    pub fn largest_microbatch(&self) -> Limits {
        self.largest_of(self.recipe.train.rows_per_microbatch)
    }

    /// As [`largest_microbatch`](Self::largest_microbatch), with other rows in a micro-batch.
    pub fn largest_of(&self, rows_per_microbatch: usize) -> Limits {
        let most = |of: fn(&PackedRow) -> usize| {
            let microbatch = largest(&self.train, of) * rows_per_microbatch;
            microbatch.max(largest(&self.validation, of)) as i64
        };
        Limits { tokens: most(PackedRow::tokens), sequences: most(|row| row.sequences.len()) }
    }

    /// The choices that decide the numbers; two runs that agree in them are one run.
    pub fn identity(&self) -> Value {
        let mut train = json!(self.recipe.train);
        if let Some(fields) = train.as_object_mut() {
            // When something is measured or saved, and what is computed again, changes no number of the training.
            let free = [
                "eval_every",
                "save_every",
                "keep_last",
                "keep_best",
                "early_stopping_patience",
                "recompute",
                "resident_weights",
            ];
            for free in free {
                fields.remove(free);
            }
        }
        let Recipe { model, lora, .. } = &self.recipe;
        json!({
            "model": { "quantization": model.quantization, "hash": self.base.hash, "config": self.base.config },
            "lora": lora,
            "train": train,
            "data": {
                "tokenizer_hash": self.dataset.manifest.tokenizer_hash,
                "rows": self.train.len(),
                "tokens": self.figures.tokens_per_epoch,
                "rows_hash": self.rows_hash,
            },
        })
    }
}

/// Every token and mask, with the bounds of sequences and rows.
fn hash_rows(rows: &[PackedRow]) -> String {
    let mut hash = Sha256::new();
    for row in rows {
        hash.update((row.sequences.len() as u64).to_le_bytes());
        for sequence in &row.sequences {
            hash.update((sequence.input_ids.len() as u64).to_le_bytes());
            // The mask rides in the top bit, which no id reaches: one update a sequence.
            let tokens = sequence.input_ids.iter().zip(&sequence.loss_mask);
            let bytes: Vec<u8> =
                tokens.flat_map(|(id, mask)| (id | u32::from(*mask) << 31).to_le_bytes()).collect();
            hash.update(&bytes);
        }
    }
    hex(&hash.finalize())
}

/// Ids beyond the vocabulary or rows beyond the positions would fail in the middle of an epoch.
fn check_rows(dataset: &Dataset, rows: &[PackedRow], config: &ModelConfig) -> Result<()> {
    for (number, sequence) in
        rows.iter().enumerate().flat_map(|(n, row)| row.sequences.iter().map(move |s| (n, s)))
    {
        let largest = sequence.input_ids.iter().copied().max().map_or(0, i64::from);
        ensure!(
            largest < config.vocab_size,
            "dataset `{}`: row {number} holds token id {largest}, the model's vocabulary has {}",
            dataset.folder.display(),
            config.vocab_size
        );
        ensure!(
            sequence.input_ids.len() as i64 <= config.max_position_embeddings,
            "dataset `{}`: row {number} holds a sequence of {} tokens, the model has {} positions",
            dataset.folder.display(),
            sequence.input_ids.len(),
            config.max_position_embeddings
        );
    }
    Ok(())
}

fn figures(
    recipe: &Recipe,
    config: &ModelConfig,
    train: &[PackedRow],
    validation: &[PackedRow],
    order: &RowOrder,
    rate: &LearningRate,
    steps: u64,
) -> Figures {
    let layers = config.num_hidden_layers as i64;
    let shapes = |targets: &[crate::recipe::Projection]| -> Vec<[i64; 2]> {
        targets.iter().map(|target| config.projection_shape(*target)).collect()
    };
    let linear: i64 =
        shapes(&crate::recipe::Projection::ALL).iter().map(|[out, input]| out * input).sum::<i64>() * layers;
    let rank = recipe.lora.rank as i64;
    let trainable =
        shapes(&recipe.lora.targets).iter().map(|[out, input]| rank * (out + input)).sum::<i64>() * layers;
    let heads = if config.tie_word_embeddings { 1 } else { 2 };
    let rest = heads * config.vocab_size * config.hidden_size + (2 * layers + 1) * config.hidden_size;
    let rows_per_step = recipe.train.rows_per_microbatch * recipe.train.accumulation;
    // A dataset's rows may be longer than the recipe would have them now.
    let tokens = (recipe.train.rows_per_microbatch * largest(train, PackedRow::tokens)) as i64;
    Figures {
        run: recipe.name.clone(),
        base: recipe.model.base.clone(),
        base_parameters: linear + rest,
        trainable_parameters: trainable,
        train_rows: train.len(),
        validation_rows: validation.len(),
        tokens_per_epoch: train.iter().map(PackedRow::tokens).sum(),
        rows_per_step,
        steps_per_epoch: order.steps_per_epoch(),
        steps,
        warmup_steps: rate.warmup_steps(),
        base_bytes: 4 * rest
            + if recipe.model.quantization == Quantization::Nf4 { linear * 33 / 64 } else { 4 * linear },
        adapter_bytes: 4 * trainable * 4,
        activation_bytes: 4 * tokens * kept_per_token(config) * layers,
    }
}

/// What the largest of rows has of something.
fn largest(rows: &[PackedRow], of: fn(&PackedRow) -> usize) -> usize {
    rows.iter().map(of).max().unwrap_or(0)
}

/// Elements that a layer keeps of a token for its backward pass: `LayerSaved`, field by field.
fn kept_per_token(config: &ModelConfig) -> i64 {
    let streams = 4 * config.hidden_size; // x, its norm, the middle, its norm
    let heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim; // q, o, k, v
    streams + heads + 2 * config.intermediate_size // gate, up
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |bytes: i64| format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30));
        let lines = [
            ("run", self.run.clone()),
            ("base model", format!("{}, {:.1} M parameters", self.base, self.base_parameters as f64 / 1e6)),
            ("adapter", format!("{:.2} M parameters", self.trainable_parameters as f64 / 1e6)),
            ("rows", format!("{} to train on, {} held out", self.train_rows, self.validation_rows)),
            ("epoch", format!("{} steps, {} tokens", self.steps_per_epoch, self.tokens_per_epoch)),
            (
                "steps",
                format!("{} of {} rows, {} of warm-up", self.steps, self.rows_per_step, self.warmup_steps),
            ),
            (
                "memory",
                format!(
                    "base {}, adapter {}, activations {} (f32 on the CPU)",
                    gib(self.base_bytes),
                    gib(self.adapter_bytes),
                    gib(self.activation_bytes)
                ),
            ),
        ];
        for (name, value) in lines {
            writeln!(f, "{name:<12}{value}")?;
        }
        Ok(())
    }
}
