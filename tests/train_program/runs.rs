//! `granite runs` over trainings that the program made.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::bench::{Bench, assert_told, told};

fn runs(bench: &Bench, arguments: &[&str]) -> std::process::Output {
    let program = env!("CARGO_BIN_EXE_granite");
    Command::new(program).current_dir(bench.path("")).arg("runs").args(arguments).output().unwrap()
}

fn stdout(bench: &Bench, arguments: &[&str]) -> String {
    let output = runs(bench, arguments);
    assert!(output.status.success(), "{}", told(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn json(bench: &Bench, arguments: &[&str]) -> Value {
    serde_json::from_str(&stdout(bench, &[arguments, &["--json"]].concat())).unwrap()
}

/// The cells of the list, a row a run below the head.
fn rows(bench: &Bench) -> Vec<Vec<String>> {
    let list = stdout(bench, &["list"]);
    list.lines().map(|line| line.split_whitespace().map(String::from).collect()).collect()
}

/// A run that was begun and took no step, with something done to its recipe.
fn begun(bench: &Bench, name: impl AsRef<Path>, recipe: impl Fn(String) -> String) {
    let folder = bench.path("checkpoints/runs").join(name);
    std::fs::create_dir_all(&folder).unwrap();
    let text = std::fs::read_to_string(bench.path("recipe.toml")).unwrap();
    std::fs::write(folder.join("recipe.toml"), recipe(text)).unwrap();
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

#[test]
fn a_damaged_run_is_a_row_and_hides_no_other() {
    let bench = Bench::new();
    for name in ["bytes", "line", "whole"] {
        begun(&bench, name, |recipe| recipe);
    }
    begun(&bench, "version", |recipe| format!("of_another_version = 1\n{recipe}"));
    std::fs::write(bench.path("checkpoints/runs/bytes/metrics.jsonl"), b"\xff\n").unwrap();
    std::fs::write(bench.path("checkpoints/runs/line/metrics.jsonl"), "no event\n").unwrap();

    let states: Vec<[String; 2]> =
        rows(&bench)[1..].iter().map(|row| [row[0].clone(), row[1].clone()]).collect();
    let expected = [["bytes", "damaged"], ["line", "damaged"], ["version", "damaged"], ["whole", "stopped"]];
    assert_eq!(states, expected);
    assert_told(
        &told(&runs(&bench, &["list"])),
        &[
            "run `bytes` is damaged: cannot read `",
            "metrics.jsonl`: line 1 is no event",
            "run `version` is damaged: recipe `",
            "of_another_version",
        ],
    );

    let list = json(&bench, &["list"]);
    assert!(list[1]["error"].as_str().unwrap().contains("line 1 is no event"), "{list}");
    assert_eq!((list[3]["error"].as_str(), list[3]["steps"].as_u64()), (None, Some(0)));
    for arguments in [&["show", "line"][..], &["compare", "whole", "version"]] {
        assert_eq!(runs(&bench, arguments).status.code(), Some(1), "{arguments:?}");
    }
}

#[test]
fn a_run_that_ended_early_is_finished_and_its_best_came_after_a_step() {
    let bench = Bench::new();
    // A learning rate that leads away from the data: the first validation after it stays the best.
    let worse = ["train.lr=3", "train.schedule=constant", "train.warmup=0", "train.eval_every=1"];
    let more = ["train.early_stopping_patience=1", "train.max_steps=40"];
    let mut settings: Vec<&str> = worse.iter().chain(&more).flat_map(|set| ["--set", *set]).collect();
    settings.push("--json");
    let summary: Value = serde_json::from_str(&bench.ok("train", &settings)).unwrap();
    assert_eq!(summary["finished"], true, "{summary}");
    assert!(summary["steps"].as_u64().unwrap() < 40, "{summary}");

    let list = json(&bench, &["list"]);
    assert_eq!(list[0]["state"], "finished", "{list}");
    assert_eq!(list[0]["first_validation"][0], 0, "{list}");
    assert_eq!(list[0]["best_validation"], summary["best"], "{list}");
}

#[test]
fn a_run_without_a_step_took_no_time() {
    let bench = Bench::new();
    begun(&bench, "run", |recipe| recipe);
    assert!(!stdout(&bench, &["show", "run"]).contains("-0.00"));
    assert!(stdout(&bench, &["show", "run", "--json"]).contains("\"hours\": 0.0,"));
}

#[test]
fn a_folder_that_was_named_must_be_there() {
    let bench = Bench::new();
    let output = runs(&bench, &["list", "nowhere"]);
    assert_eq!(output.status.code(), Some(1));
    assert_told(&told(&output), &["there is no folder `nowhere`", "hint: "]);
}

#[test]
fn a_key_is_never_shown() {
    let bench = Bench::new();
    begun(&bench, "open", |recipe| recipe);
    begun(&bench, "shut", |recipe| recipe + "[serve]\napi_key = \"sesame\"\n");
    for arguments in [&["show", "shut"][..], &["compare", "open", "shut"]] {
        for text in [stdout(&bench, arguments), json(&bench, arguments).to_string()] {
            assert!(text.contains("api_key") && text.contains("(set)"), "{text}");
            assert!(!text.contains("sesame"), "{text}");
        }
    }
}

#[test]
fn names_need_not_be_utf_8() {
    let bench = Bench::new();
    begun(&bench, OsStr::from_bytes(b"caf\xe9"), |recipe| recipe);
    let list = json(&bench, &["list"]);
    assert_eq!(list[0]["name"], "caf\u{fffd}");
    assert_eq!(list[0]["folder"], "checkpoints/runs/caf\u{fffd}");
    assert_eq!(rows(&bench)[1][0], "caf\u{fffd}");
}
