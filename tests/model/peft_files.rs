//! Adapters as PEFT files: one that PEFT wrote is read, one that we write is read back, and a run's files are those
//! that `scripts/oracle/check_adapter.py` has looked at.

use std::fs;
use std::path::Path;

use granite::checkpoint::adapter;
use granite::checkpoint::base::BaseModel;
use granite::model::batch::{Batch, Sequence};
use granite::model::decoder::{Decoder, LoadOptions};
use granite::recipe::Quantization;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::fixture::{self, all_rows};
use super::tolerance::{assert_close, assert_same};

fn open(base: &str, quantization: Quantization) -> Decoder {
    let base = BaseModel::open(base).unwrap();
    let options = LoadOptions::new(quantization, Device::Cpu);
    Decoder::load(&*base.tensors, &base.config, &options).unwrap()
}

#[test]
fn an_adapter_that_peft_wrote() {
    for fixture in fixture::all() {
        let folder = fixture::folder(fixture.name);
        let peft = adapter::load(&folder.join("adapter")).unwrap();
        assert_eq!(peft.spec.scale(), fixture.lora().scale());
        let mut decoder = open(folder.to_str().unwrap(), Quantization::None);
        peft.apply(&mut decoder).unwrap();
        let batch = fixture.batch();
        let logits = decoder.logits(&batch, &all_rows(&batch)).unwrap();
        let name = "none.logits";
        assert_close(fixture.name, &logits, fixture.reference(name), fixture.yardstick(name));
    }
}

#[test]
fn an_adapter_that_we_wrote() {
    for fixture in fixture::all() {
        let decoder = fixture.adapted(Quantization::None, 0.0);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        adapter::save(path, &fixture.lora(), decoder.adapters().unwrap(), fixture.name).unwrap();
        let mut again = fixture.decoder(Quantization::None);
        adapter::load(path).unwrap().apply(&mut again).unwrap();
        assert_same(fixture.name, again.adapters().unwrap().flat(), decoder.adapters().unwrap().flat());
    }
}

/// Logits after the last token of each prompt, all prompts in one packed row.
pub fn assert_logits(decoder: &Decoder, file: &Path) {
    let fixture: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    let prompts = fixture["prompts"].as_array().unwrap();
    assert!(!prompts.is_empty(), "no prompts");
    let sequences: Vec<Sequence> = prompts.iter().map(|prompt| sequence(&prompt["input_ids"])).collect();
    let batch = Batch::pack(&sequences, Device::Cpu);
    let last: Vec<i64> = batch.cu_seqlens[1..].iter().map(|end| end - 1).collect();
    let logits = decoder.logits(&batch, &Tensor::from_slice(&last)).unwrap();
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

fn sequence(input_ids: &Value) -> Sequence {
    let input_ids: Vec<u32> =
        input_ids.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    Sequence { loss_mask: vec![false; input_ids.len()], input_ids, source: 0 }
}

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
    assert_logits(&open(&path, Quantization::None), &fixture::folder("smollm2-logits.json"));
}

/// `scripts/oracle/check_adapter.py` writes what PEFT and transformers make of a run and prints this test's variables.
#[test]
fn a_runs_files_are_what_peft_and_transformers_read() {
    let Ok(path) = std::env::var("GRANITE_CHECK_LOGITS") else {
        eprintln!("skipped: GRANITE_CHECK_LOGITS does not name a file of scripts/oracle/check_adapter.py");
        return;
    };
    let check: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let text = |key: &str| check[key].as_str().unwrap();
    let mut adapted = open(text("base"), Quantization::Nf4);
    adapter::load(Path::new(text("adapter"))).unwrap().apply(&mut adapted).unwrap();
    assert_logits(&adapted, Path::new(text("adapter_logits")));
    assert_logits(&open(text("merged"), Quantization::None), Path::new(text("merged_logits")));
}
