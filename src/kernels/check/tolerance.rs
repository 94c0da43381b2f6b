//! Operands in frames, and how near a kernel must come where it cannot be exact.
//!
//! Every element of an output is compared with a reference in f64. It may be wrong by twice what the twin is wrong by
//! there, or by a few halves of a unit in the last place of its dtype where the twin happens to be better than that,
//! and by the noise of f32 arithmetic on the terms that make it up. No number must be no number in both.

use anyhow::{Result, bail, ensure};
use tch::{Kind, Tensor};

use super::exact::integer_of;

/// Elements before and after an operand that a kernel must leave alone.
pub(super) const GUARD: i64 = 64;

/// Relative noise of a sum or product of a few dozen steps in f32.
pub(super) const F32_NOISE: f64 = 1.0 / (1 << 20) as f64;

/// Where the rows of an operand lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub rows: i64,
    pub columns: i64,
    /// Elements from a row to the next, at least `columns`.
    pub stride: i64,
    /// Elements by which the first one misses an aligned address.
    pub offset: i64,
}

impl Layout {
    /// Rows side by side from an aligned address on.
    pub fn dense(rows: i64, columns: i64) -> Self {
        Self { rows, columns, stride: columns, offset: 0 }
    }

    /// Rows farther apart.
    pub fn strided(self, stride: i64) -> Self {
        Self { stride, ..self }
    }

    /// Begins so many elements behind an aligned address.
    pub fn at(self, offset: i64) -> Self {
        Self { offset, ..self }
    }
}

/// A matrix whose surroundings are poisoned: a read beyond it brings in no number, a write beyond it shows.
#[derive(Debug)]
pub(super) struct Framed {
    buffer: Tensor,
    layout: Layout,
}

impl Framed {
    /// An output: every element is poison until it is written.
    pub fn output(kind: Kind, layout: Layout, device: tch::Device) -> Result<Self> {
        let Layout { rows, stride, offset, .. } = layout;
        let (integer, poison) = poison(kind);
        let buffer = Tensor::f_full([GUARD + offset + rows * stride + GUARD], poison, (integer, device))?;
        Ok(Self { buffer: buffer.view_dtype(kind), layout })
    }

    /// An input, or an operand that is both: holds `values` `[rows, columns]` (of any shape with as many elements), on
    /// their device and in their dtype.
    pub fn input(values: &Tensor, layout: Layout) -> Result<Self> {
        let framed = Self::output(values.kind(), layout, values.device())?;
        framed.view().f_copy_(&values.f_reshape([layout.rows, layout.columns])?)?;
        Ok(framed)
    }

    /// The matrix, `[rows, columns]`.
    pub fn view(&self) -> Tensor {
        inside(&self.buffer, self.layout)
    }

    /// The matrix as one row, `[rows * columns]`, of a dense layout.
    pub fn flat(&self) -> Tensor {
        let elements = self.layout.rows * self.layout.columns;
        inside(&self.buffer, Layout { rows: 1, columns: elements, stride: elements, ..self.layout })
            .squeeze_dim(0)
    }

    /// That nothing was written but the matrix.
    pub fn intact(&self, what: &str) -> Result<()> {
        let (integer, poison) = poison(self.buffer.kind());
        let bits = self.buffer.copy().view_dtype(integer);
        let _ = inside(&bits, self.layout).f_fill_(poison)?;
        let touched = bits.not_equal(poison).nonzero(); // [touched, 1] i64
        if touched.size()[0] == 0 {
            return Ok(());
        }
        let Layout { stride, offset, .. } = self.layout;
        let first = touched.int64_value(&[0, 0]) - GUARD - offset;
        let (row, column) = (first.div_euclid(stride), first.rem_euclid(stride));
        bail!(
            "{what}: {} elements outside of it were written, the first at [{row}, {column}]",
            touched.size()[0]
        )
    }
}

/// Bits that are no number in every float type and that no arithmetic makes, as the integer of that width.
fn poison(kind: Kind) -> (Kind, i64) {
    let (integer, _) = integer_of(kind);
    (
        integer,
        match integer {
            Kind::Uint8 => 0xa5,
            Kind::Int16 => 0x7fa5,
            Kind::Int => 0x7fa5_a5a5,
            _ => 0x7ff5_a5a5_a5a5_a5a5,
        },
    )
}

