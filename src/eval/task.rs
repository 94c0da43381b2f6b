//! What all tasks have in common: examples become prompts, prompts answers, answers scores.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::data::example::Message;

/// What a model is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Messages, which the model's template turns into text.
    Chat(Vec<Message>),
    /// Tokens, as they lie in the dataset.
    Tokens(Vec<u32>),
}

/// One example of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Its name within the task; the same for all models.
    pub id: String,
    /// The part of the task that it belongs to: a hardness, a source; empty where there are no parts.
    pub group: String,
    /// What the model is shown.
    pub prompt: Prompt,
    /// What is asked, for people.
    pub text: String,
    /// What would have been right.
    pub reference: String,
}

/// How an answer fared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It is right.
    Correct,
    /// It is something else.
    Wrong,
    /// It is nothing that could be right: no query, no program, no number, or a program that fails.
    Failed,
    /// The question did not fit the model's context.
    NotAsked,
    /// The reference itself fails: the question is left out of the score.
    GoldFailed,
}

/// What became of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Judgement {
    /// The part of the answer that was judged.
    pub extracted: String,
    /// How it fared.
    pub verdict: Verdict,
    /// Why, where something failed.
    pub error: Option<String>,
    /// One number in `[0, 1]` for each of the task's measures.
    pub scores: Vec<f64>,
}

impl Judgement {
    /// Right or wrong, in a task of one measure.
    pub fn of(extracted: impl Into<String>, right: bool) -> Self {
        let verdict = if right { Verdict::Correct } else { Verdict::Wrong };
        Self { extracted: extracted.into(), verdict, error: None, scores: vec![f64::from(u8::from(right))] }
    }

    /// Nothing that could be right, in a task of one measure.
    pub fn failed(extracted: impl Into<String>, error: impl Into<String>) -> Self {
        let (extracted, error) = (extracted.into(), Some(error.into()));
        Self { extracted, verdict: Verdict::Failed, error, scores: vec![0.0] }
    }
}

/// A set of questions, and who is right.
pub trait Task {
    /// Name, as in the recipe.
    fn name(&self) -> &'static str;

    /// What is measured; the first is the headline.
    fn measures(&self) -> &'static [&'static str];

    /// How many questions are asked.
    fn len(&self) -> usize;

    /// Whether nothing is asked.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Longest answer in tokens.
    fn max_tokens(&self) -> usize;

    /// One of the questions, by its place among those that are asked.
    ///
    /// # Errors
    /// When the task's files do not belong together.
    fn question(&self, at: usize) -> Result<Question>;

    /// Judges an answer to a question.
    ///
    /// # Errors
    /// When the answer cannot be judged, whatever it says.
    fn judge(&mut self, at: usize, answer: &str) -> Result<Judgement>;

    /// Judges answers to different questions, in their order; they may be judged side by side.
    ///
    /// # Errors
    /// As [`judge`](Self::judge).
    fn judge_all(&mut self, answers: &[(usize, &str)]) -> Result<Vec<Judgement>> {
        answers.iter().map(|(at, answer)| self.judge(*at, answer)).collect()
    }

    /// How many answers are judged side by side, where they lie there.
    fn side_by_side(&self) -> usize {
        1
    }

    /// Files that decide verdicts beside those that the recipe names: it names their folder.
    ///
    /// # Errors
    /// When the folder cannot be read.
    fn files(&self) -> Result<Vec<PathBuf>> {
        Ok(Vec::new())
    }

    /// Questions of the files that are not asked, by reason.
    fn left_out(&self) -> BTreeMap<String, usize> {
        BTreeMap::new()
    }
}

/// One line of a task's results.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answered {
    /// Which question: see [`Question::id`].
    pub id: String,
    /// See [`Question::group`].
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub group: String,
    /// What was asked.
    pub question: String,
    /// What would have been right.
    pub reference: String,
    /// What the model said.
    pub answer: String,
    /// The part of it that was judged.
    pub extracted: String,
    /// How it fared.
    pub verdict: Verdict,
    /// By measure, in `[0, 1]`.
    pub scores: BTreeMap<String, f64>,
    /// Why, where something failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    pub completion_tokens: usize,
    /// The answer ended by itself, not at the limit.
    pub finished: bool,
}

impl Answered {
    /// Whether it counts.
    pub fn is_scored(&self) -> bool {
        self.verdict != Verdict::GoldFailed
    }

    /// By measure; 0 where nothing was said.
    pub fn score(&self, measure: &str) -> f64 {
        self.scores.get(measure).copied().unwrap_or(0.0)
    }
}

/// At most `limit` of `all`, spread evenly: neighbours in a file are often about the same.
pub fn spread<T: Clone>(all: &[T], limit: Option<usize>) -> Vec<T> {
    let count = limit.unwrap_or(all.len()).min(all.len());
    (0..count).filter_map(|at| all.get(at * all.len() / count)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_spreads_over_the_file() {
        let all: Vec<usize> = (0..10).map(|at| at * 2).collect();
        assert_eq!(spread(&all, Some(3)), [0, 6, 12]);
        assert_eq!(spread(&all, Some(10)), all);
        assert_eq!(spread(&all, Some(99)), all);
        assert_eq!(spread(&all, None), all);
        assert_eq!(spread(&all, Some(0)), Vec::<usize>::new());
        assert_eq!(spread::<usize>(&[], None), Vec::<usize>::new());
    }
}
