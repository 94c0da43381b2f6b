//! Dumps to records: a JSON array or JSON Lines, plain, `.gz` or `.zip`.
//!
//! What a file is, its first bytes say; its name is not asked. Arrays are read record by record, so a dump
//! never lies in memory as text.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek as _};
use std::path::Path;

use anyhow::{Context as _, Error, Result, anyhow};
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer as _, MapAccess, SeqAccess, Visitor};
use sha2::{Digest as _, Sha256};

use super::tokenizer::hex;
use crate::error::{HintExt as _, user_error};

const BUFFER: usize = 1 << 17;

const FETCH_AGAIN: &str = "fetch it again";

/// Size and SHA-256 of a file as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    /// Size.
    pub bytes: u64,
    /// In hex.
    pub sha256: String,
}

/// Hashes a file.
///
/// # Errors
/// When it cannot be read.
pub fn fingerprint(path: &Path) -> Result<Fingerprint> {
    let read = || -> io::Result<Fingerprint> {
        let mut file = File::open(path)?;
        let (mut hash, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; BUFFER]);
        loop {
            let count = file.read(&mut buffer)?;
            let Some(chunk) = buffer.get(..count).filter(|chunk| !chunk.is_empty()) else { break };
            hash.update(chunk);
            bytes += count as u64;
        }
        Ok(Fingerprint { bytes, sha256: hex(&hash.finalize()) })
    };
    read().with_context(|| format!("cannot read `{}`", path.display()))
}

/// Reads the records of a dump and hands each to `each` with its number, counted from 1.
///
/// `members` are the file names to look for in a `.zip` that holds several; `wrappers` the keys under which an
/// object may hold the array.
///
/// # Errors
/// When the file is missing, empty, truncated, of another form, or a record does not fit; the error names the
/// file, the record and what was expected. Errors of `each` come back with the same.
pub fn read_records<T: DeserializeOwned>(
    path: &Path,
    members: &[&str],
    wrappers: &[&str],
    each: &mut dyn FnMut(u32, T) -> Result<()>,
) -> Result<()> {
    let mut read = || -> Result<()> {
        let mut file = File::open(path)?;
        match Packing::of(&mut file)? {
            Packing::Plain => records(&mut BufReader::with_capacity(BUFFER, file), wrappers, each),
            Packing::Gzip => {
                let plain = flate2::bufread::MultiGzDecoder::new(BufReader::with_capacity(BUFFER, file));
                records(&mut BufReader::with_capacity(BUFFER, plain), wrappers, each)
            }
            Packing::Zip => zipped(file, members, wrappers, each),
        }
    };
    read().with_context(|| format!("cannot read `{}`", path.display()))
}

/// How a file is packed.
enum Packing {
    Plain,
    Gzip,
    Zip,
}

impl Packing {
    fn of(file: &mut File) -> Result<Self> {
        let mut magic = Vec::new();
        file.take(4).read_to_end(&mut magic)?;
        file.rewind()?;
        match magic.as_slice() {
            [0x1f, 0x8b, ..] => Ok(Self::Gzip),
            b"PK\x03\x04" => Ok(Self::Zip),
            b"PAR1" => Err(unreadable("a parquet file")),
            [0x28, 0xb5, 0x2f, 0xfd] => Err(unreadable("compressed with zstd")),
            [0xfd, b'7', b'z', b'X'] => Err(unreadable("compressed with xz")),
            [b'B', b'Z', b'h', _] => Err(unreadable("compressed with bzip2")),
            _ => Ok(Self::Plain),
        }
    }
}

fn unreadable(what: &str) -> Error {
    user_error(
        format!("it is {what}, expected JSON or JSON Lines, plain, `.gz` or `.zip`"),
        "unpack or convert it first",
    )
}

fn zipped<T: DeserializeOwned>(
    file: File,
    members: &[&str],
    wrappers: &[&str],
    each: &mut dyn FnMut(u32, T) -> Result<()>,
) -> Result<()> {
    let mut archive = zip::ZipArchive::new(BufReader::with_capacity(BUFFER, file))
        .context("the archive is damaged or truncated")
        .hint(FETCH_AGAIN)?;
    let names: Vec<String> = archive
        .file_names()
        .map(|name| name.map(|name| name.into_owned()))
        .collect::<Result<_, _>>()
        .context("a member's name cannot be read")?;
    let name = choose_member(&names, members)?;
    let member = archive.by_name(&name).with_context(|| format!("in its member `{name}`"))?;
    records(&mut BufReader::with_capacity(BUFFER, member), wrappers, each)
        .with_context(|| format!("in its member `{name}`"))
}

