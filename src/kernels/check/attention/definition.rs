//! Attention and its gradients in f64, and what kernels may be wrong by: some query rows at a time, so that sequences of any
//! length stay in memory.
//!
//! A kernel rounds probabilities and dS to bf16 before their products. Each rounding is off by 2⁻⁹ of its term at most, to
//! either side, so a sum of such terms is off by about 2⁻⁹ times the root of the sum of their squares; six times that is
//! allowed. Where all terms are alike they are rounded alike, and a sum is off by 2⁻⁹ of itself. Everything else is f32:
//! scores, which are off by a few 2⁻²⁴ of |q|·|k|, and make a probability that much too large or small.

use tch::{Kind, Tensor};

use super::super::tolerance::{F32_NOISE, Reference};

/// Sequences and their operands, all on one device: `q`, `d_o` `[tokens, heads, head_dim]`, `k`, `v`
/// `[tokens, kv_heads, head_dim]`.
#[derive(Debug)]
pub(super) struct Problem {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub d_o: Tensor,
    pub cu_seqlens: Vec<i64>,
    pub scale: f64,
    /// Whether terms of a sum may be rounded alike.
    pub alike: bool,
}

/// An output in f64 and the error that is allowed beside the rounding to its dtype.
#[derive(Debug)]
pub(super) struct Defined {
    pub value: Tensor,
    noise: Tensor,
}

impl Defined {
    /// Judges a kernel's output; `twin` is what computing in f32 gives, `None` where that takes too much memory.
    pub(super) fn judge(&self, what: &str, found: &Tensor, twin: Option<&Tensor>) -> anyhow::Result<()> {
        let rounded = self.value.to_kind(found.kind());
        let terms = &self.noise / F32_NOISE;
        Reference { value: &self.value, twin: twin.unwrap_or(&rounded), terms: Some(&terms), halves: 1.0 }
            .judge(what, found)
    }

    fn cat(parts: &[Self], dimension: i64) -> Self {
        let all = |of: fn(&Self) -> &Tensor| {
            Tensor::cat(&parts.iter().map(of).collect::<Vec<&Tensor>>(), dimension)
        };
        Self { value: all(|one| &one.value), noise: all(|one| &one.noise) }
    }
}

/// What a forward pass gives: `o` `[tokens, heads, head_dim]`, `lse` `[heads, tokens]`.
#[derive(Debug)]
pub(super) struct Forward {
    pub o: Defined,
    pub lse: Defined,
}

/// What a backward pass gives.
#[derive(Debug)]
pub(super) struct Backward {
    pub dq: Defined,
    pub dk: Defined,
    pub dv: Defined,
}

/// Numbers in a matrix of scores that are held at a time: 256 MiB.
const HELD: i64 = 32 << 20;

/// Largest relative error of rounding to bf16, and how many standard errors of a sum are allowed.
const ROUNDING: f64 = 1.0 / (1 << 9) as f64;
const SIGMAS: f64 = 6.0;

/// What a sum loses, at most, because a GPU takes exponentials below f32's smallest normal number, 2⁻¹²⁶, for 0.
const FLUSHED: f64 = f64::from_bits((1023 - 100) << 52);

/// The forward pass.
pub(super) fn forward(problem: &Problem) -> Forward {
    let parts: Vec<(Defined, Defined)> =
        problem.sequences().map(|sequence| sequence.forward(problem)).collect();
    let (o, lse): (Vec<Defined>, Vec<Defined>) = parts.into_iter().unzip();
    Forward { o: Defined::cat(&o, 0), lse: Defined::cat(&lse, 1) }
}

/// The backward pass, with the output `o` as the kernel is given it.
pub(super) fn backward(problem: &Problem, o: &Tensor) -> Backward {
    let parts: Vec<[Defined; 3]> =
        problem.sequences().map(|sequence| sequence.backward(problem, &sequence.rows(o))).collect();
    let mut lists: [Vec<Defined>; 3] = Default::default();
    for part in parts {
        for (list, one) in lists.iter_mut().zip(part) {
            list.push(one);
        }
    }
    let [dq, dk, dv] = lists.map(|list| Defined::cat(&list, 0));
    Backward { dq, dk, dv }
}

impl Problem {
    fn sequences(&self) -> impl Iterator<Item = Sequence> + '_ {
        let bounds = self.cu_seqlens.windows(2).map(|pair| (pair[0], pair[1] - pair[0]));
        bounds.filter(|(_, length)| *length > 0).map(|(start, length)| Sequence::new(self, start, length))
    }

    /// What is allowed of a sum of rounded terms: `squares` is the sum of their squares, `magnitudes` that of their magnitudes.
    fn rounding(&self, squares: &Tensor, magnitudes: &Tensor) -> Tensor {
        let rounding =
            if self.alike { magnitudes * (2.0 * ROUNDING) } else { squares.sqrt() * (SIGMAS * ROUNDING) };
        rounding + FLUSHED
    }
}

