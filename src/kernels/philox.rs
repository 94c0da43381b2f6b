//! Philox4x32: random bits as a function of a counter and a key.
//!
//! Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC11, section 3.3. Each word depends on
//! nothing but (counter, key), so any element's bits can be made again, on any device, in any order.
//! The paper's table 2 finds seven rounds enough to pass BigCrush and keeps ten as a safety margin;
//! [`ROUNDS`] is seven: dropout wants speed, and what it asks of its bits is modest.

/// Rounds used for dropout.
pub const ROUNDS: usize = 7;

/// Multipliers of words 0 and 2.
const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];

/// What the key grows by from round to round: the golden ratio and sqrt(3) - 1 in fixed point.
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// The four words of each of `LANES` counters that share a key, word-major: `[word][lane]`.
///
/// The lanes are independent and their loop innermost, so that the compiler turns them into vector instructions.
#[inline(always)]
pub fn philox4x32<const ROUNDS: usize, const LANES: usize>(
    counter: [[u32; LANES]; 4],
    key: [u32; 2],
) -> [[u32; LANES]; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..ROUNDS {
        for lane in 0..LANES {
            let p0 = u64::from(MULTIPLIER[0]).wrapping_mul(u64::from(c0[lane]));
            let p1 = u64::from(MULTIPLIER[1]).wrapping_mul(u64::from(c2[lane]));
            c0[lane] = (p1 >> 32) as u32 ^ c1[lane] ^ k0;
            c1[lane] = p1 as u32;
            c2[lane] = (p0 >> 32) as u32 ^ c3[lane] ^ k1;
            c3[lane] = p0 as u32;
        }
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
    }
    [c0, c1, c2, c3]
}

/// The keys of all rounds, for kernels that take them as an argument.
pub(super) fn key_schedule(key: [u32; 2]) -> [[u32; 2]; ROUNDS] {
    std::array::from_fn(|round| {
        [0, 1].map(|half| key[half].wrapping_add(WEYL[half].wrapping_mul(round as u32)))
    })
}

#[cfg(test)]
mod tests {
    use super::philox4x32;

    /// Counter, key, words after 7 rounds, words after 10 rounds.
    type KnownAnswer = ([u32; 4], [u32; 2], [u32; 4], [u32; 4]);

    /// The lines `philox4x32` of the file `kat_vectors` in the authors' Random123 distribution (D. E. Shaw Research).
    const KNOWN_ANSWERS: [KnownAnswer; 3] = [
        (
            [0; 4],
            [0; 2],
            [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48],
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
        ),
        (
            [u32::MAX; 4],
            [u32::MAX; 2],
            [0x5207_ddc2, 0x4516_5e59, 0x4d8e_e751, 0x8c52_f662],
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
        ),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0x4dfc_caba, 0x190a_87f0, 0xc473_62ba, 0xb6b5_242a],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ];

    #[test]
    fn matches_the_published_known_answers() {
        for (counter, key, seven, ten) in KNOWN_ANSWERS {
            let counter = counter.map(|word| [word]);
            assert_eq!(philox4x32::<7, 1>(counter, key), seven.map(|word| [word]));
            assert_eq!(philox4x32::<10, 1>(counter, key), ten.map(|word| [word]));
        }
    }

    #[test]
    fn lanes_are_independent() {
        let counter = [[7, 8, 9], [1, 1, 2], [3, 4, 5], [0, u32::MAX, 6]];
        let together = philox4x32::<7, 3>(counter, [11, 12]);
        for lane in 0..3 {
            let alone = philox4x32::<7, 1>(counter.map(|word| [word[lane]]), [11, 12]);
            assert_eq!(alone.map(|word| word[0]), together.map(|word| word[lane]));
        }
    }
}
