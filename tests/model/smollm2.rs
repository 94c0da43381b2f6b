//! A real model: SmolLM2-135M-Instruct from its GGUF file against an independent reader, on ten prompts.

use std::fs;

use granite::checkpoint::base::BaseModel;
use granite::model::batch::{Batch, Sequence};
use granite::model::decoder::{Decoder, LoadOptions};
use granite::recipe::Quantization;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::fixture::folder;
use super::tolerance::assert_close;

fn numbers(value: &Value) -> Tensor {
    let list: Vec<f64> = value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect();
    Tensor::from_slice(&list)
}

fn ids(value: &Value) -> Tensor {
    numbers(value).to_kind(Kind::Int64)
}

#[test]
fn logits_are_those_of_another_reader() {
    let Ok(path) = std::env::var("GRANITE_SMOLLM2") else {
        eprintln!("skipped: GRANITE_SMOLLM2 does not name the GGUF file of SmolLM2-135M-Instruct");
        return;
    };
    let base = BaseModel::open(&path).unwrap();
    let options = LoadOptions { quantization: Quantization::None, device: Device::Cpu };
    let decoder = Decoder::load(&*base.tensors, &base.config, &options).unwrap();
    let fixture: Value = serde_json::from_slice(&fs::read(folder("smollm2-logits.json")).unwrap()).unwrap();

    // All ten prompts in one packed row.
    let prompts = fixture["prompts"].as_array().unwrap();
    let sequences: Vec<Sequence> = prompts
        .iter()
        .map(|prompt| {
            let input_ids: Vec<u32> = prompt["input_ids"]
                .as_array()
                .unwrap()
                .iter()
                .map(|id| id.as_u64().unwrap() as u32)
                .collect();
            Sequence { loss_mask: vec![false; input_ids.len()], input_ids, source: 0 }
        })
        .collect();
    let batch = Batch::pack(&sequences, Device::Cpu);
    let last: Vec<i64> = batch.cu_seqlens[1..].iter().map(|end| end - 1).collect();
    let logits = decoder.logits(&batch, &Tensor::from_slice(&last)).unwrap();

    assert_eq!(prompts.len(), 10);
    for (index, prompt) in prompts.iter().enumerate() {
        let (row, error) = (logits.get(index as i64), prompt["error"].as_f64().unwrap());
        let check = |what: &str, ours: &Tensor, reference: &Value| {
            assert_close(&format!("{what} of {}", prompt["prompt"]), ours, &numbers(reference), error);
        };
        check("the largest logits", &row.index_select(0, &ids(&prompt["top_ids"])), &prompt["top"]);
        check("logits at fixed ids", &row.index_select(0, &ids(&fixture["fixed_ids"])), &prompt["fixed"]);
        let sum = Tensor::from_slice(&[prompt["logsumexp"].as_f64().unwrap()]);
        let ours = row.to_kind(Kind::Double).logsumexp(0, true);
        assert_close(&format!("logsumexp of {}", prompt["prompt"]), &ours, &sum, error);
    }
}
