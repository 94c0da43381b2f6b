//! What of the collected examples does not stay: those that an evaluation set holds, and those said before.
//!
//! Contamination is looked for first, so that of two copies none survives as the first of its kind.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::Result;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::contamination::EvaluationSets;
use super::duplicates::{Sketch, find};
use super::example::Example;
use super::manifest::InputFile;
use super::source::{Collected, Reason};
use crate::recipe::DataSpec;

/// Characters of a text that a report quotes.
const QUOTED: usize = 1000;

/// An example that was found to be said before or to be of an evaluation set: one line of `screened.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// Its source.
    pub source: String,
    /// Record of the source's file.
    pub record: u32,
    /// `duplicate`, `near_duplicate` or `contaminated`.
    pub reason: String,
    /// It stays all the same, because the recipe says so.
    pub kept: bool,
    /// Why, in words.
    pub why: String,
    /// What it asks, without context; the beginning of a long one.
    pub question: String,
    /// What it answers, likewise.
    pub response: String,
    /// What it repeats.
    pub of: Origin,
}

/// The earlier example, or the item of an evaluation set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// Its source, or the name of the evaluation set's file.
    pub source: String,
    /// Its record, or the item's name.
    pub record: String,
    /// What it asks.
    pub question: String,
    /// What it answers.
    pub response: String,
}

/// What was found, and what follows from it.
#[derive(Debug, Default)]
pub struct Screened {
    /// Every example found, by source and record.
    pub findings: Vec<Finding>,
    /// Examples found but kept, by source and reason.
    pub kept: HashMap<String, BTreeMap<&'static str, usize>>,
    /// Documents that go to one split because they hold duplicates of each other.
    pub links: Links,
    /// The evaluation sets that were read.
    pub inputs: Vec<InputFile>,
}

/// Documents joined by duplicates that stay: each leads to the first of its kind.
#[derive(Debug, Default)]
pub struct Links {
    leads_to: HashMap<(String, String), (String, String)>,
}

impl Links {
    /// The source and document that decide the split of `document`.
    pub fn decider<'a>(&'a self, source: &'a str, document: &'a str) -> (&'a str, &'a str) {
        let mut found = (source, document);
        // An empty map is the usual case, and costs no copy of the document.
        while !self.leads_to.is_empty() {
            match self.leads_to.get(&(found.0.to_string(), found.1.to_string())) {
                Some((source, document)) => found = (source, document),
                None => break,
            }
        }
        found
    }

    fn join(&mut self, first: (&str, &str), again: (&str, &str)) {
        let owned = |(source, document): (&str, &str)| (source.to_string(), document.to_string());
        let (one, other) = (owned(self.decider(first.0, first.1)), owned(self.decider(again.0, again.1)));
        if one != other {
            self.leads_to.insert(other, one);
        }
    }
}

/// Finds and, unless the recipe keeps them, removes contaminated examples and duplicates.
///
/// # Errors
/// When an evaluation set cannot be read.
pub fn screen(collected: &mut [Collected], spec: &DataSpec) -> Result<Screened> {
    let sets = EvaluationSets::read(&spec.contamination)?;
    let mut screened = Screened::default();
    for source in collected.iter_mut() {
        decontaminate(source, &sets, spec, &mut screened);
    }
    deduplicate(collected, spec, &mut screened);
    screened.inputs = sets.inputs;
    Ok(screened)
}

fn decontaminate(source: &mut Collected, sets: &EvaluationSets, spec: &DataSpec, screened: &mut Screened) {
    let keep = spec.contamination.keep;
    let mut found = HashSet::new();
    for (at, hit) in sets.find_all(&source.examples, &spec.contamination).into_iter().enumerate() {
        let Some((item, how)) = hit else { continue };
        let (Some(item), Some(example)) = (sets.items.get(item as usize), source.examples.get(at)) else {
            continue;
        };
        found.insert(at);
        let of = Origin {
            source: item.set.clone(),
            record: item.name.clone(),
            question: quoted(&item.question),
            response: quoted(&item.response),
        };
        let name = source.name.as_str();
        screened.findings.push(finding(name, example, Reason::Contaminated, keep, how.describe(), of));
    }
    leave_out(source, &[(Reason::Contaminated, found)], keep, screened);
}