fn inside(buffer: &Tensor, layout: Layout) -> Tensor {
    let Layout { rows, columns, stride, offset } = layout;
    buffer.as_strided([rows, columns], [stride, 1], GUARD + offset)
}

/// What an output is judged by.
#[derive(Debug)]
pub(super) struct Reference<'a> {
    /// The definition in f64 on the same inputs.
    pub value: &'a Tensor,
    /// The twin's result, in any dtype.
    pub twin: &'a Tensor,
    /// Sum of the magnitudes of the terms that make up an element, where they may cancel; else its own magnitude counts.
    pub terms: Option<&'a Tensor>,
    /// Halves of a unit in the last place that are forgiven even where the twin is exact: one for every rounding to
    /// the output's dtype on the way, and one more for each that a weight may stretch.
    pub halves: f64,
}

impl Reference<'_> {
    /// That `found`, whose dtype decides what a unit in the last place is, is near enough.
    pub fn judge(&self, what: &str, found: &Tensor) -> Result<()> {
        let sizes = [found.size(), self.value.size(), self.twin.size()];
        ensure!(sizes.iter().all(|size| *size == sizes[0]), "{what}: sizes {sizes:?} differ");
        let error = self.error(found, self.value);
        let allowed = self.allowed(found.kind());
        // Written so that an error that is no number exceeds what is allowed.
        let beyond = error.le_tensor(&allowed).logical_not().reshape([-1]);
        let count = beyond.sum(Kind::Int64).int64_value(&[]);
        if count == 0 {
            return Ok(());
        }
        let ratio = (&error / &allowed).reshape([-1]);
        let ratio = ratio
            .nan_to_num(f64::INFINITY, f64::INFINITY, 0.0)
            .where_self(&beyond, &Tensor::from(0.0).to_device(ratio.device()).to_kind(Kind::Double));
        let worst = ratio.argmax(None, false).int64_value(&[]);
        let at = |tensor: &Tensor| tensor.reshape([-1]).double_value(&[worst]);
        bail!(
            "{what}: {count} of {} elements are too far from the reference; the worst is {:?} with {:e}, the reference \
             is {:e}, the twin {:e}, the error {:e}, allowed {:e}",
            found.numel(),
            coordinates(worst, &found.size()),
            at(found),
            at(self.value),
            at(self.twin),
            at(&error),
            at(&allowed)
        )
    }

    /// Distance from `value`; none where both are no number, or where `found` is what `value` rounds to.
    fn error(&self, found: &Tensor, value: &Tensor) -> Tensor {
        let zero = Tensor::from(0.0).to_kind(Kind::Double).to_device(found.device());
        let same = found.eq_tensor(&value.to_kind(found.kind()));
        let same = same.logical_or(&found.isnan().logical_and(&value.isnan()));
        zero.where_self(&same, &(found.to_kind(Kind::Double) - value).abs())
    }

    fn allowed(&self, kind: Kind) -> Tensor {
        let twin = (self.twin.to_kind(Kind::Double) - self.value).abs().nan_to_num(0.0, 0.0, 0.0) * 2.0;
        let rounding = half_unit(self.value, kind).nan_to_num(0.0, 0.0, 0.0) * self.halves;
        let terms = self.terms.unwrap_or(self.value).abs().nan_to_num(0.0, 0.0, 0.0);
        twin.maximum(&rounding) + terms * F32_NOISE
    }
}

/// Half of a unit in the last place of `kind` at each of `values` (f64).
pub(super) fn half_unit(values: &Tensor, kind: Kind) -> Tensor {
    // Bits of the significand, the hidden one included, and the exponent below which numbers are subnormal.
    let (bits, lowest) = match kind {
        Kind::BFloat16 => (8, -126.0),
        Kind::Half => (11, -14.0),
        _ => (24, -126.0),
    };
    let exponent = values.abs().log2().floor().clamp_min(lowest);
    (exponent - f64::from(bits)).exp2()
}

