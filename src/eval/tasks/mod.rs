//! Tasks: questions with answers that a program can check.

pub mod spider;
