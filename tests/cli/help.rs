//! Help of the program and of every subcommand.

use std::path::Path;

use super::granite;

#[test]
fn help_of_the_program_and_of_every_subcommand() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    insta::assert_snapshot!("granite", granite(here, &["--help"]));
    for command in ["prepare", "train", "merge", "eval", "serve", "doctor", "bench", "runs"] {
        insta::assert_snapshot!(command, granite(here, &[command, "--help"]));
    }
    insta::assert_snapshot!("bench_kernels", granite(here, &["bench", "kernels", "--help"]));
}
