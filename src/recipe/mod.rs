//! `Recipe`: what was typed. TOML, strict and pure: reading one touches nothing but its own file.
//!
//! Unknown fields are errors with the line; every default is visible in [`Recipe::load`]'s types.
//! Relative paths are relative to the working directory, as on a command line.

mod load;
mod sources;

pub use load::{Override, RecipeError};
pub use sources::{CardSpec, ConvFinQaSpec, ConvFinQaTarget, Paths, SourceSpec, SourcesSpec, SpiderSpec};

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A whole recipe: one file describes a run from dumps to service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Name of the run: its outputs lie in `checkpoints/runs/<name>`.
    pub name: String,
    /// The base model.
    pub model: ModelSpec,
    /// Where the examples come from and how they become rows.
    #[serde(default)]
    pub data: DataSpec,
    /// The adapter.
    #[serde(default)]
    pub lora: LoraSpec,
    /// The training loop.
    #[serde(default)]
    pub train: TrainSpec,
    /// What `granite eval` measures.
    #[serde(default)]
    pub eval: EvalSpec,
    /// How `granite serve` answers.
    #[serde(default)]
    pub serve: ServeSpec,
    /// Where measurements go.
    #[serde(default)]
    pub metrics: MetricsSpec,
}

/// The base model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// A Hugging Face folder, a GGUF file, or a hub name `organisation/model`.
    pub base: String,
    /// How the frozen linear weights are held.
    #[serde(default)]
    pub quantization: Quantization,
}

/// How the frozen linear weights are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantization {
    /// 4-bit NormalFloat, block 64, double quantisation.
    #[default]
    Nf4,
    /// As stored.
    None,
}

impl fmt::Display for Quantization {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Nf4 => "nf4",
            Self::None => "none",
        })
    }
}

/// Where the examples come from and how they become rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataSpec {
    /// The prepared dataset's folder: `prepare` writes it, `train` and `eval` read it.
    pub dataset: PathBuf,
    /// Length of a packed row in tokens.
    pub sequence_length: usize,
    /// Chooses the sample of each source.
    pub seed: u64,
    /// Share of each source's documents that is held out, in `[0, 1)`.
    pub validation_fraction: f64,
    /// What to do when a source has fewer examples than asked for.
    pub on_shortfall: OnShortfall,
    /// Records of each source that may be bad: they are left out and listed.
    #[serde(skip_serializing_if = "is_zero")]
    pub skip_bad: usize,
    /// Which examples count as said before.
    pub duplicates: DuplicatesSpec,
    /// Which evaluation sets the examples must not hold.
    pub contamination: ContaminationSpec,
    /// How messages become text.
    pub template: TemplateSpec,
    /// The sources of the mixture.
    pub sources: SourcesSpec,
}

impl Default for DataSpec {
    fn default() -> Self {
        Self {
            dataset: PathBuf::from("datasets/prepared"),
            sequence_length: 2048,
            seed: 17,
            validation_fraction: 0.02,
            on_shortfall: OnShortfall::default(),
            skip_bad: 0,
            duplicates: DuplicatesSpec::default(),
            contamination: ContaminationSpec::default(),
            template: TemplateSpec::default(),
            sources: SourcesSpec::default(),
        }
    }
}

/// What is off by default is not written down, so that older datasets stay what they are.
fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// What to do when a source has fewer examples than asked for. Never: fill up with copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnShortfall {
    /// Stop and tell the counts.
    #[default]
    Fail,
    /// Shrink every source by the same factor, so that the proportions stay.
    Rescale,
    /// Take what there is.
    TakeAll,
}

/// Which examples count as said before. Question and response are compared, never schema, document or template.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DuplicatesSpec {
    /// Duplicates stay in the dataset, and near ones in one split; they are reported all the same.
    pub keep: bool,
    /// Share of three-word shingles that near duplicates' questions have in common at least, in `(0, 1]`.
    pub question_similarity: f64,
    /// The same of their responses; responses of less than fifty words must agree in every word.
    pub response_similarity: f64,
}

