//! `granite runs` over trainings that the program made.

use std::process::Command;

use serde_json::Value;

use crate::bench::{Bench, told};

fn runs(bench: &Bench, arguments: &[&str]) -> std::process::Output {
    let program = env!("CARGO_BIN_EXE_granite");
    Command::new(program).current_dir(bench.path("")).arg("runs").args(arguments).output().unwrap()
}

fn stdout(bench: &Bench, arguments: &[&str]) -> String {
    let output = runs(bench, arguments);
    assert!(output.status.success(), "{}", told(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn runs_are_listed_shown_and_compared() {
    let bench = Bench::new();
    assert_eq!(stdout(&bench, &["list"]), "no run\n");
    bench.ok("train", &[]);
    bench.ok("train", &["--set", "name=other", "--set", "train.lr=2e-3", "--stop-after", "2"]);
    let list = stdout(&bench, &["list"]);
    let lines: Vec<Vec<&str>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!((lines[1][0], lines[1][1], lines[1][2]), ("other", "stopped", "2"));
    assert_eq!((lines[2][0], lines[2][1], lines[2][2]), ("run", "finished", "6"));

    let shown: Value = serde_json::from_str(&stdout(&bench, &["show", "run", "--json"])).unwrap();
    assert_eq!(
        (shown["run"]["steps"].as_u64(), shown["recipe"]["train"]["lr"].as_f64()),
        (Some(6), Some(1e-3))
    );
    assert!(stdout(&bench, &["show", "checkpoints/runs/run"]).contains("max_steps = 6"));

    let compared: Value =
        serde_json::from_str(&stdout(&bench, &["compare", "run", "other", "--json"])).unwrap();
    let differences = compared["differences"].as_object().unwrap();
    assert_eq!(differences.keys().collect::<Vec<_>>(), ["name", "train.lr"]);
    assert_eq!(differences["train.lr"], serde_json::json!([1e-3, 2e-3]));
    assert!(stdout(&bench, &["compare", "run", "other"]).contains("train.lr"));

    let output = runs(&bench, &["show", "nothing"]);
    assert!(
        told(&output).contains("there is no run `nothing`") && told(&output).contains("granite runs list")
    );
}
