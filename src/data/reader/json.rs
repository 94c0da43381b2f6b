//! JSON arrays, arrays inside an object, and JSON Lines, cut into records.
//!
//! A record is found by its brackets and quotes alone and parsed by itself, so that a bad one spoils no other.

use std::io::{self, BufRead};

use anyhow::{Context as _, Error, Result, anyhow};
use serde::de::IgnoredAny;

use super::{FETCH_AGAIN, Place, Raw, Sink, quoted};
use crate::error::{user_error, with_hint};

/// Bytes of the largest record: more than a page, less than what takes a machine down.
const LARGEST_RECORD: usize = 1 << 28;

/// Reads an array, an object that holds one under a key of `wrappers`, or lines; `first` is what it begins with.
pub(super) fn read(reader: &mut dyn BufRead, first: u8, wrappers: &[&str], sink: Sink<'_>) -> Result<()> {
    let mut text = Text { reader, line: 1, record: 0, taken: Vec::new() };
    match first {
        b'[' => {
            text.array(sink)?;
            text.end()
        }
        _ if is_wrapped(text.reader.fill_buf()?, wrappers) => text.wrapped(wrappers, sink),
        _ => lines(text.reader, sink),
    }
}

/// Whether an object begins with one of the keys and an array.
fn is_wrapped(beginning: &[u8], wrappers: &[&str]) -> bool {
    let squeezed: Vec<u8> =
        beginning.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).take(64).collect();
    wrappers.iter().any(|key| squeezed.starts_with(format!("{{\"{key}\":[").as_bytes()))
}

fn lines(reader: &mut dyn BufRead, sink: Sink<'_>) -> Result<()> {
    let (mut line, mut number) = (Vec::new(), 0_u32);
    loop {
        line.clear();
        let limit = LARGEST_RECORD as u64 + 1;
        let read = io::Read::take(&mut *reader, limit).read_until(b'\n', &mut line);
        if read.map_err(|error| early_end(error, number))? == 0 {
            return Ok(());
        }
        number = following(number)?;
        if line.len() > LARGEST_RECORD {
            return Err(too_large(number));
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        // Without its line break: a string that the end of the file cuts off would seem to hold one.
        let record = line.trim_ascii_end();
        let may_be_last =
            reader.fill_buf().map_err(|error| early_end(error, number))?.trim_ascii().is_empty();
        if may_be_last && is_cut_off(record) && is_at_end(reader) {
            return Err(truncated(number));
        }
        sink(Place { record: number, line: None }, Raw::Json(record.to_vec()))?;
    }
}

fn is_cut_off(record: &[u8]) -> bool {
    serde_json::from_slice::<IgnoredAny>(record).is_err_and(|error| error.is_eof())
}

/// JSON that is read byte by byte.
struct Text<'a> {
    reader: &'a mut dyn BufRead,
    /// Counted from 1.
    line: u64,
    /// The last record that was begun.
    record: u32,
    /// The bytes of the value at hand.
    taken: Vec<u8>,
}

impl Text<'_> {
    /// The next byte that is no white space, left where it is.
    fn next(&mut self) -> Result<Option<u8>> {
        loop {
            let buffer = self.reader.fill_buf().map_err(|error| early_end(error, self.record))?;
            let Some(byte) = buffer.first().copied() else { return Ok(None) };
            if !byte.is_ascii_whitespace() {
                return Ok(Some(byte));
            }
            self.line += u64::from(byte == b'\n');
            self.reader.consume(1);
        }
    }

    /// Passes over `wanted`.
    fn pass(&mut self, wanted: u8) -> Result<()> {
        match self.next()? {
            Some(byte) if byte == wanted => {
                self.reader.consume(1);
                Ok(())
            }
            found => Err(self.unexpected(found, &format!("`{}`", char::from(wanted)))),
        }
    }

    fn array(&mut self, sink: Sink<'_>) -> Result<()> {
        self.pass(b'[')?;
        if self.next()? == Some(b']') {
            return self.pass(b']');
        }
        loop {
            self.next()?;
            self.record = following(self.record)?;
            let place = Place { record: self.record, line: Some(self.line) };
            self.value(true)?;
            sink(place, Raw::Json(self.taken.clone()))?;
            match self.next()? {
                Some(b',') => self.reader.consume(1),
                Some(b']') => return self.pass(b']'),
                found => return Err(self.unexpected(found, "`,` or `]`")),
            }
        }
    }

    /// Reads the object up to the array, the array, and what follows it.
    fn wrapped(&mut self, wrappers: &[&str], sink: Sink<'_>) -> Result<()> {
        self.pass(b'{')?;
        let mut found: Option<String> = None;
        loop {
            self.value(true)?;
            let key: String = serde_json::from_slice(&self.taken).map_err(|error| {
                anyhow!("line {}: a key is no text: {}", self.line, without_place(&error))
            })?;
            self.pass(b':')?;
            if wrappers.contains(&key.as_str()) && self.next()? == Some(b'[') {
                if let Some(first) = found {
                    return Err(user_error(
                        format!("it holds records under both `{first}` and `{key}`"),
                        "write those that you mean to a file of their own",
                    ));
                }
                self.array(sink)?;
                found = Some(key);
            } else {
                self.value(false)?;
            }
            match self.next()? {
                Some(b',') => self.reader.consume(1),
                Some(b'}') => {
                    self.pass(b'}')?;
                    return self.end();
                }
                byte => return Err(self.unexpected(byte, "`,` or `}`")),
            }
        }
    }

    /// Nothing may follow.
    fn end(&mut self) -> Result<()> {
        match self.next()? {
            None => Ok(()),
            Some(_) => Err(anyhow!("line {}: trailing characters after the last record", self.line)),
        }
    }

    /// Takes one value, up to its closing bracket, or to the comma or bracket that follows a number or text.
    fn value(&mut self, keep: bool) -> Result<()> {
        self.taken.clear();
        self.next()?;
        let (mut scan, mut size) = (Scan::default(), 0_usize);
        loop {
            let buffer =
                self.reader.fill_buf().map_err(|error| early_end(error, self.record.saturating_sub(1)))?;
            if buffer.is_empty() {
                return Err(truncated(self.record));
            }
            let (count, is_whole) = scan.pass(buffer);
            let part = buffer.get(..count).unwrap_or(buffer);
            self.line += part.iter().filter(|byte| **byte == b'\n').count() as u64;
            size += count;
            if keep && size <= LARGEST_RECORD {
                self.taken.extend_from_slice(part);
            }
            self.reader.consume(count);
            if keep && size > LARGEST_RECORD {
                return Err(too_large(self.record));
            }
            if is_whole {
                return Ok(());
            }
        }
    }

    fn unexpected(&self, found: Option<u8>, wanted: &str) -> Error {
        match found {
            None => truncated(self.record.saturating_add(1)),
            Some(byte) => anyhow!(
                "line {}: found `{}` behind record {}, expected {wanted}",
                self.line,
                char::from(byte).escape_default(),
                self.record
            ),
        }
    }
}

