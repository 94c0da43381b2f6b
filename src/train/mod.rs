//! The training loop.

mod feed;
mod guard;
pub mod interrupt;
pub mod memory;
pub mod optimizer;
pub mod order;
pub mod plan;
pub mod report;
pub mod run;
mod saver;
pub mod schedule;
mod steps;
