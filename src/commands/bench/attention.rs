//! `granite bench attention`: our attention and libtorch's in turn, in one run on one card.
//!
//! Work is counted as 4 · heads · length² · head_dim / 2 a sequence forward, half of the square for the mask, and 2.5 times that
//! backward. Everybody has a turn of some launches in every round, timed by events; what is told is the median of the rounds.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::{attention_page, eager, gpu};
use crate::cli::BenchAttentionArgs;
use crate::kernels::attention::{
    self, Accumulation, AttentionKernel, AttentionPlan, AttentionScratch, AttentionShape, BackwardOperands,
    attention_into,
};
use crate::kernels::fused_attention::{self, AttentionKept, Packing};
use crate::kernels::stopwatch::Stopwatch;
use crate::kernels::{bridge, driver};
use crate::{output, progress, stdout};

/// Lengths of an uneven batch of 8,192 tokens, as peers were measured.
const UNEVEN: [i64; 8] = [4096, 2048, 1024, 512, 256, 128, 96, 32];

/// Launches of a turn: enough that the gaps between turns do not count.
const TURN: usize = 10;

/// Launches of each before anything is timed.
const WARM_UP: usize = 3;

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    /// Name and version of the program.
    pub program: &'static str,
    /// As the driver calls it.
    pub gpu: String,
    pub heads: i64,
    pub kv_heads: i64,
    pub head_dim: i64,
    /// Bytes that an attention which writes its scores out takes for each of them, as measured.
    pub eager_bytes_per_score: f64,
    pub rows: Vec<Row>,
}

/// One batch.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub name: String,
    /// Of the sequences.
    pub lengths: Vec<i64>,
    /// Whether libtorch is given the sequences by their bounds, not as a batch.
    pub packed: bool,
    pub forward: Pass,
    pub backward: Pass,
    /// Bytes that ours takes beside queries, keys, values, output, log-sum-exp and their gradients.
    pub beside_bytes: i64,
    /// Bytes that an attention which writes its scores out would take there.
    pub eager_bytes: f64,
}

/// One pass, by who computed it.
#[derive(Debug, Default, Serialize)]
pub(super) struct Pass {
    pub ms: BTreeMap<&'static str, f64>,
    pub tflop_per_s: BTreeMap<&'static str, f64>,
    /// The best of ours over the best of libtorch's, determinism of libtorch not asked for; `None` where one is missing.
    pub ratio: Option<f64>,
}

/// Who takes part, in the order of columns.
pub(super) const COLUMNS: [Entrant; 8] = [
    Entrant::Ours(AttentionKernel::Hopper, Accumulation::Ordered),
    Entrant::Ours(AttentionKernel::Hopper, Accumulation::Unordered),
    Entrant::Ours(AttentionKernel::Portable, Accumulation::Ordered),
    Entrant::Ours(AttentionKernel::Portable, Accumulation::Unordered),
    Entrant::Cudnn(Accumulation::Unordered),
    Entrant::Cudnn(Accumulation::Ordered),
    Entrant::Flash(Accumulation::Unordered),
    Entrant::Flash(Accumulation::Ordered),
];

/// Somebody who computes attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entrant {
    Ours(AttentionKernel, Accumulation),
    Cudnn(Accumulation),
    Flash(Accumulation),
}

impl Entrant {
    pub(super) fn name(self) -> &'static str {
        use Accumulation::{Ordered, Unordered};
        match self {
            Self::Ours(AttentionKernel::Hopper, Ordered) => "Hopper",
            Self::Ours(AttentionKernel::Hopper, Unordered) => "Hopper, unordered",
            Self::Ours(_, Ordered) => "portable",
            Self::Ours(_, Unordered) => "portable, unordered",
            Self::Cudnn(Unordered) => "cuDNN",
            Self::Cudnn(Ordered) => "cuDNN, ordered",
            Self::Flash(Unordered) => "flash",
            Self::Flash(Ordered) => "flash, ordered",
        }
    }

    /// The forward pass of each is measured once: order concerns the backward pass alone.
    fn has_forward(self) -> bool {
        use Accumulation::{Ordered, Unordered};
        matches!(self, Self::Ours(_, Ordered) | Self::Cudnn(Unordered) | Self::Flash(Unordered))
    }

    /// Whether it is what we train with, and whether it is what libtorch does best when nothing is asked of it.
    fn sides(self) -> [bool; 2] {
        use Accumulation::{Ordered, Unordered};
        let ours = matches!(self, Self::Ours(_, Ordered));
        [ours, matches!(self, Self::Cudnn(Unordered) | Self::Flash(Unordered))]
    }
}