impl Default for DuplicatesSpec {
    fn default() -> Self {
        Self { keep: false, question_similarity: 0.8, response_similarity: 0.85 }
    }
}

/// Which evaluation sets the examples must not hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ContaminationSpec {
    /// Files of HumanEval, MBPP, GSM8K, Spider, FinQA or ConvFinQA; their form tells which.
    pub against: Vec<PathBuf>,
    /// Contaminated examples stay in the dataset; they are reported all the same.
    pub keep: bool,
    /// Words in a row that two questions share only when one comes of the other.
    pub ngram: usize,
    /// Share of a response's runs of so many words that an example holds at least, in `(0, 1]`.
    pub response_share: f64,
}

impl Default for ContaminationSpec {
    fn default() -> Self {
        Self { against: Vec::new(), keep: false, ngram: 13, response_share: 0.8 }
    }
}

/// How messages become text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TemplateSpec {
    /// Whose template.
    pub format: TemplateFormat,
    /// The date that templates see as today's, `YYYY-MM-DD`; pinned so that training and serving agree.
    pub date: String,
    /// The system message of every example; `None` leaves the template its own default.
    pub system_prompt: Option<String>,
}

impl Default for TemplateSpec {
    fn default() -> Self {
        Self { format: TemplateFormat::default(), date: "2026-01-15".to_string(), system_prompt: None }
    }
}

/// Whose template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TemplateFormat {
    /// The model's own Jinja template.
    #[default]
    Model,
    /// The Stanford Alpaca prompt.
    Alpaca,
}

/// The adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraSpec {
    /// Rank of the update.
    pub rank: usize,
    /// The update is scaled by `alpha / rank`, or `alpha / sqrt(rank)` with `rslora`.
    pub alpha: f64,
    /// Probability that an input element of the adapter is dropped, in `[0, 1)`.
    pub dropout: f64,
    /// Rank-stabilised scaling.
    pub rslora: bool,
    /// The adapted projections.
    pub targets: Vec<Projection>,
}

impl Default for LoraSpec {
    fn default() -> Self {
        Self { rank: 64, alpha: 16.0, dropout: 0.1, rslora: false, targets: Projection::ALL.to_vec() }
    }
}

impl LoraSpec {
    /// The factor of the update `B·A`.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        if self.rslora { self.alpha / rank.sqrt() } else { self.alpha / rank }
    }
}

/// A linear projection of a decoder layer, named as in the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names are the checkpoint's")]
pub enum Projection {
    QProj,
    KProj,
    VProj,
    OProj,
    GateProj,
    UpProj,
    DownProj,
}

impl Projection {
    /// All of them, in the order of the forward pass.
    pub const ALL: [Self; 7] =
        [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    /// The checkpoint's name: `q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }

    /// The block that holds it: `self_attn` or `mlp`.
    pub fn block(self) -> &'static str {
        match self {
            Self::QProj | Self::KProj | Self::VProj | Self::OProj => "self_attn",
            Self::GateProj | Self::UpProj | Self::DownProj => "mlp",
        }
    }

    /// The module's path in the checkpoint: `model.layers.3.self_attn.q_proj`.
    pub fn path(self, layer: usize) -> String {
        format!("model.layers.{layer}.{}.{}", self.block(), self.name())
    }
}

