//! The decoder's elementwise kernels through their public functions, on views of packed rows as the decoder has them.

use granite::kernels::cross_entropy::{IGNORE, cross_entropy_into, cross_entropy_logits_reference};
use granite::kernels::rms_norm::{
    add_rms_norm_into, rms_norm_backward_into, rms_norm_backward_reference, rms_norm_into, rms_norm_reference,
};
use granite::kernels::rope::{RotaryAngles, RotaryTable, rotate_in_place};
use granite::kernels::swiglu::{
    swiglu_backward_into, swiglu_backward_reference, swiglu_into, swiglu_reference,
};
use tch::{Device, Kind, Tensor};

use crate::gpu::gpu;

const TOKENS: i64 = 37;
const HIDDEN: i64 = 576;

fn random(columns: i64, device: Device) -> Tensor {
    Tensor::randn([TOKENS, columns], (Kind::BFloat16, device))
}

fn empty(columns: i64, device: Device) -> Tensor {
    Tensor::zeros([TOKENS, columns], (Kind::BFloat16, device))
}

/// That two results in bf16 differ by roundings only: 2⁻⁶ of the larger of one and what was wanted.
fn assert_near(what: &str, found: &Tensor, wanted: &Tensor) {
    let (found, wanted) = (found.to_kind(Kind::Float), wanted.to_kind(Kind::Float));
    let allowed = wanted.abs().clamp_min(1.0) / 64.0;
    let worst = ((found - wanted).abs() / allowed).max().double_value(&[]);
    assert!(worst <= 1.0, "{what}: {worst} of what is allowed");
}

#[test]
fn a_norm_joins_its_residual() {
    let Some(device) = gpu("rms_norm through its public functions") else { return };
    let (x, branch, dy) = (random(HIDDEN, device), random(HIDDEN, device), random(HIDDEN, device));
    let weight = random(HIDDEN, device).get(0);
    let rstd = Tensor::zeros([TOKENS], (Kind::Float, device));
    let y = empty(HIDDEN + 64, device).narrow(1, 0, HIDDEN);
    rms_norm_into(&x, &weight, 1e-5, &y, &rstd).expect("the kernel runs");
    assert_near("y", &y, &rms_norm_reference(&x, &weight, 1e-5).y);

    let sum = empty(HIDDEN, device);
    add_rms_norm_into(&x, &branch, 0.22, &weight, 1e-5, &sum, &y, &rstd).expect("the kernel runs");
    assert!(sum.equal(&(&x + &branch * 0.22)));
    let twin = rms_norm_reference(&sum, &weight, 1e-5);
    assert_near("y of the sum", &y, &twin.y);

    let wanted = &branch + rms_norm_backward_reference(&dy, &sum, &weight, &twin.rstd);
    rms_norm_backward_into(&dy, &sum, &weight, &rstd, &branch, &branch).expect("the kernel runs");
    assert_near("dx", &branch, &wanted);
    assert!(rms_norm_into(&x, &weight.to_device(Device::Cpu), 1e-5, &y, &rstd).is_err());
}

#[test]
fn queries_and_keys_turn_and_values_stay() {
    let Some(device) = gpu("rope through its public function") else { return };
    let (turned, heads, head_dim) = (12, 15, 64);
    let qkv = random(heads * head_dim, device).view([TOKENS, heads, head_dim]);
    let before = qkv.copy();
    let positions = Tensor::arange(TOKENS, (Kind::Int64, device));
    let table = RotaryTable::new(&positions, head_dim, 1e4).expect("positions");
    rotate_in_place(&qkv.narrow(1, 0, turned), &table, false).expect("the kernel runs");
    let angles = RotaryAngles::new(&positions, head_dim, 1e4, Kind::Float);
    let wanted = angles.rotate(&before.narrow(1, 0, turned).to_kind(Kind::Float));
    assert_near("queries and keys", &qkv.narrow(1, 0, turned), &wanted);
    assert!(qkv.narrow(1, turned, 3).equal(&before.narrow(1, turned, 3)));
    rotate_in_place(&qkv.narrow(1, 0, turned), &table, true).expect("the kernel runs");
    assert_near("turned back", &qkv, &before);
}

#[test]
fn an_activation_gives_way_to_its_gradient() {
    let Some(device) = gpu("swiglu through its public functions") else { return };
    let inter = 1536;
    let (gate_up, dy) = (random(2 * inter, device), random(inter, device));
    let halves = gate_up.copy().chunk(2, 1);
    let activation = swiglu_reference(&halves[0], &halves[1]);
    let y = empty(inter + 64, device).narrow(1, 0, inter);
    swiglu_into(&gate_up, &y).expect("the kernel runs");
    assert_near("y", &y, &activation);

    let (dgate, dup) = swiglu_backward_reference(&dy, &halves[0], &halves[1]);
    swiglu_backward_into(&dy, &gate_up, Some(&dy)).expect("the kernel runs");
    assert_near("gradients", &gate_up, &Tensor::cat(&[dgate, dup], 1));
    assert_near("y over dy", &dy, &activation);
}

#[test]
fn logits_give_way_to_their_gradient() {
    let Some(device) = gpu("cross_entropy through its public function") else { return };
    let (vocab, columns) = (49_155, 49_280);
    let logits = random(columns, device);
    let labels = Tensor::randint(vocab, [TOKENS], (Kind::Int64, device));
    let _ = labels.get(3).fill_(IGNORE);
    let (wanted, gradient) = cross_entropy_logits_reference(&logits, &labels, vocab, 0.25, Some(512.0));
    let losses = Tensor::zeros([TOKENS], (Kind::Float, device));
    cross_entropy_into(&logits, &labels, vocab, 0.25, Some(512.0), &losses).expect("the kernel runs");
    assert_near("losses", &losses, &wanted);
    assert_near("gradient", &logits, &gradient.expect("asked for"));
}
