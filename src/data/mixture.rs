//! How many examples each source gives, and which.
//!
//! An example is chosen by a keyed hash of what it says, so a dump that grows displaces few and copies none.

use anyhow::Result;
use sha2::{Digest as _, Sha256};

use super::example::Example;
use crate::error::user_error;
use crate::recipe::OnShortfall;

/// What a source is asked for and what it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand<'a> {
    /// The source.
    pub name: &'a str,
    /// Examples asked for; `None`: all.
    pub asked: Option<usize>,
    /// Examples that can be used.
    pub available: usize,
}

/// How many examples to take of each source, in the order of `demands`.
///
/// # Errors
/// When a source has too few and the recipe says to fail: with the counts of all such sources.
pub fn quotas(demands: &[Demand<'_>], on_shortfall: OnShortfall) -> Result<Vec<usize>> {
    let short: Vec<&Demand<'_>> =
        demands.iter().filter(|one| one.asked.is_some_and(|asked| asked > one.available)).collect();
    if short.is_empty() {
        return Ok(demands.iter().map(|one| one.asked.unwrap_or(one.available)).collect());
    }
    match on_shortfall {
        OnShortfall::Fail => Err(shortfall(&short)),
        OnShortfall::TakeAll => {
            Ok(demands.iter().map(|one| one.asked.map_or(one.available, |n| n.min(one.available))).collect())
        }
        OnShortfall::Rescale => Ok(rescaled(demands, &short)),
    }
}

/// Every source that names a number shrinks by the factor of the one that lacks most; exact in integers.
fn rescaled(demands: &[Demand<'_>], short: &[&Demand<'_>]) -> Vec<usize> {
    let share = |one: &Demand<'_>| (one.available as u128, one.asked.unwrap_or(one.available).max(1) as u128);
    let scarcest = short.iter().map(|one| share(one)).min_by(|a, b| (a.0 * b.1).cmp(&(b.0 * a.1)));
    let (have, want) = scarcest.unwrap_or((1, 1));
    demands
        .iter()
        .map(|one| one.asked.map_or(one.available, |asked| (asked as u128 * have / want) as usize))
        .collect()
}

/// The error that tells which sources lack how many.
pub fn shortfall(short: &[&Demand<'_>]) -> anyhow::Error {
    let counts: Vec<String> = short
        .iter()
        .map(|one| {
            format!(
                "source `{}` has {} usable examples, {} asked for",
                one.name,
                one.available,
                one.asked.unwrap_or_default()
            )
        })
        .collect();
    user_error(
        counts.join("; "),
        "ask for fewer in `data.sources`, or set `data.on_shortfall` to `rescale` or `take_all`",
    )
}

/// The order in which examples are taken: by keyed hash, whatever their place in the dump.
pub fn order(seed: u64, source: &str, examples: &[Example]) -> Vec<usize> {
    let keys = examples.iter().map(|example| key(seed, source, example));
    let mut keyed: Vec<([u8; 32], usize)> = keys.zip(0..).collect();
    keyed.sort_unstable();
    keyed.into_iter().map(|(_, at)| at).collect()
}

/// The place of an example in the order of its source.
pub fn key(seed: u64, source: &str, example: &Example) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update(source);
    hash.update(example.identity());
    hash.finalize().into()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics where it fails")]
mod tests {
    use super::*;
    use crate::data::example::{Message, Role};

    fn demand(name: &str, asked: Option<usize>, available: usize) -> Demand<'_> {
        Demand { name, asked, available }
    }

    #[test]
    fn enough_is_taken_as_asked() {
        let demands = [demand("a", Some(3), 10), demand("b", None, 7)];
        for rule in [OnShortfall::Fail, OnShortfall::Rescale, OnShortfall::TakeAll] {
            assert_eq!(quotas(&demands, rule).unwrap(), [3, 7]);
        }
    }

    #[test]
    fn too_few_fail_with_the_counts_shrink_all_or_give_what_there_is() {
        let demands = [
            demand("a", Some(100), 100),
            demand("b", Some(40), 30),
            demand("c", None, 5),
            demand("d", Some(8), 7),
        ];
        let text = crate::error::render(&quotas(&demands, OnShortfall::Fail).unwrap_err());
        assert!(text.contains("source `b` has 30 usable examples, 40 asked for; source `d` has 7"), "{text}");
        assert_eq!(quotas(&demands, OnShortfall::TakeAll).unwrap(), [100, 30, 5, 7]);
        assert_eq!(quotas(&demands, OnShortfall::Rescale).unwrap(), [75, 30, 5, 6]);
        assert_eq!(quotas(&[demand("a", Some(3), 0)], OnShortfall::Rescale).unwrap(), [0]);
    }

    fn examples(range: std::ops::Range<u32>) -> Vec<Example> {
        range
            .map(|at| Example {
                messages: vec![Message::new(Role::User, at.to_string())],
                document: String::new(),
                file: 0,
                record: at,
                question: 0..0,
                cuts: Vec::new(),
            })
            .collect()
    }

    fn sample(seed: u64, examples: &[Example], count: usize) -> Vec<u32> {
        let mut taken: Vec<u32> =
            order(seed, "s", examples).into_iter().take(count).map(|at| examples[at].record).collect();
        taken.sort_unstable();
        taken
    }

    #[test]
    fn a_sample_does_not_depend_on_the_order_of_the_dump_and_growing_it_moves_little() {
        let small = examples(0..1000);
        let mut turned = small.clone();
        turned.reverse();
        let before = sample(1, &small, 500);
        assert_eq!(before, sample(1, &turned, 500));
        assert_ne!(before, sample(2, &small, 500));
        // A tenth more records: about a tenth of the sample gives way, and only to new ones.
        let after = sample(1, &examples(0..1100), 500);
        let stayed = after.iter().filter(|record| before.contains(record)).count();
        assert!(after.iter().filter(|record| **record < 1000).all(|record| before.contains(record)));
        assert!((430..=480).contains(&stayed), "{stayed}");
    }
}
