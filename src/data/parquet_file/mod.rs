//! Parquet files opened without trust: what the library would believe is held against the file first.
//!
//! It makes room for as many values as a page claims, and as many children as an element of the schema does.

mod compact;
mod footer;
mod format;
mod headers;
mod rows;
mod values;

use std::fs::File;
use std::io::{self, BufReader, Read as _, Seek as _, SeekFrom};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ParquetRecordBatchReader, RowGroups as _, RowSelection,
};
use parquet::arrow::{ProjectionMask, parquet_to_arrow_field_levels};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData};
use parquet::file::reader::{ChunkReader, Length};

use rows::Rows;

/// Bytes behind the footer: its length, and [`MAGIC`].
const TAIL: u64 = 8;
const MAGIC: &[u8] = b"PAR1";

/// A file whose footer and pages are what the format says.
pub struct ParquetFile {
    rows: Rows,
    arrow: ArrowReaderMetadata,
}

impl ParquetFile {
    /// Opens a file; its pages are decoded as its rows are read.
    ///
    /// # Errors
    /// When it is no parquet file, or claims columns or pages that it cannot hold.
    pub fn open(file: File) -> Result<Self> {
        let source = Arc::new(Source::new(file)?);
        check_footer(&source)?;
        let arrow = ArrowReaderMetadata::load(&*source, Default::default())?;
        check_columns(&source, arrow.metadata())?;
        Ok(Self { rows: Rows { source, metadata: Arc::clone(arrow.metadata()) }, arrow })
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows.num_rows()
    }

    /// Reads rows, all or those that are selected, so many at once.
    ///
    /// # Errors
    /// When the columns cannot be read as Arrow's. A page that claims more values than it can hold is an error as it is
    /// reached.
    pub fn read(&self, at_once: usize, selection: Option<RowSelection>) -> Result<ParquetRecordBatchReader> {
        let fields = Some(self.arrow.schema().fields());
        let levels =
            parquet_to_arrow_field_levels(self.arrow.parquet_schema(), ProjectionMask::all(), fields)?;
        let at_once = at_once.min(self.rows());
        Ok(ParquetRecordBatchReader::try_new_with_row_groups(&levels, &self.rows, at_once, selection)?)
    }
}

/// Refuses a footer whose schema claims what it cannot hold. What is no parquet file is the library's to tell.
fn check_footer(source: &Source) -> Result<()> {
    let Some(end) = source.length.checked_sub(TAIL) else { return Ok(()) };
    let tail = source.get_bytes(end, TAIL as usize)?;
    let Some((size, MAGIC)) = tail.split_first_chunk::<4>() else { return Ok(()) };
    let size = u32::from_le_bytes(*size);
    let Some(start) = end.checked_sub(u64::from(size)) else { return Ok(()) };
    footer::check(&source.get_bytes(start, size as usize)?)
}

fn check_columns(source: &Source, metadata: &ParquetMetaData) -> Result<()> {
    for (at, group) in metadata.row_groups().iter().enumerate() {
        for column in group.columns() {
            check_pages(source, column)
                .with_context(|| format!("column `{}` of row group {at}", column.column_path()))?;
        }
    }
    Ok(())
}

/// Refuses a column that lies outside of the file: the library panics on negative places, and believes any size.
/// Then goes through its pages.
fn check_pages(source: &Source, column: &ColumnChunkMetaData) -> Result<()> {
    let start = column.dictionary_page_offset().unwrap_or_else(|| column.data_page_offset());
    let size = column.compressed_size();
    let inside = u64::try_from(start).ok().zip(u64::try_from(size).ok());
    match inside.filter(|(start, size)| start.saturating_add(*size) <= source.length) {
        Some((start, size)) => headers::check(&mut source.get_read(start)?, size),
        None => bail!("it has {size} bytes at {start}, the file {}", source.length),
    }
}

/// A file as the library reads it.
#[derive(Debug)]
pub struct Source {
    file: File,
    length: u64,
}

impl Source {
    fn new(file: File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self { file, length })
    }

    fn from(&self, start: u64) -> io::Result<File> {
        let mut file = self.file.try_clone()?;
        file.seek(SeekFrom::Start(start))?;
        Ok(file)
    }
}

