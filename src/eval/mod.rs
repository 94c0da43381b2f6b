//! Measurements of a model: losses and task scores.

pub mod database;
pub mod report;
pub mod result_set;
pub mod sql;
pub mod tasks;
