//! Each kernel against its twin, where there is a GPU.

use granite::kernels::check;
use granite::kernels::device;
use granite::kernels::dropout::{DropoutKey, dropout, dropout_reference};
use tch::{Device, Kind, Tensor};

use crate::skipped;

fn gpu(what: &str) -> Option<Device> {
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
    let failures: Vec<String> = check::all(device, seed, library.as_ref())
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
