//! Dumps to records: JSON arrays and lines, CSV, TSV, parquet, Arrow; plain, `.gz`, `.zst` or `.zip`.
//!
//! What a file is, its bytes say; its name is not asked. Records are read ahead by a few batches, which all cores parse,
//! so a dump never lies in memory.

mod batches;
mod columns;
mod delimited;
mod fingerprint;
mod folder;
mod ipc;
mod json;
mod packing;

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, Read as _, Seek as _};
use std::path::Path;

use anyhow::{Context as _, Error, Result, anyhow};
use serde::de::DeserializeOwned;

pub use self::fingerprint::{Fingerprint, fingerprint, fingerprint_beside};
pub use self::folder::files_of;
use self::packing::Opened;
use crate::error::user_error;

const BUFFER: usize = 1 << 17;

const FETCH_AGAIN: &str = "fetch it again";

/// Where a record lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    /// Counted from 1; in JSON Lines the line, else the record.
    record: u32,
    /// The line on which it begins, where that is not its number.
    line: Option<u64>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "record {}", self.record)?;
        match self.line {
            Some(line) => write!(f, " (line {line})"),
            None => Ok(()),
        }
    }
}

/// A record before it is known what it should hold.
enum Raw {
    /// One JSON value.
    Json(Vec<u8>),
    /// A row of text.
    Fields(delimited::Fields),
    /// A row of columns.
    Row(columns::Row),
}

impl Raw {
    /// What it takes of the memory.
    fn bytes(&self) -> usize {
        match self {
            Self::Json(text) => text.len(),
            Self::Fields(fields) => fields.bytes(),
            Self::Row(row) => row.bytes(),
        }
    }
}

/// Takes the records of a file.
type Sink<'a> = &'a mut dyn FnMut(Place, Raw) -> Result<()>;

/// Reads the records of a dump and hands each to `each` with its number, counted from 1.
///
/// `members` are the file names to look for in a `.zip` that holds several; `wrappers` the keys under which an
/// object may hold the array.
///
/// # Errors
/// When the file is missing, empty, truncated, of another form, or a record does not fit; the error names the
/// file, the record and what was expected. Errors of `each` come back with the same.
pub fn read_records<T: DeserializeOwned + Send>(
    path: &Path,
    members: &[&str],
    wrappers: &[&str],
    each: &mut dyn FnMut(u32, T) -> Result<()>,
) -> Result<()> {
    read_tolerant(path, members, wrappers, &|_, record: T| Ok(record), &mut |_, error| Err(error), each)
}

/// As [`read_records`], but hands on what `make` makes of a record, many at the same time, and asks `bad` about each
/// record that does not fit or that `make` or `each` refuses: with its number and what is wrong with it. An error of
/// `bad` ends the reading, and is what comes back.
///
/// # Errors
/// As [`read_records`], and what `bad` says. A file that is damaged or truncated cannot be tolerated.
pub fn read_tolerant<T: DeserializeOwned, U: Send>(
    path: &Path,
    members: &[&str],
    wrappers: &[&str],
    make: &(dyn Fn(u32, T) -> Result<U> + Sync),
    bad: &mut dyn FnMut(u32, Error) -> Result<()>,
    each: &mut dyn FnMut(u32, U) -> Result<()>,
) -> Result<()> {
    let make = |place: Place, raw: Raw| {
        parse::<T>(place, raw)
            .and_then(|record| make(place.record, record).with_context(|| place.to_string()))
    };
    let mut take = |place: Place, made: Result<U>| {
        let fits = made.and_then(|one| each(place.record, one).with_context(|| place.to_string()));
        fits.or_else(|error| bad(place.record, error))
    };
    let mut read = || -> Result<()> {
        let file = File::open(path)?;
        packing::unpack(file, members, &mut |opened| {
            batches::made_in_order(&make, &mut take, |sink| records(opened, wrappers, sink))
        })
    };
    read().with_context(|| format!("cannot read `{}`", path.display()))
}

