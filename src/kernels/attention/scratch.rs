//! Memory of the backward pass between its kernels, taken once.

use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use tch::{Device, Kind, Tensor};

use super::AttentionShape;
use super::lists::{BLOCK, block_count};

/// Sums of the queries' gradient, their semaphores, and what is known of each row before the pass; used by one pass at a time.
#[derive(Debug)]
pub struct AttentionScratch {
    shape: AttentionShape,
    device: Device,
    buffers: Mutex<Buffers>,
}

/// `blocks` numbers of blocks have room.
#[derive(Debug)]
pub(super) struct Buffers {
    blocks: i64,
    /// `[blocks, heads, 64 · head_dim]` f32.
    pub dq_sums: Tensor,
    /// `[blocks, heads, 64]` f32.
    pub lse2: Tensor,
    /// As `lse2`.
    pub delta: Tensor,
    /// `[blocks, heads]`, 0 between launches.
    pub semaphores: Tensor,
}

impl AttentionScratch {
    /// For batches of at most so many tokens and sequences; a larger one makes it grow. Takes no memory on the CPU.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn new(shape: AttentionShape, tokens: i64, sequences: i64, device: Device) -> Result<Self> {
        let blocks = if device.is_cuda() { block_count(tokens, sequences) } else { 0 };
        Ok(Self { shape, device, buffers: Mutex::new(Buffers::new(shape, blocks, device)?) })
    }

    /// Bytes of each buffer for batches of at most so many tokens and sequences.
    pub fn bytes(shape: AttentionShape, tokens: i64, sequences: i64) -> [i64; 4] {
        shapes(shape, block_count(tokens, sequences)).map(|sizes| 4 * sizes.iter().product::<i64>())
    }

    /// Whether every semaphore is 0: so they must be between launches. Waits for the GPU.
    ///
    /// # Errors
    /// When the GPU fails.
    pub fn is_at_rest(&self) -> Result<bool> {
        let buffers = self.lock();
        Ok(buffers.semaphores.numel() == 0
            || buffers.semaphores.f_count_nonzero(None)?.f_int64_value(&[])? == 0)
    }

    /// Fills what a backward pass must not read before it has written it with what is no number, for checks.
    ///
    /// # Errors
    /// When the GPU fails.
    pub fn poison(&self) -> Result<()> {
        let buffers = self.lock();
        for buffer in [&buffers.dq_sums, &buffers.lse2, &buffers.delta] {
            let _ = buffer.shallow_clone().f_fill_(f64::NAN)?;
        }
        Ok(())
    }

    pub(super) fn fits(&self, shape: AttentionShape) -> bool {
        self.shape.heads == shape.heads && self.shape.head_dim == shape.head_dim
    }

    /// The buffers, with room for so many blocks.
    pub(super) fn for_blocks(&self, blocks: usize) -> Result<MutexGuard<'_, Buffers>> {
        let mut buffers = self.lock();
        let blocks = i64::try_from(blocks)?;
        if blocks > buffers.blocks {
            *buffers = Buffers::new(self.shape, blocks, self.device)
                .with_context(|| format!("no room for the backward pass of {blocks} blocks of rows"))?;
        }
        Ok(buffers)
    }

    fn lock(&self) -> MutexGuard<'_, Buffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffers {
    fn new(shape: AttentionShape, blocks: i64, device: Device) -> Result<Self> {
        let [sums, rows, _, counts] = shapes(shape, blocks);
        let empty = |sizes: [i64; 3]| Tensor::f_empty(sizes, (Kind::Float, device));
        Ok(Self {
            blocks,
            dq_sums: empty(sums)?,
            lse2: empty(rows)?,
            delta: empty(rows)?,
            semaphores: Tensor::f_zeros(counts, (Kind::Int, device))?,
        })
    }
}

/// Sizes of sums, lse2, delta and semaphores; all of four bytes.
fn shapes(shape: AttentionShape, blocks: i64) -> [[i64; 3]; 4] {
    let AttentionShape { heads, head_dim, .. } = shape;
    let rows = [blocks, heads, BLOCK];
    [[blocks, heads, BLOCK * head_dim], rows, rows, [blocks, heads, 1]]
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    const SHAPE: AttentionShape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 64 };

    #[test]
    fn it_grows_when_a_batch_needs_more() {
        let scratch = AttentionScratch::new(SHAPE, 300, 2, Device::Cpu).unwrap();
        assert_eq!(scratch.for_blocks(0).unwrap().dq_sums.numel(), 0, "nothing is taken on the CPU");
        for (asked, there) in [(3, 3), (2, 3), (5, 5)] {
            let buffers = scratch.for_blocks(asked).unwrap();
            assert_eq!(buffers.dq_sums.size(), [there, 4, 64 * 64]);
            assert_eq!(buffers.semaphores.count_nonzero(None).int64_value(&[]), 0);
        }
        assert!(scratch.is_at_rest().unwrap());
    }

    #[test]
    fn the_bytes_are_those_of_the_buffers() {
        let bytes = AttentionScratch::bytes(SHAPE, 6 * 64 + 5, 3);
        let buffers = Buffers::new(SHAPE, 9, Device::Cpu).unwrap();
        let Buffers { dq_sums, lse2, delta, semaphores, .. } = &buffers;
        assert_eq!(bytes, [dq_sums, lse2, delta, semaphores].map(|buffer| 4 * buffer.numel() as i64));
    }
}
