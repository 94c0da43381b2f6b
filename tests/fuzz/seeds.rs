//! Whole files of each kind, for the damage to begin with, and the words of their formats.

use std::fs;
use std::io::Write as _;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, BooleanArray, Date32Array, DictionaryArray, Float32Array, Int64Array, ListBuilder, NullArray,
    RecordBatch, StringArray, StringBuilder, StringViewArray, StructArray, TimestampMillisecondArray,
};
use arrow::datatypes::{DataType, Field, Int32Type};
use arrow::ipc::writer::{FileWriter, StreamWriter};
use granite::checkpoint::form::Form;
use granite::checkpoint::merge::{self, MergeOptions};
use granite::checkpoint::{adapter, base::BaseModel};
use granite::data::manifest::{FORMAT_VERSION, Manifest, SplitReport};
use granite::data::store::{self, PackedRow, Split};
use granite::model::batch::Sequence;
use granite::recipe::{DataSpec, Quantization};

use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;

use crate::targets::fixtures;

/// Seeds and words of a target.
pub fn of(target: &str) -> (Vec<Vec<u8>>, &'static [&'static str]) {
    match target {
        "records" => (dumps(), JSON),
        "columns" => (columns(), COLUMNS),
        "saved_folder" => (NOTES.map(|text| text.as_bytes().to_vec()).to_vec(), JSON),
        "sources" => (source_dumps(), JSON),
        "card" => (cards(), TOML),
        "schemas" => (samples(&["spider/tables.json"]), JSON),
        "answer" => (ANSWERS.map(|text| text.as_bytes().to_vec()).to_vec(), WORDS),
        "recipe" => (recipes(), TOML),
        "template" => (TEMPLATES.iter().map(|text| text.as_bytes().to_vec()).collect(), JINJA),
        "gguf" => (files(&["gguf/tiny-granite.gguf", "gguf/tiny-llama.gguf"]), GGUF),
        "safetensors" => {
            (files(&["nf4.safetensors", "tiny-granite/adapter/adapter_model.safetensors"]), SAFETENSORS)
        }
        "weights" => (vec![four_bits()], SAFETENSORS),
        "model_config" => (files(&["tiny-granite/config.json", "tiny-llama/config.json"]), JSON),
        "adapter_config" => (files(&["tiny-granite/adapter/adapter_config.json"]), JSON),
        "adapter_tensors" => (files(&["tiny-granite/adapter/adapter_model.safetensors"]), SAFETENSORS),
        "tokenizer_json" => (files(&["tiny-granite/tokenizer.json", "tiny-llama/tokenizer.json"]), JSON),
        "tokenizer_config" => {
            (files(&["tiny-granite/tokenizer_config.json", "tiny-llama/tokenizer_config.json"]), JSON)
        }
        "dataset_rows" => (dataset(), JSON),
        "run_state" => (vec![STATE.to_vec(), files(&["optimizers.safetensors"]).remove(0)], JSON),
        "nf4_cache" => {
            (vec![CACHE.to_vec(), files(&["tiny-granite/model.safetensors"]).remove(0)], SAFETENSORS)
        }
        other => panic!("there is no target `{other}`"),
    }
}

const JSON: &[&str] = &[
    "[", "]", "{", "}", "\"", ",", ":", "null", "[[[[[[[[", "{\"a\":", "\\ud800", "\u{feff}", "\u{0}",
    "1e308", "-0", "\n",
];
const TOML: &[&str] = &[
    "[model]\n",
    "[[x]]\n",
    "= ",
    "\"\"\"",
    "1979-05-27",
    "inf",
    "nan",
    "a.b.c = 1\n",
    "{",
    "[[[[",
    "\u{0}",
];
const JINJA: &[&str] = &[
    "{% for i in range(99999) %}",
    "{% endfor %}",
    "{% for m in messages %}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% set x = 'aaaaaaaa' * 1000 %}",
    "{{ x * 99999999 }}",
    "{{ messages | tojson(indent=4000000000) }}",
    "{{ messages[-1].content[::0] }}",
    "{{ 1 // 0 }}",
    "{{ 2 ** 9999 }}",
    "((((((((((",
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "{{ strftime_now('%') }}",
    "{{ raise_exception('x') }}",
    "{{ messages[0].content.split('') }}",
    "{{ '%s' | format(1) }}",
    "{% if true %}",
    "{% endif %}",
    "| replace('', messages)",
];
const COLUMNS: &[&str] = &[
    "PAR1",
    "ARROW1",
    "\u{0}\u{0}\u{0}\u{0}",
    "text",
    "turns",
    "kind",
    "element",
    "pandas",
    "ARROW:schema",
    "UTC",
    "+01:30",
];
const WORDS: &[&str] = &[
    "SELECT ",
    " FROM ",
    " WHERE ",
    " HAVING ",
    " GROUP BY ",
    " ORDER BY ",
    " LIMIT ",
    " BETWEEN ",
    " AND ",
    " OR ",
    " NOT ",
    " IN (",
    "DISTINCT ",
    "UNION ",
    "YEAR(CURDATE())",
    "> =",
    "```sql\n",
    "```",
    "--",
    "/*",
    "'",
    "\"",
    "[",
    ";",
    "add(",
    "divide(",
    "#0",
    "const_100",
    "const_m1",
    "table_max(",
    "exp(",
    "%",
    "$",
    "1,234.5",
    "-",
    "none",
    ")",
    ", ",
];
const ANSWERS: [&str; 5] = [
    "```sql\nSELECT DISTINCT a, count(*) FROM t JOIN u ON t.x = u.x WHERE b BETWEEN 1 AND 2 OR NOT c LIKE 'x' GROUP BY a HAVING count(*) > 2 ORDER BY a DESC LIMIT 3;\n```",
    "SELECT a FROM t WHERE b > = (SELECT max(b) FROM u) UNION SELECT YEAR(CURDATE()) -- all",
    "subtract(164, 189), divide(#0, 189), table_max(net sales, none), exp(2, const_m1)",
    "The answer is $ 1,234.50, which is -3.2% of 2e3.",
    "#### 42\n\n[\"x\"] /* SELECT",
];
const NOTES: [&str; 2] = [
    r#"{"_data_files": [{"filename": "data-00000-of-00002.arrow"}], "_fingerprint": "x", "_split": "train", "_indices_files": null}"#,
    r#"{"splits": ["test", "train"]}"#,
];
const GGUF: &[&str] =
    &["GGUF", "general.alignment", "tokenizer.ggml.tokens", "llama.block_count", "\u{9}\u{0}\u{0}\u{0}"];
