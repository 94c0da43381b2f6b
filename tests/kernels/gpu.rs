//! Each kernel against its twin, where there is a GPU.

use granite::kernels::adamw;
use granite::kernels::check;
use granite::kernels::device;
use granite::kernels::dropout::{DropoutKey, dropout, dropout_reference};
use tch::{Device, Kind, Tensor};

use crate::skipped;

pub fn gpu(what: &str) -> Option<Device> {
    match device::cuda() {
        Ok(device) => Some(device),
        Err(error) => {
            skipped(what, &error.to_string());
            None
        }
    }
}

#[test]
fn kernels_equal_their_twins() {
    let Some(device) = gpu("kernels against their twins") else { return };
    let seed = std::time::UNIX_EPOCH.elapsed().map_or(0, |time| i64::from(time.subsec_nanos()));
    let library = crate::bitsandbytes::cuda_library();
    let failures: Vec<String> = check::run(device, seed, library.as_ref(), &check::Selection::default())
        .into_iter()
        .filter_map(|check| Some(format!("{}: {}", check.name, check.failure?)))
        .collect();
    assert!(failures.is_empty(), "seed {seed}: {}", failures.join("\n"));
}

#[test]
fn dropout_on_the_gpu_is_dropout() {
    let Some(device) = gpu("dropout through its public function") else { return };
    let key = DropoutKey { seed: 3, microbatch: 1, module: 4 };
    for kind in [Kind::Float, Kind::BFloat16] {
        let x = Tensor::randn([129, 577], (kind, Device::Cpu));
        let found = dropout(&x.to_device(device), 0.1, key).expect("the kernel runs");
        assert_eq!(found.device(), device);
        let wanted = dropout_reference(&x, 0.1, key).expect("the twin runs");
        assert!(found.to_device(Device::Cpu).equal(&wanted), "{kind:?}");
    }
    let strided = Tensor::zeros([8, 8], (Kind::Float, device)).tr();
    assert!(dropout(&strided, 0.1, key).is_err());
    let empty = Tensor::zeros([0], (Kind::Float, device));
    assert_eq!(dropout(&empty, 0.1, key).expect("nothing to do").size(), [0]);
}

/// Three updates of 5,000 parameters with 8-bit moments: the parameters, and the norm squared of the last gradient.
fn adamw_steps(device: Device, start: &Tensor, gradients: &Tensor) -> (Tensor, f64) {
    let (p, len) = (start.to_device(device).copy(), start.numel() as i64);
    let (m, v) = (adamw::zero_codes(len, true, device), adamw::zero_codes(len, false, device));
    let partials = Tensor::zeros([adamw::GRAD_PARTIALS], (Kind::Double, device));
    let norm = Tensor::zeros([1], (Kind::Double, device));
    for step in 1..=3 {
        let settings = adamw::AdamWStep {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.01,
            correction1: 1.0 - 0.9f64.powi(step),
            correction2: (1.0 - 0.99f64.powi(step)).sqrt(),
            max_norm: 1.0,
        };
        let g = gradients.get(i64::from(step) - 1).to_device(device);
        adamw::norm_squared(&g, &partials, &norm).expect("the kernel runs");
        adamw::adamw_8bit(&p, None, &g, (&m.0, &m.1), (&v.0, &v.1), &norm, &settings)
            .expect("the kernel runs");
    }
    (p.to_device(Device::Cpu), norm.double_value(&[0]))
}

#[test]
fn adamw_on_the_gpu_is_adamw() {
    let Some(device) = gpu("AdamW through its public functions") else { return };
    let start = Tensor::randn([5000], (Kind::Float, Device::Cpu));
    let gradients = Tensor::randn([3, 5000], (Kind::Float, Device::Cpu));
    let (found, norm) = adamw_steps(device, &start, &gradients);
    let (wanted, wanted_norm) = adamw_steps(Device::Cpu, &start, &gradients);
    assert!((norm / wanted_norm - 1.0).abs() < 1e-12, "{norm}, on the CPU {wanted_norm}");
    // A moment that lies between two levels as nearly as f32 can tell may be coded either way: a few steps differ.
    let off = (&found - &wanted).abs();
    assert!(off.mean(Kind::Double).double_value(&[]) < 1e-6, "{off}");
    let again = adamw_steps(device, &start, &gradients);
    assert!(again.0.equal(&found) && again.1 == norm, "three steps do not repeat");
}