/// The training loop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainSpec {
    /// Passes over the dataset; ignored when `max_steps` is given.
    pub epochs: f64,
    /// Optimiser steps.
    pub max_steps: Option<u64>,
    /// Packed rows that go through the model at once.
    pub rows_per_microbatch: usize,
    /// Micro-batches of an optimiser step.
    pub accumulation: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// How the learning rate moves after warm-up.
    pub schedule: Schedule,
    /// Steps of linear warm-up from zero; below 1 it is a share of all steps.
    pub warmup: f64,
    /// Optimiser.
    pub optimizer: Optimizer,
    /// Decay rates of the moments.
    pub betas: [f64; 2],
    /// Term of the denominator.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients are scaled down to this norm; 0 switches clipping off.
    pub max_grad_norm: f64,
    /// Seed of data order, adapter initialisation and dropout.
    pub seed: u64,
    /// Validation every so many steps; 0: at the end of each epoch.
    pub eval_every: u64,
    /// A checkpoint every so many steps; 0: at the end of each epoch.
    pub save_every: u64,
    /// Checkpoints that stay: the newest.
    pub keep_last: usize,
    /// The checkpoint of the least validation loss stays too; one is written whenever that loss falls.
    pub keep_best: bool,
    /// Ends the training after so many validations in a row without a smaller loss, and keeps the best; 0: never.
    pub early_stopping_patience: u64,
    /// Noise on the embeddings while training (NEFTune's α, 5 to 15 in its paper); absent: none.
    pub neftune_noise_alpha: Option<f64>,
    /// Learning rate of the adapter's B over that of its A (LoRA+, 16 in its paper); absent: 1.
    pub loraplus_lr_ratio: Option<f64>,
    /// What a GPU computes again in the backward pass to save memory; changes no number.
    pub recompute: RecomputeChoice,
    /// Whether a GPU keeps the base weights dequantised, ready for products; absent: where there is room. Changes no number.
    pub resident_weights: Option<bool>,
}

impl TrainSpec {
    /// Whether the checkpoint of the least validation loss stays.
    pub fn keeps_best(&self) -> bool {
        self.keep_best || self.early_stopping_patience > 0
    }
}

impl Default for TrainSpec {
    fn default() -> Self {
        Self {
            epochs: 3.0,
            max_steps: None,
            rows_per_microbatch: 4,
            accumulation: 4,
            lr: 2e-4,
            schedule: Schedule::default(),
            warmup: 0.03,
            optimizer: Optimizer::default(),
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            seed: 17,
            eval_every: 0,
            save_every: 0,
            keep_last: 3,
            keep_best: false,
            early_stopping_patience: 0,
            neftune_noise_alpha: None,
            loraplus_lr_ratio: None,
            recompute: RecomputeChoice::default(),
            resident_weights: None,
        }
    }
}

/// What the backward pass computes again, as a recipe may ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecomputeChoice {
    /// The fastest that fits the memory.
    #[default]
    Auto,
    /// As [`Recompute::None`].
    None,
    /// As [`Recompute::Mlp`].
    Mlp,
    /// As [`Recompute::Layer`].
    Layer,
    /// As [`Recompute::LayerOffload`].
    #[serde(rename = "layer+offload")]
    LayerOffload,
    /// As [`Recompute::LayerOffloadAdapter`].
    #[serde(rename = "layer+offload+adapter")]
    LayerOffloadAdapter,
}

impl RecomputeChoice {
    /// What is asked for; `None`: the fastest that fits.
    pub fn fixed(self) -> Option<Recompute> {
        match self {
            Self::Auto => None,
            Self::None => Some(Recompute::None),
            Self::Mlp => Some(Recompute::Mlp),
            Self::Layer => Some(Recompute::Layer),
            Self::LayerOffload => Some(Recompute::LayerOffload),
            Self::LayerOffloadAdapter => Some(Recompute::LayerOffloadAdapter),
        }
    }
}

/// What the backward pass computes again, from much memory and speed to little of both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// Only norms and activations.
    None,
    /// Gate and up as well.
    Mlp,
    /// All of a layer from the stream before it.
    Layer,
    /// The same, with those streams and the optimiser's moments kept in the host's memory.
    #[serde(rename = "layer+offload")]
    #[value(name = "layer+offload")]
    LayerOffload,
    /// As `layer+offload`, with the adapter itself in the host's memory too.
    #[serde(rename = "layer+offload+adapter")]
    #[value(name = "layer+offload+adapter")]
    LayerOffloadAdapter,
}

