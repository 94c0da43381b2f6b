//! The command line: clap types and help texts only.

use std::num::NonZero;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};

use crate::kernels::device::DeviceChoice;
use crate::recipe::{Override, Recompute};

/// From dataset dumps to an answering service: prepare, train, merge, eval, serve.
#[derive(Debug, Parser)]
#[command(name = "granite", version, propagate_version = true)]
pub struct Cli {
    /// No progress and no notes on stderr; errors stay.
    #[arg(long, short, global = true)]
    pub quiet: bool,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Join the sources of a recipe into packed, tokenised rows.
    Prepare(PrepareArgs),
    /// Fine-tune the base model of a recipe with LoRA.
    Train(TrainArgs),
    /// Join an adapter and its base model into one Hugging Face folder.
    Merge(MergeArgs),
    /// Measure a run: loss and perplexity per source, task scores.
    Eval(EvalArgs),
    /// Answer queries over HTTP, with retrieved documents.
    Serve(ServeArgs),
    /// Say what this machine has and what is wrong with it.
    Doctor(DoctorArgs),
    /// Measure how fast this machine's GPU is at what training is made of.
    Bench(BenchArgs),
    /// Tell what was trained: list runs, show one, compare some.
    Runs(RunsArgs),
    /// Run Python that a model wrote: `granite eval` starts this for each program.
    #[command(name = "confined-python", hide = true)]
    ConfinedPython(ConfinedPythonArgs),
}

/// The recipe and what is laid over it.
#[derive(Debug, Args)]
pub struct RecipeArgs {
    /// The recipe, a TOML file.
    #[arg(long, short, value_name = "FILE")]
    pub recipe: PathBuf,

    /// Lay a value over the recipe's: `--set train.lr=1e-4`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<Override>,
}

/// `granite prepare`
#[derive(Debug, Args)]
pub struct PrepareArgs {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArgs,

    /// Where to write the dataset, in place of the recipe's `data.dataset`.
    #[arg(long, value_name = "FOLDER")]
    pub out: Option<PathBuf>,

    /// Print so many examples with the supervised part marked, and write nothing.
    #[arg(long, value_name = "N", conflicts_with = "json")]
    pub show: Option<usize>,

    /// Tolerate so many bad records of each source: they are left out and listed.
    #[arg(long, value_name = "N")]
    pub skip_bad: Option<usize>,

    /// Keep duplicates; near ones then lie in one split. They are reported all the same.
    #[arg(long)]
    pub keep_duplicates: bool,

    /// Keep what an evaluation set of `data.contamination.against` holds. It is reported all the same.
    #[arg(long)]
    pub keep_contaminated: bool,

    /// Say where a token of the prepared dataset came from, both counted from 0, and prepare nothing.
    #[arg(long, value_name = "ROW:TOKEN", conflicts_with_all = ["show", "timings"])]
    pub trace: Option<TokenPlace>,

    /// The split of `--trace`.
    #[arg(long, value_enum, default_value_t = SplitChoice::Train, requires = "trace")]
    pub split: SplitChoice,

    /// Print the summary as JSON.
    #[arg(long)]
    pub json: bool,

    /// Tell the seconds of each stage, and encode the same texts once more with nothing around it to compare.
    #[arg(long)]
    pub timings: bool,
}

/// A token of a packed row, both counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenPlace {
    /// The row.
    pub row: usize,
    /// The token.
    pub token: usize,
}

impl FromStr for TokenPlace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let place = text.split_once(':').and_then(|(row, token)| {
            Some(Self { row: row.trim().parse().ok()?, token: token.trim().parse().ok()? })
        });
        place.ok_or_else(|| format!("`{text}` is not `ROW:TOKEN`, such as `12:300`"))
    }
}

/// A part of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum SplitChoice {
    /// What is trained on.
    Train,
    /// What is held out.
    Validation,
}

/// `granite train`
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArgs,

    /// Print the plan and stop.
    #[arg(long)]
    pub dry_run: bool,

    /// Continue from the run's newest checkpoint.
    #[arg(long)]
    pub resume: bool,

    /// Write a checkpoint after this step and end there, to be resumed later.
    #[arg(long, value_name = "STEP", value_parser = clap::value_parser!(u64).range(1..))]
    pub stop_after: Option<u64>,

    /// Where the run's files go, in place of `checkpoints/runs/<name>`.
    #[arg(long, value_name = "FOLDER")]
    pub out: Option<PathBuf>,

    /// Compute on this device: `cpu`, `cuda` or `auto`.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,

    /// Stay within so much GPU memory, in place of all that is free.
    #[arg(long, value_name = "GIB", value_parser = gibibytes)]
    pub gpu_memory: Option<f64>,

    /// Print the summary as JSON.
    #[arg(long)]
    pub json: bool,
}

