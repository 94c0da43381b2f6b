//! A file's columns as the library reads them, page by page, each held against its bytes first.

use std::sync::Arc;
use std::vec::IntoIter;

use parquet::arrow::arrow_reader::RowGroups;
use parquet::column::page::{Page, PageIterator, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{ParquetMetaData, RowGroupMetaData};
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::schema::types::ColumnDescPtr;

use super::{Source, values};

/// All rows of a file.
pub struct Rows {
    pub source: Arc<Source>,
    pub metadata: Arc<ParquetMetaData>,
}

impl RowGroups for Rows {
    fn num_rows(&self) -> usize {
        self.metadata.row_groups().iter().map(|group| group.num_rows() as usize).sum()
    }

    fn column_chunks(&self, column: usize) -> Result<Box<dyn PageIterator>> {
        let chunk = |group: &RowGroupMetaData| {
            let (column, rows) = (group.column(column), group.num_rows() as usize);
            let pages = SerializedPageReader::new(Arc::clone(&self.source), column, rows, None)?;
            Ok(Box::new(Checked { pages, column: column.column_descr_ptr() }) as Box<dyn PageReader>)
        };
        let chunks: Vec<_> = self.metadata.row_groups().iter().map(chunk).collect();
        Ok(Box::new(Chunks(chunks.into_iter())))
    }

    fn row_groups(&self) -> Box<dyn Iterator<Item = &RowGroupMetaData> + '_> {
        Box::new(self.metadata.row_groups().iter())
    }

    fn metadata(&self) -> &ParquetMetaData {
        &self.metadata
    }
}

/// The parts of a column, one in each row group.
struct Chunks(IntoIter<Result<Box<dyn PageReader>>>);

impl Iterator for Chunks {
    type Item = Result<Box<dyn PageReader>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next()
    }
}

impl PageIterator for Chunks {}

/// The pages of a part of a column.
struct Checked {
    pages: SerializedPageReader<Source>,
    column: ColumnDescPtr,
}

impl Checked {
    fn checked(&self, page: Option<Page>) -> Result<Option<Page>> {
        if let Some(page) = &page {
            values::check(page, &self.column).map_err(|error| {
                ParquetError::General(format!("column `{}`: {error:#}", self.column.path()))
            })?;
        }
        Ok(page)
    }
}

impl PageReader for Checked {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        let page = self.pages.get_next_page()?;
        self.checked(page)
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.pages.skip_next_page()
    }

    fn supports_deferred_dictionary(&self) -> bool {
        self.pages.supports_deferred_dictionary()
    }

    fn take_deferred_dictionary(&mut self) -> Result<Option<Page>> {
        let page = self.pages.take_deferred_dictionary()?;
        self.checked(page)
    }

    fn at_record_boundary(&mut self) -> Result<bool> {
        self.pages.at_record_boundary()
    }
}

impl Iterator for Checked {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}