impl Recompute {
    /// From the fastest to the leanest.
    pub const ALL: [Self; 5] =
        [Self::None, Self::Mlp, Self::Layer, Self::LayerOffload, Self::LayerOffloadAdapter];

    /// Whether whole layers are computed again.
    pub fn is_layer(self) -> bool {
        matches!(self, Self::Layer | Self::LayerOffload | Self::LayerOffloadAdapter)
    }

    /// Whether streams and moments lie in the host's memory.
    pub fn offloads(self) -> bool {
        matches!(self, Self::LayerOffload | Self::LayerOffloadAdapter)
    }

    /// Whether the adapter lies in the host's memory.
    pub fn offloads_adapter(self) -> bool {
        self == Self::LayerOffloadAdapter
    }

    /// As in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Mlp => "mlp",
            Self::Layer => "layer",
            Self::LayerOffload => "layer+offload",
            Self::LayerOffloadAdapter => "layer+offload+adapter",
        }
    }
}

/// How the learning rate moves after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Straight down to zero.
    Linear,
    /// Half a cosine down to zero.
    #[default]
    Cosine,
    /// Stays.
    Constant,
}

/// Optimiser.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Optimizer {
    /// AdamW with 32-bit moments.
    #[serde(rename = "adamw")]
    AdamW,
    /// AdamW with 8-bit blockwise moments, as bitsandbytes holds them.
    #[default]
    #[serde(rename = "adamw_8bit")]
    AdamW8bit,
}

/// What `granite eval` measures, besides the losses of held-out rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalSpec {
    /// Chooses the resamples of intervals and tests.
    pub seed: u64,
    /// Answers to held-out examples: exact match and ROUGE-L.
    pub held_out: Option<HeldOutSpec>,
    /// Spider execution accuracy.
    pub spider: Option<SpiderEvalSpec>,
    /// ConvFinQA execution accuracy, turn by turn.
    pub convfinqa: Option<FinanceTaskSpec>,
    /// FinQA execution accuracy.
    pub finqa: Option<FinanceTaskSpec>,
    /// GSM8K accuracy.
    pub gsm8k: Option<TaskSpec>,
    /// HumanEval pass@1.
    pub humaneval: Option<TaskSpec>,
    /// MBPP pass@1.
    pub mbpp: Option<TaskSpec>,
}

impl EvalSpec {
    /// The longest answers of the tasks that there are, by key.
    pub(super) fn answer_tokens(&self) -> impl Iterator<Item = (&'static str, usize)> {
        let Self { seed: _, held_out, spider, convfinqa, finqa, gsm8k, humaneval, mbpp } = self;
        [
            ("eval.held_out.max_tokens", held_out.as_ref().map(|spec| spec.max_tokens)),
            ("eval.spider.max_tokens", spider.as_ref().map(|spec| spec.max_tokens)),
            ("eval.convfinqa.max_tokens", convfinqa.as_ref().map(|spec| spec.max_tokens)),
            ("eval.finqa.max_tokens", finqa.as_ref().map(|spec| spec.max_tokens)),
            ("eval.gsm8k.max_tokens", gsm8k.as_ref().map(|spec| spec.max_tokens)),
            ("eval.humaneval.max_tokens", humaneval.as_ref().map(|spec| spec.max_tokens)),
            ("eval.mbpp.max_tokens", mbpp.as_ref().map(|spec| spec.max_tokens)),
        ]
        .into_iter()
        .filter_map(|(key, tokens)| Some((key, tokens?)))
    }
}

impl Default for EvalSpec {
    fn default() -> Self {
        Self {
            seed: 17,
            held_out: None,
            spider: None,
            convfinqa: None,
            finqa: None,
            gsm8k: None,
            humaneval: None,
            mbpp: None,
        }
    }
}

