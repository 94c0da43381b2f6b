//! The one batch shape: packed sequences with `cu_seqlens`, in training, evaluation and prefill alike.

use tch::{Device, Tensor};

/// A label where no loss is taken.
pub const IGNORE: i64 = -100;

/// One packed sequence, as the store holds it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sequence {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// Whether a token is supervised: `loss_mask[i]` asks that `input_ids[i]` be predicted from what is before it.
    pub loss_mask: Vec<bool>,
    /// Index into the dataset's list of sources.
    pub source: u16,
}

/// Packed sequences as tensors.
#[derive(Debug)]
pub struct Batch {
    /// Token ids, `[tokens]` i64.
    pub input_ids: Tensor,
    /// What each position should predict: the next token of its sequence where that one is supervised,
    /// else [`IGNORE`]; `[tokens]` i64. Already shifted, so a sequence's last position is always ignored.
    pub labels: Tensor,
    /// Position in the sequence, restarting at 0; `[tokens]` i64.
    pub position_ids: Tensor,
    /// Where sequences begin and end, `[seqs + 1]`, from 0 to `tokens`; on the host, because the launch grid depends on it.
    pub cu_seqlens: Vec<i64>,
    /// Source of each sequence, `[seqs]`.
    pub sources: Vec<u16>,
    /// How many labels are not [`IGNORE`].
    pub supervised: i64,
    /// Positions whose label counts, `[supervised]` i64, ascending.
    pub rows: Tensor,
    /// The same on the host.
    pub host_rows: Vec<i64>,
    /// The largest token id; -1 without tokens.
    pub largest_id: i64,
}

impl Batch {
    /// Lays `sequences` side by side on `device`.
    pub fn pack<'a>(sequences: impl IntoIterator<Item = &'a Sequence>, device: Device) -> Self {
        let (mut input_ids, mut labels, mut position_ids) = (Vec::new(), Vec::new(), Vec::new());
        let (mut cu_seqlens, mut sources) = (vec![0], Vec::new());
        for sequence in sequences {
            let length = sequence.input_ids.len();
            for at in 0..length {
                input_ids.push(i64::from(sequence.input_ids[at]));
                position_ids.push(at as i64);
                let next_is_supervised = at + 1 < length && sequence.loss_mask[at + 1];
                labels.push(if next_is_supervised { i64::from(sequence.input_ids[at + 1]) } else { IGNORE });
            }
            cu_seqlens.push(input_ids.len() as i64);
            sources.push(sequence.source);
        }
        let counts = |(at, label): (usize, &i64)| (*label != IGNORE).then_some(at as i64);
        let host_rows: Vec<i64> = labels.iter().enumerate().filter_map(counts).collect();
        Self {
            input_ids: Tensor::from_slice(&input_ids).to_device(device),
            labels: Tensor::from_slice(&labels).to_device(device),
            position_ids: Tensor::from_slice(&position_ids).to_device(device),
            cu_seqlens,
            sources,
            supervised: host_rows.len() as i64,
            rows: Tensor::from_slice(&host_rows).to_device(device),
            largest_id: input_ids.iter().copied().max().unwrap_or(-1),
            host_rows,
        }
    }

    /// How many tokens.
    pub fn tokens(&self) -> i64 {
        self.cu_seqlens.last().copied().unwrap_or(0)
    }
}
