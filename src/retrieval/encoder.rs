//! Sentence embeddings: a BERT encoder from a sentence-transformers folder (all-MiniLM-L6-v2).
//!
//! Post-norm transformer (Devlin et al. 2019, section 3; the original tensor2tensor form with erf GELU), mean of the
//! last hidden states over the attention mask, scaled to unit length (Reimers and Gurevych 2019, section 3). What
//! else a folder may ask for is refused by name.

use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};
use tch::{Device, Kind, Tensor};
use tokenizers::Tokenizer;

use crate::error::HintExt as _;
use crate::hex::hex;

/// Texts that go through the encoder at once.
const BATCH: usize = 32;

/// A sentence encoder with its tokenizer.
#[derive(Debug)]
pub struct Encoder {
    /// Cuts a text at `max_tokens`.
    tokenizer: Tokenizer,
    /// The same without a limit.
    whole: Tokenizer,
    bert: Bert,
    max_tokens: usize,
    special_tokens: usize,
    identity: String,
}

impl Encoder {
    /// Opens a sentence-transformers folder: BERT, mean pooling, and normalisation to unit length.
    ///
    /// # Errors
    /// When a file is missing or damaged, a tensor is missing or has another shape than the configuration says, or
    /// when the folder asks for an architecture, pooling or module that is not known.
    pub fn open(folder: &Path, device: Device) -> Result<Self> {
        Self::read(folder, device)
            .with_context(|| format!("cannot open the encoder `{}`", folder.display()))
            .hint("`serve.encoder` names a sentence-transformers folder such as all-MiniLM-L6-v2, with `config.json`, `model.safetensors`, `tokenizer.json`, `modules.json` and `1_Pooling/config.json`")
    }

    fn read(folder: &Path, device: Device) -> Result<Self> {
        let config: BertConfig = read_json(&folder.join("config.json"))?;
        config.check()?;
        check_modules(folder)?;
        let tokenizer_bytes = read_bytes(&folder.join("tokenizer.json"))?;
        let whole = open_tokenizer(&tokenizer_bytes)?;
        let special_tokens = whole.encode("", true).map_err(tokenizer_error)?.len();
        let max_tokens = max_tokens(folder, &config)?;
        ensure!(
            special_tokens < max_tokens,
            "`max_seq_length` is {max_tokens}, expected more than the {special_tokens} special tokens"
        );
        let tokenizer = truncated(&whole, max_tokens)?;
        let weights = read_bytes(&folder.join("model.safetensors"))?;
        let identity = identity(&[&weights, &tokenizer_bytes, format!("{config:?} {max_tokens}").as_bytes()]);
        let bert = Bert::load(&weights, config, device).context("`model.safetensors` does not fit")?;
        Ok(Self { tokenizer, whole, bert, max_tokens, special_tokens, identity })
    }

    /// Length of an embedding.
    pub fn dim(&self) -> usize {
        self.bert.config.hidden_size
    }

