//! Arrow IPC, files and streams, message by message, without trust: the library makes room for all that a batch claims.

use std::io::{Read, Seek, SeekFrom};
use std::sync::Arc;
use std::vec::IntoIter;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use arrow::array::RecordBatch;
use arrow::buffer::Buffer;
use arrow::ipc::convert::try_fb_to_schema;
use arrow::ipc::reader::{FileDecoder, StreamDecoder, read_footer_length};
use arrow::ipc::{Block, CompressionType, Message, RecordBatch as Batch, root_as_footer, root_as_message};

/// Bytes at the end of a file: the length of its footer, and `ARROW1`.
const FOOTER_END: usize = 10;
/// What a message begins with, before its length; older files lack it.
const CONTINUATION: [u8; 4] = [0xff; 4];
/// Bytes of a buffer before what is compressed: how many they were.
const PREFIX: usize = 8;
/// LZ4 makes at most so many bytes of one.
const MOST_LZ4: u64 = 255;
/// So many bytes of one are believed of Zstandard; where more are claimed, they are counted first.
const USUAL_ZSTD: u64 = 64;
/// So many more are believed of either, whatever the length.
const SLACK: u64 = 1 << 16;

/// The batches of a file, also called Feather.
pub struct FileBatches<R> {
    file: R,
    decoder: FileDecoder,
    blocks: IntoIter<Block>,
}

impl<R: Read + Seek> FileBatches<R> {
    /// Reads the footer and the dictionaries.
    ///
    /// # Errors
    /// When it is no Arrow file, or claims what lies outside of it.
    pub fn new(mut file: R) -> Result<Self> {
        let length = file.seek(SeekFrom::End(0))?;
        let end = file.seek(SeekFrom::Start(length.saturating_sub(FOOTER_END as u64)))?;
        let mut tail = [0; FOOTER_END];
        file.read_exact(&mut tail)?;
        let size = read_footer_length(tail)?;
        let start = end.checked_sub(size as u64);
        let start = start.with_context(|| format!("its footer has {size} bytes, the file {length}"))?;
        file.seek(SeekFrom::Start(start))?;
        let mut footer = vec![0; size];
        file.read_exact(&mut footer)?;
        let footer = root_as_footer(&footer).map_err(|error| anyhow!("its footer: {error}"))?;
        let blocks: Vec<Block> = footer.recordBatches().into_iter().flatten().copied().collect();
        let dictionaries: Vec<Block> = footer.dictionaries().into_iter().flatten().copied().collect();
        for block in blocks.iter().chain(&dictionaries) {
            let parts = [block.offset(), i64::from(block.metaDataLength()), block.bodyLength()];
            let end = parts.iter().try_fold(0u64, |sum, part| sum.checked_add(u64::try_from(*part).ok()?));
            if end.is_none_or(|end| end > length) {
                bail!(
                    "a batch lies at {}, {} + {} bytes, the file has {length}",
                    parts[0],
                    parts[1],
                    parts[2]
                );
            }
        }
        let schema = try_fb_to_schema(footer.schema().context("its footer has no schema")?)?;
        let mut decoder = FileDecoder::new(Arc::new(schema), footer.version());
        for block in &dictionaries {
            decoder.read_dictionary(block, &read_block(&mut file, block)?)?;
        }
        Ok(Self { file, decoder, blocks: blocks.into_iter() })
    }
}

impl<R: Read + Seek> Iterator for FileBatches<R> {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        // A message without a batch says nothing.
        self.blocks.by_ref().find_map(|block| {
            let read = read_block(&mut self.file, &block);
            read.and_then(|bytes| Ok(self.decoder.read_record_batch(&block, &bytes)?)).transpose()
        })
    }
}

/// A block that lies within the file, and whose buffers are what they claim.
fn read_block(file: &mut (impl Read + Seek), block: &Block) -> Result<Buffer> {
    let metadata = usize::try_from(block.metaDataLength())?;
    let size = metadata + usize::try_from(block.bodyLength())?;
    file.seek(SeekFrom::Start(u64::try_from(block.offset())?))?;
    let mut bytes = vec![0; size];
    file.read_exact(&mut bytes)?;
    let (head, body) = bytes.split_at(metadata);
    let skipped = if head.starts_with(&CONTINUATION) { 8 } else { 4 };
    check(&message(head.get(skipped..).context("a batch lacks its message")?)?, body)?;
    Ok(bytes.into())
}

/// The batches of a stream: what `datasets` writes.
pub struct StreamBatches<R> {
    stream: R,
    decoder: StreamDecoder,
}

impl<R: Read> StreamBatches<R> {
    pub fn new(stream: R) -> Self {
        Self { stream, decoder: StreamDecoder::new() }
    }

    /// Reads on until there is a batch. The library's own reader takes a message whose length is cut off for a good end.
    fn batch(&mut self) -> Result<Option<RecordBatch>> {
        while let Some(message) = self.message()? {
            let mut bytes = Buffer::from(message);
            while !bytes.is_empty() {
                // A message has one batch at most, and ends with it.
                if let Some(batch) = self.decoder.decode(&mut bytes)? {
                    return Ok(Some(batch));
                }
            }
        }
        self.decoder.finish()?;
        Ok(None)
    }

