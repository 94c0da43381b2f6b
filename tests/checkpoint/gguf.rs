//! GGUF files as the gguf package writes and unpacks them (`scripts/oracle/gguf_blocks.py`), and hostile ones.

use granite::checkpoint::base::BaseModel;
use granite::checkpoint::gguf::{BlockType, GgufFile};
use granite::model::config::Architecture;
use safetensors::SafeTensors;
use serde_json::Value;
use tch::Kind;

use crate::tiny;

const BLOCKS: &[u8] = include_bytes!("../fixtures/gguf_blocks.safetensors");

fn path(family: &str) -> String {
    format!("{}/tests/fixtures/gguf/tiny-{family}.gguf", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn every_format_unpacks_as_in_the_gguf_package() {
    let file = SafeTensors::deserialize(BLOCKS).unwrap();
    let formats = [
        (BlockType::Q4_0, "Q4_0"),
        (BlockType::Q4_1, "Q4_1"),
        (BlockType::Q5_0, "Q5_0"),
        (BlockType::Q5_1, "Q5_1"),
        (BlockType::Q8_0, "Q8_0"),
        (BlockType::Q4_K, "Q4_K"),
        (BlockType::Q5_K, "Q5_K"),
        (BlockType::Q6_K, "Q6_K"),
    ];
    for (format, name) in formats {
        let packed = file.tensor(&format!("{name}.packed")).unwrap();
        let values = file.tensor(&format!("{name}.values")).unwrap();
        let expected: Vec<u32> = values
            .data()
            .chunks_exact(4)
            .map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        assert_eq!(packed.data().len() / format.block_bytes() * format.block_len(), expected.len(), "{name}");
        let mut ours = vec![f32::NAN; expected.len()];
        format.unpack(packed.data(), &mut ours);
        let different = ours.iter().zip(&expected).position(|(ours, expected)| {
            // A zero has the sign that its factors give it, in numpy as here; compare all bits.
            ours.to_bits() != *expected
        });
        assert_eq!(
            different,
            None,
            "{name}: ours {:?}",
            different.map(|at| (ours[at], f32::from_bits(expected[at])))
        );
    }
}

#[test]
fn plain_formats_keep_their_values() {
    let mut out = [0f32; 2];
    BlockType::F32.unpack(&[0, 0, 0x80, 0x3f, 0, 0, 0, 0x80], &mut out);
    assert_eq!(out.map(f32::to_bits), [1f32.to_bits(), (-0f32).to_bits()]);
    BlockType::F16.unpack(&[0, 0x3c, 1, 0], &mut out);
    assert_eq!(out, [1.0, 2f32.powi(-24)]);
    BlockType::BF16.unpack(&[0x80, 0x3f, 0x80, 0xff], &mut out);
    assert_eq!(out, [1.0, f32::NEG_INFINITY]);
}

#[test]
fn a_converted_model_is_the_model_it_was_converted_from() {
    for family in ["granite", "llama"] {
        let converted = BaseModel::open(&path(family)).unwrap();
        let original = BaseModel::open(&tiny(family)).unwrap();
        assert_eq!(converted.config, original.config, "{family}");
        for name in original.config.tensor_names() {
            let ours = converted.tensors.tensor(&name).unwrap().to_kind(Kind::Float);
            let theirs = original.tensors.tensor(&name).unwrap().to_kind(Kind::Float);
            assert!(ours.equal(&theirs), "{family}: {name}");
            assert_eq!(converted.tensors.shape(&name), original.tensors.shape(&name), "{family}: {name}");
        }
        assert_eq!(converted.tensors.names().len(), original.config.tensor_names().len());
        assert_eq!(converted.tokenizer.chat_template, original.tokenizer.chat_template);
        // Tiny Llama's two files name different end tokens; the converter takes the id of `config.json`.
        if family == "granite" {
            assert_eq!(converted.tokenizer.eos_token, original.tokenizer.eos_token);
        }
        assert_eq!(converted.tokenizer.eos_token_ids, original.tokenizer.eos_token_ids);
        let load =
            |model: &BaseModel| tokenizers::Tokenizer::from_bytes(&model.tokenizer.tokenizer_json).unwrap();
        let (ours, theirs) = (load(&converted), load(&original));
        for text in ["Hello,  12 worlds", "a<|end_of_text|>b", "naïve\n\n😀"] {
            let ids =
                |tokenizer: &tokenizers::Tokenizer| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
            assert_eq!(ids(&ours), ids(&theirs), "{family}: {text}");
        }
    }
}

#[test]
fn granite_carries_its_four_multipliers() {
    let model = BaseModel::open(&path("granite")).unwrap();
    assert_eq!(model.config.architecture, Architecture::Granite);
    let config: Value =
        serde_json::from_slice(&std::fs::read(format!("{}/config.json", tiny("granite"))).unwrap()).unwrap();
    for (key, value) in [
        ("attention_multiplier", model.config.attention_multiplier),
        ("embedding_multiplier", model.config.embedding_multiplier),
        ("residual_multiplier", model.config.residual_multiplier),
        ("logits_scaling", model.config.logits_scaling),
    ] {
        assert_eq!(config[key].as_f64(), Some(value), "{key}");
        assert_ne!(value, 1.0, "{key}");
    }
}

/// What opening these bytes as a GGUF file says.
fn refusal(bytes: &[u8]) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    std::fs::write(&path, bytes).unwrap();
    let file = match GgufFile::open(&path) {
        Ok(file) => file,
        Err(error) => return Some(granite::error::render(&error)),
    };
    // What can be opened can be read without a panic, tensor by tensor.
    let tokenizer = file.tokenizer().err().map(|error| granite::error::render(&error));
    for name in granite::model::weights::TensorSource::names(&file) {
        if let Ok(tensor) = granite::model::weights::TensorSource::tensor(&file, &name) {
            assert!(tensor.numel() < 1 << 20);
        }
    }
    tokenizer
}

#[test]
fn every_cut_of_a_file_is_refused() {
    let whole = std::fs::read(path("granite")).unwrap();
    assert_eq!(refusal(&whole), None);
    let header_ends = 20_000.min(whole.len());
    let lengths =
        (0..64).chain((64..header_ends).step_by(397)).chain([whole.len() - 40_000, whole.len() - 64]);
    for length in lengths {
        let message =
            refusal(&whole[..length]).unwrap_or_else(|| panic!("{length} bytes are taken for whole"));
        assert!(message.contains("x.gguf"), "{message}");
    }
}

#[test]
fn damaged_numbers_never_panic_nor_allocate_without_measure() {
    let whole = std::fs::read(path("llama")).unwrap();
    // Every 8-byte window of the first kilobytes as a huge count, length, offset or axis.
    for at in (0..6_000).step_by(37) {
        for value in [u64::MAX, 1 << 62, 1 << 40, 0] {
            let mut bytes = whole.clone();
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            let _ = refusal(&bytes);
        }
    }
    // And the list of tensors, which lies just before the data.
    let list = whole
        .windows(17)
        .rposition(|window| window == b"output_norm.weigh")
        .or_else(|| whole.windows(10).rposition(|window| window == b"attn_norm."));
    let list = list.unwrap();
    for at in list.saturating_sub(1500)..list + 200 {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xA5;
        let _ = refusal(&bytes);
    }
}

#[test]
fn other_files_are_told_apart() {
    let message = |bytes: &[u8]| refusal(bytes).unwrap();
    assert!(message(b"PK\x03\x04 a zip file, say").contains("does not begin with `GGUF`"));
    assert!(message(b"").contains("is empty"));
    assert!(message(b"GGUF\x01\0\0\0").contains("version 1"));
    assert!(message(b"GGUF\0\0\0\x03\0\0\0\0").contains("big-endian"));
    let pointer = message(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n");
    assert!(pointer.contains("Git-LFS pointer") && pointer.contains("hint: "), "{pointer}");
}
