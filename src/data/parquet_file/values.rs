//! How many values a page claims, held against the bytes it has: the library makes room for all of them at once.

use std::ops::RangeInclusive;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use parquet::basic::Encoding;
use parquet::column::page::Page;
use parquet::schema::types::ColumnDescriptor;

use super::compact::Reader;

/// Most values a byte. Blocks of 128 deltas, as all writers make them, take five bytes at least.
const DENSEST: u64 = 1024;
/// Values of a miniblock; writers take 32 or 64.
const SIZES: RangeInclusive<u64> = 32..=1 << 20;

/// Refuses a page of more values than its bytes can hold.
///
/// # Errors
/// When it is so, or what its values begin with is damaged.
pub fn check(page: &Page, column: &ColumnDescriptor) -> Result<()> {
    let (encoding, count) = (page.encoding(), page.num_values());
    match page {
        Page::DictionaryPage { buf, .. } => {
            let length = buf.len();
            ensure!(count as usize <= length, "its dictionary has {count} values in {length} bytes");
            Ok(())
        }
        // Lengths of texts, or of what they share with the text before and of what they do not.
        _ => match encoding {
            Encoding::DELTA_LENGTH_BYTE_ARRAY => {
                lengths(&mut Reader::new(&*values(page, column)?), count).map(|_| ())
            }
            Encoding::DELTA_BYTE_ARRAY => {
                let values = values(page, column)?;
                let mut reader = Reader::new(&*values);
                let shared = lengths(&mut reader, count)?;
                let own = lengths(&mut reader, count)?;
                ensure!(shared == own, "a page has the first part of {shared} values, and the rest of {own}");
                Ok(())
            }
            _ => Ok(()),
        },
    }
}

/// The bytes of a data page behind its levels.
fn values(page: &Page, column: &ColumnDescriptor) -> Result<Bytes> {
    let buf = page.buffer();
    let start = match page {
        Page::DataPage { num_values, rep_level_encoding, def_level_encoding, .. } => {
            let mut start = 0;
            for (most, encoding) in
                [(column.max_rep_level(), rep_level_encoding), (column.max_def_level(), def_level_encoding)]
            {
                if most > 0 {
                    start += levels(buf.get(start..).unwrap_or_default(), *encoding, most, *num_values)?;
                }
            }
            start
        }
        Page::DataPageV2 { rep_levels_byte_len, def_levels_byte_len, .. } => {
            *rep_levels_byte_len as usize + *def_levels_byte_len as usize
        }
        Page::DictionaryPage { .. } => 0,
    };
    ensure!(start <= buf.len(), "a page has {} bytes, its levels claim {start}", buf.len());
    Ok(buf.slice(start..))
}

/// Bytes of the levels that a page of the first version begins with.
fn levels(bytes: &[u8], encoding: Encoding, most: i16, count: u32) -> Result<usize> {
    if encoding == Encoding::RLE {
        let length = bytes.first_chunk().context("a page ends within its levels")?;
        return Ok(4 + u32::from_le_bytes(*length) as usize);
    }
    // Bits without runs, the only other way.
    let bits = u64::from(u16::BITS - most.unsigned_abs().leading_zeros());
    Ok(usize::try_from((u64::from(count) * bits).div_ceil(8))?)
}

/// Goes behind as many lengths as there are, at most `most`, and gives their number.
///
/// Deltas in blocks of miniblocks: the sizes of both, the number of values and the first of them; then for each block its
/// least delta, a width for each miniblock and the miniblocks, of which the last may be left out where nothing is in them.
fn lengths(reader: &mut Reader<&[u8]>, most: u32) -> Result<u64> {
    let bytes = reader.left() as u64;
    let (block, miniblocks, count) = (reader.unsigned()?, reader.unsigned()?, reader.unsigned()?);
    reader.unsigned()?;
    ensure!(
        count <= u64::from(most) && count <= DENSEST * bytes,
        "a page of {most} values claims the lengths of {count} in {bytes} bytes"
    );
    let size = block.checked_div(miniblocks).filter(|size| SIZES.contains(size) && size.is_multiple_of(32));
    let size =
        size.with_context(|| format!("a page has blocks of {block} values in {miniblocks} miniblocks"))?;
    let mut left = count.saturating_sub(1);
    while left > 0 {
        reader.unsigned()?;
        let mut length = 0;
        for _ in 0..miniblocks {
            let width = u64::from(reader.byte()?);
            if left > 0 {
                length += width * (size / 8);
            }
            left = left.saturating_sub(size);
        }
        reader.pass(length)?;
    }
    Ok(count)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use super::*;

    fn of(bytes: &[u8], most: u32) -> Result<(u64, usize)> {
        let mut reader = Reader::new(bytes);
        let count = lengths(&mut reader, most)?;
        Ok((count, reader.left()))
    }

    /// 128 in a block of 4, of so many values (below 128), first 3; least delta 1, widths 1, 0, 0, 0.
    fn block(count: u8) -> Vec<u8> {
        [&[0x80, 1, 4, count, 6][..], &[2, 1, 0, 0, 0], &[0xff; 4]].concat()
    }

    #[test]
    fn lengths_end_where_the_next_begin() {
        for count in 2..=33 {
            let bytes = [block(count), block(2)].concat();
            assert_eq!(of(&bytes, 33).unwrap(), (u64::from(count), 14), "{count}");
        }
        // No block where the first is all; the widths of what is left out do not count.
        for count in [0, 1] {
            assert_eq!(of(&block(count), 1).unwrap(), (u64::from(count), 9));
        }
        let mut left_out = block(33);
        left_out[7..10].copy_from_slice(&[9, 9, 9]);
        assert_eq!(of(&left_out, 33).unwrap(), (33, 0));
        // A second miniblock, of two bits.
        let mut two = block(34);
        two[7] = 2;
        assert!(of(&two, 34).is_err());
        two.extend([0; 8]);
        assert_eq!(of(&two, 34).unwrap(), (34, 0));
    }

    #[test]
    fn lengths_that_are_not_there_are_refused() {
        let told = |bytes: &[u8], most| of(bytes, most).unwrap_err().to_string();
        assert_eq!(told(&block(34), 33), "a page of 33 values claims the lengths of 34 in 14 bytes");
        let billions = [0x80, 1, 4, 0xff, 0xff, 0xff, 0xff, 7, 0];
        assert_eq!(
            told(&billions, i32::MAX as u32),
            "a page of 2147483647 values claims the lengths of 2147483647 in 9 bytes"
        );
        assert_eq!(told(&[0x80, 1, 0, 2, 0], 9), "a page has blocks of 128 values in 0 miniblocks");
        assert_eq!(told(&[0x80, 1, 8, 2, 0], 9), "a page has blocks of 128 values in 8 miniblocks");
        let wide = [0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 1, 1, 2, 0];
        assert!(told(&wide, 9).contains("in 1 miniblocks"), "{}", told(&wide, 9));
        for cut in 0..14 {
            assert!(told(&block(20)[..cut], 20).contains("ends within a value"), "{cut}");
        }
    }

    #[test]
    fn levels_of_both_encodings_are_passed_over() {
        assert_eq!(levels(&[3, 0, 0, 0, 1], Encoding::RLE, 1, 9).unwrap(), 7);
        assert!(levels(&[3, 0, 0], Encoding::RLE, 1, 9).is_err());
        #[expect(deprecated, reason = "old files have it")]
        let packed = Encoding::BIT_PACKED;
        assert_eq!([1, 2, 3, 4].map(|most| levels(&[], packed, most, 9).unwrap()), [2, 3, 3, 4]);
    }
}
