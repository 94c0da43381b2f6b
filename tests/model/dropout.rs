//! LoRA dropout: a function of seed, micro-batch and module, and its gradient is exact.

use granite::model::batch::Batch;
use granite::model::decoder::GradOptions;
use granite::recipe::Quantization;
use tch::Device;

use super::fixture::{self, all_rows};
use super::packing::sequence;
use super::tolerance::assert_same;
use super::twin::{assert_gradients, gradients};

/// A multiple of 2⁻¹⁵, as masks have it: the twin scales by exactly this probability.
const DROPOUT: f64 = 0.3125;

fn batch() -> Batch {
    Batch::pack([&sequence(19, 1, true), &sequence(30, 2, true)], Device::Cpu)
}

#[test]
fn gradients_under_dropout() {
    for fixture in fixture::all() {
        let (decoder, batch) = (fixture.adapted(Quantization::None, DROPOUT), batch());
        for (seed, microbatch) in [(1, 0), (1, 1), (u64::MAX, u64::MAX)] {
            let options = GradOptions { scale: 1.0 / batch.supervised as f64, seed, microbatch, noise: 0.0 };
            let grads = gradients(&decoder, &batch, &options);
            assert_gradients(fixture.name, &fixture, DROPOUT, &batch, &options, &grads);
        }
    }
}

#[test]
fn the_same_keys_drop_the_same() {
    for fixture in fixture::all() {
        let (decoder, batch) = (fixture.adapted(Quantization::Nf4, DROPOUT), batch());
        let take = |seed, microbatch| {
            gradients(&decoder, &batch, &GradOptions { scale: 1.0, seed, microbatch, noise: 0.0 })
        };
        let first = take(7, 3);
        assert_same("the same keys", take(7, 3).flat(), first.flat());
        assert!(!take(7, 4).flat().equal(first.flat()), "another micro-batch");
        assert!(!take(8, 3).flat().equal(first.flat()), "another seed");
    }
}

#[test]
fn evaluation_drops_nothing() {
    for fixture in fixture::all() {
        let batch = batch();
        let with = fixture.adapted(Quantization::None, DROPOUT);
        let without = fixture.adapted(Quantization::None, 0.0);
        let rows = all_rows(&batch);
        assert_same(
            fixture.name,
            &with.logits(&batch, &rows).unwrap(),
            &without.logits(&batch, &rows).unwrap(),
        );
        assert_eq!(with.loss(&batch).unwrap(), without.loss(&batch).unwrap());
    }
}
