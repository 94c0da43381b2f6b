//! The headers of a column's pages, read before the library believes them.
//!
//! It passes over a list that a header claims element by element, which may be billions, and takes no notice of the
//! file's end while it does; and it takes what lies in a page of an index for further headers.

use std::io::{BufRead, Read as _, Seek};

use anyhow::{Context as _, Result, bail, ensure};

use super::compact::{Reader, expect};
use super::format::{DATA, DATA_V2, DICTIONARY, HEADER, SIZE, TYPE, field};

/// The kinds of pages that columns have: `PageHeader.type`, and which header they have then.
const KINDS: [(i64, i64); 3] = [(0, DATA), (2, DICTIONARY), (3, DATA_V2)];

/// Refuses a header that is none, and pages that go beyond the column's `length` bytes, of which `column` has the first
/// before it.
///
/// # Errors
/// When it is so, or the file cannot be read.
pub fn check(column: &mut (impl BufRead + Seek), length: u64) -> Result<()> {
    let mut at = 0;
    while at < length {
        let page = page(column, length - at).with_context(|| format!("the page at byte {at}"))?;
        at += page;
    }
    Ok(())
}

/// Goes behind a page and gives its length, at most `most`.
fn page(column: &mut (impl BufRead + Seek), most: u64) -> Result<u64> {
    let mut reader = Reader::new(column.by_ref().take(most));
    let (mut size, mut of, mut seen) = (None, None, Vec::new());
    reader.fields(&mut |reader, id, kind| {
        let known = field(HEADER, id);
        let number = match id {
            TYPE => &mut of,
            SIZE => &mut size,
            _ => {
                seen.push(id);
                return reader.typed(kind, known);
            }
        };
        known.map_or(Ok(()), |known| expect(kind, known))?;
        *number = Some(reader.integer()?);
        Ok(())
    })?;
    let of = of.context("its header does not say of which type it is")?;
    let known = KINDS.into_iter().find(|(kind, _)| *kind == of);
    ensure!(
        known.is_some_and(|(_, header)| seen.contains(&header)),
        "of type {of}, it has no header of that"
    );
    let header = reader.read();
    let size = size.context("its header does not say how long it is")?;
    let left = most - header;
    // The library looks at the last 32 bits.
    ensure!(i32::try_from(size).is_ok(), "it claims {size} bytes");
    match u64::try_from(size) {
        Ok(size) if size <= left => {
            column.seek_relative(size as i64)?;
            Ok(header + size)
        }
        _ => bail!("it claims {size} bytes, the column has {left} left"),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use std::io::Cursor;

    use super::*;

    /// A data page of 3 bytes, with its header.
    const PAGE: [u8; 20] =
        [0x15, 0, 0x15, 6, 0x15, 6, 0x2c, 0x15, 2, 0x15, 0, 0x15, 0, 0x15, 0, 0, 0, b'a', b'b', b'c'];

    fn told(column: &[u8]) -> String {
        let error = check(&mut Cursor::new(column), column.len() as u64).unwrap_err();
        format!("{error:#}")
    }

    #[test]
    fn pages_fill_their_column() {
        let column = [PAGE, PAGE].concat();
        check(&mut Cursor::new(&column), 40).unwrap();
        check(&mut Cursor::new(&column), 20).unwrap();
        check(&mut Cursor::new(&[]), 0).unwrap();
        for length in (1..40).filter(|length| *length != 20) {
            let told = told(&column[..length]);
            assert!(told.starts_with(if length < 20 {
                "the page at byte 0: "
            } else {
                "the page at byte 20: "
            }));
            assert!(
                told.contains(if length % 20 < 17 { "ends within a value" } else { "it claims 3 bytes, " }),
                "{told}"
            );
        }
        // No longer than the column, whatever lies behind it.
        assert!(check(&mut Cursor::new(&column), 30).is_err());
    }

    #[test]
    fn a_header_with_fields_of_other_types_or_none_is_refused() {
        let with = |at: usize, byte| {
            let mut page = PAGE;
            page[at] = byte;
            told(&page)
        };
        assert!(with(5, 5).contains("it claims -3 bytes"), "{}", with(5, 5));
        assert!(with(4, 0x16).contains("of another type"));
        assert!(with(6, 0x25).contains("of another type"));
        assert!(with(7, 0x16).contains("of another type"));
        assert!(with(1, 2).contains("of type 1, it has no header of that"), "{}", with(1, 2));
        assert!(with(1, 6).contains("of type 3, it has no header of that"), "{}", with(1, 6));
        let sizeless = [&PAGE[..4], &[0x25, 6, 0x1c], &PAGE[7..]].concat();
        assert!(told(&sizeless).contains("does not say how long"), "{}", told(&sizeless));
        let more = |list: &[u8]| told(&[&[0x99][..], list, &PAGE].concat());
        assert!(more(&[0xf1, 0xff, 0xff, 0xff, 0xff, 0x07]).contains("a list of booleans"));
        assert!(more(&[0xf7, 0xff, 0xff, 0xff, 0xff, 0x07]).contains("ends within a value"));
        let wide = [&PAGE[..5], &[0x86, 0x80, 0x80, 0x80, 0x20], &PAGE[6..]].concat();
        assert!(told(&wide).contains("it claims 4294967299 bytes"), "{}", told(&wide));
    }
}
