//! The head and the loss in one: logits exist for one chunk of supervised positions at a time, never whole.
//!
//! `logits = h·Wᵀ / scaling`, `loss = lse(logits) − logits[label]`,
//! `dh = (softmax(logits) − onehot(label)) · weight / scaling · W`. The head is frozen, so it has no gradient.
//!
//! The kernels of cuda/cross_entropy.cu turn a chunk of bf16 logits, as the head's product leaves them, into losses and
//! gradients in their place.

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use super::gpu::KernelParams;
use super::host::twin_takes;
use super::rows::{Rows, gpu_of, grid, vectorised};

/// A label whose row has no loss and no gradient.
pub const IGNORE: i64 = -100;

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
        gradients.push(row_gradients(&logits, &labels, weight / scaling).to_kind(h.kind()).matmul(head));
    }
    (Tensor::cat(&losses, 0), Tensor::cat(&gradients, 0))
}

/// `(softmax(logits) − onehot(label)) · factor`.
fn row_gradients(logits: &Tensor, labels: &Tensor, factor: f64) -> Tensor {
    let mut gradients = logits.softmax(-1, Kind::Float);
    let minus_one = Tensor::full([labels.size()[0], 1], -1.0, (Kind::Float, logits.device()));
    let _ = gradients.scatter_add_(1, &labels.unsqueeze(1), &minus_one);
    gradients * factor
}

/// [`cross_entropy_into`] in tensor operations, for labels inside the vocabulary.
fn cross_entropy_twin(
    logits: &Tensor,
    labels: &Tensor,
    vocab: i64,
    inverse_scaling: f64,
    gradient: Option<f64>,
    losses: &Tensor,
) -> Result<()> {
    let mut columns = logits.narrow(1, 0, vocab);
    let scaled = &columns * inverse_scaling;
    losses.shallow_clone().f_copy_(&row_losses(&scaled, labels))?;
    if let Some(weight) = gradient {
        let _ = logits.shallow_clone().f_zero_()?;
        columns.f_copy_(&row_gradients(&scaled, labels, weight * inverse_scaling))?;
    }
    Ok(())
}

fn row_losses(logits: &Tensor, labels: &Tensor) -> Tensor {
    let lse = logits.logsumexp([-1i64].as_slice(), false); // [rows]
    lse - logits.gather(1, &labels.unsqueeze(1), false).squeeze_dim(1)
}

fn chunks(rows: i64) -> impl Iterator<Item = (i64, i64)> {
    (0..rows).step_by(CHUNK as usize).map(move |start| (start, CHUNK.min(rows - start)))
}

