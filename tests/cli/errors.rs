//! Twenty mistakes of a first hour, and what they are answered with.
//!
//! Each message names the file, what was found, what was expected and the next step.

use std::fs;
use std::path::Path;

use super::granite;

/// A recipe over the tiny model of the fixtures and two Dolly records.
const RECIPE: &str = r#"name = "first"
[model]
base = "base"
[data]
dataset = "data"
sequence_length = 64
validation_fraction = 0.0
[data.sources.dolly]
path = "dolly.jsonl"
[lora]
rank = 4
[train]
max_steps = 2
"#;

const DOLLY: &str = r#"{"instruction": "What is a bond?", "context": "", "response": "A loan that is traded.", "category": "open_qa"}
{"instruction": "What is a share?", "context": "", "response": "A part of a company.", "category": "open_qa"}
"#;

/// A folder with a recipe, a dump and a base model, all of it right.
fn first_hour() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("r.toml"), RECIPE).unwrap();
    fs::write(folder.path().join("dolly.jsonl"), DOLLY).unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-granite");
    fs::create_dir(folder.path().join("base")).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixture.join(file), folder.path().join("base").join(file)).unwrap();
    }
    folder
}

/// Spoils a first hour and tells what the program says.
fn told(spoil: impl FnOnce(&Path), arguments: &[&str]) -> String {
    let folder = first_hour();
    spoil(folder.path());
    granite(folder.path(), arguments)
}

fn replace(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "`{from}` is not in the file that the test spoils");
    fs::write(path, text.replace(from, to)).unwrap();
}

const PREPARE: [&str; 3] = ["prepare", "--recipe", "r.toml"];
const TRAIN: [&str; 5] = ["train", "--recipe", "r.toml", "--device", "cpu"];

#[test]
fn command_line() {
    insta::assert_snapshot!("01_no_recipe_given", told(|_| (), &["train"]));
    insta::assert_snapshot!("02_unknown_subcommand", told(|_| (), &["tune"]));
    insta::assert_snapshot!(
        "03_override_without_value",
        told(|_| (), &["train", "-r", "r.toml", "--set", "train.lr"])
    );
}

#[test]
fn recipe() {
    insta::assert_snapshot!("04_recipe_is_missing", told(|_| (), &["train", "--recipe", "none.toml"]));
    let spoil = |folder: &Path| replace(&folder.join("r.toml"), "rank = 4", "rnak = 4");
    insta::assert_snapshot!("05_unknown_field", told(spoil, &TRAIN));
    let spoil = |folder: &Path| replace(&folder.join("r.toml"), "rank = 4", "rank = \"four\"");
    insta::assert_snapshot!("06_wrong_type", told(spoil, &TRAIN));
    insta::assert_snapshot!(
        "07_value_out_of_range",
        told(|_| (), &["train", "-r", "r.toml", "--set", "lora.dropout=1.5"])
    );
    insta::assert_snapshot!(
        "08_override_of_unknown_field",
        told(|_| (), &["train", "-r", "r.toml", "--set", "train.rate=1"])
    );
}

#[test]
fn dumps() {
    let spoil = |folder: &Path| fs::remove_file(folder.join("dolly.jsonl")).unwrap();
    insta::assert_snapshot!("09_dump_is_missing", told(spoil, &PREPARE));
    let spoil = |folder: &Path| {
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec\nsize 13085339\n";
        fs::write(folder.join("dolly.jsonl"), pointer).unwrap();
    };
    insta::assert_snapshot!("10_dump_is_a_git_lfs_pointer", told(spoil, &PREPARE));
    let spoil = |folder: &Path| {
        replace(&folder.join("dolly.jsonl"), "\"response\": \"A part", "\"answer\": \"A part")
    };
    insta::assert_snapshot!("11_record_lacks_a_field", told(spoil, &PREPARE));
    let spoil = |folder: &Path| {
        replace(&folder.join("dolly.jsonl"), "of a company.\", \"category\": \"open_qa\"}", "of a com")
    };
    insta::assert_snapshot!("12_dump_is_truncated", told(spoil, &PREPARE));
    insta::assert_snapshot!(
        "13_too_few_examples",
        told(|_| (), &["prepare", "-r", "r.toml", "--set", "data.sources.dolly.examples=10"])
    );
    let spoil = |folder: &Path| fs::write(folder.join("dolly.jsonl"), "").unwrap();
    insta::assert_snapshot!("14_dump_is_empty", told(spoil, &PREPARE));
}