/// The error names the place.
fn parse<T: DeserializeOwned>(place: Place, raw: Raw) -> Result<T> {
    let value = match raw {
        Raw::Json(text) => return parse_json(place, &text),
        Raw::Fields(fields) => fields.value(),
        Raw::Row(row) => row.value(),
    };
    serde_json::from_value(value.with_context(|| place.to_string())?)
        .map_err(|error| anyhow!("{place}: {error}"))
}

fn parse_json<T: DeserializeOwned>(place: Place, text: &[u8]) -> Result<T> {
    let at = |line: usize| {
        let line = place.line.map(|first| first + (line as u64).saturating_sub(1));
        Place { line, ..place }
    };
    serde_json::from_slice(text)
        .map_err(|error| anyhow!("{}: {}", at(error.line()), json::without_place(&error)))
}

fn records(opened: Opened<'_>, wrappers: &[&str], sink: Sink<'_>) -> Result<()> {
    let (opened, columns) = Columns::of(opened)?;
    match (columns, opened) {
        (Some(Columns::Parquet), Opened::Plain(file)) => columns::parquet(file, sink),
        (Some(Columns::ArrowFile), Opened::Plain(file)) => columns::arrow_file(file, sink),
        (Some(Columns::ArrowStream), opened) => columns::arrow_stream(opened.peek(), sink),
        (_, opened) => text(opened, wrappers, sink),
    }
}

/// What a plain file of columns is.
#[derive(Debug, Clone, Copy)]
enum Columns {
    Parquet,
    ArrowFile,
    ArrowStream,
}

impl Columns {
    fn of(opened: Opened<'_>) -> Result<(Opened<'_>, Option<Self>)> {
        let Opened::Plain(mut file) = opened else { return Ok((opened, None)) };
        let mut magic = Vec::new();
        (&mut file).take(6).read_to_end(&mut magic)?;
        file.rewind()?;
        Ok((Opened::Plain(file), Self::beginning(&magic)))
    }

    fn beginning(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [b'P', b'A', b'R', b'1', ..] => Some(Self::Parquet),
            [b'A', b'R', b'R', b'O', b'W', b'1', ..] => Some(Self::ArrowFile),
            [0xff, 0xff, 0xff, 0xff, ..] => Some(Self::ArrowStream),
            _ => None,
        }
    }
}

fn text(opened: Opened<'_>, wrappers: &[&str], sink: Sink<'_>) -> Result<()> {
    let mut reader = opened.peek();
    if Columns::beginning(reader.head()).is_some() {
        return Err(user_error("it is parquet or Arrow inside of a compressed file", "unpack it first"));
    }
    pass_mark(&mut reader).map_err(|error| json::early_end(error, 0))?;
    if let Some(delimiter) = delimited::delimiter_of(reader.head()) {
        return delimited::read(&mut reader, delimiter, sink);
    }
    match first_byte(&mut reader).map_err(|error| json::early_end(error, 0))? {
        None => Err(user_error("it is empty", FETCH_AGAIN)),
        Some(first @ (b'[' | b'{')) => json::read(&mut reader, first, wrappers, sink),
        _ => Err(json::not_records(reader.fill_buf()?)),
    }
}

/// Passes over a byte-order mark.
fn pass_mark(reader: &mut dyn BufRead) -> io::Result<()> {
    if reader.fill_buf()?.starts_with(b"\xef\xbb\xbf") {
        reader.consume(3);
    }
    Ok(())
}

/// Passes over a byte-order mark and white space; `None` where nothing follows.
fn first_byte(reader: &mut dyn BufRead) -> io::Result<Option<u8>> {
    pass_mark(reader)?;
    loop {
        let buffer = reader.fill_buf()?;
        let Some(first) = buffer.first().copied() else { return Ok(None) };
        if !first.is_ascii_whitespace() {
            return Ok(Some(first));
        }
        reader.consume(1);
    }
}

