//! An exact inner-product index over the passages of all documents, cached on disk.
//!
//! Every passage is compared with every question: 100,000 passages of 384 numbers are 38 million products, some ten
//! milliseconds of one core, with nothing approximate and nothing to tune. The cache is keyed by content: a document
//! is encoded again when its title or text changed, or the encoder did.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use rayon::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::chunk::{self, Limits};
use super::documents::Document;
use super::encoder::Encoder;
use crate::hex::hex;
use crate::output::Staged;
use crate::progress;

/// Layout of the cache and way of chunking: a change of either makes old caches unreadable.
const FORMAT: u32 = 1;
/// Tokens that a passage repeats from the one before it: two sentences or so.
const OVERLAP: usize = 32;
/// The title stands before each passage and takes at most this share of the encoder's tokens.
const TITLE_SHARE: usize = 4;

const TABLE: &str = "index.json";
const VECTORS: &str = "vectors.safetensors";

/// A stretch of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passage {
    /// Which document, by its place in [`Index::documents`].
    pub document: usize,
    /// Bytes of the document's content.
    pub range: Range<usize>,
}

/// A document that answers a question, by its best passage.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hit {
    /// Which document.
    pub document: usize,
    /// Which passage of [`Index::passages`].
    pub passage: usize,
    /// Inner product of unit vectors, in `[-1, 1]`.
    pub score: f32,
}

/// Documents, their passages and the passages' embeddings.
#[derive(Debug, Clone, PartialEq)]
pub struct Index {
    documents: Vec<Document>,
    passages: Vec<Passage>,
    /// `[passages, dim]`, row by row.
    vectors: Vec<f32>,
    dim: usize,
}

/// What [`Index::build`] had to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    /// Documents that were encoded.
    pub encoded: usize,
    /// Documents whose passages and vectors came from the cache.
    pub reused: usize,
}

impl Index {
    /// Splits and encodes `documents`, taking from the folder `cache` what it holds, and renews the cache.
    ///
    /// A cache that is damaged or of another encoder is made anew.
    ///
    /// # Errors
    /// When encoding fails or the cache cannot be written.
    pub fn build(documents: Vec<Document>, encoder: &Encoder, cache: Option<&Path>) -> Result<(Self, Work)> {
        let mut known = cache.map(|folder| Cache::read(folder, encoder)).unwrap_or_default();
        let hashes: Vec<String> = documents.iter().map(content_hash).collect();
        let fresh: Vec<usize> =
            (0..documents.len()).filter(|&at| !known.holds(&hashes[at], &documents[at].content)).collect();
        known.add(encode(&documents, &fresh, &hashes, encoder)?);
        let work = Work { encoded: fresh.len(), reused: documents.len() - fresh.len() };
        if let Some(folder) = cache {
            known.write(folder, encoder, &hashes)?;
        }
        Ok((known.index(documents, &hashes, encoder.dim()), work))
    }

    /// An index of passages that were encoded elsewhere; `vectors` is `[passages, dim]` row by row.
    ///
    /// # Errors
    /// When the sizes do not agree or a passage lies outside its document.
    pub fn new(
        documents: Vec<Document>,
        passages: Vec<Passage>,
        vectors: Vec<f32>,
        dim: usize,
    ) -> Result<Self> {
        ensure!(
            dim > 0 && vectors.len() == passages.len() * dim,
            "{} numbers for {} passages of {dim}",
            vectors.len(),
            passages.len()
        );
        for Passage { document, range } in &passages {
            let content = documents.get(*document).map(|document| document.content.get(range.clone()));
            ensure!(content.flatten().is_some(), "no text at {range:?} of document {document}");
        }
        Ok(Self { documents, passages, vectors, dim })
    }

    /// The documents, in their folder's order.
    pub fn documents(&self) -> &[Document] {
        &self.documents
    }

    /// The passages, ordered by document and place.
    pub fn passages(&self) -> &[Passage] {
        &self.passages
    }

    /// The text of a hit's passage.
    pub fn text(&self, hit: &Hit) -> &str {
        let Passage { document, range } = &self.passages[hit.passage];
        &self.documents[*document].content[range.clone()]
    }

