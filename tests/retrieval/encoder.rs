//! The encoder against sentence-transformers (`scripts/oracle/minilm.py`).

use std::fs;
use std::path::Path;

use granite::retrieval::encoder::Encoder;
use safetensors::SafeTensors;
use serde::Deserialize;
use tch::Device;

use crate::{fixture, folder};

#[derive(Deserialize)]
struct Expected {
    texts: Vec<String>,
    max_seq_length: usize,
    embeddings: Vec<Vec<f32>>,
}

fn expected(path: &Path) -> Expected {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The largest difference of any number of any embedding.
fn largest_difference(encoder: &Encoder, expected: &Expected) -> f32 {
    let texts: Vec<&str> = expected.texts.iter().map(String::as_str).collect();
    let rows = encoder.encode(&texts, |_| ()).unwrap();
    let rows = rows.chunks_exact(encoder.dim());
    assert_eq!(rows.len(), expected.embeddings.len());
    let pairs = rows.zip(&expected.embeddings).flat_map(|(ours, theirs)| {
        assert_eq!(ours.len(), theirs.len());
        ours.iter().zip(theirs).map(|(a, b)| (a - b).abs())
    });
    pairs.fold(0.0, f32::max)
}

#[test]
fn all_minilm_equals_sentence_transformers() {
    let Ok(model) = std::env::var("GRANITE_MINILM") else {
        eprintln!("skipped: GRANITE_MINILM does not name the folder of all-MiniLM-L6-v2");
        return;
    };
    let encoder = Encoder::open(Path::new(&model), Device::Cpu).unwrap();
    let expected = expected(&fixture("minilm/embeddings.json"));
    assert_eq!((encoder.dim(), encoder.max_tokens() + 2), (384, expected.max_seq_length));
    let difference = largest_difference(&encoder, &expected);
    eprintln!("all-MiniLM-L6-v2: {} texts, largest difference {difference:e}", expected.texts.len());
    assert!(difference <= 1e-5, "{difference:e}");
}

#[test]
fn the_tiny_encoder_equals_sentence_transformers() {
    let encoder = Encoder::open(&fixture("encoder-tiny"), Device::Cpu).unwrap();
    let expected = expected(&fixture("encoder-tiny/embeddings.json"));
    assert_eq!((encoder.dim(), encoder.max_tokens() + 2), (24, expected.max_seq_length));
    let difference = largest_difference(&encoder, &expected);
    assert!(difference <= 1e-5, "{difference:e}");
}

#[test]
fn a_batch_changes_no_embedding() {
    let encoder = Encoder::open(&fixture("encoder-tiny"), Device::Cpu).unwrap();
    let texts: Vec<String> = (0..70).map(|n| "net present value ".repeat(n % 13)).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let mut heard = 0;
    let together = encoder.encode(&texts, |done| heard += done).unwrap();
    assert_eq!(heard, texts.len());
    for (text, row) in texts.iter().zip(together.chunks_exact(encoder.dim())) {
        let alone = encoder.encode(&[text], |_| ()).unwrap();
        let length: f32 = row.iter().map(|x| x * x).sum();
        assert!((length - 1.0).abs() < 1e-5);
        assert!(row.iter().zip(&alone).all(|(a, b)| (a - b).abs() < 1e-5), "{text}");
    }
    assert!(encoder.encode(&[], |_| ()).unwrap().is_empty());
}

/// A copy of the tiny encoder in which `file` is what `change` makes of it.
fn changed(file: &str, change: impl Fn(Vec<u8>) -> Option<Vec<u8>>) -> tempfile::TempDir {
    let copy = folder(&[]);
    for name in [
        "config.json",
        "model.safetensors",
        "modules.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "1_Pooling/config.json",
    ] {
        let bytes = fs::read(fixture("encoder-tiny").join(name)).unwrap();
        let bytes = if name == file { change(bytes) } else { Some(bytes) };
        fs::create_dir_all(copy.path().join("1_Pooling")).unwrap();
        if let Some(bytes) = bytes {
            fs::write(copy.path().join(name), bytes).unwrap();
        }
    }
    copy
}

fn replaced(file: &str, old: &str, new: &str) -> tempfile::TempDir {
    changed(file, |bytes| {
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.contains(old), "{old} is not in {file}");
        Some(text.replace(old, new).into_bytes())
    })
}