fn coordinates(index: i64, size: &[i64]) -> Vec<i64> {
    let mut rest = index;
    let mut found: Vec<i64> = size
        .iter()
        .rev()
        .map(|&length| {
            let at = rest % length;
            rest /= length;
            at
        })
        .collect();
    found.reverse();
    found
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use tch::Device;

    use super::*;

    fn f64s(values: &[f64]) -> Tensor {
        Tensor::from_slice(values)
    }

    fn judge(found: &[f64], value: &[f64], twin: &[f64]) -> Result<()> {
        let (value, twin) = (f64s(value), f64s(twin));
        Reference { value: &value, twin: &twin, terms: None, halves: 1.0 }
            .judge("y", &f64s(found).to_kind(Kind::BFloat16))
    }

    #[test]
    fn a_unit_in_the_last_place_is_what_it_is() {
        let values = f64s(&[1.0, 1.99, 2.0, -3.0, 0.0, 1e-40, 256.0]);
        let units: Vec<f64> = Vec::try_from(&(half_unit(&values, Kind::BFloat16) * 2.0)).unwrap();
        let step = 2f64.powi(-7);
        assert_eq!(units, [step, step, 2.0 * step, 2.0 * step, 2f64.powi(-133), 2f64.powi(-133), 2.0]);
        let f32_unit: Vec<f64> = Vec::try_from(&(half_unit(&f64s(&[1.0]), Kind::Float) * 2.0)).unwrap();
        assert_eq!(f32_unit, [f64::from(f32::EPSILON)]);
    }

    #[test]
    fn rounding_is_forgiven_and_more_is_not() {
        judge(&[1.0], &[1.0 + 0.5 / 128.0], &[1.0]).unwrap();
        judge(&[1.0 + 2.0 / 128.0], &[1.0], &[1.0 + 1.0 / 128.0]).unwrap();
        let far = judge(&[0.5, 1.0 + 1.0 / 128.0], &[0.5, 1.0], &[0.5, 1.0]).unwrap_err().to_string();
        assert!(
            far.starts_with("y: 1 of 2 elements are too far") && far.contains("[1] with 1.0078125e0"),
            "{far}"
        );
    }

    #[test]
    fn no_number_must_be_no_number_in_both() {
        let nan = f64::NAN;
        judge(&[nan, 1.0], &[nan, 1.0], &[nan, 1.0]).unwrap();
        assert!(judge(&[nan], &[1.0], &[1.0]).is_err());
        assert!(judge(&[nan], &[1.0], &[nan]).is_err());
        assert!(judge(&[1.0], &[nan], &[nan]).is_err());
        let infinite = f64::INFINITY;
        judge(&[infinite, infinite], &[infinite, 1e300], &[infinite, infinite]).unwrap();
        assert!(judge(&[infinite], &[1.0], &[infinite]).is_err());
        assert!(judge(&[infinite], &[-infinite], &[infinite]).is_err());
    }

    #[test]
    fn terms_that_cancel_are_forgiven_their_noise() {
        let (value, found) = (f64s(&[0.0]), f64s(&[1e-4]).to_kind(Kind::Float));
        let judged = |terms: Option<&Tensor>| {
            Reference { value: &value, twin: &value, terms, halves: 1.0 }.judge("y", &found).is_ok()
        };
        assert!(!judged(None));
        assert!(judged(Some(&f64s(&[1000.0]))));
        assert!(!judged(Some(&f64s(&[10.0]))));
    }

    #[test]
    fn a_frame_shows_what_was_written() {
        for kind in [Kind::BFloat16, Kind::Float, Kind::Uint8] {
            let layout = Layout::dense(3, 5).strided(9).at(1);
            let framed = Framed::input(&Tensor::ones([3, 5], (kind, Device::Cpu)), layout).unwrap();
            assert_eq!(framed.view().sum(Kind::Double).double_value(&[]), 15.0);
            framed.intact("x").unwrap();
            let _ = framed.view().fill_(2.0);
            framed.intact("x").unwrap();
            let _ = framed.buffer.narrow(0, GUARD + 1 + 9 + 5, 1).fill_(2.0);
            let told = framed.intact("x").unwrap_err().to_string();
            assert!(told.contains("1 elements outside") && told.ends_with("[1, 5]"), "{told}");
        }
    }

    #[test]
    fn what_is_not_written_is_no_number() {
        for kind in [Kind::BFloat16, Kind::Half, Kind::Float, Kind::Double] {
            let framed = Framed::output(kind, Layout::dense(4, 4), Device::Cpu).unwrap();
            assert!(bool::try_from(&framed.view().isnan().all()).unwrap(), "{kind:?}");
            assert_eq!(framed.flat().size(), [16]);
        }
    }
}
