//! One file per subcommand: arguments in, summary out. Commands never call each other.

pub mod bench;
pub mod confined_python;
pub mod doctor;
pub mod eval;
pub mod merge;
pub mod prepare;
pub mod runs;
pub mod serve;
pub mod train;

use anyhow::Result;

use crate::cli::Command;

/// Runs a subcommand.
///
/// # Errors
/// What went wrong, with a hint where there is a next step.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Prepare(args) => prepare::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Runs(args) => runs::run(&args),
        Command::ConfinedPython(args) => confined_python::run(&args),
    }
}
