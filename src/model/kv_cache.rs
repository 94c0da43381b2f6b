//! Keys and values of one sequence, kept between steps of generation.

use tch::{Device, Kind, Tensor};

use super::config::ModelConfig;

/// Keys and values of one sequence, every layer.
#[derive(Debug)]
pub struct KvCache {
    /// Per layer, `[capacity, kv_heads, head_dim]`.
    pub(super) keys: Vec<Tensor>,
    /// Per layer, `[capacity, kv_heads, head_dim]`.
    pub(super) values: Vec<Tensor>,
    pub(super) length: i64,
    capacity: i64,
}

impl KvCache {
    /// Room for `capacity` tokens.
    pub fn new(config: &ModelConfig, capacity: i64, kind: Kind, device: Device) -> Self {
        let shape = [capacity, config.num_key_value_heads, config.head_dim];
        let allocate =
            || (0..config.num_hidden_layers).map(|_| Tensor::zeros(shape, (kind, device))).collect();
        Self { keys: allocate(), values: allocate(), length: 0, capacity }
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
}
