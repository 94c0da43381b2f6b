//! Files of models and runs: the only place that names them.

pub mod base;
