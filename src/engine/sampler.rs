//! From logits to a token: temperature, top-k, top-p (Holtzman et al. 2020), greedy at temperature 0.
//!
//! Randomness is a function of the request's seed and the position of the token, never of a shared state:
//! the same request gives the same tokens whatever else the engine is doing.

use std::cmp::Ordering;

use anyhow::{Result, ensure};

/// How a token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0 is greedy.
    pub temperature: f64,
    /// Only the likeliest tokens that together reach this probability, in `(0, 1]`.
    pub top_p: f64,
    /// Only so many of the likeliest tokens.
    pub top_k: Option<usize>,
    /// Seed of the request.
    pub seed: u64,
}

impl Sampling {
    /// The likeliest token at every step.
    pub const GREEDY: Self = Self { temperature: 0.0, top_p: 1.0, top_k: None, seed: 0 };

    /// Checks the ranges.
    ///
    /// # Errors
    /// The message names the value and its range.
    pub fn check(&self) -> Result<(), String> {
        let Self { temperature, top_p, top_k, .. } = *self;
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(format!("`temperature` is {temperature}, expected 0 or more"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(format!("`top_p` is {top_p}, expected more than 0 and at most 1"));
        }
        if top_k == Some(0) {
            return Err("`top_k` is 0, expected 1 or more".to_string());
        }
        Ok(())
    }
}

impl Default for Sampling {
    fn default() -> Self {
        Self::GREEDY
    }
}

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// Token id.
    pub id: u32,
    /// Its log-probability in nats under the model itself: before temperature, top-k and top-p.
    pub logprob: f64,
}

/// Chooses the token at `position` of the answer from `logits`, `[vocab]`.
///
/// # Errors
/// When there are no logits or one is not a number: the model is broken, and any token would hide it.
pub fn choose(logits: &[f32], sampling: &Sampling, position: u64) -> Result<Choice> {
    ensure!(!logits.is_empty(), "the model gave no logits");
    ensure!(
        logits.iter().all(|logit| !logit.is_nan() && *logit != f32::INFINITY)
            && logits.iter().any(|logit| logit.is_finite()),
        "the model's logits are not finite"
    );
    let id = if sampling.temperature == 0.0 {
        greedy(logits)
    } else {
        draw(candidates(logits, sampling), sampling, position)
    };
    Ok(Choice { id, logprob: f64::from(logits[id as usize]) - log_sum_exp(logits) })
}

