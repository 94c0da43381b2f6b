//! Small safetensors files, read and written whole: adapters and optimiser states.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, View};
use tch::{Device, Kind, Tensor};

/// Tensors by name, on the CPU.
pub type NamedTensors = BTreeMap<String, Tensor>;

/// Reads every tensor of a safetensors file in the dtype it has there.
///
/// # Errors
/// When the file is missing or damaged, or a tensor is of a dtype that none of our files has.
pub fn read(path: &Path) -> Result<NamedTensors> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let file = SafeTensors::deserialize(&bytes)
        .with_context(|| format!("`{}` is no whole safetensors file", path.display()))?;
    file.iter()
        .map(|(name, view)| {
            let tensor =
                tensor_of(&view).with_context(|| format!("tensor `{name}` of `{}`", path.display()))?;
            Ok((name.to_string(), tensor))
        })
        .collect()
}

fn tensor_of(view: &TensorView<'_>) -> Result<Tensor> {
    let shape: Vec<i64> = view.shape().iter().map(|size| *size as i64).collect();
    Ok(Tensor::f_from_data_size(view.data(), &shape, kind_of(view.dtype())?)?)
}

/// Writes tensors as a safetensors file; same tensors, same bytes. Call it on a path inside a staged folder.
///
/// # Errors
/// When the file cannot be written or a tensor's dtype has no name there.
pub fn write(path: &Path, tensors: &NamedTensors) -> Result<()> {
    let views = tensors
        .iter()
        .map(|(name, tensor)| Ok((name.as_str(), TensorBytes::new(tensor)?)))
        .collect::<Result<Vec<_>>>()?;
    // Readers of the Hugging Face family refuse a file that does not say which framework's layout it has.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let in_file = || format!("cannot write `{}`", path.display());
    // The library's file is readable by its user alone: it gets what the user's mask gives a file.
    let of_the_mask =
        File::create(path).and_then(|file| file.metadata()).with_context(in_file)?.permissions();
    safetensors::serialize_to_file(views, Some(metadata), path).with_context(in_file)?;
    fs::set_permissions(path, of_the_mask).with_context(in_file)
}

struct TensorBytes {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl TensorBytes {
    fn new(tensor: &Tensor) -> Result<Self> {
        let tensor = tensor.to_device(Device::Cpu).contiguous();
        let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        let shape = tensor.size().iter().map(|size| *size as usize).collect();
        Ok(Self { dtype: dtype_of(tensor.kind())?, shape, bytes })
    }
}

impl View for TensorBytes {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

fn kind_of(dtype: Dtype) -> Result<Kind> {
    Ok(match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::U8 => Kind::Uint8,
        other => bail!("dtype {other:?} is not one of F32, F16, BF16, U8"),
    })
}

fn dtype_of(kind: Kind) -> Result<Dtype> {
    Ok(match kind {
        Kind::Float => Dtype::F32,
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Uint8 => Dtype::U8,
        other => bail!("dtype {other:?} is not one of Float, Half, BFloat16, Uint8"),
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_bit_for_bit_in_every_dtype() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let values = Tensor::from_slice(&[1.5f32, -0.1, f32::MIN_POSITIVE, 3.0e38]);
        let tensors: NamedTensors = [Kind::Float, Kind::Half, Kind::BFloat16]
            .into_iter()
            .map(|kind| (format!("{kind:?}"), values.to_kind(kind).view([2, 2])))
            .chain([("codes".to_string(), Tensor::from_slice(&[0u8, 255, 7]))])
            .chain([("nothing".to_string(), Tensor::zeros([0], (Kind::Float, Device::Cpu)))])
            .collect();
        write(&path, &tensors).unwrap();
        let first = std::fs::read(&path).unwrap();
        let read_back = read(&path).unwrap();
        assert_eq!(read_back.keys().collect::<Vec<_>>(), tensors.keys().collect::<Vec<_>>());
        for (name, tensor) in &tensors {
            assert_eq!(read_back[name].kind(), tensor.kind());
            assert!(read_back[name].equal(tensor), "{name}");
        }
        write(&path, &read_back).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), first);
        let plain = folder.path().join("plain");
        fs::write(&plain, "").unwrap();
        let readable_as = |path: &Path| fs::metadata(path).unwrap().permissions();
        assert_eq!(readable_as(&path), readable_as(&plain));
    }

    #[test]
    fn a_cut_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        write(&path, &NamedTensors::from([("a".to_string(), Tensor::from_slice(&[1.0f32, 2.0]))])).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        for length in [0, 7, 20, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..length]).unwrap();
            let error = format!("{:#}", read(&path).unwrap_err());
            assert!(error.contains("x.safetensors"), "{error}");
        }
    }
}
