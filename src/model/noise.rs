//! Noise on the embeddings while training: NEFTune (Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction
//! Finetuning").
//!
//! Uniform in ±α / √(L·d) for a sequence of L tokens and d channels. A packed sequence counts by itself, as it would
//! unpacked. The noise is a function of seed and micro-batch: libtorch's generator begins anew with each, so a resumed run
//! sees the same.

use anyhow::Result;
use tch::Tensor;

use super::batch::Batch;

/// Which noise a pass adds; none in evaluation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoiseStep {
    /// The α of the paper.
    pub alpha: f64,
    /// Seed of the run.
    pub seed: u64,
    /// Counter of the micro-batch.
    pub microbatch: u64,
}

/// Adds the noise to embeddings `x` `[tokens, hidden]`; `room` of the same shape and dtype is written over.
///
/// # Errors
/// When memory does not suffice.
pub fn add_noise(x: &Tensor, batch: &Batch, step: NoiseStep, room: &Tensor) -> Result<()> {
    let hidden = x.size()[1];
    tch::manual_seed(mixed(step.seed, step.microbatch));
    let _ = room.shallow_clone().f_uniform_(-1.0, 1.0)?;
    let bounds = batch.cu_seqlens.windows(2).flat_map(|pair| {
        let length = pair[1] - pair[0];
        std::iter::repeat_n((step.alpha / (length as f64 * hidden as f64).sqrt()) as f32, length as usize)
    });
    let bounds = Tensor::from_slice(&bounds.collect::<Vec<f32>>()).to_device(x.device()).unsqueeze(1);
    let _ = room.shallow_clone().f_mul_(&bounds.to_kind(room.kind()))?;
    let _ = x.shallow_clone().f_add_(room)?;
    Ok(())
}

/// As embeddings alone: a buffer of its own is taken.
pub(super) fn noisy(x: Tensor, batch: &Batch, step: NoiseStep) -> Result<Tensor> {
    add_noise(&x, batch, step, &x.f_empty_like()?)?;
    Ok(x)
}

/// One seed of two numbers (the finaliser of SplitMix64): neighbours are far apart.
fn mixed(seed: u64, microbatch: u64) -> i64 {
    let mut z =
        seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(microbatch).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ z >> 31).cast_signed()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::model::batch::Sequence;

    fn noise(lengths: &[usize], alpha: f64, seed: u64, microbatch: u64) -> Tensor {
        let sequence = |length: &usize| Sequence {
            input_ids: vec![1; *length],
            loss_mask: vec![true; *length],
            source: 0,
        };
        let sequences: Vec<Sequence> = lengths.iter().map(sequence).collect();
        let batch = Batch::pack(&sequences, Device::Cpu);
        let x = Tensor::zeros([batch.tokens(), 64], (Kind::Float, Device::Cpu));
        noisy(x, &batch, NoiseStep { alpha, seed, microbatch }).unwrap()
    }

    #[test]
    fn each_sequence_has_the_papers_bound() {
        let x = noise(&[400, 25], 5.0, 3, 9);
        for (start, length) in [(0, 400), (400, 25)] {
            let bound = 5.0 / (length as f64 * 64.0).sqrt();
            let part = x.narrow(0, start, length);
            let largest = part.abs().max().double_value(&[]);
            assert!(largest <= bound * 1.000_001 && largest > 0.99 * bound, "{largest} {bound}");
            let spread = part.std(false).double_value(&[]);
            assert!((spread / (bound / 3f64.sqrt()) - 1.0).abs() < 0.05);
            assert!(part.mean(Kind::Float).double_value(&[]).abs() < 0.06 * bound);
        }
    }

    #[test]
    fn noise_is_a_function_of_its_counters() {
        let one = noise(&[7], 5.0, 1, 2);
        assert!(one.equal(&noise(&[7], 5.0, 1, 2)));
        for other in [noise(&[7], 5.0, 2, 1), noise(&[7], 5.0, 1, 3), noise(&[7], 5.0, 2, 2)] {
            assert!(!one.equal(&other));
        }
    }
}
