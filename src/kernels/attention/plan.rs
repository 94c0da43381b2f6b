//! A batch's lists on the device, and which kernels take them.

use anyhow::{Context as _, Result, ensure};
use tch::{Device, Kind, Tensor};

use super::lists::{BLOCK, Block, Lists, Tile};
use crate::kernels::gpu::Gpu;

/// The sizes that all layers share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads, a multiple of `kv_heads`.
    pub heads: i64,
    /// Key and value heads.
    pub kv_heads: i64,
    /// Elements of a head.
    pub head_dim: i64,
}

/// Who computes attention on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionKernel {
    /// Ours for sm_90a.
    Hopper,
    /// Ours for every GPU from sm_80 on. On the CPU its twin.
    Portable,
    /// libtorch: see [`fused_attention`](crate::kernels::fused_attention).
    Libtorch,
}

/// Sizes of heads that our kernels take.
const HEAD_DIMS: [i64; 2] = [64, 128];

impl AttentionKernel {
    /// The fastest that can run on a device.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn best(device: Device, head_dim: i64) -> Result<Self> {
        if !device.is_cuda() {
            return Ok(Self::Portable);
        }
        Ok(Self::ours(device, head_dim)?.into_iter().next().unwrap_or(Self::Libtorch))
    }

    /// Those of ours that can run on a GPU, the fastest first.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn ours(device: Device, head_dim: i64) -> Result<Vec<Self>> {
        let Device::Cuda(index) = device else { return Ok(Vec::new()) };
        let gpu = Gpu::at(index)?;
        let runs =
            |kernel: &Self| Self::takes(head_dim) && kernel.families().iter().all(|family| gpu.has(family));
        Ok([Self::Hopper, Self::Portable].into_iter().filter(runs).collect())
    }

    /// Whether our kernels take heads of this size.
    pub fn takes(head_dim: i64) -> bool {
        HEAD_DIMS.contains(&head_dim)
    }

    /// Forward, backward, and what is around the backward pass.
    pub(super) fn families(self) -> &'static [&'static str] {
        match self {
            Self::Hopper => &["attention_hopper_forward", "attention_hopper_backward", "attention_gradient"],
            Self::Portable => &["attention_forward", "attention_backward", "attention_gradient"],
            Self::Libtorch => &[],
        }
    }

    /// As it is called in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hopper => "Hopper",
            Self::Portable => "portable",
            Self::Libtorch => "libtorch",
        }
    }
}

/// How a batch's tokens fall into tiles; made once a batch, used by all layers and both passes.
#[derive(Debug)]
pub struct AttentionPlan {
    pub(super) shape: AttentionShape,
    pub(super) kernel: AttentionKernel,
    cu_seqlens: Vec<i64>,
    device: Device,
    counts: Counts,
    /// Tickets, then the lists, as `[words]` i32; empty on the CPU.
    words: Tensor,
}

/// Entries of the lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counts {
    pub forward: usize,
    pub backward: usize,
    pub blocks: usize,
}

/// Where the parts of a plan lie on the GPU.
#[derive(Debug, Clone, Copy)]
pub(super) struct Addresses {
    pub forward_tickets: u64,
    pub backward_tickets: u64,
    pub forward: u64,
    pub backward: u64,
    pub blocks: u64,
}

/// i32 before the lists: two tickets a pass.
const TICKET_WORDS: usize = 4;

/// Blocks of the backward kernel at a time on a GPU that is not there.
const WORKERS: usize = 132;

impl AttentionPlan {
    /// The plan of sequences that lie between the numbers of `cu_seqlens` (from 0 to the number of tokens), for the
    /// fastest kernels of `device`.
    ///
    /// # Errors
    /// When the numbers do not ascend from 0, there are too many tokens, the heads do not fit each other, or the device
    /// fails.
    pub fn new(cu_seqlens: &[i64], shape: AttentionShape, device: Device) -> Result<Self> {
        Self::with(AttentionKernel::best(device, shape.head_dim)?, cu_seqlens, shape, device)
    }

    /// As [`new`](Self::new), for given kernels.
    ///
    /// # Errors
    /// As [`new`](Self::new), and when these kernels do not run on `device` or do not take such heads.
    pub fn with(
        kernel: AttentionKernel,
        cu_seqlens: &[i64],
        shape: AttentionShape,
        device: Device,
    ) -> Result<Self> {
        let AttentionShape { heads, kv_heads, head_dim } = shape;
        ensure!(
            kv_heads > 0 && heads > 0 && heads % kv_heads == 0,
            "{heads} query heads cannot share {kv_heads} key heads"
        );
        ensure!(
            !device.is_cuda() || AttentionKernel::ours(device, head_dim)?.contains(&kernel),
            "there are no {} kernels of ours for heads of {head_dim} on this GPU",
            kernel.name()
        );
        let workers = match device {
            Device::Cuda(index) => Gpu::at(index)?.multiprocessors()? as usize,
            _ => WORKERS,
        };
        let lists = Lists::new(cu_seqlens, kv_heads, workers)?;
        let counts = Counts {
            forward: lists.forward.len(),
            backward: lists.backward.len(),
            blocks: lists.blocks.len(),
        };
        // Kernels number the rows of blocks, of all heads, in 32 bits.
        u32::try_from(counts.blocks as i64 * BLOCK * heads)
            .with_context(|| format!("{} blocks of {heads} heads are too many at a time", counts.blocks))?;
        let words = if device.is_cuda() { upload(&lists, device)? } else { Tensor::new() };
        Ok(Self { shape, kernel, cu_seqlens: cu_seqlens.to_vec(), device, counts, words })
    }