    /// Tokens of a text that are read, without the special ones; what is longer loses its end.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens - self.special_tokens
    }

    /// SHA-256 of the weights, the tokenizer and the configuration, in hex: the same identity gives the same embeddings.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Byte ranges of the tokens of a whole text, without special tokens and without truncation.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn token_spans(&self, text: &str) -> Result<Vec<Range<usize>>> {
        let encoding = self.whole.encode(text, false).map_err(tokenizer_error)?;
        Ok(encoding.get_offsets().iter().map(|&(start, end)| start..end).collect())
    }

    /// Embeddings of `texts`, `[texts, dim]` f32, row by row, each of unit length.
    ///
    /// Texts are batched by length, so the padding is small; `done` hears how many were encoded since its last call.
    ///
    /// # Errors
    /// When the tokenizer fails or a token id is beyond the vocabulary.
    pub fn encode(&self, texts: &[&str], mut done: impl FnMut(usize)) -> Result<Vec<f32>> {
        let ids = self.tokenize(texts)?;
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&at| std::cmp::Reverse(ids[at].len()));
        let dim = self.dim();
        let mut rows = vec![0f32; texts.len() * dim];
        for batch in order.chunks(BATCH) {
            let tokens: Vec<&[u32]> = batch.iter().map(|&at| ids[at].as_slice()).collect();
            let embeddings = tch::no_grad(|| self.bert.embed(&tokens)); // [batch, dim] f32
            let embeddings = Vec::<f32>::try_from(embeddings.reshape([-1]))?;
            for (&at, row) in batch.iter().zip(embeddings.chunks_exact(dim)) {
                rows[at * dim..(at + 1) * dim].copy_from_slice(row);
            }
            done(batch.len());
        }
        Ok(rows)
    }

    fn tokenize(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>> {
        let encodings = self.tokenizer.encode_batch(texts.to_vec(), true).map_err(tokenizer_error)?;
        let vocab = self.bert.config.vocab_size;
        encodings
            .iter()
            .map(|encoding| {
                let ids = encoding.get_ids().to_vec();
                if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
                    bail!("the encoder's tokenizer gives id {id}, its vocabulary has {vocab}");
                }
                Ok(ids)
            })
            .collect()
    }
}

fn tokenizer_error(error: tokenizers::Error) -> anyhow::Error {
    anyhow::anyhow!("the encoder's tokenizer failed: {error}")
}

/// A tokenizer without truncation and padding, whatever `tokenizer.json` says.
fn open_tokenizer(bytes: &[u8]) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_bytes(bytes)
        .map_err(|error| anyhow::anyhow!("`tokenizer.json` is damaged: {error}"))?;
    tokenizer.with_padding(None).with_truncation(None).map_err(tokenizer_error)?;
    Ok(tokenizer)
}

fn truncated(whole: &Tokenizer, max_length: usize) -> Result<Tokenizer> {
    let mut tokenizer = whole.clone();
    let truncation = tokenizers::TruncationParams { max_length, ..Default::default() };
    tokenizer.with_truncation(Some(truncation)).map_err(tokenizer_error)?;
    Ok(tokenizer)
}

fn identity(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(Sha256::digest(part));
    }
    hex(&hash.finalize())
}

fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read `{}`", path.display()))
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_slice(&read_bytes(path)?)
        .with_context(|| format!("cannot understand `{}`", path.display()))
}

/// As [`read_json`], `None` where there is no such file.
fn read_optional<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if path.exists() { read_json(path).map(Some) } else { Ok(None) }
}

/// `config.json`, as far as the forward pass depends on it.
#[derive(Debug, Clone, Deserialize)]
struct BertConfig {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    max_position_embeddings: usize,
    type_vocab_size: usize,
    layer_norm_eps: f64,
    hidden_act: String,
    #[serde(default = "absolute")]
    position_embedding_type: String,
    #[serde(default)]
    is_decoder: bool,
}

fn absolute() -> String {
    "absolute".to_string()
}

impl BertConfig {
    fn check(&self) -> Result<()> {
        let known = [
            ("model_type", self.model_type.as_str(), "bert"),
            ("hidden_act", self.hidden_act.as_str(), "gelu"),
            ("position_embedding_type", self.position_embedding_type.as_str(), "absolute"),
        ];
        for (key, value, expected) in known {
            ensure!(value == expected, "`config.json`: `{key}` is `{value}`, expected `{expected}`");
        }
        ensure!(!self.is_decoder, "`config.json`: `is_decoder` is true, expected an encoder");
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        ensure!(
            heads > 0 && hidden > 0 && hidden.is_multiple_of(heads),
            "`config.json`: `hidden_size` {hidden} is no multiple of `num_attention_heads` {heads}"
        );
        Ok(())
    }
}

