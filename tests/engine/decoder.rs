//! The engine with a real decoder, against the decoder without a cache.

use std::path::{Path, PathBuf};

use granite::checkpoint::adapter;
use granite::checkpoint::base::BaseModel;
use granite::engine::{Engine, EngineOptions, FinishReason, Generation, Request, Sampling};
use granite::model::batch::{Batch, Sequence};
use granite::model::decoder::{Decoder, LoadOptions};
use granite::recipe::Quantization;
use tch::{Device, Kind, Tensor};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn decoder(model: &str) -> Decoder {
    let base = BaseModel::open(fixture(model).to_str().unwrap()).unwrap();
    let options = LoadOptions { quantization: Quantization::Nf4, device: Device::Cpu };
    let mut decoder = Decoder::load(base.tensors.as_ref(), &base.config, &options).unwrap();
    adapter::load(&fixture(model).join("adapter")).unwrap().apply(&mut decoder).unwrap();
    decoder
}

/// Log-probabilities after the last of `ids`, from the whole sequence at once.
fn without_cache(decoder: &Decoder, ids: &[u32]) -> Tensor {
    let sequence = Sequence { input_ids: ids.to_vec(), loss_mask: vec![false; ids.len()], source: 0 };
    let last = Tensor::from_slice(&[ids.len() as i64 - 1]);
    let logits = decoder.logits(&Batch::pack([&sequence], Device::Cpu), &last).unwrap();
    logits.squeeze_dim(0).log_softmax(0, Kind::Double)
}

fn generate(model: &str, request: Request) -> Generation {
    let engine = Engine::spawn(decoder(model), &EngineOptions { queue: 1, context: None }).unwrap();
    engine.submit(request).unwrap().wait().unwrap()
}

fn request(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request { prompt, max_tokens, sampling: Sampling::GREEDY, stop_token_ids: vec![] }
}

#[test]
fn greedy_tokens_are_the_largest_logits_without_a_cache() {
    // The longest prompt goes through the model in two chunks.
    for (model, lengths) in [("tiny-granite", [1, 700]), ("tiny-llama", [1, 300])] {
        let twin = decoder(model);
        for length in lengths {
            let mut ids: Vec<u32> = (0..length).map(|at| at * 53 % 250).collect();
            let generation = generate(model, request(ids.clone(), 8));
            assert_eq!(generation.finished.reason, FinishReason::Length);
            for token in generation.tokens {
                let expected = without_cache(&twin, &ids);
                assert_eq!(
                    i64::from(token.id),
                    expected.argmax(0, false).int64_value(&[]),
                    "{model}, {length}"
                );
                let logprob = expected.double_value(&[i64::from(token.id)]);
                assert!((token.logprob - logprob).abs() < 1e-4, "{} instead of {logprob}", token.logprob);
                ids.push(token.id);
            }
        }
    }
}

#[test]
fn a_seed_names_an_answer() {
    let sampled = |seed| {
        let sampling = Sampling { temperature: 1.0, top_p: 0.9, top_k: Some(100), seed };
        generate("tiny-granite", Request { sampling, ..request(vec![1, 2, 3], 12) }).ids()
    };
    assert_eq!(sampled(5), sampled(5));
    assert_ne!(sampled(5), sampled(6));
}
