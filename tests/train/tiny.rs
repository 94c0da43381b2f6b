//! A tiny Granite, a dataset of a few rows for it, and runs over both.

use std::path::{Path, PathBuf};

use granite::checkpoint::base::BaseModel;
use granite::checkpoint::run::RunFolder;
use granite::data::manifest::{Counts, FORMAT_VERSION, Manifest, SourceReport, SplitReport};
use granite::data::store::{self, PackedRow, Split};
use granite::data::tokenizer::ChatTokenizer;
use granite::model::batch::Sequence;
use granite::recipe::{DataSpec, Recipe};
use granite::train::interrupt::Interrupt;
use granite::train::plan::Plan;
use granite::train::run::{RunOptions, Summary, run};
use tch::Device;

/// The base model.
pub fn base() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-granite").to_str().unwrap().to_string()
}

/// A folder that holds a dataset of seven rows for training and two for validation, and takes the runs.
pub struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        Self::with_rows(&rows(7, 0))
    }

    pub fn with_rows(train: &[PackedRow]) -> Self {
        Self::with_splits(train, &rows(2, 50))
    }

    pub fn with_splits(train: &[PackedRow], validation: &[PackedRow]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dataset = folder.path().join("dataset");
        std::fs::create_dir(&dataset).unwrap();
        let splits = [(Split::Train, train), (Split::Validation, validation)];
        store::write(&dataset, &manifest(), splits, &[]).unwrap();
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Ten steps of two micro-batches over seven rows: four steps an epoch, the last of which is short.
    pub fn recipe(&self, settings: &[&str]) -> Recipe {
        let text = format!(
            "name = \"tiny\"\n\
             [model]\nbase = {:?}\nquantization = \"none\"\n\
             [data]\ndataset = {:?}\nsequence_length = 64\n\
             [lora]\nrank = 64\nalpha = 64\ndropout = 0.1\n\
             [train]\nmax_steps = 10\nrows_per_microbatch = 1\naccumulation = 2\nlr = 1e-3\nwarmup = 2\n\
             keep_last = 9\n\
             [metrics]\nconsole = false\n",
            base(),
            self.path("dataset")
        );
        let overrides: Vec<_> = settings.iter().map(|setting| setting.parse().unwrap()).collect();
        Recipe::parse(&text, Path::new("tiny.toml"), &overrides).unwrap()
    }

    pub fn run(&self, name: &str, settings: &[&str], how: How) -> anyhow::Result<Summary> {
        let recipe = self.recipe(settings);
        let options = RunOptions {
            gpu_memory: None,
            folder: RunFolder::of(&recipe, Some(&self.path(name))),
            device: Device::Cpu,
            resume: how.resume,
            stop_after: how.stop_after,
            interrupt: Interrupt::default(),
        };
        run(Plan::new(recipe)?, &options)
    }

    /// What the user is told when a run is refused.
    pub fn refusal(&self, name: &str, settings: &[&str], how: How) -> String {
        granite::error::render(&self.run(name, settings, how).unwrap_err())
    }
}

/// From where to where.
#[derive(Default, Clone, Copy)]
pub struct How {
    pub resume: bool,
    pub stop_after: Option<u64>,
}

impl How {
    pub const RESUMED: Self = Self { resume: true, stop_after: None };

    pub fn until(step: u64) -> Self {
        Self { resume: false, stop_after: Some(step) }
    }
}

/// Rows of several sequences of unequal length, half of each supervised.
pub fn rows(count: u32, first: u32) -> Vec<PackedRow> {
    let sequence = |seed: u32, source: u16| {
        let length = 9 + seed * 7 % 13;
        Sequence {
            // Words that come again, so that there is something to learn.
            input_ids: (0..length).map(|at| 60 + (at * at + seed) % 17).collect(),
            loss_mask: (0..length).map(|at| at * 2 >= length).collect(),
            source,
        }
    };
    (first..first + count)
        .map(|row| PackedRow {
            sequences: vec![sequence(row, 0), sequence(row * 3 + 1, 1)],
            examples: vec![2 * row, 2 * row + 1],
        })
        .collect()
}

fn manifest() -> Manifest {
    let base = BaseModel::open(&base()).unwrap();
    let tokenizer = ChatTokenizer::new(&base.tokenizer, &DataSpec::default().template).unwrap();
    let source = |name: &str| SourceReport {
        name: name.to_string(),
        licence: "made for this test".to_string(),
        commercial_use: true,
        asked: None,
        read: 9,
        not_sampled: 0,
        taken: 9,
        shortened: 0,
        dropped: Default::default(),
        train: Counts::default(),
        validation: Counts::default(),
        ..SourceReport::default()
    };
    Manifest {
        format_version: FORMAT_VERSION,
        program: "granite test".to_string(),
        recipe: DataSpec::default(),
        model: "tiny-granite".to_string(),
        model_vocab_size: Some(base.config.vocab_size),
        tokenizer_vocab_size: tokenizer.vocab_size(),
        tokenizer_hash: tokenizer.hash().to_string(),
        sequence_length: 64,
        sources: vec![source("first"), source("second")],
        train: SplitReport::default(),
        validation: SplitReport::default(),
        inputs: Vec::new(),
    }
}
