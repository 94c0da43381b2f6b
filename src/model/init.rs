//! Initial values of an adapter: a function of seed and name, on any device, in any order.

/// `count` numbers, uniform in `(-bound, bound)`.
///
/// SplitMix64 (Steele, Lea & Flood 2014) as a counter: element `i` depends on seed, name and `i` alone.
pub fn uniform(seed: u64, name: &str, count: usize, bound: f64) -> Vec<f32> {
    let stream = name.bytes().fold(mix(seed), |state, byte| mix(state ^ u64::from(byte)));
    (0..count as u64)
        .map(|index| {
            let bits = mix(stream.wrapping_add(index.wrapping_mul(GOLDEN_GAMMA))) >> 11; // 53 bits
            let unit = (bits as f64 + 0.5) / (1u64 << 53) as f64; // in (0, 1)
            ((2.0 * unit - 1.0) * bound) as f32
        })
        .collect()
}

const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(GOLDEN_GAMMA);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::uniform;

    #[test]
    fn depends_on_seed_and_name_and_stays_inside() {
        let values = uniform(1, "a", 10_000, 0.25);
        assert!(values.iter().all(|value| value.abs() < 0.25));
        let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / 10_000.0;
        // Standard error of the mean of a uniform: 0.25 / sqrt(3) / 100.
        assert!(mean.abs() < 5.0 * 0.25 / 3f64.sqrt() / 100.0, "mean {mean}");
        assert_eq!(values, uniform(1, "a", 10_000, 0.25));
        assert_ne!(values, uniform(2, "a", 10_000, 0.25));
        assert_ne!(values, uniform(1, "b", 10_000, 0.25));
    }
}
