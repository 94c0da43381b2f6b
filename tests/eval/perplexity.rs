//! Losses per source are those of the sequences, wherever they were packed.

use granite::data::store::PackedRow;
use granite::losses::measure;
use granite::model::batch::{Batch, Sequence};
use granite::recipe::Quantization;
use tch::Device;

use super::{fixture, load, open};

fn sequence(length: u32, source: u16) -> Sequence {
    let input_ids: Vec<u32> =
        (0..length).map(|at| (at * 31 + u32::from(source) * 7 + length) % 250).collect();
    let loss_mask = (0..length).map(|at| at * 2 >= length).collect();
    Sequence { input_ids, loss_mask, source }
}

fn row(sequences: Vec<Sequence>) -> PackedRow {
    PackedRow { examples: (0..sequences.len() as u32).collect(), sequences }
}

#[test]
fn sources_are_told_apart_and_sum_to_the_whole() {
    let decoder = load(&open(&fixture("tiny-granite")), Quantization::None);
    let rows = [
        row(vec![sequence(12, 0), sequence(20, 2), sequence(7, 0)]),
        row(vec![sequence(30, 2)]),
        row(vec![sequence(2, 0), sequence(9, 1)]),
    ];
    let report = measure(&decoder, &rows, &["dolly", "spider", "code"]).unwrap().unwrap();
    assert_eq!(report.rows, 3);
    assert_eq!(report.overall.sequences, 6);
    let mut nats = 0.0;
    for (source, name) in ["dolly", "spider", "code"].into_iter().enumerate() {
        let (mut expected, mut tokens) = (0.0, 0);
        for sequence in
            rows.iter().flat_map(|row| &row.sequences).filter(|one| usize::from(one.source) == source)
        {
            let alone = decoder.loss(&Batch::pack([sequence], Device::Cpu)).unwrap();
            expected += alone.sum();
            tokens += alone.tokens();
        }
        let found = &report.sources[source];
        assert_eq!((found.name.as_str(), found.tokens), (name, tokens));
        assert!((found.loss * tokens as f64 / expected - 1.0).abs() < 1e-5, "{found:?}, expected {expected}");
        nats += found.loss * tokens as f64;
    }
    let overall = &report.overall;
    assert_eq!(overall.tokens, report.sources.iter().map(|source| source.tokens).sum::<i64>());
    assert!((nats / overall.tokens as f64 / overall.loss - 1.0).abs() < 1e-12);
    assert_eq!(overall.perplexity, overall.loss.exp());
}

#[test]
fn rows_without_a_supervised_token_have_no_loss() {
    let decoder = load(&open(&fixture("tiny-llama")), Quantization::None);
    let silent = Sequence { loss_mask: vec![false; 5], ..sequence(5, 0) };
    assert_eq!(measure(&decoder, &[row(vec![silent])], &["dolly"]).unwrap(), None);
    assert_eq!(measure(&decoder, &[], &["dolly"]).unwrap(), None);
}
