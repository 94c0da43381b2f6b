//! Parquet files and Arrow IPC, files and streams: rows of columns as JSON values.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::sync::Arc;

use anyhow::{Context as _, Error, Result};
use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{
    DataType, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type,
    UInt16Type, UInt32Type, UInt64Type,
};
use arrow::util::display::array_value_to_string;
use serde_json::{Map, Number, Value};

use super::ipc::{FileBatches, StreamBatches};
use super::json::following;
use super::{BUFFER, FETCH_AGAIN, Place, Raw, Sink};
use crate::data::decoding::decoding;
use crate::data::parquet_file::ParquetFile;
use crate::error::HintExt as _;

/// Rows that are decoded at once: a row may be pages of text.
const ROWS: usize = 256;

/// Reads a parquet file.
pub(super) fn parquet(file: File, sink: Sink<'_>) -> Result<()> {
    let damaged = "the parquet file is damaged or truncated";
    let open = || ParquetFile::open(file)?.read(ROWS, None);
    let batches = decoding(open).context(damaged).hint(FETCH_AGAIN)?;
    rows(batches.map(|batch| Ok(batch?)), damaged, sink)
}

/// Reads an Arrow IPC file, also called Feather.
pub(super) fn arrow_file(file: impl Read + Seek, sink: Sink<'_>) -> Result<()> {
    let damaged = "the Arrow file is damaged or truncated";
    let file = BufReader::with_capacity(BUFFER, file);
    rows(decoding(|| FileBatches::new(file)).context(damaged).hint(FETCH_AGAIN)?, damaged, sink)
}

/// Reads an Arrow IPC stream: what `datasets` writes.
pub(super) fn arrow_stream(stream: impl Read, sink: Sink<'_>) -> Result<()> {
    rows(StreamBatches::new(stream), "the Arrow stream is damaged or truncated", sink)
}

fn rows(
    mut batches: impl Iterator<Item = Result<RecordBatch>>,
    damaged: &'static str,
    sink: Sink<'_>,
) -> Result<()> {
    let mut number = 0;
    loop {
        let batch = decoding(|| batches.next().transpose());
        let batch = batch.with_context(|| format!("after record {number}: {damaged}")).hint(FETCH_AGAIN)?;
        let Some(batch) = batch else { return Ok(()) };
        let bytes = batch.get_array_memory_size() / batch.num_rows().max(1);
        let batch = Arc::new(batch);
        for at in 0..batch.num_rows() {
            number = following(number)?;
            sink(Place { record: number, line: None }, Raw::Row(Row { batch: batch.clone(), at, bytes }))?;
        }
    }
}

/// A row of a batch.
pub(super) struct Row {
    batch: Arc<RecordBatch>,
    at: usize,
    /// Its share of the batch.
    bytes: usize,
}

impl Row {
    /// What it takes of the memory.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// As a JSON object.
    pub(super) fn value(&self) -> Result<Value> {
        let schema = self.batch.schema();
        let names = schema.fields().iter().map(|field| field.name().clone());
        decoding(|| object(names.zip(self.batch.columns()), self.at))
    }
}

fn object<'a>(columns: impl Iterator<Item = (String, &'a ArrayRef)>, row: usize) -> Result<Value> {
    let cell = |(name, column): (String, &ArrayRef)| {
        let value = cell(column, row).with_context(|| format!("in column `{name}`"))?;
        Ok((name, value))
    };
    Ok(Value::Object(columns.map(cell).collect::<Result<Map<_, _>, Error>>()?))
}

