//! Thrift's compact protocol, in which a parquet file describes itself: its footer and the header of each page.

use std::io::{self, ErrorKind, Read};

use anyhow::{Error, Result, anyhow, bail, ensure};

use super::format::{Type, field};

/// Types of values. In a list, either boolean stands for both.
pub const TRUE: u8 = 1;
pub const FALSE: u8 = 2;
pub const BYTE: u8 = 3;
pub const I16: u8 = 4;
pub const I32: u8 = 5;
pub const I64: u8 = 6;
pub const DOUBLE: u8 = 7;
pub const BINARY: u8 = 8;
pub const LIST: u8 = 9;
pub const SET: u8 = 10;
pub const MAP: u8 = 11;
pub const STRUCT: u8 = 12;

/// How deep values may lie in one that is passed over; the format's lie less deep.
const DEPTH: usize = 32;

/// Reads values. What is read takes a byte at least, so that no claim keeps it longer than there are bytes.
pub struct Reader<R> {
    from: R,
    read: u64,
}

impl<R: Read> Reader<R> {
    pub fn new(from: R) -> Self {
        Self { from, read: 0 }
    }

    /// Bytes that were read.
    pub fn read(&self) -> u64 {
        self.read
    }

    pub fn byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        self.from.read_exact(&mut byte).map_err(cut)?;
        self.read += 1;
        Ok(byte[0])
    }

    /// Passes over so many bytes.
    pub fn pass(&mut self, count: u64) -> Result<()> {
        let passed = io::copy(&mut (&mut self.from).take(count), &mut io::sink())?;
        self.read += passed;
        if passed < count { Err(cut(ErrorKind::UnexpectedEof.into())) } else { Ok(()) }
    }

    /// An integer without a sign, of any width.
    pub fn unsigned(&mut self) -> Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        bail!("it has a number of more than 64 bits")
    }

    /// An integer with its sign, of any width.
    pub fn integer(&mut self) -> Result<i64> {
        let value = self.unsigned()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// The number of elements of a list, and their type.
    pub fn list(&mut self) -> Result<(u64, u8)> {
        let head = self.byte()?;
        let count = if head >> 4 == 15 { self.unsigned()? } else { u64::from(head >> 4) };
        Ok((count, head & 15))
    }

    /// Goes through a struct's fields; `each` reads the value of the field of this number and type.
    pub fn fields(&mut self, each: &mut dyn FnMut(&mut Self, i64, u8) -> Result<()>) -> Result<()> {
        let mut id = 0_i64;
        loop {
            let head = self.byte()?;
            if head == 0 {
                return Ok(());
            }
            id = if head >> 4 == 0 { self.integer()? } else { id.saturating_add(i64::from(head >> 4)) };
            ensure!(i16::try_from(id).is_ok(), "it has a field of a number that there is not");
            each(self, id, head & 15)?;
        }
    }

    /// Passes over the value of a field.
    pub fn skip(&mut self, kind: u8) -> Result<()> {
        self.skip_field(kind, DEPTH)
    }

    /// Passes over the value of a field, of the type `of` where that is known.
    ///
    /// The library reads a known field as if it were of that type, whatever the file says, and would see other fields
    /// behind it than are checked here.
    ///
    /// # Errors
    /// When it is of another type, or anything inside of it is.
    pub fn typed(&mut self, kind: u8, of: Option<Type>) -> Result<()> {
        let Some(of) = of else { return self.skip(kind) };
        expect(kind, of)?;
        match of {
            Type::Plain(_) => self.skip(kind),
            Type::Struct(_) => self.typed_value(kind, of),
            Type::List(of) => {
                let (count, kind) = self.list()?;
                if count > 0 {
                    expect(kind, *of)?;
                }
                (0..count).try_for_each(|_| self.typed_value(kind, *of))
            }
        }
    }

    /// As [`typed`](Self::typed), of an element of a list too.
    fn typed_value(&mut self, kind: u8, of: Type) -> Result<()> {
        match of {
            Type::Struct(known) => self.fields(&mut |reader, id, kind| reader.typed(kind, field(known, id))),
            _ => self.skip_value(kind, DEPTH),
        }
    }

    fn skip_field(&mut self, kind: u8, depth: usize) -> Result<()> {
        // In a field, the type is the value.
        if matches!(kind, TRUE | FALSE) { Ok(()) } else { self.skip_value(kind, depth) }
    }

    fn skip_value(&mut self, kind: u8, depth: usize) -> Result<()> {
        ensure!(depth > 0, "it holds values within values within values");
        match kind {
            // The library takes them for fields, which have no bytes of their own: it would see other fields behind
            // them, and goes through as many as are claimed.
            TRUE | FALSE => bail!("it has a list of booleans, which the format has not there"),
            BYTE => self.pass(1),
            I16 | I32 | I64 => self.unsigned().map(|_| ()),
            DOUBLE => self.pass(8),
            BINARY => {
                let length = self.unsigned()?;
                self.pass(length)
            }
            LIST | SET => {
                let (count, of) = self.list()?;
                (0..count).try_for_each(|_| self.skip_value(of, depth - 1))
            }
            MAP => {
                let count = self.unsigned()?;
                if count == 0 {
                    return Ok(());
                }
                let kinds = self.byte()?;
                (0..count).try_for_each(|_| {
                    self.skip_value(kinds >> 4, depth - 1)?;
                    self.skip_value(kinds & 15, depth - 1)
                })
            }
            STRUCT => self.fields(&mut |reader, _, kind| reader.skip_field(kind, depth - 1)),
            other => bail!("it has a value of type {other}, which there is not"),
        }
    }
}

