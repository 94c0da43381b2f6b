//! The header of a GGUF file: metadata and the list of tensors.
//!
//! Versions 2 and 3, little-endian. Every count and length in the file is checked against the bytes that are
//! left before anything is allocated, so a damaged file is an error and never an allocation or a panic.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context as _, Result, bail, ensure};

use super::blocks::BlockType;

/// Where tensor data begin unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;

/// More axes than ggml has.
const MOST_AXES: u32 = 4;

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any integer of the file, signed or not.
    Integer(i128),
    /// A 32-bit float; kept as such, because its shortest decimal is what the converter was given.
    Float32(f32),
    /// A 64-bit float.
    Float64(f64),
    /// A truth value.
    Bool(bool),
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Anything else that comes as a list.
    List(Vec<Value>),
}

/// Where a tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// How its numbers are packed.
    pub format: BlockType,
    /// Axes from slowest to fastest: `[out, in]`, as PyTorch writes them (the file has them the other way round).
    pub shape: Vec<i64>,
    /// Its bytes in the file.
    pub bytes: Range<usize>,
}

impl TensorEntry {
    /// Values of a row: the fastest axis. Axes are positive, [`Header::read`] saw to it.
    pub fn row_len(&self) -> usize {
        self.shape.last().map_or(1, |axis| *axis as usize)
    }

    /// Rows of all other axes together.
    pub fn rows(&self) -> usize {
        self.shape.iter().map(|axis| *axis as usize).product::<usize>() / self.row_len()
    }
}

/// What the header says.
#[derive(Debug)]
pub struct Header {
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors by name.
    pub tensors: BTreeMap<String, TensorEntry>,
}

impl Header {
    /// Reads the header of a whole file.
    ///
    /// # Errors
    /// When the file is no GGUF, of another version, cut, or says what cannot be.
    pub fn read(file: &[u8]) -> Result<Self> {
        let mut reader = Reader { file, at: 0 };
        check_magic(&mut reader)?;
        let tensor_count = reader.u64()?;
        let pair_count = reader.u64()?;
        let metadata = read_metadata(&mut reader, pair_count).context("metadata")?;
        let entries = read_entries(&mut reader, tensor_count).context("list of tensors")?;
        let alignment = alignment(&metadata)?;
        let data_start = (reader.at as u64).div_ceil(alignment) * alignment;
        let mut tensors = BTreeMap::new();
        for (name, entry) in entries {
            let entry =
                entry.place(data_start, alignment, file.len()).with_context(|| format!("tensor `{name}`"))?;
            if tensors.insert(name.clone(), entry).is_some() {
                bail!("tensor `{name}` is listed twice");
            }
        }
        Ok(Self { metadata, tensors })
    }
}

fn check_magic(reader: &mut Reader<'_>) -> Result<()> {
    let magic = reader.take(4)?;
    ensure!(magic == b"GGUF", "the file does not begin with `GGUF`");
    let version = reader.u32()?;
    ensure!(version.swap_bytes() > 3, "the file is big-endian, which is not supported");
    ensure!((2..=3).contains(&version), "GGUF version {version}, expected 2 or 3");
    Ok(())
}

fn read_metadata(reader: &mut Reader<'_>, count: u64) -> Result<BTreeMap<String, Value>> {
    let mut metadata = BTreeMap::new();
    for index in 0..count {
        let key = reader.text().with_context(|| format!("key {index} of {count}"))?;
        let value =
            reader.u32().and_then(|kind| read_value(reader, kind)).with_context(|| format!("`{key}`"))?;
        if metadata.insert(key.clone(), value).is_some() {
            bail!("`{key}` is given twice");
        }
    }
    Ok(metadata)
}

fn read_value(reader: &mut Reader<'_>, kind: u32) -> Result<Value> {
    Ok(match kind {
        0 => Value::Integer(u8::from_le_bytes(reader.array()?).into()),
        1 => Value::Integer(i8::from_le_bytes(reader.array()?).into()),
        2 => Value::Integer(u16::from_le_bytes(reader.array()?).into()),
        3 => Value::Integer(i16::from_le_bytes(reader.array()?).into()),
        4 => Value::Integer(u32::from_le_bytes(reader.array()?).into()),
        5 => Value::Integer(i32::from_le_bytes(reader.array()?).into()),
        6 => Value::Float32(f32::from_le_bytes(reader.array()?)),
        7 => Value::Bool(u8::from_le_bytes(reader.array()?) != 0),
        8 => Value::Text(reader.text()?),
        9 => read_list(reader)?,
        10 => Value::Integer(u64::from_le_bytes(reader.array()?).into()),
        11 => Value::Integer(i64::from_le_bytes(reader.array()?).into()),
        12 => Value::Float64(f64::from_le_bytes(reader.array()?)),
        other => bail!("unknown type {other}"),
    })
}