    /// The `k` documents nearest to `query` (`[dim]`), best first; equal scores keep the documents' order.
    ///
    /// # Errors
    /// When `query` has another length than the vectors.
    pub fn search(&self, query: &[f32], k: usize) -> Result<Vec<Hit>> {
        ensure!(query.len() == self.dim, "a query of {} numbers, expected {}", query.len(), self.dim);
        let scores: Vec<f32> = self.vectors.par_chunks_exact(self.dim).map(|row| dot(row, query)).collect();
        let mut hits: Vec<Hit> = Vec::new();
        for (passage, (&Passage { document, .. }, &score)) in self.passages.iter().zip(&scores).enumerate() {
            let hit = Hit { document, passage, score };
            // Passages are ordered by document, so those of one follow each other.
            match hits.last_mut() {
                Some(last) if last.document == document => {
                    if score > last.score {
                        *last = hit;
                    }
                }
                _ => hits.push(hit),
            }
        }
        hits.sort_by(best_first);
        hits.truncate(k);
        Ok(hits)
    }
}

fn best_first(a: &Hit, b: &Hit) -> Ordering {
    b.score.total_cmp(&a.score).then(a.document.cmp(&b.document))
}

/// Eight sums side by side: one lane each, in an order that does not depend on the machine.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 8];
    let (a_blocks, b_blocks) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a_blocks.remainder().iter().zip(b_blocks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_blocks.zip(b_blocks) {
        for (lane, (x, y)) in lanes.iter_mut().zip(x.iter().zip(y)) {
            *lane += x * y;
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// What the embedding of a document depends on.
fn content_hash(document: &Document) -> String {
    let mut hash = Sha256::new();
    hash.update((document.title.len() as u64).to_le_bytes());
    hash.update(&document.title);
    hash.update(&document.content);
    hex(&hash.finalize())
}

/// Passages and vectors of one document.
#[derive(Debug, Clone, PartialEq)]
struct Encoded {
    passages: Vec<Range<usize>>,
    /// `[passages, dim]`
    vectors: Vec<f32>,
}

/// Splits and encodes the documents `fresh`, all passages in one go so that batches are full.
fn encode(
    documents: &[Document],
    fresh: &[usize],
    hashes: &[String],
    encoder: &Encoder,
) -> Result<HashMap<String, Encoded>> {
    let mut texts = Vec::new();
    let mut split = Vec::new();
    for &at in fresh {
        let document = &documents[at];
        let passages =
            split_document(document, encoder).with_context(|| format!("document `{}`", document.id))?;
        texts.extend(passages.iter().map(|range| passage_text(document, range)));
        split.push((hashes[at].clone(), passages));
    }
    let bar = progress::bar(texts.len() as u64, "encode", "passages");
    let references: Vec<&str> = texts.iter().map(String::as_str).collect();
    let vectors = encoder.encode(&references, |done| bar.inc(done as u64))?;
    bar.finish_and_clear();
    let mut rows = vectors.chunks_exact(encoder.dim());
    Ok(split
        .into_iter()
        .map(|(hash, passages)| {
            let vectors = rows.by_ref().take(passages.len()).flatten().copied().collect();
            (hash, Encoded { passages, vectors })
        })
        .collect())
}

fn split_document(document: &Document, encoder: &Encoder) -> Result<Vec<Range<usize>>> {
    let title = encoder.token_spans(&document.title)?.len().min(encoder.max_tokens() / TITLE_SHARE);
    let tokens = encoder.max_tokens() - title;
    let spans = encoder.token_spans(&document.content)?;
    let limits = Limits { tokens, overlap: OVERLAP.min(tokens / 4) };
    Ok(chunk::passages(&document.content, &spans, limits))
}

/// What the encoder reads: the title, then the passage, unless that begins with the title itself.
fn passage_text(document: &Document, range: &Range<usize>) -> String {
    let passage = &document.content[range.clone()];
    if passage.trim_start_matches(['#', ' ']).starts_with(&document.title) {
        passage.to_string()
    } else {
        format!("{}\n{passage}", document.title)
    }
}

/// The table of a cache: which rows of the vectors belong to which content.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Table {
    format: u32,
    encoder: String,
    dim: usize,
    /// SHA-256 of the vectors' file.
    vectors: String,
    documents: Vec<Entry>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Entry {
    hash: String,
    passages: Vec<Range<usize>>,
}

/// Encoded documents by the hash of their content.
#[derive(Debug, Default)]
struct Cache {
    documents: HashMap<String, Encoded>,
    /// What the folder holds, when it was whole.
    table: Option<Table>,
}

impl Cache {
    /// Reads a cache; empty where there is none, or none that can be used.
    fn read(folder: &Path, encoder: &Encoder) -> Self {
        if !folder.join(TABLE).exists() {
            return Self::default();
        }
        Self::parse(folder, encoder).unwrap_or_else(|error| {
            let folder = folder.display();
            progress::note(format!("note: the index `{folder}` is made anew: {error:#}"));
            Self::default()
        })
    }

    fn parse(folder: &Path, encoder: &Encoder) -> Result<Self> {
        let table: Table = serde_json::from_slice(&fs::read(folder.join(TABLE))?)
            .with_context(|| format!("`{TABLE}` is damaged"))?;
        ensure!(table.format == FORMAT, "its format is {}, expected {FORMAT}", table.format);
        ensure!(
            table.encoder == encoder.identity() && table.dim == encoder.dim(),
            "it was made with another encoder"
        );
        let bytes = fs::read(folder.join(VECTORS))?;
        ensure!(hex(&Sha256::digest(&bytes)) == table.vectors, "`{VECTORS}` is damaged");
        let vectors = floats(SafeTensors::deserialize(&bytes)?.tensor("vectors")?.data());
        let mut rows = vectors.chunks_exact(table.dim);
        let mut documents = HashMap::new();
        for Entry { hash, passages } in &table.documents {
            let vectors: Vec<f32> = rows.by_ref().take(passages.len()).flatten().copied().collect();
            ensure!(vectors.len() == passages.len() * table.dim, "`{VECTORS}` is too short");
            documents.insert(hash.clone(), Encoded { passages: passages.clone(), vectors });
        }
        Ok(Self { documents, table: Some(table) })
    }

    /// Whether the document with this hash is known, and its passages are stretches of `content` indeed.
    fn holds(&self, hash: &str, content: &str) -> bool {
        self.documents
            .get(hash)
            .is_some_and(|encoded| encoded.passages.iter().all(|range| content.get(range.clone()).is_some()))
    }

    fn add(&mut self, documents: HashMap<String, Encoded>) {
        self.documents.extend(documents);
    }

    /// Writes what `hashes` name, once each; nothing is written where the folder holds just that.
    fn write(&self, folder: &Path, encoder: &Encoder, hashes: &[String]) -> Result<()> {
        let mut hashes: Vec<&String> = hashes.iter().collect();
        hashes.sort();
        hashes.dedup();
        let (mut entries, mut vectors) = (Vec::new(), Vec::new());
        for hash in hashes {
            let encoded = &self.documents[hash];
            entries.push(Entry { hash: hash.clone(), passages: encoded.passages.clone() });
            vectors.extend(encoded.vectors.iter().flat_map(|x| x.to_le_bytes()));
        }
        let shape = vec![vectors.len() / (4 * encoder.dim()), encoder.dim()];
        let view = TensorView::new(Dtype::F32, shape, &vectors)?;
        let bytes = safetensors::serialize([("vectors", view)], None)?;
        let table = Table {
            format: FORMAT,
            encoder: encoder.identity().to_string(),
            dim: encoder.dim(),
            vectors: hex(&Sha256::digest(&bytes)),
            documents: entries,
        };
        if self.table.as_ref() == Some(&table) {
            return Ok(());
        }
        let staged = Staged::folder(folder, &[])?;
        fs::write(staged.path().join(TABLE), serde_json::to_vec(&table)?)?;
        fs::write(staged.path().join(VECTORS), bytes)?;
        staged.commit().context("cannot write the index")
    }

    fn index(&self, documents: Vec<Document>, hashes: &[String], dim: usize) -> Index {
        let (mut passages, mut vectors) = (Vec::new(), Vec::new());
        for (document, hash) in hashes.iter().enumerate() {
            let encoded = &self.documents[hash];
            passages.extend(encoded.passages.iter().map(|range| Passage { document, range: range.clone() }));
            vectors.extend_from_slice(&encoded.vectors);
        }
        Index { documents, passages, vectors, dim }
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect()
}
