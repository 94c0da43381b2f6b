//! The same records in every form that dumps come in give the same examples.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use arrow::ipc::writer::{FileWriter, StreamWriter};
use granite::data::example::Example;
use granite::data::source::{Collected, Reason, collect};
use granite::recipe::{DataSpec, Recipe};
use parquet::arrow::ArrowWriter;
use serde_json::{Value, json};

use crate::fixture::real_data;

const FIELDS: [&str; 4] = ["instruction", "context", "response", "category"];

fn spec(sources: &str) -> DataSpec {
    let text = format!("name = \"t\"\n[model]\nbase = \"b\"\n{sources}");
    Recipe::parse(&text, Path::new("t.toml"), &[]).unwrap().data
}

fn dolly(path: &Path) -> DataSpec {
    spec(&format!("[data.sources.dolly]\npath = {:?}\n", path.display().to_string()))
}

fn collected(spec: &DataSpec) -> Collected {
    let mut found = collect(spec).unwrap();
    assert_eq!(found.len(), 1);
    found.remove(0)
}

/// What an example says, whatever file and record it stood in.
fn said(examples: &[Example]) -> Vec<Example> {
    examples.iter().map(|one| Example { file: 0, record: 0, ..one.clone() }).collect()
}

fn records() -> Vec<Value> {
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/sample/dolly.jsonl");
    let text = fs::read_to_string(sample).unwrap();
    let mut records: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // What tables find hard: quotes, line breaks, delimiters, other scripts.
    records.push(json!({"instruction": "Say \"a, b\"\nand; c\td", "context": "é, 東\r\n\"x\"", "response": "a\n\nb", "category": "open_qa"}));
    records
}

fn batch(records: &[Value]) -> RecordBatch {
    let column = |field: &str| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(records.iter().map(|record| record[field].as_str().unwrap())))
    };
    RecordBatch::try_from_iter(FIELDS.map(|field| (field, column(field)))).unwrap()
}