/// What a merged weight starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum MergeBase {
    /// The dequantised 4-bit weights: what the adapter was trained on.
    Dequantized,
    /// The original 16-bit weights: adds the quantisation error to what was trained.
    Original,
}

/// How merged weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum MergeDtype {
    /// 32 bits: nothing is rounded.
    Fp32,
    /// 16 bits with the range of 32.
    Bf16,
    /// 16 bits up to 65504.
    Fp16,
    /// Projections in 4 bits as bitsandbytes stores them, the rest in bf16.
    Nf4,
}

/// `granite merge`
#[derive(Debug, Args)]
pub struct MergeArgs {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArgs,

    /// The adapter folder (PEFT files), in place of the run's newest checkpoint.
    #[arg(long, value_name = "FOLDER")]
    pub adapter: Option<PathBuf>,

    /// What a merged weight starts from.
    #[arg(long, value_enum, default_value_t = MergeBase::Dequantized)]
    pub base: MergeBase,

    /// Accept a base model that the adapter was not trained on.
    #[arg(long)]
    pub any_base: bool,

    /// How to store the merged weights; several, with commas, are written side by side: `merged`, `merged-nf4`.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "bf16")]
    pub dtype: Vec<MergeDtype>,

    /// Held-out rows to compare the forms on; 0 measures nothing.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub rows: usize,

    /// Fail, and merge nothing, when a form's mean KL divergence from base and adapter is beyond so many nats a token.
    #[arg(long, value_name = "NATS")]
    pub max_kl: Option<f64>,

    /// Fail, and merge nothing, when a form's most likely word is another for more than this share of tokens.
    #[arg(long, value_name = "SHARE")]
    pub max_flips: Option<f64>,

    /// Where to write, in place of `checkpoints/runs/<name>/merged`.
    #[arg(long, value_name = "FOLDER")]
    pub out: Option<PathBuf>,

    /// Compute on this device: `cpu`, `cuda` or `auto`.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,

    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,
}

/// `granite eval`
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArgs,

    /// What to measure: `base`, `adapter`, `merged`, or a folder; several are put side by side. Without this and `--answers`: `adapter`.
    #[arg(long, value_name = "WHAT")]
    pub model: Vec<String>,

    /// Judge answers that are written already, by any system: `<task>.jsonl` in this folder, each line with `id` and `answer`.
    #[arg(long, value_name = "FOLDER")]
    pub answers: Vec<PathBuf>,

    /// Ask at most so many questions of a task.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,

    /// Answer so many questions at once; 16 on the CPU and 64 on a GPU when not given, fewer where memory is short.
    #[arg(long, value_name = "N")]
    pub batch: Option<NonZero<usize>>,

    /// Where the report goes, in place of `checkpoints/runs/<name>/eval-<models>`; what is there is gone on with.
    #[arg(long, value_name = "FOLDER")]
    pub out: Option<PathBuf>,

    /// Compute on this device: `cpu`, `cuda` or `auto`.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,

    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,
}

/// `granite serve`
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArgs,

    /// What answers: `base`, `adapter`, `merged`, or a folder; the merged model when there is one, else the adapter.
    #[arg(long, value_name = "WHAT")]
    pub model: Option<String>,

    /// Address to listen on; anything but loopback needs a key.
    #[arg(long)]
    pub host: Option<String>,

    /// Port to listen on; 0 takes a free one and prints it.
    #[arg(long)]
    pub port: Option<u16>,

    /// The key that requests must carry.
    #[arg(long, env = "GRANITE_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,

    /// The folder of documents, in place of the recipe's.
    #[arg(long, value_name = "FOLDER")]
    pub documents: Option<PathBuf>,

    /// Compute on this device: `cpu`, `cuda` or `auto`.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,
}

/// `granite doctor`
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Check each kernel against its twin on the GPU.
    #[arg(long)]
    pub kernels: bool,

    /// With `--kernels`: only the checks whose names begin so; may be given several times.
    #[arg(long, value_name = "NAME", requires = "kernels")]
    pub only: Vec<String>,

    /// With `--kernels`: fewer and smaller cases and no timing, for runs under a memory checker.
    #[arg(long, requires = "kernels")]
    pub short: bool,

    /// The folder of bitsandbytes' libraries, when they lie neither beside the program nor beside libtorch.
    #[arg(long, value_name = "FOLDER", env = "GRANITE_BITSANDBYTES", hide_env_values = true)]
    pub bitsandbytes: Option<PathBuf>,

    /// Print the findings as JSON.
    #[arg(long)]
    pub json: bool,
}

