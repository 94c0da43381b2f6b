//! Intervals and paired tests, by seeded resampling (Efron 1979) and McNemar's exact test.
//!
//! An interval is the middle 95 % of what resamples of the examples give. Two models are compared on the same
//! examples: where every score is 0 or 1, by McNemar's exact test of the examples that only one of them got
//! right, else by resampling the differences around zero. The same seed gives the same numbers.

use serde::Serialize;

/// Resamples of an interval.
pub const RESAMPLES: usize = 5_000;
/// What an interval covers.
pub const CONFIDENCE: f64 = 0.95;

/// An estimate and what it may be as well.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    /// Of the examples at hand.
    pub estimate: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// How two models were compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Test {
    /// McNemar's, exact and two-sided.
    McNemar,
    /// Resampled differences around zero, two-sided.
    PairedBootstrap,
}

/// The second model beside the first, on the same examples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Paired {
    /// Second minus first.
    pub difference: Interval,
    /// Chance of a difference as large when there is none.
    pub p_value: f64,
    /// How that was found.
    pub test: Test,
    /// Examples on which the second has the larger number.
    pub larger: usize,
    /// Examples on which the second has the smaller number.
    pub smaller: usize,
    /// Examples that both were asked.
    pub examples: usize,
}

/// The mean of scores in `[0, 1]`; `None` without any.
pub fn mean(scores: &[f64], seed: u64) -> Option<Interval> {
    let weighted: Vec<(f64, f64)> = scores.iter().map(|score| (*score, 1.0)).collect();
    let found = ratio(&weighted, seed)?;
    Some(bounded_where_all_agree(scores, found))
}

/// Where all scores are 0, or all 1, resamples know no doubt; the exact bound of Clopper and Pearson (1934) does.
fn bounded_where_all_agree(scores: &[f64], found: Interval) -> Interval {
    let doubt = ((1.0 - CONFIDENCE) / 2.0).powf(1.0 / scores.len() as f64);
    if scores.iter().all(|score| *score == 1.0) {
        Interval { low: doubt, ..found }
    } else if scores.iter().all(|score| *score == 0.0) {
        Interval { high: 1.0 - doubt, ..found }
    } else {
        found
    }
}

/// The sum of the first numbers over the sum of the second, such as nats a token; `None` where that is nothing.
pub fn ratio(parts: &[(f64, f64)], seed: u64) -> Option<Interval> {
    let whole = quotient(parts.iter().copied())?;
    let draws = resampled(parts.len(), seed, |draw| quotient(draw.iter().map(|at| parts[*at])));
    Some(around(whole, draws))
}

/// Compares means of scores of the same examples.
pub fn paired_means(first: &[f64], second: &[f64], seed: u64) -> Option<Paired> {
    let parts = |scores: &[f64]| scores.iter().map(|score| (*score, 1.0)).collect::<Vec<_>>();
    let paired = paired_ratios(&parts(first), &parts(second), seed)?;
    let yes_or_no = first.iter().chain(second).all(|score| *score == 0.0 || *score == 1.0);
    Some(if yes_or_no {
        Paired { p_value: mcnemar(paired.larger, paired.smaller), test: Test::McNemar, ..paired }
    } else {
        paired
    })
}

/// Compares ratios over the same examples: second minus first.
pub fn paired_ratios(first: &[(f64, f64)], second: &[(f64, f64)], seed: u64) -> Option<Paired> {
    let examples = first.len().min(second.len());
    let (first, second) = (first.get(..examples)?, second.get(..examples)?);
    let difference = quotient(second.iter().copied())? - quotient(first.iter().copied())?;
    let draws = resampled(examples, seed, |draw| {
        let of = |parts: &[(f64, f64)]| quotient(draw.iter().map(|at| parts[*at]));
        Some(of(second)? - of(first)?)
    });
    let count = |is: &dyn Fn(f64, f64) -> bool| {
        first.iter().zip(second).filter(|(a, b)| is(a.0 / a.1, b.0 / b.1)).count()
    };
    Some(Paired {
        difference: around(difference, draws.clone()),
        p_value: beyond(difference, &draws),
        test: Test::PairedBootstrap,
        larger: count(&|a, b| b > a),
        smaller: count(&|a, b| b < a),
        examples,
    })
}