/// Refuses a value of another type.
pub fn expect(kind: u8, of: Type) -> Result<()> {
    let kind = if kind == FALSE { TRUE } else { kind };
    ensure!(kind == of.code(), "a field is of another type than the format's");
    Ok(())
}

impl Reader<&[u8]> {
    /// Bytes that are not read yet.
    pub fn left(&self) -> usize {
        self.from.len()
    }
}

fn cut(error: io::Error) -> Error {
    if error.kind() == ErrorKind::UnexpectedEof { anyhow!("it ends within a value") } else { error.into() }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use super::*;

    /// Passes over a struct's fields.
    fn skipped(bytes: &[u8]) -> Result<u64> {
        let mut reader = Reader::new(bytes);
        reader.skip(STRUCT)?;
        assert_eq!(reader.read() as usize, bytes.len() - reader.left());
        Ok(reader.read())
    }

    #[test]
    fn values_of_all_types_are_passed_over() {
        let bytes = [
            &[0x11, 0x12, 0x13, 7, 0x14, 0x80, 1, 0x15, 2, 0x16, 2, 0x17][..], // booleans, a byte, integers, a double
            &[0; 8],
            &[0x18, 2, b'a', b'b', 0x19, 0x25, 2, 4, 0x1a, 0xf8, 1, 1, b'c'], // text, a list, a set
            &[0x1b, 1, 0x5c, 2, 0x11, 0, 0x1b, 0, 0x1c, 0, 0x05, 0x64, 2, 0], // maps, a struct, field 50
        ]
        .concat();
        assert_eq!(skipped(&bytes).unwrap(), bytes.len() as u64);
        for length in 0..bytes.len() {
            let told = skipped(&bytes[..length]).unwrap_err().to_string();
            assert_eq!(told, "it ends within a value", "{length} bytes of {}", bytes.len());
        }
    }

    #[test]
    fn what_is_no_value_is_an_error() {
        let told = |bytes: &[u8]| skipped(bytes).unwrap_err().to_string();
        // Lists of billions of structs and of booleans, of one boolean, and one in a map.
        assert!(told(&[0x19, 0xfc, 0xff, 0xff, 0xff, 0xff, 0x0f, 0]).contains("ends within a value"));
        assert!(told(&[0x19, 0xf1, 0xff, 0xff, 0xff, 0xff, 0x0f, 0]).contains("a list of booleans"));
        assert!(told(&[0x19, 0x11, 1, 0]).contains("a list of booleans"));
        assert!(told(&[0x1b, 1, 0x81, 0, 1, 0]).contains("a list of booleans"));
        assert!(told(&[0x1d]).contains("type 13"));
        assert!(told(&[0x05, 0xff, 0xff, 0x07]).contains("a number that there is not"));
        assert!(told(&[&[0x15][..], &[0xff; 10]].concat()).contains("more than 64 bits"));
        assert!(told(&[0x1c; 4096]).contains("within values"));
    }
}
