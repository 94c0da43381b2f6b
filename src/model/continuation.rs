//! Generation with caches: the next tokens of some sequences go through the model side by side.
//!
//! Nothing is filled up: the tokens of all sequences are rows of one matrix, so each weight is read once for all of
//! them, and only attention goes sequence by sequence, each over its own cache. A sequence may bring a part of its
//! prompt while others bring one token.

use anyhow::{Result, ensure};
use tch::Tensor;

use super::decoder::Decoder;
use super::kv_cache::KvCache;
use crate::kernels::cross_entropy::logits_reference;

/// The next tokens of a sequence, and what it keeps of those before.
#[derive(Debug)]
pub struct Continuation<'a, C = KvCache> {
    /// Token ids, at least one.
    pub input_ids: &'a [u32],
    /// Keys and values of the tokens before them; takes theirs.
    pub cache: &'a mut C,
}

impl Decoder {
    /// Appends `input_ids` to the sequence in `cache` and gives the logits after the last of them, `[vocab]` f32.
    ///
    /// # Errors
    /// As [`forward_cached_batch`](Self::forward_cached_batch).
    pub fn forward_cached(&self, input_ids: &[u32], cache: &mut KvCache) -> Result<Tensor> {
        Ok(self.forward_cached_batch(&mut [Continuation { input_ids, cache }])?.squeeze_dim(0))
    }

    /// Appends tokens to each sequence of `batch` and gives the logits after the last of them, `[seqs, vocab]` f32.
    ///
    /// # Errors
    /// When the batch is empty, a sequence brings no token, a cache is too small, or as [`loss`](Self::loss); no
    /// cache has then taken anything.
    pub fn forward_cached_batch(&self, batch: &mut [Continuation<'_>]) -> Result<Tensor> {
        ensure!(!batch.is_empty(), "there is no sequence to go on with");
        for Continuation { input_ids, cache } in batch.iter() {
            self.check_continuation(input_ids, cache)?;
        }
        tch::no_grad(|| {
            let Packed { input_ids, positions, cu_seqlens, last } = Packed::of(batch);
            let on_device = |ids: &[i64]| Tensor::from_slice(ids).to_device(self.device());
            let pass = self.pass_over(&on_device(&positions), &cu_seqlens, None);
            let caches: Vec<&KvCache> = batch.iter().map(|one| &*one.cache).collect();
            let mut x = self.embed(&on_device(&input_ids)); // [tokens, hidden]
            for (index, layer) in self.layers().iter().enumerate() {
                x = layer.forward_cached(&x, &pass, index, &caches)?;
            }
            for Continuation { input_ids, cache } in batch.iter_mut() {
                cache.advance(input_ids.len() as i64);
            }
            // Of a prompt only the last token is asked what comes next.
            let ends = if last.len() == input_ids.len() { x } else { x.index_select(0, &on_device(&last)) };
            let normed = self.final_norm(&ends).y; // [seqs, hidden]
            Ok(logits_reference(&normed, &self.head(), self.config().logits_scaling))
        })
    }

    fn check_continuation(&self, input_ids: &[u32], cache: &KvCache) -> Result<()> {
        let needed = cache.len() + input_ids.len() as i64;
        let capacity = cache.capacity();
        ensure!(!input_ids.is_empty(), "there is no token to go on from");
        ensure!(needed <= capacity, "the cache holds {capacity} tokens, {needed} are needed");
        self.check_ids(input_ids.iter().copied().max().map_or(0, i64::from), needed)
    }
}

/// The tokens of a batch side by side.
struct Packed {
    /// `[tokens]`.
    input_ids: Vec<i64>,
    /// `[tokens]`, each in its own sequence.
    positions: Vec<i64>,
    /// Where each sequence's tokens begin and end, `[seqs + 1]`.
    cu_seqlens: Vec<i64>,
    /// The last token of each sequence, `[seqs]`.
    last: Vec<i64>,
}

impl Packed {
    fn of(batch: &[Continuation<'_>]) -> Self {
        let (mut input_ids, mut positions, mut cu_seqlens) = (Vec::new(), Vec::new(), vec![0]);
        for Continuation { input_ids: next, cache } in batch {
            input_ids.extend(next.iter().map(|id| i64::from(*id)));
            positions.extend((cache.len()..).take(next.len()));
            cu_seqlens.push(input_ids.len() as i64);
        }
        let last = cu_seqlens.iter().skip(1).map(|end| end - 1).collect();
        Self { input_ids, positions, cu_seqlens, last }
    }
}