/// `granite confined-python`
#[derive(Debug, Args)]
pub struct ConfinedPythonArgs {
    /// What is left to the program, as JSON.
    pub confinement: String,
}

/// `granite bench`
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub command: BenchCommand,
}

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Each kernel's memory traffic beside what the GPU can do at most.
    Kernels(BenchKernelsArgs),
    /// Our attention and libtorch's in turn, forward and backward.
    Attention(BenchAttentionArgs),
    /// Training steps with random weights in a model's shape.
    Train(BenchTrainArgs),
}

/// `granite bench attention`
#[derive(Debug, Args)]
pub struct BenchAttentionArgs {
    /// Lengths of sequences; each fills a batch of `--tokens`, a longer one is alone.
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "1024,2048,4096,8192,16384")]
    pub lengths: Vec<u32>,

    /// Tokens of a batch.
    #[arg(long, default_value_t = 8192)]
    pub tokens: u32,

    /// Query heads.
    #[arg(long, default_value_t = 32)]
    pub heads: u32,

    /// Key and value heads.
    #[arg(long, default_value_t = 8)]
    pub kv_heads: u32,

    /// Elements of a head.
    #[arg(long, default_value_t = 128)]
    pub head_dim: u32,

    /// Rounds in which everybody has a turn of ten launches; medians are told.
    #[arg(long, default_value_t = 9)]
    pub rounds: usize,

    /// Write a page with the curves and the table.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,

    /// Print the figures as JSON.
    #[arg(long)]
    pub json: bool,
}

/// `granite bench kernels`
#[derive(Debug, Args)]
pub struct BenchKernelsArgs {
    /// Write a page with the roofline and the table.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,

    /// Print the figures as JSON.
    #[arg(long)]
    pub json: bool,
}

/// `granite bench train`
#[derive(Debug, Args)]
pub struct BenchTrainArgs {
    /// A Hugging Face `config.json`, in place of Granite-3.1-8B's shape.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Rows of a micro-batch.
    #[arg(long, default_value_t = 4)]
    pub rows: usize,

    /// Tokens of a row.
    #[arg(long, default_value_t = 2048)]
    pub length: usize,

    /// Take the rows of a prepared dataset, in place of random ids that are all supervised.
    #[arg(long, value_name = "FOLDER")]
    pub dataset: Option<PathBuf>,

    /// Fill rows with sequences of halving lengths, in place of one sequence each.
    #[arg(long)]
    pub uneven: bool,

    /// Rank of the adapter on all projections.
    #[arg(long, default_value_t = 64)]
    pub rank: usize,

    /// Dropout of the adapter.
    #[arg(long, default_value_t = 0.0)]
    pub dropout: f64,

    /// What the backward pass computes again.
    #[arg(long, value_enum, default_value_t = Recompute::None)]
    pub recompute: Recompute,

    /// Keep the base weights dequantised.
    #[arg(long)]
    pub resident: bool,

    /// Steps to time, after two to warm up.
    #[arg(long, default_value_t = 8)]
    pub steps: usize,

    /// Print the figures as JSON.
    #[arg(long)]
    pub json: bool,
}

/// `granite runs`
#[derive(Debug, Args)]
pub struct RunsArgs {
    /// What to tell.
    #[command(subcommand)]
    pub command: RunsCommand,

    /// Print JSON.
    #[arg(long, global = true)]
    pub json: bool,
}

/// What to tell of runs.
#[derive(Debug, Subcommand)]
pub enum RunsCommand {
    /// A line a run: state, steps, losses, checkpoints.
    List {
        /// The folder of the runs, in place of `checkpoints/runs`.
        folder: Option<PathBuf>,
    },
    /// One run in numbers, and its recipe.
    Show {
        /// Its folder, or its name in `checkpoints/runs`.
        run: PathBuf,
    },
    /// Runs side by side, and what their recipes differ in.
    Compare {
        /// Their folders or names.
        #[arg(required = true, num_args = 2..)]
        runs: Vec<PathBuf>,
    },
}

/// An amount of memory.
fn gibibytes(text: &str) -> Result<f64, String> {
    let gib: f64 = text.parse().map_err(|_| "not a number".to_string())?;
    if gib.is_finite() && gib > 0.0 { Ok(gib) } else { Err("expected a number above 0".to_string()) }
}
