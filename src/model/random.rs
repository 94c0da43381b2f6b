//! Weights of no model: random numbers in a configuration's shapes, for speed and memory where weights cannot be had.

use anyhow::{Context as _, Result};
use tch::{Device, Kind, Tensor};

use super::config::ModelConfig;
use super::weights::TensorSource;
use crate::kernels::dynamic_map::dynamic_map;
use crate::kernels::nf4::{BLOCK, NESTED_BLOCK, Nf4Weight};
use crate::recipe::Projection;

/// Mean scale of a block: weights then spread by about 0.02, as in trained models.
const MEAN_SCALE: f32 = 0.04;

/// Random weights, made on the device when asked for; never the same twice.
#[derive(Debug)]
pub struct RandomWeights {
    config: ModelConfig,
    device: Device,
}

impl RandomWeights {
    /// Weights for `config`, on `device`.
    pub fn new(config: &ModelConfig, device: Device) -> Self {
        Self { config: config.clone(), device }
    }
}

impl TensorSource for RandomWeights {
    fn names(&self) -> Vec<String> {
        let mut names = self.config.tensor_names();
        names.sort();
        names
    }

    fn shape(&self, name: &str) -> Option<Vec<i64>> {
        let ModelConfig { vocab_size, hidden_size, num_hidden_layers, .. } = self.config;
        if name.ends_with("norm.weight") {
            return Some(vec![hidden_size]);
        }
        if name == "model.embed_tokens.weight" || name == "lm_head.weight" {
            return Some(vec![vocab_size, hidden_size]);
        }
        let stem = name.strip_suffix(".weight")?;
        let is_it = |one: &Projection| (0..num_hidden_layers).any(|layer| one.path(layer) == stem);
        Projection::ALL.iter().find(|one| is_it(one)).map(|one| self.config.projection_shape(*one).to_vec())
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        let shape = self.shape(name).with_context(|| format!("there is no `{name}`"))?;
        let options = (Kind::BFloat16, self.device);
        let weights = Tensor::f_randn(&shape, options)? * 0.02;
        Ok(if shape.len() == 1 { weights + 1.0 } else { weights })
    }

    fn nf4(&self, name: &str, device: Device) -> Result<Nf4Weight> {
        let shape = self.shape(name).with_context(|| format!("there is no `{name}`"))?;
        let shape: [i64; 2] =
            shape.try_into().ok().with_context(|| format!("`{name}` is no weight of a product"))?;
        let elements: i64 = shape.iter().product();
        let blocks = elements / BLOCK as i64;
        let bytes = |count| Tensor::f_randint(256, count, (Kind::Uint8, self.device));
        let nested = (blocks + NESTED_BLOCK as i64 - 1) / NESTED_BLOCK as i64;
        Ok(Nf4Weight {
            packed: bytes([elements / 2])?,
            absmax: bytes([blocks])?,
            nested_absmax: Tensor::f_full([nested], f64::from(MEAN_SCALE) / 4.0, (Kind::Float, self.device))?,
            nested_code: Tensor::f_from_slice(&dynamic_map(true))?.f_to_device(self.device)?,
            nested_offset: MEAN_SCALE,
            shape,
        }
        .to_device(device))
    }
}