impl Length for Source {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for Source {
    type T = BufReader<File>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        Ok(BufReader::new(self.from(start)?))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        if start.checked_add(length as u64).is_none_or(|end| end > self.length) {
            let length_of_file = self.length;
            return Err(ParquetError::EOF(format!(
                "{length} bytes are wanted at {start}, the file has {length_of_file}"
            )));
        }
        let mut bytes = vec![0; length];
        self.from(start)?.read_exact(&mut bytes)?;
        Ok(bytes.into())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use arrow::array::{ArrayRef, RecordBatch, StringArray};
    use parquet::arrow::ArrowWriter;

    use super::*;

    /// A column of 64 short words, so that their number takes two bytes.
    fn words() -> Vec<u8> {
        let words: StringArray = (0..64).map(|at| Some(format!("{at}"))).collect();
        let column: ArrayRef = Arc::new(words);
        let batch = RecordBatch::try_from_iter([("word", column)]).unwrap();
        let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.into_inner().unwrap()
    }

    /// `scripts/oracle/columns.py` wrote it: a column of lengths and texts, and one of what a text shares with the last.
    fn prefixes() -> Vec<u8> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/columns/prefixes.parquet");
        std::fs::read(path).unwrap()
    }

    #[test]
    fn lengths_of_more_texts_than_bytes_are_refused() {
        let whole = prefixes();
        assert_eq!(read(&whole).unwrap(), 40);
        // Blocks of 128 in 4 of 4 values or fewer, as pages of that file have them.
        let headers: Vec<usize> = (0..whole.len() - 4)
            .filter(|at| whole[*at..].starts_with(&[0x80, 1, 4]) && (1..=4).contains(&whole[at + 3]))
            .collect();
        assert!(headers.len() > 10, "{headers:?}");
        let mut told_of = [0; 2];
        for at in headers {
            let mut bytes = whole.clone();
            bytes[at + 3] = 0x7f;
            let text = told(&bytes);
            assert!(text.contains("values claims the lengths of 127 in"), "{at}: {text}");
            for (column, told_of) in ["text", "large"].iter().zip(&mut told_of) {
                *told_of += u32::from(text.contains(&format!("column `\"{column}\"`")));
            }
        }
        assert!(told_of.iter().all(|times| *times > 5), "{told_of:?}");
    }

    #[test]
    fn a_page_of_an_index_is_refused() {
        let mut bytes = words();
        // The dictionary's type, 2 in zigzag, is the first value of the first header.
        assert_eq!(bytes[4..6], [0x15, 4]);
        bytes[5] = 2;
        let text = told(&bytes);
        assert!(text.contains("of type 1, it has no header of that"), "{text}");
    }

    fn read(bytes: &[u8]) -> Result<usize> {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, bytes).unwrap();
        let mut rows = 0;
        for batch in ParquetFile::open(file)?.read(1024, None)? {
            rows += batch?.num_rows();
        }
        Ok(rows)
    }

    fn told(bytes: &[u8]) -> String {
        crate::error::render(&read(bytes).unwrap_err())
    }

    #[test]
    fn a_dictionary_of_more_values_than_bytes_is_refused() {
        let mut bytes = words();
        assert_eq!(read(&bytes).unwrap(), 64);
        // Thrift's compact form: 128 is 64 as a zigzag varint, the first field of the dictionary's header.
        let at = bytes.windows(4).position(|four| four == [0x4c, 0x15, 0x80, 0x01]).unwrap();
        bytes[at + 2..at + 4].copy_from_slice(&[0xfe, 0x7f]);
        let text = told(&bytes);
        assert!(text.contains("column `\"word\"`: its dictionary has 8191 values in 374 bytes"), "{text}");
    }

    #[test]
    fn a_page_header_with_a_list_of_billions_is_refused_at_once() {
        let mut bytes = words();
        // Field 9, which the format does not know: a list of 2³¹ - 1 doubles.
        bytes[4..11].copy_from_slice(&[0x99, 0xf7, 0xff, 0xff, 0xff, 0xff, 0x07]);
        let text = told(&bytes);
        assert!(text.contains("column `\"word\"` of row group 0"), "{text}");
        assert!(text.contains("the page at byte 0") && text.contains("it ends within a value"), "{text}");
    }

    #[test]
    fn a_column_outside_of_the_file_is_refused() {
        let whole = words();
        // The footer alone, with its places as they were.
        let footer = u32::from_le_bytes(whole[whole.len() - 8..whole.len() - 4].try_into().unwrap()) as usize;
        let cut = [b"PAR1", &whole[whole.len() - 8 - footer..]].concat();
        let text = told(&cut);
        assert!(text.contains("bytes at 4, the file"), "{text}");
    }
}
