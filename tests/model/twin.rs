//! A second decoder, written as plainly as possible: one sequence at a time, no kernels, gradients by libtorch's
//! autograd, in any dtype. In float64 it is the reference, in float32 the yardstick.

use granite::kernels::dropout::{DropoutKey, dropout};
use granite::model::batch::{Batch, IGNORE};
use granite::model::config::ModelConfig;
use granite::model::decoder::{Decoder, GradOptions};
use granite::model::params::ParamSet;
use granite::recipe::Projection;
use tch::{Device, Kind, Tensor};

use super::fixture::{Fixture, Named};
use super::tolerance::{assert_close, distance};

/// What the twin makes of a batch.
pub struct Pass {
    /// `[tokens, vocab]`.
    pub logits: Tensor,
    /// `[seqs]`, nats.
    pub losses: Tensor,
    /// Under the adapter's names.
    pub grads: Named,
}

pub struct Twin<'a> {
    config: &'a ModelConfig,
    kind: Kind,
    weights: Named,
    adapter: Named,
    scale: f64,
    dropout: f64,
}

impl<'a> Twin<'a> {
    /// The twin of `fixture.adapted(Quantization::None, dropout)`.
    pub fn new(fixture: &'a Fixture, dropout: f64, kind: Kind) -> Self {
        let cast = |named: &Named, learn: bool| {
            let one = |tensor: &Tensor| tensor.to_kind(kind).detach().copy().set_requires_grad(learn);
            named.iter().map(|(name, tensor)| (name.clone(), one(tensor))).collect()
        };
        Self {
            config: &fixture.config,
            kind,
            weights: cast(&fixture.weights, false),
            adapter: cast(&fixture.adapter, true),
            scale: fixture.lora().scale(),
            dropout,
        }
    }

    /// Logits, losses and the gradient of `options.scale` times the summed loss.
    pub fn pass(&self, batch: &Batch, options: &GradOptions) -> Pass {
        let logits = self.logits(batch, options);
        let tokens =
            logits.cross_entropy_loss::<Tensor>(&batch.labels, None, tch::Reduction::None, IGNORE, 0.0);
        let losses: Vec<Tensor> =
            bounds(batch).map(|(begin, length)| tokens.narrow(0, begin, length).sum(self.kind)).collect();
        let losses = Tensor::stack(&losses, 0);
        for parameter in self.adapter.values() {
            let mut grad = parameter.grad();
            if grad.defined() {
                let _ = grad.zero_();
            }
        }
        (losses.sum(self.kind) * options.scale).backward();
        let grads =
            self.adapter.iter().map(|(name, parameter)| (name.clone(), parameter.grad().copy())).collect();
        Pass { logits: logits.detach(), losses: losses.detach(), grads }
    }

    fn logits(&self, batch: &Batch, options: &GradOptions) -> Tensor {
        let mut x = self.weight("model.embed_tokens").index_select(0, &batch.input_ids)
            * self.config.embedding_multiplier;
        for layer in 0..self.config.num_hidden_layers {
            let branch = self.norm(&x, &format!("model.layers.{layer}.input_layernorm"));
            x = &x + self.attention(&branch, layer, batch, options) * self.config.residual_multiplier;
            let branch = self.norm(&x, &format!("model.layers.{layer}.post_attention_layernorm"));
            x = &x + self.mlp(&branch, layer, options) * self.config.residual_multiplier;
        }
        let head = if self.config.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" };
        self.norm(&x, "model.norm").matmul(&self.weight(head).transpose(0, 1)) / self.config.logits_scaling
    }

    fn attention(&self, x: &Tensor, layer: usize, batch: &Batch, options: &GradOptions) -> Tensor {
        let ModelConfig { num_attention_heads: heads, num_key_value_heads: kv_heads, head_dim, .. } =
            *self.config;
        let project =
            |projection, heads| self.linear(x, layer, projection, options).view([-1, heads, head_dim]);
        let q = self.rotate(&project(Projection::QProj, heads), &batch.position_ids);
        let k = self.rotate(&project(Projection::KProj, kv_heads), &batch.position_ids);
        let v = project(Projection::VProj, kv_heads);
        let parts: Vec<Tensor> = bounds(batch)
            .map(|(begin, length)| {
                let cut = |t: &Tensor| t.narrow(0, begin, length).transpose(0, 1); // [heads, length, head_dim]
                let shared = |t: &Tensor| cut(t).repeat_interleave_self_int(heads / kv_heads, 0, None);
                let scores = cut(&q).matmul(&shared(&k).transpose(1, 2)) * self.config.attention_multiplier;
                let future = Tensor::ones([length, length], (Kind::Bool, Device::Cpu)).triu(1);
                let weights = scores.masked_fill(&future, f64::NEG_INFINITY).softmax(-1, self.kind);
                weights.matmul(&shared(&v)).transpose(0, 1).reshape([length, heads * head_dim])
            })
            .collect();
        self.linear(&Tensor::cat(&parts, 0), layer, Projection::OProj, options)
    }

