//! Keeping the examples of a source that may be taken, in bounded memory.
//!
//! All of them while they are small together. Of more, those that come first in the order of the sample, some more of
//! them than the recipe asks for: the examples behind them would not be looked at, whatever becomes of those before.

use std::collections::BTreeMap;
use std::mem;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use crate::data::example::Example;
use crate::data::mixture::key;

/// Bytes of text up to which all examples of a source are kept.
const ALL: usize = 128 << 20;

/// The order in which a source's examples are sampled.
pub(super) struct Sampling<'a> {
    seed: u64,
    source: &'a str,
    /// Copies stay, so they are candidates of their own.
    keep_copies: bool,
    /// The beginning of the last candidate's key, once there are enough. It only falls, so what lies behind it now
    /// will not be taken later.
    last: AtomicU64,
}

/// A place in the order of the sample; of copies, the first of the files comes first.
type Place = ([u8; 32], u32, u32);

/// An example that may be sampled.
pub(super) struct Candidate {
    place: Place,
    example: Example,
}

impl<'a> Sampling<'a> {
    pub(super) fn new(seed: u64, source: &'a str, keep_copies: bool) -> Self {
        Self { seed, source, keep_copies, last: AtomicU64::new(u64::MAX) }
    }

    /// `None` where enough others come first: of a large dump most are let go here, where they are made.
    pub(super) fn candidate(&self, example: Example) -> Option<Candidate> {
        let place = self.place(&example);
        let may_be_taken = beginning(&place) <= self.last.load(Ordering::Relaxed);
        may_be_taken.then_some(Candidate { place, example })
    }

    fn place(&self, example: &Example) -> Place {
        let key = key(self.seed, self.source, example);
        let (file, record) = if self.keep_copies { (example.file, example.record) } else { (0, 0) };
        (key, file, record)
    }
}

/// Of a place before another, it is no greater.
fn beginning(place: &Place) -> u64 {
    let ([a, b, c, d, e, f, g, h, ..], ..) = *place;
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

/// The examples of a source so far.
pub(super) struct Gather<'a> {
    sampling: &'a Sampling<'a>,
    /// How many to keep when they are too many; `None`: all, whatever their size.
    limit: Option<usize>,
    bytes: usize,
    all: Vec<Example>,
    candidates: BTreeMap<Place, Example>,
    passed_over: usize,
    budget: usize,
}

impl<'a> Gather<'a> {
    /// For a source of which the recipe asks for so many.
    pub(super) fn new(sampling: &'a Sampling<'a>, asked: Option<usize>) -> Self {
        // A quarter more, and some: contaminated examples, duplicates and those that are too long are replaced.
        let limit = asked.map(|asked| asked.saturating_add(asked / 4).saturating_add(1000));
        Self {
            sampling,
            limit,
            bytes: 0,
            all: Vec::new(),
            candidates: BTreeMap::new(),
            passed_over: 0,
            budget: ALL,
        }
    }

    /// Takes what `Sampling` made of an example.
    pub(super) fn push(&mut self, candidate: Option<Candidate>) {
        let Some(Candidate { place, example }) = candidate else {
            self.passed_over += 1;
            return;
        };
        if !self.candidates.is_empty() {
            return self.consider(place, example);
        }
        self.bytes += size(&example);
        self.all.push(example);
        if self.bytes > self.budget && self.limit.is_some_and(|limit| self.all.len() > limit.max(1)) {
            // Found again rather than kept: most sources never come here.
            let places: Vec<Place> = self.all.par_iter().map(|one| self.sampling.place(one)).collect();
            for (place, example) in places.into_iter().zip(mem::take(&mut self.all)) {
                self.consider(place, example);
            }
        }
    }

    fn consider(&mut self, place: Place, example: Example) {
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
        if let (true, Some((last, _))) = (self.candidates.len() == limit, self.candidates.last_key_value()) {
            self.sampling.last.store(beginning(last), Ordering::Relaxed);
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
        let sampling = Sampling::new(7, "s", keep_copies);
        let mut gather = Gather::new(&sampling, asked);
        gather.budget = budget;
        examples.iter().cloned().for_each(|example| gather.push(sampling.candidate(example)));
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
    fn what_was_made_ahead_is_let_go_or_kept_as_if_it_were_not() {
        let examples: Vec<Example> =
            (1..=5000).map(|at| example(at, &format!("text {}", at % 4000))).collect();
        let gathered = |ahead: usize| {
            let sampling = Sampling::new(7, "s", false);
            let mut gather = Gather::new(&sampling, Some(40));
            gather.budget = 100;
            for batch in examples.chunks(ahead) {
                let made: Vec<_> = batch.iter().map(|one| sampling.candidate(one.clone())).collect();
                made.into_iter().for_each(|one| gather.push(one));
            }
            gather.finish()
        };
        let (found, passed_over) = gathered(1);
        assert_eq!((found.len(), passed_over), (1050, 3950));
        assert!([100, 999, 5000].into_iter().all(|ahead| gathered(ahead) == (found.clone(), passed_over)));
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