fn deduplicate(collected: &mut [Collected], spec: &DataSpec, screened: &mut Screened) {
    let places: Vec<(usize, usize)> = collected
        .iter()
        .enumerate()
        .flat_map(|(source, one)| (0..one.examples.len()).map(move |at| (source, at)))
        .collect();
    let example = |(source, at): (usize, usize)| {
        let source: &Collected = collected.get(source)?;
        Some((source.name.as_str(), source.examples.get(at)?))
    };
    let sketches: Vec<Sketch> = places
        .par_iter()
        .filter_map(|place| example(*place).map(|(_, example)| Sketch::of(example)))
        .collect();
    let at = |index: usize| places.get(index).and_then(|place| example(*place));
    let pairs = find(&sketches, |index| at(index).map(|(_, example)| example), &spec.duplicates);
    let mut found: Vec<[(Reason, HashSet<usize>); 2]> = collected
        .iter()
        .map(|_| [(Reason::Duplicate, HashSet::new()), (Reason::NearDuplicate, HashSet::new())])
        .collect();
    for pair in &pairs {
        let (Some((first_source, first)), Some((name, again))) = (at(pair.first), at(pair.again)) else {
            continue;
        };
        let (reason, why) = match pair.likeness {
            None => (Reason::Duplicate, "word for word".to_string()),
            Some(likeness) => (
                Reason::NearDuplicate,
                format!("question {:.2}, response {:.2}", likeness.question, likeness.response),
            ),
        };
        if spec.duplicates.keep {
            screened.links.join((first_source, &first.document), (name, &again.document));
        }
        let of = Origin {
            source: first_source.to_string(),
            record: first.record.to_string(),
            question: quoted(&first.asked()),
            response: quoted(&first.answered()),
        };
        screened.findings.push(finding(name, again, reason, spec.duplicates.keep, why, of));
        let place = places.get(pair.again).copied().unwrap_or_default();
        if let Some([copies, near]) = found.get_mut(place.0) {
            let (_, of_kind) = if reason == Reason::Duplicate { copies } else { near };
            of_kind.insert(place.1);
        }
    }
    for (source, found) in collected.iter_mut().zip(&found) {
        leave_out(source, found, spec.duplicates.keep, screened);
    }
}

fn leave_out(
    source: &mut Collected,
    found: &[(Reason, HashSet<usize>)],
    keep: bool,
    screened: &mut Screened,
) {
    for (reason, found) in found.iter().filter(|(_, found)| !found.is_empty()) {
        if keep {
            let kept = screened.kept.entry(source.name.clone()).or_default();
            kept.insert(reason.name(), found.len());
        } else {
            *source.dropped.entry(*reason).or_default() += found.len();
        }
    }
    if !keep {
        let mut at = 0;
        source.examples.retain(|_| {
            at += 1;
            !found.iter().any(|(_, found)| found.contains(&(at - 1)))
        });
    }
}

fn finding(source: &str, example: &Example, reason: Reason, kept: bool, why: String, of: Origin) -> Finding {
    Finding {
        source: source.to_string(),
        record: example.record,
        reason: reason.name().to_string(),
        kept,
        why,
        question: quoted(&example.asked()),
        response: quoted(&example.answered()),
        of,
    }
}

/// The beginning of a text.
fn quoted(text: &str) -> String {
    match text.char_indices().nth(QUOTED) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_joined_by_duplicates_are_decided_by_the_first() {
        let mut links = Links::default();
        links.join(("a", "1"), ("a", "2"));
        links.join(("b", "1"), ("b", "2"));
        links.join(("a", "2"), ("b", "2"));
        links.join(("a", "1"), ("b", "1"));
        for (source, document) in [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")] {
            assert_eq!(links.decider(source, document), ("a", "1"));
        }
        assert_eq!(links.decider("c", "1"), ("c", "1"));
    }

    #[test]
    fn a_long_text_is_quoted_by_its_beginning() {
        assert_eq!(quoted("é"), "é");
        assert_eq!(quoted(&"é".repeat(QUOTED + 1)), format!("{}…", "é".repeat(QUOTED)));
    }
}
