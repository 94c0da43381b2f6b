//! Examples that say what an earlier one says: word for word, or but for trifles.
//!
//! Candidates come from MinHash sketches over three-word shingles of question and response, in bands (Broder 1997;
//! Leskovec, Rajaraman and Ullman, *Mining of Massive Datasets*, chapter 3); each is then judged by the real Jaccard
//! index, so no pair is listed for a collision. Schema, page and other context never make two examples alike, but two
//! different contexts keep them apart: the same question to another database is another question.

use std::collections::HashMap;

use rayon::prelude::*;

use super::example::Example;
use super::words::{Words, mix, similarity};
use crate::recipe::DuplicatesSpec;

/// Bands of a sketch, and hashes of each: at a Jaccard index of 0.8 a pair meets in one with probability 0.998.
const BANDS: usize = 12;
const ROWS: usize = 4;
/// A response below this many words must agree in every word: one other word is another answer.
const SHORT_RESPONSE: usize = 50;
/// In a band where very many examples meet, each is compared with so many of the earliest.
const EARLIEST: usize = 64;

/// What is kept of an example to find candidates: 80 bytes, whatever its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sketch {
    identity: [u8; 32],
    bands: [u32; BANDS],
}

impl Sketch {
    /// The sketch of an example.
    pub fn of(example: &Example) -> Self {
        let question = Words::of(&example.asked()).shingles();
        let response = Words::of(&example.answered()).shingles();
        // The same words asked and answered are different things said.
        let marked = response.iter().map(|hash| mix(hash ^ 0x5bd1_e995));
        let mut least = [u32::MAX; BANDS * ROWS];
        for shingle in question.iter().copied().chain(marked) {
            for (at, least) in least.iter_mut().enumerate() {
                let draw = (shingle ^ (shingle >> 29)).wrapping_mul(multiplier(at));
                *least = (*least).min((draw >> 32) as u32);
            }
        }
        let mut bands = [0; BANDS];
        for (band, rows) in bands.iter_mut().zip(least.chunks(ROWS)) {
            *band = (rows.iter().fold(0, |hash, row| mix(hash ^ u64::from(*row))) >> 32) as u32;
        }
        Self { identity: example.identity(), bands }
    }
}

/// An odd number for each hash of a sketch; an odd multiplier permutes 64-bit numbers.
fn multiplier(at: usize) -> u64 {
    mix((at as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1
}

/// How much two examples share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Likeness {
    /// Jaccard index of the questions' shingles, in `[0, 1]`.
    pub question: f64,
    /// Of the responses'.
    pub response: f64,
}

/// A later example that says what an earlier one says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// The earlier one, which stays.
    pub first: usize,
    /// The later one.
    pub again: usize,
    /// `None`: word for word, context and all.
    pub likeness: Option<Likeness>,
}

/// What there is to judge of an example.
struct Said {
    question: Words,
    response: Words,
    context: Words,
}

impl Said {
    fn of(example: &Example) -> Self {
        Self {
            question: Words::of(&example.asked()),
            response: Words::of(&example.answered()),
            context: Words::of(&example.context()),
        }
    }

    fn has_context_of(&self, other: &Self) -> bool {
        let (one, other) = (&self.context.hashes, &other.context.hashes);
        one.is_empty() || other.is_empty() || one == other
    }
}

/// How alike two examples are, when that is enough to be near duplicates.
pub fn judge(one: &Example, other: &Example, spec: &DuplicatesSpec) -> Option<Likeness> {
    let (one, other) = (Said::of(one), Said::of(other));
    if !one.has_context_of(&other)
        || !one.question.tell_of_the_same(&other.question)
        || !one.response.tell_of_the_same(&other.response)
    {
        return None;
    }
    let likeness = Likeness {
        question: similarity(&one.question.shingles(), &other.question.shingles()),
        response: similarity(&one.response.shingles(), &other.response.shingles()),
    };
    let is_short = one.response.hashes.len().min(other.response.hashes.len()) < SHORT_RESPONSE;
    let responses_agree = if is_short {
        one.response.hashes == other.response.hashes
    } else {
        likeness.response >= spec.response_similarity
    };
    (responses_agree && likeness.question >= spec.question_similarity).then_some(likeness)
}

