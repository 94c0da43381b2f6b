//! A merged model is the model with its adapter.

use std::path::Path;

use granite::checkpoint::adapter::{self, Adapter};
use granite::checkpoint::base::BaseModel;
use granite::checkpoint::form::Form;
use granite::checkpoint::merge::{self, MergeOptions, Merged};
use granite::kernels::nf4::Nf4Weight;
use granite::model::batch::{Batch, Sequence};
use granite::model::decoder::{Decoder, LoadOptions};
use granite::recipe::{Projection, Quantization};
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

fn options(from: Quantization, form: Form) -> MergeOptions {
    MergeOptions { from, form, device: Device::Cpu }
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
            merged(folder.path(), model, &options(from, Form::Fp32));
            let exact = furthest(&adapted, &logits(&load(&open(folder.path()), Quantization::None)));
            // Only the order of f32 sums differs: some hundred roundings of the largest logit.
            let rounding = 256.0 * f64::from(f32::EPSILON) * adapted.abs().max().double_value(&[]);
            assert!(exact <= rounding, "{model} {from:?}: {exact} beyond {rounding}");
            assert!(moved > 100.0 * rounding, "{model} {from:?}: the adapter moves logits by {moved} only");

            let folder = tempfile::tempdir().unwrap();
            merged(folder.path(), model, &options(from, Form::Bf16));
            let rounded = furthest(&adapted, &logits(&load(&open(folder.path()), Quantization::None)));
            assert!(rounded > exact && rounded < moved / 4.0, "{model} {from:?}: {rounded} of {moved}");
        }
    }
}

#[test]
fn dequantised_and_original_weights_give_different_models() {
    let [on_nf4, on_stored] = [Quantization::Nf4, Quantization::None].map(|from| {
        let folder = tempfile::tempdir().unwrap();
        merged(folder.path(), "tiny-granite", &options(from, Form::Fp32));
        logits(&load(&open(folder.path()), Quantization::None))
    });
    assert!(furthest(&on_nf4, &on_stored) > 1e-4);
}

