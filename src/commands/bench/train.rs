//! `granite bench train`: training steps with random weights in a model's shape.
//!
//! As peers are measured: every token supervised, no dropout unless asked for, one optimiser step a micro-batch, clipping
//! included. The time of a step is the GPU's, from an empty queue to an empty queue.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use tch::{Cuda, Device};

use crate::cli::BenchTrainArgs;
use crate::data::store::{Dataset, PackedRow, Split};
use crate::kernels::bridge;
use crate::kernels::device::{self, DeviceChoice};
use crate::kernels::gpu::Gpu;
use crate::model::batch::{Batch, Sequence};
use crate::model::config::ModelConfig;
use crate::model::decoder::{Decoder, GradOptions, LoadOptions};
use crate::model::fused::plan::{Limits, MemoryLayout, MemoryPlan, Sizes};
use crate::model::random::RandomWeights;
use crate::progress;
use crate::recipe::{LoraSpec, Optimizer, Quantization, TrainSpec};
use crate::stdout;
use crate::train::optimizer::AdamW;

/// What a dense bf16 product can do at most on an H100 SXM, TFLOP/s; shares are told against it.
const H100_DENSE_BF16: f64 = 989.4;

/// What was measured.
#[derive(Debug, Serialize)]
struct Figures {
    rows: usize,
    length: usize,
    rank: usize,
    dropout: f64,
    recompute: crate::recipe::Recompute,
    resident_weights: bool,
    /// Median milliseconds of a step, and each step's.
    step_ms: f64,
    steps_ms: Vec<f64>,
    tokens_per_second: f64,
    /// Work of base, adapters and attention that must be done, over [`H100_DENSE_BF16`].
    mfu: f64,
    /// Losses of the first and the last step.
    losses: [f64; 2],
    /// GiB before the first step: weights, adapter, buffers; planned, and in tensors.
    before_gib: [f64; 2],
    /// GiB by the plan, in tensors at most, taken from the driver at most, and used of the GPU in all.
    planned_gib: f64,
    peak_gib: f64,
    reserved_gib: f64,
    used_gib: f64,
    /// Milliseconds of a step by part, measured in steps of their own.
    parts_ms: BTreeMap<String, f64>,
}

/// Runs the subcommand.
///
/// # Errors
/// When there is no GPU, or the memory does not suffice.
pub fn run(args: &BenchTrainArgs) -> Result<()> {
    let device = device::open(DeviceChoice::Cuda)?;
    let config = config(args)?;
    let lora = LoraSpec { rank: args.rank, alpha: 128.0, dropout: args.dropout, ..LoraSpec::default() };
    let batches = batches(&config, args, device)?;
    let limits = limits(args, &batches);
    let sizes = Sizes::new(&config, &lora, limits, layout(args));
    let plan = MemoryPlan::new(&sizes, Quantization::Nf4, Optimizer::AdamW8bit);
    progress::note(plan.to_string().trim_end());
    bridge::reset_peak(device)?;
    let mut bench = Bench::new(&config, &lora, args, batches, device)?;
    let figures = bench.measure(args, &config, &lora, &plan, device)?;
    let text = if args.json { serde_json::to_string(&figures)? } else { told(&figures) };
    stdout::text(&text)
}

/// Granite-3.1-8B, or what `--config` says.
fn config(args: &BenchTrainArgs) -> Result<ModelConfig> {
    let Some(path) = &args.config else { return ModelConfig::granite_8b() };
    let read = || format!("cannot read `{}`", path.display());
    let text = std::fs::read_to_string(path).with_context(read)?;
    ModelConfig::from_hugging_face(&serde_json::from_str(&text).with_context(read)?, path)
}

struct Bench {
    decoder: Decoder,
    optimizer: AdamW,
    gradients: crate::model::params::ParamSet,
    /// Taken in turn.
    batches: Vec<Batch>,
    step: u64,
}

impl Bench {
    fn new(
        config: &ModelConfig,
        lora: &LoraSpec,
        args: &BenchTrainArgs,
        batches: Vec<Batch>,
        device: Device,
    ) -> Result<Self> {
        tch::manual_seed(3);
        let source = RandomWeights::new(config, device);
        let load = LoadOptions::new(Quantization::Nf4, device);
        let mut decoder = Decoder::load(&source, config, &load)?;
        decoder.attach_lora(lora, 3)?;
        decoder.prepare(limits(args, &batches), layout(args))?;
        let adapters = decoder.adapters().context("the decoder took no adapter")?;
        let spec = TrainSpec { max_grad_norm: 1.0, ..TrainSpec::default() };
        let optimizer = if args.recompute.offloads() {
            AdamW::with_moments_on_host(adapters, &spec, device)?
        } else {
            AdamW::new(adapters, &spec)
        };
        Ok(Self { optimizer, gradients: adapters.zeros_on(decoder.device()), batches, decoder, step: 0 })
    }

