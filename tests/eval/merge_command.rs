//! `granite merge` as a process: forms side by side, what a report says of them, and limits.

use std::fs;

use serde_json::Value;

use super::place::{Place, told};

#[test]
fn forms_are_written_side_by_side_and_held_against_what_was_trained() {
    let place = Place::new();
    let output = place.granite(&["merge", "--dtype", "bf16,fp16,fp32,nf4", "--rows", "3", "--json"]);
    assert!(output.status.success(), "{}", told(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let run = place.path("checkpoints/runs/r");
    for folder in ["merged", "merged-fp16", "merged-fp32", "merged-nf4"] {
        assert!(run.join(folder).join("model.safetensors").is_file(), "{folder}");
        let written = fs::read(run.join(folder).join("merge_report.json")).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&written).unwrap(), report);
    }
    let measured = &report["measured"];
    assert_eq!(measured["computed_in"], "f32");
    let figure = |name: &str, figure: &str| {
        let models = measured["models"].as_array().unwrap();
        models.iter().find(|model| model["name"] == name).unwrap()[figure].as_f64().unwrap()
    };
    // The fewer digits a form has, the further it is from what was trained.
    let divergences = ["fp32", "fp16", "bf16", "nf4"].map(|form| figure(form, "kl_mean"));
    assert!(divergences.is_sorted() && divergences[0] < 1e-8 && divergences[3] > 0.0, "{divergences:?}");
    assert_eq!(figure("base + adapter", "kl_mean"), 0.0);
    assert_eq!(figure("fp32", "flipped_share"), 0.0);
    assert!((figure("fp32", "loss") - figure("base + adapter", "loss")).abs() < 1e-5);
    let page = fs::read_to_string(run.join("merged/merge_report.html")).unwrap();
    assert!(page.contains("computed in f32") && !page.contains("--device cpu"));
}

#[test]
fn an_adapter_is_merged_with_the_base_that_it_learned_on() {
    let place = Place::new();
    let stored = ["--set", "model.quantization=none"];
    let refused = place.granite(&[&["merge"][..], &stored].concat());
    let text = told(&refused);
    assert_eq!(refused.status.code(), Some(1), "{text}");
    assert!(text.contains("was trained with `model.quantization` = nf4, the recipe says none"), "{text}");
    assert!(text.contains("accept these with `--any-base`"), "{text}");

    // Other weights of the same shapes.
    let other = place.path("other");
    fs::create_dir(&other).unwrap();
    for entry in fs::read_dir(place.path("checkpoints/runs/r/step-000002")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, other.join(path.file_name().unwrap())).unwrap();
    }
    let state = fs::read_to_string(other.join("state.json")).unwrap();
    let mut state: Value = serde_json::from_str(&state).unwrap();
    state["identity"]["model"]["hash"] = "0123456789abcdef".into();
    fs::write(other.join("state.json"), state.to_string()).unwrap();
    let adapter = ["--adapter", "other", "--rows", "0"];
    let text = told(&place.granite(&[&["merge"][..], &adapter].concat()));
    assert!(text.contains("adapter `other` was trained on weights of hash 0123456789ab, `"), "{text}");
    let accepted = place.granite(&[&["merge", "--any-base"][..], &adapter].concat());
    assert!(accepted.status.success(), "{}", told(&accepted));

    let evaluated = place.granite(&["eval", "--model", "other", "--out", "evaluated", "--limit", "1"]);
    assert!(
        told(&evaluated).contains("warning: adapter `other` was trained on weights"),
        "{}",
        told(&evaluated)
    );
    // From elsewhere nothing is known, and nothing said.
    fs::remove_file(other.join("state.json")).unwrap();
    let silent = place.granite(&[&["merge"][..], &adapter].concat());
    assert!(silent.status.success() && !told(&silent).contains("trained on"), "{}", told(&silent));
}

#[test]
fn a_form_beyond_a_limit_leaves_a_report_and_nothing_merged() {
    let place = Place::new();
    let output = place.granite(&["merge", "--dtype", "fp32,nf4", "--rows", "3", "--max-kl", "1e-9"]);
    let text = told(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("nothing is merged: mean KL divergence of nf4 is "), "{text}");
    let run = place.path("checkpoints/runs/r");
    let mut left: Vec<String> = fs::read_dir(&run)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("merged"))
        .collect();
    left.sort();
    assert_eq!(left, ["merged-refused"]);
    assert!(run.join("merged-refused/merge_report.html").is_file());
}
