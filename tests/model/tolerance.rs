//! How far a result may be from its reference.

use tch::{Kind, Tensor};

/// Largest distance of two tensors of one shape.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size(), "shapes differ");
    if a.numel() == 0 {
        return 0.0;
    }
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

/// How many times the reference's own error a result may be off.
///
/// Both are the worst of many roundings, whose order follows from the processor: with the instructions of five kinds of
/// processors the same code was off by up to three times as much as the reference on another. What is computed in a
/// smaller type, or wrongly, is off by thousands.
const TIMES: f64 = 4.0;

/// `max|ours - ref| <= 4 * yardstick + 2 * rounding(ref)`, where `yardstick` is what the float32 reference is off.
pub fn assert_close(what: &str, ours: &Tensor, reference: &Tensor, yardstick: f64) {
    let off = distance(ours, reference);
    // Half a unit in the last place of the largest element in float32.
    let rounding = reference.abs().max().double_value(&[]) * f64::from(f32::EPSILON) / 2.0;
    let allowed = TIMES * yardstick + 2.0 * rounding;
    // Written so that NaN fails.
    assert!(
        off <= allowed,
        "{what}: off by {off:e}, allowed {allowed:e} (the float32 reference: {yardstick:e})"
    );
}

/// The same bits.
pub fn assert_same(what: &str, a: &Tensor, b: &Tensor) {
    assert!(a.equal(b), "{what}: differ by {:e}", distance(a, b));
}
