//! LoRA adapters in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Written as PEFT 0.21 writes them. Read from any PEFT: the tensors say which projections are adapted, the
//! configuration says how the update is scaled; a setting that would change the computation in a way
//! the decoder does not have is refused by name.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use super::tensor_file::{self, NamedTensors};
use crate::error::{HintExt as _, user_error};
use crate::model::decoder::Decoder;
use crate::model::params::ParamSet;
use crate::recipe::{LoraSpec, Projection};

/// The configuration's file name.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The tensors' file name.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";
/// What PEFT's model wrapper puts before the base model's own names.
const PREFIX: &str = "base_model.model.";

/// An adapter, read.
#[derive(Debug)]
pub struct Adapter {
    /// Where it was read.
    pub folder: PathBuf,
    /// Rank, scaling and targets, as the configuration says.
    pub spec: LoraSpec,
    /// The base model it was trained on, as its maker named it.
    pub base: Option<String>,
    /// `model.layers.0.self_attn.q_proj.lora_A.weight` and so on, f32 on the CPU.
    pub tensors: NamedTensors,
}

impl Adapter {
    /// Attaches the adapter to a decoder that has none.
    ///
    /// # Errors
    /// When the decoder has another number of layers or other shapes; the message names the tensor and both.
    pub fn apply(&self, decoder: &mut Decoder) -> Result<()> {
        decoder.attach_lora(&self.spec, 0)?;
        let parameters = decoder.adapters().context("the decoder took no adapter")?;
        self.copy_into(parameters)
            .with_context(|| format!("adapter `{}` does not fit the base model", self.folder.display()))
            .with_hint(|| {
                let trained_on = self.base.as_deref().unwrap_or("a base model it does not name");
                format!("it was trained on `{trained_on}`; is `model.base` another model?")
            })?;
        decoder.adapters_changed()?;
        Ok(())
    }

    /// Writes the tensors into parameters of the same names and shapes.
    ///
    /// # Errors
    /// When a name is on one side only, or shapes differ; the parameters are then untouched.
    pub fn copy_into(&self, parameters: &ParamSet) -> Result<()> {
        let mut known = BTreeSet::new();
        for slot in parameters.slots() {
            let Some(tensor) = self.tensors.get(&slot.name) else { bail!("it has no `{}`", slot.name) };
            let shape = tensor.size();
            ensure!(shape == slot.shape, "`{}` has shape {shape:?}, expected {:?}", slot.name, slot.shape);
            known.insert(slot.name.as_str());
        }
        if let Some(name) = self.tensors.keys().find(|name| !known.contains(name.as_str())) {
            bail!("it has `{name}`, which the base model has not");
        }
        for (name, mut parameter) in parameters.iter() {
            parameter.f_copy_(&self.tensors[name])?;
        }
        Ok(())
    }
}

/// Writes an adapter into an existing folder, in f32; same parameters, same bytes.
///
/// # Errors
/// When a file cannot be written.
pub fn save(folder: &Path, spec: &LoraSpec, parameters: &ParamSet, base: &str) -> Result<()> {
    let tensors = parameters.iter().map(|(name, tensor)| (format!("{PREFIX}{name}"), tensor)).collect();
    tensor_file::write(&folder.join(TENSORS_FILE), &tensors)?;
    let mut text = serde_json::to_string_pretty(&config_of(spec, base))?;
    text.push('\n');
    crate::output::write_file(&folder.join(CONFIG_FILE), text.as_bytes())
}

/// The configuration as PEFT writes it, with every setting that says how the update is computed.
fn config_of(spec: &LoraSpec, base: &str) -> Value {
    let targets: BTreeSet<&str> = spec.targets.iter().map(|target| target.name()).collect();
    // PEFT's alpha is an integer by type; a whole number is written as one.
    let alpha = if spec.alpha.fract() == 0.0 { json!(spec.alpha as i64) } else { json!(spec.alpha) };
    json!({
        "alpha_pattern": {},
        "auto_mapping": null,
        "base_model_name_or_path": base,
        "bias": "none",
        "exclude_modules": null,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": alpha,
        "lora_bias": false,
        "lora_dropout": spec.dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "peft_version": "0.21.0",
        "r": spec.rank,
        "rank_pattern": {},
        "revision": null,
        "target_modules": targets,
        "target_parameters": null,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": null,
        "use_dora": false,
        "use_qalora": false,
        "use_rslora": spec.rslora,
    })
}

