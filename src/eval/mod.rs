//! Measurements of a model: losses and task scores.
