//! A merged model is the model with its adapter.

use std::path::Path;

use granite::checkpoint::adapter::{self, Adapter};
use granite::checkpoint::merge::{self, MergeOptions, Merged};
use granite::model::batch::{Batch, Sequence};
use granite::model::decoder::Decoder;
use granite::recipe::Quantization;
use tch::{Device, Kind, Tensor};

use super::{fixture, load, open};

fn logits(decoder: &Decoder) -> Tensor {
    let input_ids: Vec<u32> = (0..40).map(|at| at * 37 % 250).collect();
    let sequence = Sequence { loss_mask: vec![true; input_ids.len()], input_ids, source: 0 };
    let batch = Batch::pack([&sequence], Device::Cpu);
    let rows = Tensor::arange(batch.tokens(), (Kind::Int64, Device::Cpu));
    decoder.logits(&batch, &rows).unwrap()
}

fn furthest(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

fn options(from: Quantization, dtype: Kind) -> MergeOptions {
    MergeOptions { from, dtype, device: Device::Cpu }
}

fn merged(folder: &Path, model: &str, options: &MergeOptions) -> Merged {
    let base = open(&fixture(model));
    let adapter = adapter::load(&fixture(model).join("adapter")).unwrap();
    merge::write(folder, &base, &adapter, options).unwrap()
}

#[test]
fn merged_logits_are_the_adapters() {
    for model in ["tiny-granite", "tiny-llama"] {
        for from in [Quantization::Nf4, Quantization::None] {
            let mut decoder = load(&open(&fixture(model)), from);
            let base = logits(&decoder);
            adapter::load(&fixture(model).join("adapter")).unwrap().apply(&mut decoder).unwrap();
            let adapted = logits(&decoder);
            let moved = furthest(&base, &adapted);

            let folder = tempfile::tempdir().unwrap();
            merged(folder.path(), model, &options(from, Kind::Float));
            let exact = furthest(&adapted, &logits(&load(&open(folder.path()), Quantization::None)));
            // Only the order of f32 sums differs: some hundred roundings of the largest logit.
            let rounding = 256.0 * f64::from(f32::EPSILON) * adapted.abs().max().double_value(&[]);
            assert!(exact <= rounding, "{model} {from:?}: {exact} beyond {rounding}");
            assert!(moved > 100.0 * rounding, "{model} {from:?}: the adapter moves logits by {moved} only");

            let folder = tempfile::tempdir().unwrap();
            merged(folder.path(), model, &options(from, Kind::BFloat16));
            let rounded = furthest(&adapted, &logits(&load(&open(folder.path()), Quantization::None)));
            assert!(rounded > exact && rounded < moved / 4.0, "{model} {from:?}: {rounded} of {moved}");
        }
    }
}

#[test]
fn dequantised_and_original_weights_give_different_models() {
    let [on_nf4, on_stored] = [Quantization::Nf4, Quantization::None].map(|from| {
        let folder = tempfile::tempdir().unwrap();
        merged(folder.path(), "tiny-granite", &options(from, Kind::Float));
        logits(&load(&open(folder.path()), Quantization::None))
    });
    assert!(furthest(&on_nf4, &on_stored) > 1e-4);
}

#[test]
fn configuration_and_tokenizer_come_along() {
    for model in ["tiny-granite", "tiny-llama"] {
        let folder = tempfile::tempdir().unwrap();
        merged(folder.path(), model, &options(Quantization::Nf4, Kind::BFloat16));
        let (base, merged) = (open(&fixture(model)), open(folder.path()));
        assert_eq!(merged.config, base.config);
        assert_eq!(merged.tokenizer, base.tokenizer);
        assert_ne!(merged.hash, base.hash);
        assert_eq!(merged.tensors.tensor("model.norm.weight").unwrap().kind(), Kind::BFloat16);
    }
}

#[test]
fn updates_are_measured_per_projection() {
    let folder = tempfile::tempdir().unwrap();
    let Merged { bytes, updates } =
        merged(folder.path(), "tiny-granite", &options(Quantization::None, Kind::Float));
    let base = open(&fixture("tiny-granite"));
    let adapter = adapter::load(&fixture("tiny-granite").join("adapter")).unwrap();
    let elements: i64 = base
        .config
        .tensor_names()
        .iter()
        .map(|name| base.tensors.shape(name).unwrap().iter().product::<i64>())
        .sum();
    assert_eq!(bytes, elements as u64 * 4);
    let targets: Vec<&str> = adapter.spec.targets.iter().map(|target| target.name()).collect();
    assert_eq!(updates.iter().map(|update| update.projection.as_str()).collect::<Vec<_>>(), targets);
    for (update, projection) in updates.iter().zip(&adapter.spec.targets) {
        let ratios: Vec<f64> = (0..base.config.num_hidden_layers)
            .map(|layer| {
                let path = projection.path(layer);
                let part = |half: &str| &adapter.tensors[&format!("{path}.lora_{half}.weight")];
                let delta = part("B").matmul(part("A")) * adapter.spec.scale();
                let weight = base.tensors.tensor(&format!("{path}.weight")).unwrap().to_kind(Kind::Float);
                delta.norm().double_value(&[]) / weight.norm().double_value(&[])
            })
            .collect();
        let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
        assert!((update.mean / mean - 1.0).abs() < 1e-4, "{update:?}, expected {mean}");
        assert!((update.max / ratios[update.layer_of_max] - 1.0).abs() < 1e-4);
        assert!(ratios.iter().all(|ratio| *ratio <= update.max * 1.0001));
        assert!(update.rounding < 1e-6);
    }
}

#[test]
fn an_adapter_of_another_model_is_refused_before_anything_is_written() {
    let base = open(&fixture("tiny-granite"));
    let refused = |change: &dyn Fn(&mut Adapter)| {
        let mut adapter = adapter::load(&fixture("tiny-granite").join("adapter")).unwrap();
        change(&mut adapter);
        let folder = tempfile::tempdir().unwrap();
        let options = options(Quantization::None, Kind::Float);
        let error = merge::write(folder.path(), &base, &adapter, &options).unwrap_err();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        format!("{error:#}")
    };
    let target =
        |adapter: &Adapter, layer: usize| format!("{}.lora_A.weight", adapter.spec.targets[0].path(layer));
    let message = refused(&|adapter| {
        let name = target(adapter, 1);
        adapter.tensors.insert(name, Tensor::zeros([4, 8], (Kind::Float, Device::Cpu)));
    });
    assert!(message.contains("has shape [4, 8], expected [4, 64]"), "{message}");
    let message = refused(&|adapter| {
        let name = target(adapter, 1);
        adapter.tensors.remove(&name);
    });
    assert!(message.contains("has no `model.layers.1."), "{message}");
    let message = refused(&|adapter| {
        let name = target(adapter, 2);
        adapter.tensors.insert(name, Tensor::zeros([4, 64], (Kind::Float, Device::Cpu)));
    });
    assert!(message.contains("another number of layers"), "{message}");
}
