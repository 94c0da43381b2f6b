//! Logits, losses, every LoRA gradient and three optimiser steps against transformers and PEFT.

use granite::checkpoint::base::BaseModel;
use granite::kernels::nf4::Nf4Weight;
use granite::model::batch::Batch;
use granite::model::decoder::{Decoder, GradOptions, Loss};
use granite::model::params::ParamSet;
use granite::recipe::{Projection, Quantization};
use tch::{Kind, Tensor};

use super::fixture::{self, Fixture, all_rows};
use super::tolerance::{assert_close, assert_same};

const VARIANTS: [(&str, Quantization); 2] = [("none", Quantization::None), ("nf4", Quantization::Nf4)];

fn check(fixture: &Fixture, name: &str, ours: &Tensor) {
    let what = format!("{} {name}", fixture.name);
    assert_close(&what, ours, fixture.reference(name), fixture.yardstick(name));
}

/// The mean over the batch, as one optimiser step of one micro-batch takes it.
pub fn whole_step(batch: &Batch) -> GradOptions {
    GradOptions { scale: 1.0 / batch.supervised as f64, seed: 3, microbatch: 0, noise: 0.0 }
}

fn losses(loss: &Loss) -> Tensor {
    Tensor::from_slice(&loss.per_sequence)
}

#[test]
fn configurations_are_read_from_both_forms() {
    for (name, expected) in
        [("tiny-granite", fixture::granite_config()), ("tiny-llama", fixture::llama_config())]
    {
        let base = BaseModel::open(fixture::folder(name).to_str().unwrap()).unwrap();
        assert_eq!(base.config, expected, "{name}");
    }
}

#[test]
fn base_logits_and_loss() {
    for fixture in fixture::all() {
        let (decoder, batch) = (fixture.decoder(Quantization::None), fixture.batch());
        check(&fixture, "none.base.logits", &decoder.logits(&batch, &all_rows(&batch)).unwrap());
        check(&fixture, "none.base.loss", &losses(&decoder.loss(&batch).unwrap()));
        let decoder = fixture.decoder(Quantization::Nf4);
        check(&fixture, "nf4.base.loss", &losses(&decoder.loss(&batch).unwrap()));
    }
}

#[test]
fn logits_of_some_rows_are_those_rows() {
    for fixture in fixture::all() {
        let (decoder, batch) = (fixture.adapted(Quantization::None, 0.0), fixture.batch());
        let rows = Tensor::from_slice(&[0i64, 5, 41, 7]);
        let name = "none.logits";
        let reference = fixture.reference(name).index_select(0, &rows);
        let ours = decoder.logits(&batch, &rows).unwrap();
        assert_close(&format!("{} some rows", fixture.name), &ours, &reference, fixture.yardstick(name));
    }
}

#[test]
fn adapted_logits_loss_and_every_gradient() {
    for fixture in fixture::all() {
        for (variant, quantization) in VARIANTS {
            let (decoder, batch) = (fixture.adapted(quantization, 0.0), fixture.batch());
            let logits = decoder.logits(&batch, &all_rows(&batch)).unwrap();
            check(&fixture, &format!("{variant}.logits"), &logits);

            let loss = decoder.loss(&batch).unwrap();
            check(&fixture, &format!("{variant}.loss.0"), &losses(&loss));
            let mut grads = decoder.adapters().unwrap().zeros_like();
            let with_grad = decoder.loss_and_grad(&batch, &whole_step(&batch), &mut grads).unwrap();
            check(&fixture, &format!("{variant}.loss.0"), &losses(&with_grad));
            assert_eq!(loss.supervised, with_grad.supervised);
            assert_eq!(loss.tokens(), batch.supervised);
            for (name, grad) in grads.iter() {
                check(&fixture, &format!("{variant}.grad.{name}"), &grad);
            }
        }
    }
}

