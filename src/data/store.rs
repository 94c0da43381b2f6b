//! A prepared dataset on disk: parquet with zstd, which any tool can look into, and a manifest.
//!
//! ```text
//! train.parquet, validation.parquet   one row per packed row
//!   input_ids    list<uint32>   the tokens of its sequences, end to end
//!   loss_mask    list<bool>     which of them are supervised
//!   seq_lengths  list<uint32>   tokens of each sequence
//!   seq_sources  list<uint16>   its source: index into the manifest's list
//!   seq_examples list<uint32>   its example: row of examples.parquet
//! examples.parquet                    one row per example: source, record, document or its hash, split, tokens
//! manifest.json
//! prepare_report.html                 the same for people
//! screened.jsonl                      one line per duplicate or contaminated example, with what it repeats
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail};
use arrow::array::{
    Array, ArrayRef, ArrowPrimitiveType, AsArray as _, BooleanArray, ListArray, RecordBatch, StringArray,
    UInt16Array, UInt32Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Schema, UInt16Type, UInt32Type};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::RowSelector;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use super::decoding::decoding;
use super::example::Role;
use super::fit::Turn;
use super::manifest::{FORMAT_VERSION, Manifest};
use super::parquet_file::ParquetFile;
use super::tokenizer::ChatTokenizer;
use crate::error::user_error;
use crate::hex::short;
use crate::model::batch::Sequence;

/// Rows that are compressed and decompressed together: few enough to read one at a time, enough to compress well.
const ROWS_PER_GROUP: usize = 512;

/// What a dataset's folder is known by.
pub const MANIFEST: &str = "manifest.json";
/// Duplicates and contaminated examples, one JSON object a line; written by `prepare`, read by people.
pub const SCREENED: &str = "screened.jsonl";
/// The page for people.
pub const REPORT: &str = "prepare_report.html";
const EXAMPLES: &str = "examples.parquet";

/// What an example is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Split {
    /// Trained on.
    Train,
    /// Held out.
    Validation,
}

impl Split {
    /// Both, in the order of the manifest.
    pub const ALL: [Self; 2] = [Self::Train, Self::Validation];

    /// As files and reports spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
        }
    }

    fn file(self) -> String {
        format!("{}.parquet", self.name())
    }
}

/// Sequences that go through the model side by side, at most `sequence_length` tokens together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PackedRow {
    /// The sequences.
    pub sequences: Vec<Sequence>,
    /// The example of each: its row in `examples.parquet`.
    pub examples: Vec<u32>,
}

impl PackedRow {
    /// Tokens of all its sequences.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.input_ids.len()).sum()
    }

    /// Whether a token of it has something to predict it from, and is supervised.
    pub fn is_supervised(&self) -> bool {
        self.sequences.iter().any(|sequence| sequence.loss_mask.iter().skip(1).any(|is_on| *is_on))
    }
}

/// Where an example came from: one row of `examples.parquet`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lineage {
    /// Index into the manifest's sources.
    pub source: u16,
    /// Record of the source's file, counted from 1.
    pub record: u32,
    /// The document that decided its split, by [`Example::document_id`](super::example::Example::document_id).
    pub document: String,
    /// What it is for.
    pub split: Split,
    /// Length.
    pub tokens: u32,
    /// Supervised tokens.
    pub supervised_tokens: u32,
    /// It lost context to fit.
    pub shortened: bool,
    /// The file it was read from: index into the manifest's inputs.
    pub input: u32,
    /// Where its messages lie among its tokens.
    pub turns: Vec<Turn>,
}

/// A prepared dataset, opened: the manifest is read, the rows are not.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Where it lies.
    pub folder: PathBuf,
    /// What it says about itself.
    pub manifest: Manifest,
}

