//! Measurements of a model: losses and task scores, with what may be said of them.

pub mod asking;
pub mod comparison;
pub mod database;
pub mod fence;
pub mod finance_program;
pub mod given;
pub mod hardness;
pub mod identity;
pub mod number;
pub mod report;
pub mod result_set;
pub mod results;
pub mod rouge;
pub mod row_losses;
pub mod sandbox;
pub mod sql;
pub mod statistics;
pub mod task;
pub mod tasks;