fn quotient(parts: impl Iterator<Item = (f64, f64)>) -> Option<f64> {
    let (above, below) = parts.fold((0.0, 0.0), |(a, b), (above, below)| (a + above, b + below));
    (below > 0.0).then(|| above / below)
}

/// What resamples of so many examples give; one that gives nothing is drawn for nothing.
fn resampled(examples: usize, seed: u64, of: impl Fn(&[usize]) -> Option<f64>) -> Vec<f64> {
    let mut draw = vec![0; examples];
    let mut state = seed;
    let mut values = Vec::with_capacity(RESAMPLES);
    for _ in 0..RESAMPLES {
        for place in &mut draw {
            *place = below(examples, &mut state);
        }
        values.extend(of(&draw));
    }
    values
}

/// The middle of the draws around an estimate.
fn around(estimate: f64, mut draws: Vec<f64>) -> Interval {
    draws.sort_by(f64::total_cmp);
    let tail = (1.0 - CONFIDENCE) / 2.0;
    let at = |share: f64| {
        let place = share * draws.len().saturating_sub(1) as f64;
        let (low, high) = (place.floor() as usize, place.ceil() as usize);
        let value = |place: usize| draws.get(place).copied().unwrap_or(estimate);
        value(low) + (value(high) - value(low)) * (place - place.floor())
    };
    Interval { estimate, low: at(tail), high: at(1.0 - tail) }
}

/// The share of draws that lie as far from the difference as that lies from zero.
fn beyond(difference: f64, draws: &[f64]) -> f64 {
    // Sums in another order differ by roundings; they are no evidence.
    let far = difference.abs() * (1.0 - 1e-9);
    let count = draws.iter().filter(|draw| (**draw - difference).abs() >= far).count();
    (count + 1) as f64 / (draws.len() + 1) as f64
}

/// McNemar's test of `larger` against `smaller` with a fair coin, two-sided.
pub fn mcnemar(larger: usize, smaller: usize) -> f64 {
    let (tosses, fewer) = (larger + smaller, larger.min(smaller));
    // Logarithms, because 2 to the power of some thousand tosses is beyond all numbers.
    let mut log_count = 0.0;
    let mut sum = 0.0;
    for heads in 0..=fewer {
        if heads > 0 {
            log_count += ((tosses - heads + 1) as f64 / heads as f64).ln();
        }
        sum += (log_count - tosses as f64 * std::f64::consts::LN_2).exp();
    }
    (2.0 * sum).min(1.0)
}

/// A number below `bound`, by SplitMix64 (Steele et al. 2014).
fn below(bound: usize, state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    // The upper half of the product: its bias is `bound` in 2^64.
    ((u128::from(mixed ^ (mixed >> 31)) * bound as u128) >> 64) as usize
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]
mod tests {
    use super::*;

    fn scores(right: usize, wrong: usize) -> Vec<f64> {
        [vec![1.0; right], vec![0.0; wrong]].concat()
    }

    #[test]
    fn intervals_are_as_wide_as_theory_says() {
        let found = mean(&scores(300, 700), 17).unwrap();
        let error = (0.3f64 * 0.7 / 1000.0).sqrt();
        assert_eq!(found.estimate, 0.3);
        assert!((found.low - (0.3 - 1.96 * error)).abs() < 0.1 * error, "{found:?}");
        assert!((found.high - (0.3 + 1.96 * error)).abs() < 0.1 * error, "{found:?}");
        assert_eq!(mean(&scores(300, 700), 17), Some(found));
        assert_ne!(mean(&scores(300, 700), 18), Some(found));
        assert_eq!(mean(&[], 17), None);
    }