impl Dataset {
    /// Opens the folder that `granite prepare` wrote.
    ///
    /// # Errors
    /// When it is none, or another version of the program wrote it.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(user_error(
                    format!("no dataset in `{}`: it has no `{MANIFEST}`", folder.display()),
                    "run `granite prepare` with this recipe first",
                ));
            }
            other => other.with_context(|| format!("cannot read `{}`", path.display()))?,
        };
        let manifest = parse_manifest(&text).with_context(|| format!("in `{}`", path.display()))?;
        Ok(Self { folder: folder.to_path_buf(), manifest })
    }

    /// Reads the rows of a split, in their stored order.
    ///
    /// # Errors
    /// When the file is missing or damaged.
    pub fn rows(&self, split: Split) -> Result<Vec<PackedRow>> {
        let path = self.folder.join(split.file());
        read_rows(&path).with_context(|| format!("cannot read `{}`", path.display()))
    }

    /// Reads one row of a split.
    ///
    /// # Errors
    /// When there is no such row, or the file is missing or damaged.
    pub fn row(&self, split: Split, row: usize) -> Result<PackedRow> {
        let path = self.folder.join(split.file());
        let batch = one_row(&path, row).with_context(|| format!("in `{}`", path.display()))?;
        row_of(&batch, 0).with_context(|| format!("row {row} of `{}` is damaged", path.display()))
    }

    /// Reads where one example came from.
    ///
    /// # Errors
    /// When there is no such example, the file is missing or damaged, or an older program wrote it.
    pub fn example(&self, example: u32) -> Result<Lineage> {
        let path = self.folder.join(EXAMPLES);
        let batch = one_row(&path, example as usize).with_context(|| format!("in `{}`", path.display()))?;
        lineage_of(&batch).with_context(|| format!("example {example} of `{}`", path.display()))
    }

    /// Names of the sources, by the index that sequences carry.
    pub fn source_names(&self) -> Vec<&str> {
        self.manifest.sources.iter().map(|source| source.name.as_str()).collect()
    }

    /// Refuses a tokenizer or template other than the one that the dataset was prepared with.
    ///
    /// # Errors
    /// When they differ: the dataset's ids would mean other words to the model.
    pub fn check_tokenizer(&self, tokenizer: &ChatTokenizer) -> Result<()> {
        let (ours, theirs) = (&self.manifest.tokenizer_hash, tokenizer.hash());
        if ours == theirs {
            return Ok(());
        }
        Err(user_error(
            format!(
                "dataset `{}` was prepared for `{}` with another tokenizer or template: its hash is {}, the model's is {}",
                self.folder.display(),
                self.manifest.model,
                short(ours),
                short(theirs),
            ),
            "run `granite prepare` again with this recipe, or name another dataset in `data.dataset`",
        ))
    }
}

fn parse_manifest(text: &[u8]) -> Result<Manifest> {
    let value: serde_json::Value = serde_json::from_slice(text).context("the manifest is no JSON")?;
    let version = value.get("format_version").and_then(serde_json::Value::as_u64);
    if version != Some(u64::from(FORMAT_VERSION)) {
        let found = version.map_or_else(|| "none".to_string(), |version| version.to_string());
        return Err(user_error(
            format!("the dataset's format version is {found}, expected {FORMAT_VERSION}"),
            "run `granite prepare` again",
        ));
    }
    Ok(serde_json::from_value(value)?)
}

/// Writes a dataset's files into a folder.
///
/// # Errors
/// When a file cannot be written.
pub fn write(
    folder: &Path,
    manifest: &Manifest,
    splits: [(Split, &[PackedRow]); 2],
    examples: &[Lineage],
) -> Result<()> {
    for (split, rows) in splits {
        write_rows(&folder.join(split.file()), rows)?;
    }
    write_examples(&folder.join(EXAMPLES), examples)?;
    let mut text = serde_json::to_vec_pretty(manifest)?;
    text.push(b'\n');
    let path = folder.join(MANIFEST);
    fs::write(&path, text).with_context(|| format!("cannot write `{}`", path.display()))
}

fn writer(path: &Path, schema: Arc<Schema>) -> Result<ArrowWriter<File>> {
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?))
        // Tens of thousands of different ids: a dictionary would be built and thrown away.
        .set_dictionary_enabled(false)
        .set_max_row_group_row_count(Some(ROWS_PER_GROUP))
        .set_created_by(concat!("granite ", env!("CARGO_PKG_VERSION")).to_string())
        .build();
    let file = File::create(path).with_context(|| format!("cannot write `{}`", path.display()))?;
    Ok(ArrowWriter::try_new(file, schema, Some(properties))?)
}

fn list_field(name: &str, item: DataType) -> Field {
    Field::new(name, DataType::List(Arc::new(Field::new_list_field(item, false))), false)
}

fn row_schema() -> Arc<Schema> {
    Arc::new(Schema::new(vec![
        list_field("input_ids", DataType::UInt32),
        list_field("loss_mask", DataType::Boolean),
        list_field("seq_lengths", DataType::UInt32),
        list_field("seq_sources", DataType::UInt16),
        list_field("seq_examples", DataType::UInt32),
    ]))
}

fn write_rows(path: &Path, rows: &[PackedRow]) -> Result<()> {
    let mut writer = writer(path, row_schema())?;
    for group in rows.chunks(ROWS_PER_GROUP) {
        writer.write(&row_batch(group)?)?;
    }
    writer.close().with_context(|| format!("cannot write `{}`", path.display()))?;
    Ok(())
}