/// Every example that says what an earlier one says, each once, in order.
///
/// A near duplicate repeats one that is itself none; a copy of a near duplicate is listed as its copy.
///
/// `at` gives the example of a sketch, and is asked for candidates only.
pub fn find<'a>(
    sketches: &[Sketch],
    at: impl Fn(usize) -> Option<&'a Example> + Sync,
    spec: &DuplicatesSpec,
) -> Vec<Pair> {
    let mut pairs = copies(sketches);
    let mut again: Vec<bool> = vec![false; sketches.len()];
    mark(&mut again, &pairs);
    let candidates = candidates(sketches, &again);
    let near: Vec<Pair> = candidates
        .into_par_iter()
        .filter_map(|(first, again)| {
            let likeness = judge(at(first)?, at(again)?, spec)?;
            Some(Pair { first, again, likeness: Some(likeness) })
        })
        .collect();
    for pair in near {
        if let (Some(false), Some(false)) = (again.get(pair.first), again.get(pair.again)) {
            mark(&mut again, &[pair]);
            pairs.push(pair);
        }
    }
    pairs.sort_by_key(|pair| pair.again);
    pairs
}

fn mark(again: &mut [bool], pairs: &[Pair]) {
    for pair in pairs {
        if let Some(mark) = again.get_mut(pair.again) {
            *mark = true;
        }
    }
}

fn copies(sketches: &[Sketch]) -> Vec<Pair> {
    let mut first_of: HashMap<&[u8; 32], usize> = HashMap::with_capacity(sketches.len());
    let mut pairs = Vec::new();
    for (again, sketch) in sketches.iter().enumerate() {
        match first_of.get(&sketch.identity) {
            Some(first) => pairs.push(Pair { first: *first, again, likeness: None }),
            None => _ = first_of.insert(&sketch.identity, again),
        }
    }
    pairs
}

/// Pairs that share a band, the later one by the later one and the earliest first.
fn candidates(sketches: &[Sketch], left_out: &[bool]) -> Vec<(usize, usize)> {
    let mut pairs: Vec<(usize, usize)> = (0..BANDS)
        .into_par_iter()
        .flat_map_iter(|band| {
            let mut keyed: Vec<(u32, usize)> = sketches
                .iter()
                .enumerate()
                .filter(|(at, _)| left_out.get(*at) == Some(&false))
                .filter_map(|(at, sketch)| Some((*sketch.bands.get(band)?, at)))
                .collect();
            keyed.sort_unstable();
            let meeting = keyed.chunk_by(|one, other| one.0 == other.0);
            meeting.flat_map(meetings).collect::<Vec<_>>()
        })
        .collect();
    pairs.par_sort_unstable_by_key(|(first, again)| (*again, *first));
    pairs.dedup();
    pairs
}