/// The largest logit; of equal ones the lowest id.
fn greedy(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

/// Token ids and logits that may be drawn, likeliest first where a cut needs that order.
fn candidates(logits: &[f32], sampling: &Sampling) -> Vec<(u32, f32)> {
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    if let Some(k) = sampling.top_k
        && k < all.len()
    {
        all.select_nth_unstable_by(k, likelier);
        all.truncate(k);
    }
    if sampling.top_k.is_some() || sampling.top_p < 1.0 {
        all.sort_unstable_by(likelier);
    }
    all
}

/// A total order: likeliest first, of equal ones the lowest id.
fn likelier(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Draws by inverting the cumulative distribution.
fn draw(candidates: Vec<(u32, f32)>, sampling: &Sampling, position: u64) -> u32 {
    let largest = candidates.iter().map(|(_, logit)| *logit).fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| (f64::from(logit - largest) / sampling.temperature).exp();
    let weights: Vec<f64> = candidates.iter().map(|(_, logit)| weight(*logit)).collect();
    let kept = nucleus(&weights, sampling.top_p);
    let total: f64 = weights[..kept].iter().sum();
    let mut left = uniform(sampling.seed, position) * total;
    let mut chosen = 0;
    for (index, weight) in weights[..kept].iter().enumerate() {
        // A token of weight zero is never drawn, not even by rounding at the end of the list.
        if *weight > 0.0 {
            chosen = index;
            left -= weight;
            if left < 0.0 {
                break;
            }
        }
    }
    candidates[chosen].0
}

/// How many of `weights`, largest first, reach the share `top_p` of their sum; at least one.
fn nucleus(weights: &[f64], top_p: f64) -> usize {
    if top_p >= 1.0 {
        return weights.len();
    }
    let target = top_p * weights.iter().sum::<f64>();
    let mut reached = 0.0;
    for (index, weight) in weights.iter().enumerate() {
        reached += weight;
        if reached >= target {
            return index + 1;
        }
    }
    weights.len()
}

/// `ln Σ exp(logit)`, in f64.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    largest + logits.iter().map(|logit| (f64::from(*logit) - largest).exp()).sum::<f64>().ln()
}

/// A number in `[0, 1)` that depends on nothing but its arguments (SplitMix64, Steele et al. 2014).
fn uniform(seed: u64, counter: u64) -> f64 {
    let bits = mix(mix(seed).wrapping_add(counter.wrapping_mul(GOLDEN)));
    // 53 bits are what an f64 holds exactly.
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// 2^64 divided by the golden ratio, odd: SplitMix64's step.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(GOLDEN);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [0.0, 2.0, 1.0, 2.0, -1.0];

    fn sampling(temperature: f64, top_p: f64, top_k: Option<usize>) -> Sampling {
        Sampling { temperature, top_p, top_k, seed: 7 }
    }

    fn shares(sampling: &Sampling) -> Vec<f64> {
        let draws = 40_000;
        let mut counts = vec![0; LOGITS.len()];
        for position in 0..draws {
            counts[choose(&LOGITS, sampling, position).unwrap().id as usize] += 1;
        }
        counts.into_iter().map(|count| f64::from(count) / draws as f64).collect()
    }

    fn softmax(temperature: f64) -> Vec<f64> {
        let weights: Vec<f64> = LOGITS.iter().map(|logit| (f64::from(*logit) / temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / total).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let choice = choose(&LOGITS, &Sampling::GREEDY, 3).unwrap();
        assert_eq!(choice.id, 1);
        assert!((choice.logprob - softmax(1.0)[1].ln()).abs() < 1e-12);
    }

    #[test]
    fn draws_follow_the_distribution() {
        for temperature in [0.5, 1.0, 2.0] {
            let expected = softmax(temperature);
            for (share, expected) in shares(&sampling(temperature, 1.0, None)).iter().zip(&expected) {
                // Four standard errors of a share of 40,000 draws.
                let slack = 4.0 * (expected * (1.0 - expected) / 40_000.0).sqrt();
                assert!((share - expected).abs() < slack, "{share} instead of {expected}");
            }
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let top_k = shares(&sampling(1.0, 1.0, Some(2)));
        assert!(top_k[0] == 0.0 && top_k[2] == 0.0 && top_k[4] == 0.0, "{top_k:?}");
        // The two largest hold 0.39 each: 0.5 needs both, 0.3 only the first.
        let top_p = shares(&sampling(1.0, 0.5, None));
        assert!(top_p[1] > 0.4 && top_p[3] > 0.4 && top_p[2] == 0.0, "{top_p:?}");
        assert_eq!(shares(&sampling(1.0, 0.3, None))[1], 1.0);
        assert_eq!(shares(&sampling(1.0, 1.0, Some(1)))[1], 1.0);
    }

    #[test]
    fn a_masked_token_is_never_drawn() {
        let logits = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
        for position in 0..1000 {
            assert_eq!(choose(&logits, &sampling(1.0, 1.0, None), position).unwrap().id, 1);
        }
    }

    #[test]
    fn the_seed_and_the_position_decide() {
        let ids = |seed| -> Vec<u32> {
            let sampling = Sampling { seed, ..sampling(1.0, 1.0, None) };
            (0..64).map(|position| choose(&LOGITS, &sampling, position).unwrap().id).collect()
        };
        assert_eq!(ids(1), ids(1));
        assert_ne!(ids(1), ids(2));
    }

    #[test]
    fn tiny_temperatures_do_not_overflow() {
        let choice = choose(&LOGITS, &sampling(1e-300, 1.0, None), 0).unwrap();
        assert!([1, 3].contains(&choice.id));
    }

    #[test]
    fn broken_logits_are_an_error() {
        assert!(choose(&[], &Sampling::GREEDY, 0).is_err());
        assert!(choose(&[0.0, f32::NAN], &Sampling::GREEDY, 0).is_err());
        assert!(choose(&[0.0, f32::INFINITY], &Sampling::GREEDY, 0).is_err());
        assert!(choose(&[f32::NEG_INFINITY; 2], &sampling(1.0, 1.0, None), 0).is_err());
    }

    #[test]
    fn ranges_are_checked() {
        for wrong in [
            sampling(-0.1, 1.0, None),
            sampling(f64::NAN, 1.0, None),
            sampling(1.0, 0.0, None),
            sampling(1.0, 1.1, None),
            sampling(1.0, 1.0, Some(0)),
        ] {
            assert!(wrong.check().is_err(), "{wrong:?}");
        }
        assert_eq!(sampling(0.7, 0.9, Some(40)).check(), Ok(()));
    }
}
