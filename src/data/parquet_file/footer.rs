//! What a parquet file's footer claims of its schema, read before the library believes it.
//!
//! Its schema is a list of elements, each of which says how many of those behind it are its children; the library makes
//! room for that many before it looks for the first.

use anyhow::{Context as _, Result, bail, ensure};

use super::compact::{BINARY, BYTE, I32, I64, LIST, Reader, STRUCT, TRUE, expect};

/// `FileMetaData.schema`, `SchemaElement.num_children` and `SchemaElement.logicalType`.
const SCHEMA: i64 = 2;
const CHILDREN: i64 = 5;
const LOGICAL: i64 = 10;

/// Refuses a schema of which an element has more children than the schema has elements.
///
/// # Errors
/// When it is so, or the footer is no struct of the compact protocol with the format's fields.
pub fn check(footer: &[u8]) -> Result<()> {
    let mut reader = Reader::new(footer);
    let walked = reader.fields(&mut |reader, id, kind| {
        expect(kind, file_field(id))?;
        if id != SCHEMA {
            return reader.skip(kind);
        }
        let (elements, of) = reader.list()?;
        ensure!(elements == 0 || of == STRUCT, "its schema is no list of elements");
        (0..elements).try_for_each(|_| element(reader, elements))
    });
    walked.context("its footer is damaged")
}

/// An element of a schema of so many.
fn element(reader: &mut Reader<&[u8]>, elements: u64) -> Result<()> {
    reader.fields(&mut |reader, id, kind| {
        expect(kind, element_field(id))?;
        match id {
            CHILDREN => {
                let children = reader.integer()?;
                // Below zero as well: the library looks at the last 32 bits.
                if children < 0 || children > elements as i64 {
                    bail!("its schema has {elements} elements, one of them {children} children");
                }
                Ok(())
            }
            LOGICAL => reader.fields(&mut |reader, of, kind| {
                expect(kind, Some(STRUCT))?;
                reader.fields(&mut |reader, id, kind| {
                    expect(kind, logical_field(of, id))?;
                    reader.skip(kind)
                })
            }),
            _ => reader.skip(kind),
        }
    })
}

/// The type of a field of `FileMetaData`; `None` for what the format does not know.
fn file_field(id: i64) -> Option<u8> {
    Some(match id {
        1 => I32,
        SCHEMA | 4 | 5 | 7 => LIST,
        3 => I64,
        6 | 9 => BINARY,
        8 => STRUCT,
        _ => return None,
    })
}

/// As [`file_field`], of `SchemaElement`.
fn element_field(id: i64) -> Option<u8> {
    Some(match id {
        1..=3 | CHILDREN..=9 => I32,
        4 => BINARY,
        LOGICAL => STRUCT,
        _ => return None,
    })
}

/// As [`file_field`], of the type `of` in `LogicalType`: decimals, times, integers, variants, shapes on earth.
fn logical_field(of: i64, id: i64) -> Option<u8> {
    Some(match (of, id) {
        (5, 1 | 2) | (18, 2) => I32,
        (7 | 8, 1) | (10, 2) => TRUE,
        (7 | 8, 2) => STRUCT,
        (10 | 16, 1) => BYTE,
        (17 | 18, 1) => BINARY,
        _ => return None,
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
}
