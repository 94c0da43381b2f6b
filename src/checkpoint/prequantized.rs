//! A weight that bitsandbytes quantised and transformers saved, read and written.
//!
//! ```text
//! W                                        codes, two a byte          [out * in / 2, 1] u8
//! W.absmax                                 scales, as codes           [blocks] u8
//! W.nested_absmax                          scales of the scales       [ceil(blocks / 256)] f32
//! W.nested_quant_map                       levels of a scale's code   [256] f32
//! W.quant_map                              levels of a weight's code  [16] f32
//! W.quant_state.bitsandbytes__nf4          shape, dtype, offset: JSON [bytes] u8
//! ```
//!
//! Without double quantisation the scales are `[blocks]` f32 and nothing is nested; such a weight is read, never written.

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::safetensors::MappedTensors;
use crate::kernels::dynamic_map::dynamic_map;
use crate::kernels::host;
use crate::kernels::nf4::{BLOCK, LEVELS, NESTED_BLOCK, Nf4Weight};

/// What is stored beside the codes of a weight.
pub const STATE: &str = ".quant_state.bitsandbytes__nf4";
const ABSMAX: &str = ".absmax";
const NESTED_ABSMAX: &str = ".nested_absmax";
const NESTED_MAP: &str = ".nested_quant_map";
const MAP: &str = ".quant_map";

/// Room for the JSON of a weight; what it does not fill are spaces, so that sizes are known before values are.
const STATE_BYTES: usize = 256;

/// A part of a quantised weight: name, dtype and shape as they stand in the header.
pub type Part = (String, Kind, Vec<i64>);

/// The parts of a weight `[out, in]` in the order they are written: floats first, and the JSON fills up what the scales
/// leave open, so that every tensor begins at a multiple of its dtype's size.
pub fn parts(name: &str, [out, input]: [i64; 2]) -> [Part; 6] {
    let blocks = out * input / BLOCK as i64;
    let nested = (blocks + NESTED_BLOCK as i64 - 1) / NESTED_BLOCK as i64;
    let state = STATE_BYTES as i64 + (8 - blocks % 8) % 8;
    [
        (format!("{name}{NESTED_ABSMAX}"), Kind::Float, vec![nested]),
        (format!("{name}{NESTED_MAP}"), Kind::Float, vec![256]),
        (format!("{name}{MAP}"), Kind::Float, vec![LEVELS.len() as i64]),
        (name.to_string(), Kind::Uint8, vec![out * input / 2, 1]),
        (format!("{name}{ABSMAX}"), Kind::Uint8, vec![blocks]),
        (format!("{name}{STATE}"), Kind::Uint8, vec![state]),
    ]
}

/// The tensors of [`parts`], in their order and shapes.
///
/// # Errors
/// When the weight is not whole.
pub fn tensors(weight: &Nf4Weight) -> Result<[Tensor; 6]> {
    weight.check()?;
    Ok([
        weight.nested_absmax.shallow_clone(),
        weight.nested_code.shallow_clone(),
        Tensor::from_slice(&LEVELS),
        weight.packed.view([-1, 1]),
        weight.absmax.shallow_clone(),
        Tensor::from_slice(&state(weight)?),
    ])
}

fn state(weight: &Nf4Weight) -> Result<Vec<u8>> {
    let state = json!({
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": "bfloat16",
        "shape": weight.shape,
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": f64::from(weight.nested_offset),
    });
    let mut text = serde_json::to_vec(&state)?;
    let blocks = weight.absmax.numel();
    let length = STATE_BYTES + (8 - blocks % 8) % 8;
    ensure!(text.len() <= length, "the state of an NF4 weight takes {} bytes of {length}", text.len());
    text.resize(length, b' ');
    Ok(text)
}

/// The `quantization_config` of a folder whose projections are stored so.
pub fn config() -> Value {
    json!({
        "quant_method": "bitsandbytes",
        "load_in_4bit": true,
        "load_in_8bit": false,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": true,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_threshold": 6.0,
    })
}

/// The weight that a tensor belongs to, when it is one of the parts beside the codes.
pub fn owner(name: &str) -> Option<&str> {
    [STATE, NESTED_ABSMAX, NESTED_MAP, ABSMAX, MAP].into_iter().find_map(|part| name.strip_suffix(part))
}

/// What the JSON beside a weight says.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct QuantState {
    quant_type: String,
    blocksize: usize,
    /// `[out, in]` of the weight.
    pub shape: [i64; 2],
    #[serde(default)]
    nested_blocksize: Option<usize>,
    #[serde(default)]
    nested_offset: Option<f64>,
}