/// Runs the subcommand: a table or JSON on stdout, and the page where one is asked for.
///
/// # Errors
/// When there is no GPU that can be used, our kernels do not take such heads, or the page cannot be written.
pub fn run(args: &BenchAttentionArgs) -> Result<()> {
    let device = gpu()?;
    let shape = AttentionShape {
        heads: args.heads.into(),
        kv_heads: args.kv_heads.into(),
        head_dim: args.head_dim.into(),
    };
    let batches = batches(args)?;
    let bar = progress::bar(batches.len() as u64, "bench", "batches");
    let eager_bytes_per_score = eager::bytes_per_score(shape, device)?;
    let mut rows = Vec::new();
    for batch in batches {
        let name = batch.name.clone();
        let row = measure(batch, shape, args.rounds, device).with_context(|| format!("batch {name}"))?;
        let eager_bytes = eager_bytes_per_score * row.scores(shape);
        rows.push(Row { eager_bytes, ..row });
        bar.inc(1);
    }
    bar.finish_and_clear();
    let figures = Figures {
        program: concat!("granite ", env!("CARGO_PKG_VERSION")),
        gpu: driver::probe()?.gpus.first().map_or_else(String::new, |gpu| gpu.name.clone()),
        heads: shape.heads,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        eager_bytes_per_score,
        rows,
    };
    if let Some(file) = &args.html {
        output::write_file(file, attention_page::page(&figures).as_bytes())?;
        progress::note(format!("wrote `{}`", file.display()));
    }
    if args.json { stdout::json(&figures) } else { stdout::text(&table(&figures)) }
}

/// Sequences of a row of the table.
#[derive(Debug, PartialEq)]
struct BatchOf {
    name: String,
    lengths: Vec<i64>,
    packed: bool,
}

/// For each length a batch, and two packed ones.
fn batches(args: &BenchAttentionArgs) -> Result<Vec<BatchOf>> {
    let tokens = i64::from(args.tokens);
    ensure!(tokens > 0 && args.lengths.iter().all(|length| *length > 0), "lengths and `--tokens` begin at 1");
    let of = |length: i64, packed: bool| {
        let count = (tokens / length).max(1);
        let name = format!("{}{count}×{length}", if packed { "packed " } else { "" });
        BatchOf { name, lengths: vec![length; count as usize], packed }
    };
    let mut batches: Vec<BatchOf> = args.lengths.iter().map(|length| of(i64::from(*length), false)).collect();
    batches.push(of(1024.min(tokens), true));
    batches.push(BatchOf { name: "packed uneven 8192".to_string(), lengths: UNEVEN.to_vec(), packed: true });
    Ok(batches)
}

impl Row {
    /// Scores of all heads, hidden ones too.
    fn scores(&self, shape: AttentionShape) -> f64 {
        let squares: f64 = self.lengths.iter().map(|length| (*length as f64).powi(2)).sum();
        squares * shape.heads as f64
    }
}

/// FLOP of the forward pass.
fn forward_flop(shape: AttentionShape, lengths: &[i64]) -> f64 {
    let squares: f64 = lengths.iter().map(|length| (*length as f64).powi(2)).sum();
    2.0 * (shape.heads * shape.head_dim) as f64 * squares
}

/// Operands of a batch.
struct Operands {
    qkv: [Tensor; 3],
    d_o: Tensor,
    o: Tensor,
    lse: Tensor,
    gradients: [Tensor; 3],
    scale: f64,
}

impl Operands {
    fn new(shape: AttentionShape, tokens: i64, device: Device) -> Result<Self> {
        let AttentionShape { heads, kv_heads, head_dim } = shape;
        let random = |heads: i64| Tensor::f_randn([tokens, heads, head_dim], (Kind::BFloat16, device));
        let qkv = [random(heads)?, random(kv_heads)?, random(kv_heads)?];
        let gradients = [qkv[0].f_empty_like()?, qkv[1].f_empty_like()?, qkv[2].f_empty_like()?];
        Ok(Self {
            d_o: random(heads)?,
            o: qkv[0].f_empty_like()?,
            lse: Tensor::f_empty([heads, tokens], (Kind::Float, device))?,
            scale: 1.0 / (head_dim as f64).sqrt(),
            gradients,
            qkv,
        })
    }
}

