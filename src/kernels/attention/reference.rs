//! The twins: they hold one sequence's score matrix at a time and compute in f32.

use tch::{Kind, Tensor};

/// Attention of `q` `[tokens, heads, head_dim]` to `k`, `v` `[tokens, kv_heads, head_dim]`, each sequence of
/// `cu_seqlens` (`[seqs + 1]`, from 0 to `tokens`) on its own. Gives `[tokens, heads, head_dim]` in the dtype of `q`.
pub fn attention_reference(q: &Tensor, k: &Tensor, v: &Tensor, cu_seqlens: &[i64], scale: f64) -> Tensor {
    let parts: Vec<Tensor> = spans(cu_seqlens)
        .map(|(start, length)| {
            let rows = |x: &Tensor| x.narrow(0, start, length);
            cached_attention_reference(&rows(q), &by_head(&rows(k)), &by_head(&rows(v)), scale)
        })
        .collect();
    Tensor::cat(&parts, 0)
}

/// Attention of the last `q` rows of one sequence to all its keys so far: `q` `[new, heads, head_dim]`,
/// `k`, `v` `[kv_heads, past + new, head_dim]`, as a cache holds them. Gives `[new, heads, head_dim]`.
pub fn cached_attention_reference(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Tensor {
    let (k, v) = (k.to_kind(Kind::Float), v.to_kind(Kind::Float));
    let probabilities =
        masked_scores(&by_group(q, k.size()[0]), &k, q.size()[0], scale).softmax(-1, Kind::Float);
    from_group(&probabilities.bmm(&v), q.size()[1]).to_kind(q.kind())
}

/// The natural logarithm of each row's sum of exponentials in [`attention_reference`], `[heads, tokens]` f32.
pub fn attention_lse_reference(q: &Tensor, k: &Tensor, cu_seqlens: &[i64], scale: f64) -> Tensor {
    let parts: Vec<Tensor> = spans(cu_seqlens)
        .map(|(start, length)| {
            let [q, k] = [q, k].map(|x| x.narrow(0, start, length));
            let scores = masked_scores(&by_group(&q, k.size()[1]), &by_head(&k), length, scale);
            scores.logsumexp([-1i64].as_slice(), false).view([-1, length])
        })
        .collect();
    Tensor::cat(&parts, 1)
}

/// Gradients `(dq, dk, dv)` of [`attention_reference`], in the dtypes of `q`, `k`, `v`.
pub fn attention_backward_reference(
    d_o: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    cu_seqlens: &[i64],
    scale: f64,
) -> (Tensor, Tensor, Tensor) {
    let (mut dq, mut dk, mut dv) = (Vec::new(), Vec::new(), Vec::new());
    for (start, length) in spans(cu_seqlens) {
        let rows = |x: &Tensor| x.narrow(0, start, length);
        let (dq_part, dk_part, dv_part) =
            attend_backward(&rows(d_o), &rows(q), &rows(k), &rows(v), &rows(o), scale);
        dq.push(dq_part);
        dk.push(dk_part);
        dv.push(dv_part);
    }
    (Tensor::cat(&dq, 0), Tensor::cat(&dk, 0), Tensor::cat(&dv, 0))
}

fn spans(cu_seqlens: &[i64]) -> impl Iterator<Item = (i64, i64)> + '_ {
    cu_seqlens.windows(2).map(|pair| (pair[0], pair[1] - pair[0])).filter(|(_, length)| *length > 0)
}

fn attend_backward(
    d_o: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    scale: f64,
) -> (Tensor, Tensor, Tensor) {
    let (heads, kv_heads) = (q.size()[1], k.size()[1]);
    let (queries, keys) = (by_group(q, kv_heads), by_head(k));
    let d_out = by_group(d_o, kv_heads);
    // Softmax again rather than exp(S − lse): in f32 it keeps a digit more where scores are large.
    let p = masked_scores(&queries, &keys, q.size()[0], scale).softmax(-1, Kind::Float);
    let delta = (&d_out * by_group(o, kv_heads)).sum_dim_intlist([-1i64].as_slice(), true, Kind::Float);
    let dv = p.transpose(1, 2).bmm(&d_out); // the sum over a group's heads is part of the product
    let ds = p * (d_out.bmm(&by_head(v).transpose(1, 2)) - delta) * scale;
    let dq = ds.bmm(&keys);
    let dk = ds.transpose(1, 2).bmm(&queries);
    (
        from_group(&dq, heads).to_kind(q.kind()),
        dk.transpose(0, 1).to_kind(k.kind()),
        dv.transpose(0, 1).to_kind(v.kind()),
    )
}

/// `scale · Q·Kᵀ`, −∞ where a key lies after its query; `[kv_heads, group * new, keys]` f32.
fn masked_scores(queries: &Tensor, keys: &Tensor, new: i64, scale: f64) -> Tensor {
    let scores = queries.bmm(&keys.transpose(1, 2)) * scale;
    if new == 1 {
        // The last position sees every key.
        return scores;
    }
    let (rows, columns) = (scores.size()[1], scores.size()[2]);
    let future = Tensor::ones([new, columns], (Kind::Bool, scores.device())).triu(columns - new + 1);
    scores
        .view([-1, rows / new, new, columns])
        .masked_fill(&future, f64::NEG_INFINITY)
        .view([-1, rows, columns])
}

/// `[new, heads, d]` → `[kv_heads, group * new, d]` f32: the query heads that share a key head stand one below the other.
fn by_group(x: &Tensor, kv_heads: i64) -> Tensor {
    let (new, heads, width) = (x.size()[0], x.size()[1], x.size()[2]);
    x.to_kind(Kind::Float).view([new, kv_heads, heads / kv_heads, width]).permute([1, 2, 0, 3]).reshape([
        kv_heads,
        heads / kv_heads * new,
        width,
    ])
}

/// The inverse of [`by_group`], in f32.
fn from_group(x: &Tensor, heads: i64) -> Tensor {
    let (kv_heads, rows, width) = (x.size()[0], x.size()[1], x.size()[2]);
    let group = heads / kv_heads;
    x.view([kv_heads, group, rows / group, width]).permute([2, 0, 1, 3]).reshape([-1, heads, width])
}

/// `[keys, kv_heads, head_dim]` → `[kv_heads, keys, head_dim]` f32.
fn by_head(x: &Tensor) -> Tensor {
    x.to_kind(Kind::Float).transpose(0, 1).contiguous()
}
