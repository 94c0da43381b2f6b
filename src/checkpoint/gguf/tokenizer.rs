//! A `tokenizer.json` from GGUF metadata.
//!
//! The metadata hold the vocabulary, the merges, each token's type and the name of the splitting of text
//! that precedes BPE (`tokenizer.ggml.pre`); what that name means is written in llama.cpp, and here.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::metadata::{Metadata, end_ids};
use crate::data::tokenizer::TokenizerFiles;
use crate::error::user_error;
use crate::model::config::Architecture;

/// Llama 3's splitting: contractions in any case, words with one leading sign, up to three digits, and so on.
const LLAMA_3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Types of tokens, ggml's numbers.
const NORMAL: i128 = 1;
const CONTROL: i128 = 3;
const USER_DEFINED: i128 = 4;

/// How text is split before BPE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Split {
    /// GPT-2's pattern.
    Gpt2,
    /// Every digit by itself, then GPT-2's pattern: StarCoder, SmolLM.
    Digits,
    /// Llama 3's pattern; a word that is a token is taken whole.
    Llama3,
}

impl Split {
    /// The splitting of that name. Granite files carry `refact`, because llama.cpp's test sentence cannot tell
    /// the two apart; Granite's own tokenizer does not split digits off (its vocabulary does), which shows
    /// where several spaces precede a number.
    fn named(name: &str, architecture: Architecture) -> Result<Self> {
        Ok(match (name, architecture) {
            ("refact" | "starcoder" | "granite", Architecture::Granite) | ("gpt-2" | "gpt2", _) => Self::Gpt2,
            ("smollm" | "refact" | "starcoder", _) => Self::Digits,
            ("llama-bpe" | "llama3" | "llama-v3", _) => Self::Llama3,
            _ => {
                return Err(user_error(
                    format!("splitting of text `{name}` (`tokenizer.ggml.pre`) is not known"),
                    "give the model's Hugging Face folder instead, whose `tokenizer.json` says it in full",
                ));
            }
        })
    }

    fn pre_tokenizer(self) -> Value {
        let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let sequence =
            |first: Value, second: Value| json!({"type": "Sequence", "pretokenizers": [first, second]});
        match self {
            Self::Gpt2 => byte_level(true),
            Self::Digits => sequence(json!({"type": "Digits", "individual_digits": true}), byte_level(true)),
            Self::Llama3 => sequence(
                json!({"type": "Split", "pattern": {"Regex": LLAMA_3_SPLIT}, "behavior": "Isolated", "invert": false}),
                byte_level(false),
            ),
        }
    }
}

/// Rebuilds the tokenizer files.
///
/// # Errors
/// When the tokenizer is no byte-level BPE, its splitting is not known, or its parts do not fit each other.
pub fn rebuild(metadata: Metadata<'_>, architecture: Architecture) -> Result<TokenizerFiles> {
    let model = metadata.text("tokenizer.ggml.model")?.context("missing key `tokenizer.ggml.model`")?;
    if model != "gpt2" {
        return Err(user_error(
            format!("tokenizer `{model}` is not supported, expected `gpt2` (byte-level BPE)"),
            "give the model's Hugging Face folder instead",
        ));
    }
    let split = Split::named(metadata.text("tokenizer.ggml.pre")?.unwrap_or("none"), architecture)?;
    let vocabulary = Vocabulary::read(metadata)?;
    let special = |key: &str| -> Result<Option<String>> {
        let id: Option<usize> = metadata.integer(key)?;
        id.map(|id| vocabulary.text(id).with_context(|| format!("`{key}`")).map(str::to_string)).transpose()
    };
    let bos_token = special("tokenizer.ggml.bos_token_id")?;
    let begins_with =
        bos_token.clone().filter(|_| matches!(metadata.bool("tokenizer.ggml.add_bos_token"), Ok(Some(true))));
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": null,
        "pre_tokenizer": split.pre_tokenizer(),
        "post_processor": vocabulary.post_processor(begins_with.as_deref()),
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": split == Split::Llama3,
            "vocab": vocabulary.as_json(),
            "merges": merges(metadata, &vocabulary)?,
        },
    });
    Ok(TokenizerFiles {
        tokenizer_json: serde_json::to_vec(&tokenizer)?,
        chat_template: metadata.text("tokenizer.chat_template")?.map(str::to_string),
        bos_token,
        eos_token: special("tokenizer.ggml.eos_token_id")?,
        pad_token: special("tokenizer.ggml.padding_token_id")?,
        eos_token_ids: end_ids(metadata)?,
    })
}

