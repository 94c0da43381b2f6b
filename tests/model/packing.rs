//! Packed sequences do not see each other, and how they are packed does not matter.

use granite::model::batch::{Batch, Sequence};
use granite::model::decoder::GradOptions;
use granite::recipe::Quantization;
use tch::{Device, Kind, Tensor};

use super::fixture::{self, all_rows};
use super::tolerance::{assert_close, assert_same, distance};
use super::twin::{Twin, assert_gradients, gradients};

/// Tokens that differ with `salt`; the second half is supervised when `learned`.
pub fn sequence(length: usize, salt: u32, learned: bool) -> Sequence {
    let id = |at: u32| (at * 97 + salt * 31 + at * at * 7) % 259;
    Sequence {
        input_ids: (0..length as u32).map(id).collect(),
        loss_mask: (0..length).map(|at| learned && at >= length / 2).collect(),
        source: 0,
    }
}

fn options(supervised: i64) -> GradOptions {
    GradOptions { scale: 1.0 / supervised as f64, seed: 9, microbatch: 4, noise: 0.0 }
}

#[test]
fn a_neighbour_changes_no_bit() {
    for fixture in fixture::all() {
        for quantization in [Quantization::None, Quantization::Nf4] {
            let decoder = fixture.adapted(quantization, 0.0);
            let [first, last] = [sequence(17, 1, true), sequence(9, 2, true)];
            let pack = |salt| Batch::pack([&first, &sequence(23, salt, false), &last], Device::Cpu);
            let [one, other] = [pack(3), pack(4)];
            assert!(!one.input_ids.equal(&other.input_ids));

            let kept = Tensor::cat(
                &[
                    Tensor::arange(17, (Kind::Int64, Device::Cpu)),
                    Tensor::arange_start(40, 49, (Kind::Int64, Device::Cpu)),
                ],
                0,
            );
            let logits = |batch: &Batch| decoder.logits(batch, &all_rows(batch)).unwrap();
            let what = format!("{} {quantization:?}", fixture.name);
            assert_same(&what, &logits(&one).index_select(0, &kept), &logits(&other).index_select(0, &kept));
            let grads = |batch: &Batch| gradients(&decoder, batch, &options(batch.supervised));
            assert_same(&what, grads(&one).flat(), grads(&other).flat());
        }
    }
}

#[test]
fn packed_logits_are_unpacked_logits() {
    for fixture in fixture::all() {
        let decoder = fixture.adapted(Quantization::None, 0.0);
        let parts =
            [sequence(1, 1, true), sequence(64, 2, true), sequence(2, 3, true), sequence(33, 4, true)];
        let packed = Batch::pack(&parts, Device::Cpu);
        let together = decoder.logits(&packed, &all_rows(&packed)).unwrap();
        let alone = parts.each_ref().map(|part| Batch::pack([part], Device::Cpu));
        let logits = |kind, batch: &Batch| Twin::new(&fixture, 0.0, kind).pass(batch, &options(1)).logits;
        let references = alone.each_ref().map(|batch| logits(Kind::Double, batch));
        // Of all parts together: that of a part of one token is a noisy sample.
        let yardstick = alone.iter().zip(&references);
        let yardstick = yardstick.map(|(batch, exact)| distance(&logits(Kind::Float, batch), exact));
        let yardstick = yardstick.fold(0.0, f64::max);
        let places = alone.iter().zip(&references).zip(parts.iter().zip(&packed.cu_seqlens));
        for ((alone, reference), (part, start)) in places {
            let what = format!("{} of {} tokens", fixture.name, part.input_ids.len());
            assert_close(&what, &together.narrow(0, *start, alone.tokens()), reference, yardstick);
            assert_close(&what, &decoder.logits(alone, &all_rows(alone)).unwrap(), reference, yardstick);
        }
    }
}

#[test]
fn one_by_eight_is_eight_by_one() {
    for fixture in fixture::all() {
        let decoder = fixture.adapted(Quantization::None, 0.0);
        let parts: Vec<Sequence> = (1..9).map(|salt| sequence(3 + 5 * salt as usize, salt, true)).collect();
        let together = Batch::pack(&parts, Device::Cpu);
        let step = options(together.supervised);

        let packed = gradients(&decoder, &together, &step);
        let mut accumulated = packed.zeros_like();
        let (mut sum, mut supervised) = (0.0, 0);
        for part in &parts {
            let loss =
                decoder.loss_and_grad(&Batch::pack([part], Device::Cpu), &step, &mut accumulated).unwrap();
            sum += loss.sum();
            supervised += loss.tokens();
        }
        assert_eq!(supervised, together.supervised);
        assert_gradients(&format!("{} 1x8", fixture.name), &fixture, 0.0, &together, &step, &packed);
        assert_gradients(&format!("{} 8x1", fixture.name), &fixture, 0.0, &together, &step, &accumulated);

        let reference = Twin::new(&fixture, 0.0, Kind::Double).pass(&together, &step).losses;
        let yardstick =
            distance(&Twin::new(&fixture, 0.0, Kind::Float).pass(&together, &step).losses, &reference);
        let packed = Tensor::from_slice(&decoder.loss(&together).unwrap().per_sequence);
        assert_close(&format!("{} losses", fixture.name), &packed, &reference, yardstick);
        let total = reference.sum(Kind::Double);
        assert_close(&format!("{} sum", fixture.name), &Tensor::from(sum), &total, 8.0 * yardstick);
    }
}

#[test]
fn a_batch_without_labels_has_no_loss_and_no_gradient() {
    let fixture = &fixture::all()[0];
    let decoder = fixture.adapted(Quantization::None, 0.0);
    for batch in [
        Batch::pack([&sequence(12, 1, false)], Device::Cpu),
        Batch::pack([&sequence(1, 1, true)], Device::Cpu),
    ] {
        assert_eq!(batch.supervised, 0);
        let loss = decoder.loss(&batch).unwrap();
        assert_eq!((loss.sum(), loss.tokens()), (0.0, 0));
        let grads = gradients(&decoder, &batch, &options(1));
        assert_same("gradient", grads.flat(), &grads.flat().zeros_like());
    }
}
