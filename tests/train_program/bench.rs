//! A folder with a dataset that `granite prepare` made, and runs of the program in it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// Two of these steps are a third of a second.
const RECIPE: &str = r#"
name = "run"
[model]
base = "ROOT/tests/fixtures/tiny-granite"
quantization = "nf4"
[data]
dataset = "dataset"
sequence_length = 384
validation_fraction = 0.3
[data.template]
date = "2026-01-15"
[data.sources.dolly]
path = "ROOT/datasets/sample/dolly.jsonl"
examples = 16
[lora]
rank = 64
alpha = 32.0
dropout = 0.1
targets = ["q_proj", "v_proj", "down_proj"]
[train]
max_steps = 6
rows_per_microbatch = 1
accumulation = 2
lr = 1e-3
warmup = 2
"#;

pub struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    /// With the dataset made.
    pub fn new() -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap() };
        let recipe = RECIPE.replace("ROOT", env!("CARGO_MANIFEST_DIR"));
        std::fs::write(bench.path("recipe.toml"), recipe).unwrap();
        bench.ok("prepare", &[]);
        bench
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn command(&self, stage: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_granite"));
        command.current_dir(self.folder.path()).env("OMP_NUM_THREADS", "1").args([
            stage,
            "--recipe",
            "recipe.toml",
        ]);
        if stage == "train" {
            command.args(["--device", "cpu"]);
        }
        command.args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs a stage that must succeed; gives its stdout.
    pub fn ok(&self, stage: &str, arguments: &[&str]) -> String {
        let output = self.command(stage, arguments).output().unwrap();
        assert!(output.status.success(), "{}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a stage that must fail; gives what the user is told.
    pub fn refused(&self, stage: &str, arguments: &[&str]) -> String {
        let output = self.command(stage, arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", told(&output));
        assert!(output.stdout.is_empty(), "an error is talk, not data");
        told(&output)
    }

    /// Every file of a checkpoint.
    pub fn checkpoint(&self, run: &str, step: u64) -> BTreeMap<String, Vec<u8>> {
        let folder = self.path(run).join(format!("step-{step:06}"));
        let entries = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap());
        entries
            .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap()))
            .collect()
    }

    pub fn assert_same_checkpoint(&self, one: &str, other: &str, step: u64) {
        let (one, other) = (self.checkpoint(one, step), self.checkpoint(other, step));
        assert!(one.contains_key("adapter_model.safetensors") && one.contains_key("optimizer.safetensors"));
        assert_eq!(one.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
        for (name, bytes) in &one {
            assert!(*bytes == other[name], "`{name}` of step {step} differs");
        }
    }

    /// The events of `metrics.jsonl` without what a clock measured.
    pub fn events(&self, run: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        let event = |line: &str| {
            let mut event: Value = serde_json::from_str(line).unwrap();
            event.as_object_mut().unwrap().remove("seconds");
            event
        };
        text.lines().map(event).collect()
    }

    /// The checkpoints' folder names, ascending.
    pub fn checkpoints(&self, run: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(run)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut steps: Vec<String> = names.filter(|name| name.starts_with("step-")).collect();
        steps.sort();
        steps
    }
}

/// What a process wrote to stderr.
pub fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn assert_told(told: &str, parts: &[&str]) {
    for part in parts {
        assert!(told.contains(part), "no `{part}` in:\n{told}");
    }
}