/// Where in a value the bytes stand.
#[derive(Debug, Default)]
struct Scan {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Scan {
    /// How many of the bytes belong to the value, and whether it is whole with them.
    fn pass(&mut self, bytes: &[u8]) -> (usize, bool) {
        for (at, byte) in bytes.iter().enumerate() {
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                // The bracket of what holds a number or text.
                b'}' | b']' | b',' | b':' if self.depth == 0 => return (at, true),
                b'}' | b']' => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return (at + 1, true);
                    }
                }
                _ => {}
            }
        }
        (bytes.len(), false)
    }
}

/// serde_json's words without its line and column, which count from the beginning of the record.
pub(super) fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    text.strip_suffix(&place).unwrap_or(&text).to_string()
}

/// The number of the next record.
pub(super) fn following(record: u32) -> Result<u32> {
    record
        .checked_add(1)
        .context("it holds more than 4294967295 records")
        .map_err(|error| with_hint(error, "split the file, and give `path` a list"))
}

/// What compressed data says when it ends too early, or does not agree with its checksum.
pub(super) fn early_end(error: io::Error, records: u32) -> Error {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return truncated(records.saturating_add(1));
    }
    user_error(format!("after record {records}: {error}"), FETCH_AGAIN)
}

pub(super) fn truncated(record: u32) -> Error {
    user_error(format!("it ends in the middle of record {record}: the file is truncated"), FETCH_AGAIN)
}

pub(super) fn too_large(record: u32) -> Error {
    user_error(
        format!("record {record} is larger than {} MiB", LARGEST_RECORD >> 20),
        "look for a bracket or a quote that is left open",
    )
}

/// Whether nothing but white space is left.
fn is_at_end(reader: &mut dyn BufRead) -> bool {
    // What cannot be read is told by whoever needs it.
    matches!(super::first_byte(reader), Ok(None))
}

/// The beginning of what is no data, in words.
pub(super) fn not_records(beginning: &[u8]) -> Error {
    if beginning.starts_with(b"version https://git-lfs") {
        return user_error(
            "it is a Git LFS pointer, not the data",
            "run `git lfs pull` where it was cloned, or download the file itself",
        );
    }
    if beginning.starts_with(b"\xff\xfe") || beginning.starts_with(b"\xfe\xff") {
        return user_error("it is UTF-16, expected UTF-8", "convert it with `iconv -f UTF-16 -t UTF-8`");
    }
    let text = String::from_utf8_lossy(beginning.get(..40).unwrap_or(beginning));
    let text = text.lines().next().unwrap_or_default().trim_end_matches('\u{fffd}').to_string();
    if text.starts_with('<') {
        return user_error(
            format!("it begins with `{text}`: a web page, not the data"),
            "download the file itself, not the page that shows it",
        );
    }
    user_error(
        format!(
            "it begins with `{}`, expected {}, CSV or TSV with a header, parquet or Arrow",
            text.escape_debug(),
            quoted(&["[ (a JSON array)", "{ (JSON Lines)"])
        ),
        "is it another file of the dump?",
    )
}
