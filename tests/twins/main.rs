//! The twins' written-out backward passes against libtorch's autograd.
//!
//! Each operation is written once more, independently, in f64 with autograd (the reference) and in f32 with
//! autograd (the yardstick): in the mean ours may err at most twice as much as libtorch's own f32 does.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use granite::kernels::attention::{
    attention_backward_reference, attention_reference, cached_attention_reference,
};
use granite::kernels::cross_entropy::{cross_entropy_reference, cross_entropy_with_grad_reference};
use granite::kernels::rms_norm::{rms_norm_backward_reference, rms_norm_reference};
use granite::kernels::rope::RotaryAngles;
use granite::kernels::swiglu::{swiglu_backward_reference, swiglu_reference};
use tch::{Device, Kind, Tensor};

fn randn(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

/// Outputs and input gradients of `f` under autograd, computed in `kind`; `d_out` weighs the output.
fn autograd(f: impl Fn(&[Tensor]) -> Tensor, inputs: &[&Tensor], d_out: &Tensor, kind: Kind) -> Vec<Tensor> {
    let leaves: Vec<Tensor> =
        inputs.iter().map(|x| x.to_kind(kind).detach().copy().set_requires_grad(true)).collect();
    let y = f(&leaves);
    (&y * d_out.to_kind(kind)).sum(kind).backward();
    let mut all = vec![y.detach()];
    all.extend(leaves.iter().map(Tensor::grad));
    all
}

/// Errors of one result over several draws.
#[derive(Default, Clone, Copy)]
struct Errors {
    squares: f64,
    count: f64,
    most: f64,
}

impl Errors {
    fn add(&mut self, x: &Tensor, reference: &Tensor) {
        let errors = (x.to_kind(Kind::Double) - reference).abs();
        let most = errors.max().double_value(&[]);
        assert!(most.is_finite(), "a result is no number");
        self.squares += errors.square().sum(Kind::Double).double_value(&[]);
        self.count += errors.numel() as f64;
        self.most = self.most.max(most);
    }

    /// The root of the mean square.
    fn mean(self) -> f64 {
        (self.squares / self.count).sqrt()
    }
}

/// The errors of one operation over several draws: ours, libtorch's f32, and the reference's own rounding, by result.
///
/// The worst error is drawn from a tail and may favour libtorch by luck, which its kernels for a processor decide; the
/// mean does not.
#[derive(Default)]
struct Held {
    results: Vec<[Errors; 3]>,
}

impl Held {
    fn add(&mut self, ours: &[Tensor], f: impl Fn(&[Tensor]) -> Tensor, inputs: &[&Tensor], d_out: &Tensor) {
        let reference = autograd(&f, inputs, d_out, Kind::Double);
        let yardstick = autograd(&f, inputs, d_out, Kind::Float);
        self.results.resize(ours.len(), Default::default());
        for (index, result) in self.results.iter_mut().enumerate() {
            assert_eq!(ours[index].size(), reference[index].size(), "shape of result {index}");
            let rounded = reference[index].to_kind(Kind::Float);
            for (errors, x) in result.iter_mut().zip([&ours[index], &yardstick[index], &rounded]) {
                errors.add(x, &reference[index]);
            }
        }
    }

    /// `rms(ours − ref) ≤ 2·rms(libtorch32 − ref) + 2·rms(rounding(ref))`, and the same of `max` with 4 for 2.
    fn assert_close(&self, what: &str) {
        for (index, result) in self.results.iter().enumerate() {
            let (means, most) = (result.map(|errors| errors.mean()), result.map(|errors| errors.most));
            for (how, times, [ours, theirs, rounding]) in
                [("in the mean", 2.0, means), ("at most", 4.0, most)]
            {
                assert!(
                    ours <= times * (theirs + rounding),
                    "{what}: result {index} errs by {ours:e} {how}, libtorch's f32 by {theirs:e}"
                );
            }
        }
    }
}

/// Draws per shape.
const DRAWS: usize = 8;

#[test]
fn rms_norm_backward() {
    let mut held = Held::default();
    for (tokens, hidden) in [(1, 1), (3, 7), (65, 129)].repeat(DRAWS) {
        let (x, w, dy) = (randn(&[tokens, hidden]), randn(&[hidden]), randn(&[tokens, hidden]));
        // Away from zero: there a single number has no gradient but rounding, and the ratio of two roundings says nothing.
        let x = x.sign() * (x.abs() + 0.5);
        let eps = 1e-5;
        let out = rms_norm_reference(&x, &w, eps);
        let dx = rms_norm_backward_reference(&dy, &x, &w, &out.rstd);
        let f = |inputs: &[Tensor]| {
            let x = &inputs[0];
            x * (x.square().mean_dim([-1i64].as_slice(), true, x.kind()) + eps).rsqrt() * w.to_kind(x.kind())
        };
        held.add(&[out.y, dx], f, &[&x], &dy);
    }
    held.assert_close("rms_norm");
}

#[test]
fn swiglu_backward() {
    let mut held = Held::default();
    for _ in 0..DRAWS {
        let (gate, up, dy) = (randn(&[33, 17]) * 4.0, randn(&[33, 17]), randn(&[33, 17]));
        let (d_gate, d_up) = swiglu_backward_reference(&dy, &gate, &up);
        let f = |inputs: &[Tensor]| inputs[0].silu() * &inputs[1];
        held.add(&[swiglu_reference(&gate, &up), d_gate, d_up], f, &[&gate, &up], &dy);
    }
    held.assert_close("swiglu");
}

#[test]
fn rotary_backward_is_the_inverse_rotation() {
    let positions = Tensor::from_slice(&[0i64, 1, 2, 0, 1, 4000]);
    let angles = RotaryAngles::new(&positions, 8, 1e4, Kind::Float);
    let mut held = Held::default();
    for _ in 0..DRAWS {
        let (x, dy) = (randn(&[6, 3, 8]), randn(&[6, 3, 8]));
        // Each pair (i, i + 4) is a complex number turned by its angle; angles are f32 in both.
        let exponents = Tensor::from_slice(&[0f32, 0.25, 0.5, 0.75]);
        let theta =
            positions.to_kind(Kind::Float).unsqueeze(1) * Tensor::pow_scalar(1e4, &exponents).reciprocal();
        let f = |inputs: &[Tensor]| {
            let x = &inputs[0];
            let theta = theta.to_kind(Kind::Float).unsqueeze(1);
            let (c, s) = (theta.cos().to_kind(x.kind()), theta.sin().to_kind(x.kind()));
            let (re, im) = (x.narrow(2, 0, 4), x.narrow(2, 4, 4));
            Tensor::cat(&[&re * &c - &im * &s, &re * &s + &im * &c], 2)
        };
        held.add(&[angles.rotate(&x), angles.rotate_backward(&dy)], f, &[&x], &dy);
    }
    held.assert_close("rope");
}

/// One head at a time, one query at a time: nothing shared with the twin.
fn naive_attention(q: &Tensor, k: &Tensor, v: &Tensor, cu_seqlens: &[i64], scale: f64) -> Tensor {
    let (heads, kv_heads) = (q.size()[1], k.size()[1]);
    let mut rows = Vec::new();
    for span in cu_seqlens.windows(2) {
        for at in span[0]..span[1] {
            let outputs: Vec<Tensor> = (0..heads)
                .map(|head| {
                    let kv = head / (heads / kv_heads);
                    let seen = |x: &Tensor| x.narrow(0, span[0], at + 1 - span[0]).select(1, kv);
                    let scores = seen(k).mv(&q.get(at).get(head)) * scale;
                    scores.softmax(0, q.kind()).unsqueeze(0).matmul(&seen(v)).squeeze_dim(0)
                })
                .collect();
            rows.push(Tensor::stack(&outputs, 0));
        }
    }
    Tensor::stack(&rows, 0)
}

#[test]
fn attention_backward() {
    let mut held = Held::default();
    let shapes = [(1, 1, vec![0, 1]), (4, 2, vec![0, 1, 3, 10, 10, 33]), (6, 2, vec![0, 17, 18])];
    for (heads, kv_heads, cu_seqlens) in shapes.iter().cycle().take(3 * DRAWS * shapes.len()) {
        let (heads, kv_heads) = (*heads, *kv_heads);
        let tokens = *cu_seqlens.last().unwrap();
        let q = randn(&[tokens, heads, 8]) * 2.0;
        let (k, v) = (randn(&[tokens, kv_heads, 8]) * 2.0, randn(&[tokens, kv_heads, 8]));
        let d_o = randn(&[tokens, heads, 8]);
        let scale = 0.3;
        let o = attention_reference(&q, &k, &v, cu_seqlens, scale);
        let (dq, dk, dv) = attention_backward_reference(&d_o, &q, &k, &v, &o, cu_seqlens, scale);
        let f = |x: &[Tensor]| naive_attention(&x[0], &x[1], &x[2], cu_seqlens, scale);
        held.add(&[o, dq, dk, dv], f, &[&q, &k, &v], &d_o);
    }
    held.assert_close("attention");
}

#[test]
fn cached_attention_continues_a_sequence() {
    let (q, k, v) = (randn(&[9, 4, 8]), randn(&[9, 2, 8]), randn(&[9, 2, 8]));
    let whole = attention_reference(&q, &k, &v, &[0, 9], 0.5);
    // As views of a cache that has room for more.
    let [k, v] =
        [k, v].map(|x| Tensor::cat(&[x, randn(&[4, 2, 8])], 0).transpose(0, 1).contiguous().narrow(1, 0, 9));
    for new in 1..=9 {
        let last = cached_attention_reference(&q.narrow(0, 9 - new, new), &k, &v, 0.5);
        let difference = (last - whole.narrow(0, 9 - new, new)).abs().max().double_value(&[]);
        assert!(difference < 1e-6, "{new} new tokens differ by {difference:e}");
    }
}

#[test]
fn cross_entropy_backward_across_chunks() {
    // 1,030 rows are three chunks, the last of six rows.
    let mut held = Held::default();
    for (rows, vocab) in [(1, 3), (1030, 37)].repeat(DRAWS) {
        let (h, head) = (randn(&[rows, 5]), randn(&[vocab, 5]));
        let labels = Tensor::randint(vocab, [rows], (Kind::Int64, Device::Cpu));
        let (scaling, weight) = (2.5, 0.125);
        let (losses, dh) = cross_entropy_with_grad_reference(&h, &head, &labels, scaling, weight);
        assert!(losses.equal(&cross_entropy_reference(&h, &head, &labels, scaling)));
        let f = |x: &[Tensor]| {
            let logits = x[0].matmul(&head.to_kind(x[0].kind()).tr()) / scaling;
            -logits.log_softmax(-1, x[0].kind()).gather(1, &labels.unsqueeze(1), false).squeeze_dim(1)
        };
        let d_out = Tensor::full([rows], weight, (Kind::Float, Device::Cpu));
        held.add(&[losses, dh], f, &[&h], &d_out);
    }
    held.assert_close("cross_entropy");
}
