//! AdamW against torch and bitsandbytes (`scripts/oracle/optimizers.py`).

use std::collections::BTreeMap;
use std::path::Path;

use granite::checkpoint::tensor_file::{self, NamedTensors};
use granite::kernels::dynamic_map::dynamic_map;
use granite::model::params::ParamSet;
use granite::recipe::{Optimizer, TrainSpec};
use granite::train::optimizer::AdamW;
use tch::{Device, Kind, Tensor};

const RATES: [f64; 4] = [0.0, 1e-3, 2e-3, 1.5e-3];

fn fixture() -> NamedTensors {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/optimizers.safetensors");
    tensor_file::read(&path).unwrap()
}

fn spec(optimizer: Optimizer) -> TrainSpec {
    TrainSpec {
        optimizer,
        betas: [0.9, 0.99],
        eps: 1e-8,
        weight_decay: 0.05,
        max_grad_norm: 0.0,
        ..TrainSpec::default()
    }
}

/// The tensors `<prefix>.<name>` in one allocation.
fn gather(fixture: &NamedTensors, prefix: &str) -> ParamSet {
    let names = ["whole", "broken", "small"];
    let part = |name: &str| &fixture[&format!("{prefix}.{name}")];
    let set = ParamSet::zeros(names.map(|name| (name.to_string(), part(name).size())), Device::Cpu);
    for (name, mut view) in set.iter() {
        view.copy_(part(name));
    }
    set
}

/// The optimiser and the parameters after all steps of the fixture.
fn stepped(fixture: &NamedTensors, optimizer: Optimizer, through_a_file: bool) -> (AdamW, ParamSet) {
    let parameters = gather(fixture, "initial");
    let mut adamw = AdamW::new(&parameters, &spec(optimizer));
    for (step, rate) in RATES.into_iter().enumerate() {
        if through_a_file {
            let file = tempfile::NamedTempFile::new().unwrap();
            tensor_file::write(file.path(), &adamw.state()).unwrap();
            adamw = AdamW::new(&parameters, &spec(optimizer));
            adamw.restore(&tensor_file::read(file.path()).unwrap()).unwrap();
        }
        let gradients = gather(fixture, &format!("gradient.{step}"));
        adamw.step(&parameters, &gradients, rate, step as u64 + 1).unwrap();
    }
    (adamw, parameters)
}

fn distances(ours: &Tensor, reference: &Tensor) -> (f64, f64) {
    let off = (ours.to_kind(Kind::Double) - reference.to_kind(Kind::Double)).abs();
    (off.max().double_value(&[]), off.mean(Kind::Double).double_value(&[]))
}

#[test]
fn wide_moments_step_as_torch_does() {
    let fixture = fixture();
    let (_, parameters) = stepped(&fixture, Optimizer::AdamW, false);
    for (name, ours) in parameters.iter() {
        let exact = &fixture[&format!("exact.{name}")];
        let torch_is_off = fixture[&format!("error.{name}")].double_value(&[0]);
        let rounding = exact.abs().max().double_value(&[]) * f64::from(f32::EPSILON);
        let (off, _) = distances(&ours, exact);
        assert!(off <= 2.0 * torch_is_off + rounding, "{name}: off by {off:e}, torch by {torch_is_off:e}");
        // The steps moved the parameters by far more than that.
        assert!(distances(&ours, &fixture[&format!("initial.{name}")]).0 > 1e-3);
    }
}

#[test]
fn coded_moments_are_as_near_to_the_exact_steps_as_bitsandbytes() {
    let fixture = fixture();
    let (_, parameters) = stepped(&fixture, Optimizer::AdamW8bit, false);
    for (name, ours) in parameters.iter() {
        let exact = &fixture[&format!("exact.{name}")];
        for label in ["library", "nearest"] {
            let (most, mean) = distances(&fixture[&format!("{label}.{name}")], exact);
            let (off, off_mean) = distances(&ours, exact);
            assert!(off <= 2.0 * most + 1e-8, "{name}: off by {off:e}, {label} by {most:e}");
            assert!(off_mean <= 1.1 * mean + 1e-8, "{name}: off by {off_mean:e}, {label} by {mean:e}");
        }
    }
}

