//! SIGTERM and SIGKILL in the middle of a run.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::bench::{Bench, assert_told, told};

const LONG: [&str; 4] = ["--set", "train.max_steps=400", "--set", "train.save_every=2"];

/// A run far longer than the test, `steps` of it taken.
fn begun(bench: &Bench, steps: usize) -> Child {
    let mut command = bench.command("train", &[&LONG[..], &["--out", "run"]].concat());
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    while steps_of(&bench.path("run/metrics.jsonl")) < steps {
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended: {}",
            told(&child.wait_with_output().unwrap())
        );
        assert!(begun.elapsed() < Duration::from_secs(120), "no step {steps} within two minutes");
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}

fn steps_of(metrics: &Path) -> usize {
    std::fs::read_to_string(metrics).unwrap_or_default().matches("\"event\":\"step\"").count()
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args(["-s", name, &child.id().to_string()]).status().unwrap().success());
}

/// The step of the newest checkpoint.
fn saved(bench: &Bench) -> u64 {
    bench.checkpoints("run").last().unwrap()["step-".len()..].parse().unwrap()
}

/// Goes on for two steps, and compares with a run that was never ended.
fn assert_goes_on(bench: &Bench) {
    let from = saved(bench);
    let (stop, told_from) = ((from + 2).to_string(), format!("resuming after step {from} of 400"));
    let arguments = [&LONG[..], &["--out", "run", "--resume", "--stop-after", &stop]].concat();
    let output = bench.command("train", &arguments).output().unwrap();
    assert!(output.status.success(), "{}", told(&output));
    assert_told(&told(&output), &[&told_from]);
    bench.ok("train", &[&LONG[..], &["--out", "whole", "--stop-after", &stop]].concat());
    bench.assert_same_checkpoint("run", "whole", from + 2);
}

#[test]
fn sigterm_ends_with_a_checkpoint_of_the_step_taken() {
    let bench = Bench::new();
    let child = begun(&bench, 3);
    signal(&child, "TERM");
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", told(&output));
    assert_told(&told(&output), &["not all steps were taken: go on with `--resume`"]);
    assert_eq!(saved(&bench), steps_of(&bench.path("run/metrics.jsonl")) as u64);
    assert_goes_on(&bench);
}

#[test]
fn sigkill_leaves_whole_checkpoints_only() {
    let bench = Bench::new();
    let child = begun(&bench, 4);
    signal(&child, "KILL");
    assert!(!child.wait_with_output().unwrap().status.success());
    assert!(saved(&bench) >= 2);
    assert_goes_on(&bench);
}

#[test]
fn asked_twice_it_ends_at_once_and_without_complaint() {
    for pause in [0, 5, 20] {
        let bench = Bench::new();
        let child = begun(&bench, 1);
        signal(&child, "INT");
        std::thread::sleep(Duration::from_millis(pause));
        signal(&child, "INT");
        let output = child.wait_with_output().unwrap();
        // A step may end between the two.
        assert!(matches!(output.status.code(), Some(0 | 130)), "{}", told(&output));
        assert!(!told(&output).contains("bug"), "{}", told(&output));
    }
}

#[test]
fn that_nobody_listens_ends_no_training() {
    let bench = Bench::new();
    let mut child = bench.command("train", &["--out", "run"]).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert!(child.wait().unwrap().success());
    assert_eq!(saved(&bench), 6);
}