#[test]
fn gradients_add_up() {
    let fixture = &fixture::all()[0];
    let (decoder, batch) = (fixture.adapted(Quantization::None, 0.0), fixture.batch());
    let mut once = decoder.adapters().unwrap().zeros_like();
    decoder.loss_and_grad(&batch, &whole_step(&batch), &mut once).unwrap();
    let mut twice = once.zeros_like();
    for _ in 0..2 {
        decoder.loss_and_grad(&batch, &whole_step(&batch), &mut twice).unwrap();
    }
    // Doubling is exact in binary.
    assert_same("twice the gradient", twice.flat(), &(once.flat() * 2.0));
}

/// AdamW as Loshchilov and Hutter (2019) write it, over the flat allocation.
fn adamw_step(
    parameters: &ParamSet,
    grads: &ParamSet,
    moments: &mut (Tensor, Tensor),
    step: i32,
    fixture: &Fixture,
) {
    let settings = &fixture.notes["adamw"];
    let number = |name: &str| settings[name].as_f64().unwrap();
    let (beta1, beta2) = (settings["betas"][0].as_f64().unwrap(), settings["betas"][1].as_f64().unwrap());
    let (lr, grad) = (number("lr"), grads.flat());
    moments.0 = &moments.0 * beta1 + grad * (1.0 - beta1);
    moments.1 = &moments.1 * beta2 + grad.square() * (1.0 - beta2);
    let mean = &moments.0 / (1.0 - beta1.powi(step));
    let root = (&moments.1 / (1.0 - beta2.powi(step))).sqrt() + number("eps");
    let mut flat = parameters.flat().shallow_clone();
    flat *= 1.0 - lr * number("weight_decay");
    flat -= mean / root * lr;
}

fn three_steps(fixture: &Fixture, variant: &str, decoder: &mut Decoder) {
    let batch = fixture.batch();
    let mut moments = {
        let flat = decoder.adapters().unwrap().flat();
        (flat.zeros_like(), flat.zeros_like())
    };
    for step in 0..3 {
        let mut grads = decoder.adapters().unwrap().zeros_like();
        let loss = decoder.loss_and_grad(&batch, &whole_step(&batch), &mut grads).unwrap();
        check(fixture, &format!("{variant}.loss.{step}"), &losses(&loss));
        adamw_step(decoder.adapters().unwrap(), &grads, &mut moments, step + 1, fixture);
        decoder.adapters_changed().expect("copies are made");
    }
}

#[test]
fn three_steps_of_adamw() {
    for fixture in fixture::all() {
        for (variant, quantization) in VARIANTS {
            let mut decoder = fixture.adapted(quantization, 0.0);
            three_steps(&fixture, variant, &mut decoder);
            if variant == "none" {
                // Adam moves an element by about the learning rate however small its gradient, so errors of all
                // tensors are of one size: the yardstick is the worst of them, one tensor's is a noisy sample.
                let references =
                    decoder.adapters().unwrap().iter().map(|(name, _)| format!("none.after.{name}"));
                let yardstick = references.map(|name| fixture.yardstick(&name)).fold(0.0, f64::max);
                for (name, parameter) in decoder.adapters().unwrap().iter() {
                    let name = format!("none.after.{name}");
                    let what = format!("{} {name}", fixture.name);
                    assert_close(&what, &parameter, fixture.reference(&name), yardstick);
                }
            }
        }
    }
}

#[test]
fn nf4_parts_are_those_of_bitsandbytes() {
    for fixture in fixture::all() {
        for layer in 0..fixture.config.num_hidden_layers {
            for projection in Projection::ALL {
                let name = format!("{}.weight", projection.path(layer));
                let ours = Nf4Weight::quantize(&fixture.weights[&name]).unwrap();
                let same = |part: &str, ours: &Tensor| {
                    let reference = fixture.reference(&format!("nf4.weight.{name}.{part}"));
                    assert_same(&format!("{} {name} {part}", fixture.name), &ours.flatten(0, -1), reference);
                };
                same("packed", &ours.packed);
                same("absmax", &ours.absmax);
                same("nested_absmax", &ours.nested_absmax);
                same("nested_offset", &Tensor::from_slice(&[ours.nested_offset]));
            }
        }
    }
}

