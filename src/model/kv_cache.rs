//! Keys and values of one sequence, kept between steps of generation.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::config::ModelConfig;
use crate::kernels::attention::cached_attention_reference;

/// Keys and values of one sequence, every layer.
#[derive(Debug)]
pub struct KvCache {
    /// Per layer, `[kv_heads, capacity, head_dim]`: what a head has seen lies together, as its products read it.
    keys: Vec<Tensor>,
    /// As `keys`.
    values: Vec<Tensor>,
    length: i64,
    capacity: i64,
}

impl KvCache {
    /// Room for `capacity` tokens.
    ///
    /// # Errors
    /// When there is no memory for them.
    pub fn new(config: &ModelConfig, capacity: i64, kind: Kind, device: Device) -> Result<Self> {
        let shape = [config.num_key_value_heads, capacity, config.head_dim];
        let layer = |_| Ok(Tensor::f_empty(shape, (kind, device))?);
        let allocate = || (0..config.num_hidden_layers).map(layer).collect::<Result<Vec<_>>>();
        Ok(Self { keys: allocate()?, values: allocate()?, length: 0, capacity })
    }

    /// Memory of one token, all layers, in bytes.
    pub fn bytes_per_token(config: &ModelConfig, kind: Kind) -> usize {
        let elements = 2 * config.num_hidden_layers as i64 * config.num_key_value_heads * config.head_dim;
        elements as usize * kind.elt_size_in_bytes()
    }

    /// Tokens held.
    pub fn len(&self) -> i64 {
        self.length
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Tokens it can hold.
    pub fn capacity(&self) -> i64 {
        self.capacity
    }

    /// Puts the next keys and values of a layer, `[new, kv_heads, head_dim]`, behind those it holds, and attends
    /// `q` `[new, heads, head_dim]` to them all. They count as held once [`advance`](Self::advance) says so.
    pub(super) fn attend(&self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Tensor {
        let new = q.size()[0];
        let [keys, values] = [(&self.keys[layer], k), (&self.values[layer], v)].map(|(held, next)| {
            held.narrow(1, self.length, new).copy_(&next.transpose(0, 1));
            held.narrow(1, 0, self.length + new)
        });
        cached_attention_reference(q, &keys, &values, scale)
    }

    /// So many tokens more are held, in all layers.
    pub(super) fn advance(&mut self, new: i64) {
        self.length += new;
    }
}