/// A cell as a JSON value: what JSON has no word for, dates and decimals, as text; bytes that are no text as null.
fn cell(column: &ArrayRef, row: usize) -> Result<Value> {
    if column.is_null(row) {
        return Ok(Value::Null);
    }
    Ok(match column.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => column.as_boolean().value(row).into(),
        DataType::Int8 => column.as_primitive::<Int8Type>().value(row).into(),
        DataType::Int16 => column.as_primitive::<Int16Type>().value(row).into(),
        DataType::Int32 => column.as_primitive::<Int32Type>().value(row).into(),
        DataType::Int64 => column.as_primitive::<Int64Type>().value(row).into(),
        DataType::UInt8 => column.as_primitive::<UInt8Type>().value(row).into(),
        DataType::UInt16 => column.as_primitive::<UInt16Type>().value(row).into(),
        DataType::UInt32 => column.as_primitive::<UInt32Type>().value(row).into(),
        DataType::UInt64 => column.as_primitive::<UInt64Type>().value(row).into(),
        DataType::Float16 => narrow(column.as_primitive::<Float16Type>().value(row).to_f32()),
        DataType::Float32 => narrow(column.as_primitive::<Float32Type>().value(row)),
        DataType::Float64 => column.as_primitive::<Float64Type>().value(row).into(),
        DataType::Utf8 => column.as_string::<i32>().value(row).into(),
        DataType::LargeUtf8 => column.as_string::<i64>().value(row).into(),
        DataType::Utf8View => column.as_string_view().value(row).into(),
        DataType::Binary => text(column.as_binary::<i32>().value(row)),
        DataType::LargeBinary => text(column.as_binary::<i64>().value(row)),
        DataType::BinaryView => text(column.as_binary_view().value(row)),
        DataType::FixedSizeBinary(_) => text(column.as_fixed_size_binary().value(row)),
        DataType::List(_) => list(&column.as_list::<i32>().value(row))?,
        DataType::LargeList(_) => list(&column.as_list::<i64>().value(row))?,
        DataType::FixedSizeList(..) => list(&column.as_fixed_size_list().value(row))?,
        DataType::Struct(fields) => {
            object(fields.iter().map(|field| field.name().clone()).zip(column.as_struct().columns()), row)?
        }
        DataType::Map(..) => map(&column.as_map().value(row))?,
        DataType::Dictionary(..) => {
            let dictionary = column.as_any_dictionary();
            let keys = dictionary.normalized_keys();
            cell(dictionary.values(), *keys.get(row).context("a dictionary lacks a key")?)?
        }
        _ => array_value_to_string(column, row)?.into(),
    })
}

/// The digits that are meant: 0.1 in 32 bits is not 0.10000000149011612 in 64.
fn narrow(number: f32) -> Value {
    let wide: Option<f64> = number.to_string().parse().ok();
    wide.and_then(Number::from_f64).map_or(Value::Null, Value::Number)
}

fn text(bytes: &[u8]) -> Value {
    std::str::from_utf8(bytes).map_or(Value::Null, Value::from)
}

fn list(values: &ArrayRef) -> Result<Value> {
    Ok(Value::Array((0..values.len()).map(|at| cell(values, at)).collect::<Result<_>>()?))
}