/// Writes the loss of each row of `logits` against its label to `losses`, and over the logits, when the rows' losses have
/// a weight, the gradient of `weight · Σ loss` with respect to them: `(softmax − onehot) · weight · inverse_scaling`.
///
/// `logits` is a bf16 view `[rows, padded_vocab]` of which the first `vocab` columns count, times `inverse_scaling`; the
/// gradient of the others is 0 and their values take no part. `labels` `[rows]` i64, `losses` `[rows]` f32.
/// A label of [`IGNORE`] gives a loss and a gradient of 0, any other outside `[0, vocab)` no number.
///
/// # Errors
/// When an operand has another dtype, shape or layout, they are not on one GPU, `vocab` does not fit the columns or
/// `inverse_scaling` is not positive.
pub fn cross_entropy_into(
    logits: &Tensor,
    labels: &Tensor,
    vocab: i64,
    inverse_scaling: f64,
    gradient: Option<f64>,
    losses: &Tensor,
) -> Result<()> {
    if twin_takes(logits) {
        return cross_entropy_twin(logits, labels, vocab, inverse_scaling, gradient, losses);
    }
    let logits = Rows::new("logits", logits, Kind::BFloat16)?;
    let labels = Rows::of("labels", labels, Kind::Int64, [1, logits.rows])?;
    let losses = Rows::of("losses", losses, Kind::Float, [1, logits.rows])?;
    ensure!(
        0 < vocab && vocab <= logits.columns && logits.columns <= MAX_COLUMNS,
        "a vocabulary of {vocab} in {} columns, expected 0 < vocab <= columns <= {MAX_COLUMNS}",
        logits.columns
    );
    ensure!(
        inverse_scaling > 0.0 && inverse_scaling.is_finite(),
        "logits are multiplied by {inverse_scaling}, expected a positive number"
    );
    if logits.rows == 0 {
        return Ok(());
    }
    let gpu = gpu_of(&[&logits, &labels, &losses])?;
    let kept = (vocab as u64).div_ceil(8) * 16;
    let fits = kept + STATIC_SHARED <= u64::from(gpu.shared_memory()?);
    let (name, shared) = match (gradient.is_some(), vectorised(&[&logits])) {
        (false, true) => ("cross_entropy", 0),
        (false, false) => ("cross_entropy_any", 0),
        (true, true) if fits => ("cross_entropy_kept", kept),
        (true, true) => ("cross_entropy_reread", 0),
        (true, false) => ("cross_entropy_reread_any", 0),
    };
    let params = CrossEntropyParams {
        logits: logits.address(),
        labels: labels.address(),
        losses: losses.address(),
        stride: logits.stride(),
        columns: u32::try_from(logits.columns)?,
        vocab: u32::try_from(vocab)?,
        inverse_scaling: inverse_scaling as f32,
        weight: gradient.unwrap_or_default() as f32,
    };
    let kernel = gpu.kernel("cross_entropy", name)?;
    let mut shape = grid(logits.rows, THREADS)?;
    shape.shared_mem_bytes = u32::try_from(shared)?;
    // SAFETY: logits are bf16 rows that do not overlap, labels and losses contiguous and as many as rows, all on this GPU;
    // vector accesses only where logits allow them; the kernel that keeps a row gets the shared memory for it.
    unsafe { gpu.launch(kernel, shape, &params) }
}

/// The twin of [`cross_entropy_into`] as a function: losses `[rows]` and, for a weight, the gradient in the shape and
/// dtype of `logits`; arithmetic in f32, or f64 for f64 logits.
pub fn cross_entropy_logits_reference(
    logits: &Tensor,
    labels: &Tensor,
    vocab: i64,
    inverse_scaling: f64,
    gradient: Option<f64>,
) -> (Tensor, Option<Tensor>) {
    let wide = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let z = logits.narrow(1, 0, vocab).to_kind(wide) * inverse_scaling;
    let ignored = labels.eq(IGNORE);
    let unknown = labels.lt(0).logical_or(&labels.ge(vocab)).logical_and(&ignored.logical_not());
    let column = labels.clamp(0, vocab - 1); // of any column where there is none
    let losses = row_losses(&z, &column).masked_fill(&unknown, f64::NAN).masked_fill(&ignored, 0.0);
    let gradient = gradient.map(|weight| {
        let mut d = z.softmax(-1, wide);
        let minus_one = Tensor::full([z.size()[0], 1], -1.0, (wide, z.device()));
        let _ = d.scatter_add_(1, &column.unsqueeze(1), &minus_one);
        let d = (d * (weight * inverse_scaling))
            .masked_fill(&unknown.unsqueeze(1), f64::NAN)
            .masked_fill(&ignored.unsqueeze(1), 0.0);
        d.constant_pad_nd([0, logits.size()[1] - vocab]).to_kind(logits.kind())
    });
    (losses, gradient)
}

/// Threads of a block of the kernels.
const THREADS: u64 = 512;

/// Bytes of a block's shared memory beside the row, rounded up.
const STATIC_SHARED: u64 = 1024;

/// More columns than any vocabulary has; the kernels count in 32 bits.
const MAX_COLUMNS: i64 = 1 << 30;

/// The argument of the kernels in cuda/cross_entropy.cu, field by field as there.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct CrossEntropyParams {
    logits: u64,
    labels: u64,
    losses: u64,
    stride: u64,
    columns: u32,
    vocab: u32,
    inverse_scaling: f32,
    weight: f32,
}