    /// Tokens of the batch.
    pub fn tokens(&self) -> i64 {
        self.cu_seqlens.last().copied().unwrap_or(0)
    }

    /// Heads and their size.
    pub fn shape(&self) -> AttentionShape {
        self.shape
    }

    /// Who computes.
    pub fn kernel(&self) -> AttentionKernel {
        self.kernel
    }

    /// Whether no ticket is out: so it must be between launches. Waits for the GPU.
    ///
    /// # Errors
    /// When the GPU fails.
    pub fn is_at_rest(&self) -> Result<bool> {
        if self.words.numel() == 0 {
            return Ok(true);
        }
        let tickets = self.words.f_narrow(0, 0, TICKET_WORDS as i64)?;
        Ok(tickets.f_count_nonzero(None)?.f_int64_value(&[])? == 0)
    }

    pub(super) fn cu_seqlens(&self) -> &[i64] {
        &self.cu_seqlens
    }

    pub(super) fn counts(&self) -> Counts {
        self.counts
    }

    pub(super) fn addresses(&self) -> Addresses {
        let base = self.words.data_ptr() as u64;
        let at = |words: usize| base + 4 * words as u64;
        let forward = TICKET_WORDS;
        let backward = forward + self.counts.forward * size_of::<Tile>() / 4;
        let blocks = backward + self.counts.backward * size_of::<Tile>() / 4;
        Addresses {
            forward_tickets: at(0),
            backward_tickets: at(2),
            forward: at(forward),
            backward: at(backward),
            blocks: at(blocks),
        }
    }

    pub(super) fn ensure_tokens(&self, name: &str, tensor: &Tensor) -> Result<()> {
        let found = tensor.size().first().copied().unwrap_or(0);
        ensure!(found == self.tokens(), "`{name}` has {found} tokens, the plan is for {}", self.tokens());
        Ok(())
    }

    pub(super) fn ensure_device(&self, name: &str, tensor: &Tensor) -> Result<()> {
        let found = tensor.device();
        ensure!(found == self.device, "`{name}` is on {found:?}, the plan is for {:?}", self.device);
        Ok(())
    }

    pub(super) fn gpu(&self) -> Result<std::sync::Arc<Gpu>> {
        Gpu::of(&self.words)
    }
}

/// Tickets at 0 and the lists, in one copy.
fn upload(lists: &Lists, device: Device) -> Result<Tensor> {
    let mut words = vec![0i32; TICKET_WORDS];
    words.extend(lists.forward.iter().chain(&lists.backward).flat_map(|tile| Tile::words(*tile)));
    words.extend(lists.blocks.iter().flat_map(|block| Block::words(*block)));
    let words = Tensor::f_from_slice(&words)?.f_to_device(device)?;
    debug_assert_eq!(words.kind(), Kind::Int);
    Ok(words)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    const SHAPE: AttentionShape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 64 };

    #[test]
    fn a_plan_knows_its_batch() {
        let plan = AttentionPlan::new(&[0, 300, 300, 301], SHAPE, Device::Cpu).unwrap();
        assert_eq!((plan.tokens(), plan.kernel()), (301, AttentionKernel::Portable));
        assert_eq!(plan.counts(), Counts { forward: 4, backward: 8, blocks: 6 });
        assert!(plan.is_at_rest().unwrap());
        let x = Tensor::zeros([300, 4, 64], (Kind::Float, Device::Cpu));
        let told = plan.ensure_tokens("q", &x).unwrap_err().to_string();
        assert_eq!(told, "`q` has 300 tokens, the plan is for 301");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let with = |shape| AttentionPlan::new(&[0, 5], shape, Device::Cpu).map(|_| ());
        assert!(with(AttentionShape { kv_heads: 3, ..SHAPE }).unwrap_err().to_string().contains("share 3"));
        assert!(with(AttentionShape { heads: 0, ..SHAPE }).is_err());
        assert!(AttentionPlan::new(&[0, 5, 2], SHAPE, Device::Cpu).is_err());
        let many = AttentionShape { heads: 1 << 30, kv_heads: 1, head_dim: 64 };
        assert!(
            AttentionPlan::new(&[0, 300], many, Device::Cpu).unwrap_err().to_string().contains("too many")
        );
    }
}