/// Tokens by id and ids by token.
struct Vocabulary<'a> {
    tokens: &'a [String],
    ids: BTreeMap<&'a str, usize>,
    types: Vec<i128>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: Metadata<'a>) -> Result<Self> {
        let tokens = metadata.texts("tokenizer.ggml.tokens")?;
        let types = metadata.integers("tokenizer.ggml.token_type")?.unwrap_or_else(|| vec![1; tokens.len()]);
        ensure!(types.len() == tokens.len(), "{} tokens but {} types", tokens.len(), types.len());
        let mut ids = BTreeMap::new();
        for (id, token) in tokens.iter().enumerate() {
            if let Some(before) = ids.insert(token.as_str(), id) {
                bail!("ids {before} and {id} are the same token `{token}`");
            }
        }
        Ok(Self { tokens, ids, types })
    }

    fn text(&self, id: usize) -> Result<&'a str> {
        let text = self.tokens.get(id).map(String::as_str);
        text.with_context(|| format!("id {id} is beyond the {} tokens", self.tokens.len()))
    }

    /// Whether no token joins others, but for those that are found before the text is split.
    fn is_of_bytes(&self) -> bool {
        let tokens = self.tokens.iter().zip(&self.types);
        tokens.filter(|(_, kind)| **kind == NORMAL).all(|(token, _)| token.chars().count() == 1)
    }

    fn as_json(&self) -> Map<String, Value> {
        self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect()
    }

    /// Tokens that are found in the text before it is split: control tokens, which decoding may skip, and the user's own.
    fn added_tokens(&self) -> Vec<Value> {
        let added = |id: usize, token: &str, special: bool| {
            json!({
                "id": id, "content": token, "special": special,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            })
        };
        let tokens = self.tokens.iter().zip(&self.types).enumerate();
        tokens
            .filter(|(_, (_, kind))| matches!(**kind, CONTROL | USER_DEFINED))
            .map(|(id, (token, kind))| added(id, token, *kind == CONTROL))
            .collect()
    }

    /// Puts the beginning-of-text token first where the model wants one.
    fn post_processor(&self, begins_with: Option<&str>) -> Value {
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
        let Some((token, id)) = begins_with.and_then(|token| Some((token, self.ids.get(token)?))) else {
            return byte_level;
        };
        let begin = json!({"SpecialToken": {"id": token, "type_id": 0}});
        let sequence = |id: &str, type_id: u32| json!({"Sequence": {"id": id, "type_id": type_id}});
        json!({"type": "Sequence", "processors": [byte_level, {
            "type": "TemplateProcessing",
            "single": [begin, sequence("A", 0)],
            "pair": [begin, sequence("A", 0), begin, sequence("B", 1)],
            "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
        }]})
    }
}

/// The merges as pairs, each checked to join two tokens into a third.
fn merges(metadata: Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Vec<Value>> {
    const KEY: &str = "tokenizer.ggml.merges";
    if !metadata.contains(KEY) && vocabulary.is_of_bytes() {
        // Writers leave an empty list out.
        return Ok(Vec::new());
    }
    let merges = metadata.texts(KEY)?;
    let pair = |merge: &String| {
        let (left, right) = merge.split_once(' ').with_context(|| format!("merge `{merge}` is no pair"))?;
        for token in [left, right, &format!("{left}{right}")] {
            ensure!(
                vocabulary.ids.contains_key(token),
                "merge `{merge}` needs the token `{token}`, which is missing"
            );
        }
        Ok(json!([left, right]))
    };
    merges.iter().map(pair).collect()
}
