//! What a recipe may ask of a training beside the usual: noise, learning rates, early ends, the best checkpoint.

use granite::checkpoint::run::RunFolder;
use granite::metrics::event::Event;
use granite::metrics::jsonl;

use super::tiny::{Bench, How};

fn checkpoints(bench: &Bench, run: &str) -> Vec<u64> {
    let recipe = bench.recipe(&[]);
    RunFolder::of(&recipe, Some(&bench.path(run))).checkpoints().unwrap()
}

fn adapter(bench: &Bench, run: &str, step: u64) -> Vec<u8> {
    std::fs::read(bench.path(&format!("{run}/step-{step:06}/adapter_model.safetensors"))).unwrap()
}

/// Each changes the training, and resumes to the same bytes.
#[test]
fn noise_and_learning_rates_survive_a_resume() {
    let bench = Bench::new();
    bench.run("plain", &[], How::default()).unwrap();
    for (name, settings) in [
        ("noise", &["train.neftune_noise_alpha=5"][..]),
        ("ratio", &["train.loraplus_lr_ratio=16"]),
        ("ratio8", &["train.loraplus_lr_ratio=16", "train.optimizer=adamw_8bit"]),
    ] {
        bench.run(name, settings, How::default()).unwrap();
        let halves = format!("{name}-halves");
        bench.run(&halves, settings, How::until(5)).unwrap();
        bench.run(&halves, settings, How::RESUMED).unwrap();
        assert!(adapter(&bench, name, 10) == adapter(&bench, &halves, 10), "{name}");
        assert!(adapter(&bench, name, 10) != adapter(&bench, "plain", 10), "{name}");
    }
    let told = bench.refusal("noise", &["train.neftune_noise_alpha=6"], How::RESUMED);
    assert!(told.contains("`train.neftune_noise_alpha` = 5.0, now it is 6.0"), "{told}");
}

/// A ratio of one is the plain optimiser, though it takes the parameters one by one.
#[test]
fn a_ratio_of_one_changes_nothing() {
    let bench = Bench::new();
    bench.run("plain", &[], How::default()).unwrap();
    bench.run("one", &["train.loraplus_lr_ratio=1"], How::default()).unwrap();
    assert!(adapter(&bench, "plain", 10) == adapter(&bench, "one", 10));
}

/// A learning rate that leads away from the data: the first validation after it stays the best.
const WORSE: [&str; 6] = [
    "train.lr=3",
    "train.schedule=constant",
    "train.warmup=0",
    "train.eval_every=1",
    "train.save_every=100",
    "train.max_steps=40",
];

#[test]
fn training_ends_early_with_the_best_kept() {
    let bench = Bench::new();
    let settings = [&WORSE[..], &["train.early_stopping_patience=3", "train.keep_last=1"]].concat();
    let summary = bench.run("run", &settings, How::default()).unwrap();
    let (best, loss) = summary.best.unwrap();
    assert!(summary.finished && summary.steps < 40, "{summary:?}");
    assert_eq!(summary.steps, best + 3);
    assert_eq!(checkpoints(&bench, "run"), [best, best + 3]);
    assert_eq!(summary.best_checkpoint.unwrap(), bench.path(&format!("run/step-{best:06}")));
    let losses: Vec<(u64, f64)> = jsonl::read(&bench.path("run/metrics.jsonl"))
        .unwrap()
        .iter()
        .filter_map(|event| match event {
            Event::Validation { step, loss, .. } if *step > 0 => Some((*step, *loss)),
            _ => None,
        })
        .collect();
    let least = losses.iter().copied().fold((0, f64::INFINITY), |a, b| if b.1 < a.1 { b } else { a });
    assert_eq!(least, (best, loss));
    // Gone on with, it is over; with more patience it goes on where it ended.
    let again = bench.run("run", &settings, How::RESUMED).unwrap();
    assert_eq!((again.steps, again.finished, again.tokens), (best + 3, true, 0));
    let patient = [&WORSE[..], &["train.early_stopping_patience=4", "train.keep_last=1"]].concat();
    let on = bench.run("run", &patient, How::RESUMED).unwrap();
    assert!(on.steps > best + 3 && on.tokens > 0, "{on:?}");
    let kept = std::fs::read_to_string(bench.path("run/recipe.toml")).unwrap();
    assert!(kept.contains("early_stopping_patience = 4"), "the run's recipe is what it goes by: {kept}");
}

#[test]
fn the_best_survives_a_resume() {
    let bench = Bench::new();
    let settings = [&WORSE[..], &["train.keep_best=true", "train.keep_last=1", "train.max_steps=8"]].concat();
    let whole = bench.run("whole", &settings, How::default()).unwrap();
    bench.run("halves", &settings, How::until(5)).unwrap();
    let halves = bench.run("halves", &settings, How::RESUMED).unwrap();
    assert_eq!(whole.best, halves.best);
    assert_eq!(checkpoints(&bench, "whole"), checkpoints(&bench, "halves"));
    assert!(checkpoints(&bench, "whole").contains(&whole.best.unwrap().0));
}

#[test]
fn checkpoints_that_a_killed_process_was_to_remove_go_with_the_next() {
    let bench = Bench::new();
    let end = |keep| ["train.save_every=1", "train.max_steps=4", keep];
    bench.run("run", &end("train.keep_last=4"), How::default()).unwrap();
    assert_eq!(checkpoints(&bench, "run"), [1, 2, 3, 4]);
    let again = bench.run("run", &end("train.keep_last=2"), How::RESUMED).unwrap();
    assert_eq!((again.tokens, checkpoints(&bench, "run")), (0, vec![3, 4]));
}

#[test]
fn an_adapter_that_cannot_move_ends_the_run() {
    let bench = Bench::new();
    let told = bench.refusal("run", &["train.lr=1e-300", "train.warmup=2"], How::default());
    assert!(told.contains("step 3: the adapter has not moved in its warm-up"), "{told}");
    assert!(told.contains("hint: raise `train.lr`"), "{told}");
}

#[test]
fn two_processes_cannot_train_in_one_folder() {
    let bench = Bench::new();
    bench.run("run", &[], How::until(2)).unwrap();
    let recipe = bench.recipe(&[]);
    let lock = RunFolder::of(&recipe, Some(&bench.path("run"))).lock().unwrap();
    let told = bench.refusal("run", &[], How::RESUMED);
    assert!(told.contains("another process trains in") && told.contains("--out FOLDER"), "{told}");
    drop(lock);
    bench.run("run", &[], How::RESUMED).unwrap();
}

#[test]
fn event_files_are_written_where_asked_for() {
    let bench = Bench::new();
    bench.run("run", &["metrics.tensorboard=true"], How::until(3)).unwrap();
    bench.run("run", &["metrics.tensorboard=true"], How::RESUMED).unwrap();
    let files = std::fs::read_dir(bench.path("run/tensorboard")).unwrap().count();
    assert_eq!(files, 2);
}
