//! A place in which the program runs: a recipe over the samples, a dataset, a run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::fixture;

/// A folder with a recipe over the samples, a dataset, and a run of two steps.
pub(super) struct Place(tempfile::TempDir);

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
    /// With dataset and run.
    pub(super) fn new() -> Self {
        let place = Self::bare();
        for command in ["prepare", "train"] {
            let done = place.granite(&[command]);
            assert!(done.status.success(), "{}", told(&done));
        }
        place
    }

    /// Without dataset or run.
    pub(super) fn bare() -> Self {
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
        place
    }

    /// A folder of answers to Spider's questions, in the order of the file.
    pub(super) fn answer(&self, name: &str, answers: &[String]) {
        fs::create_dir_all(self.path(name)).unwrap();
        let lines = answers
            .iter()
            .enumerate()
            .map(|(at, answer)| serde_json::json!({"id": at + 1, "answer": answer}).to_string() + "\n");
        fs::write(self.path(name).join("spider.jsonl"), lines.collect::<String>()).unwrap();
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(super) fn granite(&self, arguments: &[&str]) -> Output {
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

    pub(super) fn eval(&self, arguments: &[&str]) -> Output {
        self.granite(&[&["eval", "--model", "base", "--model", "adapter", "--out", "e"], arguments].concat())
    }

    /// What an evaluation that is refused says.
    pub(super) fn refused(&self, arguments: &[&str]) -> String {
        let output = self.granite(&[&["eval"], arguments].concat());
        assert_eq!(output.status.code(), Some(1), "{}", told(&output));
        told(&output)
    }
}

/// What was said on stderr.
pub(super) fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