/// Reads an adapter that this program or PEFT wrote.
///
/// # Errors
/// When a file is missing or damaged, or the adapter uses something that the decoder has not: DoRA, trained
/// biases or whole modules, ranks by pattern, some of the layers only, other modules than the seven projections.
pub fn load(folder: &Path) -> Result<Adapter> {
    let config_path = folder.join(CONFIG_FILE);
    let tensors_path = folder.join(TENSORS_FILE);
    if !config_path.is_file() {
        return Err(user_error(
            format!("`{}` is no adapter: it has no `{CONFIG_FILE}`", folder.display()),
            "name a folder that `granite train` or PEFT wrote, like `checkpoints/runs/NAME/step-000500`",
        ));
    }
    let text = std::fs::read_to_string(&config_path)
        .with_context(|| format!("cannot read `{}`", config_path.display()))?;
    let config: Map<String, Value> = serde_json::from_str(&text)
        .with_context(|| format!("`{}` is no JSON object", config_path.display()))?;
    let in_config = || format!("adapter configuration `{}`", config_path.display());
    check_supported(&config).with_context(in_config)?;
    let stored = tensor_file::read(&tensors_path)?;
    let tensors = strip_names(stored).with_context(|| format!("adapter `{}`", tensors_path.display()))?;
    let targets = targets_of(&tensors).with_context(|| format!("adapter `{}`", tensors_path.display()))?;
    check_named_targets(&config, &targets).with_context(in_config)?;
    let spec = spec_of(&config, targets).with_context(in_config)?;
    check_shapes(&tensors, spec.rank).with_context(|| format!("adapter `{}`", tensors_path.display()))?;
    let base = config.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_string);
    Ok(Adapter { folder: folder.to_path_buf(), spec, base, tensors })
}

/// Settings that must be off, because each changes what the adapter computes.
const UNSUPPORTED: [&str; 24] = [
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "fan_in_fan_out",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "kasa_config",
    "monteclora_config",
    "loftq_config",
    "corda_config",
    "lora_ga_config",
    "megatron_config",
    "ensure_weight_tying",
    "auto_mapping",
];