/// Bytes that a value of a type takes at least.
fn smallest_size(kind: u32) -> Result<usize> {
    Ok(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        9 => bail!("a list of lists is not supported"),
        other => bail!("unknown type {other}"),
    })
}

fn read_list(reader: &mut Reader<'_>) -> Result<Value> {
    let kind = reader.u32()?;
    let count = reader.u64()?;
    let room = reader.left() / smallest_size(kind)?;
    ensure!(count <= room as u64, "a list of {count} values, but the file ends before");
    if kind == 8 {
        return Ok(Value::Texts((0..count).map(|_| reader.text()).collect::<Result<_>>()?));
    }
    Ok(Value::List((0..count).map(|_| read_value(reader, kind)).collect::<Result<_>>()?))
}

/// A tensor as the header lists it, not yet checked against the file.
struct Listed {
    format: BlockType,
    shape: Vec<i64>,
    offset: u64,
}

fn read_entries(reader: &mut Reader<'_>, count: u64) -> Result<Vec<(String, Listed)>> {
    let mut entries = Vec::new();
    for index in 0..count {
        let name = reader.text().with_context(|| format!("tensor {index} of {count}"))?;
        let entry = read_entry(reader).with_context(|| format!("tensor `{name}`"))?;
        entries.push((name, entry));
    }
    Ok(entries)
}

fn read_entry(reader: &mut Reader<'_>) -> Result<Listed> {
    let axes = reader.u32()?;
    ensure!((1..=MOST_AXES).contains(&axes), "{axes} axes, expected 1 to {MOST_AXES}");
    let mut shape = (0..axes)
        .map(|_| i64::try_from(reader.u64()?).context("an axis beyond all measure"))
        .collect::<Result<Vec<_>>>()?;
    shape.reverse();
    Ok(Listed { shape, format: BlockType::from_ggml(reader.u32()?)?, offset: reader.u64()? })
}

impl Listed {
    fn place(self, data_start: u64, alignment: u64, file_length: usize) -> Result<TensorEntry> {
        ensure!(
            self.offset.is_multiple_of(alignment),
            "offset {} is no multiple of {alignment}",
            self.offset
        );
        let size = self.size()?;
        let start = data_start.checked_add(self.offset);
        let end = start.and_then(|start| start.checked_add(size)).filter(|end| *end <= file_length as u64);
        let (Some(start), Some(end)) = (start, end) else {
            bail!(
                "its {size} bytes at offset {} lie beyond the end of the file, which has {file_length} bytes",
                self.offset
            );
        };
        // Both are at most the length of a mapped file.
        Ok(TensorEntry { format: self.format, shape: self.shape, bytes: start as usize..end as usize })
    }

    /// Bytes of the tensor; its rows are whole blocks.
    fn size(&self) -> Result<u64> {
        let elements = self.shape.iter().try_fold(1i64, |product, axis| product.checked_mul(*axis));
        let elements = elements.filter(|elements| *elements > 0);
        let elements =
            elements.with_context(|| format!("shape {:?} is empty or beyond all measure", self.shape))?;
        let row = self.shape.last().copied().unwrap_or(0);
        let block = self.format.block_len() as i64;
        ensure!(
            row % block == 0,
            "rows of {row} are no multiple of the {block} values of a {:?} block",
            self.format
        );
        (elements as u64 / block as u64)
            .checked_mul(self.format.block_bytes() as u64)
            .context("a size beyond all measure")
    }
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::Integer(value)) if (1..=1 << 20).contains(value) && value.count_ones() == 1 => {
            Ok(*value as u64)
        }
        Some(other) => bail!("`general.alignment` is {other:?}, expected a power of two"),
    }
}

/// Reads numbers one after the other.
struct Reader<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn left(&self) -> usize {
        self.file.len() - self.at
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let bytes = self.at.checked_add(length).and_then(|end| self.file.get(self.at..end));
        let bytes =
            bytes.with_context(|| format!("the file ends at byte {}, inside the header", self.file.len()))?;
        self.at += length;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into()?)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<String> {
        let length = usize::try_from(self.u64()?).context("a text beyond all measure")?;
        let bytes = self.take(length).with_context(|| format!("a text of {length} bytes"))?;
        String::from_utf8(bytes.to_vec()).context("a text that is not UTF-8")
    }
}
