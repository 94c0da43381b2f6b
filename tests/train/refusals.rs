//! What `granite train` refuses, and what it says.

use std::path::Path;

use granite::data::store::PackedRow;
use granite::kernels::dropout::has_mask;
use granite::recipe::Recipe;

use super::tiny::{Bench, How, rows};

fn assert_told(told: &str, parts: &[&str]) {
    for part in parts {
        assert!(told.contains(part), "no `{part}` in:\n{told}");
    }
    assert!(told.starts_with("error: "), "{told}");
}

/// The usual rows with the first changed.
fn changed(change: impl Fn(&mut PackedRow)) -> Bench {
    let mut train = rows(7, 0);
    change(&mut train[3]);
    Bench::with_rows(&train)
}

#[test]
fn there_must_be_something_to_resume() {
    let bench = Bench::new();
    assert_told(
        &bench.refusal("run", &[], How::RESUMED),
        &["holds no checkpoint to resume", "without `--resume`"],
    );
    assert!(!bench.path("run").exists());
}

#[test]
fn who_goes_by_held_out_rows_must_have_some() {
    let bench = Bench::with_splits(&rows(7, 0), &[]);
    for setting in ["train.keep_best=true", "train.early_stopping_patience=3"] {
        assert_told(
            &bench.refusal("run", &[setting], How::default()),
            &["go by held-out rows, and dataset `", "has none", "a larger `data.validation_fraction`"],
        );
    }
    bench.run("run", &[], How::until(1)).unwrap();
}

#[test]
fn what_changed_since_the_checkpoint_is_named_with_both_values() {
    let bench = Bench::new();
    bench.run("run", &[], How::until(2)).unwrap();
    for (setting, parts) in [
        ("train.lr=0.002", ["`train.lr` = 0.001", "now it is 0.002"]),
        ("lora.rank=8", ["`lora.rank` = 64", "now it is 8"]),
        ("train.max_steps=11", ["`train.max_steps` = 10", "now it is 11"]),
        ("model.quantization=nf4", ["`model.quantization` = \"none\"", "now it is \"nf4\""]),
    ] {
        assert_told(&bench.refusal("run", &[setting], How::RESUMED), &parts);
    }
    // When something is measured, kept or told changes no number of the training.
    let free =
        ["train.save_every=1", "train.eval_every=2", "train.keep_last=1", "serve.port=1", "name=other"];
    bench.run("run", &free, How { resume: true, stop_after: Some(3) }).unwrap();
}

#[test]
fn rows_that_changed_since_the_checkpoint_are_noticed() {
    let bench = Bench::new();
    bench.run("run", &[], How::until(2)).unwrap();
    // As many rows and tokens, one of them another.
    let other = changed(|row| row.sequences[0].input_ids[2] += 1);
    for entry in std::fs::read_dir(other.path("dataset")).unwrap() {
        let from = entry.unwrap().path();
        std::fs::copy(&from, bench.path("dataset").join(from.file_name().unwrap())).unwrap();
    }
    assert_told(&bench.refusal("run", &[], How::RESUMED), &["`data.rows_hash`", "now it is"]);
}

#[test]
fn a_damaged_checkpoint_is_named() {
    let bench = Bench::new();
    bench.run("run", &[], How::until(2)).unwrap();
    let path = bench.path("run/step-000002/optimizer.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    assert_told(&bench.refusal("run", &[], How::RESUMED), &["optimizer.safetensors"]);
    std::fs::write(bench.path("run/step-000002/state.json"), "{}").unwrap();
    assert_told(&bench.refusal("run", &[], How::RESUMED), &["state.json"]);
}

#[test]
fn another_models_dataset_is_refused_before_anything_is_written() {
    let bench = changed(|row| row.sequences[0].input_ids[1] = 259);
    assert_told(&bench.refusal("run", &[], How::default()), &["row 3", "token id 259", "vocabulary has 259"]);
    let bench = changed(|row| {
        row.sequences[0].input_ids = vec![9; 4097];
        row.sequences[0].loss_mask = vec![true; 4097];
    });
    assert_told(&bench.refusal("run", &[], How::default()), &["row 3", "4097 tokens", "4096 positions"]);
    let told = Bench::new().refusal("run", &["data.template.date=1999-01-01"], How::default());
    assert_told(&told, &["another tokenizer or template", "hint: run `granite prepare` again"]);
    assert!(!bench.path("run").exists());
    assert_told(&Bench::with_rows(&[]).refusal("run", &[], How::default()), &["no row to train on"]);
}

#[test]
fn numbers_that_blow_up_end_the_run_and_keep_the_checkpoint() {
    let bench = Bench::new();
    let settings = ["train.lr=1e30", "train.warmup=2", "train.save_every=1", "train.max_grad_norm=0.0"];
    let told = bench.refusal("run", &settings, How::default());
    // The first step has rate zero, the second moves the adapter out of range, the third sees it.
    assert_told(
        &told,
        &["step 3", "the loss is NaN", "the checkpoint of step 2 stays", "hint: lower `train.lr`"],
    );
    assert!(bench.path("run/step-000001/adapter_model.safetensors").exists());
}

#[test]
fn settings_out_of_any_range_are_refused_not_computed_with() {
    let bench = Bench::new();
    for setting in [
        "train.accumulation=9223372036854775807",
        "train.rows_per_microbatch=9223372036854775807",
        "lora.rank=9223372036854775807",
        "lora.alpha=nan",
        "train.betas=[0.9, 1.0]",
        "train.eps=0.0",
        "train.weight_decay=-1.0",
        "train.max_grad_norm=nan",
        "train.warmup=inf",
        "train.epochs=inf",
        "train.max_steps=0",
        "data.sequence_length=9223372036854775807",
    ] {
        let text = toml::to_string(&bench.recipe(&[])).unwrap();
        let path = std::path::Path::new("tiny.toml");
        let error = granite::recipe::Recipe::parse(&text, path, &[setting.parse().unwrap()]).unwrap_err();
        let key = setting.split('=').next().unwrap();
        assert!(error.to_string().contains(&format!("`{key}` is ")), "{error}");
    }
}

#[test]
fn a_recipe_takes_the_dropouts_that_have_masks() {
    let edge = 1.0 - 1.0 / 65_536.0;
    for p in [-0.1, 0.0, 0.1, 0.5, edge - 1e-9, edge, 1.0, f64::NAN] {
        let text =
            format!("name = \"x\"\n[model]\nbase = \"y\"\n[lora]\ndropout = {p:?}\n").replace("NaN", "nan");
        let taken = Recipe::parse(&text, Path::new("recipe.toml"), &[]).is_ok();
        assert_eq!(taken, has_mask(p), "{p}");
    }
}
