//! `granite`: from dataset dumps to an answering service.
//!
//! The module list is the table of contents; ARCHITECTURE.md explains how the modules meet.

pub mod checkpoint;
pub mod cli;
pub mod commands;
pub mod data;
pub mod engine;
pub mod error;
pub mod eval;
pub mod hex;
pub mod kernels;
pub mod losses;
pub mod metrics;
pub mod model;
pub mod output;
pub mod page;
pub mod progress;
pub mod recipe;
pub mod retrieval;
pub mod serve;
pub mod stdout;
pub mod threads;
pub mod train;
