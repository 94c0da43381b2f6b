//! What `granite eval` and `granite merge` measure and write, on tiny models and, where they are at hand, real questions.

#![expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod command;
mod merge;
mod merge_command;
mod perplexity;
mod place;
mod sandbox;
mod spider;
mod tasks;

use std::path::{Path, PathBuf};

use granite::checkpoint::base::BaseModel;
use granite::model::decoder::{Decoder, LoadOptions};
use granite::recipe::Quantization;
use tch::Device;

/// The folder of a tiny model with an adapter whose `B` is not zero.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn open(folder: &Path) -> BaseModel {
    BaseModel::open(folder.to_str().unwrap()).unwrap()
}

fn load(base: &BaseModel, quantization: Quantization) -> Decoder {
    Decoder::load(base.tensors.as_ref(), &base.config, &LoadOptions::new(quantization, Device::Cpu)).unwrap()
}