fn row_batch(rows: &[PackedRow]) -> Result<RecordBatch> {
    let sequences = || rows.iter().flat_map(|row| &row.sequences);
    let by_token = || OffsetBuffer::from_lengths(rows.iter().map(PackedRow::tokens));
    let by_sequence = || OffsetBuffer::from_lengths(rows.iter().map(|row| row.sequences.len()));
    let ids: Vec<u32> = sequences().flat_map(|sequence| sequence.input_ids.iter().copied()).collect();
    let mask: Vec<bool> = sequences().flat_map(|sequence| sequence.loss_mask.iter().copied()).collect();
    let lengths: Vec<u32> =
        sequences().map(|sequence| u32::try_from(sequence.input_ids.len())).collect::<Result<_, _>>()?;
    let sources: Vec<u16> = sequences().map(|sequence| sequence.source).collect();
    let examples: Vec<u32> = rows.iter().flat_map(|row| row.examples.iter().copied()).collect();
    let columns = vec![
        list(by_token(), Arc::new(UInt32Array::from(ids)))?,
        list(by_token(), Arc::new(BooleanArray::from(mask)))?,
        list(by_sequence(), Arc::new(UInt32Array::from(lengths)))?,
        list(by_sequence(), Arc::new(UInt16Array::from(sources)))?,
        list(by_sequence(), Arc::new(UInt32Array::from(examples)))?,
    ];
    Ok(RecordBatch::try_new(row_schema(), columns)?)
}

fn list(offsets: OffsetBuffer<i32>, values: ArrayRef) -> Result<ArrayRef> {
    let item = Arc::new(Field::new_list_field(values.data_type().clone(), false));
    Ok(Arc::new(ListArray::try_new(item, offsets, values, None)?))
}

fn write_examples(path: &Path, examples: &[Lineage]) -> Result<()> {
    let schema = Arc::new(Schema::new(vec![
        Field::new("source", DataType::UInt16, false),
        Field::new("record", DataType::UInt32, false),
        Field::new("document", DataType::Utf8, false),
        Field::new("split", DataType::Utf8, false),
        Field::new("tokens", DataType::UInt32, false),
        Field::new("supervised_tokens", DataType::UInt32, false),
        Field::new("shortened", DataType::Boolean, false),
        Field::new("input", DataType::UInt32, false),
        list_field("turn_messages", DataType::UInt32),
        list_field("turn_roles", DataType::Utf8),
        list_field("turn_starts", DataType::UInt32),
        list_field("turn_ends", DataType::UInt32),
    ]));
    let turns = || examples.iter().flat_map(|one| &one.turns);
    let by_turn = || OffsetBuffer::from_lengths(examples.iter().map(|one| one.turns.len()));
    let numbers = |of: fn(&Turn) -> u32| Arc::new(turns().map(of).map(Some).collect::<UInt32Array>());
    let columns: Vec<ArrayRef> = vec![
        Arc::new(examples.iter().map(|one| Some(one.source)).collect::<UInt16Array>()),
        Arc::new(examples.iter().map(|one| Some(one.record)).collect::<UInt32Array>()),
        Arc::new(examples.iter().map(|one| Some(&one.document)).collect::<StringArray>()),
        Arc::new(examples.iter().map(|one| Some(one.split.name())).collect::<StringArray>()),
        Arc::new(examples.iter().map(|one| Some(one.tokens)).collect::<UInt32Array>()),
        Arc::new(examples.iter().map(|one| Some(one.supervised_tokens)).collect::<UInt32Array>()),
        Arc::new(examples.iter().map(|one| Some(one.shortened)).collect::<BooleanArray>()),
        Arc::new(examples.iter().map(|one| Some(one.input)).collect::<UInt32Array>()),
        list(by_turn(), numbers(|turn| turn.message))?,
        list(by_turn(), Arc::new(turns().map(|turn| Some(turn.role.as_str())).collect::<StringArray>()))?,
        list(by_turn(), numbers(|turn| turn.start))?,
        list(by_turn(), numbers(|turn| turn.end))?,
    ];
    let mut writer = writer(path, schema.clone())?;
    writer.write(&RecordBatch::try_new(schema, columns)?)?;
    writer.close().with_context(|| format!("cannot write `{}`", path.display()))?;
    Ok(())
}

fn read_rows(path: &Path) -> Result<Vec<PackedRow>> {
    decoding(|| decode_rows(path))
}

