//! What `granite train` refuses when recipe, dataset, base model or checkpoint are not the run's.

use std::path::Path;

use crate::bench::{Bench, assert_told};

/// A copy of the base model with something done to one tensor's bytes.
fn base_with(bench: &Bench, tensor: &str, change: impl Fn(&mut [u8])) -> String {
    let folder = bench.path("base");
    std::fs::create_dir(&folder).unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-granite");
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture.join(name), folder.join(name)).unwrap();
    }
    let path = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let at = |index: usize| 8 + length + header[tensor]["data_offsets"][index].as_u64().unwrap() as usize;
    change(&mut bytes[at(0)..at(1)]);
    std::fs::write(&path, bytes).unwrap();
    "model.base=\"base\"".to_string()
}

#[test]
fn what_differs_from_the_checkpoint_is_named_with_both_values() {
    let bench = Bench::new();
    bench.ok("train", &["--out", "run", "--stop-after", "1"]);
    let refused = |set: &str| bench.refused("train", &["--out", "run", "--resume", "--set", set]);
    assert_told(
        &refused("lora.alpha=16.0"),
        &["step-000001", "`lora.alpha` = 32.0", "now it is 16.0", "hint: "],
    );
    assert_told(&refused("train.seed=5"), &["`train.seed` = 17", "now it is 5"]);

    let base = base_with(&bench, "model.norm.weight", |bytes| bytes[0] ^= 1);
    assert_told(&refused(&base), &["`model.hash` = ", "now it is "]);

    bench.ok("prepare", &["--set", "data.sources.dolly.examples=17"]);
    assert_told(&refused("train.keep_last=3"), &["`data.", "now it is "]);
    assert_eq!(bench.checkpoints("run"), ["step-000001"]);
}

#[test]
fn a_run_is_not_written_over() {
    let bench = Bench::new();
    bench.ok("train", &["--out", "run", "--stop-after", "1"]);
    let before = bench.events("run");
    assert_told(
        &bench.refused("train", &["--out", "run"]),
        &["`run` holds a run already", "`--resume`", "`--out FOLDER`"],
    );
    assert_eq!(bench.events("run"), before);
}

#[test]
fn a_base_model_that_gives_no_number_stops_the_run() {
    let bench = Bench::new();
    let base = base_with(&bench, "model.norm.weight", |bytes| bytes.fill(0xff));
    let told = bench.refused("train", &["--out", "run", "--set", &base]);
    assert_told(
        &told,
        &["step 0: the validation loss is NaN", "hint: no step was taken yet: the base model"],
    );
    assert!(!told.contains("train.lr"), "{told}");

    // Without held-out rows the first step notices.
    bench.ok("prepare", &["--set", "data.validation_fraction=0.0"]);
    let told =
        bench.refused("train", &["--out", "other", "--set", "data.validation_fraction=0.0", "--set", &base]);
    assert_told(
        &told,
        &["step 1: the loss is NaN", "no checkpoint was written before", "hint: no step was taken yet"],
    );
    assert!(!told.contains("train.lr"), "{told}");
    assert!(bench.checkpoints("other").is_empty());
}