#[test]
fn base_models() {
    let spoil = |folder: &Path| fs::remove_dir_all(folder.join("base")).unwrap();
    insta::assert_snapshot!("15_base_is_missing", told(spoil, &PREPARE));
    let spoil = |folder: &Path| {
        assert!(granite(folder, &PREPARE).starts_with("exit code: 0"), "{}", granite(folder, &PREPARE));
        let weights = folder.join("base/model.safetensors");
        let bytes = fs::read(&weights).unwrap();
        fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    };
    insta::assert_snapshot!("16_weights_are_truncated", told(spoil, &TRAIN));
    let spoil = |folder: &Path| {
        assert!(granite(folder, &PREPARE).starts_with("exit code: 0"));
        replace(&folder.join("base/config.json"), "\"attention_multiplier\": 0.11,", "");
    };
    insta::assert_snapshot!("17_config_lacks_a_multiplier", told(spoil, &TRAIN));
}

#[test]
fn runs() {
    insta::assert_snapshot!("18_dataset_is_missing", told(|_| (), &TRAIN));
    let spoil = |folder: &Path| {
        assert!(granite(folder, &PREPARE).starts_with("exit code: 0"));
        // Another tokenizer: one merge less.
        let path = folder.join("base/tokenizer_config.json");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(path, text.replace("assistant", "helper")).unwrap();
    };
    insta::assert_snapshot!("19_dataset_of_another_tokenizer", told(spoil, &TRAIN));
    let spoil = |folder: &Path| assert!(granite(folder, &PREPARE).starts_with("exit code: 0"));
    insta::assert_snapshot!(
        "20_nothing_to_resume",
        told(spoil, &["train", "-r", "r.toml", "--resume", "--device", "cpu"])
    );
    insta::assert_snapshot!(
        "21_nothing_to_merge",
        told(|_| (), &["merge", "-r", "r.toml", "--device", "cpu"])
    );
    insta::assert_snapshot!(
        "22_adapter_folder_is_none",
        told(|_| (), &["merge", "-r", "r.toml", "--adapter", "base", "--device", "cpu"])
    );
}

#[test]
fn service() {
    insta::assert_snapshot!(
        "23_open_to_the_world_without_a_key",
        told(|_| (), &["serve", "-r", "r.toml", "--host", "0.0.0.0", "--model", "base", "--device", "cpu"])
    );
    insta::assert_snapshot!(
        "24_documents_are_missing",
        told(|_| (), &["serve", "-r", "r.toml", "--documents", "none", "--model", "base", "--device", "cpu"])
    );
}

#[test]
fn a_bench_of_kernels_without_a_gpu() {
    // Why there is none depends on the machine: no driver, no device, no kernels in the build.
    for what in ["kernels", "attention"] {
        let said = told(|_| (), &["bench", what, "--html", "page.html"]);
        assert!(said.starts_with("exit code: 1\n"), "{said}");
        assert!(said.contains("error: kernels are measured on a GPU: "), "{said}");
        assert!(
            said.contains("hint: run this where there is an NVIDIA GPU; `granite doctor` says"),
            "{said}"
        );
    }
}

#[test]
fn a_folder_that_is_not_ours_is_not_replaced() {
    let folder = first_hour();
    fs::create_dir(folder.path().join("papers")).unwrap();
    fs::write(folder.path().join("papers/thesis.txt"), "years").unwrap();
    let text = granite(folder.path(), &["prepare", "--recipe", "r.toml", "--out", "papers"]);
    assert!(text.contains("`papers` is there already and holds no `manifest.json`"), "{text}");
    let text = granite(folder.path(), &["prepare", "--recipe", "r.toml", "--out", "dolly.jsonl"]);
    assert!(text.contains("`dolly.jsonl` is a file"), "{text}");
    assert_eq!(fs::read(folder.path().join("papers/thesis.txt")).unwrap(), b"years");
    assert!(folder.path().join("dolly.jsonl").is_file());
}

#[test]
fn values_that_could_only_fail_later_are_refused_at_once() {
    for (setting, part) in [
        ("lora.alpha=0", "`lora.alpha` is 0, expected a number of 32 bits, not 0"),
        ("lora.alpha=1e308", "`lora.alpha` is 1000"),
        ("train.eps=1e-300", "a number above 0 in 32 bits"),
        ("train.keep_last=0", "`train.keep_last` is 0, expected 1 or more"),
        ("lora.targets=[\"q_proj\",\"q_proj\"]", "each once"),
        ("eval.gsm8k.max_tokens=0", "`eval.gsm8k.max_tokens` is 0, expected 1 or more"),
    ] {
        let path = ["--set", "eval.gsm8k.path=\"x\""];
        let arguments = ["train", "--recipe", "r.toml", "--set", setting, path[0], path[1]];
        let text = told(|_| {}, &arguments);
        assert!(text.contains(part), "{setting}: {text}");
    }
}