fn decode_rows(path: &Path) -> Result<Vec<PackedRow>> {
    let file = ParquetFile::open(File::open(path)?)?;
    let mut rows = Vec::new();
    for batch in file.read(ROWS_PER_GROUP, None)? {
        let batch = batch?;
        for at in 0..batch.num_rows() {
            rows.push(row_of(&batch, at).with_context(|| format!("row {} is damaged", rows.len()))?);
        }
    }
    Ok(rows)
}

/// One row of a file, without reading the rest.
fn one_row(path: &Path, row: usize) -> Result<RecordBatch> {
    decoding(|| decode_row(path, row))
}

fn decode_row(path: &Path, row: usize) -> Result<RecordBatch> {
    let file = ParquetFile::open(File::open(path)?)?;
    let rows = file.rows();
    if row >= rows {
        let way = if rows == 0 {
            "the file is empty".to_string()
        } else {
            format!("name a row from 0 to {}", rows - 1)
        };
        return Err(user_error(format!("there is no row {row}"), way));
    }
    let selection = vec![RowSelector::skip(row), RowSelector::select(1)];
    let mut reader = file.read(1, Some(selection.into()))?;
    Ok(reader.next().ok_or_else(|| anyhow!("row {row} is missing"))??)
}

/// The value of a number column in the first row.
fn number<T: ArrowPrimitiveType>(batch: &RecordBatch, column: &str) -> Result<T::Native> {
    let found = batch.column_by_name(column).and_then(|column| column.as_primitive_opt::<T>());
    let found = found.filter(|column| !column.is_empty()).map(|column| column.value(0));
    found.ok_or_else(|| without_column(column))
}

fn text(batch: &RecordBatch, column: &str) -> Result<String> {
    let found = batch.column_by_name(column).and_then(|column| column.as_string_opt::<i32>());
    let found = found.filter(|column| !column.is_empty()).map(|column| column.value(0).to_string());
    found.ok_or_else(|| without_column(column))
}

fn without_column(column: &str) -> anyhow::Error {
    user_error(
        format!("it has no column `{column}`"),
        "an older program wrote it: run `granite prepare` again",
    )
}

fn lineage_of(batch: &RecordBatch) -> Result<Lineage> {
    let shortened = batch.column_by_name("shortened").and_then(|column| column.as_boolean_opt());
    let split = text(batch, "split")?;
    Ok(Lineage {
        source: number::<UInt16Type>(batch, "source")?,
        record: number::<UInt32Type>(batch, "record")?,
        document: text(batch, "document")?,
        split: Split::ALL
            .into_iter()
            .find(|known| known.name() == split)
            .ok_or_else(|| anyhow!("its split is `{split}`, expected `train` or `validation`"))?,
        tokens: number::<UInt32Type>(batch, "tokens")?,
        supervised_tokens: number::<UInt32Type>(batch, "supervised_tokens")?,
        shortened: shortened.filter(|column| !column.is_empty()).is_some_and(|column| column.value(0)),
        input: number::<UInt32Type>(batch, "input")?,
        turns: turns_of(batch)?,
    })
}

fn turns_of(batch: &RecordBatch) -> Result<Vec<Turn>> {
    let numbers = |column: &str| u32_cell(batch, column, 0);
    let roles = cell(batch, "turn_roles", 0)?;
    let roles = roles.as_string_opt::<i32>().ok_or_else(|| anyhow!("`turn_roles` is no list of text"))?;
    let (messages, starts, ends) =
        (numbers("turn_messages")?, numbers("turn_starts")?, numbers("turn_ends")?);
    let turns = messages.iter().zip(roles.iter().flatten()).zip(starts.iter().zip(&ends));
    turns
        .map(|((message, role), (start, end))| {
            let role = Role::ALL.into_iter().find(|known| known.as_str() == role);
            let role = role.ok_or_else(|| anyhow!("a turn has an unknown role"))?;
            Ok(Turn { message: *message, role, start: *start, end: *end })
        })
        .collect()
}

/// The list of a column's row, or why there is none.
fn cell(batch: &RecordBatch, column: &str, row: usize) -> Result<ArrayRef> {
    let column = batch.column_by_name(column).ok_or_else(|| anyhow!("it has no column `{column}`"))?;
    let lists = column.as_list_opt::<i32>().ok_or_else(|| anyhow!("a column is no list"))?;
    Ok(lists.value(row))
}

fn u32_cell(batch: &RecordBatch, column: &str, row: usize) -> Result<Vec<u32>> {
    let cell = cell(batch, column, row)?;
    let values = cell.as_primitive_opt::<UInt32Type>();
    Ok(values.ok_or_else(|| anyhow!("`{column}` is no list of uint32"))?.values().to_vec())
}

