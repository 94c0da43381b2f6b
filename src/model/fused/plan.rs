//! The memory plan: every region of a training on a GPU, from shapes alone.
//!
//! [`Workspace`](super::workspace::Workspace) allocates exactly the regions named here, so plan and allocation cannot
//! drift apart. Where libtorch computes attention, what it allocates is counted beside them.

use std::fmt;

use serde::Serialize;

use super::group::{Group, GroupName};
use super::host_adapter;
use super::offload::SLOTS;
use crate::kernels::attention::{AttentionKernel, AttentionScratch, AttentionShape};
use crate::kernels::gemm::Gemm;
use crate::model::config::ModelConfig;
use crate::recipe::{LoraSpec, Optimizer, Projection, Quantization, Recompute};

/// The vocabulary is filled up to a multiple of this: an odd width makes the head's product five times slower.
const VOCAB_MULTIPLE: i64 = 128;

/// Rows of logits for which there is always room.
const LEAST_LOGITS: i64 = 256;

/// Regions that libtorch takes while a batch is computed, where it computes attention.
const OF_LIBTORCH: [&str; 2] = ["attention output and log-sum-exp", "attention's gradients and accumulators"];

/// Bytes of a bf16 and of an f32.
const BF16: i64 = 2;
const F32: i64 = 4;

/// A stretch of memory and what it is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Region {
    /// What for.
    pub name: &'static str,
    /// Bytes of one.
    pub bytes: i64,
    /// How many.
    pub count: i64,
}

impl Region {
    fn new(name: &'static str, bytes: i64, count: i64) -> Self {
        Self { name, bytes: taken(bytes), count }
    }

    /// Bytes of all.
    pub fn total(&self) -> i64 {
        self.bytes * self.count
    }
}

/// What libtorch's allocator takes for a tensor: 2 MiB at a time from 10 MiB on, where less than 1 MiB is left over.
fn taken(bytes: i64) -> i64 {
    const MIB: i64 = 1 << 20;
    let whole = (bytes + 2 * MIB - 1) / (2 * MIB) * (2 * MIB);
    if bytes >= 10 * MIB && whole - bytes <= MIB { whole } else { bytes }
}

/// The largest micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Tokens at most.
    pub tokens: i64,
    /// Sequences at most. A batch of more is taken too, with memory beside the plan.
    pub sequences: i64,
}

/// What a training keeps and where, from much memory and speed to little of both. No number depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryLayout {
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Base weights stay dequantised, ready for products; else they are dequantised for each.
    pub resident_weights: bool,
}

impl MemoryLayout {
    /// Every one, the fastest first.
    pub fn all() -> impl Iterator<Item = Self> {
        Recompute::ALL
            .into_iter()
            .flat_map(|recompute| [true, false].map(|resident_weights| Self { recompute, resident_weights }))
    }
}

impl From<Recompute> for MemoryLayout {
    /// With weights dequantised at each use.
    fn from(recompute: Recompute) -> Self {
        Self { recompute, resident_weights: false }
    }
}

impl fmt::Display for MemoryLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let weights =
            if self.resident_weights { "resident weights" } else { "weights dequantised at each use" };
        write!(f, "recompute {}, {weights}", self.recompute.name())
    }
}

/// Sizes that decide the regions.
#[derive(Debug, Clone)]
pub struct Sizes {
    /// Tokens of the largest micro-batch.
    pub tokens: i64,
    /// Its sequences at most.
    sequences: i64,
    pub(super) config: ModelConfig,
    pub(super) groups: [Group; 4],
    pub(super) layout: MemoryLayout,
}

impl Sizes {
    /// For micro-batches within `limits`.
    pub fn new(config: &ModelConfig, lora: &LoraSpec, limits: Limits, layout: MemoryLayout) -> Self {
        let groups = GroupName::ALL.map(|name| Group::new(name, config, lora));
        let Limits { tokens, sequences } = limits;
        Self { tokens, sequences, config: config.clone(), groups, layout }
    }

    /// Whether our kernels take the model's heads; else attention is libtorch's.
    pub(super) fn attends_by_kernels(&self) -> bool {
        AttentionKernel::takes(self.config.head_dim)
    }

    pub(super) fn attention_shape(&self) -> AttentionShape {
        let ModelConfig { num_attention_heads, num_key_value_heads, head_dim, .. } = self.config;
        AttentionShape { heads: num_attention_heads, kv_heads: num_key_value_heads, head_dim }
    }

    /// Sequences of a micro-batch at most.
    pub(super) fn sequences(&self) -> i64 {
        self.sequences
    }

    /// Columns of attention's output, with those of the adapters that read it.
    pub(super) fn attention_columns(&self) -> i64 {
        let group = self.group(GroupName::O);
        group.input + group.ranks()
    }