/// The one JSON file of an archive, or the one of a known name.
fn choose_member(names: &[String], members: &[&str]) -> Result<String> {
    let base = |name: &str| name.rsplit('/').next().unwrap_or(name).to_string();
    // macOS adds a shadow of every file.
    let is_data = |name: &&String| {
        let base = base(name);
        !name.starts_with("__MACOSX/") && (base.ends_with(".json") || base.ends_with(".jsonl"))
    };
    let data: Vec<&String> = names.iter().filter(is_data).collect();
    if let [only] = data.as_slice() {
        return Ok((*only).clone());
    }
    let wanted = members.iter().find_map(|member| data.iter().find(|name| base(name) == **member));
    wanted.map(|name| (*name).clone()).ok_or_else(|| {
        let found = if names.is_empty() { "nothing".to_string() } else { quoted(names) };
        user_error(
            format!("the archive holds {found}, expected one JSON file or {}", quoted(members)),
            "unpack it and name the file itself",
        )
    })
}

fn quoted<S: AsRef<str>>(names: &[S]) -> String {
    let mut list: Vec<String> = names.iter().take(8).map(|name| format!("`{}`", name.as_ref())).collect();
    if names.len() > list.len() {
        list.push(format!("{} more", names.len() - list.len()));
    }
    list.join(", ")
}

fn records<T: DeserializeOwned>(
    reader: &mut dyn BufRead,
    wrappers: &[&str],
    each: &mut dyn FnMut(u32, T) -> Result<()>,
) -> Result<()> {
    match first_byte(reader).map_err(|error| early_end(error, 0))? {
        b'[' => array(reader, each),
        b'{' if is_wrapped(reader.fill_buf()?, wrappers) => wrapped(reader, wrappers, each),
        b'{' => lines(reader, each),
        0 => Err(user_error("it is empty", FETCH_AGAIN)),
        _ => Err(not_json(reader.fill_buf()?)),
    }
}

/// Passes over a byte-order mark and white space; 0 where nothing follows.
fn first_byte(reader: &mut dyn BufRead) -> io::Result<u8> {
    if reader.fill_buf()?.starts_with(b"\xef\xbb\xbf") {
        reader.consume(3);
    }
    loop {
        let buffer = reader.fill_buf()?;
        let Some(first) = buffer.first().copied() else { return Ok(0) };
        if !first.is_ascii_whitespace() {
            return Ok(first);
        }
        reader.consume(1);
    }
}

fn not_json(beginning: &[u8]) -> Error {
    if beginning.starts_with(b"version https://git-lfs") {
        return user_error(
            "it is a Git LFS pointer, not the data",
            "run `git lfs pull` where it was cloned, or download the file itself",
        );
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
        format!("it begins with `{text}`, expected a JSON array (`[`) or JSON Lines (`{{`)"),
        "is it another file of the dump?",
    )
}

/// Whether an object begins with one of the keys and an array.
fn is_wrapped(beginning: &[u8], wrappers: &[&str]) -> bool {
    let squeezed: Vec<u8> =
        beginning.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).take(64).collect();
    wrappers.iter().any(|key| squeezed.starts_with(format!("{{\"{key}\":[").as_bytes()))
}

fn array<T: DeserializeOwned>(
    reader: &mut dyn BufRead,
    each: &mut dyn FnMut(u32, T) -> Result<()>,
) -> Result<()> {
    let mut json = serde_json::Deserializer::from_reader(&mut *reader);
    let mut pass = Pass::new(each);
    let outcome = json.deserialize_seq(&mut pass).and_then(|()| json.end());
    pass.finish(outcome, reader)
}

fn wrapped<T: DeserializeOwned>(
    reader: &mut dyn BufRead,
    wrappers: &[&str],
    each: &mut dyn FnMut(u32, T) -> Result<()>,
) -> Result<()> {
    let mut json = serde_json::Deserializer::from_reader(&mut *reader);
    let mut pass = Pass::new(each);
    let outcome = json.deserialize_map(Wrapped { wrappers, pass: &mut pass }).and_then(|()| json.end());
    pass.finish(outcome, reader)
}

