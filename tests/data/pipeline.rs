//! From real dumps to packed rows, with Granite's tokenizer.

use std::collections::HashMap;
use std::path::Path;

use granite::data::prepare::{Prepared, prepare, preview};
use granite::data::store::{self, Dataset, Split};
use granite::data::tokenizer::ChatTokenizer;
use granite::recipe::Recipe;

use crate::fixture::{granite_tokenizer, real_data};

fn recipe(data: &Path, length: usize, counts: [usize; 3]) -> Recipe {
    let [dolly, spider, code] = counts;
    let dumps = data.join("dumps");
    let text = format!(
        r#"
        name = "test"
        [model]
        base = "granite"
        [data]
        sequence_length = {length}
        [data.sources.dolly]
        path = "{dumps}/dolly/databricks-dolly-15k.jsonl"
        examples = {dolly}
        [data.sources.finance_alpaca]
        path = "{dumps}/finance-alpaca/Cleaned_date.json"
        [data.sources.convfinqa]
        path = "{dumps}/convfinqa/train.json"
        [data.sources.spider]
        path = "{dumps}/spider/train_spider.json"
        tables = "{dumps}/spider/tables.json"
        examples = {spider}
        [data.sources.code_alpaca]
        path = "{dumps}/codealpaca/code_alpaca_2k.json"
        examples = {code}
        "#,
        dumps = dumps.display()
    );
    Recipe::parse(&text, Path::new("test.toml"), &[]).unwrap()
}

fn write(folder: &Path, prepared: &Prepared) {
    let [(train, train_rows), (validation, validation_rows)] = &prepared.rows;
    let splits = [(*train, train_rows.as_slice()), (*validation, validation_rows.as_slice())];
    store::write(folder, &prepared.manifest, splits, &prepared.examples).unwrap();
}

#[test]
fn the_same_inputs_and_seed_give_the_same_bytes() {
    let Some(data) = real_data("same bytes") else { return };
    let recipe = recipe(&data, 1024, [800, 200, 200]);
    let files = granite_tokenizer(&data);
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for folder in &folders {
        write(folder.path(), &prepare(&recipe, &files, Some(49_155)).unwrap());
    }
    for file in ["train.parquet", "validation.parquet", "examples.parquet", "manifest.json"] {
        let [one, other] =
            [&folders[0], &folders[1]].map(|folder| std::fs::read(folder.path().join(file)).unwrap());
        assert!(one == other, "{file} differs");
    }
}

#[test]
fn every_row_keeps_what_packing_promises() {
    let Some(data) = real_data("rows") else { return };
    let recipe = recipe(&data, 1024, [1500, 300, 300]);
    let files = granite_tokenizer(&data);
    let tokenizer = ChatTokenizer::new(&files, &recipe.data.template).unwrap();
    let prepared = prepare(&recipe, &files, None).unwrap();
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &prepared);
    let dataset = Dataset::open(folder.path()).unwrap();
    dataset.check_tokenizer(&tokenizer).unwrap();
    let mut examples = Vec::new();
    for split in Split::ALL {
        for row in dataset.rows(split).unwrap() {
            assert!(row.tokens() <= 1024);
            for (sequence, example) in row.sequences.iter().zip(&row.examples) {
                let lineage = &prepared.examples[*example as usize];
                assert_eq!(lineage.split, split);
                assert_eq!(lineage.tokens as usize, sequence.input_ids.len());
                assert!(sequence.input_ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()));
                // The last supervised token ends the response; the line break after it is not supervised.
                let last = sequence.loss_mask.iter().rposition(|on| *on).unwrap();
                assert_eq!(sequence.input_ids[last], 0);
                assert_eq!(last + 2, sequence.input_ids.len());
                assert!(!sequence.loss_mask[0]);
                examples.push(*example);
            }
        }
    }
    examples.sort_unstable();
    assert_eq!(examples, (0..prepared.examples.len() as u32).collect::<Vec<_>>());
    assert_eq!(dataset.manifest.train.packing_efficiency, prepared.manifest.train.packing_efficiency);
    assert!(dataset.manifest.train.packing_efficiency > 0.99);
}

#[test]
fn every_record_is_accounted_for_and_no_document_is_in_both_splits() {
    let Some(data) = real_data("accounts") else { return };
    let prepared = prepare(&recipe(&data, 512, [1500, 300, 300]), &granite_tokenizer(&data), None).unwrap();
    for source in &prepared.manifest.sources {
        let dropped: usize = source.dropped.values().sum();
        assert_eq!(source.read, source.taken + source.not_sampled + dropped, "{}", source.name);
        assert_eq!(source.taken, source.train.examples + source.validation.examples);
    }
    let asked = ["dolly", "spider", "code_alpaca"];
    let taken: Vec<usize> = prepared
        .manifest
        .sources
        .iter()
        .filter(|one| asked.contains(&one.name.as_str()))
        .map(|one| one.taken)
        .collect();
    assert_eq!(taken, [1500, 300, 300], "what does not fit is replaced by the next in order");
    let mut splits: HashMap<(u16, &str), Split> = HashMap::new();
    for one in &prepared.examples {
        let seen = *splits.entry((one.source, &one.document)).or_insert(one.split);
        assert_eq!(seen, one.split, "{}", one.document);
    }
}

