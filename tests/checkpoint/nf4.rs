//! NF4 against bitsandbytes: `scripts/oracle/nf4.py` wrote the fixtures.

use std::collections::BTreeMap;

use granite::hex::hex;
use granite::kernels::dynamic_map::dynamic_map;
use granite::kernels::host;
use granite::kernels::nf4::{LEVELS, Nf4Weight};
use half::{bf16, f16};
use safetensors::SafeTensors;
use sha2::{Digest as _, Sha256};
use tch::{Kind, Tensor};

const FIXTURE: &[u8] = include_bytes!("../fixtures/nf4.safetensors");
const MILLION: &str = include_str!("../fixtures/nf4_million.json");

fn fixture(name: &str) -> Tensor {
    let file = SafeTensors::deserialize(FIXTURE).unwrap();
    let view = file.tensor(name).unwrap();
    let kind = match view.dtype() {
        safetensors::Dtype::F32 => Kind::Float,
        safetensors::Dtype::BF16 => Kind::BFloat16,
        safetensors::Dtype::F16 => Kind::Half,
        safetensors::Dtype::U8 => Kind::Uint8,
        other => panic!("unexpected dtype {other:?}"),
    };
    let shape: Vec<i64> = view.shape().iter().map(|axis| *axis as i64).collect();
    Tensor::from_data_size(view.data(), &shape, kind)
}

/// The bytes of a tensor, so that `-0.0`, denormals and NaN count too.
fn bytes(tensor: &Tensor) -> Vec<u8> {
    let tensor = tensor.contiguous();
    match tensor.kind() {
        Kind::Float => {
            host::slice::<f32>(&tensor).unwrap().iter().flat_map(|value| value.to_le_bytes()).collect()
        }
        Kind::BFloat16 => {
            host::slice::<bf16>(&tensor).unwrap().iter().flat_map(|value| value.to_le_bytes()).collect()
        }
        Kind::Half => {
            host::slice::<f16>(&tensor).unwrap().iter().flat_map(|value| value.to_le_bytes()).collect()
        }
        Kind::Uint8 => host::slice::<u8>(&tensor).unwrap().to_vec(),
        other => panic!("unexpected dtype {other:?}"),
    }
}

fn parts(weight: &Nf4Weight) -> BTreeMap<&'static str, Vec<u8>> {
    BTreeMap::from([
        ("packed", bytes(&weight.packed)),
        ("absmax", bytes(&weight.absmax)),
        ("nested_absmax", bytes(&weight.nested_absmax)),
        ("offset", weight.nested_offset.to_le_bytes().to_vec()),
        ("dequantized", bytes(&weight.dequantize(Kind::Float))),
        ("dequantized_bf16", bytes(&weight.dequantize(Kind::BFloat16))),
        ("dequantized_f16", bytes(&weight.dequantize(Kind::Half))),
    ])
}

#[test]
fn levels_and_maps_are_those_of_bitsandbytes() {
    assert_eq!(bytes(&Tensor::from_slice(&LEVELS)), bytes(&fixture("levels")));
    assert_eq!(bytes(&Tensor::from_slice(&dynamic_map(true))), bytes(&fixture("dynamic_map.signed")));
    assert_eq!(bytes(&Tensor::from_slice(&dynamic_map(false))), bytes(&fixture("dynamic_map.unsigned")));
}

#[test]
fn every_part_equals_bitsandbytes_bit_for_bit() {
    for case in ["edge", "normal", "bf16", "f16"] {
        let weight = Nf4Weight::quantize(&fixture(&format!("{case}.weight"))).unwrap();
        weight.check().unwrap();
        for (part, ours) in parts(&weight) {
            let theirs = bytes(&fixture(&format!("{case}.{part}")));
            let differing = ours.iter().zip(&theirs).filter(|(ours, theirs)| ours != theirs).count();
            assert!(ours == theirs, "{case}: `{part}`: {differing} of {} bytes differ", theirs.len());
        }
    }
}

#[test]
fn a_million_values_equal_bitsandbytes() {
    let expected: serde_json::Value = serde_json::from_str(MILLION).unwrap();
    let weight = Nf4Weight::quantize(&Tensor::from_slice(&bell(1 << 20)).view([1024, 1024])).unwrap();
    for (part, ours) in parts(&weight) {
        let hash = hex(&Sha256::digest(&ours));
        assert_eq!(expected["sha256"][part], hash.as_str(), "`{part}`");
    }
}

/// A sum of four 16-bit numbers of SplitMix64, as in the script: near to a bell and exact in f32.
fn bell(count: u64) -> Vec<f32> {
    let value = |index: u64| {
        let mut bits = (index + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^= bits >> 31;
        let sum: i64 = (0..4).map(|part| ((bits >> (16 * part)) & 0xFFFF) as i64).sum();
        (sum - 2 * 0xFFFF) as f32 * 2f32.powi(-21)
    };
    (0..count).map(value).collect()
}

#[test]
fn the_twin_equals_the_fast_path() {
    for case in ["edge", "normal", "bf16", "f16"] {
        let weight = Nf4Weight::quantize(&fixture(&format!("{case}.weight"))).unwrap();
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            assert_eq!(
                bytes(&weight.dequantize(kind)),
                bytes(&weight.dequantize_reference(kind)),
                "{case} {kind:?}"
            );
        }
        assert_eq!(weight.dequantize(Kind::Double).kind(), Kind::Double);
    }
}

#[test]
fn a_strided_weight_is_read_in_its_own_order() {
    let weight = fixture("normal.weight");
    let strided = weight.tr().contiguous().tr();
    assert!(!strided.is_contiguous());
    assert_eq!(parts(&Nf4Weight::quantize(&strided).unwrap()), parts(&Nf4Weight::quantize(&weight).unwrap()));
}

#[test]
fn what_cannot_be_quantised_is_refused() {
    let message = |weight: Tensor| format!("{:#}", Nf4Weight::quantize(&weight).unwrap_err());
    assert!(message(Tensor::zeros([64], (Kind::Float, tch::Device::Cpu))).contains("shape [64]"));
    assert!(message(Tensor::zeros([3, 21], (Kind::Float, tch::Device::Cpu))).contains("[3, 21]"));
    assert!(message(Tensor::zeros([0, 64], (Kind::Float, tch::Device::Cpu))).contains("[0, 64]"));
    assert!(message(Tensor::zeros([1, 64], (Kind::Int64, tch::Device::Cpu))).contains("Int64"));
    for hostile in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 1, 63] {
            let mut values = [0.5f32; 64];
            values[at] = hostile;
            assert!(
                message(Tensor::from_slice(&values).view([1, 64])).contains("not finite"),
                "{hostile} at {at}"
            );
        }
    }
}