    fn mlp(&self, x: &Tensor, layer: usize, options: &GradOptions) -> Tensor {
        let gate = self.linear(x, layer, Projection::GateProj, options).silu();
        let up = self.linear(x, layer, Projection::UpProj, options);
        self.linear(&(gate * up), layer, Projection::DownProj, options)
    }

    fn linear(&self, x: &Tensor, layer: usize, projection: Projection, options: &GradOptions) -> Tensor {
        let path = projection.path(layer);
        let adapter = |name: &str| self.adapter[&format!("{path}.{name}.weight")].transpose(0, 1);
        let kept = x * self.mask(x, layer, projection, options);
        let update = kept.matmul(&adapter("lora_A")).matmul(&adapter("lora_B"));
        x.matmul(&self.weight(&path).transpose(0, 1)) + update * self.scale
    }

    /// What the program's dropout multiplies by: 0 or 1/(1-p).
    fn mask(&self, x: &Tensor, layer: usize, projection: Projection, options: &GradOptions) -> Tensor {
        let ones = Tensor::ones(x.size(), (Kind::Float, Device::Cpu));
        if self.dropout == 0.0 {
            return ones.to_kind(self.kind);
        }
        let index = Projection::ALL.iter().position(|one| *one == projection).unwrap();
        let module = (layer * Projection::ALL.len() + index) as u32;
        let key = DropoutKey { seed: options.seed, microbatch: options.microbatch, module };
        // Recomputed in this dtype: 1/(1-p) rounded to float32 is not the reference's.
        let kept = dropout(&ones, self.dropout, key).unwrap().gt(0.0);
        kept.to_kind(self.kind) / (1.0 - self.dropout)
    }

    fn norm(&self, x: &Tensor, name: &str) -> Tensor {
        let square = x.square().mean_dim([-1i64].as_slice(), true, self.kind);
        x * (square + self.config.rms_norm_eps).rsqrt() * self.weight(name)
    }

    fn rotate(&self, x: &Tensor, position_ids: &Tensor) -> Tensor {
        let half = self.config.head_dim / 2;
        let exponents =
            Tensor::arange(half, (Kind::Double, Device::Cpu)) * (-2.0 / self.config.head_dim as f64);
        let inverse = (exponents * self.config.rope_theta.ln()).exp();
        let angles = (position_ids.to_kind(Kind::Double).unsqueeze(-1) * inverse).unsqueeze(1); // [tokens, 1, half]
        let (cos, sin) = (angles.cos().to_kind(self.kind), angles.sin().to_kind(self.kind));
        let (a, b) = (x.narrow(-1, 0, half), x.narrow(-1, half, half));
        Tensor::cat(&[&a * &cos - &b * &sin, b * cos + a * sin], -1)
    }

    fn weight(&self, name: &str) -> &Tensor {
        &self.weights[&format!("{name}.weight")]
    }
}

fn bounds(batch: &Batch) -> impl Iterator<Item = (i64, i64)> + '_ {
    batch.cu_seqlens.windows(2).map(|pair| (pair[0], pair[1] - pair[0]))
}

/// Asserts that gradients already taken by a decoder are those of the twin of `fixture` on `batch`.
///
/// The largest error of one small tensor is a noisy sample, so the yardstick is the float32 twin's worst error
/// relative to a tensor's largest element, over all tensors of the pass.
pub fn assert_gradients(
    what: &str,
    fixture: &Fixture,
    dropout: f64,
    batch: &Batch,
    options: &GradOptions,
    grads: &ParamSet,
) {
    let reference = Twin::new(fixture, dropout, Kind::Double).pass(batch, options).grads;
    let single = Twin::new(fixture, dropout, Kind::Float).pass(batch, options).grads;
    let largest = |tensor: &Tensor| tensor.abs().max().double_value(&[]);
    let relative = |(name, exact): (&String, &Tensor)| distance(&single[name], exact) / largest(exact);
    let yardstick = reference.iter().map(relative).fold(0.0, f64::max);
    for (name, grad) in grads.iter() {
        let exact = &reference[name];
        assert_close(&format!("{what}: {name}"), &grad, exact, yardstick * largest(exact));
    }
}

/// The gradients that `decoder` takes of `batch`.
pub fn gradients(decoder: &Decoder, batch: &Batch, options: &GradOptions) -> ParamSet {
    let mut grads = decoder.adapters().unwrap().zeros_like();
    decoder.loss_and_grad(batch, options, &mut grads).unwrap();
    grads
}

#[test]
fn the_twin_is_the_oracle() {
    // The twin must deserve to be a reference: in float64 it is what transformers and PEFT say, to rounding.
    for fixture in super::fixture::all() {
        let batch = fixture.batch();
        let options = super::oracle::whole_step(&batch);
        let pass = Twin::new(&fixture, 0.0, Kind::Double).pass(&batch, &options);
        assert_close(fixture.name, &pass.logits, fixture.reference("none.logits"), 0.0);
        assert_close(fixture.name, &pass.losses, fixture.reference("none.loss.0"), 0.0);
        for (name, grad) in &pass.grads {
            let what = format!("{} {name}", fixture.name);
            assert_close(&what, grad, fixture.reference(&format!("none.grad.{name}")), 0.0);
        }
    }
}
