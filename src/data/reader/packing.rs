//! How a file is packed: plain, gzip, zstd, or a member of a zip archive.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read, Seek as _};

use anyhow::{Context as _, Error, Result};

use super::{BUFFER, FETCH_AGAIN, quoted};
use crate::error::{HintExt as _, user_error};

/// Bytes from which a file's form is told.
const HEAD: u64 = 1 << 16;

/// How a file is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    Plain,
    Gzip,
    Zstd,
    Zip,
}

impl Packing {
    /// Looks at the first bytes, and leaves the file at its beginning.
    pub(super) fn of(file: &mut File) -> Result<Self> {
        let mut magic = Vec::new();
        file.take(4).read_to_end(&mut magic)?;
        file.rewind()?;
        match magic.as_slice() {
            [0x1f, 0x8b, ..] => Ok(Self::Gzip),
            b"PK\x03\x04" => Ok(Self::Zip),
            // The first frame may be one that is to be skipped.
            [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Ok(Self::Zstd),
            b"PK\x05\x06" => Err(user_error("the archive is empty", FETCH_AGAIN)),
            [0xfd, b'7', b'z', b'X'] => Err(unreadable("xz")),
            [b'B', b'Z', b'h', _] => Err(unreadable("bzip2")),
            [b'7', b'z', 0xbc, 0xaf] => Err(unreadable("7z")),
            _ => Ok(Self::Plain),
        }
    }
}

fn unreadable(what: &str) -> Error {
    user_error(
        format!("it is compressed with {what}, expected plain, `.gz`, `.zst` or `.zip`"),
        "unpack it first",
    )
}

/// Unpacks `file` and hands what is inside to `read`; of an archive, the member among `members` or the only one.
pub(super) fn unpack(
    mut file: File,
    members: &[&str],
    read: &mut dyn FnMut(Opened<'_>) -> Result<()>,
) -> Result<()> {
    match Packing::of(&mut file)? {
        Packing::Plain => read(Opened::Plain(file)),
        Packing::Gzip => {
            read(Opened::stream(flate2::bufread::MultiGzDecoder::new(BufReader::with_capacity(BUFFER, file))))
        }
        Packing::Zstd => read(Opened::stream(zstd::Decoder::new(file)?)),
        Packing::Zip => {
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
            read(Opened::stream(member)).with_context(|| format!("in its member `{name}`"))
        }
    }
}

/// What is inside a file.
pub(super) enum Opened<'a> {
    /// A plain file, which may be read at any place.
    Plain(File),
    /// Read from beginning to end only.
    Stream(Box<dyn Read + 'a>),
}

impl<'a> Opened<'a> {
    fn stream(read: impl Read + 'a) -> Self {
        Self::Stream(Box::new(read))
    }

    /// The beginning, and a reader that starts with it.
    pub(super) fn peek(self) -> Peeked<'a> {
        let mut rest: Box<dyn Read + 'a> = match self {
            Self::Plain(file) => Box::new(file),
            Self::Stream(stream) => stream,
        };
        let mut head = Vec::new();
        let error = (&mut rest).take(HEAD).read_to_end(&mut head).err();
        Peeked { head: Cursor::new(head), error, rest: BufReader::with_capacity(BUFFER, rest) }
    }
}

/// A reader whose beginning was read already.
///
/// What went wrong there is told when the bytes before it are used up, so that it is told with its record.
pub(super) struct Peeked<'a> {
    head: Cursor<Vec<u8>>,
    error: Option<io::Error>,
    rest: BufReader<Box<dyn Read + 'a>>,
}

impl Peeked<'_> {
    /// The beginning; whole where the data is short.
    pub(super) fn head(&self) -> &[u8] {
        self.head.get_ref()
    }

    fn is_in_head(&self) -> bool {
        self.head.position() < self.head.get_ref().len() as u64
    }
}

impl Read for Peeked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let ready = self.fill_buf()?;
        let count = ready.len().min(buffer.len());
        if let (Some(to), Some(from)) = (buffer.get_mut(..count), ready.get(..count)) {
            to.copy_from_slice(from);
        }
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for Peeked<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.is_in_head() {
            return self.head.fill_buf();
        }
        match self.error.take() {
            Some(error) => {
                // It stays what it is: whoever asks again must not take the end for a good one.
                let again = io::Error::new(error.kind(), error.to_string());
                self.error = Some(again);
                Err(error)
            }
            None => self.rest.fill_buf(),
        }
    }

    fn consume(&mut self, count: usize) {
        if self.is_in_head() { self.head.consume(count) } else { self.rest.consume(count) }
    }
}

/// Endings of the files that hold records.
pub(super) const ENDINGS: [&str; 7] = ["json", "jsonl", "ndjson", "csv", "tsv", "parquet", "arrow"];

/// The one data file of an archive, or the one of a known name.
fn choose_member(names: &[String], members: &[&str]) -> Result<String> {
    let base = |name: &str| name.rsplit('/').next().unwrap_or(name).to_string();
    // macOS adds a shadow of every file.
    let is_data = |name: &&String| {
        let ending = base(name).rsplit_once('.').map(|(_, ending)| ending.to_ascii_lowercase());
        !name.starts_with("__MACOSX/") && ending.is_some_and(|ending| ENDINGS.contains(&ending.as_str()))
    };
    let data: Vec<&String> = names.iter().filter(is_data).collect();
    if let [only] = data.as_slice() {
        return Ok((*only).clone());
    }
    let wanted = members.iter().find_map(|member| data.iter().find(|name| base(name) == **member));
    wanted.map(|name| (*name).clone()).ok_or_else(|| {
        let found = if names.is_empty() { "nothing".to_string() } else { quoted(names) };
        let known = if members.is_empty() { String::new() } else { format!(" or {}", quoted(members)) };
        user_error(
            format!("the archive holds {found}, expected one data file{known}"),
            "unpack it and name the file itself",
        )
    })
}