#[test]
fn weights_and_updates_can_be_asked_for() {
    for fixture in fixture::all() {
        let dense = fixture.adapted(Quantization::None, 0.0);
        let nf4 = fixture.adapted(Quantization::Nf4, 0.0);
        for (layer, projection) in (0..fixture.config.num_hidden_layers).zip(Projection::ALL) {
            let path = projection.path(layer);
            let stored = fixture.weights[&format!("{path}.weight")].to_kind(Kind::Float);
            assert_same(&path, &dense.base_weight(layer, projection), &stored);
            let dequantised = Nf4Weight::quantize(&stored).unwrap().dequantize(Kind::Float);
            assert_same(&path, &nf4.base_weight(layer, projection), &dequantised);

            let (a, b) = (
                &fixture.adapter[&format!("{path}.lora_A.weight")],
                &fixture.adapter[&format!("{path}.lora_B.weight")],
            );
            let reference = b.to_kind(Kind::Double).matmul(&a.to_kind(Kind::Double)) * fixture.lora().scale();
            let yardstick = super::tolerance::distance(&(b.matmul(a) * fixture.lora().scale()), &reference);
            assert_close(&path, &dense.lora_delta(layer, projection).unwrap(), &reference, yardstick);
        }
    }
}

#[test]
fn adapters_can_be_switched_off() {
    for fixture in fixture::all() {
        let batch = fixture.batch();
        let mut decoder = fixture.adapted(Quantization::None, 0.0);
        let on = decoder.logits(&batch, &all_rows(&batch)).unwrap();
        decoder.enable_adapters(false);
        check(&fixture, "none.base.logits", &decoder.logits(&batch, &all_rows(&batch)).unwrap());
        decoder.enable_adapters(true);
        assert_same(fixture.name, &decoder.logits(&batch, &all_rows(&batch)).unwrap(), &on);
    }
}

#[test]
fn a_fresh_adapter_is_initialised_as_in_peft() {
    for fixture in fixture::all() {
        let batch = fixture.batch();
        let mut decoder = fixture.decoder(Quantization::None);
        decoder.attach_lora(&fixture.lora(), 5).unwrap();
        check(&fixture, "none.base.logits", &decoder.logits(&batch, &all_rows(&batch)).unwrap());

        let mut grads = decoder.adapters().unwrap().zeros_like();
        decoder.loss_and_grad(&batch, &whole_step(&batch), &mut grads).unwrap();
        for ((name, parameter), (_, grad)) in decoder.adapters().unwrap().iter().zip(grads.iter()) {
            let (size, slope) = (parameter.abs().max().double_value(&[]), grad.abs().max().double_value(&[]));
            if name.ends_with("lora_B.weight") {
                assert!(size == 0.0 && slope > 0.0, "{name}: {size}, gradient {slope}");
                continue;
            }
            // Kaiming-uniform with a = sqrt(5): uniform within 1/sqrt(in). Of at least 192 draws the largest is near it.
            let bound = 1.0 / (parameter.size()[1] as f64).sqrt();
            assert!(size <= bound && size > 0.95 * bound, "{name}: {size}, bound {bound}");
            assert!(parameter.mean(Kind::Float).abs().double_value(&[]) < 0.2 * bound, "{name}: not centred");
            assert!(slope == 0.0, "{name}: lora_B is zero, so this gradient must be: {slope}");
        }

        let mut again = fixture.decoder(Quantization::None);
        again.attach_lora(&fixture.lora(), 5).unwrap();
        assert_same("same seed", again.adapters().unwrap().flat(), decoder.adapters().unwrap().flat());
        let mut other = fixture.decoder(Quantization::None);
        other.attach_lora(&fixture.lora(), 6).unwrap();
        assert!(!other.adapters().unwrap().flat().equal(decoder.adapters().unwrap().flat()), "other seed");
    }
}
