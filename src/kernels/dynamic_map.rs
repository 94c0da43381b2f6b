//! The 256 levels of bitsandbytes' dynamic 8-bit code, for doubly quantised scales and 8-bit moments.
//!
//! Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, section 1.3: a code of sign, unary
//! exponent and linear fraction. The levels are the middles of a division of `[0.1, 1]` into `2^i` parts
//! (`2^(i+1)` without sign), times `10^(i-6)`, for `i` in `0..7`; with 0 and 1 that makes 256.

/// Decades of the code.
const EXPONENTS: usize = 7;

/// The levels in ascending order; `signed` has as many below zero as above (but for 1), else all are positive or zero.
pub fn dynamic_map(signed: bool) -> [f32; 256] {
    let mut levels = Vec::with_capacity(256);
    for exponent in 0..EXPONENTS {
        let parts = 1 << if signed { exponent } else { exponent + 1 };
        let decade = 10f64.powi(exponent as i32 - (EXPONENTS as i32 - 1)) as f32;
        for level in middles(parts).map(|middle| decade * middle) {
            levels.push(level);
            if signed {
                levels.push(-level);
            }
        }
    }
    levels.push(0.0);
    levels.push(1.0);
    levels.sort_by(f32::total_cmp);
    let mut map = [0.0; 256];
    // 2 · 127 signed levels, or 254 unsigned ones, and the two: exactly 256.
    map.copy_from_slice(&levels);
    map
}

/// Middles of `parts` equal parts of `[0.1, 1]`, rounded as `torch.linspace` rounds: counted from the nearer
/// end, product and sum in one rounding.
fn middles(parts: usize) -> impl Iterator<Item = f32> {
    let (start, end) = (0.1f32, 1.0f32);
    let step = (end - start) / parts as f32;
    let boundary = move |index: usize| {
        if index < parts.div_ceil(2) {
            step.mul_add(index as f32, start)
        } else {
            (-step).mul_add((parts - index) as f32, end)
        }
    };
    (0..parts).map(move |part| (boundary(part) + boundary(part + 1)) / 2.0)
}