    pub(super) fn group(&self, name: GroupName) -> &Group {
        &self.groups[GroupName::ALL.iter().position(|one| *one == name).unwrap_or(0)]
    }

    /// Width of the vocabulary in memory.
    pub fn padded_vocab(&self) -> i64 {
        padded_vocab(self.config.vocab_size)
    }

    fn largest(&self, of: impl Fn(&Group) -> i64) -> i64 {
        self.groups.iter().map(of).max().unwrap_or(0)
    }

    /// Elements of the buffer in which a group's weights are laid out.
    pub(super) fn weight_elements(&self) -> i64 {
        self.largest(|group| (group.output() + group.ranks()) * (group.input + group.ranks()))
    }

    /// Elements of the buffer for a group's input, which also holds a chunk of logits.
    pub(super) fn input_elements(&self) -> i64 {
        let widest = self.largest(|group| group.input + group.ranks());
        (self.tokens * widest).max(LEAST_LOGITS * self.padded_vocab())
    }

    /// Elements of the buffer for a layer's inner gradients, which also holds the head's rows.
    pub(super) fn inner_elements(&self) -> i64 {
        let qkv = self.group(GroupName::Qkv);
        let widest = self.largest(|group| group.input).max(qkv.output() + qkv.ranks());
        self.tokens * widest.max(2 * self.config.hidden_size)
    }

    /// Elements of the buffer for a branch and its gradient.
    pub(super) fn branch_elements(&self) -> i64 {
        self.tokens * self.config.hidden_size.max(self.group(GroupName::O).input)
    }

    /// Columns of the residual stream's gradient: its own, and those of the adapters whose output it is.
    pub(super) fn gradient_columns(&self) -> i64 {
        let spare = self.group(GroupName::O).ranks().max(self.group(GroupName::Down).ranks());
        self.config.hidden_size + spare
    }

    /// Columns of gate and up, with those of their adapters for the gradient.
    pub(super) fn gate_up_columns(&self) -> i64 {
        let group = self.group(GroupName::GateUp);
        group.output() + group.ranks()
    }

    /// Adapter columns of a whole layer.
    pub(super) fn adapter_columns(&self) -> i64 {
        self.groups.iter().map(Group::ranks).sum()
    }

    /// How many layers keep (the stream before them, what attention needs, gate and up).
    pub(super) fn kept_layers(&self) -> [i64; 3] {
        let layers = self.config.num_hidden_layers as i64;
        match self.layout.recompute {
            Recompute::None => [layers, layers, layers],
            Recompute::Mlp => [layers, layers, 1],
            Recompute::Layer => [layers, 1, 1],
            Recompute::LayerOffload | Recompute::LayerOffloadAdapter => [layers.min(SLOTS as i64), 1, 1],
        }
    }

    /// What the passes hold: the kept values of layers and the buffers between them.
    pub fn activations(&self) -> Vec<Region> {
        let [streams, blocks, gates] = self.kept_layers();
        let t = self.tokens;
        let hidden = self.config.hidden_size;
        let qkv = self.group(GroupName::Qkv).output();
        let mut regions = vec![
            Region::new("stream before a layer", t * (hidden * BF16 + F32), streams),
            Region::new("query, key, value", t * qkv * BF16, blocks),
            Region::new("stream between the blocks", t * (hidden * BF16 + F32), blocks),
            Region::new("adapter inputs", t * self.adapter_columns() * BF16, blocks),
            Region::new("gate and up", t * self.gate_up_columns() * BF16, gates),
            Region::new(
                "weights of a product",
                self.weight_elements() * BF16,
                i64::from(!self.layout.resident_weights),
            ),
            Region::new("input of a product, logits", self.input_elements() * BF16, 1),
            Region::new("inner gradients", self.inner_elements() * BF16, 1),
            Region::new("branch", self.branch_elements() * BF16, 1),
            Region::new("stream after the layers", t * (hidden * BF16 + F32), 1),
            Region::new("gradient of the stream", t * self.gradient_columns() * BF16, 1),
            Region::new("cuBLAS", Gemm::WORKSPACE, 1),
        ];
        if self.layout.recompute.offloads_adapter() {
            let layer = self.trainable() / self.config.num_hidden_layers.max(1) as i64;
            regions.push(Region::new("adapters of a layer", layer * BF16, host_adapter::SLOTS as i64));
        }
        regions.extend(self.attention(blocks));
        regions
    }

