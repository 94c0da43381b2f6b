//! What a wrong file or a wrong call can cause is an error that names the culprit, never a panic.

use granite::model::batch::{Batch, Sequence};
use granite::model::decoder::{Decoder, GradOptions, LoadOptions};
use granite::model::kv_cache::KvCache;
use granite::recipe::Quantization;
use tch::{Device, Kind, Tensor};

use super::fixture::{self, Fixture, Named, Source};

fn load_error(fixture: &Fixture, change: impl FnOnce(&mut Named)) -> String {
    let mut weights = fixture::shallow(&fixture.weights);
    change(&mut weights);
    let options = LoadOptions::new(Quantization::None, Device::Cpu);
    format!("{:#}", Decoder::load(&Source::new(&weights), &fixture.config, &options).unwrap_err())
}

#[test]
fn weights_that_do_not_fit() {
    let [_, llama] = fixture::all();
    let name = "model.layers.1.mlp.up_proj.weight";
    let error = load_error(&llama, |weights| {
        weights.remove(name);
    });
    assert!(error.contains(name), "{error}");

    let error = load_error(&llama, |weights| {
        weights.insert(name.to_string(), Tensor::zeros([48, 80], (Kind::Float, Device::Cpu)));
    });
    assert!(error.contains(name) && error.contains("48") && error.contains("80"), "{error}");

    let bias = "model.layers.0.self_attn.q_proj.bias";
    let error = load_error(&llama, |weights| {
        weights.insert(bias.to_string(), Tensor::zeros([96], (Kind::Float, Device::Cpu)));
    });
    assert!(error.contains(bias), "{error}");

    let error = load_error(&llama, |weights| {
        weights.remove("lm_head.weight");
    });
    assert!(error.contains("lm_head.weight"), "{error}");
}

#[test]
fn tokens_beyond_the_vocabulary() {
    let [granite, _] = fixture::all();
    let decoder = granite.adapted(Quantization::None, 0.0);
    let beyond = Sequence { input_ids: vec![5, 259, 3], loss_mask: vec![false, true, true], source: 0 };
    let batch = Batch::pack([&beyond], Device::Cpu);
    let error = format!("{:#}", decoder.loss(&batch).unwrap_err());
    assert!(error.contains("259"), "{error}");
    let options = GradOptions { scale: 1.0, seed: 1, microbatch: 1, noise: 0.0 };
    let mut grads = decoder.adapters().unwrap().zeros_like();
    assert!(decoder.loss_and_grad(&batch, &options, &mut grads).is_err());
    let mut cache = KvCache::new(decoder.config(), 8, decoder.kind(), Device::Cpu).unwrap();
    assert!(decoder.forward_cached(&beyond.input_ids, &mut cache).is_err());
}

#[test]
fn a_sequence_beyond_the_last_position() {
    let [_, llama] = fixture::all();
    let decoder = llama.decoder(Quantization::None);
    let long = Sequence { input_ids: vec![7; 513], loss_mask: vec![true; 513], source: 0 };
    let error = format!("{:#}", decoder.loss(&Batch::pack([&long], Device::Cpu)).unwrap_err());
    assert!(error.contains("512") || error.contains("513"), "{error}");
}

#[test]
fn a_cache_that_is_full() {
    let [granite, _] = fixture::all();
    let decoder = granite.decoder(Quantization::None);
    let mut cache = KvCache::new(decoder.config(), 4, decoder.kind(), Device::Cpu).unwrap();
    assert!(decoder.forward_cached(&[1, 2, 3, 4, 5], &mut cache).is_err());
    let _ = decoder.forward_cached(&[1, 2, 3, 4], &mut cache).unwrap();
    assert!(decoder.forward_cached(&[5], &mut cache).is_err());
    assert_eq!(cache.len(), 4);
}

#[test]
fn adapters_are_attached_once() {
    let [granite, _] = fixture::all();
    let mut decoder = granite.decoder(Quantization::None);
    let batch = granite.batch();
    let mut nothing = granite::model::params::ParamSet::zeros([], Device::Cpu);
    let options = GradOptions { scale: 1.0, seed: 1, microbatch: 1, noise: 0.0 };
    assert!(
        decoder.loss_and_grad(&batch, &options, &mut nothing).is_err(),
        "no adapter to take gradients of"
    );
    assert!(decoder.adapters().is_none());
    decoder.attach_lora(&granite.lora(), 1).unwrap();
    assert!(decoder.attach_lora(&granite.lora(), 1).is_err());
}
