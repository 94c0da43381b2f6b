//! What a parquet file's footer claims of its schema, read before the library believes it.
//!
//! Its schema is a list of elements, each of which says how many of those behind it are its children; the library makes
//! room for that many before it looks for the first.

use anyhow::{Context as _, Result, bail, ensure};

use super::compact::{Reader, STRUCT, expect};
use super::format::{CHILDREN, ELEMENT, FILE, SCHEMA, field};

/// Refuses a schema of which an element has more children than the schema has elements.
///
/// # Errors
/// When it is so, or the footer is no struct of the compact protocol with the format's fields.
pub fn check(footer: &[u8]) -> Result<()> {
    let mut reader = Reader::new(footer);
    let walked = reader.fields(&mut |reader, id, kind| {
        let of = field(FILE, id);
        let Some(schema) = of.filter(|_| id == SCHEMA) else { return reader.typed(kind, of) };
        expect(kind, schema)?;
        let (elements, of) = reader.list()?;
        ensure!(elements == 0 || of == STRUCT, "its schema is no list of elements");
        (0..elements).try_for_each(|_| element(reader, elements))
    });
    walked.context("its footer is damaged")
}

/// An element of a schema of so many.
fn element(reader: &mut Reader<&[u8]>, elements: u64) -> Result<()> {
    reader.fields(&mut |reader, id, kind| {
        let of = field(ELEMENT, id);
        let Some(number) = of.filter(|_| id == CHILDREN) else { return reader.typed(kind, of) };
        expect(kind, number)?;
        let children = reader.integer()?;
        // Below zero as well: the library looks at the last 32 bits.
        if children < 0 || children > elements as i64 {
            bail!("its schema has {elements} elements, one of them {children} children");
        }
        Ok(())
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use super::*;

    /// Version 2; a schema of a root with `children` (zigzag, two bytes) and a leaf `a`.
    fn footer(children: [u8; 2]) -> Vec<u8> {
        let mut bytes = vec![0x15, 4, 0x19, 0x2c];
        bytes.extend([0x48, 1, b'r', 0x15, children[0], children[1], 0]);
        bytes.extend([0x15, 2, 0x38, 1, b'a', 0]);
        bytes.push(0);
        bytes
    }

    fn told(footer: &[u8]) -> String {
        format!("{:#}", check(footer).unwrap_err())
    }

    #[test]
    fn more_children_than_elements_are_refused() {
        check(&footer([0x82, 0])).unwrap();
        check(&footer([0x84, 0])).unwrap();
        let claims = "its footer is damaged: its schema has 2 elements, one of them";
        assert_eq!(told(&footer([0xfe, 0x7f])), format!("{claims} 8191 children"));
        assert_eq!(told(&footer([0x83, 0])), format!("{claims} -2 children"));
    }

    #[test]
    fn a_footer_that_is_cut_or_of_other_types_is_an_error() {
        let whole = footer([0x82, 0]);
        for length in 0..whole.len() {
            let told = told(&whole[..length]);
            assert!(told.contains("ends within a value"), "{length} bytes of {}: {told}", whole.len());
        }
        for (at, other) in [(0, 0x16), (2, 0x1a), (3, 0x2b), (4, 0x45), (7, 0x16), (11, 0x16), (13, 0x39)] {
            let mut bytes = whole.clone();
            bytes[at] = other;
            let told = told(&bytes);
            assert!(told.contains("of another type") || told.contains("no list of elements"), "{at}: {told}");
        }
    }

    /// A file of one row group, whose column says where it lies, which encodings it has and what its least value is.
    #[test]
    fn types_are_held_against_the_format_s_however_deep() {
        let column = [0x29, 0x15, 0, 0xac, 0x18, 1, b'a', 0, 0];
        let group = [&[0x19, 0x1c, 0x26, 8, 0x1c][..], &column, &[0, 0]].concat();
        let whole = [&[0x49, 0x1c][..], &group, &[0]].concat();
        check(&whole).unwrap();
        // A row group that is a list, a chunk's place in 32 bits, encodings in 64, statistics that are a list, and a
        // list in them.
        for (at, other) in [(1, 0x19), (3, 0x19), (4, 0x25), (8, 0x16), (10, 0xa9), (11, 0x19)] {
            let mut bytes = whole.clone();
            bytes[at] = other;
            assert!(told(&bytes).contains("of another type"), "{at}: {}", told(&bytes));
        }
    }
}