/// One that is ready to run on the operands.
enum Ready {
    Ours(AttentionPlan),
    Libtorch(Packing, Box<AttentionKept>),
}

/// Makes somebody ready; `None` who cannot take part.
fn ready(
    entrant: Entrant,
    batch: &BatchOf,
    operands: &Operands,
    shape: AttentionShape,
) -> Result<Option<Ready>> {
    let bounds = bounds(&batch.lengths);
    let device = operands.o.device();
    let [q, k, v] = operands.qkv.each_ref();
    let libtorch = |packing: Packing| {
        let kept = fused_attention::attention(q, k, v, &packing, operands.scale);
        // What libtorch refuses here is no failure of ours.
        kept.inspect_err(|error| progress::note(format!("{} is left out: {error:#}", entrant.name())))
            .ok()
            .map(|kept| Ready::Libtorch(packing, Box::new(kept)))
    };
    Ok(match entrant {
        Entrant::Ours(kernel, _) => {
            let there = AttentionKernel::ours(device, shape.head_dim)?.contains(&kernel);
            there.then(|| AttentionPlan::with(kernel, &bounds, shape, device)).transpose()?.map(Ready::Ours)
        }
        Entrant::Cudnn(_) if batch.packed => None,
        Entrant::Cudnn(_) => libtorch(Packing::new(&bounds, device)?),
        Entrant::Flash(_) => libtorch(Packing::new(&bounds, device)?.for_flash()),
    })
}

fn bounds(lengths: &[i64]) -> Vec<i64> {
    let mut at = 0;
    let ends = lengths.iter().map(|length| {
        at += length;
        at
    });
    std::iter::once(0).chain(ends).collect()
}

fn forward(ready: &Ready, operands: &Operands) -> Result<()> {
    let Operands { qkv, o, lse, scale, .. } = operands;
    match ready {
        Ready::Ours(plan) => attention_into(qkv.each_ref(), plan, *scale, o, lse),
        Ready::Libtorch(packing, _) => {
            let [q, k, v] = qkv;
            fused_attention::attention(q, k, v, packing, *scale).map(drop)
        }
    }
}

fn backward(entrant: Entrant, ready: &Ready, operands: &Operands, scratch: &AttentionScratch) -> Result<()> {
    let Operands { qkv, d_o, o, lse, gradients, scale } = operands;
    let (Entrant::Ours(_, accumulation) | Entrant::Cudnn(accumulation) | Entrant::Flash(accumulation)) =
        entrant;
    match ready {
        Ready::Ours(plan) => {
            let (qkv, gradients) = (qkv.each_ref(), gradients.each_ref());
            let operands = BackwardOperands { d_o, qkv, o, lse, gradients };
            attention::backward(operands, plan, *scale, scratch, accumulation)
        }
        Ready::Libtorch(packing, kept) => {
            fused_attention::backward(d_o, qkv.each_ref(), kept, packing, *scale, accumulation).map(drop)
        }
    }
}

fn measure(batch: BatchOf, shape: AttentionShape, rounds: usize, device: Device) -> Result<Row> {
    let tokens = batch.lengths.iter().sum();
    let operands = Operands::new(shape, tokens, device)?;
    let before = bridge::memory(device)?.allocated;
    bridge::reset_peak(device)?;
    let scratch = AttentionScratch::new(shape, tokens, batch.lengths.len() as i64, device)?;
    let mut entrants = Vec::new();
    let mut beside_bytes = 0;
    for entrant in COLUMNS {
        let Some(ready) = ready(entrant, &batch, &operands, shape)? else { continue };
        if matches!(ready, Ready::Ours(_)) && entrant.has_forward() {
            // Of what was taken so far only ours is not an operand.
            forward(&ready, &operands)?;
            backward(entrant, &ready, &operands, &scratch)?;
            beside_bytes = bridge::memory(device)?.allocated_peak - before;
        }
        entrants.push((entrant, ready));
    }
    let [first, second] = [0, 1].map(|pass| {
        let run = |entrant: Entrant, ready: &Ready| match pass {
            0 => forward(ready, &operands),
            _ => backward(entrant, ready, &operands, &scratch),
        };
        let takes_part = |entrant: Entrant| pass == 1 || entrant.has_forward();
        let factor = if pass == 0 { 1.0 } else { 2.5 };
        time(&entrants, takes_part, run, rounds)
            .map(|seconds| Pass::new(&seconds, factor * forward_flop(shape, &batch.lengths)))
    });
    Ok(Row {
        forward: first?,
        backward: second?,
        beside_bytes,
        eager_bytes: f64::NAN,
        name: batch.name,
        lengths: batch.lengths,
        packed: batch.packed,
    })
}