/// One sequence, in f64.
struct Sequence {
    start: i64,
    length: i64,
    group: i64,
    /// `[length, heads, head_dim]`.
    q: Tensor,
    d_o: Tensor,
    /// `[kv_heads, length, head_dim]`.
    k: Tensor,
    v: Tensor,
    /// Error of a score in f32, at most.
    score_noise: f64,
}

impl Sequence {
    fn new(problem: &Problem, start: i64, length: i64) -> Self {
        let rows = |x: &Tensor| x.narrow(0, start, length).to_kind(Kind::Double);
        let [q, d_o] = [&problem.q, &problem.d_o].map(rows);
        let [k, v] = [&problem.k, &problem.v].map(|x| rows(x).transpose(0, 1).contiguous());
        let longest =
            |x: &Tensor| x.square().sum_dim_intlist([-1i64].as_slice(), false, Kind::Double).max().sqrt();
        let largest = (longest(&q) * longest(&k)).double_value(&[]) * problem.scale.abs();
        let group = problem.q.size()[1] / problem.k.size()[1];
        Self { start, length, group, q, d_o, k, v, score_noise: F32_NOISE * (1.0 + largest / 2.0) }
    }

    fn rows(&self, x: &Tensor) -> Tensor {
        x.narrow(0, self.start, self.length).to_kind(Kind::Double)
    }

    /// Stretches of query rows.
    fn slices(&self) -> impl Iterator<Item = (i64, i64)> + use<> {
        let heads = self.q.size()[1];
        let (length, most) = (self.length, (HELD / (heads * self.length)).max(64));
        (0..length).step_by(most as usize).map(move |first| (first, most.min(length - first)))
    }

    /// `[rows, heads, head_dim]` → `[kv_heads, group · rows, head_dim]`.
    fn by_group(&self, x: &Tensor, first: i64, rows: i64) -> Tensor {
        let size = x.size();
        let (heads, width) = (size[1], size[2]);
        let kv_heads = heads / self.group;
        x.narrow(0, first, rows).view([rows, kv_heads, self.group, width]).permute([1, 2, 0, 3]).reshape([
            kv_heads,
            self.group * rows,
            width,
        ])
    }

    /// The inverse.
    fn by_row(&self, x: &Tensor, rows: i64) -> Tensor {
        let size = x.size();
        x.view([size[0], self.group, rows, size[2]]).permute([2, 0, 1, 3]).reshape([rows, -1, size[2]])
    }

    /// Scores of query rows with all keys up to the last of them, `[kv_heads, group · rows, keys]`.
    fn scores(&self, first: i64, rows: i64, scale: f64) -> Tensor {
        let keys = first + rows;
        let q = self.by_group(&self.q, first, rows);
        let scores = q.bmm(&self.k.narrow(1, 0, keys).transpose(1, 2)) * scale;
        let size = scores.size();
        let future = Tensor::ones([rows, keys], (Kind::Bool, scores.device())).triu(first + 1);
        scores.view([size[0], self.group, rows, keys]).masked_fill(&future, f64::NEG_INFINITY).view_(size)
    }

    fn forward(&self, problem: &Problem) -> (Defined, Defined) {
        let (mut o, mut lse) = (Vec::new(), Vec::new());
        for (first, rows) in self.slices() {
            let scores = self.scores(first, rows, problem.scale);
            let sums = scores.logsumexp([-1i64].as_slice(), true);
            let p = (scores - &sums).exp();
            let v = self.v.narrow(1, 0, first + rows);
            let rounding = problem.rounding(&p.square().bmm(&v.square()), &p.bmm(&v.abs()));
            // An error of a score moves weight between a key and the others.
            let moved = (&p - p.square()).bmm(&v.abs()) * self.score_noise.min(1.0);
            let f32_noise = p.bmm(&v.abs()) * F32_NOISE;
            o.push(Defined {
                value: self.by_row(&p.bmm(&v), rows),
                noise: self.by_row(&(rounding + moved + f32_noise), rows),
            });
            let value = sums.view([-1, rows]);
            lse.push(Defined { noise: value.abs() * F32_NOISE + self.score_noise, value });
        }
        (Defined::cat(&o, 0), Defined::cat(&lse, 1))
    }

    fn backward(&self, problem: &Problem, o: &Tensor) -> [Defined; 3] {
        let scale = problem.scale;
        let mut dq = Vec::new();
        let mut dk = Sums::like(&self.k);
        let mut dv = Sums::like(&self.v);
        for (first, rows) in self.slices() {
            let keys = first + rows;
            let (k, v) = (self.k.narrow(1, 0, keys), self.v.narrow(1, 0, keys));
            let [q, d_o, o] = [&self.q, &self.d_o, o].map(|x| self.by_group(x, first, rows));
            let scores = self.scores(first, rows, scale);
            let p = (&scores - scores.logsumexp([-1i64].as_slice(), true)).exp();
            let row_sum = |x: Tensor| x.sum_dim_intlist([-1i64].as_slice(), true, Kind::Double);
            let product = &d_o * &o;
            let (delta, delta_terms) = (row_sum(product.copy()), row_sum(product.abs()));
            let ds = &p * (d_o.bmm(&v.transpose(1, 2)) - delta);
            let ds_terms = &p * (d_o.abs().bmm(&v.abs().transpose(1, 2)) + delta_terms);
            dv.add(keys, &p, &p, &d_o);
            dk.add(keys, &ds, &ds_terms, &q);
            let rounding = problem.rounding(&ds.square().bmm(&k.square()), &ds.abs().bmm(&k.abs()));
            let noise = (rounding + ds_terms.bmm(&k.abs()) * self.score_noise) * scale.abs();
            dq.push(Defined {
                value: self.by_row(&(ds.bmm(&k) * scale), rows),
                noise: self.by_row(&noise, rows),
            });
        }
        let [dk, dv] = [(dk, scale), (dv, 1.0)].map(|(sums, by)| sums.defined(problem, self.score_noise, by));
        [Defined::cat(&dq, 0), dk, dv]
    }
}