fn check_supported(config: &Map<String, Value>) -> Result<()> {
    let kind = config.get("peft_type").and_then(Value::as_str).unwrap_or_default();
    ensure!(kind == "LORA", "`peft_type` is `{kind}`, expected `LORA`");
    let bias = config.get("bias").and_then(Value::as_str).unwrap_or("none");
    ensure!(bias == "none", "`bias` is `{bias}`, expected `none`: trained biases are not supported");
    for key in UNSUPPORTED {
        let value = config.get(key).unwrap_or(&Value::Null);
        ensure!(is_off(value), "`{key}` is `{value}`, expected it off: it is not supported");
    }
    // Other initialisations move a part of the base weights into the adapter, so it fits only a base changed alike.
    let init = config.get("init_lora_weights").unwrap_or(&Value::Bool(true));
    let keeps_base = match init {
        Value::Bool(_) | Value::Null => true,
        Value::String(name) => matches!(name.as_str(), "gaussian" | "eva" | "orthogonal"),
        _ => false,
    };
    if !keeps_base {
        return Err(user_error(
            format!("`init_lora_weights` is `{init}`, which changes the base model's weights too"),
            "save it from PEFT as a plain LoRA: `save_pretrained(..., path_initial_model_for_weight_conversion=...)`",
        ));
    }
    Ok(())
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

fn spec_of(config: &Map<String, Value>, targets: Vec<Projection>) -> Result<LoraSpec> {
    let rank = config.get("r").and_then(Value::as_u64).filter(|rank| (1..1 << 20).contains(rank));
    let rank =
        rank.with_context(|| format!("`r` is `{}`, expected a whole number above 0", shown(config, "r")))?;
    let alpha = config.get("lora_alpha").and_then(Value::as_f64).filter(|alpha| alpha.is_finite());
    let alpha = alpha
        .with_context(|| format!("`lora_alpha` is `{}`, expected a number", shown(config, "lora_alpha")))?;
    let dropout = config.get("lora_dropout").and_then(Value::as_f64).unwrap_or(0.0);
    ensure!((0.0..1.0).contains(&dropout), "`lora_dropout` is `{dropout}`, expected a number in [0, 1)");
    let rslora = config.get("use_rslora").and_then(Value::as_bool).unwrap_or(false);
    Ok(LoraSpec { rank: rank as usize, alpha, dropout, rslora, targets })
}

fn shown(config: &Map<String, Value>, key: &str) -> Value {
    config.get(key).cloned().unwrap_or(Value::Null)
}

/// Takes PEFT's prefix off the names and brings the tensors to f32.
fn strip_names(stored: NamedTensors) -> Result<NamedTensors> {
    let mut tensors = NamedTensors::new();
    for (name, tensor) in stored {
        let plain = name.strip_prefix(PREFIX).and_then(|name| parse_name(name).map(|_| name));
        let Some(plain) = plain else {
            bail!("tensor `{name}` adapts something other than the projections of the layers")
        };
        ensure!(tensor.is_floating_point(), "tensor `{name}` is {:?}, expected a float dtype", tensor.kind());
        tensors.insert(plain.to_string(), tensor.to_kind(Kind::Float));
    }
    ensure!(!tensors.is_empty(), "it holds no tensor");
    Ok(tensors)
}

/// Layer, projection and half of `model.layers.3.self_attn.q_proj.lora_A.weight`.
fn parse_name(name: &str) -> Option<(usize, Projection, &str)> {
    let (path, half) = name.strip_suffix(".weight")?.rsplit_once('.')?;
    if half != "lora_A" && half != "lora_B" {
        return None;
    }
    let (layer, _) = path.strip_prefix("model.layers.")?.split_once('.')?;
    // No model has that many layers, and what counts layers below must not overflow.
    let layer: usize = layer.parse().ok().filter(|layer| *layer < 1 << 16)?;
    let projection = Projection::ALL.into_iter().find(|projection| projection.path(layer) == path)?;
    Some((layer, projection, half))
}

/// The projections that are adapted, which must be the same in every layer from the first on.
fn targets_of(tensors: &NamedTensors) -> Result<Vec<Projection>> {
    let parsed: BTreeSet<(usize, Projection, &str)> =
        tensors.keys().filter_map(|name| parse_name(name)).collect();
    let targets: BTreeSet<Projection> = parsed.iter().map(|(_, projection, _)| *projection).collect();
    let layers = 1 + parsed.iter().map(|(layer, ..)| *layer).max().unwrap_or(0);
    // The count alone tells whether one is missing; the walk finds which.
    if layers * targets.len() * 2 != parsed.len() {
        for layer in 0..layers {
            for projection in &targets {
                for half in ["lora_A", "lora_B"] {
                    let there = parsed.contains(&(layer, *projection, half));
                    ensure!(
                        there,
                        "it has no `{PREFIX}{}.{half}.weight`: every layer must have the same projections adapted",
                        projection.path(layer)
                    );
                }
            }
        }
    }
    Ok(Projection::ALL.into_iter().filter(|projection| targets.contains(projection)).collect())
}

/// A list of targets names each projection that has tensors by its end, and no projection that has none.
/// A pattern (`all-linear` or a regular expression) was resolved by PEFT: the tensors are its outcome.
fn check_named_targets(config: &Map<String, Value>, targets: &[Projection]) -> Result<()> {
    let Some(Value::Array(named)) = config.get("target_modules") else { return Ok(()) };
    let named: Vec<&str> = named.iter().filter_map(Value::as_str).collect();
    for projection in Projection::ALL {
        let path = projection.path(0);
        let is_named = named.iter().any(|name| path == *name || path.ends_with(&format!(".{name}")));
        let has_tensors = targets.contains(&projection);
        ensure!(
            !is_named || has_tensors,
            "`target_modules` names `{}`, but `{TENSORS_FILE}` has no tensors of it",
            projection.name()
        );
    }
    Ok(())
}

fn check_shapes(tensors: &NamedTensors, rank: usize) -> Result<()> {
    for (name, tensor) in tensors {
        let shape = tensor.size();
        let axis = usize::from(name.ends_with("lora_B.weight"));
        ensure!(
            shape.len() == 2 && shape[axis] == rank as i64,
            "tensor `{name}` has shape {shape:?}, expected {} for the rank of `{CONFIG_FILE}`",
            if axis == 0 { format!("[{rank}, in]") } else { format!("[out, {rank}]") }
        );
        ensure!(all_finite(tensor), "tensor `{name}` holds values that are not finite");
    }
    Ok(())
}

fn all_finite(tensor: &Tensor) -> bool {
    tensor.isfinite().all().int64_value(&[]) != 0
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use tch::Device;

    use super::*;

    fn spec() -> LoraSpec {
        LoraSpec {
            rank: 4,
            alpha: 8.0,
            dropout: 0.05,
            rslora: true,
            targets: vec![Projection::QProj, Projection::DownProj],
        }
    }

    fn parameters(layers: usize, targets: &[Projection]) -> ParamSet {
        let set = ParamSet::zeros(
            (0..layers).flat_map(|layer| {
                targets.iter().flat_map(move |target| {
                    let path = target.path(layer);
                    [
                        (format!("{path}.lora_A.weight"), vec![4, 12]),
                        (format!("{path}.lora_B.weight"), vec![10, 4]),
                    ]
                })
            }),
            Device::Cpu,
        );
        let mut flat = set.flat().shallow_clone();
        let values = Tensor::arange(flat.size()[0], (Kind::Float, Device::Cpu)) * 0.37;
        flat.copy_(&values);
        set
    }

    fn saved() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), &spec(), &parameters(2, &spec().targets), "models/tiny").unwrap();
        folder
    }

    fn edit_config(folder: &Path, key: &str, value: Value) {
        let path = folder.join(CONFIG_FILE);
        let mut config: Map<String, Value> =
            serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        config.insert(key.to_string(), value);
        std::fs::write(path, serde_json::to_string(&config).unwrap()).unwrap();
    }

    fn refusal(folder: &Path) -> String {
        crate::error::render(&load(folder).unwrap_err())
    }

    #[test]
    fn what_was_saved_is_loaded_bit_for_bit() {
        let folder = saved();
        let adapter = load(folder.path()).unwrap();
        assert_eq!(adapter.spec, spec());
        assert_eq!(adapter.base.as_deref(), Some("models/tiny"));
        let expected = parameters(2, &spec().targets);
        let loaded = expected.zeros_like();
        adapter.copy_into(&loaded).unwrap();
        assert!(loaded.flat().equal(expected.flat()));
    }

    #[test]
    fn half_precision_is_widened() {
        let folder = saved();
        let path = folder.path().join(TENSORS_FILE);
        let exact = tensor_file::read(&path).unwrap();
        for kind in [Kind::Half, Kind::BFloat16] {
            let narrow = exact.iter().map(|(name, tensor)| (name.clone(), tensor.to_kind(kind))).collect();
            tensor_file::write(&path, &narrow).unwrap();
            for (name, tensor) in load(folder.path()).unwrap().tensors {
                assert_eq!(tensor.kind(), Kind::Float);
                assert!(tensor.equal(&narrow[&format!("{PREFIX}{name}")].to_kind(Kind::Float)));
            }
        }
    }

    #[test]
    fn a_pattern_of_targets_is_taken_from_the_tensors() {
        let folder = saved();
        edit_config(folder.path(), "target_modules", json!("all-linear"));
        assert_eq!(load(folder.path()).unwrap().spec.targets, spec().targets);
        edit_config(folder.path(), "target_modules", json!(["self_attn.q_proj", "mlp.down_proj"]));
        assert_eq!(load(folder.path()).unwrap().spec.targets, spec().targets);
        edit_config(folder.path(), "target_modules", json!(["q_proj", "v_proj", "down_proj"]));
        assert!(refusal(folder.path()).contains("names `v_proj`"));
    }

    #[test]
    fn what_the_decoder_has_not_is_refused_by_name() {
        for (key, value) in [
            ("use_dora", json!(true)),
            ("modules_to_save", json!(["lm_head"])),
            ("rank_pattern", json!({"q_proj": 8})),
            ("alpha_pattern", json!({"q_proj": 8})),
            ("layers_to_transform", json!([0])),
            ("bias", json!("all")),
            ("peft_type", json!("LOHA")),
            ("init_lora_weights", json!("pissa_niter_4")),
            ("lora_bias", json!(true)),
            ("r", json!(0)),
            ("r", json!("4")),
            ("lora_alpha", json!(null)),
            ("lora_dropout", json!(1.0)),
        ] {
            let folder = saved();
            edit_config(folder.path(), key, value);
            let message = refusal(folder.path());
            assert!(message.contains(key) && message.contains(CONFIG_FILE), "{message}");
        }
    }

    #[test]
    fn tensors_that_do_not_fit_are_refused_by_name() {
        let prefix = format!("{PREFIX}model.layers.");
        let float = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        for (name, tensor, expected) in [
            (format!("{PREFIX}lm_head.lora_A.weight"), float(&[4, 12]), "lm_head"),
            (format!("{prefix}7.self_attn.q_proj.lora_A.weight"), float(&[4, 12]), "layers.0.mlp.down_proj"),
            (format!("{prefix}0.self_attn.q_proj.lora_A.weight"), float(&[5, 12]), "[5, 12]"),
            (format!("{prefix}0.self_attn.q_proj.lora_A.weight"), float(&[4]), "[4, in]"),
            (format!("{prefix}0.self_attn.q_proj.lora_A.weight"), float(&[4, 12]) / 0.0, "not finite"),
            (
                format!("{prefix}18446744073709551615.mlp.up_proj.lora_A.weight"),
                float(&[4, 12]),
                "something other",
            ),
            (format!("{prefix}65535.mlp.up_proj.lora_A.weight"), float(&[4, 12]), "every layer"),
        ] {
            let folder = saved();
            let path = folder.path().join(TENSORS_FILE);
            let mut tensors = tensor_file::read(&path).unwrap();
            if expected == "layers.0.mlp.down_proj" {
                tensors.remove(&format!("{prefix}0.mlp.down_proj.lora_A.weight"));
            }
            tensors.insert(name, tensor);
            tensor_file::write(&path, &tensors).unwrap();
            let message = refusal(folder.path());
            assert!(message.contains(expected) && message.contains(TENSORS_FILE), "{message}");
        }
    }

    #[test]
    fn another_models_adapter_leaves_the_parameters_untouched() {
        let folder = saved();
        let adapter = load(folder.path()).unwrap();
        for (layers, expected) in [(3, "layers.2"), (1, "layers.1")] {
            let other = parameters(layers, &spec().targets).zeros_like();
            assert!(adapter.copy_into(&other).unwrap_err().to_string().contains(expected));
            assert_eq!(other.flat().abs().max().double_value(&[]), 0.0);
        }
    }

    #[test]
    fn a_folder_without_an_adapter_says_what_is_wanted() {
        let folder = tempfile::tempdir().unwrap();
        assert!(refusal(folder.path()).contains("hint: name a folder"));
    }
}