    #[test]
    fn intervals_hold_the_truth_as_often_as_they_say() {
        let mut state = 3;
        let held = (0..200)
            .filter(|round| {
                let drawn: Vec<f64> =
                    (0..80).map(|_| if below(10, &mut state) < 6 { 1.0 } else { 0.0 }).collect();
                let found = mean(&drawn, *round).unwrap();
                found.low <= 0.6 && 0.6 <= found.high
            })
            .count();
        // 190 are expected; 200 coins of 0.95 fall below 178 once in 10,000 rounds.
        assert!((178..=200).contains(&held), "{held} of 200");
    }

    #[test]
    fn certainty_is_bounded() {
        let all = mean(&scores(20, 0), 1).unwrap();
        assert_eq!((all.estimate, all.high), (1.0, 1.0));
        assert!((all.low - 0.831_57).abs() < 1e-5, "{all:?}");
        let none = mean(&scores(0, 20), 1).unwrap();
        assert_eq!((none.estimate, none.low), (0.0, 0.0));
        assert!((none.high - 0.168_43).abs() < 1e-5, "{none:?}");
    }

    #[test]
    fn losses_are_weighed_by_their_tokens() {
        let parts = [(10.0, 10.0), (40.0, 10.0), (100.0, 100.0), (0.0, 0.0)];
        let found = ratio(&parts, 1).unwrap();
        assert_eq!(found.estimate, 1.25);
        assert!(found.low >= 1.0 && found.high <= 4.0 && found.low < found.high);
        assert_eq!(ratio(&[(0.0, 0.0)], 1), None);
    }

    #[test]
    fn mcnemar_counts_a_fair_coin() {
        for (larger, smaller, expected) in [
            (0, 0, 1.0),
            (8, 2, 0.109_375),
            (2, 8, 0.109_375),
            (10, 0, 0.001_953_125),
            (5, 5, 1.0),
            (1, 0, 1.0),
        ] {
            assert!((mcnemar(larger, smaller) - expected).abs() < 1e-12, "{larger} {smaller}");
        }
        // Twice the sum of binomial coefficients up to 700, over 2 to the power of 1500.
        assert!((mcnemar(800, 700) - 0.010_559_255_466_7).abs() < 1e-9, "{}", mcnemar(800, 700));
        assert!(mcnemar(100_000, 0) == 0.0);
    }

    #[test]
    fn pairs_tell_what_two_intervals_cannot() {
        // The second is right wherever the first is, and on ten more of a hundred.
        let (first, second) = (scores(50, 50), scores(60, 40));
        let found = paired_means(&first, &second, 5).unwrap();
        assert_eq!((found.larger, found.smaller, found.test), (10, 0, Test::McNemar));
        assert!((found.difference.estimate - 0.1).abs() < 1e-12 && found.difference.low > 0.0);
        assert!(found.p_value < 0.01);
        assert!(mean(&first, 5).unwrap().high > mean(&second, 5).unwrap().low, "the intervals overlap");
        let same = paired_means(&first, &first, 5).unwrap();
        assert_eq!((same.p_value, same.difference.estimate), (1.0, 0.0));
    }

    #[test]
    fn differences_of_losses_are_resampled_together() {
        let first: Vec<(f64, f64)> = (1..=60).map(|at| (f64::from(at % 7 + 1) * 10.0, 10.0)).collect();
        let better: Vec<(f64, f64)> = first.iter().map(|(nats, tokens)| (nats - 1.0, *tokens)).collect();
        let found = paired_ratios(&first, &better, 5).unwrap();
        assert!((found.difference.estimate + 0.1).abs() < 1e-9 && found.difference.high < -0.09);
        assert_eq!((found.larger, found.smaller, found.test), (0, 60, Test::PairedBootstrap));
        assert!(found.p_value < 0.001);
        let noise: Vec<(f64, f64)> = first
            .iter()
            .enumerate()
            .map(|(at, (nats, tokens))| (nats + if at % 2 == 0 { 1.0 } else { -1.0 }, *tokens))
            .collect();
        assert!(paired_ratios(&first, &noise, 5).unwrap().p_value > 0.5);
    }
}