fn meetings(members: &[(u32, usize)]) -> Vec<(usize, usize)> {
    let mut pairs = Vec::new();
    for (place, (_, again)) in members.iter().enumerate() {
        pairs.extend(members.iter().take(place.min(EARLIEST)).map(|(_, first)| (*first, *again)));
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::example::{Message, Role};

    fn example(context: &str, question: &str, response: &str) -> Example {
        let content = format!("{context}{question}");
        Example {
            question: context.len()..content.len(),
            messages: vec![Message::new(Role::User, content), Message::new(Role::Assistant, response)],
            document: String::new(),
            file: 0,
            record: 1,
            cuts: Vec::new(),
        }
    }

    fn are_near(one: &Example, other: &Example) -> bool {
        let found = find(
            &[Sketch::of(one), Sketch::of(other)],
            |at| [one, other].get(at).copied(),
            &DuplicatesSpec::default(),
        );
        !found.is_empty()
    }

    fn near(one: (&str, &str), other: (&str, &str)) -> bool {
        are_near(&example("", one.0, one.1), &example("", other.0, other.1))
    }

    const LONG: &str = "A bicycle for the city should be light and simple to mend. Look at the frame first, then at the \
        brakes, and sit on it for more than a minute. A shop that lets you ride around the block is worth more than \
        one that lowers the price. Think of where it will stand at night, and of rain. Then choose the colour that \
        you like, because you will see it every day.";

    #[test]
    fn trifles_make_no_other_example() {
        assert!(near(("How many States are there?", "50"), ("how many states are there", "50.")));
        let other = LONG.replace("of rain", "of the rain");
        assert!(near(("How do I choose a bicycle?", LONG), ("How do I choose a bicycle?", &other)));
        let paraphrase =
            "Show the id of each employee and the number of documents destroyed by that employee.";
        let other =
            "What are the id of each employee and the number of documents destroyed by that employee?";
        assert!(near((paraphrase, "SELECT a, count(*) FROM b"), (other, "SELECT a, COUNT(*) FROM b")));
    }

    #[test]
    fn one_number_name_or_answer_does() {
        assert!(!near(("What is 3+4", "7"), ("What is 3+5", "8")));
        assert!(!near(("What is 3+4", "7"), ("What is 3+5", "7")));
        assert!(!near(
            ("List ships from France.", "SELECT 'France'"),
            ("List ships from Spain.", "SELECT 'Spain'")
        ));
        assert!(!near(
            ("Who is the greatest of all time?", "Nadal"),
            ("Who is the greatest of all time?", "Serena")
        ));
        let other = LONG.replace("A bicycle", "A bicycle of 1990");
        assert!(!near(("How do I choose a bicycle?", LONG), ("How do I choose a bicycle?", &other)));
        assert!(!near(("How do I choose a bicycle?", LONG), ("Why is the sky blue?", LONG)));
    }

    #[test]
    fn another_schema_is_another_question_and_a_shared_one_makes_none_alike() {
        let [one, other] = ["CREATE TABLE a (b number, c text);", "CREATE TABLE d (e text);"];
        let asked = |schema: &str, question: &str, query: &str| example(schema, question, query);
        let count = ["How many are there?", "SELECT count(*) FROM a"];
        assert!(!are_near(&asked(one, count[0], count[1]), &asked(other, count[0], count[1])));
        let long = one.repeat(50);
        assert!(!are_near(
            &asked(&long, count[0], count[1]),
            &asked(&long, "Name them all.", "SELECT c FROM a")
        ));
        // A question with its passage and the same without.
        assert!(are_near(&asked(one, count[0], count[1]), &asked("", count[0], count[1])));
    }

    #[test]
    fn the_first_stays_and_each_later_one_is_listed_once() {
        let list = [
            example("", "Name a fruit that is red", "apple"),
            example("", "Name a vegetable", "carrot"),
            example("", "Name a fruit that is red", "apple"),
            example("", "Name a fruit, that is red!", "Apple"),
            example("", "Name a fruit, that is red!", "Apple"),
        ];
        let sketches: Vec<Sketch> = list.iter().map(Sketch::of).collect();
        let found = find(&sketches, |at| list.get(at), &DuplicatesSpec::default());
        let pairs: Vec<(usize, usize, bool)> =
            found.iter().map(|pair| (pair.first, pair.again, pair.likeness.is_some())).collect();
        assert_eq!(pairs, [(0, 2, false), (0, 3, true), (3, 4, false)]);
    }

    #[test]
    fn sketches_meet_as_often_as_the_theory_says() {
        // 400 pairs of texts of 100 words whose last 10 differ: 88 of 108 shingles shared, J = 0.81.
        let text = |pair: u32, tail: &str| {
            (0..100)
                .map(|at| if at < 90 { format!("w{pair}x{at} ") } else { format!("{tail}{pair}y{at} ") })
                .collect::<String>()
        };
        let met = (0..400).filter(|pair| {
            let [one, other] = ["a", "b"].map(|tail| Sketch::of(&example("", "q", &text(*pair, tail))));
            one.bands.iter().zip(other.bands).any(|(one, other)| *one == other)
        });
        assert!(met.count() >= 395);
        assert_eq!(candidates(&[Sketch::of(&example("", "q", "r")); 2], &[false; 2]), [(0, 1)]);
    }
}