    /// One optimiser step; its loss.
    fn step(&mut self) -> Result<f64> {
        let batch = &self.batches[self.step as usize % self.batches.len()];
        let supervised = batch.supervised as f64;
        let _ = self.gradients.flat().shallow_clone().zero_();
        let options = GradOptions { scale: 1.0 / supervised, seed: 3, microbatch: self.step, noise: 0.0 };
        let loss = self.decoder.loss_and_grad(batch, &options, &mut self.gradients)?.sum() / supervised;
        self.mark("losses to the host")?;
        let adapters = self.decoder.adapters().context("the decoder took no adapter")?;
        self.step += 1;
        self.optimizer.step(adapters, &self.gradients, 2e-4, self.step)?;
        self.decoder.adapters_stepped()?;
        self.mark("optimiser")?;
        Ok(loss)
    }

    fn mark(&self, part: &'static str) -> Result<()> {
        self.decoder.fused().map_or(Ok(()), |fused| fused.clock.mark(part))
    }

    fn measure(
        &mut self,
        args: &BenchTrainArgs,
        config: &ModelConfig,
        lora: &LoraSpec,
        plan: &MemoryPlan,
        device: Device,
    ) -> Result<Figures> {
        let mut losses = Vec::new();
        let (mut times, mut timed_tokens) = (Vec::new(), 0);
        let before = bridge::memory(device)?.allocated;
        let bar = progress::bar((args.steps + 2) as u64, "bench", "steps");
        for step in 0..args.steps + 2 {
            Cuda::synchronize(0);
            let begun = Instant::now();
            let tokens = self.batches[self.step as usize % self.batches.len()].tokens();
            losses.push(self.step()?);
            Cuda::synchronize(0);
            // The first two compile nothing, but cuBLAS and cuDNN choose and load their kernels.
            if step >= 2 {
                times.push(begun.elapsed().as_secs_f64() * 1e3);
                timed_tokens += tokens;
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        ensure!(losses.iter().all(|loss| loss.is_finite()), "a loss is not finite: {losses:?}");
        let memory = bridge::memory(device)?;
        let (free, total) = Gpu::at(0)?.memory()?;
        let mut sorted = times.clone();
        sorted.sort_by(f64::total_cmp);
        let step_ms = sorted[sorted.len() / 2];
        // All rows are equally long, unless they are a dataset's.
        let mean = timed_tokens as f64 / times.iter().sum::<f64>() * 1e3;
        let even = (args.rows * args.length) as f64 / step_ms * 1e3;
        let gib = |bytes: i64| bytes as f64 / f64::from(1 << 30);
        let flops = needed_flops(config, lora, args);
        Ok(Figures {
            rows: args.rows,
            length: args.length,
            rank: args.rank,
            dropout: args.dropout,
            recompute: args.recompute,
            resident_weights: args.resident,
            step_ms,
            steps_ms: times,
            tokens_per_second: if args.dataset.is_some() { mean } else { even },
            mfu: flops / (step_ms * 1e-3) / (H100_DENSE_BF16 * 1e12),
            losses: [losses[0], losses[losses.len() - 1]],
            before_gib: [gib(plan.before_steps()), gib(before)],
            planned_gib: gib(plan.total),
            peak_gib: gib(memory.allocated_peak),
            reserved_gib: gib(memory.reserved_peak),
            used_gib: gib((total - free) as i64),
            parts_ms: self.parts()?,
        })
    }

    /// Milliseconds by part, over three steps.
    fn parts(&mut self) -> Result<BTreeMap<String, f64>> {
        const STEPS: usize = 3;
        let clock =
            |bench: &Self| -> Result<()> { bench.decoder.fused().map_or(Ok(()), |it| it.clock.start()) };
        clock(self)?;
        for _ in 0..STEPS {
            self.step()?;
        }
        let parts = self.decoder.fused().map(|fused| fused.clock.stop()).transpose()?.unwrap_or_default();
        Ok(parts
            .into_iter()
            .map(|(name, seconds)| (name.to_string(), seconds * 1e3 / STEPS as f64))
            .collect())
    }
}

fn layout(args: &BenchTrainArgs) -> MemoryLayout {
    MemoryLayout { recompute: args.recompute, resident_weights: args.resident }
}

/// As many tokens as are asked for, and as many sequences as there are.
fn limits(args: &BenchTrainArgs, batches: &[Batch]) -> Limits {
    let sequences = batches.iter().map(|batch| batch.sources.len()).max().unwrap_or(0) as i64;
    Limits { tokens: (args.rows * args.length) as i64, sequences }
}

/// Micro-batches of a dataset's rows, or one of random ids.
fn batches(config: &ModelConfig, args: &BenchTrainArgs, device: Device) -> Result<Vec<Batch>> {
    let Some(folder) = &args.dataset else { return Ok(vec![random_batch(config, args, device)]) };
    let rows = Dataset::open(folder)?.rows(Split::Train)?;
    let longest = rows.iter().map(PackedRow::tokens).max().unwrap_or(0);
    ensure!(
        !rows.is_empty() && longest <= args.length,
        "dataset `{}` has {} rows of at most {longest} tokens, `--length` is {}",
        folder.display(),
        rows.len(),
        args.length
    );
    let microbatch = |rows: &[PackedRow]| Batch::pack(rows.iter().flat_map(|row| &row.sequences), device);
    // As many as are timed, spread over the dataset.
    let apart = (rows.len() / args.rows / (args.steps + 2)).max(1);
    Ok(rows.chunks_exact(args.rows).step_by(apart).map(microbatch).collect())
}

/// Random ids, all supervised: but for each sequence's last position, which has nothing to predict.
fn random_batch(config: &ModelConfig, args: &BenchTrainArgs, device: Device) -> Batch {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        ((state >> 33) % config.vocab_size as u64) as u32
    };
    let lengths: Vec<usize> = if args.uneven {
        (0..args.rows).flat_map(|_| uneven(args.length)).collect()
    } else {
        vec![args.length; args.rows]
    };
    let sequences: Vec<Sequence> = lengths
        .into_iter()
        .map(|length| Sequence {
            input_ids: (0..length).map(|_| next()).collect(),
            loss_mask: vec![true; length],
            source: 0,
        })
        .collect();
    Batch::pack(&sequences, device)
}

/// A row of halves: 1/2, 1/4, … of the row, down to 32 tokens.
fn uneven(length: usize) -> Vec<usize> {
    let mut left = length;
    let mut lengths = Vec::new();
    while left > 64 {
        lengths.push(left / 2);
        left -= left / 2;
    }
    lengths.push(left);
    lengths
}

/// FLOP that a step needs: base products and head forward and for the input's gradient, adapters in full, causal attention.
fn needed_flops(config: &ModelConfig, lora: &LoraSpec, args: &BenchTrainArgs) -> f64 {
    let tokens = (args.rows * args.length) as f64;
    let layers = config.num_hidden_layers as f64;
    let linear: f64 = crate::recipe::Projection::ALL
        .iter()
        .map(|one| config.projection_shape(*one).iter().product::<i64>() as f64)
        .sum::<f64>()
        * layers
        + (config.vocab_size * config.hidden_size) as f64;
    let adapters =
        Sizes::new(config, lora, Limits { tokens: 1, sequences: 1 }, layout(args)).trainable() as f64;
    let attention =
        3.5 * 2.0 * (config.num_attention_heads * config.head_dim) as f64 * args.length as f64 * layers;
    tokens * (4.0 * linear + 6.0 * adapters + attention)
}

fn told(figures: &Figures) -> String {
    let Figures { step_ms, tokens_per_second, mfu, planned_gib, peak_gib, reserved_gib, used_gib, .. } =
        figures;
    let mut text = format!(
        "{} × {} tokens, rank {}, dropout {}, {}\n\
         step         {step_ms:.1} ms, {tokens_per_second:.0} tokens/s, {:.1} % of an H100's bf16 peak\n\
         memory       planned {planned_gib:.2} GiB, tensors {peak_gib:.2}, reserved {reserved_gib:.2}, GPU {used_gib:.2}\n\
         before       planned {:.3} GiB, tensors {:.3}\n\
         loss         {:.4} → {:.4}\n",
        figures.rows,
        figures.length,
        figures.rank,
        figures.dropout,
        MemoryLayout { recompute: figures.recompute, resident_weights: figures.resident_weights },
        mfu * 100.0,
        figures.before_gib[0],
        figures.before_gib[1],
        figures.losses[0],
        figures.losses[1]
    );
    let mut parts: Vec<(&String, &f64)> = figures.parts_ms.iter().collect();
    parts.sort_by(|a, b| b.1.total_cmp(a.1));
    for (name, milliseconds) in parts {
        text.push_str(&format!("{name:<20}{milliseconds:>8.1} ms\n"));
    }
    text.trim_end().to_string()
}