#[test]
fn codes_and_scales_are_those_of_bitsandbytes() {
    let fixture = fixture();
    let state = stepped(&fixture, Optimizer::AdamW8bit, false).0.state();
    for (name, signed) in [("moment1", true), ("moment2", false)] {
        let levels = Tensor::from_slice(&dynamic_map(signed));
        assert!(levels.equal(&fixture[if signed { "code.signed" } else { "code.unsigned" }]));
        for parameter in ["whole", "broken"] {
            let theirs = |what: &str| &fixture[&format!("nearest.{parameter}.{name}.{what}")];
            let ours = |what: &str| &state[&format!("{parameter}.{name}.{what}")];
            let (scales, expected) = (ours("absmax"), theirs("absmax"));
            assert_eq!(scales.size(), expected.size());
            let relative = ((scales - expected).abs() / expected.clamp_min(1e-30)).max().double_value(&[]);
            assert!(relative < 1e-6, "{parameter} {name}: a scale is off by {relative:e} of itself");
            // A code may tip over where two orders of operations round a moment to both sides of a boundary.
            let apart = (ours("codes").to_kind(Kind::Int) - theirs("codes").to_kind(Kind::Int)).abs();
            let tipped = apart.gt(0).sum(Kind::Int64).int64_value(&[]);
            assert!(apart.max().int64_value(&[]) <= 1, "{parameter} {name}");
            assert!(
                tipped * 200 <= apart.size()[0],
                "{parameter} {name}: {tipped} codes of {:?}",
                apart.size()
            );
        }
    }
}

#[test]
fn small_parameters_keep_wide_moments() {
    let state = stepped(&fixture(), Optimizer::AdamW8bit, false).0.state();
    let kinds: BTreeMap<&str, Kind> = state.iter().map(|(name, one)| (name.as_str(), one.kind())).collect();
    assert_eq!(kinds["small.moment1"], Kind::Float);
    assert_eq!(kinds["whole.moment2.codes"], Kind::Uint8);
    // 4,697 elements are 18 blocks and a rest.
    assert_eq!(state["broken.moment1.absmax"].size(), [19]);
}

#[test]
fn moments_survive_their_file_bit_for_bit() {
    let fixture = fixture();
    for optimizer in [Optimizer::AdamW, Optimizer::AdamW8bit] {
        let (through, kept) = (stepped(&fixture, optimizer, true), stepped(&fixture, optimizer, false));
        assert!(through.1.flat().equal(kept.1.flat()), "{optimizer:?}");
        for (name, tensor) in kept.0.state() {
            assert!(through.0.state()[&name].equal(&tensor), "{optimizer:?}: {name}");
        }
    }
}

#[test]
fn moments_of_another_layout_are_refused() {
    let fixture = fixture();
    let parameters = gather(&fixture, "initial");
    let wide = AdamW::new(&parameters, &spec(Optimizer::AdamW)).state();
    let mut coded = AdamW::new(&parameters, &spec(Optimizer::AdamW8bit));
    assert!(coded.restore(&wide).is_err());
    let mut state = coded.state();
    state.insert("whole.moment1.absmax".to_string(), Tensor::zeros([3], (Kind::Float, Device::Cpu)));
    let error = coded.restore(&state).unwrap_err().to_string();
    assert!(error.contains("`whole.moment1.absmax`") && error.contains("[20]"), "{error}");
}

#[test]
fn clipping_is_that_of_torch() {
    let fixture = fixture();
    let expected = fixture["norm"].double_value(&[0]);
    // Adam's first step does not see a gradient's scale, the first moment does.
    let stepped = |gradients: &ParamSet, max_grad_norm: f64| {
        let parameters = gather(&fixture, "initial");
        let spec = TrainSpec { max_grad_norm, ..spec(Optimizer::AdamW) };
        let mut adamw = AdamW::new(&parameters, &spec);
        let norm = adamw.step(&parameters, gradients, 1e-3, 1).unwrap().value();
        (norm, adamw.state().remove("all.moment1").unwrap())
    };
    for (max_norm, factor) in
        [(0.0, 1.0), (expected * 2.0, 1.0), (expected / 4.0, 0.25 / (1.0 + 1e-6 / expected))]
    {
        let gradients = gather(&fixture, "gradient.3");
        let (norm, moment) = stepped(&gradients, max_norm);
        assert!((norm / expected - 1.0).abs() < 1e-6, "{norm}, expected {expected}");
        let wanted = gradients.flat() * (0.1 * factor);
        let (off, _) = distances(&moment, &wanted);
        assert!(off <= 1e-7 * expected, "clipped to {max_norm}: off by {off:e}");
    }
}
