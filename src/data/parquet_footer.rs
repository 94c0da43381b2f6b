//! What a parquet file's footer claims of its schema, read before the library believes it.
//!
//! The footer is a struct in Thrift's compact protocol. Its schema is a list of elements, each of which says how many of
//! those behind it are its children; the library makes room for that many before it looks for the first.

use anyhow::{Context as _, Result, bail, ensure};

/// `FileMetaData.schema`, `SchemaElement.num_children` and `SchemaElement.logicalType`.
const SCHEMA: i64 = 2;
const CHILDREN: i64 = 5;
const LOGICAL: i64 = 10;
/// How deep values may lie in one that is passed over; the format's lie less deep.
const DEPTH: usize = 32;

/// Types of the compact protocol.
const TRUE: u8 = 1;
const FALSE: u8 = 2;
const BYTE: u8 = 3;
const I16: u8 = 4;
const I32: u8 = 5;
const I64: u8 = 6;
const DOUBLE: u8 = 7;
const BINARY: u8 = 8;
const LIST: u8 = 9;
const SET: u8 = 10;
const MAP: u8 = 11;
const STRUCT: u8 = 12;

/// Refuses a schema of which an element has more children than the schema has elements.
///
/// # Errors
/// When it is so, or the footer is no struct of the compact protocol.
pub fn check(footer: &[u8]) -> Result<()> {
    let mut reader = Reader { left: footer };
    reader.fields(&mut |reader, id, kind| {
        expect(kind, file_field(id))?;
        if id != SCHEMA {
            return reader.skip(kind, DEPTH);
        }
        let (elements, of) = reader.list()?;
        ensure!(elements == 0 || of == STRUCT, "its schema is no list of elements");
        (0..elements).try_for_each(|_| element(reader, elements))
    })
}

/// An element of a schema of so many.
fn element(reader: &mut Reader<'_>, elements: u64) -> Result<()> {
    reader.fields(&mut |reader, id, kind| {
        expect(kind, element_field(id))?;
        match id {
            CHILDREN => {
                let children = reader.zigzag()?;
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
                    reader.skip(kind, DEPTH)
                })
            }),
            _ => reader.skip(kind, DEPTH),
        }
    })
}

/// Refuses a field of another type than the format's: the library reads it as if it were of that, and would see other
/// fields behind it than are checked here.
fn expect(kind: u8, of: Option<u8>) -> Result<()> {
    let kind = if kind == FALSE { TRUE } else { kind };
    ensure!(of.is_none_or(|of| of == kind), "its schema has a field of another type than the format's");
    Ok(())
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

/// Bytes that are not read yet. What is read takes a byte at least, so that no claim keeps it longer than the footer is.
struct Reader<'a> {
    left: &'a [u8],
}

impl Reader<'_> {
    fn byte(&mut self) -> Result<u8> {
        let (first, rest) = self.left.split_first().context("its footer ends within a value")?;
        self.left = rest;
        Ok(*first)
    }

    fn pass(&mut self, count: u64) -> Result<()> {
        let rest = usize::try_from(count).ok().and_then(|count| self.left.get(count..));
        self.left = rest.context("its footer ends within a value")?;
        Ok(())
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        bail!("its footer has a number of more than 64 bits")
    }

    fn zigzag(&mut self) -> Result<i64> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// The number of elements of a list, and their type.
    fn list(&mut self) -> Result<(u64, u8)> {
        let head = self.byte()?;
        let count = if head >> 4 == 15 { self.varint()? } else { u64::from(head >> 4) };
        Ok((count, head & 15))
    }

    /// Goes through a struct's fields; `each` reads the value of the field of this number and type.
    fn fields(&mut self, each: &mut dyn FnMut(&mut Self, i64, u8) -> Result<()>) -> Result<()> {
        let mut id = 0_i64;
        loop {
            let head = self.byte()?;
            if head == 0 {
                return Ok(());
            }
            id = if head >> 4 == 0 { self.zigzag()? } else { id.saturating_add(i64::from(head >> 4)) };
            ensure!(i16::try_from(id).is_ok(), "its footer has a field of a number that there is not");
            each(self, id, head & 15)?;
        }
    }

    /// Passes over the value of a field.
    fn skip(&mut self, kind: u8, depth: usize) -> Result<()> {
        // In a field, the type is the value.
        if matches!(kind, TRUE | FALSE) { Ok(()) } else { self.skip_element(kind, depth) }
    }

    /// Passes over an element of a list, or a field's value.
    fn skip_element(&mut self, kind: u8, depth: usize) -> Result<()> {
        ensure!(depth > 0, "its footer holds values within values within values");
        match kind {
            // The library takes them for fields, which have no bytes of their own.
            TRUE | FALSE => bail!("its footer has a list of booleans, which the format has not"),
            BYTE => self.pass(1),
            I16 | I32 | I64 => self.varint().map(|_| ()),
            DOUBLE => self.pass(8),
            BINARY => {
                let length = self.varint()?;
                self.pass(length)
            }
            LIST | SET => {
                let (count, of) = self.list()?;
                (0..count).try_for_each(|_| self.skip_element(of, depth - 1))
            }
            MAP => {
                let count = self.varint()?;
                if count == 0 {
                    return Ok(());
                }
                let kinds = self.byte()?;
                (0..count).try_for_each(|_| {
                    self.skip_element(kinds >> 4, depth - 1)?;
                    self.skip_element(kinds & 15, depth - 1)
                })
            }
            STRUCT => self.fields(&mut |reader, _, kind| reader.skip(kind, depth - 1)),
            other => bail!("its footer has a value of type {other}, which there is not"),
        }
    }
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

    #[test]
    fn more_children_than_elements_are_refused() {
        check(&footer([0x82, 0])).unwrap();
        check(&footer([0x84, 0])).unwrap();
        let told = check(&footer([0xfe, 0x7f])).unwrap_err().to_string();
        assert_eq!(told, "its schema has 2 elements, one of them 8191 children");
        let told = check(&footer([0x83, 0])).unwrap_err().to_string();
        assert_eq!(told, "its schema has 2 elements, one of them -2 children");
    }

    #[test]
    fn a_footer_that_is_cut_or_none_is_an_error() {
        let whole = footer([0x82, 0]);
        for length in 0..whole.len() {
            assert!(check(&whole[..length]).is_err(), "{length} bytes of {}", whole.len());
        }
        // Field 11, which the format does not know: lists of billions of structs and of booleans, and of one boolean.
        let told = |of: &[u8]| check(&[&[0xb9], of, &[0]].concat()).unwrap_err().to_string();
        assert!(told(&[0xfc, 0xff, 0xff, 0xff, 0xff, 0x0f]).contains("ends within a value"));
        assert!(told(&[0xf1, 0xff, 0xff, 0xff, 0xff, 0x0f]).contains("a list of booleans"));
        assert!(told(&[0x11, 1]).contains("a list of booleans"));
        assert!(check(&[0xbd]).unwrap_err().to_string().contains("type 13"));
        let told = check(&[0x15, 4, 0x19, 0x1c, 0x32, 0, 0]).unwrap_err().to_string();
        assert!(told.contains("of another type"), "{told}");
        assert!(check(&vec![0xbc; 4096]).unwrap_err().to_string().contains("within values"));
    }
}