fn row_of(batch: &RecordBatch, row: usize) -> Result<PackedRow> {
    let ids = u32_cell(batch, "input_ids", row)?;
    let mask = cell(batch, "loss_mask", row)?;
    let mask = mask.as_boolean_opt().ok_or_else(|| anyhow!("`loss_mask` is no list of bool"))?;
    let lengths = u32_cell(batch, "seq_lengths", row)?;
    let sources = cell(batch, "seq_sources", row)?;
    let sources = sources.as_primitive_opt::<UInt16Type>();
    let sources = sources.ok_or_else(|| anyhow!("`seq_sources` is no list of uint16"))?.values();
    let examples = u32_cell(batch, "seq_examples", row)?;
    let total: usize = lengths.iter().map(|length| *length as usize).sum();
    let agree = total == ids.len()
        && mask.len() == ids.len()
        && sources.len() == lengths.len()
        && examples.len() == lengths.len();
    if !agree {
        bail!("its lists disagree in length");
    }
    let mut sequences = Vec::with_capacity(lengths.len());
    let mut start = 0;
    for (length, source) in lengths.iter().zip(sources) {
        let end = start + *length as usize;
        sequences.push(Sequence {
            input_ids: ids[start..end].to_vec(),
            loss_mask: mask.slice(start, end - start).values().iter().collect(),
            source: *source,
        });
        start = end;
    }
    Ok(PackedRow { sequences, examples })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use super::*;
    use crate::data::manifest::SplitReport;
    use crate::recipe::DataSpec;

    fn sequence(ids: &[u32], source: u16) -> Sequence {
        let loss_mask = ids.iter().map(|id| id % 2 == 1).collect();
        Sequence { input_ids: ids.to_vec(), loss_mask, source }
    }

    fn manifest() -> Manifest {
        Manifest {
            format_version: FORMAT_VERSION,
            program: "granite test".to_string(),
            recipe: DataSpec::default(),
            model: "somewhere/some-model".to_string(),
            model_vocab_size: None,
            tokenizer_vocab_size: 10,
            tokenizer_hash: "0".repeat(64),
            sequence_length: 16,
            sources: Vec::new(),
            train: SplitReport::default(),
            validation: SplitReport::default(),
            inputs: Vec::new(),
        }
    }

    fn rows() -> Vec<PackedRow> {
        // More than one row group, rows of several shapes.
        (0..ROWS_PER_GROUP as u32 + 3)
            .map(|row| PackedRow {
                sequences: (0..=row % 3).map(|at| sequence(&[row, at, 1, 49_154], at as u16)).collect(),
                examples: (0..=row % 3).map(|at| row * 3 + at).collect(),
            })
            .collect()
    }

    fn lineage() -> Lineage {
        Lineage {
            source: 0,
            record: 1,
            document: "d".to_string(),
            split: Split::Train,
            tokens: 4,
            supervised_tokens: 2,
            shortened: false,
            input: 2,
            turns: vec![Turn { message: 0, role: Role::User, start: 1, end: 3 }],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let rows = rows();
        write(folder.path(), &manifest(), [(Split::Train, &rows), (Split::Validation, &[])], &[lineage()])
            .unwrap();
        let dataset = Dataset::open(folder.path()).unwrap();
        assert_eq!(dataset.manifest, manifest());
        assert_eq!(dataset.rows(Split::Train).unwrap(), rows);
        assert_eq!(dataset.row(Split::Train, ROWS_PER_GROUP + 1).unwrap(), rows[ROWS_PER_GROUP + 1]);
        assert_eq!(dataset.example(0).unwrap(), lineage());
        let text = crate::error::render(&dataset.row(Split::Train, 1 << 20).unwrap_err());
        assert!(text.contains("no row 1048576") && text.contains("from 0 to 514"), "{text}");
        assert_eq!(dataset.rows(Split::Validation).unwrap(), []);
    }

    #[test]
    fn a_folder_that_is_no_dataset_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let text = crate::error::render(&Dataset::open(folder.path()).unwrap_err());
        assert!(text.contains("no dataset in") && text.contains("hint: run `granite prepare`"), "{text}");
        fs::write(folder.path().join(MANIFEST), r#"{"format_version": 99}"#).unwrap();
        let text = crate::error::render(&Dataset::open(folder.path()).unwrap_err());
        assert!(text.contains("format version is 99, expected 1"), "{text}");
    }

    #[test]
    fn a_truncated_file_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &manifest(), [(Split::Train, &rows()), (Split::Validation, &[])], &[]).unwrap();
        let path = folder.path().join("train.parquet");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let error = Dataset::open(folder.path()).unwrap().rows(Split::Train).unwrap_err();
        assert!(crate::error::render(&error).contains("train.parquet"));
    }
}
