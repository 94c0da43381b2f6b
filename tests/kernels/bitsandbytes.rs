//! Our NF4 against bitsandbytes' own libraries on 2²⁰ values.

use std::path::Path;

use granite::kernels::bitsandbytes::{CpuLibrary, CudaLibrary, LIBRARIES, find, folders};
use granite::kernels::check::codes_beyond_boundary;
use granite::kernels::libtorch;
use granite::kernels::nf4::{BLOCK, LEVELS, NESTED_BLOCK, Nf4Weight};
use tch::{Device, Kind, Tensor};

use crate::skipped;

const SHAPE: [i64; 2] = [1024, 1024];

/// The library of `scripts/setup`, or of the folder that GRANITE_BITSANDBYTES names.
fn library(index: usize) -> Option<std::path::PathBuf> {
    let given = std::env::var_os("GRANITE_BITSANDBYTES");
    let libtorch = libtorch::loaded().map(|libtorch| libtorch.folder);
    let folders = folders(given.as_deref().map(Path::new), libtorch.as_deref());
    let found = find(&folders, LIBRARIES[index]);
    if found.is_none() {
        skipped("NF4 against bitsandbytes", &format!("no `{}`; scripts/setup installs it", LIBRARIES[index]));
    }
    found
}

fn cpu_library() -> Option<CpuLibrary> {
    library(0).map(|file| CpuLibrary::open(&file).expect("the library that setup installs"))
}

pub fn cuda_library() -> Option<CudaLibrary> {
    library(1).map(|file| CudaLibrary::open(&file).expect("the library that setup installs"))
}

/// Weights as a model has them, with a few blocks far from that: all of one value, and one dominated by an outlier.
fn weight() -> Tensor {
    tch::manual_seed(2305);
    let weight = Tensor::randn(SHAPE, (Kind::Float, Device::Cpu)) * 0.02;
    let block = |index: i64| weight.view([-1, BLOCK as i64]).get(index);
    let _ = block(1).fill_(-0.37);
    let _ = block(2).get(5).fill_(1e4);
    let _ = block(3).fill_(0.02);
    weight
}

#[test]
fn dequantisation_equals_bitsandbytes_bit_for_bit() {
    let Some(library) = cpu_library() else { return };
    let weight = Nf4Weight::quantize(&weight()).expect("a matrix");
    for (kind, integer) in [(Kind::Float, Kind::Int), (Kind::BFloat16, Kind::Int16)] {
        let theirs =
            library.dequantize_nf4(&weight.packed, &weight.scales(), SHAPE, kind).expect("parts that fit");
        let ours = weight.dequantize(kind);
        let different =
            ours.view_dtype(integer).not_equal_tensor(&theirs.view_dtype(integer)).sum(Kind::Int64);
        assert_eq!(different.int64_value(&[]), 0, "{kind:?}: values that differ");
    }
}

#[test]
fn nested_scales_equal_bitsandbytes_bit_for_bit() {
    let Some(library) = cpu_library() else { return };
    let weight = Nf4Weight::quantize(&weight()).expect("a matrix");
    let levels: Vec<f32> = Vec::try_from(&weight.nested_code).expect("f32");
    let levels: [f32; 256] = levels.try_into().expect("256 levels");
    let spread = library
        .dequantize_8bit(&levels, &weight.absmax, &weight.nested_absmax, NESTED_BLOCK)
        .expect("parts that fit");
    let theirs = spread + f64::from(weight.nested_offset);
    assert!(weight.scales().equal(&theirs));
}

/// bitsandbytes' CPU library has no 4-bit quantiser; its 8-bit one takes any ascending codebook, and with the 16 levels
/// followed by values that nothing reaches it gives NF4 codes. It looks them up in a table of 65,536 steps over [-1, 1], so it may
/// miss the boundary of two levels by half a step: 1.5e-5.
#[test]
fn quantisation_differs_from_bitsandbytes_only_on_boundaries() {
    let Some(library) = cpu_library() else { return };
    let weight = weight();
    let ours = Nf4Weight::quantize(&weight).expect("a matrix");
    let mut codebook = [2.0; 256];
    codebook[..16].copy_from_slice(&LEVELS);
    let (codes, scales) = library.quantize_8bit(&codebook, &weight, BLOCK).expect("f32 on the CPU");

    let largest = weight.view([-1, BLOCK as i64]).abs().amax([1i64].as_slice(), false);
    assert!(scales.equal(&largest), "scales of blocks");

    let pairs = codes.view([-1, 2]).to_kind(Kind::Int);
    let packed = (pairs.select(1, 0) * 16 + pairs.select(1, 1)).to_kind(Kind::Uint8);
    let bytes = packed.not_equal_tensor(&ours.packed).sum(Kind::Int64).int64_value(&[]);
    eprintln!("{bytes} of {} bytes differ", packed.numel());
    assert!(bytes < 300, "{bytes} of {} bytes differ; about 80 are expected", packed.numel());
    assert_eq!(codes_beyond_boundary(&weight, &scales, &ours.packed, &packed, 2e-5), 0);
}