fn lines<T: DeserializeOwned>(
    reader: &mut dyn BufRead,
    each: &mut dyn FnMut(u32, T) -> Result<()>,
) -> Result<()> {
    let (mut line, mut number) = (Vec::new(), 0);
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line).map_err(|error| early_end(error, number))? == 0 {
            return Ok(());
        }
        number += 1;
        if line.trim_ascii().is_empty() {
            continue;
        }
        // Without its line break: a string that the end of the file cuts off would seem to hold one.
        let record = match serde_json::from_slice(line.trim_ascii_end()) {
            Err(error) if error.is_eof() && is_at_end(reader) => return Err(truncated(number)),
            other => other.map_err(|error| anyhow!("record {number}: {error}"))?,
        };
        each(number, record).with_context(|| format!("record {number}"))?;
    }
}

/// What compressed data says when it ends too early, or does not agree with its checksum.
fn early_end(error: io::Error, records: u32) -> Error {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return truncated(records + 1);
    }
    user_error(format!("after record {records}: {error}"), FETCH_AGAIN)
}

fn truncated(record: u32) -> Error {
    user_error(format!("it ends in the middle of record {record}: the file is truncated"), FETCH_AGAIN)
}

/// Whether nothing but white space is left.
fn is_at_end(reader: &mut dyn BufRead) -> bool {
    // What cannot be read is told by whoever needs it.
    matches!(first_byte(reader), Ok(0))
}

/// serde_json has no kind for it, only words.
fn is_control_character(error: &serde_json::Error) -> bool {
    error.to_string().starts_with("control character")
}

/// A pass over the records of an array, which keeps what went wrong where serde could not carry it.
struct Pass<'a, T> {
    each: &'a mut dyn FnMut(u32, T) -> Result<()>,
    number: u32,
    failure: Option<Error>,
}

impl<'a, T> Pass<'a, T> {
    fn new(each: &'a mut dyn FnMut(u32, T) -> Result<()>) -> Self {
        Self { each, number: 0, failure: None }
    }

    /// `reader` stands where the pass ended.
    fn finish(self, outcome: Result<(), serde_json::Error>, reader: &mut dyn BufRead) -> Result<()> {
        let next = self.number + 1;
        match (self.failure, outcome) {
            (Some(failure), _) => Err(failure).with_context(|| format!("record {}", self.number)),
            (None, Ok(())) => Ok(()),
            (None, Err(error)) if error.is_io() => Err(early_end(error.into(), self.number)),
            (None, Err(error)) if error.is_eof() => Err(truncated(next)),
            // A line break behind a string that the end of the file cuts off seems to be a part of it.
            (None, Err(error)) if is_control_character(&error) && is_at_end(reader) => Err(truncated(next)),
            (None, Err(error)) => Err(anyhow!("record {next}: {error}")),
        }
    }
}

impl<'de, T: DeserializeOwned> Visitor<'de> for &mut Pass<'_, T> {
    type Value = ();

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("an array of records")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<(), A::Error> {
        while let Some(record) = array.next_element::<T>()? {
            self.number += 1;
            if let Err(failure) = (self.each)(self.number, record) {
                self.failure = Some(failure);
                return Err(serde::de::Error::custom("stopped"));
            }
        }
        Ok(())
    }
}

impl<'de, T: DeserializeOwned> DeserializeSeed<'de> for &mut Pass<'_, T> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

/// An object that holds the array under a key.
struct Wrapped<'a, 'b, T> {
    wrappers: &'a [&'a str],
    pass: &'a mut Pass<'b, T>,
}

impl<'de, T: DeserializeOwned> Visitor<'de> for Wrapped<'_, '_, T> {
    type Value = ();

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("an object with an array of records")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if self.wrappers.contains(&key.as_str()) {
                map.next_value_seed(&mut *self.pass)?;
            } else {
                map.next_value::<serde::de::IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
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
        assert!(told(b"instruction,output\n").contains("it begins with `instruction,output`"));
        assert!(told(b"PAR1....").contains("a parquet file"));
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

    #[test]
    fn an_archive_cut_off_is_damaged() {
        let zip = zip_of(&[("train.json", ARRAY.as_bytes())]);
        assert!(told(&zip[..zip.len() - 10]).contains("damaged or truncated"));
    }

    #[test]
    fn a_record_that_does_not_fit_is_told_with_what_was_expected() {
        let text = told(br#"[{"text": "a"}, {"txt": "b"}]"#);
        assert!(text.contains("record 2: missing field `text`"), "{text}");
        let text = told(b"{\"text\": \"a\"}\n{\"text\": 7}\n");
        assert!(text.contains("record 2: invalid type: integer `7`, expected a string"), "{text}");
        let text = told(b"[{\"text\": \"a\"}, {\"text\": \"b\nc\"}]");
        assert!(text.contains("record 2: control character"), "{text}");
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