/// `modules.json` has to be a transformer, mean pooling, normalisation.
fn check_modules(folder: &Path) -> Result<()> {
    #[derive(Deserialize)]
    struct Module {
        #[serde(rename = "type")]
        kind: String,
        path: String,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Prompts {
        default_prompt_name: Option<String>,
    }
    let modules: Vec<Module> = read_json(&folder.join("modules.json"))?;
    // The path of the class differs between releases of sentence-transformers, its name does not.
    let names: Vec<&str> =
        modules.iter().map(|module| module.kind.rsplit('.').next().unwrap_or_default()).collect();
    ensure!(
        names == ["Transformer", "Pooling", "Normalize"],
        "`modules.json` lists {names:?}, expected [\"Transformer\", \"Pooling\", \"Normalize\"]"
    );
    for module in modules.iter().filter(|module| module.kind.ends_with(".Pooling")) {
        check_pooling(&folder.join(&module.path).join("config.json"))?;
    }
    let prompts: Option<Prompts> = read_optional(&folder.join("config_sentence_transformers.json"))?;
    if let Some(name) = prompts.and_then(|prompts| prompts.default_prompt_name) {
        bail!(
            "`config_sentence_transformers.json` asks for the prompt `{name}` before every text, which is not supported"
        );
    }
    Ok(())
}

/// Both spellings: a flag per mode, and `pooling_mode` by name (sentence-transformers from 5.x on).
fn check_pooling(path: &Path) -> Result<()> {
    let config: serde_json::Map<String, serde_json::Value> = read_json(path)?;
    let by_name = config.get("pooling_mode").and_then(|mode| mode.as_str()).map(|mode| vec![mode]);
    let modes = by_name.unwrap_or_else(|| {
        let on = config.iter().filter(|(_, value)| value.as_bool() == Some(true));
        on.filter_map(|(key, _)| key.strip_prefix("pooling_mode_")).collect()
    });
    ensure!(
        matches!(modes.as_slice(), ["mean" | "mean_tokens"]),
        "`{}` asks for the pooling {modes:?}, expected [\"mean\"]",
        path.display()
    );
    Ok(())
}

/// `max_seq_length`, else the tokenizer's `model_max_length`, and never beyond the positions.
fn max_tokens(folder: &Path, config: &BertConfig) -> Result<usize> {
    #[derive(Deserialize)]
    struct SentenceBert {
        max_seq_length: Option<usize>,
        #[serde(default)]
        do_lower_case: bool,
    }
    #[derive(Deserialize)]
    struct TokenizerConfig {
        // Written as 1e30 where there is no limit.
        model_max_length: Option<f64>,
    }
    let sentence: Option<SentenceBert> = read_optional(&folder.join("sentence_bert_config.json"))?;
    let tokenizer: Option<TokenizerConfig> = read_optional(&folder.join("tokenizer_config.json"))?;
    ensure!(
        !sentence.as_ref().is_some_and(|sentence| sentence.do_lower_case),
        "`sentence_bert_config.json`: `do_lower_case` is true, expected the tokenizer to do it"
    );
    let limit = sentence.and_then(|sentence| sentence.max_seq_length);
    let of_tokenizer = tokenizer.and_then(|tokenizer| tokenizer.model_max_length);
    let limit = limit.or(of_tokenizer.map(|length| length.min(u32::MAX.into()) as usize));
    Ok(limit.unwrap_or(usize::MAX).min(config.max_position_embeddings))
}

/// Weights as in the checkpoint; all f32 on one device.
#[derive(Debug)]
struct Bert {
    config: BertConfig,
    word_embeddings: Tensor,
    position_embeddings: Tensor,
    token_type: Tensor,
    embeddings_norm: LayerNorm,
    layers: Vec<BertLayer>,
    device: Device,
}

#[derive(Debug)]
struct BertLayer {
    query: Linear,
    key: Linear,
    value: Linear,
    attention_output: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
}

#[derive(Debug)]
struct Linear {
    weight: Tensor, // [out, in]
    bias: Tensor,   // [out]
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, Some(&self.bias))
    }
}

