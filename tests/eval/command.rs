//! `granite eval` as a process: from a recipe to a report, interrupted, gone on with, refused.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::place::{Place, told};

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
    // The same weights held, or scaled, in another way.
    let text = with(&["--set", "model.quantization=none"]);
    assert!(text.contains("whose model `base` is `base, \"nf4\" in Float"), "{text}");
    let config = place.path("checkpoints/runs/r/step-000002/adapter_config.json");
    let written_config = fs::read_to_string(&config).unwrap();
    let alpha = written_config.lines().find(|line| line.contains("\"lora_alpha\"")).unwrap();
    fs::write(&config, written_config.replace(alpha, "  \"lora_alpha\": 3,")).unwrap();
    let text = with(&[]);
    assert!(text.contains("whose model `adapter` is `adapter step-000002"), "{text}");
    fs::write(&config, written_config).unwrap();
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

/// The folder of an adapter is a model over the recipe's base, held as the recipe says.
#[test]
fn an_adapter_s_folder_is_known_by_how_its_base_is_held() {
    let place = Place::new();
    let arguments = ["--model", "checkpoints/runs/r/step-000002", "--limit", "1", "--out", "f"];
    let done = place.granite(&[&["eval"][..], &arguments].concat());
    assert!(done.status.success(), "{}", told(&done));
    let text = place.refused(&[&arguments[..], &["--set", "model.quantization=none"]].concat());
    assert!(text.contains("\"nf4\" in Float") && text.contains("\"none\" in Float"), "{text}");
}

/// A verdict on a query is as good as the rows that it met.
#[test]
fn other_rows_in_a_database_are_another_evaluation() {
    let place = Place::bare();
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/sample/spider/database");
    for name in ["warehouse", "loan_book"] {
        fs::create_dir_all(place.path("db").join(name)).unwrap();
        let file = format!("{name}/{name}.sqlite");
        fs::copy(sample.join(&file), place.path("db").join(&file)).unwrap();
    }
    place.answer("gold", &gold());
    let arguments = ["--answers", "gold", "--set", "eval.spider.databases=db", "--out", "g"];
    for _ in 0..2 {
        let done = place.granite(&[&["eval"][..], &arguments].concat());
        assert!(done.status.success(), "{}", told(&done));
    }
    let database = rusqlite::Connection::open(place.path("db/warehouse/warehouse.sqlite")).unwrap();
    database.execute_batch("CREATE TABLE more (a INTEGER); INSERT INTO more VALUES (1)").unwrap();
    drop(database);
    let text = place.refused(&arguments);
    assert!(text.contains("whose content of spider's folder is `2 files, SHA-256 "), "{text}");
}

#[test]
fn what_is_not_there_claims_no_folder() {
    let place = Place::new();
    let text = place.refused(&["--model", "typo", "--limit", "2"]);
    assert!(text.contains("there is no folder `typo`"), "{text}");
    assert!(!place.path("checkpoints/runs/r/eval-typo").exists());
    let text = place.refused(&["--model", "base", "--out", "checkpoints/runs/r"]);
    assert!(text.contains("holds a run, whose report would be replaced"), "{text}");
}

#[test]
fn a_model_is_named_once() {
    let place = Place::new();
    let text = place.refused(&["--model", "base", "--model", "base"]);
    assert!(text.contains("two models are called `base`"), "{text}");
    assert!(!place.path("checkpoints/runs/r/eval-base-base").exists());
}

/// The gold queries of the sample.
fn gold() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/sample/spider/dev.json");
    let questions: Vec<Value> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    questions.iter().map(|one| one["query"].as_str().unwrap().to_string()).collect()
}