/// Median seconds of a launch of each who takes part, all in turn.
fn time(
    entrants: &[(Entrant, Ready)],
    takes_part: impl Fn(Entrant) -> bool,
    run: impl Fn(Entrant, &Ready) -> Result<()>,
    rounds: usize,
) -> Result<BTreeMap<&'static str, f64>> {
    let mut present: Vec<&(Entrant, Ready)> = Vec::new();
    for pair in entrants.iter().filter(|(entrant, _)| takes_part(*entrant)) {
        let (entrant, ready) = pair;
        match ((0..WARM_UP).try_for_each(|_| run(*entrant, ready)), ready) {
            (Ok(()), _) => present.push(pair),
            (Err(error), Ready::Libtorch(..)) => {
                progress::note(format!("{} is left out: {error:#}", entrant.name()));
            }
            (Err(error), Ready::Ours(_)) => return Err(error.context(entrant.name())),
        }
    }
    let clock = Stopwatch::default();
    let mut samples: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
    for _ in 0..rounds.max(1) {
        clock.start()?;
        for (entrant, ready) in &present {
            (0..TURN).try_for_each(|_| run(*entrant, ready))?;
            clock.mark(entrant.name())?;
        }
        for (name, seconds) in clock.stop()? {
            samples.entry(name).or_default().push(seconds / TURN as f64);
        }
    }
    Ok(samples.into_iter().map(|(name, seconds)| (name, median(seconds))).collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Pass {
    pub(super) fn new(seconds: &BTreeMap<&'static str, f64>, flop: f64) -> Self {
        let tflop_per_s: BTreeMap<&'static str, f64> =
            seconds.iter().map(|(name, seconds)| (*name, flop / seconds / 1e12)).collect();
        let best = |side: usize| {
            let of_side = COLUMNS.iter().filter(|entrant| entrant.sides()[side]);
            of_side.filter_map(|entrant| tflop_per_s.get(entrant.name()).copied()).reduce(f64::max)
        };
        let ratio = best(0).zip(best(1)).map(|(ours, theirs)| ours / theirs);
        let ms = seconds.iter().map(|(name, seconds)| (*name, seconds * 1e3)).collect();
        Self { ms, tflop_per_s, ratio }
    }
}

/// Who was there in at least one row of a pass.
pub(super) fn present(figures: &Figures, pass: PassOf) -> Vec<&'static str> {
    let there = |name: &&str| figures.rows.iter().any(|row| pass(row).ms.contains_key(name));
    COLUMNS.iter().map(|entrant| entrant.name()).filter(there).collect()
}

/// Finds a pass in a row.
pub(super) type PassOf = fn(&Row) -> &Pass;

/// The two passes with their names.
pub(super) const PASSES: [(&str, PassOf); 2] =
    [("forward", |row| &row.forward), ("backward", |row| &row.backward)];

fn table(figures: &Figures) -> String {
    let Figures { gpu, heads, kv_heads, head_dim, .. } = figures;
    let mut text = format!(
        "{gpu}: causal attention, bf16, {heads} query and {kv_heads} key heads of {head_dim}, TFLOP/s\n"
    );
    // Writing to a string cannot fail.
    for (name, pass) in PASSES {
        let columns = present(figures, pass);
        let _ = write!(text, "\n{name:<20}");
        for column in &columns {
            let _ = write!(text, "{column:>21}");
        }
        let _ = writeln!(text, "{:>21}", "ours over libtorch");
        for row in &figures.rows {
            let _ = write!(text, "{:<20}", row.name);
            for column in &columns {
                let _ = write!(text, "{:>21}", number(pass(row).tflop_per_s.get(column), 0));
            }
            let _ = writeln!(text, "{:>21}", number(pass(row).ratio.as_ref(), 2));
        }
    }
    let _ = writeln!(
        text,
        "\nmemory beside operands and gradients, MiB, and of what eager attention takes ({:.1} bytes a score)",
        figures.eager_bytes_per_score
    );
    for row in &figures.rows {
        let (mib, share) = beside(row);
        let _ = writeln!(text, "{:<20}{mib:>21.1}{share:>19.2} %", row.name);
    }
    text
}