#[derive(Debug)]
struct LayerNorm {
    weight: Tensor, // [hidden]
    bias: Tensor,   // [hidden]
    eps: f64,
}

impl LayerNorm {
    fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.eps, false)
    }
}

impl Bert {
    fn load(bytes: &[u8], config: BertConfig, device: Device) -> Result<Self> {
        let weights = Weights::open(bytes, device)?;
        let (hidden, eps) = (config.hidden_size as i64, config.layer_norm_eps);
        let embeddings = |name: &str, rows: usize| {
            weights.tensor(&format!("embeddings.{name}.weight"), &[rows as i64, hidden])
        };
        let token_types = embeddings("token_type_embeddings", config.type_vocab_size)?;
        ensure!(config.type_vocab_size > 0, "`type_vocab_size` is 0, expected 1 or more");
        Ok(Self {
            word_embeddings: embeddings("word_embeddings", config.vocab_size)?,
            position_embeddings: embeddings("position_embeddings", config.max_position_embeddings)?,
            // A single text is of the first type throughout.
            token_type: token_types.get(0),
            embeddings_norm: weights.layer_norm("embeddings.LayerNorm", hidden, eps)?,
            layers: (0..config.num_hidden_layers)
                .map(|layer| BertLayer::load(&weights, &config, layer))
                .collect::<Result<_>>()?,
            config,
            device,
        })
    }

    /// Unit embeddings of a batch, `[batch, hidden]` f32 on the CPU.
    fn embed(&self, batch: &[&[u32]]) -> Tensor {
        let (ids, mask) = self.pad(batch);
        let hidden = self.forward(&ids, &mask); // [batch, tokens, hidden]
        let mask = mask.unsqueeze(-1); // [batch, tokens, 1]
        let sum = (hidden * &mask).sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
        let count = mask.sum_dim_intlist([1i64].as_slice(), false, Kind::Float).clamp_min(1e-9);
        let mean = sum / count; // [batch, hidden]
        let norm = mean.norm_scalaropt_dim(2, [1i64].as_slice(), true).clamp_min(1e-12);
        (mean / norm).to_device(Device::Cpu)
    }

    /// Right-padded ids, `[batch, tokens]` i64, and their mask, `[batch, tokens]` f32.
    fn pad(&self, batch: &[&[u32]]) -> (Tensor, Tensor) {
        let width = batch.iter().map(|ids| ids.len()).max().unwrap_or(0);
        let mut ids = vec![0i64; batch.len() * width];
        let mut mask = vec![0f32; batch.len() * width];
        for (row, tokens) in batch.iter().enumerate() {
            for (column, &token) in tokens.iter().enumerate() {
                ids[row * width + column] = i64::from(token);
                mask[row * width + column] = 1.0;
            }
        }
        let shape = [batch.len() as i64, width as i64];
        let place = |tensor: Tensor| tensor.view(shape).to_device(self.device);
        (place(Tensor::from_slice(&ids)), place(Tensor::from_slice(&mask)))
    }

    /// Last hidden states, `[batch, tokens, hidden]`.
    fn forward(&self, ids: &Tensor, mask: &Tensor) -> Tensor {
        let tokens = ids.size()[1];
        let embedded = Tensor::embedding(&self.word_embeddings, ids, -1, false, false)
            + &self.token_type
            + self.position_embeddings.narrow(0, 0, tokens);
        // Padding is kept from being attended to by a bias that no score outweighs.
        let bias = ((mask - 1.0) * f64::from(f32::MAX)).unsqueeze(1).unsqueeze(1); // [batch, 1, 1, tokens]
        let heads = self.config.num_attention_heads as i64;
        let embedded = self.embeddings_norm.forward(&embedded);
        self.layers.iter().fold(embedded, |hidden, layer| layer.forward(&hidden, &bias, heads))
    }
}

