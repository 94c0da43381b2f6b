//! Keeping the examples of a source that may be taken, in bounded memory.
//!
//! All of them while they are small together. Of more, those that come first in the order of the sample, some more of
//! them than the recipe asks for: the examples behind them would not be looked at, whatever becomes of those before.

use std::collections::BTreeMap;

use crate::data::example::Example;
use crate::data::mixture::key;

/// Bytes of text up to which all examples of a source are kept.
const ALL: usize = 128 << 20;

/// The examples of a source so far.
pub(super) struct Gather<'a> {
    seed: u64,
    source: &'a str,
    /// How many to keep when they are too many; `None`: all, whatever their size.
    limit: Option<usize>,
    /// Copies stay, so they are candidates of their own.
    keep_copies: bool,
    bytes: usize,
    all: Vec<Example>,
    candidates: BTreeMap<Place, Example>,
    passed_over: usize,
    budget: usize,
}

/// The order of the sample; of copies, the first of the files comes first.
type Place = ([u8; 32], u32, u32);

impl<'a> Gather<'a> {
    /// For a source of which the recipe asks for so many.
    pub(super) fn new(seed: u64, source: &'a str, asked: Option<usize>, keep_copies: bool) -> Self {
        // A quarter more, and some: contaminated examples, duplicates and those that are too long are replaced.
        let limit = asked.map(|asked| asked.saturating_add(asked / 4).saturating_add(1000));
        Self {
            seed,
            source,
            limit,
            keep_copies,
            bytes: 0,
            all: Vec::new(),
            candidates: BTreeMap::new(),
            passed_over: 0,
            budget: ALL,
        }
    }

    pub(super) fn push(&mut self, example: Example) {
        if !self.candidates.is_empty() {
            return self.consider(example);
        }
        self.bytes += size(&example);
        self.all.push(example);
        if self.bytes > self.budget && self.limit.is_some_and(|limit| self.all.len() > limit.max(1)) {
            for example in std::mem::take(&mut self.all) {
                self.consider(example);
            }
        }
    }

    fn consider(&mut self, example: Example) {
        let key = key(self.seed, self.source, &example);
        let (file, record) = if self.keep_copies { (example.file, example.record) } else { (0, 0) };
        let place = (key, file, record);
        let limit = self.limit.unwrap_or(usize::MAX).max(1);
        let is_behind = self.candidates.len() >= limit
            && self.candidates.last_key_value().is_some_and(|(last, _)| *last < place);
        if is_behind || self.candidates.contains_key(&place) {
            self.passed_over += 1;
            return;
        }
        self.candidates.insert(place, example);
        if self.candidates.len() > limit {
            self.candidates.pop_last();
            self.passed_over += 1;
        }
    }

    /// The examples in the order of the files, and how many more could be used.
    pub(super) fn finish(self) -> (Vec<Example>, usize) {
        let mut examples =
            if self.candidates.is_empty() { self.all } else { self.candidates.into_values().collect() };
        examples.sort_by_key(|example| (example.file, example.record));
        (examples, self.passed_over)
    }
}

/// Bytes of an example's texts.
fn size(example: &Example) -> usize {
    let said: usize = example.messages.iter().map(|message| message.content.len()).sum();
    said + example.document.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::example::{Message, Role};
    use crate::data::mixture::order;

    fn example(record: u32, text: &str) -> Example {
        let messages = vec![Message::new(Role::User, text), Message::new(Role::Assistant, "a")];
        Example {
            messages,
            document: String::new(),
            file: 0,
            record,
            question: 0..text.len(),
            cuts: Vec::new(),
        }
    }

    fn gathered(
        examples: &[Example],
        asked: Option<usize>,
        keep_copies: bool,
        budget: usize,
    ) -> (Vec<u32>, usize) {
        let mut gather = Gather::new(7, "s", asked, keep_copies);
        gather.budget = budget;
        examples.iter().cloned().for_each(|example| gather.push(example));
        let (found, passed_over) = gather.finish();
        (found.iter().map(|example| example.record).collect(), passed_over)
    }

    #[test]
    fn of_too_many_the_first_of_the_sample_are_kept_and_the_rest_is_counted() {
        let examples: Vec<Example> = (1..=3000).map(|at| example(at, &format!("text {at}"))).collect();
        let all: Vec<u32> = (1..=3000).collect();
        assert_eq!(gathered(&examples, Some(40), false, usize::MAX), (all.clone(), 0));
        assert_eq!(gathered(&examples, None, false, 100), (all, 0), "all are asked for");
        let (found, passed_over) = gathered(&examples, Some(40), false, 100);
        let mut first: Vec<u32> =
            order(7, "s", &examples).into_iter().take(1050).map(|at| at as u32 + 1).collect();
        first.sort_unstable();
        assert_eq!((found, passed_over), (first, 1950));
    }

    #[test]
    fn copies_count_once_unless_they_stay() {
        let examples: Vec<Example> =
            (1..=3000).map(|at| example(at, &format!("text {}", at % 1200))).collect();
        let (found, passed_over) = gathered(&examples, Some(400), false, 100);
        assert_eq!((found.len(), passed_over), (1200, 1800));
        assert!(found.iter().all(|record| *record <= 1200), "the first of the copies stays");
        let (found, passed_over) = gathered(&examples, Some(400), true, 100);
        assert_eq!((found.len(), passed_over), (1500, 1500));
    }
}
