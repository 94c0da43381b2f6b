//! What the engine needs of a model, and how a decoder gives it.

use anyhow::Result;
use tch::{Device, Kind};

use crate::model::continuation::Continuation;
use crate::model::decoder::Decoder;
use crate::model::kv_cache::KvCache;

/// What the engine needs of a model.
pub trait CausalLm: Send + 'static {
    /// Keys and values of one sequence.
    type Cache;

    /// Longest sequence in tokens.
    fn context(&self) -> usize;

    /// Number of token ids.
    fn vocabulary(&self) -> usize;

    /// An empty cache with room for `capacity` tokens.
    ///
    /// # Errors
    /// When there is no memory for it.
    fn new_cache(&self, capacity: usize) -> Result<Self::Cache>;

    /// Appends tokens to each sequence of `batch`; the logits after the last of each, `[vocab]` for every sequence in
    /// the order of the batch.
    ///
    /// # Errors
    /// When the model cannot compute them.
    fn forward_cached(&self, batch: &mut [Continuation<'_, Self::Cache>]) -> Result<Vec<Vec<f32>>>;
}

impl CausalLm for Decoder {
    type Cache = KvCache;

    fn context(&self) -> usize {
        usize::try_from(self.config().max_position_embeddings).unwrap_or(0)
    }

    fn vocabulary(&self) -> usize {
        usize::try_from(self.config().vocab_size).unwrap_or(0)
    }

    fn new_cache(&self, capacity: usize) -> Result<KvCache> {
        KvCache::new(self.config(), capacity as i64, self.kind(), self.device())
    }

    fn forward_cached(&self, batch: &mut [Continuation<'_>]) -> Result<Vec<Vec<f32>>> {
        let logits = self.forward_cached_batch(batch)?.to_device(Device::Cpu).to_kind(Kind::Float); // [seqs, vocab]
        (0..batch.len() as i64).map(|sequence| Ok(Vec::try_from(logits.get(sequence))?)).collect()
    }
}