impl BertLayer {
    fn load(weights: &Weights, config: &BertConfig, layer: usize) -> Result<Self> {
        let (hidden, inter) = (config.hidden_size as i64, config.intermediate_size as i64);
        let eps = config.layer_norm_eps;
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        Ok(Self {
            query: weights.linear(&name("attention.self.query"), hidden, hidden)?,
            key: weights.linear(&name("attention.self.key"), hidden, hidden)?,
            value: weights.linear(&name("attention.self.value"), hidden, hidden)?,
            attention_output: weights.linear(&name("attention.output.dense"), hidden, hidden)?,
            attention_norm: weights.layer_norm(&name("attention.output.LayerNorm"), hidden, eps)?,
            intermediate: weights.linear(&name("intermediate.dense"), inter, hidden)?,
            output: weights.linear(&name("output.dense"), hidden, inter)?,
            output_norm: weights.layer_norm(&name("output.LayerNorm"), hidden, eps)?,
        })
    }

    fn forward(&self, x: &Tensor, bias: &Tensor, heads: i64) -> Tensor {
        let attended = self.attention_output.forward(&self.attention(x, bias, heads));
        let x = self.attention_norm.forward(&(attended + x));
        let inner = self.intermediate.forward(&x).gelu("none");
        self.output_norm.forward(&(self.output.forward(&inner) + x))
    }

    fn attention(&self, x: &Tensor, bias: &Tensor, heads: i64) -> Tensor {
        let (batch, tokens, hidden) = (x.size()[0], x.size()[1], x.size()[2]);
        let head_dim = hidden / heads;
        let split = |x: Tensor| x.view([batch, tokens, heads, head_dim]).transpose(1, 2);
        let query = split(self.query.forward(x)); // [batch, heads, tokens, head_dim]
        let key = split(self.key.forward(x));
        let value = split(self.value.forward(x));
        let scores = query.matmul(&key.transpose(-2, -1)) / (head_dim as f64).sqrt() + bias;
        let attended = scores.softmax(-1, Kind::Float).matmul(&value);
        attended.transpose(1, 2).reshape([batch, tokens, hidden])
    }
}

/// A safetensors file of a BERT, with or without the prefix `bert.`.
struct Weights<'a> {
    file: SafeTensors<'a>,
    prefix: &'static str,
    device: Device,
}

impl<'a> Weights<'a> {
    fn open(bytes: &'a [u8], device: Device) -> Result<Self> {
        let file = SafeTensors::deserialize(bytes).context("the file is damaged")?;
        let prefixed = file.tensor("bert.embeddings.word_embeddings.weight").is_ok();
        Ok(Self { file, prefix: if prefixed { "bert." } else { "" }, device })
    }

    /// A tensor as f32 on the device.
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let name = format!("{}{name}", self.prefix);
        let view = self.file.tensor(&name).map_err(|_| anyhow::anyhow!("`{name}` is missing"))?;
        let found: Vec<i64> = view.shape().iter().map(|&axis| axis as i64).collect();
        ensure!(found == shape, "`{name}` has shape {found:?}, expected {shape:?}");
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::F16 => Kind::Half,
            Dtype::BF16 => Kind::BFloat16,
            other => bail!("`{name}` is {other:?}, expected F32, F16 or BF16"),
        };
        let tensor = Tensor::f_from_data_size(view.data(), shape, kind)?;
        Ok(tensor.to_kind(Kind::Float).to_device(self.device))
    }

    fn linear(&self, name: &str, out: i64, input: i64) -> Result<Linear> {
        let weight = self.tensor(&format!("{name}.weight"), &[out, input])?;
        Ok(Linear { weight, bias: self.tensor(&format!("{name}.bias"), &[out])? })
    }

    fn layer_norm(&self, name: &str, hidden: i64, eps: f64) -> Result<LayerNorm> {
        let weight = self.tensor(&format!("{name}.weight"), &[hidden])?;
        Ok(LayerNorm { weight, bias: self.tensor(&format!("{name}.bias"), &[hidden])?, eps })
    }
}
