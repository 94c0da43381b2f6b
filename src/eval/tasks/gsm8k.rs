//! GSM8K: grade school word problems, judged by the number at the end (Cobbe et al. 2021).

use std::path::Path;

use anyhow::{Result, anyhow};
use serde::Deserialize;

use crate::data::example::{Message, Role};
use crate::data::reader::read_records;
use crate::eval::number;
use crate::eval::task::{Judgement, Prompt, Question, Task, spread};
use crate::recipe::TaskSpec;

/// What stands before the number at the end of a reference.
const MARK: &str = "####";

/// What is asked of the model, behind the problem.
const REQUEST: &str = "Work it out step by step. End with a line of `#### ` and the number.";

#[derive(Debug, Clone, Deserialize)]
struct Record {
    question: String,
    answer: String,
}

/// A problem with its number.
#[derive(Debug, Clone)]
struct Problem {
    record: u32,
    question: String,
    reference: String,
    number: f64,
}

/// The task.
#[derive(Debug)]
pub struct Gsm8k {
    problems: Vec<Problem>,
    max_tokens: usize,
}

impl Gsm8k {
    /// Reads the problems.
    ///
    /// # Errors
    /// When the file is missing, or a reference does not end in `#### ` and a number.
    pub fn open(spec: &TaskSpec, limit: Option<usize>) -> Result<Self> {
        let mut problems = Vec::new();
        read_records::<Record>(Path::new(&spec.path), &["test.jsonl"], &[], &mut |record, one| {
            let number = number_behind_mark(&one.answer)
                .ok_or_else(|| anyhow!("the answer does not end in `{MARK} ` and a number"))?;
            problems.push(Problem { record, question: one.question, reference: one.answer, number });
            Ok(())
        })?;
        let problems = spread(&problems, limit.or(spec.limit));
        Ok(Self { problems, max_tokens: spec.max_tokens })
    }
}

/// The number behind the last `####`.
fn number_behind_mark(text: &str) -> Option<f64> {
    let (_, behind) = text.rsplit_once(MARK)?;
    number::value(&behind[number::places(behind).first()?.clone()])
}

/// The number that an answer gives: behind `####` where that was said, else its last one.
fn number_of(answer: &str) -> Option<f64> {
    number_behind_mark(answer).or_else(|| number::last(answer))
}

/// Money is written with cents or without; nothing else is forgiven.
fn is_same(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * a.abs().max(b.abs())
}

impl Task for Gsm8k {
    fn name(&self) -> &'static str {
        "gsm8k"
    }

    fn measures(&self) -> &'static [&'static str] {
        &["accuracy"]
    }

    fn len(&self) -> usize {
        self.problems.len()
    }

    fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    fn question(&self, at: usize) -> Result<Question> {
        let Problem { record, question, reference, .. } = &self.problems[at];
        let text = format!("{question}\n\n{REQUEST}");
        Ok(Question {
            id: record.to_string(),
            group: String::new(),
            prompt: Prompt::Chat(vec![Message::new(Role::User, text)]),
            text: question.clone(),
            reference: reference.clone(),
        })
    }

    fn judge(&mut self, at: usize, answer: &str) -> Result<Judgement> {
        Ok(match number_of(answer) {
            None => Judgement::failed("", "there is no number in the answer"),
            Some(number) => Judgement::of(number.to_string(), is_same(number, self.problems[at].number)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_behind_the_mark_counts_and_else_the_last() {
        for (answer, expected) in [
            ("9 * 2 = 18\n#### 18", Some(18.0)),
            ("#### 18\nThat is 2 more than 16.", Some(18.0)),
            ("####1,080", Some(1080.0)),
            ("#### $-3.50", Some(-3.5)),
            ("#### -3", Some(-3.0)),
            ("It is 9 and so 18 dollars.", Some(18.0)),
            ("#### none, or 4", Some(4.0)),
            ("I do not know", None),
        ] {
            assert_eq!(number_of(answer), expected, "{answer:?}");
        }
        assert!(is_same(18.0, 18.0) && is_same(0.1 + 0.2, 0.3) && is_same(0.0, -0.0));
        assert!(!is_same(18.0, 18.01) && !is_same(0.0, 1e-12));
    }
}