const SAFETENSORS: &[&str] = &[
    "\"data_offsets\":[0,18446744073709551615]",
    "\"shape\":[4294967296,4294967296]",
    "\"shape\":[]",
    "\"dtype\":\"F64\"",
    "\"dtype\":\"U8\"",
    "\"dtype\":\"BOOL\"",
    "{",
    "}",
    ".quant_state.bitsandbytes__nf4",
    "\"__metadata__\":{}",
];

/// None has a `namespace`: one that is made to hold itself overflows the stack of minijinja, which has no guard against it.
const TEMPLATES: [&str; 3] = [
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{%- set found = false %}{% for m in messages %}{% if loop.first %}{% set found = true %}{% endif %}{{ m | tojson }}{{ m.content|trim ~ found }}{% endfor %}",
    "{% macro turn(m, depth=0) %}{{ m.role.upper() }}: {{ m.content.replace('a', 'b') }}{% endmacro %}{% for m in messages[1:] %}{{ turn(m) }}{% else %}none{% endfor %}{{ range(3) | list | join(',') }}",
];

const STATE: &[u8] = br#"{"format_version": 1, "step": 1, "epoch_loss": [1.5, 20], "identity": {"lora": {"rank": 4}}, "threads": 2}"#;
const CACHE: &[u8] = br#"{"format_version": 1, "base": "base", "digest": "00"}"#;

fn files(names: &[&str]) -> Vec<Vec<u8>> {
    names.iter().map(|name| fs::read(fixtures().join(name)).unwrap()).collect()
}

fn recipes() -> Vec<Vec<u8>> {
    ["tiny.toml", "smollm2-135m-cpu.toml", "granite-3.1-8b-qlora.toml"]
        .iter()
        .map(|name| fs::read(fixtures().join("../../recipes").join(name)).unwrap())
        .collect()
}

fn samples(names: &[&str]) -> Vec<Vec<u8>> {
    names.iter().map(|name| fs::read(fixtures().join("../../datasets/sample").join(name)).unwrap()).collect()
}

fn cards() -> Vec<Vec<u8>> {
    let known = fs::read(fixtures().join("../../datasets/convfinqa.toml")).unwrap();
    vec![crate::targets::CARD.as_bytes().to_vec(), known]
}

/// Records of every source.
fn source_dumps() -> Vec<Vec<u8>> {
    let talk =
        br#"[{"a": {"turns": [{"who": "user", "said": "2 + 2?"}, {"who": "assistant", "said": "4"}]}}]"#;
    let names = [
        "dolly.jsonl",
        "finance_alpaca.json",
        "code_alpaca.json",
        "convfinqa/train.json",
        "spider/train_spider.json",
    ];
    let mut dumps = samples(&names);
    dumps.push(talk.to_vec());
    dumps
}

