//! CSV and TSV with a header: every field is text.

use std::io::BufRead;
use std::sync::Arc;

use anyhow::{Context as _, Error, Result, anyhow};
use csv_core::{ReadRecordResult, ReaderBuilder};
use serde_json::{Map, Value};

use super::json::{early_end, following, too_large, truncated};
use super::{Place, Raw, Sink, quoted};
use crate::error::user_error;

/// What may part fields.
const DELIMITERS: [u8; 3] = [b',', b'\t', b';'];
/// Bytes and fields of the largest record.
const LARGEST_RECORD: usize = 1 << 28;
const MOST_FIELDS: usize = 1 << 16;

/// What parts the fields of a file that begins so; `None` where it begins as JSON, as a page, or with no header.
pub(super) fn delimiter_of(head: &[u8]) -> Option<u8> {
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
    let mut lines = head.split(|byte| matches!(byte, b'\n' | b'\r'));
    let line = lines.find(|line| !line.trim_ascii().is_empty()).unwrap_or_default();
    if matches!(line.trim_ascii().first(), None | Some(b'[' | b'{' | b'<'))
        || line.starts_with(b"version https://git-lfs")
    {
        return None;
    }
    let is_text =
        std::str::from_utf8(line).is_ok_and(|line| !line.chars().any(|c| c.is_control() && c != '\t'));
    let count = |delimiter: u8| {
        let mut in_quotes = false;
        let outside = line.iter().filter(|byte| {
            in_quotes ^= **byte == b'"';
            !in_quotes && **byte == delimiter
        });
        outside.count()
    };
    let most = DELIMITERS.into_iter().rev().max_by_key(|delimiter| count(*delimiter))?;
    (is_text && count(most) > 0).then_some(most)
}

/// Reads a header and the records under it.
pub(super) fn read(reader: &mut dyn BufRead, delimiter: u8, sink: Sink<'_>) -> Result<()> {
    let parser = ReaderBuilder::new().delimiter(delimiter).build();
    let mut rows =
        Rows { reader, parser, text: vec![0; 1 << 16], ends: vec![0; 256], breaks: 0, line: 1, record: 0 };
    let header = match rows.next()? {
        Some(count) => names(&rows.cells(count))?,
        None => return Ok(()),
    };
    let header = Arc::new(header);
    while let Some(count) = rows.next()? {
        rows.record = following(rows.record)?;
        let place = Place { record: rows.record, line: Some(rows.line) };
        sink(place, Raw::Fields(Fields { header: header.clone(), cells: rows.cells(count) }))?;
    }
    Ok(())
}

struct Rows<'a> {
    reader: &'a mut dyn BufRead,
    parser: csv_core::Reader,
    /// The fields of the row at hand, one behind the other.
    text: Vec<u8>,
    /// Where each ends.
    ends: Vec<usize>,
    /// Line breaks passed.
    breaks: u64,
    /// The line on which the row at hand begins.
    line: u64,
    record: u32,
}

impl Rows<'_> {
    /// Parses the next row and says how many fields it has; `None` where there is none.
    fn next(&mut self) -> Result<Option<usize>> {
        let (mut bytes, mut count, mut is_begun) = (0, 0, false);
        loop {
            let rest = self.reader.fill_buf().map_err(|error| early_end(error, self.record))?;
            // A line break behind the end closes the last row, unless a quote is open: then it would be text.
            let is_closing = rest.is_empty() && is_begun;
            let input = if is_closing { b"\n" } else { rest };
            let (result, passed, written, ended) = self.parser.read_record(
                input,
                self.text.get_mut(bytes..).unwrap_or_default(),
                self.ends.get_mut(count..).unwrap_or_default(),
            );
            let row = input.get(..passed).unwrap_or_default();
            if !is_begun {
                // Empty lines in front of a row are passed with it.
                let first = row.iter().position(|byte| !matches!(byte, b'\n' | b'\r'));
                self.line =
                    1 + self.breaks + line_breaks(row.get(..first.unwrap_or(passed)).unwrap_or_default());
                is_begun = first.is_some();
            }
            if !is_closing {
                self.breaks += line_breaks(row);
                self.reader.consume(passed);
            }
            (bytes, count) = (bytes + written, count + ended);
            match result {
                ReadRecordResult::InputEmpty if is_closing => {
                    return Err(truncated(self.record.saturating_add(1)));
                }
                ReadRecordResult::InputEmpty => {}
                ReadRecordResult::OutputFull | ReadRecordResult::OutputEndsFull
                    if bytes > LARGEST_RECORD || count > MOST_FIELDS =>
                {
                    return Err(too_large(self.record.saturating_add(1)));
                }
                ReadRecordResult::OutputFull => self.text.resize(2 * self.text.len(), 0),
                ReadRecordResult::OutputEndsFull => self.ends.resize(2 * self.ends.len(), 0),
                ReadRecordResult::Record => return Ok(Some(count)),
                ReadRecordResult::End => return Ok(None),
            }
        }
    }

    fn cells(&self, count: usize) -> Cells {
        let ends = self.ends.get(..count).unwrap_or_default();
        let text = self.text.get(..ends.last().copied().unwrap_or(0)).unwrap_or_default();
        Cells { text: text.to_vec(), ends: ends.to_vec() }
    }
}

/// A row as it lies in the file, without its quotes.
struct Cells {
    /// One behind the other.
    text: Vec<u8>,
    /// Where each ends.
    ends: Vec<usize>,
}

impl Cells {
    fn texts(&self) -> Result<Vec<String>> {
        let mut start = 0;
        self.ends
            .iter()
            .map(|end| {
                let field = self.text.get(start..*end).unwrap_or_default();
                start = *end;
                let text = std::str::from_utf8(field).map_err(|_| {
                    anyhow!("`{}` is not UTF-8", String::from_utf8_lossy(field.get(..60).unwrap_or(field)))
                })?;
                Ok(text.to_string())
            })
            .collect()
    }
}

/// The names of the fields.
fn names(header: &Cells) -> Result<Vec<String>> {
    let names = header.texts().context("in the header")?;
    let names: Vec<String> = names.iter().map(|name| name.trim().to_string()).collect();
    match names.iter().enumerate().find(|(at, name)| names.iter().take(*at).any(|other| other == *name)) {
        Some((_, twice)) => Err(twice_named(twice)),
        None => Ok(names),
    }
}

/// A row under its header.
pub(super) struct Fields {
    header: Arc<Vec<String>>,
    cells: Cells,
}

impl Fields {
    /// What it takes of the memory.
    pub(super) fn bytes(&self) -> usize {
        self.cells.text.len() + size_of_val(self.cells.ends.as_slice())
    }

    /// As a JSON object.
    pub(super) fn value(&self) -> Result<Value> {
        let Self { header, cells } = self;
        if cells.ends.len() != header.len() {
            return Err(anyhow!(
                "it has {} fields, the header names {}: {}",
                cells.ends.len(),
                header.len(),
                quoted(header)
            ));
        }
        let values = cells.texts()?.into_iter().map(Value::String);
        Ok(Value::Object(header.iter().cloned().zip(values).collect::<Map<_, _>>()))
    }
}

fn line_breaks(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

fn twice_named(name: &str) -> Error {
    user_error(
        format!("its header names `{name}` twice"),
        "give the columns names of their own; a file without header needs one",
    )
}