/// MiB beside the operands, and per cent of what eager attention takes.
pub(super) fn beside(row: &Row) -> (f64, f64) {
    let mib = row.beside_bytes as f64 / f64::from(1 << 20);
    (mib, 100.0 * row.beside_bytes as f64 / row.eager_bytes)
}

pub(super) fn number(value: Option<&f64>, places: usize) -> String {
    value.map_or_else(|| "–".to_string(), |value| format!("{value:.places$}"))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail loudly")]
pub(super) mod tests {
    use super::*;

    fn row(name: &str, lengths: &[i64], packed: bool, seconds: &[(&'static str, f64)]) -> Row {
        let shape = AttentionShape { heads: 32, kv_heads: 8, head_dim: 128 };
        let seconds: BTreeMap<&'static str, f64> = seconds.iter().copied().collect();
        let flop = forward_flop(shape, lengths);
        Row {
            name: name.to_string(),
            lengths: lengths.to_vec(),
            packed,
            forward: Pass::new(&seconds, flop),
            backward: Pass::new(&seconds, 2.5 * flop),
            beside_bytes: 3 << 20,
            eager_bytes: f64::from(300 << 20),
        }
    }

    /// Numbers made up: of a GPU that does not exist.
    pub(in crate::commands::bench) fn made_up() -> Figures {
        let all = [
            ("Hopper", 1e-3),
            ("portable", 2e-3),
            ("cuDNN", 1.25e-3),
            ("flash", 2e-3),
            ("flash, ordered", 3e-3),
        ];
        let rows = vec![
            row("4×2048", &[2048; 4], false, &all),
            row("1×8192", &[8192], false, &all),
            row("packed uneven 8192", &UNEVEN, true, &[("Hopper", 1e-3), ("flash", 1e-3)]),
        ];
        Figures {
            program: "granite",
            gpu: "Imaginary & Sons 1".to_string(),
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            eager_bytes_per_score: 16.0,
            rows,
        }
    }

    #[test]
    fn work_is_counted_as_peers_count_it() {
        let shape = AttentionShape { heads: 32, kv_heads: 8, head_dim: 128 };
        assert_eq!(forward_flop(shape, &[1024; 8]), 4.0 * 8.0 * 32.0 * 1024.0 * 1024.0 * 128.0 / 2.0);
        assert_eq!(UNEVEN.iter().sum::<i64>(), 8192);
    }

    #[test]
    fn ours_is_held_against_the_best_of_libtorch() {
        let figures = made_up();
        let ratios: Vec<f64> = figures.rows.iter().map(|row| row.forward.ratio.unwrap()).collect();
        assert_eq!(ratios, [1.25, 1.25, 1.0]);
        assert_eq!(Pass::new(&BTreeMap::from([("Hopper", 1.0)]), 1.0).ratio, None);
        // Neither what adds as it comes nor what libtorch does in order counts.
        let seconds = BTreeMap::from([
            ("Hopper, unordered", 0.1),
            ("Hopper", 1.0),
            ("cuDNN", 2.0),
            ("flash, ordered", 0.1),
        ]);
        assert_eq!(Pass::new(&seconds, 1.0).ratio, Some(2.0));
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
    }

    #[test]
    fn the_table_has_a_line_a_batch_and_pass() {
        let text = table(&made_up());
        assert!(
            text.starts_with("Imaginary & Sons 1: causal attention, bf16, 32 query and 8 key heads of 128"),
            "{text}"
        );
        let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("packed uneven 8192")).collect();
        let words: Vec<Vec<&str>> = lines.iter().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(words[0][3..], ["183", "–", "–", "183", "–", "1.00"], "{text}");
        assert_eq!(words[2][3..], ["3.0", "1.00", "%"], "{text}");
        assert_eq!(lines.len(), 3);
    }

    #[test]
    fn a_batch_for_every_length_and_two_packed() {
        let args = BenchAttentionArgs {
            lengths: vec![1024, 16_384],
            tokens: 8192,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            rounds: 1,
            html: None,
            json: false,
        };
        let names: Vec<String> = batches(&args).unwrap().into_iter().map(|batch| batch.name).collect();
        assert_eq!(names, ["8×1024", "1×16384", "packed 8×1024", "packed uneven 8192"]);
        assert!(batches(&BenchAttentionArgs { lengths: vec![0], ..args }).is_err());
    }
}
