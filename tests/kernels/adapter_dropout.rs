//! Products with dropped inputs through their public functions: autograd of the plain formula gives the same.

use granite::kernels::adapter_dropout::{Products, Share};
use granite::kernels::dropout::{DropoutKey, dropout};
use granite::kernels::gemm::Gemm;
use tch::{Device, Kind, Tensor};

const P: f64 = 0.25;
const FACTOR: f64 = 0.75;
const RANKS: [i64; 2] = [8, 16];

fn shares() -> Vec<Share> {
    let key = |module| DropoutKey { seed: 11, microbatch: 2, module };
    let share = |column, rank, module| Share { column, columns: rank, rank, key: key(module) };
    vec![share(0, RANKS[0], 5), share(RANKS[0], RANKS[1], 6)]
}

/// `factor * drop(x) * A^T` of all shares side by side, by tensors alone.
fn formula(x: &Tensor, a: &Tensor) -> Tensor {
    let parts = shares().into_iter().map(|share| {
        let ones = Tensor::ones(x.size(), (Kind::Float, Device::Cpu));
        let mask = dropout(&ones, P, share.key).expect("a mask").to_device(x.device());
        (x * mask).matmul(&a.narrow(0, share.column, share.columns).tr()) * FACTOR
    });
    Tensor::cat(&parts.collect::<Vec<_>>(), 1)
}

fn near(what: &str, found: &Tensor, wanted: &Tensor, tolerance: f64) {
    let error = (found.to_kind(Kind::Float) - wanted).abs().max().double_value(&[]);
    let size = wanted.abs().max().double_value(&[]);
    assert!(error <= tolerance * size, "{what}: off by {error:e} of {size:e}");
}

/// Everything in `kind`, against autograd in f32 on the same values.
fn compare(device: Device, kind: Kind, tolerance: f64) {
    let columns = RANKS.iter().sum::<i64>();
    let random = |rows, columns| Tensor::randn([rows, columns], (Kind::Float, device)).to_kind(kind);
    let (x, a, d) = (random(150, 72), random(columns, 72), random(150, columns));
    let leaf = |values: &Tensor| values.to_kind(Kind::Float).detach().set_requires_grad(true);
    let (wide_x, wide_a) = (leaf(&x), leaf(&a));
    let wanted = formula(&wide_x, &wide_a);
    (&wanted * d.to_kind(Kind::Float)).sum(Kind::Float).backward();

    let gemm = Gemm::new(device).expect("products");
    let products = Products { a: &a, shares: shares(), p: P };
    let scratch = x.empty_like();
    let (out, kept) = (d.empty_like(), d.empty_like());
    products.input(&gemm, &x, [&out, &kept], FACTOR, &scratch).expect("the product");
    near("the product", &out, &wanted, tolerance);
    assert!(kept.equal(&out));

    let dx = x.zeros_like();
    products.to_input(&gemm, &d, &dx, FACTOR, &scratch).expect("the input's gradient");
    near("the input's gradient", &dx, &wide_x.grad(), tolerance);

    let gradients = RANKS.map(|rank| Tensor::ones([rank, 72], (Kind::Float, device)));
    products.to_a(&gemm, &d, &x, &gradients, FACTOR, &scratch).expect("the gradient of A");
    near("the gradient of A", &(Tensor::cat(&gradients, 0) - 1.0), &wide_a.grad(), tolerance);
}

#[test]
fn the_twins_are_autograd() {
    compare(Device::Cpu, Kind::Float, 1e-5);
}

#[test]
fn the_kernels_are_autograd() {
    let Some(device) = crate::gpu::gpu("adapters' products with dropped inputs") else { return };
    compare(device, Kind::BFloat16, 1.0 / 128.0);
}