/// A map's entries under their keys, in their order.
fn map(entries: &arrow::array::StructArray) -> Result<Value> {
    let (keys, values) = (entries.column(0), entries.column(1));
    let entry = |at| Ok((array_value_to_string(keys, at)?, cell(values, at)?));
    Ok(Value::Object((0..entries.len()).map(entry).collect::<Result<Map<_, _>, Error>>()?))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use std::io::Cursor;

    use arrow::array::{
        BinaryArray, BooleanArray, Date32Array, Decimal128Array, DictionaryArray, Float32Array, Float64Array,
        Int64Array, LargeStringArray, ListBuilder, NullArray, StringArray, StringBuilder, StringViewArray,
        StructArray, TimestampMicrosecondArray, TimestampMillisecondArray,
    };
    use arrow::datatypes::Field;
    use arrow::ipc::CompressionType;
    use arrow::ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
    use parquet::arrow::ArrowWriter;
    use parquet::basic::Compression;
    use parquet::file::properties::WriterProperties;
    use serde_json::json;

    use super::*;

    /// 2026-01-15 and 2026-07-15, 12:00 UTC, in milliseconds.
    const NOONS: [i64; 2] = [1_768_478_400_000, 1_784_116_800_000];

    /// Every kind of column that datasets have, two rows.
    fn batch() -> RecordBatch {
        let mut turns = ListBuilder::new(StringBuilder::new());
        turns.append_value([Some("a"), None]);
        turns.append_null();
        let role = Arc::new(Field::new("role", DataType::Utf8, true));
        let message =
            StructArray::from(vec![(role, Arc::new(StringArray::from(vec!["user", "ü"])) as ArrayRef)]);
        let kinds: DictionaryArray<Int32Type> = vec![Some("x"), Some("y")].into_iter().collect();
        let price = Decimal128Array::from(vec![1_999, -5]).with_precision_and_scale(9, 2).unwrap();
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("text", Arc::new(StringArray::from(vec![Some("é\n"), None]))),
            ("large", Arc::new(LargeStringArray::from(vec!["1", "2"]))),
            ("view", Arc::new(StringViewArray::from(vec!["longer than twelve bytes", ""]))),
            ("id", Arc::new(Int64Array::from(vec![i64::MAX, -1]))),
            ("share", Arc::new(Float32Array::from(vec![0.1, f32::NAN]))),
            ("answer", Arc::new(Float64Array::from(vec![0.1, -2.0]))),
            ("is_good", Arc::new(BooleanArray::from(vec![true, false]))),
            ("bytes", Arc::new(BinaryArray::from_vec(vec![b"text", b"\xff"]))),
            ("day", Arc::new(Date32Array::from(vec![0, 20_000]))),
            ("local", Arc::new(TimestampMillisecondArray::from(vec![0, 1_500]))),
            ("time", Arc::new(TimestampMicrosecondArray::from(vec![0, 1_500]).with_timezone("UTC"))),
            // Noon in winter and in summer.
            (
                "there",
                Arc::new(TimestampMillisecondArray::from(NOONS.to_vec()).with_timezone("Europe/Zurich")),
            ),
            ("offset", Arc::new(TimestampMillisecondArray::from(NOONS.to_vec()).with_timezone("-05:30"))),
            ("price", Arc::new(price)),
            ("turns", Arc::new(turns.finish())),
            ("message", Arc::new(message)),
            ("kind", Arc::new(kinds)),
            ("nothing", Arc::new(NullArray::new(2))),
        ];
        RecordBatch::try_from_iter_with_nullable(
            columns.into_iter().map(|(name, column)| (name, column, true)),
        )
        .unwrap()
    }

    fn expected() -> Vec<Value> {
        vec![
            json!({"text": "é\n", "large": "1", "view": "longer than twelve bytes", "id": i64::MAX, "share": 0.1,
                "answer": 0.1, "is_good": true, "bytes": "text", "day": "1970-01-01",
                "local": "1970-01-01T00:00:00", "time": "1970-01-01T00:00:00Z",
                "there": "2026-01-15T13:00:00+01:00", "offset": "2026-01-15T06:30:00-05:30", "price": "19.99",
                "turns": ["a", null], "message": {"role": "user"}, "kind": "x", "nothing": null}),
            json!({"text": null, "large": "2", "view": "", "id": -1, "share": null, "answer": -2.0,
                "is_good": false, "bytes": null, "day": "2024-10-04",
                "local": "1970-01-01T00:00:01.500", "time": "1970-01-01T00:00:00.001500Z",
                "there": "2026-07-15T14:00:00+02:00", "offset": "2026-07-15T06:30:00-05:30", "price": "-0.05",
                "turns": null, "message": {"role": "ü"}, "kind": "y", "nothing": null}),
        ]
    }

    fn collected(read: impl FnOnce(Sink<'_>) -> Result<()>) -> Result<Vec<Value>> {
        let mut found = Vec::new();
        read(&mut |place, raw| {
            assert_eq!(place.record as usize, found.len() + 1);
            if let Raw::Row(row) = raw {
                found.push(row.value()?);
            }
            Ok(())
        })?;
        Ok(found)
    }

    fn parquet_bytes(compression: Compression) -> Vec<u8> {
        let properties = WriterProperties::builder().set_compression(compression).build();
        let mut writer = ArrowWriter::try_new(Vec::new(), batch().schema(), Some(properties)).unwrap();
        writer.write(&batch()).unwrap();
        writer.into_inner().unwrap()
    }

    fn read_parquet(bytes: &[u8]) -> Result<Vec<Value>> {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), bytes).unwrap();
        collected(|sink| parquet(File::open(path.path())?, sink))
    }

    #[test]
    fn every_kind_of_column_is_read_from_parquet() {
        let codecs = [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::ZSTD(Default::default()),
            Compression::GZIP(Default::default()),
            Compression::LZ4_RAW,
        ];
        for codec in codecs {
            assert_eq!(read_parquet(&parquet_bytes(codec)).unwrap(), expected(), "{codec}");
        }
    }

    #[test]
    fn every_kind_of_column_is_read_from_arrow_files_and_streams() {
        for compression in [None, Some(CompressionType::LZ4_FRAME), Some(CompressionType::ZSTD)] {
            let options = || IpcWriteOptions::default().try_with_compression(compression).unwrap();
            let mut file =
                FileWriter::try_new_with_options(Vec::new(), &batch().schema(), options()).unwrap();
            file.write(&batch()).unwrap();
            let bytes = file.into_inner().unwrap();
            assert_eq!(collected(|sink| arrow_file(Cursor::new(&bytes), sink)).unwrap(), expected());
            let mut stream =
                StreamWriter::try_new_with_options(Vec::new(), &batch().schema(), options()).unwrap();
            stream.write(&batch()).unwrap();
            let bytes = stream.into_inner().unwrap();
            assert_eq!(collected(|sink| arrow_stream(bytes.as_slice(), sink)).unwrap(), expected());
        }
    }

    /// `scripts/oracle/columns.py` says what is in them; a file has some of the columns.
    #[test]
    fn what_pyarrow_writes_is_what_it_was_given() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/columns");
        let rows = std::fs::read(folder.join("rows.json")).unwrap();
        let rows: Vec<Map<String, Value>> = serde_json::from_slice(&rows).unwrap();
        let mut files = 0;
        for path in std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            let file = File::open(&path).unwrap();
            let found = match path.extension().unwrap().to_str().unwrap() {
                "parquet" => collected(|sink| parquet(file, sink)),
                "arrow" => collected(|sink| arrow_file(file, sink)),
                "arrows" => collected(|sink| arrow_stream(file, sink)),
                _ => continue,
            };
            let found = found.unwrap_or_else(|error| panic!("{}: {error:#}", path.display()));
            assert_eq!(found.len(), rows.len(), "{}", path.display());
            for (at, (found, row)) in found.iter().zip(&rows).enumerate() {
                let found = found.as_object().unwrap();
                assert!(found.len() >= 2);
                for (name, value) in found {
                    assert_eq!(value, &row[name], "{}, row {at}, column {name}", path.display());
                }
            }
            files += 1;
        }
        assert_eq!(files, 12);
    }

    #[test]
    fn a_zone_that_is_none_is_told_with_its_column() {
        let nowhere = TimestampMillisecondArray::from(NOONS.to_vec()).with_timezone("Europe/Nowhere");
        let batch = RecordBatch::try_from_iter([("when", Arc::new(nowhere) as ArrayRef)]).unwrap();
        let mut stream = StreamWriter::try_new(Vec::new(), &batch.schema()).unwrap();
        stream.write(&batch).unwrap();
        let bytes = stream.into_inner().unwrap();
        let text = crate::error::render(&collected(|sink| arrow_stream(bytes.as_slice(), sink)).unwrap_err());
        assert!(text.contains("in column `when`") && text.contains("Europe/Nowhere"), "{text}");
    }

    #[test]
    fn an_arrow_file_that_claims_more_than_it_has_is_refused() {
        let mut file = FileWriter::try_new(Vec::new(), &batch().schema()).unwrap();
        file.write(&batch()).unwrap();
        let whole = file.into_inner().unwrap();
        let told = |bytes: &[u8]| {
            let read = collected(|sink| arrow_file(Cursor::new(bytes), sink));
            crate::error::render(&read.unwrap_err())
        };
        let mut long = whole.clone();
        let at = whole.len() - 7;
        long[at] = 0x20;
        assert!(told(&long).contains(&format!("bytes, the file {}", whole.len())), "{}", told(&long));
        let mut outside = 0;
        for at in whole.len() - 400..whole.len() - 10 {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x40;
            let read = collected(|sink| arrow_file(Cursor::new(&bytes), sink));
            let text = read.err().map(|error| crate::error::render(&error)).unwrap_or_default();
            outside += u32::from(text.contains("a batch lies at"));
        }
        assert!(outside > 0);
        assert!(told(b"ARROW1").contains("damaged or truncated"));
    }

    #[test]
    fn columns_cut_off_anywhere_are_told_and_never_panic() {
        let whole = parquet_bytes(Compression::SNAPPY);
        for cut in (4..whole.len()).step_by(7) {
            let text = crate::error::render(&read_parquet(&whole[..cut]).unwrap_err());
            assert!(
                text.contains("damaged or truncated") && text.contains("fetch it again"),
                "{cut}: {text}"
            );
        }
        let mut stream = StreamWriter::try_new(Vec::new(), &batch().schema()).unwrap();
        stream.write(&batch()).unwrap();
        stream.write(&batch()).unwrap();
        let whole = stream.into_inner().unwrap();
        let told = |cut| collected(|sink| arrow_stream(&whole[..cut], sink));
        let boundaries = (8..whole.len() - 8).filter(|cut| told(*cut).is_ok()).count();
        // A stream may end without a mark of its end, behind the schema or any batch; elsewhere it may not.
        assert_eq!(boundaries, 2);
    }
}
