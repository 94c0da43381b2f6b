//! Attention through its public functions, on views of packed rows as the decoder has them: the kernels of
//! attention_forward, attention_backward and attention_gradient, and those for Hopper alone, attention_hopper_forward and
//! attention_hopper_backward.

use granite::kernels::attention::{
    AttentionKernel, AttentionPlan, AttentionScratch, AttentionShape, attention_backward_into,
    attention_backward_reference, attention_into, attention_lse_reference, attention_reference,
};
use tch::{Device, Kind, Tensor};

use crate::gpu::gpu;

const SHAPE: AttentionShape = AttentionShape { heads: 6, kv_heads: 2, head_dim: 64 };
const BOUNDS: [i64; 5] = [0, 130, 130, 131, 500];
const TOKENS: i64 = 500;
const SCALE: f64 = 0.125;

/// Queries, keys and values of packed rows.
fn parts(rows: &Tensor) -> [Tensor; 3] {
    let AttentionShape { heads, kv_heads, head_dim } = SHAPE;
    [(0, heads), (heads, kv_heads), (heads + kv_heads, kv_heads)].map(|(first, count)| {
        rows.narrow(1, first * head_dim, count * head_dim).unflatten(1, [count, head_dim])
    })
}

/// Relative to the norm of what was wanted.
fn error(found: &Tensor, wanted: &Tensor) -> f64 {
    let (found, wanted) = (found.to_kind(Kind::Double), wanted.to_kind(Kind::Double));
    ((found - &wanted).norm() / wanted.norm()).double_value(&[])
}

#[test]
fn gradients_go_straight_into_packed_rows() {
    let Some(device) = gpu("attention through its public functions") else { return };
    let width = (SHAPE.heads + 2 * SHAPE.kv_heads) * SHAPE.head_dim;
    for kernel in AttentionKernel::ours(device, SHAPE.head_dim).expect("a GPU") {
        let options = (Kind::BFloat16, device);
        let rows = Tensor::randn([TOKENS, width], options);
        let d_rows = Tensor::full([TOKENS, width + 64], f64::NAN, options);
        let d_o = Tensor::randn([TOKENS, SHAPE.heads, SHAPE.head_dim], options);
        let (o, lse) = (d_o.zeros_like(), Tensor::zeros([SHAPE.heads, TOKENS], (Kind::Float, device)));
        let plan = AttentionPlan::with(kernel, &BOUNDS, SHAPE, device).expect("a plan");
        let scratch = AttentionScratch::new(SHAPE, 64, 1, device).expect("memory");

        let ([q, k, v], [dq, dk, dv]) = (parts(&rows), parts(&d_rows));
        attention_into([&q, &k, &v], &plan, SCALE, &o, &lse).expect("the kernel runs");
        attention_backward_into(&d_o, [&q, &k, &v], &o, &lse, &plan, SCALE, &scratch, [&dq, &dk, &dv])
            .expect("the kernels run, in scratch memory that grew");

        let (wide, d_wide) = ([&q, &k, &v].map(|x| x.to_kind(Kind::Float)), d_o.to_kind(Kind::Float));
        let [wide_q, wide_k, wide_v] = &wide;
        let wanted = attention_reference(wide_q, wide_k, wide_v, &BOUNDS, SCALE);
        let (want_q, want_k, want_v) =
            attention_backward_reference(&d_wide, wide_q, wide_k, wide_v, &wanted, &BOUNDS, SCALE);
        let lse_wanted = attention_lse_reference(wide_q, wide_k, &BOUNDS, SCALE);
        assert!(error(&lse, &lse_wanted) < 1e-5, "{kernel:?}: lse");
        for (what, found, wanted) in
            [("o", &o, wanted), ("dq", &dq, want_q), ("dk", &dk, want_k), ("dv", &dv, want_v)]
        {
            let error = error(found, &wanted);
            assert!(error < 6e-3, "{kernel:?}: {what} is {error:e} of its norm off");
        }
        let beside = d_rows.narrow(1, width, 64);
        assert!(bool::try_from(&beside.isnan().all()).expect("a bool"), "{kernel:?} wrote beside the rows");
        assert!(plan.is_at_rest().expect("tickets") && scratch.is_at_rest().expect("semaphores"));
    }
}

#[test]
fn what_no_kernel_takes_is_refused() {
    let Some(device) = gpu("attention's limits") else { return };
    let shape = AttentionShape { head_dim: 80, ..SHAPE };
    assert_eq!(AttentionKernel::best(device, 80).expect("a GPU"), AttentionKernel::Libtorch);
    let told = AttentionPlan::new(&BOUNDS, shape, device).expect_err("no kernel of ours").to_string();
    assert!(told.contains("heads of 80"), "{told}");
    let plan = AttentionPlan::new(&BOUNDS, SHAPE, device).expect("a plan");
    let x = Tensor::zeros([TOKENS, SHAPE.heads, SHAPE.head_dim], (Kind::BFloat16, Device::Cpu));
    let lse = Tensor::zeros([SHAPE.heads, TOKENS], (Kind::Float, device));
    assert!(attention_into([&x, &x, &x], &plan, SCALE, &x, &lse).is_err(), "operands on the processor");
}
