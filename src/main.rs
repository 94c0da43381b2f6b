//! Parse arguments, call a command, render the error, exit code.

use std::process::ExitCode;

use clap::Parser as _;
use granite::cli::Cli;
use granite::{commands, error, progress, threads};

fn main() -> ExitCode {
    // A panic is a bug of ours, never an answer to input: it has an exit code of its own.
    std::panic::set_hook(Box::new(|info| {
        progress::tell(format_args!(
            "error: this is a bug in granite: {info}\nhint: please report it with the command and its input\n"
        ));
    }));
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers; everything else is the user's to mend.
            let code = u8::from(error.use_stderr());
            error.print().ok();
            return ExitCode::from(code);
        }
    };
    progress::set_quiet(cli.quiet);
    threads::one_a_core();
    match std::panic::catch_unwind(|| commands::run(cli.command)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(failure)) => {
            progress::tell(error::render(&failure));
            ExitCode::from(1)
        }
        Err(_) => ExitCode::from(2),
    }
}
