//! What a run reports.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// An optimiser step was taken.
    Step(StepEvent),
    /// The model was validated.
    Validation {
        /// Optimiser steps taken before.
        step: u64,
        /// Mean loss in nats over all supervised tokens.
        loss: f64,
        /// `exp(loss)`.
        perplexity: f64,
        /// Supervised tokens.
        tokens: i64,
        /// Mean loss by source.
        sources: BTreeMap<String, f64>,
    },
    /// An epoch ended.
    Epoch {
        /// Counted from 1.
        epoch: u64,
        /// Optimiser steps taken.
        step: u64,
        /// Mean training loss over the epoch's supervised tokens.
        loss: f64,
    },
}

/// An optimiser step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepEvent {
    /// Counted from 1.
    pub step: u64,
    /// Epochs done after this step.
    pub epoch: f64,
    /// Mean loss in nats over the step's supervised tokens.
    pub loss: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The dataset's training rows that the step saw, in order.
    pub rows: Vec<usize>,
    /// Tokens that went through the model.
    pub tokens: i64,
    /// Of these, supervised.
    pub supervised_tokens: i64,
    /// Wall-clock seconds of the step.
    pub seconds: f64,
}

impl Event {
    /// The step that the event belongs to.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(step) => step.step,
            Self::Validation { step, .. } | Self::Epoch { step, .. } => *step,
        }
    }
}