    /// The bytes of the next message, whose buffers are what they claim.
    fn message(&mut self) -> Result<Option<Vec<u8>>> {
        let mut bytes = Vec::new();
        if self.take(&mut bytes, 4)? == 0 {
            return Ok(None);
        }
        if bytes == CONTINUATION {
            self.take(&mut bytes, 4)?;
        }
        let start = bytes.len();
        // A length that is cut off is the decoder's to tell.
        let Some(length) = bytes.last_chunk().filter(|_| start.is_multiple_of(4)) else {
            return Ok(Some(bytes));
        };
        let length = u32::from_le_bytes(*length);
        if length == 0 || bytes == CONTINUATION {
            return Ok(Some(bytes));
        }
        ensure!(self.take(&mut bytes, u64::from(length))? == u64::from(length), ENDED);
        let body = u64::try_from(message(&bytes[start..])?.bodyLength())?;
        let end = bytes.len();
        ensure!(self.take(&mut bytes, body)? == body, ENDED);
        let (head, body) = bytes.split_at(end);
        check(&message(&head[start..])?, body)?;
        Ok(Some(bytes))
    }

    /// Reads so many bytes more, or as many as there are, and gives their number.
    fn take(&mut self, bytes: &mut Vec<u8>, count: u64) -> Result<u64> {
        Ok(self.stream.by_ref().take(count).read_to_end(bytes)? as u64)
    }
}

/// What is said of a stream that is cut off.
const ENDED: &str = "it ends within a message";

impl<R: Read> Iterator for StreamBatches<R> {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        self.batch().transpose()
    }
}

fn message(bytes: &[u8]) -> Result<Message<'_>> {
    root_as_message(bytes).map_err(|error| anyhow!("a message: {error}"))
}

/// Refuses a batch whose buffers lie outside of its body, or claim to have been longer than what is compressed in them.
fn check(message: &Message<'_>, body: &[u8]) -> Result<()> {
    let dictionary = message.header_as_dictionary_batch();
    let batch =
        message.header_as_record_batch().or_else(|| dictionary.and_then(|dictionary| dictionary.data()));
    batch.map_or(Ok(()), |batch| check_buffers(&batch, body))
}

fn check_buffers(batch: &Batch<'_>, body: &[u8]) -> Result<()> {
    let Some(compression) = batch.compression() else { return Ok(()) };
    for buffer in batch.buffers().into_iter().flatten() {
        let (offset, length) = (buffer.offset(), buffer.length());
        let start = usize::try_from(offset).ok();
        let end =
            start.zip(usize::try_from(length).ok()).and_then(|(start, length)| start.checked_add(length));
        let bytes = start.zip(end).and_then(|(start, end)| body.get(start..end));
        let bytes = bytes.with_context(|| {
            format!("a buffer lies at {offset}, {length} bytes, its batch has {}", body.len())
        })?;
        let Some((claim, compressed)) = bytes.split_first_chunk::<PREFIX>() else { continue };
        // Below zero: it is not compressed.
        let Ok(claim) = u64::try_from(i64::from_le_bytes(*claim)) else { continue };
        let length = compressed.len() as u64;
        let holds = match compression.codec() {
            CompressionType::LZ4_FRAME => claim <= MOST_LZ4 * length + SLACK,
            _ => claim <= USUAL_ZSTD * length + SLACK || unpacked(compressed, claim) == claim,
        };
        ensure!(holds, "a buffer of {length} bytes claims to have been {claim}");
    }
    Ok(())
}

/// Counts what is compressed, as far as `most`.
fn unpacked(compressed: &[u8], most: u64) -> u64 {
    let count = || {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(compressed)?.take(most);
        std::io::copy(&mut decoder, &mut std::io::sink())
    };
    count().unwrap_or(0)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use std::io::Cursor;

    use arrow::array::{ArrayRef, Int64Array};
    use arrow::ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};

    use super::*;

    const ROWS: usize = 100_000;

    /// Zeros, far more than are believed of Zstandard.
    fn zeros() -> RecordBatch {
        let column: ArrayRef = Arc::new(Int64Array::from(vec![0; ROWS]));
        RecordBatch::try_from_iter([("zero", column)]).unwrap()
    }

    fn file(codec: CompressionType) -> Vec<u8> {
        let options = IpcWriteOptions::default().try_with_compression(Some(codec)).unwrap();
        let mut file = FileWriter::try_new_with_options(Vec::new(), &zeros().schema(), options).unwrap();
        file.write(&zeros()).unwrap();
        file.into_inner().unwrap()
    }

    fn stream(codec: CompressionType) -> Vec<u8> {
        let options = IpcWriteOptions::default().try_with_compression(Some(codec)).unwrap();
        let mut stream = StreamWriter::try_new_with_options(Vec::new(), &zeros().schema(), options).unwrap();
        stream.write(&zeros()).unwrap();
        stream.into_inner().unwrap()
    }

    fn rows(batches: impl Iterator<Item = Result<RecordBatch>>) -> Result<usize> {
        batches.map(|batch| Ok(batch?.num_rows())).sum()
    }

    #[test]
    fn what_compresses_well_is_read_and_what_lies_is_refused() {
        for codec in [CompressionType::LZ4_FRAME, CompressionType::ZSTD] {
            let of_file = |bytes: &[u8]| rows(FileBatches::new(Cursor::new(bytes))?);
            let of_stream = |bytes: &[u8]| rows(StreamBatches::new(bytes));
            let claim = (8 * ROWS as u64).to_le_bytes();
            for (whole, read) in
                [(file(codec), &of_file as &dyn Fn(&[u8]) -> Result<usize>), (stream(codec), &of_stream)]
            {
                assert_eq!(read(&whole).unwrap(), ROWS, "{codec:?}");
                let at = whole.windows(8).position(|eight| eight == claim).unwrap();
                for lie in [8 * ROWS as u64 * 300, 1 << 50] {
                    let mut bytes = whole.clone();
                    bytes[at..at + 8].copy_from_slice(&lie.to_le_bytes());
                    let text = read(&bytes).unwrap_err().to_string();
                    assert!(text.contains(&format!("claims to have been {lie}")), "{codec:?}: {text}");
                }
            }
        }
    }
}