#[test]
fn configuration_and_tokenizer_come_along() {
    for model in ["tiny-granite", "tiny-llama"] {
        let folder = tempfile::tempdir().unwrap();
        merged(folder.path(), model, &options(Quantization::Nf4, Form::Bf16));
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
    let Merged { bytes, updates, steps } =
        merged(folder.path(), "tiny-granite", &options(Quantization::None, Form::Fp32));
    let base = open(&fixture("tiny-granite"));
    let adapter = adapter::load(&fixture("tiny-granite").join("adapter")).unwrap();
    let elements: i64 = base
        .config
        .tensor_names()
        .iter()
        .map(|name| base.tensors.shape(name).unwrap().iter().product::<i64>())
        .sum();
    assert_eq!(bytes, elements as u64 * 4);
    assert_eq!(steps.len(), base.config.num_hidden_layers * 7);
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
        let options = options(Quantization::None, Form::Fp32);
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

/// The folder's weights as bitsandbytes stores them are what a quantiser makes of the merged ones, and are read as that.
#[test]
fn merged_to_four_bits_is_read_back_as_it_was_quantised() {
    for model in ["tiny-granite", "tiny-llama"] {
        for from in [Quantization::Nf4, Quantization::None] {
            let (exact, four) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            merged(exact.path(), model, &options(from, Form::Fp32));
            let written = merged(four.path(), model, &options(from, Form::Nf4));
            let (exact, four) = (open(exact.path()), open(four.path()));
            assert_eq!((exact.stored, four.stored), (Quantization::None, Quantization::Nf4));
            assert_eq!((&four.config, &four.tokenizer), (&exact.config, &exact.tokenizer));
            assert_eq!(four.tensors.names(), exact.tensors.names());
            let adapter = adapter::load(&fixture(model).join("adapter")).unwrap();
            for step in &written.steps {
                let projection = *Projection::ALL.iter().find(|one| one.name() == step.projection).unwrap();
                let name = format!("{}.weight", projection.path(step.layer));
                let stored = four.tensors.nf4(&name, Device::Cpu).unwrap();
                let expected = match (from, adapter.spec.targets.contains(&projection)) {
                    // Not adapted: the base's own codes.
                    (Quantization::Nf4, false) => {
                        open(&fixture(model)).tensors.nf4(&name, Device::Cpu).unwrap()
                    }
                    _ => Nf4Weight::quantize(&exact.tensors.tensor(&name).unwrap()).unwrap(),
                };
                assert!(
                    stored.packed.equal(&expected.packed) && stored.absmax.equal(&expected.absmax),
                    "{name}"
                );
                assert!(stored.nested_absmax.equal(&expected.nested_absmax), "{name}");
                assert_eq!(stored.nested_offset.to_bits(), expected.nested_offset.to_bits());
                let value = four.tensors.tensor(&name).unwrap();
                assert!(value.equal(&expected.dequantize(Kind::Float)), "{name}");
                let off = (value - exact.tensors.tensor(&name).unwrap()).norm().double_value(&[]);
                assert!(off > 0.0 || step.rounding == 0.0);
            }
            let head = four.tensors.tensor("model.embed_tokens.weight").unwrap();
            assert_eq!(head.kind(), Kind::BFloat16);
        }
    }
}

#[test]
fn a_damaged_four_bit_folder_is_an_error_that_names_the_weight() {
    let folder = tempfile::tempdir().unwrap();
    merged(folder.path(), "tiny-granite", &options(Quantization::Nf4, Form::Nf4));
    let path = folder.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let at = |needle: &[u8]| whole.windows(needle.len()).position(|window| window == needle).unwrap();
    let changes: [(&[u8], &[u8]); 4] = [
        (b"\"quant_type\":\"nf4\"", b"\"quant_type\":\"fp4\""),
        (b"\"blocksize\":64", b"\"blocksize\":32"),
        (b"\"shape\":[64", b"\"shape\":[65"),
        (b"\"nested_offset\"", b"\"nested_offsex\""),
    ];
    for (from, to) in changes {
        let mut bytes = whole.clone();
        // The first `shape` of the file is the header's: the states come after it.
        let start = at(b"\"quant_type\"");
        let place =
            start - 1 + whole[start - 1..].windows(from.len()).position(|window| window == from).unwrap();
        bytes[place..place + to.len()].copy_from_slice(to);
        std::fs::write(&path, &bytes).unwrap();
        let reference = folder.path().to_str().unwrap();
        let failed = BaseModel::open(reference).and_then(|base| {
            Decoder::load(base.tensors.as_ref(), &base.config, &LoadOptions::new(base.stored, Device::Cpu))
        });
        let text = format!("{:#}", failed.unwrap_err());
        assert!(text.contains("_proj.weight"), "{text}");
    }
}

#[test]
fn a_weight_beyond_fp16_is_refused_by_name() {
    let mut adapter = adapter::load(&fixture("tiny-granite").join("adapter")).unwrap();
    let name = format!("{}.lora_B.weight", adapter.spec.targets[0].path(1));
    let large = &adapter.tensors[&name] * 1e9;
    adapter.tensors.insert(name, large);
    let folder = tempfile::tempdir().unwrap();
    let base = open(&fixture("tiny-granite"));
    let error =
        merge::write(folder.path(), &base, &adapter, &options(Quantization::Nf4, Form::Fp16)).unwrap_err();
    let text = granite::error::render(&error);
    let weight = format!("`{}.weight` holds", adapter.spec.targets[0].path(1));
    assert!(text.contains(&weight) && text.contains("fp16 ends at 65504"), "{text}");
    merge::write(folder.path(), &base, &adapter, &options(Quantization::Nf4, Form::Bf16)).unwrap();
}
