//! The cache of quantised weights: written once, mapped afterwards, never trusted when damaged.

use std::path::{Path, PathBuf};

use granite::checkpoint::base::BaseModel;
use granite::checkpoint::nf4_cache::Nf4Cache;
use granite::kernels::nf4::Nf4Weight;
use granite::model::weights::TensorSource as _;
use granite::recipe::Projection;
use tch::{Device, Kind};

use crate::tiny;

fn cache(folder: &Path) -> (Nf4Cache, BaseModel) {
    let model = BaseModel::open(&tiny("granite")).unwrap();
    let inner = BaseModel::open(&tiny("granite")).unwrap();
    (Nf4Cache::new(inner.tensors, &model.config, &model.hash, folder), model)
}

/// Asks for every linear weight and compares it with one quantised on the spot.
fn check_all(cache: &Nf4Cache, model: &BaseModel) {
    for layer in 0..model.config.num_hidden_layers {
        for projection in Projection::ALL {
            let name = format!("{}.weight", projection.path(layer));
            let (ours, expected) =
                (cache.nf4(&name, Device::Cpu).unwrap(), model.tensors.nf4(&name, Device::Cpu).unwrap());
            assert!(same(&ours, &expected), "{name}");
        }
    }
}

fn same(one: &Nf4Weight, other: &Nf4Weight) -> bool {
    one.shape == other.shape
        && one.packed.equal(&other.packed)
        && one.absmax.equal(&other.absmax)
        && one.nested_absmax.equal(&other.nested_absmax)
        && one.nested_code.equal(&other.nested_code)
        && one.nested_offset.to_bits() == other.nested_offset.to_bits()
        && one.dequantize(Kind::Float).equal(&other.dequantize(Kind::Float))
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn the_second_start_reads_what_the_first_wrote() {
    let folder = tempfile::tempdir().unwrap();
    let (first, model) = cache(folder.path());
    assert!(!first.is_ready());
    check_all(&first, &model);
    assert_eq!(files(folder.path()), [folder.path().join(&model.hash)]);
    let (second, model) = cache(folder.path());
    assert!(second.is_ready());
    check_all(&second, &model);
    assert_eq!(second.names(), model.tensors.names());
}

#[test]
fn a_load_that_stops_early_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (first, _) = cache(folder.path());
    first.nf4("model.layers.0.self_attn.q_proj.weight", Device::Cpu).unwrap();
    drop(first);
    assert!(files(folder.path()).is_empty());
}

#[test]
fn a_damaged_cache_is_written_anew() {
    let folder = tempfile::tempdir().unwrap();
    let (first, model) = cache(folder.path());
    check_all(&first, &model);
    let tensors = folder.path().join(&model.hash).join("nf4.safetensors");
    let manifest = folder.path().join(&model.hash).join("manifest.json");
    let (good_tensors, good_manifest) = (std::fs::read(&tensors).unwrap(), std::fs::read(&manifest).unwrap());
    let mut flipped = good_tensors.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let other_version = String::from_utf8(good_manifest.clone())
        .unwrap()
        .replace("\"format_version\": 1", "\"format_version\": 0");
    let cut = good_tensors[..good_tensors.len() - 1].to_vec();
    let cases = [
        ("flipped bit", flipped, good_manifest.clone()),
        ("cut", cut, good_manifest.clone()),
        ("empty", Vec::new(), good_manifest.clone()),
        ("other version", good_tensors.clone(), other_version.into_bytes()),
        ("manifest no JSON", good_tensors.clone(), b"{".to_vec()),
        ("manifest of nothing", good_tensors.clone(), b"{}".to_vec()),
    ];
    for (case, bad_tensors, bad_manifest) in cases {
        std::fs::write(&tensors, bad_tensors).unwrap();
        std::fs::write(&manifest, bad_manifest).unwrap();
        let (again, model) = cache(folder.path());
        assert!(!again.is_ready(), "{case}");
        check_all(&again, &model);
        assert_eq!(std::fs::read(&tensors).unwrap(), good_tensors, "{case}");
        assert_eq!(std::fs::read(&manifest).unwrap(), good_manifest, "{case}");
        assert!(cache(folder.path()).0.is_ready(), "{case}");
    }
}

#[test]
fn a_folder_that_cannot_be_written_costs_only_time() {
    let folder = tempfile::tempdir().unwrap();
    let blocked = folder.path().join("file");
    std::fs::write(&blocked, b"in the way").unwrap();
    let (cache, model) = cache(&blocked);
    check_all(&cache, &model);
    assert_eq!(std::fs::read(&blocked).unwrap(), b"in the way");
}