#[test]
fn given_answers_are_judged_without_a_model() {
    let place = Place::bare();
    let gold = gold();
    place.answer("theirs", &gold);
    let mut worse: Vec<String> = gold.iter().map(|query| format!("```sql\n{query}\n```")).collect();
    worse[1] = String::new();
    worse[2] = "SELECT nothing FROM nowhere".to_string();
    worse.push("SELECT 'to no question'".to_string());
    place.answer("worse", &worse);
    let arguments = ["eval", "--answers", "theirs", "--answers", "worse", "--out", "e"];
    let output = place.granite(&[&arguments[..], &["--json"]].concat());
    assert!(output.status.success(), "{}", told(&output));
    assert!(
        told(&output).contains("note: 1 answers in worse/spider.jsonl are to questions that are not asked")
    );
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["dataset"].is_null(), "no dataset was prepared");
    let scores: Vec<f64> = report["models"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| {
            assert_eq!((model["label"].as_str(), &model["losses"]), (Some("given answers"), &Value::Null));
            // HumanEval is in the recipe, and in no folder.
            assert_eq!(model["tasks"].as_array().unwrap().len(), 1);
            model["tasks"][0]["measures"][0]["score"]["estimate"].as_f64().unwrap()
        })
        .collect();
    let count = gold.len() as f64;
    assert_eq!(scores, [1.0, (count - 2.0) / count]);
    let comparison = &report["comparisons"][0];
    assert_eq!((comparison["second"].as_str(), comparison["smaller"].as_u64()), (Some("worse"), Some(2)));

    // A half-judged folder is gone on with; its own results are answers, too.
    let results = place.path("e/worse/spider.jsonl");
    let whole = fs::read(&results).unwrap();
    fs::write(&results, &whole[..whole.len() / 2]).unwrap();
    assert!(place.granite(&arguments).status.success());
    assert_eq!(fs::read(&results).unwrap(), whole);
    let output = place.granite(&["eval", "--answers", "e/worse", "--out", "again"]);
    assert!(output.status.success(), "{}", told(&output));
    assert_eq!(fs::read(place.path("again/worse/spider.jsonl")).unwrap(), whole);

    // Other answers are not put among the judged ones.
    worse[0] = String::new();
    place.answer("worse", &worse);
    let text = place.refused(&arguments[1..]);
    assert!(text.contains("whose answers `worse` is `SHA-256 of spider "), "{text}");
}

#[test]
fn given_answers_must_be_complete_and_readable() {
    let place = Place::bare();
    let refused = |name: &str| place.refused(&["--answers", name]);
    let text = refused("nowhere");
    assert!(text.contains("there is no folder `nowhere`"), "{text}");
    fs::create_dir(place.path("empty")).unwrap();
    let text = refused("empty");
    assert!(text.contains("`empty` holds no answers to any task of the recipe"), "{text}");
    let gold = gold();
    place.answer("short", &gold[..gold.len() - 2]);
    let text = refused("short");
    let expected = format!(
        "`short/spider.jsonl` answers {} of {} questions of spider; the first without an answer is `{}`",
        gold.len() - 2,
        gold.len(),
        gold.len() - 1
    );
    assert!(text.contains(&expected) && text.contains("--limit"), "{text}");
    for (lines, expected) in [
        (r#"{"id": 1, "answer": "a"}|{"id": "1", "answer": "b"}"#, "question `1` is answered twice"),
        (r#"{"id": 1, "answer": "a"}|{"id": 2}"#, "record 2"),
        (r#"{"id": 1.5, "answer": "a"}"#, "expected a text or a whole number"),
        (r#"{"id": 1, "answer": "a"}|{"id": 2, "ans"#, "broken/spider.jsonl"),
        ("", "broken/spider.jsonl"),
    ] {
        fs::create_dir_all(place.path("broken")).unwrap();
        fs::write(place.path("broken/spider.jsonl"), lines.replace('|', "\n")).unwrap();
        let text = refused("broken");
        assert!(text.contains(expected) && text.contains("hint: "), "{lines}: {text}");
    }
    place.answer("broken", &gold);
    let text = place.refused(&["--answers", "broken", "--answers", "./broken"]);
    assert!(text.contains("two models are called `broken`"), "{text}");
}