    /// What attention keeps, in so many layers, and works in.
    fn attention(&self, layers: i64) -> Vec<Region> {
        let (t, heads) = (self.tokens, self.config.num_attention_heads);
        if self.attends_by_kernels() {
            let [sums, lse2, delta, semaphores] =
                AttentionScratch::bytes(self.attention_shape(), t, self.sequences);
            return vec![
                Region::new("attention output", t * self.attention_columns() * BF16, layers),
                Region::new("log-sum-exp", t * heads * F32, layers),
                Region::new("sums of the queries' gradient", sums, 1),
                Region::new("rows of attention, semaphores", lse2 + delta + semaphores, 1),
            ];
        }
        let (qkv, o) = (self.group(GroupName::Qkv).output(), self.group(GroupName::O).input);
        vec![
            Region::new(OF_LIBTORCH[0], t * (o * BF16 + heads * F32), layers),
            // cuDNN's, as measured: gradients, an f32 accumulator of queries, keys' and values' gradients of every head.
            Region::new(OF_LIBTORCH[1], t * (qkv * BF16 + o * F32 + 2 * o * BF16), 1),
        ]
    }

    /// What lies there whatever the batch: weights, adapter, gradients, moments.
    pub fn state(&self, quantization: Quantization, optimizer: Optimizer) -> Vec<Region> {
        let config = &self.config;
        let layers = config.num_hidden_layers as i64;
        let bytes = |linear: i64| match quantization {
            // Half a byte a weight, a byte a block of 64, four a block of 256 scales.
            Quantization::Nf4 => taken(linear / 2) + linear / 64 + linear / 64 / 256 * 4,
            Quantization::None => taken(linear * BF16),
        };
        let sizes = Projection::ALL.iter().map(|one| config.projection_shape(*one).iter().product::<i64>());
        let laid_out =
            |group: &Group| taken((group.output() + group.ranks()) * (group.input + group.ranks()) * BF16);
        let linear_bytes = if self.layout.resident_weights {
            self.groups.iter().map(laid_out).sum()
        } else {
            sizes.map(bytes).sum()
        };
        let tables = if config.tie_word_embeddings { 1 } else { 2 };
        let trainable = self.trainable();
        let moments = match optimizer {
            Optimizer::AdamW => 8 * trainable,
            Optimizer::AdamW8bit => 2 * (trainable + trainable / 256 * 4),
        };
        vec![
            Region::new("base weights of a layer", linear_bytes, layers),
            Region::new("embedding and head", self.padded_vocab() * config.hidden_size * BF16, tables),
            Region::new("norms", config.hidden_size * BF16, 2 * layers + 1),
            Region::new(
                "adapter, f32",
                if self.layout.recompute.offloads_adapter() { 0 } else { trainable * F32 },
                1,
            ),
            Region::new("adapter gradients", trainable * F32, 1),
            Region::new("moments", if self.layout.recompute.offloads() { 0 } else { moments }, 1),
        ]
    }

    /// Parameters of the adapter.
    pub fn trainable(&self) -> i64 {
        let members = self.groups.iter().flat_map(|group| group.members.iter().map(move |one| (group, one)));
        let a_layer: i64 = members.map(|(group, one)| one.rank * (group.input + one.rows)).sum();
        a_layer * self.config.num_hidden_layers as i64
    }
}

/// The multiple of 128 that holds a vocabulary.
pub fn padded_vocab(vocab: i64) -> i64 {
    (vocab + VOCAB_MULTIPLE - 1) / VOCAB_MULTIPLE * VOCAB_MULTIPLE
}

/// All regions of a training.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The largest first.
    pub regions: Vec<Region>,
    /// What lies where.
    pub layout: MemoryLayout,
    /// Bytes of all.
    pub total: i64,
}

impl MemoryPlan {
    /// The plan of these sizes.
    pub fn new(sizes: &Sizes, quantization: Quantization, optimizer: Optimizer) -> Self {
        let mut regions = sizes.state(quantization, optimizer);
        regions.extend(sizes.activations());
        regions.sort_by_key(|region| -region.total());
        let total = regions.iter().map(Region::total).sum();
        Self { regions, layout: sizes.layout, total }
    }

    /// Bytes that are taken before the first step: all but what libtorch's attention takes.
    pub fn before_steps(&self) -> i64 {
        let attention = self.regions.iter().filter(|region| OF_LIBTORCH.contains(&region.name));
        self.total - attention.map(Region::total).sum::<i64>()
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: i64| bytes as f64 / f64::from(1 << 20);
        for region in &self.regions {
            let Region { name, bytes, count } = region;
            writeln!(f, "{name:<40}{:>10.1} MiB  {count:>3} × {:.1}", mib(region.total()), mib(*bytes))?;
        }
        writeln!(f, "{:<40}{:>10.1} MiB", "together", mib(self.total))
    }
}
