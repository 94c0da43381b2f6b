//! The training loop.

pub mod interrupt;
pub mod memory;
pub mod optimizer;
pub mod order;
pub mod plan;
pub mod report;
pub mod run;
pub mod schedule;