#[test]
fn a_prefix_is_understood() {
    let prefixed = changed("model.safetensors", |bytes| {
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let views = file.tensors().into_iter().map(|(name, view)| (format!("bert.{name}"), view));
        Some(safetensors::serialize(views, None).unwrap())
    });
    let expected = expected(&fixture("encoder-tiny/embeddings.json"));
    let encoder = Encoder::open(prefixed.path(), Device::Cpu).unwrap();
    assert!(largest_difference(&encoder, &expected) <= 1e-5);
    let plain = Encoder::open(&fixture("encoder-tiny"), Device::Cpu).unwrap();
    assert_ne!(encoder.identity(), plain.identity());
}

#[test]
fn the_older_spelling_of_pooling_is_understood() {
    let flags = |mean: bool, cls: bool| {
        let text = format!(
            r#"{{"word_embedding_dimension":24,"pooling_mode_mean_tokens":{mean},"pooling_mode_cls_token":{cls}}}"#
        );
        changed("1_Pooling/config.json", move |_| Some(text.clone().into_bytes()))
    };
    assert!(Encoder::open(flags(true, false).path(), Device::Cpu).is_ok());
    assert!(Encoder::open(flags(true, true).path(), Device::Cpu).is_err());
    assert!(Encoder::open(flags(false, false).path(), Device::Cpu).is_err());
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let cases = [
        (replaced("1_Pooling/config.json", r#""mean""#, r#""cls""#), "asks for the pooling [\"cls\"]"),
        (replaced("modules.json", "normalize.Normalize", "dense.Dense"), "\"Dense\""),
        (replaced("config.json", r#""gelu""#, r#""relu""#), "`hidden_act` is `relu`, expected `gelu`"),
        (replaced("config.json", r#""bert""#, r#""mpnet""#), "`model_type` is `mpnet`, expected `bert`"),
        (replaced("config.json", "\"num_attention_heads\": 3", "\"num_attention_heads\": 5"), "no multiple"),
        (replaced("config.json", "\"num_attention_heads\": 3", "\"num_attention_heads\": 0"), "no multiple"),
        (
            replaced("config.json", "\"intermediate_size\": 40", "\"intermediate_size\": 44"),
            "`encoder.layer.0.intermediate.dense.weight` has shape [40, 24], expected [44, 24]",
        ),
        (
            replaced("config.json", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"),
            "`encoder.layer.2.attention.self.query.weight` is missing",
        ),
        (
            replaced("config.json", "\"vocab_size\": 164", "\"vocab_size\": 9"),
            "embeddings.word_embeddings.weight",
        ),
        (replaced("tokenizer_config.json", "48", "2"), "`max_seq_length` is 2"),
        (
            changed("model.safetensors", |bytes| Some(bytes[..bytes.len() / 2].to_vec())),
            "the file is damaged",
        ),
        (changed("model.safetensors", |_| Some(Vec::new())), "the file is damaged"),
        (changed("tokenizer.json", |_| Some(b"{}".to_vec())), "`tokenizer.json` is damaged"),
        (changed("modules.json", |_| None), "modules.json"),
        (changed("1_Pooling/config.json", |_| None), "1_Pooling"),
    ];
    for (folder, part) in cases {
        let error = Encoder::open(folder.path(), Device::Cpu).unwrap_err();
        let text = granite::error::render(&error);
        assert!(text.contains(part), "`{part}` is not in:\n{text}");
        assert!(text.contains("hint: `serve.encoder`"), "{text}");
    }
}

#[test]
fn spans_are_those_of_the_text() {
    let encoder = Encoder::open(&fixture("encoder-tiny"), Device::Cpu).unwrap();
    let text = "Net Présent value: 3.5 % ".repeat(40);
    let spans = encoder.token_spans(&text).unwrap();
    assert!(spans.len() > encoder.max_tokens());
    assert!(spans.windows(2).all(|pair| pair[0].end <= pair[1].start));
    assert_eq!(&text[spans[0].clone()], "Net");
    assert!(encoder.token_spans("").unwrap().is_empty());
}
