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
    let options = LoadOptions::new(Quantization::Nf4, Device::Cpu);
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
    generate_all(decoder(model), 1, vec![request]).remove(0)
}

/// Answers to all requests, so many at once.
fn generate_all(decoder: Decoder, batch: usize, requests: Vec<Request>) -> Vec<Generation> {
    let options = EngineOptions { queue: requests.len(), context: None, batch, cached_tokens: None };
    let engine = Engine::spawn(decoder, &options).unwrap();
    let streams: Vec<_> = requests.into_iter().map(|request| engine.submit(request).unwrap()).collect();
    streams.into_iter().map(|stream| stream.wait().unwrap()).collect()
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

/// Requests of odd lengths: one token, one more than a chunk of prompts, the longest that leaves room for an answer, greedy
/// and drawn.
fn mixed(context: usize) -> Vec<Request> {
    let lengths = [1, 130, 2, context - 3, 17, 64, 5];
    let requests = lengths.into_iter().enumerate().map(|(at, length)| {
        let prompt = (0..length).map(|place| ((place * 53 + at * 31) % 250) as u32).collect();
        let drawn = Sampling { temperature: 0.8, top_p: 0.95, top_k: Some(40), seed: at as u64 };
        let sampling = if at % 3 == 2 { drawn } else { Sampling::GREEDY };
        Request { sampling, ..request(prompt, 4 + at) }
    });
    let mut requests: Vec<Request> = requests.collect();
    // Nothing but a stop token: this one ends at once.
    requests.push(Request { stop_token_ids: (0..259).collect(), ..request(vec![9, 8, 7], 5) });
    requests
}

#[test]
fn no_answer_depends_on_what_is_answered_beside_it() {
    for (model, context) in [("tiny-granite", 1400), ("tiny-llama", 512)] {
        let alone = generate_all(decoder(model), 1, mixed(context));
        assert_eq!((alone[7].ids(), alone[7].finished.reason), (vec![], FinishReason::Stop));
        assert_eq!(alone[3].ids().len(), if model == "tiny-llama" { 3 } else { 7 });
        for batch in [2, 3, 8] {
            for (at, (one, alone)) in
                generate_all(decoder(model), batch, mixed(context)).iter().zip(&alone).enumerate()
            {
                assert_eq!(one.ids(), alone.ids(), "{model}, request {at}, {batch} at once");
                assert_eq!(one.finished.reason, alone.finished.reason);
                assert_eq!(one.finished.usage, alone.finished.usage);
                for (token, alone) in one.tokens.iter().zip(&alone.tokens) {
                    assert!((token.logprob - alone.logprob).abs() < 1e-5, "{token:?}, alone {alone:?}");
                }
            }
        }
    }
}
