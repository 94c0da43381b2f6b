//! The tasks, one file each: what is asked, and who is right.

pub mod code;
pub mod finance;
pub mod gsm8k;
pub mod held_out;
pub mod spider;