fn quoted<S: AsRef<str>>(names: &[S]) -> String {
    let mut list: Vec<String> = names.iter().take(8).map(|name| format!("`{}`", name.as_ref())).collect();
    if names.len() > list.len() {
        list.push(format!("{} more", names.len() - list.len()));
    }
    list.join(", ")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::fs;
    use std::io::Write as _;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    struct Record {
        text: String,
    }

    fn read(bytes: &[u8]) -> Result<Vec<(u32, String)>> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("dump");
        fs::write(&path, bytes)?;
        let mut found = Vec::new();
        read_records::<Record>(&path, &["train.json"], &["dev"], &mut |number, record| {
            found.push((number, record.text));
            Ok(())
        })?;
        Ok(found)
    }

    fn told(bytes: &[u8]) -> String {
        crate::error::render(&read(bytes).unwrap_err())
    }

    fn two() -> Vec<(u32, String)> {
        vec![(1, "a".to_string()), (2, "é".to_string())]
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zip_of(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut writer = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
        for (name, bytes) in members {
            writer.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
            writer.write_all(bytes).unwrap();
        }
        writer.finish().unwrap().into_inner()
    }

    const ARRAY: &str = r#" [ {"text": "a"}, {"text": "\u00e9", "more": [1, null, {"x": 2}]} ] "#;
    const LINES: &str = "{\"text\": \"a\"}\r\n{\"text\": \"é\"}";

    #[test]
    fn arrays_lines_and_wrapped_arrays_are_told_apart_by_content() {
        assert_eq!(read(ARRAY.as_bytes()).unwrap(), two());
        assert_eq!(read(LINES.as_bytes()).unwrap(), two());
        assert_eq!(read(format!("\u{feff}\n{ARRAY}").as_bytes()).unwrap(), two());
        assert_eq!(read(format!("{{\n \"dev\" : {ARRAY}, \"note\": 1}}").as_bytes()).unwrap(), two());
        assert_eq!(read(b"[]").unwrap(), []);
    }

    #[test]
    fn blank_lines_count_so_that_a_record_s_number_is_its_line() {
        assert_eq!(read(b"{\"text\": \"a\"}\n\n{\"text\": \"b\"}\n").unwrap()[1].0, 3);
    }

    #[test]
    fn gzip_and_zip_are_read() {
        assert_eq!(read(&gzip(ARRAY.as_bytes())).unwrap(), two());
        assert_eq!(read(&gzip(LINES.as_bytes())).unwrap(), two());
        assert_eq!(read(&zip_of(&[("x/some.json", ARRAY.as_bytes()), ("README.md", b"-")])).unwrap(), two());
        let many: [(&str, &[u8]); 3] = [
            ("__MACOSX/data/._train.json", b"x"),
            ("data/dev.json", b"[]"),
            ("data/train.json", ARRAY.as_bytes()),
        ];
        assert_eq!(read(&zip_of(&many)).unwrap(), two());
    }

    #[test]
    fn an_archive_without_a_known_member_lists_what_it_has() {
        let text = told(&zip_of(&[("a.json", b"[]"), ("b.json", b"[]")]));
        assert!(text.contains("`a.json`, `b.json`") && text.contains("`train.json`"), "{text}");
    }

    #[test]
    fn what_is_no_data_is_named() {
        assert!(
            told(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n").contains("Git LFS pointer")
        );
        assert!(told(b"").contains("it is empty"));
        assert!(told(b" \n ").contains("it is empty"));
        assert!(told(b"<!DOCTYPE html>\n<html>").contains("a web page"));
        assert!(told(b"<a href=\"x,y\">\n").contains("a web page"));
        assert!(told(b"one word\n").contains("it begins with `one word`"));
        let text = told(b"\x00\x01,\x02");
        assert!(text.contains(r"it begins with `\0\u{1},\u{2}`"), "{text}");
        assert!(told(b"\xff\xfe{\0").contains("it is UTF-16"));
        assert!(told(b"PAR1....").contains("the parquet file is damaged"));
        assert!(told(b"ARROW1....").contains("the Arrow file is damaged"));
        assert!(told(b"\xff\xff\xff\xff....").contains("the Arrow stream is damaged"));
        assert!(told(&gzip(b"PAR1....")).contains("inside of a compressed file"));
        assert!(told(b"BZh9....").contains("compressed with bzip2"));
        let missing = read_records::<Record>(Path::new("/no/such"), &[], &[], &mut |_, _| Ok(()));
        assert!(crate::error::render(&missing.unwrap_err()).contains("cannot read `/no/such`"));
    }

    #[test]
    fn truncated_files_are_told_with_the_record() {
        let wanted = "it ends in the middle of record 2: the file is truncated\nhint: fetch it again\n";
        let cuts: [&[u8]; 9] = [
            br#"[{"text": "a"}, {"text": "b"#,
            br#"[{"text": "a"}, {"tex"#,
            br#"[{"text": "a"},"#,
            b"[{\"text\": \"a\"}, {\"text\": \"b\n",
            b"{\"dev\": [{\"text\": \"a\"}, {\"text\": \"b \r\n\n",
            b"{\"text\": \"a\"}\n{\"text\": \"b",
            b"{\"text\": \"a\"}\n{\"text\": \"b\n",
            b"{\"text\": \"a\"}\r\n{\"text\": \"b\r\n\r\n",
            b"{\"text\": \"a\"}\n{\"text\":",
        ];
        for cut in cuts {
            let text = told(cut);
            assert!(text.ends_with(wanted), "{}: {text}", String::from_utf8_lossy(cut));
            let text = told(&gzip(cut));
            assert!(text.ends_with(wanted), "{} in gzip: {text}", String::from_utf8_lossy(cut));
        }
        let zip = zip_of(&[("train.json", ARRAY.as_bytes())]);
        assert!(told(&zip[..zip.len() - 10]).contains("damaged or truncated"));
    }

    #[test]
    fn a_truncated_gzip_is_told_with_the_record_wherever_it_is_cut() {
        let record =
            |at: u32| format!("{{\"text\": \"{:x}\"}}", u64::from(at).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let records: Vec<String> = (0..4000).map(record).collect();
        for plain in [format!("[{}]", records.join(",")), records.join("\n")] {
            let whole = gzip(plain.as_bytes());
            for cut in [3, 12, whole.len() / 2, whole.len() - 9, whole.len() - 4] {
                let text = told(&whole[..cut]);
                let is_told = text.contains("it ends in the middle of record ")
                    && text.contains("hint: fetch it again");
                assert!(is_told, "{cut} bytes: {text}");
            }
            let mut damaged = whole.clone();
            let at = whole.len() - 6;
            damaged[at] ^= 1;
            assert!(told(&damaged).contains("hint: fetch it again"), "{}", told(&damaged));
        }
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ::zstd::encode_all(bytes, 3).unwrap()
    }

    #[test]
    fn zstd_is_read_and_its_end_is_missed() {
        assert_eq!(read(&zstd(ARRAY.as_bytes())).unwrap(), two());
        let frames =
            [&zstd(b"{\"text\": \"a\"}\n")[..], &zstd("{\"text\": \"é\"}\n".as_bytes())[..]].concat();
        assert_eq!(read(&frames).unwrap(), two());
        let whole = zstd(LINES.repeat(9999).replace('}', "}\n").as_bytes());
        let text = told(&whole[..whole.len() / 2]);
        assert!(text.contains("the file is truncated\nhint: fetch it again"), "{text}");
    }

    #[test]
    fn csv_and_tsv_are_read_with_quotes_marks_and_line_breaks() {
        let forms = [
            "id,text\n1,a\n2,é\n",
            "\u{feff}id,text\r\n1,a\r\n\r\n2,é",
            "\"id\",\"text\"\n\"1\",\"a\"\n2,\"é\"\n\n",
            "\ttext\n0\ta\n1\té\n",
            "text;note\na;\"x, y\"\né;z\n",
        ];
        for form in forms {
            assert_eq!(read(form.as_bytes()).unwrap(), two(), "{form}");
            assert_eq!(read(&gzip(form.as_bytes())).unwrap(), two(), "{form}");
        }
        let found = read(b"text,n\n\"a \"\"b\"\"\r\n\nc, d\",1\n").unwrap();
        assert_eq!(found, [(1, "a \"b\"\r\n\nc, d".to_string())]);
        assert_eq!(read(b"text,n\n").unwrap(), []);
        let long = "x\n\"\"".repeat(1 << 17);
        let found = read(format!("n,text\n{},\"{long}\"\n", ",".repeat(0)).as_bytes()).unwrap();
        assert_eq!(found[0].1, long.replace("\"\"", "\""));
    }

    #[test]
    fn a_table_s_faults_are_told_with_record_and_line() {
        let text = told(b"text,n\n\"a\nb\",1\n\nc\n");
        assert!(
            text.contains("record 2 (line 5): it has 1 fields, the header names 2: `text`, `n`")
                || text.contains("record 2 (line 5)"),
            "{text}"
        );
        let text = told(b"txt,n\na,1\n");
        assert!(text.contains("record 1 (line 2): missing field `text`"), "{text}");
        let text = told(b"text,n\na,1\n\xe9t\xe9,2\n");
        assert!(text.contains("record 2 (line 3)") && text.contains("is not UTF-8"), "{text}");
        let text = told(b"text,n\na,1\nb,\"2\n");
        assert!(text.contains("it ends in the middle of record 2: the file is truncated"), "{text}");
        assert!(read(b"text,n\na,1\nb,5\" pipe").is_ok(), "a quote inside of a field is text");
        assert!(told(b"text,text\na,b\n").contains("its header names `text` twice"));
    }

    #[test]
    fn what_is_bad_can_be_tolerated_and_the_rest_is_read() {
        let forms: [&[u8]; 4] = [
            b"[{\"text\": \"a\"},\n {\"txt\": 1}, {\"text\" \"b\"}, 7, {\"text\": \"d\"}]",
            b"{\"text\": \"a\"}\n{\"txt\": 1}\n{\"text\": \"b\"\n7\n{\"text\": \"d\"}\n",
            b"{\"dev\": [{\"text\": \"a\"}, [], {\"text\": tru}, \"x\", {\"text\": \"d\"}]}",
            b"n,text\n1,a\n2\n3,b,b\n4,\xff\n5,d\n",
        ];
        for form in forms {
            let path = tempfile::NamedTempFile::new().unwrap();
            fs::write(path.path(), form).unwrap();
            let (mut good, mut bad) = (Vec::new(), Vec::new());
            let mut note = |number, error: Error| {
                assert!(format!("{error:#}").contains(&format!("record {number}")), "{error:#}");
                bad.push(number);
                Ok(())
            };
            let text = |_, record: Record| Ok(record.text);
            read_tolerant(path.path(), &[], &["dev"], &text, &mut note, &mut |number, text| {
                good.push((number, text));
                Ok(())
            })
            .unwrap();
            assert_eq!(
                good,
                [(1, "a".to_string()), (5, "d".to_string())],
                "{}",
                String::from_utf8_lossy(form)
            );
            assert_eq!(bad, [2, 3, 4]);
        }
    }

    /// The calls that a file leads to, up to the one that ends the reading, and what is told.
    fn calls(bytes: &[u8], tolerated: usize) -> (Vec<String>, String) {
        let path = tempfile::NamedTempFile::new().unwrap();
        fs::write(path.path(), bytes).unwrap();
        let (calls, bad) = (RefCell::new(Vec::new()), Cell::new(0));
        let mut note = |number, error: Error| {
            calls.borrow_mut().push(format!("{number} is bad"));
            bad.set(bad.get() + 1);
            if bad.get() > tolerated { Err(error) } else { Ok(()) }
        };
        let make = |number: u32, record: Record| {
            if number.is_multiple_of(1000) { Err(anyhow!("a thousand")) } else { Ok(record.text) }
        };
        let read = read_tolerant(path.path(), &[], &[], &make, &mut note, &mut |number, text: String| {
            calls.borrow_mut().push(format!("{number} says {text}"));
            Ok(())
        });
        (calls.into_inner(), read.err().map(|error| crate::error::render(&error)).unwrap_or_default())
    }

    #[test]
    fn records_of_many_batches_are_handed_on_as_if_they_were_read_one_by_one() {
        let is_bad = |at: usize| at.is_multiple_of(1000) || at % 777 == 5;
        let field = |at| if at % 777 == 5 { "txt" } else { "text" };
        let line = |at: usize| format!("{{\"{}\": \"{at:0>99}\"}}\n", field(at));
        let expected = |last| {
            let call = |at| if is_bad(at) { format!("{at} is bad") } else { format!("{at} says {at:0>99}") };
            (1..=last).map(call).collect::<Vec<_>>()
        };
        let whole: String = (1..=50_000).map(line).collect();
        assert_eq!(calls(whole.as_bytes(), 500), (expected(50_000), String::new()));
        for packed in [gzip(whole.as_bytes()), zip_of(&[("dump.jsonl", whole.as_bytes())])] {
            assert_eq!(calls(&packed, 500).0, expected(50_000));
        }
        // The last of those that are tolerated no more ends it, whatever the file holds behind.
        let bad: Vec<usize> = (1..).filter(|at| is_bad(*at)).take(60).collect();
        for tolerated in [0, 2, 59] {
            let truncated = whole.get(..whole.len() - 50).unwrap();
            let (found, told) = calls(truncated.as_bytes(), tolerated);
            let last = bad[tolerated];
            assert_eq!(found, expected(last));
            assert!(told.contains(&format!("record {last}")) && !told.contains("truncated"), "{told}");
            let (found, told) = calls(&zip_of(&[("dump.jsonl", truncated.as_bytes())]), tolerated);
            assert_eq!(found, expected(last));
            assert!(told.contains("in its member `dump.jsonl`"), "{told}");
        }
    }

    #[test]
    fn records_before_a_truncation_are_handed_on() {
        let record = |at: u32| format!("{{\"text\": \"{at}\"}}");
        let records: Vec<String> = (1..=20_000).map(record).collect();
        for whole in [records.join("\n"), format!("[{}]", records.join(","))] {
            let cut = whole.len() - 8;
            let (found, told) = calls(whole.get(..cut).unwrap().as_bytes(), 99);
            assert_eq!(found.len(), 19_999);
            assert!(found.iter().zip(1..).all(|(call, at)| call.starts_with(&format!("{at} "))));
            assert!(told.contains("it ends in the middle of record 20000: the file is truncated"), "{told}");
        }
    }

    #[test]
    fn an_object_with_two_sets_of_records_is_not_guessed_at() {
        let path = tempfile::NamedTempFile::new().unwrap();
        fs::write(path.path(), "{\"train\": [{\"text\": \"a\"}], \"test\": []}").unwrap();
        let read = read_records::<Record>(path.path(), &[], &["train", "test"], &mut |_, _| Ok(()));
        let text = crate::error::render(&read.unwrap_err());
        assert!(text.contains("records under both `train` and `test`"), "{text}");
    }

    #[test]
    fn a_record_that_does_not_fit_is_told_with_what_was_expected() {
        let text = told(br#"[{"text": "a"}, {"txt": "b"}]"#);
        assert!(text.contains("record 2 (line 1): missing field `text`\n"), "{text}");
        let text = told(b"{\"text\": \"a\"}\n{\"text\": 7}\n");
        assert!(text.contains("record 2: invalid type: integer `7`, expected a string"), "{text}");
        let text = told(b"[{\"text\": \"a\"},\n {\"text\":\n \"b\nc\"}]");
        assert!(text.contains("record 2 (line 4): control character"), "{text}");
        let text = told(b"{\"text\": \"a\"}\n{\"text\": \"b\"\n{\"text\": \"c\"}\n");
        assert!(text.contains("record 2:") && !text.contains("truncated"), "{text}");
        assert!(told(b"[{\"text\": \"a\"}] trailing").contains("trailing characters"));
        assert!(told(b"[{\"text\": \"\\ud83d\"}]").contains("record 1"));
        assert!(told(b"{\"text\": \"\xff\"}\n").contains("record 1"));
    }

    #[test]
    fn an_error_of_the_consumer_names_the_record() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dump.json");
        fs::write(&path, ARRAY).unwrap();
        let refuse = &mut |number, _: Record| if number == 2 { Err(anyhow!("no")) } else { Ok(()) };
        let text = crate::error::render(&read_records(&path, &[], &[], refuse).unwrap_err());
        assert!(text.contains("dump.json") && text.contains("record 2") && text.contains("no"), "{text}");
    }
}