#[test]
fn another_seed_takes_other_examples_but_moves_no_document() {
    let Some(data) = real_data("seeds") else { return };
    let files = granite_tokenizer(&data);
    let mut recipe = recipe(&data, 1024, [1000, 100, 100]);
    let one = prepare(&recipe, &files, None).unwrap();
    recipe.data.seed += 1;
    let other = prepare(&recipe, &files, None).unwrap();
    let splits: HashMap<(u16, &str), Split> =
        one.examples.iter().map(|one| ((one.source, one.document.as_str()), one.split)).collect();
    assert_ne!(one.examples, other.examples);
    for example in &other.examples {
        if let Some(split) = splits.get(&(example.source, example.document.as_str())) {
            assert_eq!(*split, example.split);
        }
    }
}

#[test]
fn what_is_too_long_loses_context_and_keeps_question_response_and_end() {
    let Some(data) = real_data("too long") else { return };
    let recipe = recipe(&data, 256, [400, 1, 1]);
    let files = granite_tokenizer(&data);
    let tokenizer = ChatTokenizer::new(&files, &recipe.data.template).unwrap();
    let shown = preview(&recipe, &tokenizer, 1000).unwrap();
    let shortened: Vec<_> = shown.iter().filter(|(_, _, fitted)| fitted.shortened).collect();
    assert!(shortened.len() >= 10, "{}", shortened.len());
    for (_, example, fitted) in shortened {
        assert!(fitted.encoded.ids.len() <= 256);
        // It is cut about as little as it must be.
        assert!(fitted.encoded.ids.len() >= 240, "{}", fitted.encoded.ids.len());
        let text = tokenizer.decode(&fitted.encoded.ids, false).unwrap();
        // What no cut covers is all there: the question, the table of a report, every later turn.
        let mut cuts: Vec<_> = example.cuts.iter().map(|cut| cut.bytes.clone()).collect();
        cuts.sort_by_key(|bytes| bytes.start);
        let opening = &example.messages[0].content;
        let mut from = 0;
        for bytes in cuts {
            assert!(text.contains(opening[from..bytes.start].trim()));
            from = bytes.end;
        }
        assert!(text.contains(opening[from..].trim()));
        assert!(example.messages[1..].iter().all(|message| text.contains(&message.content)));
        let response = &example.messages.last().unwrap().content;
        assert!(text.ends_with(&format!("<|end_of_role|>{response}<|end_of_text|>\n")));
    }
}

#[test]
fn a_source_with_too_few_examples_fails_with_the_counts() {
    let Some(data) = real_data("shortfall") else { return };
    let error = prepare(&recipe(&data, 1024, [20_000, 1, 1]), &granite_tokenizer(&data), None).unwrap_err();
    let text = granite::error::render(&error);
    assert!(text.contains("source `dolly` has 14") && text.contains("20000 asked for"), "{text}");
    assert!(text.contains("hint: ask for fewer"), "{text}");
}

#[test]
fn a_missing_file_names_source_and_file() {
    let Some(data) = real_data("missing file") else { return };
    let mut recipe = recipe(&data, 1024, [1, 1, 1]);
    recipe.data.sources.code_alpaca.as_mut().unwrap().path = "nowhere.json".into();
    let text = granite::error::render(&prepare(&recipe, &granite_tokenizer(&data), None).unwrap_err());
    assert!(text.contains("source `code_alpaca`") && text.contains("`nowhere.json`"), "{text}");
}

#[test]
fn another_model_s_tokenizer_is_refused() {
    let Some(data) = real_data("another tokenizer") else { return };
    let recipe = recipe(&data, 512, [50, 5, 5]);
    let files = granite_tokenizer(&data);
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &prepare(&recipe, &files, None).unwrap());
    let mut template = recipe.data.template.clone();
    template.date = "2020-01-01".to_string();
    let other = ChatTokenizer::new(&files, &template).unwrap();
    let error = Dataset::open(folder.path()).unwrap().check_tokenizer(&other).unwrap_err();
    let text = granite::error::render(&error);
    assert!(
        text.contains("another tokenizer or template") && text.contains("hint: run `granite prepare` again"),
        "{text}"
    );
}