/// A task that is one file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskSpec {
    /// The questions: JSON array or JSON Lines, plain, `.gz` or `.zip`.
    pub path: PathBuf,
    /// Questions to ask, spread over the file; `None` asks all.
    #[serde(default)]
    pub limit: Option<usize>,
    /// Longest answer in tokens.
    #[serde(default = "default_reasoning_tokens")]
    pub max_tokens: usize,
}

/// FinQA or ConvFinQA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FinanceTaskSpec {
    /// The questions: JSON array or JSON Lines, plain, `.gz` or `.zip`.
    pub path: PathBuf,
    /// What is asked for; as in training.
    #[serde(default)]
    pub target: ConvFinQaTarget,
    /// Questions to ask, spread over the file; `None` asks all.
    #[serde(default)]
    pub limit: Option<usize>,
    /// Longest answer in tokens.
    #[serde(default = "default_answer_tokens")]
    pub max_tokens: usize,
}

/// Answers to held-out examples of the dataset.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HeldOutSpec {
    /// Sources to ask about, as the recipe names them; empty asks about all.
    pub sources: Vec<String>,
    /// Examples of each source, spread over the dataset; `None` asks all.
    pub limit: Option<usize>,
    /// Longest answer in tokens.
    pub max_tokens: usize,
}

impl Default for HeldOutSpec {
    fn default() -> Self {
        Self { sources: Vec::new(), limit: None, max_tokens: default_answer_tokens() }
    }
}

/// Spider execution accuracy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpiderEvalSpec {
    /// `dev.json`.
    pub path: PathBuf,
    /// `tables.json`.
    pub tables: PathBuf,
    /// The folder of `<db_id>/<db_id>.sqlite`.
    pub databases: PathBuf,
    /// Questions to ask; `None` asks all.
    #[serde(default)]
    pub limit: Option<usize>,
    /// Longest answer in tokens.
    #[serde(default = "default_answer_tokens")]
    pub max_tokens: usize,
}

fn default_answer_tokens() -> usize {
    256
}

fn default_reasoning_tokens() -> usize {
    512
}

/// How `granite serve` answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServeSpec {
    /// Address to listen on; anything but loopback needs `api_key`.
    pub host: String,
    /// Port to listen on; 0 takes a free one and prints it.
    pub port: u16,
    /// The key that requests must carry as `Authorization: Bearer KEY`.
    pub api_key: Option<String>,
    /// The folder of `.txt`, `.md` and `.json` documents.
    pub documents: Option<PathBuf>,
    /// The sentence-transformers folder of the encoder.
    pub encoder: Option<PathBuf>,
    /// Where the index is cached; `None`: beside the run.
    pub index: Option<PathBuf>,
    /// Documents of an answer when the request names no number.
    pub top_k: usize,
    /// Longest answer in tokens when the request names none.
    pub max_tokens: usize,
    /// Requests that are answered at once, where memory suffices.
    pub batch: usize,
    /// Requests that may wait; one more is answered 429.
    pub queue: usize,
    /// Longest prompt and answer together in tokens, when shorter than the model's own: it bounds the memory of a request.
    pub context: usize,
}

impl Default for ServeSpec {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".to_string(),
            port: 8080,
            api_key: None,
            documents: None,
            encoder: None,
            index: None,
            top_k: 4,
            max_tokens: 256,
            batch: 8,
            queue: 32,
            context: 4096,
        }
    }
}

/// Where measurements go; the run's `metrics.jsonl` is always written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsSpec {
    /// One line per step on stderr.
    pub console: bool,
    /// Event files for TensorBoard in the run's folder, under `tensorboard`.
    pub tensorboard: bool,
}

impl Default for MetricsSpec {
    fn default() -> Self {
        Self { console: true, tensorboard: false }
    }
}