/// A gradient of keys or values that query rows add to, `[kv_heads, length, head_dim]` each.
struct Sums {
    value: Tensor,
    squares: Tensor,
    magnitudes: Tensor,
    terms: Tensor,
}

impl Sums {
    fn like(x: &Tensor) -> Self {
        let zeros = || x.zeros_like();
        Self { value: zeros(), squares: zeros(), magnitudes: zeros(), terms: zeros() }
    }

    /// Adds `weightsᵀ · x`; `terms` are what makes up the weights.
    fn add(&mut self, keys: i64, weights: &Tensor, terms: &Tensor, x: &Tensor) {
        for (sum, weights, x) in [
            (&self.value, weights, x),
            (&self.squares, &weights.square(), &x.square()),
            (&self.magnitudes, &weights.abs(), &x.abs()),
            (&self.terms, terms, &x.abs()),
        ] {
            let _ = sum.narrow(1, 0, keys).g_add_(&weights.transpose(1, 2).bmm(x));
        }
    }

    fn defined(&self, problem: &Problem, score_noise: f64, scale: f64) -> Defined {
        let rounding = problem.rounding(&self.squares, &self.magnitudes);
        let noise = (rounding + &self.terms * score_noise) * scale.abs();
        Defined { value: (&self.value * scale).transpose(0, 1), noise: noise.transpose(0, 1) }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use tch::Device;

    use super::super::autograd;
    use super::*;
    use crate::kernels::attention::{attention_backward_reference, attention_reference};

    fn problem(lengths: &[i64], [heads, kv_heads, head_dim]: [i64; 3]) -> Problem {
        let tokens: i64 = lengths.iter().sum();
        let randn = |heads: i64| Tensor::randn([tokens, heads, head_dim], (Kind::BFloat16, Device::Cpu));
        let mut cu_seqlens = vec![0];
        for length in lengths {
            cu_seqlens.push(cu_seqlens.last().unwrap() + length);
        }
        let [q, d_o] = [randn(heads), randn(heads)];
        let [k, v] = [randn(kv_heads), randn(kv_heads)];
        Problem { q, k, v, d_o, cu_seqlens, scale: 0.2, alike: false }
    }

    #[test]
    fn the_definition_is_what_autograd_finds() {
        let problem = problem(&[5, 1, 0, 130], [6, 2, 8]);
        let forward = forward(&problem);
        let found = backward(&problem, &forward.o.value);
        let [o, dq, dk, dv] = autograd(&problem);
        for (what, found, wanted) in
            [("o", forward.o, o), ("dq", found.dq, dq), ("dk", found.dk, dk), ("dv", found.dv, dv)]
        {
            let error = (&found.value - wanted).abs().max().double_value(&[]);
            assert!(error < 1e-12, "{what}: {error:e}");
            assert!(found.noise.min().double_value(&[]) >= 0.0);
        }
    }

    /// The twins in bf16 stay within what is allowed; a key forgotten, a factor off by 2 % do not.
    #[test]
    fn errors_are_told_from_rounding() {
        let problem = problem(&[300, 40], [4, 2, 64]);
        let Problem { q, k, v, d_o, cu_seqlens, scale, .. } = &problem;
        let forward = forward(&problem);
        let o = attention_reference(q, k, v, cu_seqlens, *scale);
        forward.o.judge("o", &o, None).unwrap();
        assert!(forward.o.judge("o", &(&o * 1.02), None).is_err());
        let late = attention_reference(q, k, &v.roll([1], [0]), cu_seqlens, *scale);
        assert!(forward.o.judge("o", &late, None).is_err());

        let wanted = backward(&problem, &o);
        let (dq, dk, dv) = attention_backward_reference(d_o, q, k, v, &o, cu_seqlens, *scale);
        for (what, defined, found) in [("dq", wanted.dq, dq), ("dk", wanted.dk, dk), ("dv", wanted.dv, dv)] {
            defined.judge(what, &found, None).unwrap();
            assert!(defined.judge(what, &(&found * 1.02), None).is_err(), "{what}");
            let row = found.copy();
            let _ = row.get(150).fill_(0.0);
            assert!(defined.judge(what, &row, None).is_err(), "{what}");
        }
    }
}
