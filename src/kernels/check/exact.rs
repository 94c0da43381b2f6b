//! Bit for bit: the comparison of kernels that can be exact, and inputs that hold any bits at all.

use tch::{Device, Kind, Tensor};

/// Where two tensors of one shape on the CPU differ in their bits, in words; `None` where they do not.
pub(super) fn first_difference(wanted: &Tensor, found: &Tensor) -> Option<String> {
    let (wanted, found) = (bits(wanted).view([-1]), bits(found).view([-1]));
    let different = wanted.not_equal_tensor(&found).nonzero(); // [different, 1] i64
    let count = different.size()[0];
    if count == 0 {
        return None;
    }
    let first = different.int64_value(&[0, 0]);
    let (wanted, found) = (wanted.int64_value(&[first]), found.int64_value(&[first]));
    Some(format!(
        "{count} differ, the first is element {first} with bits {found:#x}, the twin's are {wanted:#x}"
    ))
}

/// Any bits at all: subnormal numbers, infinities and NaN among them. On the CPU.
pub(super) fn random_bits(kind: Kind, elements: i64) -> Tensor {
    let (integer, half_range) = integer_of(kind);
    Tensor::randint_low(-half_range, half_range, [elements], (integer, Device::Cpu)).view_dtype(kind)
}

pub(super) fn bits(tensor: &Tensor) -> Tensor {
    tensor.contiguous().view_dtype(integer_of(tensor.kind()).0)
}

/// The integer type as wide as a type, and half the number of its values (for 64 bits a quarter, which libtorch can draw).
pub(super) fn integer_of(kind: Kind) -> (Kind, i64) {
    match kind.elt_size_in_bytes() {
        1 => (Kind::Uint8, 1 << 7),
        2 => (Kind::Int16, 1 << 15),
        4 => (Kind::Int, 1 << 31),
        _ => (Kind::Int64, 1 << 62),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn a_changed_bit_is_found() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let wanted = random_bits(kind, 1000);
            assert_eq!(first_difference(&wanted, &wanted.copy()), None);
            let found = wanted.copy();
            let _ = bits(&found).get(617).bitwise_xor_(1);
            assert!(
                first_difference(&wanted, &found).unwrap().starts_with("1 differ, the first is element 617 ")
            );
        }
        // Zeros of both signs are equal as numbers, not as bits.
        let zeros = Tensor::from_slice(&[0.0f32, 0.0]);
        assert!(first_difference(&zeros, &zeros.neg()).is_some());
    }

    #[test]
    fn random_bits_reach_the_corners() {
        let x = random_bits(Kind::BFloat16, 1 << 20);
        let count = |mask: Tensor| mask.sum(Kind::Int64).int64_value(&[]);
        assert!(count(x.isnan()) > 0 && count(x.isinf()) > 0 && count(x.signbit()) > 0);
        assert!(count(x.abs().lt(1e-38).logical_and(&x.not_equal(0.0))) > 0, "subnormal numbers");
    }
}