impl QuantState {
    /// Reads and checks the JSON beside the weight `name`.
    ///
    /// # Errors
    /// When it is damaged, or says another code or block size than NF4's.
    pub fn read(file: &MappedTensors, name: &str) -> Result<Self> {
        let key = format!("{name}{STATE}");
        let (_, bytes) = file.raw(&key).with_context(|| format!("`{key}` is missing"))?;
        let state: Self = serde_json::from_slice(bytes)
            .with_context(|| format!("`{key}` of `{}` is damaged", file.path().display()))?;
        state.check().with_context(|| format!("`{key}` of `{}`", file.path().display()))?;
        Ok(state)
    }

    fn check(&self) -> Result<()> {
        ensure!(self.quant_type == "nf4", "`quant_type` is `{}`, expected `nf4`", self.quant_type);
        ensure!(self.blocksize == BLOCK, "`blocksize` is {}, expected {BLOCK}", self.blocksize);
        if let Some(nested) = self.nested_blocksize {
            ensure!(nested == NESTED_BLOCK, "`nested_blocksize` is {nested}, expected {NESTED_BLOCK}");
        }
        let elements =
            self.shape[0].checked_mul(self.shape[1]).filter(|_| self.shape.iter().all(|axis| *axis > 0));
        let whole = elements.is_some_and(|elements| elements % BLOCK as i64 == 0);
        ensure!(whole, "`shape` is {:?}, expected a multiple of {BLOCK} weights", self.shape);
        Ok(())
    }

    /// Whether the scales are quantised again.
    pub fn is_nested(&self) -> bool {
        self.nested_blocksize.is_some()
    }

    /// The weight with its doubly quantised scales, as stored.
    ///
    /// # Errors
    /// When its scales are not quantised again, or a part is missing, damaged, or of other levels than ours.
    pub fn nested(&self, file: &MappedTensors, name: &str) -> Result<Nf4Weight> {
        let read = || {
            let part = |suffix: &str| file.tensor(&format!("{name}{suffix}"));
            check_levels(&part(MAP)?, &LEVELS).context("`quant_map`")?;
            check_levels(&part(NESTED_MAP)?, &dynamic_map(true)).context("`nested_quant_map`")?;
            let offset = self.nested_offset.context("`nested_offset` is missing")?;
            let weight = Nf4Weight {
                packed: file.tensor(name)?.f_view([-1])?,
                absmax: part(ABSMAX)?,
                nested_absmax: part(NESTED_ABSMAX)?,
                nested_code: part(NESTED_MAP)?,
                nested_offset: offset as f32,
                shape: self.shape,
            };
            weight.check()?;
            anyhow::Ok(weight)
        };
        read().with_context(|| format!("4-bit weight `{name}` of `{}`", file.path().display()))
    }

    /// The weight `[out, in]` f32.
    ///
    /// # Errors
    /// When a part is missing or damaged.
    pub fn dequantize(&self, file: &MappedTensors, name: &str) -> Result<Tensor> {
        if self.is_nested() {
            return Ok(self.nested(file, name)?.dequantize(Kind::Float));
        }
        self.plain(file, name)
            .with_context(|| format!("4-bit weight `{name}` of `{}`", file.path().display()))
    }

    /// Codes times scales that are stored in f32.
    fn plain(&self, file: &MappedTensors, name: &str) -> Result<Tensor> {
        check_levels(&file.tensor(&format!("{name}{MAP}"))?, &LEVELS).context("`quant_map`")?;
        let (packed, scales) = (file.tensor(name)?, file.tensor(&format!("{name}{ABSMAX}"))?);
        let (packed, scales) = (host::slice::<u8>(&packed)?, host::slice::<f32>(&scales)?);
        ensure!(
            scales.len().checked_mul(BLOCK / 2) == Some(packed.len())
                && Some(packed.len() as i64 * 2) == self.shape[0].checked_mul(self.shape[1]),
            "{} codes and {} scales do not make {:?} weights",
            packed.len() * 2,
            scales.len(),
            self.shape
        );
        Ok(host::filled(&self.shape, |weights: &mut [f32]| {
            for (at, (pair, codes)) in weights.chunks_exact_mut(2).zip(packed).enumerate() {
                let scale = scales[2 * at / BLOCK];
                pair[0] = LEVELS[usize::from(codes >> 4)] * scale;
                pair[1] = LEVELS[usize::from(codes & 15)] * scale;
            }
        }))
    }
}

fn check_levels(found: &Tensor, expected: &[f32]) -> Result<()> {
    if host::slice::<f32>(found)? != expected {
        bail!("its levels are not NF4's as bitsandbytes has them")
    }
    Ok(())
}
