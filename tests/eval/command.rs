//! `granite eval` as a process: from a recipe to a report, interrupted, gone on with, refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use super::fixture;

/// A folder with a recipe over the samples, a dataset, and a run of two steps.
struct Place(tempfile::TempDir);

const RECIPE: &str = r#"
name = "r"
[model]
base = "BASE"
[data]
dataset = "dataset"
sequence_length = 2048
validation_fraction = 0.2
[data.sources.dolly]
path = "SAMPLE/dolly.jsonl"
[data.sources.convfinqa]
path = "SAMPLE/convfinqa/train.json"
target = "answer"
[lora]
rank = 4
[train]
max_steps = 2
rows_per_microbatch = 1
accumulation = 1
lr = 1e-2
warmup = 0
optimizer = "adamw"
[eval.spider]
path = "SAMPLE/spider/dev.json"
tables = "SAMPLE/spider/tables.json"
databases = "SAMPLE/spider/database"
max_tokens = 6
[eval.convfinqa]
path = "SAMPLE/convfinqa/train.json"
target = "answer"
limit = 4
max_tokens = 4
[eval.held_out]
limit = 3
max_tokens = 4
[eval.humaneval]
path = "humaneval.jsonl"
max_tokens = 4
"#;

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/sample");
        let recipe = RECIPE
            .replace("SAMPLE", &sample.display().to_string())
            .replace("BASE", &fixture("tiny-granite").display().to_string());
        fs::write(place.path("recipe.toml"), recipe).unwrap();
        let problem = serde_json::json!({
            "task_id": "t/0", "prompt": "def f():\n", "entry_point": "f",
            "canonical_solution": "    return 1\n", "test": "def check(f):\n    assert f() == 1\n",
        });
        fs::write(place.path("humaneval.jsonl"), format!("{problem}\n")).unwrap();
        for command in ["prepare", "train"] {
            let done = place.granite(&[command]);
            assert!(done.status.success(), "{}", told(&done));
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn granite(&self, arguments: &[&str]) -> Output {
        let (command, rest) = arguments.split_first().unwrap();
        let device: &[&str] = if *command == "prepare" { &[] } else { &["--device", "cpu"] };
        Command::new(env!("CARGO_BIN_EXE_granite"))
            .args([command, "--recipe", "recipe.toml"])
            .args(device)
            .args(rest)
            .current_dir(self.0.path())
            .output()
            .unwrap()
    }

    fn eval(&self, arguments: &[&str]) -> Output {
        self.granite(&[&["eval", "--model", "base", "--model", "adapter", "--out", "e"], arguments].concat())
    }

    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.granite(&[&["eval"], arguments].concat());
        assert_eq!(output.status.code(), Some(1), "{}", told(&output));
        told(&output)
    }
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const RESULTS: [&str; 5] = ["losses", "held_out", "spider", "convfinqa", "humaneval"];

#[test]
fn models_are_measured_side_by_side_and_gone_on_with() {
    let place = Place::new();
    let output = place.eval(&["--json"]);
    assert!(output.status.success(), "{}", told(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let written = fs::read(place.path("e/report.json")).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&written).unwrap(), report);
    let names: Vec<&str> =
        report["models"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["base", "adapter"]);
    for model in report["models"].as_array().unwrap() {
        let loss = &model["losses"]["overall"]["loss"];
        let number = |name: &str| loss[name].as_f64().unwrap();
        assert!(number("low") < number("estimate") && number("estimate") < number("high"));
        let tasks: Vec<&str> =
            model["tasks"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
        assert_eq!(tasks, ["held_out", "spider", "convfinqa", "humaneval"]);
        assert!(model["tasks"].as_array().unwrap().iter().all(|one| one["scored"].as_u64().unwrap() > 0));
    }
    let loss = report["comparisons"].as_array().unwrap().iter().find(|one| one["of"] == "loss").unwrap();
    assert_eq!((loss["first"].as_str(), loss["second"].as_str()), (Some("base"), Some("adapter")));
    let page = fs::read_to_string(place.path("e/report.html")).unwrap();
    assert!(page.contains("Side by side") && page.contains("<svg") && page.contains("Clopper"));

    // Cut as a killed process leaves it: one task half done with a torn line, the ones behind it not begun.
    let names: Vec<String> = ["base", "adapter"]
        .iter()
        .flat_map(|one| RESULTS.map(|file| format!("e/{one}/{file}.jsonl")))
        .collect();
    let whole: Vec<Vec<u8>> = names.iter().map(|name| fs::read(place.path(name)).unwrap()).collect();
    for (at, name) in names.iter().enumerate().skip(6) {
        match at {
            6 => fs::write(place.path(name), &whole[at][..whole[at].len() / 2]).unwrap(),
            _ => fs::remove_file(place.path(name)).unwrap(),
        }
    }
    fs::remove_file(place.path("e/report.json")).unwrap();
    let output = place.eval(&[]);
    assert!(output.status.success() && told(&output).contains("going on"), "{}", told(&output));
    let again: Vec<Vec<u8>> = names.iter().map(|name| fs::read(place.path(name)).unwrap()).collect();
    assert!(again == whole, "what was gone on with is what was there before");
    assert_eq!(fs::read(place.path("e/report.json")).unwrap(), written);

    // Anything else is refused, with both values.
    let models = ["--model", "base", "--model", "adapter", "--out", "e"];
    let with = |more: &[&'static str]| -> String { place.refused(&[&models[..], more].concat()) };
    let text = with(&["--limit", "2"]);
    assert!(text.contains("whose limit is `none`, this one's is `2`") && text.contains("hint: "), "{text}");
    let text = with(&["--set", "eval.convfinqa.max_tokens=5"]);
    assert!(
        text.contains("eval.convfinqa")
            && text.contains("\"max_tokens\":4")
            && text.contains("\"max_tokens\":5"),
        "{text}"
    );
    let text = place.refused(&["--model", "base", "--out", "e"]);
    assert!(text.contains("`base, adapter`, this one's is `base`"), "{text}");
    // Another adapter under the same name.
    let step = place.path("checkpoints/runs/r/step-000002/adapter_model.safetensors");
    let mut weights = fs::read(&step).unwrap();
    *weights.last_mut().unwrap() ^= 1;
    fs::write(&step, weights).unwrap();
    let text = with(&[]);
    assert!(text.contains("whose model `adapter` is `adapter step-000002"), "{text}");
    let again: Vec<Vec<u8>> = names.iter().map(|name| fs::read(place.path(name)).unwrap()).collect();
    assert!(again == whole, "a refusal touches nothing");
    // Another dataset.
    let done = place.granite(&["prepare", "--set", "data.validation_fraction=0.4"]);
    assert!(done.status.success(), "{}", told(&done));
    let text = with(&[]);
    assert!(text.contains("whose dataset is `dataset (SHA-256 "), "{text}");
}

#[test]
fn a_model_is_named_once() {
    let place = Place::new();
    let text = place.refused(&["--model", "base", "--model", "base"]);
    assert!(text.contains("two models are called `base`"), "{text}");
    assert!(!place.path("checkpoints/runs/r/eval-base-base").exists());
}