fn parquet(path: &Path, records: &[Value]) {
    let batch = batch(records);
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

fn arrow_file(path: &Path, records: &[Value]) {
    let batch = batch(records);
    let mut writer = FileWriter::try_new(File::create(path).unwrap(), &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
}

fn arrow_stream(path: &Path, records: &[Value]) {
    let batch = batch(records);
    let mut writer = StreamWriter::try_new(File::create(path).unwrap(), &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
}

fn delimited(delimiter: &str, records: &[Value]) -> String {
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let row = |record: &Value| FIELDS.map(|field| quoted(record[field].as_str().unwrap())).join(delimiter);
    let rows: Vec<String> = records.iter().map(row).collect();
    format!("{}\n{}\n", FIELDS.join(delimiter), rows.join("\n"))
}

#[test]
fn every_form_of_a_dump_gives_the_same_examples() {
    let records = records();
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    };
    let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
    let wanted = collected(&dolly(&file("a.jsonl", lines.as_bytes())));
    assert_eq!(wanted.examples.len(), records.len());

    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(lines.as_bytes()).unwrap();
    let mut forms = vec![
        file("a.json", json!(records).to_string().as_bytes()),
        file("b.json", json!({ "train": records }).to_string().as_bytes()),
        file("a.jsonl.gz", &gzip.finish().unwrap()),
        file("a.jsonl.zst", &zstd::encode_all(lines.as_bytes(), 3).unwrap()),
        file("a.csv", delimited(",", &records).as_bytes()),
        file("a.tsv", delimited("\t", &records).as_bytes()),
        file("b.csv", format!("\u{feff}{}", delimited(";", &records)).as_bytes()),
    ];
    for (name, write) in
        [("a.parquet", parquet as fn(&Path, &[Value])), ("a.arrow", arrow_file), ("b.arrow", arrow_stream)]
    {
        let path = folder.path().join(name);
        write(&path, &records);
        forms.push(path);
    }
    // As `datasets` saves them: Arrow streams beside notes, with splits and without.
    let half = records.len() / 2;
    let saved = folder.path().join("saved");
    let split = saved.join("train");
    fs::create_dir_all(&split).unwrap();
    for (shard, part) in [&records[..half], &records[half..]].into_iter().enumerate() {
        arrow_stream(&split.join(format!("data-{shard:05}-of-00002.arrow")), part);
    }
    let names =
        ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"].map(|name| json!({"filename": name}));
    file("saved/train/state.json", json!({"_data_files": names}).to_string().as_bytes());
    file("saved/train/dataset_info.json", b"{}");
    file("saved/dataset_dict.json", b"{\"splits\": [\"train\", \"test\"]}");
    forms.extend([saved, split]);
    // As the hub holds them.
    let hub = folder.path().join("hub/data");
    fs::create_dir_all(&hub).unwrap();
    for (shard, part) in [&records[..half], &records[half..]].into_iter().enumerate() {
        parquet(&hub.join(format!("train-{shard:05}-of-00002.parquet")), part);
    }
    forms.push(folder.path().join("hub"));
    for form in &forms {
        let found = collected(&dolly(form));
        assert_eq!((found.read, &found.dropped), (wanted.read, &wanted.dropped), "{}", form.display());
        assert!(said(&found.examples) == said(&wanted.examples), "{}", form.display());
    }
    let sharded = collected(&dolly(&folder.path().join("hub")));
    assert_eq!(sharded.inputs.len(), 2);
    let last = sharded.examples.last().unwrap();
    assert_eq!((last.file, last.record as usize), (1, records.len() - half));
}

#[test]
fn a_card_makes_a_source_of_any_table() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("faq.csv"), "id,q,a\n7,Why?,So.\n7,How?,Thus.\n").unwrap();
    fs::write(path("faq.toml"), "title = \"Our FAQ\"\nlicence = \"LicenseRef-ours\"\ncommercial_use = true\n[fields]\ninstruction = \"q\"\nresponse = \"a\"\ndocument = \"id\"\n").unwrap();
    let text = format!("[data.sources.faq]\ncard = {:?}\npath = {:?}\n", path("faq.toml"), path("faq.csv"));
    let found = collected(&spec(&text));
    assert_eq!((found.name.as_str(), found.card.licence.as_str()), ("faq", "LicenseRef-ours"));
    let documents: Vec<&str> = found.examples.iter().map(|one| one.document.as_str()).collect();
    assert_eq!(documents, ["7", "7"]);
    fs::write(path("faq.toml"), "title = \"t\"\nlicence = \"MIT\"\ncommercial_use = true\n[fields]\ninstruction = \"question\"\nresponse = \"a\"\n").unwrap();
    let told = granite::error::render(&collect(&spec(&text)).unwrap_err());
    assert!(
        told.contains("source `faq`")
            && told.contains("it has no field `question`; its fields are `id`, `q`, `a`"),
        "{told}"
    );
    let told = Recipe::parse(
        "name = \"t\"\n[model]\nbase = \"b\"\n[data.sources.mine]\npath = \"x\"\n",
        Path::new("t.toml"),
        &[],
    );
    let told = told.unwrap_err().to_string();
    assert!(told.contains("`mine` is not built in") && told.contains("needs a `card`"), "{told}");
}

#[test]
fn so_many_bad_records_are_tolerated_and_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.jsonl");
    let good = "{\"instruction\": \"q\", \"context\": \"\", \"response\": \"a\", \"category\": \"x\"}";
    fs::write(
        &path,
        format!("{good}\n{{\"instruction\": 1}}\n{}\n{{\"broken\n{good}\n", good.replace("\"q\"", "\"p\"")),
    )
    .unwrap();
    let told = granite::error::render(&collect(&dolly(&path)).unwrap_err());
    assert!(told.contains("d.jsonl") && told.contains("record 2"), "{told}");
    let tolerating = |count| DataSpec { skip_bad: count, ..dolly(&path) };
    let told = granite::error::render(&collect(&tolerating(1)).unwrap_err());
    assert!(told.contains("more than 1 records are bad") && told.contains("record 4"), "{told}");
    // A file that is cut has not more bad records: what is there of it is no whole.
    let whole = fs::read(&path).unwrap();
    let packed = zstd::encode_all(whole.as_slice(), 3).unwrap();
    let cut = folder.path().join("cut.jsonl.zst");
    fs::write(&cut, &packed[..packed.len() - 4]).unwrap();
    let told = granite::error::render(&collect(&DataSpec { skip_bad: 2, ..dolly(&cut) }).unwrap_err());
    assert!(told.contains("cut.jsonl.zst") && !told.contains("records are bad"), "{told}");
    let found = collected(&tolerating(2));
    assert_eq!((found.read, found.examples.len(), found.dropped[&Reason::Bad]), (5, 3, 2));
    let skipped: Vec<u32> = found.skipped.iter().map(|one| one.record).collect();
    assert_eq!(skipped, [2, 4]);
    assert!(found.skipped[0].reason.contains("invalid type"), "{:?}", found.skipped);
}

