//! The head and the loss in one: logits exist for one chunk of supervised positions at a time, never whole.
//!
//! `logits = h·Wᵀ / scaling`, `loss = lse(logits) − logits[label]`,
//! `dh = (softmax(logits) − onehot(label)) · weight / scaling · W`. The head is frozen, so it has no gradient.

use tch::{Kind, Tensor};

/// Positions per chunk: 512 rows of 49,152 f32 logits are 100 MB.
const CHUNK: i64 = 512;

/// Logits of `h` `[rows, hidden]` under `head` `[vocab, hidden]`, `[rows, vocab]` f32.
pub fn logits_reference(h: &Tensor, head: &Tensor, scaling: f64) -> Tensor {
    let logits = h.matmul(&head.tr()).to_kind(Kind::Float);
    // A division by one would be a pass over the largest tensor of all for nothing.
    if scaling == 1.0 { logits } else { logits / scaling }
}

/// Loss of each row of `h` `[rows, hidden]` against `labels` `[rows]` i64, `[rows]` f32.
pub fn cross_entropy_reference(h: &Tensor, head: &Tensor, labels: &Tensor, scaling: f64) -> Tensor {
    let losses: Vec<Tensor> = chunks(h.size()[0])
        .map(|(start, rows)| {
            let logits = logits_reference(&h.narrow(0, start, rows), head, scaling);
            row_losses(&logits, &labels.narrow(0, start, rows))
        })
        .collect();
    Tensor::cat(&losses, 0)
}

/// As [`cross_entropy_reference`], with the gradient of `weight · Σ loss` with respect to `h` in the dtype of `h`.
pub fn cross_entropy_with_grad_reference(
    h: &Tensor,
    head: &Tensor,
    labels: &Tensor,
    scaling: f64,
    weight: f64,
) -> (Tensor, Tensor) {
    let (mut losses, mut gradients) = (Vec::new(), Vec::new());
    for (start, rows) in chunks(h.size()[0]) {
        let labels = labels.narrow(0, start, rows);
        let logits = logits_reference(&h.narrow(0, start, rows), head, scaling);
        losses.push(row_losses(&logits, &labels));
        let mut d_logits = logits.softmax(-1, Kind::Float);
        let minus_one = Tensor::full([rows, 1], -1.0, (Kind::Float, h.device()));
        let _ = d_logits.scatter_add_(1, &labels.unsqueeze(1), &minus_one);
        let _ = d_logits.g_mul_scalar_(weight / scaling);
        gradients.push(d_logits.to_kind(h.kind()).matmul(head));
    }
    (Tensor::cat(&losses, 0), Tensor::cat(&gradients, 0))
}

fn row_losses(logits: &Tensor, labels: &Tensor) -> Tensor {
    let lse = logits.logsumexp([-1i64].as_slice(), false); // [rows]
    lse - logits.gather(1, &labels.unsqueeze(1), false).squeeze_dim(1)
}

fn chunks(rows: i64) -> impl Iterator<Item = (i64, i64)> {
    (0..rows).step_by(CHUNK as usize).map(move |start| (start, CHUNK.min(rows - start)))
}