/// One table in each form.
fn columns() -> Vec<Vec<u8>> {
    let mut turns = ListBuilder::new(StringBuilder::new());
    turns.append_value([Some("a"), None]);
    turns.append_null();
    let kinds: DictionaryArray<Int32Type> = vec![Some("x"), Some("y")].into_iter().collect();
    let role = Arc::new(Field::new("role", DataType::Utf8, true));
    let message = StructArray::from(vec![(role, Arc::new(StringArray::from(vec!["user", "x"])) as ArrayRef)]);
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("text", Arc::new(StringArray::from(vec![Some("a"), None]))),
        ("view", Arc::new(StringViewArray::from(vec!["longer than twelve bytes", ""]))),
        ("id", Arc::new(Int64Array::from(vec![i64::MAX, -1]))),
        ("share", Arc::new(Float32Array::from(vec![0.1, f32::NAN]))),
        ("good", Arc::new(BooleanArray::from(vec![true, false]))),
        ("day", Arc::new(Date32Array::from(vec![0, 20_000]))),
        ("time", Arc::new(TimestampMillisecondArray::from(vec![0, 1_500]).with_timezone("Europe/Zurich"))),
        ("turns", Arc::new(turns.finish())),
        ("message", Arc::new(message)),
        ("kind", Arc::new(kinds)),
        ("nothing", Arc::new(NullArray::new(2))),
    ];
    let columns = columns.into_iter().map(|(name, column)| (name, column, true));
    let batch = RecordBatch::try_from_iter_with_nullable(columns).unwrap();
    let schema = batch.schema();
    let parquet = |compression| {
        let properties = WriterProperties::builder().set_compression(compression).build();
        let mut writer = ArrowWriter::try_new(Vec::new(), schema.clone(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.into_inner().unwrap()
    };
    let mut stream = StreamWriter::try_new(Vec::new(), &schema).unwrap();
    stream.write(&batch).unwrap();
    let mut file = FileWriter::try_new(Vec::new(), &schema).unwrap();
    file.write(&batch).unwrap();
    let mut found = files(&["columns/packed.parquet", "columns/prefixes.parquet", "columns/spark.parquet"]);
    found.extend([
        parquet(Compression::SNAPPY),
        parquet(Compression::UNCOMPRESSED),
        stream.into_inner().unwrap(),
        file.into_inner().unwrap(),
    ]);
    found
}

/// The same records as an array, wrapped, as lines, as tables, in gzip, zstd and a zip.
fn dumps() -> Vec<Vec<u8>> {
    let records = r#"{"instruction": "Add.", "input": "2, 2", "output": "4 \u00e9 \ud83d\ude00"}, {"a": [1, -2.5e3, null, {"b": true}]}"#;
    let array = format!("[{records}]");
    let lines = records.replace("}, {", "}\n{");
    let wrapped = format!(r#"{{"version": 1, "data": {array}}}"#);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(lines.as_bytes()).unwrap();
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    zip.start_file("folder/train.json", zip::write::SimpleFileOptions::default()).unwrap();
    zip.write_all(array.as_bytes()).unwrap();
    let zip = zip.finish().unwrap().into_inner();
    let zstd = zstd::encode_all(lines.as_bytes(), 1).unwrap();
    let csv = b"id,text\r\n1,\"two \"\"words\"\",\n2\n\"3\",\"a\nb\"\n".to_vec();
    let tsv = b"id\ttext\n1\ttwo words\n".to_vec();
    let plain = [array.into_bytes(), lines.into_bytes(), wrapped.into_bytes(), csv, tsv];
    plain.into_iter().chain([gzip.finish().unwrap(), zstd, zip]).collect()
}

/// A manifest that nothing was prepared for.
pub fn manifest() -> Manifest {
    Manifest {
        format_version: FORMAT_VERSION,
        program: "granite test".to_string(),
        recipe: DataSpec::default(),
        model: "a/b".to_string(),
        model_vocab_size: Some(256),
        tokenizer_vocab_size: 256,
        tokenizer_hash: "0".repeat(64),
        sequence_length: 16,
        sources: Vec::new(),
        train: SplitReport::default(),
        validation: SplitReport::default(),
        inputs: Vec::new(),
    }
}

/// Rows as parquet, and a manifest.
fn dataset() -> Vec<Vec<u8>> {
    let sequence = |ids: Vec<u32>| Sequence { loss_mask: vec![true; ids.len()], input_ids: ids, source: 0 };
    let row = |at: u32| PackedRow {
        sequences: vec![sequence(vec![at, 1, 2]), sequence(vec![3; 5])],
        examples: vec![at, at + 1],
    };
    let rows: Vec<PackedRow> = (0..20).map(row).collect();
    let folder = tempfile::tempdir().unwrap();
    store::write(folder.path(), &manifest(), [(Split::Train, &[]), (Split::Validation, &rows)], &[]).unwrap();
    ["validation.parquet", "manifest.json"].map(|name| fs::read(folder.path().join(name)).unwrap()).to_vec()
}

/// The tiny model merged to bitsandbytes' 4 bits.
fn four_bits() -> Vec<u8> {
    let model = fixtures().join("tiny-granite");
    let base = BaseModel::open(model.to_str().unwrap()).unwrap();
    let adapter = adapter::load(&model.join("adapter")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options = MergeOptions { from: Quantization::Nf4, form: Form::Nf4, device: tch::Device::Cpu };
    merge::write(folder.path(), &base, &adapter, &options).unwrap();
    fs::read(folder.path().join("model.safetensors")).unwrap()
}