const _: () = assert!(size_of::<CrossEntropyParams>() == 48, "cuda/cross_entropy.cu asserts the same size");

// SAFETY: `repr(C)`, numbers only, the same fields in the same order as in cuda/cross_entropy.cu.
unsafe impl KernelParams for CrossEntropyParams {}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use tch::Device;

    use super::*;

    /// Losses and gradient of eight rows of eleven columns, the last three padding that is no number.
    fn twin(labels: &[i64; 8]) -> (Tensor, Tensor, Tensor) {
        let logits = Tensor::randn([8, 11], (Kind::Double, Device::Cpu)) * 3.0;
        let _ = logits.narrow(1, 8, 3).fill_(f64::NAN);
        let (losses, gradient) =
            cross_entropy_logits_reference(&logits, &Tensor::from_slice(labels), 8, 0.5, Some(0.25));
        (logits, losses, gradient.unwrap())
    }

    #[test]
    fn the_twin_is_the_derivative_of_the_loss() {
        let (logits, losses, gradient) = twin(&[0, 1, 2, 3, 4, 5, 6, 7]);
        let z = logits.narrow(1, 0, 8).copy().set_requires_grad(true);
        let wanted = -(&z * 0.5).log_softmax(-1, Kind::Double).trace(); // each row's label is its index
        (&wanted * 0.25).backward();
        assert!((losses.sum(Kind::Double) - wanted.detach()).abs().double_value(&[]) < 1e-12);
        assert!((gradient.narrow(1, 0, 8) - z.grad()).abs().max().double_value(&[]) < 1e-12);
        assert!(gradient.narrow(1, 8, 3).equal(&Tensor::zeros([8, 3], (Kind::Double, Device::Cpu))));
    }

    #[test]
    fn labels_that_are_none() {
        let (_, losses, gradient) = twin(&[IGNORE, -1, 8, 9, i64::MAX, i64::MIN, 7, 0]);
        let losses: Vec<f64> = Vec::try_from(&losses).unwrap();
        assert_eq!(losses[0], 0.0);
        assert!(losses[1..6].iter().all(|loss| loss.is_nan()));
        assert!(losses[6..].iter().all(|loss| loss.is_finite()));
        let nan: Vec<bool> = Vec::try_from(&gradient.narrow(1, 0, 8).isnan().all_dim(1, false)).unwrap();
        assert_eq!(nan, [false, true, true, true, true, true, false, false]);
        assert_eq!(gradient.get(0).abs().max().double_value(&[]), 0.0);
        assert_eq!(gradient.narrow(1, 8, 3).abs().max().double_value(&[]), 0.0);
    }

    #[test]
    fn refuses_operands_that_do_not_fit() {
        let logits = Tensor::zeros([3, 16], (Kind::BFloat16, Device::Cpu));
        let (labels, losses) =
            (Tensor::zeros([3], (Kind::Int64, Device::Cpu)), Tensor::zeros([3], (Kind::Float, Device::Cpu)));
        let told = |labels: &Tensor, vocab: i64, scaling: f64, losses: &Tensor| {
            cross_entropy_into(&logits, labels, vocab, scaling, None, losses).unwrap_err().to_string()
        };
        assert!(told(&labels.narrow(0, 0, 2), 16, 1.0, &losses).contains("`labels` is [2], expected [1, 3]"));
        assert!(told(&losses, 16, 1.0, &losses).contains("`labels` is Float"));
        assert!(told(&labels, 16, 1.0, &labels).contains("`losses` is Int64"));
        assert!(told(&labels, 17, 1.0, &losses).contains("a vocabulary of 17 in 16 columns"));
        assert!(told(&labels, 0, 1.0, &losses).contains("a vocabulary of 0"));
        for scaling in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(told(&labels, 16, scaling, &losses).contains("expected a positive number"));
        }
        assert!(told(&labels, 16, 1.0, &losses).contains("Cpu"));
    }
}
