//! What a prepared dataset can prove: where tokens came from, what was left out and why.

use std::path::Path;

use granite::data::example::Role;
use granite::data::prepare::{Prepared, prepare};
use granite::data::store::{self, Dataset, Split};
use granite::data::tokenizer::ChatTokenizer;
use granite::data::trace::trace;
use granite::recipe::Recipe;

use crate::fixture::{granite_tokenizer, real_data};

/// The real dumps, small enough to be quick, against the evaluation sets.
fn recipe(data: &Path, more: &str) -> Recipe {
    let text = format!(
        r#"
        name = "test"
        [model]
        base = "granite"
        [data]
        sequence_length = 512
        [data.contamination]
        against = ["{data}/evaltasks/HumanEval.jsonl.gz", "{data}/evaltasks/sanitized-mbpp.json",
                   "{data}/evaltasks/gsm8k_test.jsonl", "{data}/dumps/spider/dev.json",
                   "{data}/dumps/convfinqa/convfinqa_dataset.json"]
        [data.sources.dolly]
        path = "{data}/dumps/dolly/databricks-dolly-15k.jsonl"
        examples = 500
        [data.sources.convfinqa]
        path = "{data}/dumps/convfinqa/train.json"
        [data.sources.spider]
        path = "{data}/dumps/spider/train_spider.json"
        tables = "{data}/dumps/spider/tables.json"
        examples = 200
        {more}
        "#,
        data = data.display()
    );
    Recipe::parse(&text, Path::new("test.toml"), &[]).unwrap()
}

fn write(folder: &Path, prepared: &Prepared) -> Dataset {
    let [(train, train_rows), (validation, validation_rows)] = &prepared.rows;
    let splits = [(*train, train_rows.as_slice()), (*validation, validation_rows.as_slice())];
    store::write(folder, &prepared.manifest, splits, &prepared.examples).unwrap();
    Dataset::open(folder).unwrap()
}

#[test]
fn every_token_of_a_row_leads_to_its_record_and_role() {
    let Some(data) = real_data("trace") else { return };
    let (recipe, files) = (recipe(&data, ""), granite_tokenizer(&data));
    let tokenizer = ChatTokenizer::new(&files, &recipe.data.template).unwrap();
    let prepared = prepare(&recipe, &files, None).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let dataset = write(folder.path(), &prepared);
    let (_, rows) = &prepared.rows[0];
    for number in [0, 1, rows.len() - 1] {
        let row = &rows[number];
        let flat: Vec<(u32, bool)> = row
            .sequences
            .iter()
            .flat_map(|one| one.input_ids.iter().copied().zip(one.loss_mask.iter().copied()))
            .collect();
        for token in (0..row.tokens()).step_by(37) {
            let found = trace(&dataset, &tokenizer, Split::Train, number, token).unwrap();
            let lineage = &prepared.examples[found.example as usize];
            assert_eq!((found.id, found.supervised), flat[token]);
            assert_eq!((found.record, &found.document), (lineage.record, &lineage.document));
            assert_eq!(found.role.as_deref() == Some("assistant"), found.supervised, "{found:?}");
            let file = found.file.unwrap();
            assert_eq!(file.source, found.source);
            assert!(!file.path.ends_with("tables.json"), "the file of the records is named");
        }
    }
    let text = granite::error::render(&trace(&dataset, &tokenizer, Split::Train, 0, 9999).unwrap_err());
    assert!(text.contains("no token 9999") && text.contains("name a token from 0 to"), "{text}");
    let text = granite::error::render(&trace(&dataset, &tokenizer, Split::Validation, 9999, 0).unwrap_err());
    assert!(text.contains("no row 9999") && text.contains("name a row from 0 to"), "{text}");
}

#[test]
fn every_message_of_an_example_has_its_place() {
    let Some(data) = real_data("turns") else { return };
    let prepared = prepare(&recipe(&data, ""), &granite_tokenizer(&data), None).unwrap();
    let with_user =
        prepared.examples.iter().filter(|one| one.turns.iter().any(|turn| turn.role == Role::User));
    let share = with_user.count() as f64 / prepared.examples.len() as f64;
    assert!(share > 0.99, "{share}");
    for one in &prepared.examples {
        assert!(one.turns.iter().any(|turn| turn.role == Role::Assistant));
        assert!(one.turns.iter().all(|turn| turn.start < turn.end && turn.end <= one.tokens));
        assert!(one.turns.windows(2).all(|pair| pair[0].end <= pair[1].start));
        let answered = one.turns.iter().filter(|turn| turn.role == Role::Assistant);
        assert_eq!(answered.map(|turn| turn.end - turn.start).sum::<u32>(), one.supervised_tokens);
    }
}

#[test]
fn findings_are_counted_and_kept_on_request() {
    let Some(data) = real_data("findings") else { return };
    let files = granite_tokenizer(&data);
    let mut recipe = recipe(&data, "");
    let dropping = prepare(&recipe, &files, None).unwrap();
    recipe.data.duplicates.keep = true;
    recipe.data.contamination.keep = true;
    let keeping = prepare(&recipe, &files, None).unwrap();
    assert_eq!(dropping.findings.len(), keeping.findings.len());
    assert!(dropping.findings.iter().all(|one| !one.kept) && keeping.findings.iter().all(|one| one.kept));
    for (one, other) in dropping.manifest.sources.iter().zip(&keeping.manifest.sources) {
        for reason in ["duplicate", "near_duplicate", "contaminated"] {
            assert_eq!(one.dropped.get(reason), other.kept.get(reason), "{} {reason}", one.name);
            let found =
                dropping.findings.iter().filter(|it| it.source == one.name && it.reason == reason).count();
            assert_eq!(one.dropped.get(reason).copied().unwrap_or(0), found);
            // No source loses more than a twentieth.
            assert!(found * 20 <= one.read, "{} {reason} {found}", one.name);
        }
        assert_eq!(one.audit.responses, one.audit.supervised_ends);
        assert!(one.supervised_share > 0.0 && one.supervised_share < 1.0);
    }
    let near = dropping.findings.iter().filter(|one| one.reason == "near_duplicate").count();
    assert!(near >= 10, "{near}");
}
