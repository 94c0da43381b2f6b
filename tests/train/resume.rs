//! Ten steps at once and five and five are the same run, bit for bit, also where the cut falls within an epoch.

use std::collections::BTreeMap;
use std::path::Path;

use granite::metrics::event::Event;
use granite::metrics::jsonl;

use super::tiny::{Bench, How};

/// Every file of a checkpoint.
fn checkpoint(run: &Path, step: u64) -> BTreeMap<String, Vec<u8>> {
    let folder = run.join(format!("step-{step:06}"));
    let files: BTreeMap<_, _> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_string(), std::fs::read(&path).unwrap()))
        .collect();
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    let expected =
        ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json"];
    assert_eq!(names, expected);
    files
}

fn assert_same_checkpoint(a: &Path, b: &Path, step: u64) {
    let (a, b) = (checkpoint(a, step), checkpoint(b, step));
    for (name, bytes) in &a {
        assert!(bytes == &b[name], "`{name}` of step {step} differs");
    }
}

/// The lines of `metrics.jsonl` without what a clock measured.
fn lines(run: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut event: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).unwrap();
            event.remove("seconds");
            serde_json::to_string(&event).unwrap()
        })
        .collect()
}

const OPTIMIZERS: [&str; 2] = ["train.optimizer=adamw", "train.optimizer=adamw_8bit"];

#[test]
fn five_and_five_are_ten() {
    for optimizer in OPTIMIZERS {
        let bench = Bench::new();
        let settings = [optimizer, "train.eval_every=3"];
        bench.run("whole", &settings, How::default()).unwrap();
        // Step 5 lies within an epoch, so its losses so far must come along.
        let first = bench.run("halves", &settings, How::until(5)).unwrap();
        assert_eq!((first.steps, first.finished), (5, false));
        let second = bench.run("halves", &settings, How::RESUMED).unwrap();
        assert_eq!((second.steps, second.finished), (10, true));
        assert_same_checkpoint(&bench.path("whole"), &bench.path("halves"), 10);
        assert_eq!(lines(&bench.path("whole")), lines(&bench.path("halves")), "{optimizer}");
    }
}

#[test]
fn another_seed_is_another_run() {
    let bench = Bench::new();
    bench.run("one", &[], How::default()).unwrap();
    bench.run("two", &["train.seed=18"], How::default()).unwrap();
    let file = "adapter_model.safetensors";
    let [one, two] = ["one", "two"].map(|name| checkpoint(&bench.path(name), 10));
    assert!(one[file] != two[file]);
}

#[test]
fn the_run_learns_and_says_so() {
    let bench = Bench::new();
    let settings = ["train.lr=1e-2", "train.max_steps=40", "train.epochs=1", "lora.dropout=0.0"];
    let summary = bench.run("run", &settings, How::default()).unwrap();
    let (first, last) = (summary.first_validation.unwrap(), summary.last_validation.unwrap());
    assert!(last.overall.loss < 0.8 * first.overall.loss, "{first:?} to {last:?}");
    assert_eq!(first.sources.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["first", "second"]);
    let events = jsonl::read(&bench.path("run/metrics.jsonl")).unwrap();
    let steps = events.iter().filter(|event| matches!(event, Event::Step(_))).map(Event::step);
    assert_eq!(steps.collect::<Vec<_>>(), (1..=40).collect::<Vec<_>>());
    let epochs = events.iter().filter_map(|event| match event {
        Event::Epoch { epoch, loss, .. } => Some((*epoch, *loss)),
        _ => None,
    });
    let epochs: Vec<(u64, f64)> = epochs.collect();
    assert_eq!(epochs.iter().map(|(epoch, _)| *epoch).collect::<Vec<_>>(), (1..=10).collect::<Vec<_>>());
    assert!(epochs[9].1 < epochs[0].1);
}

#[test]
fn an_epochs_loss_is_the_mean_over_its_tokens() {
    let bench = Bench::new();
    bench.run("run", &["train.max_steps=4"], How::default()).unwrap();
    let (mut sum, mut tokens) = (0.0, 0);
    for event in jsonl::read(&bench.path("run/metrics.jsonl")).unwrap() {
        match event {
            Event::Step(step) => {
                sum += step.loss * step.supervised_tokens as f64;
                tokens += step.supervised_tokens;
            }
            Event::Epoch { loss, .. } => assert!((loss / (sum / tokens as f64) - 1.0).abs() < 1e-12),
            Event::Validation { .. } => {}
        }
    }
    assert!(tokens > 0);
}

#[test]
fn a_run_that_ended_before_its_first_checkpoint_begins_anew() {
    let bench = Bench::new();
    bench.run("run", &[], How::default()).unwrap();
    let before = lines(&bench.path("run"));
    for step in [4, 8, 10] {
        std::fs::remove_dir_all(bench.path(&format!("run/step-{step:06}"))).unwrap();
    }
    bench.run("run", &[], How::RESUMED).unwrap();
    assert_eq!(lines(&bench.path("run")), before);
}

#[test]
fn a_finished_run_has_nothing_left_to_do() {
    let bench = Bench::new();
    bench.run("run", &[], How::default()).unwrap();
    let before = checkpoint(&bench.path("run"), 10);
    let again = bench.run("run", &[], How::RESUMED).unwrap();
    assert_eq!((again.steps, again.finished, again.tokens), (10, true, 0));
    assert_eq!(checkpoint(&bench.path("run"), 10), before);
}