/// Upstream trains on both files of its folder.
#[test]
fn spiders_folder_and_its_files_are_the_same() {
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/sample/spider");
    let folder = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(sample.join("train_spider.json")).unwrap();
    let records: Vec<Value> = serde_json::from_str(&text).unwrap();
    let (first, others) = records.split_at(records.len() / 2);
    fs::write(folder.path().join("train_spider.json"), json!(first).to_string()).unwrap();
    fs::write(folder.path().join("train_others.json"), json!(others).to_string()).unwrap();
    fs::copy(sample.join("tables.json"), folder.path().join("tables.json")).unwrap();
    let whole = spec(&format!(
        "[data.sources.spider]\npath = {:?}\ntables = {:?}\n",
        sample.join("train_spider.json"),
        sample.join("tables.json")
    ));
    let wanted = said(&collected(&whole).examples);
    let of_folder = spec(&format!("[data.sources.spider]\npath = {0:?}\ntables = {0:?}\n", folder.path()));
    let found = collected(&of_folder);
    assert!(said(&found.examples) == wanted);
    assert_eq!(found.inputs.len(), 3);
    let files = ["train_spider.json", "train_others.json"].map(|name| folder.path().join(name));
    let listed = spec(&format!(
        "[data.sources.spider]\npath = [{:?}, {:?}]\ntables = {:?}\n",
        files[0],
        files[1],
        folder.path()
    ));
    assert!(said(&collected(&listed).examples) == wanted);
}

/// The conversations at hand, upstream's and those of the re-packaging, none in both; so upstream's are re-packaged here:
/// as the flattened form has them, and as files of turns.
#[test]
fn conversations_agree_with_their_other_forms() {
    let Some(data) = real_data("conversations in other forms") else { return };
    let upstream = data.join("dumps/convfinqa/train.json");
    let records: Vec<Value> = serde_json::from_slice(&fs::read(&upstream).unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let convfinqa = |path: &Path| {
        collected(&spec(&format!(
            "[data.sources.convfinqa]\npath = {:?}\ntarget = \"answer\"\n",
            path.display().to_string()
        )))
    };
    let wanted = convfinqa(&upstream);
    let mut turns = Vec::new();
    for record in &records {
        let asked = record["annotation"]["dialogue_break"].as_array().unwrap();
        for turn in 0..asked.len() {
            let mut one = record.clone();
            one["annotation"]["cur_dial"] = json!(asked[..=turn]);
            turns.push(one);
        }
    }
    let path = folder.path().join("train_turn.json");
    fs::write(&path, json!(turns).to_string()).unwrap();
    let found = convfinqa(&path);
    assert!(said(&found.examples) == said(&wanted.examples));
    assert_eq!(found.dropped[&Reason::EarlierTurn], turns.len() - records.len());

    let flat: Vec<Value> = records
        .iter()
        .map(|record| {
            let rows = record["table"].as_array().unwrap();
            let row = |row: &Value| row.as_array().unwrap().iter().map(|cell| cell.as_str().unwrap()).collect::<Vec<_>>().join(" | ");
            json!({
                "filename": record["filename"], "pre_text": record["pre_text"], "post_text": record["post_text"],
                "table": rows.iter().map(row).collect::<Vec<_>>().join("\n"),
                "questions": record["annotation"]["dialogue_break"],
                "answer": record["annotation"]["exe_ans_list"].as_array().unwrap().last(),
            })
        })
        .collect();
    let path = folder.path().join("flat.json");
    fs::write(&path, json!(flat).to_string()).unwrap();
    let found = convfinqa(&path);
    assert_eq!(found.examples.len(), wanted.examples.len());
    for (one, other) in found.examples.iter().zip(&wanted.examples) {
        assert_eq!(one.document, other.document);
        assert_eq!(one.messages.last(), other.messages.last(), "the last answer");
        assert!(one.messages[0].content.ends_with(
            &other.messages[other.messages.len() - 2].content
                [other.messages[other.messages.len() - 2].content.len().saturating_sub(20)..]
        ));
    }
}
