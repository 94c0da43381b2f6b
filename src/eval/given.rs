//! Answers that are written already, by any system: judged as a model's are, without a model.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Deserializer};

use super::results::Results;
use super::task::{Answered, Judgement, Question, Task};
use crate::data::reader::read_records;
use crate::error::{HintExt as _, user_error};
use crate::progress;

/// A line of a file of answers. A line of our own results is one, too: its other fields are not looked at.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Answer {
    /// Which question: see [`Question::id`].
    #[serde(deserialize_with = "text_or_number")]
    pub id: String,
    /// What was said.
    pub answer: String,
    /// Tokens of the prompt, where they are known.
    #[serde(default)]
    pub prompt_tokens: usize,
    /// Tokens of the answer, where they are known.
    #[serde(default)]
    pub completion_tokens: usize,
    /// The answer ended by itself, not at a limit; so it is where nothing is said.
    #[serde(default = "yes")]
    pub finished: bool,
}

fn yes() -> bool {
    true
}

fn text_or_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a text or a whole number")]
    enum Id {
        Text(String),
        Number(u64),
    }
    Ok(match Id::deserialize(deserializer)? {
        Id::Text(text) => text,
        Id::Number(number) => number.to_string(),
    })
}

/// The answers of one file, to the questions of one task.
#[derive(Debug)]
pub struct GivenAnswers {
    by_id: HashMap<String, Answer>,
}

impl GivenAnswers {
    /// Reads a file of answers to a task's questions, one JSON object a line. Answers to what the task does not ask are
    /// told and left alone.
    ///
    /// # Errors
    /// When it is missing or damaged, a line has no `id` and `answer`, two lines are to one question, or a question has
    /// no answer.
    pub fn read(path: &Path, task: &dyn Task) -> Result<Self> {
        let mut by_id = HashMap::new();
        read_records(path, &[], &[], &mut |_, answer: Answer| {
            if let Some(before) = by_id.insert(answer.id.clone(), answer) {
                bail!("question `{}` is answered twice", before.id);
            }
            Ok(())
        })
        .hint(
            "write one answer to each question, one JSON object a line: {\"id\": \"1\", \"answer\": \"…\"}",
        )?;
        let given = Self { by_id };
        given.check_complete(path, task)?;
        let beyond = given.by_id.len().saturating_sub(task.len());
        if beyond > 0 {
            let path = path.display();
            progress::note(format!("note: {beyond} answers in {path} are to questions that are not asked"));
        }
        Ok(given)
    }

    /// Judges the answers to all questions of the task, less those that are among the results, as many side by side as the
    /// task likes.
    ///
    /// # Errors
    /// When the results are of other questions, an answer cannot be judged, or a file cannot be written.
    pub fn judge(&self, task: &mut dyn Task, results: &mut Results<Answered>) -> Result<()> {
        check_order(task, results.all())?;
        let bar = progress::bar(task.len() as u64, task.name(), "answers");
        bar.inc(results.all().len() as u64);
        let left: Vec<usize> = (results.all().len()..task.len()).collect();
        for places in left.chunks(task.side_by_side().max(1)) {
            for answered in self.judged(places, task)? {
                results.push(answered)?;
                bar.inc(1);
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// A missing answer is told before any is judged: that may take hours.
    fn check_complete(&self, path: &Path, task: &dyn Task) -> Result<()> {
        let mut missing = Vec::new();
        for at in 0..task.len() {
            let id = task.question(at)?.id;
            if !self.by_id.contains_key(&id) {
                missing.push(id);
            }
        }
        let Some(first) = missing.first() else { return Ok(()) };
        Err(user_error(
            format!(
                "`{}` answers {} of {} questions of {}; the first without an answer is `{first}`",
                path.display(),
                task.len() - missing.len(),
                task.len(),
                task.name()
            ),
            "give an empty `answer` where the system had none, or ask fewer questions with `--limit`",
        ))
    }

    /// The answers to some of the questions, by their places.
    fn judged(&self, places: &[usize], task: &mut dyn Task) -> Result<Vec<Answered>> {
        let questions = places.iter().map(|at| task.question(*at)).collect::<Result<Vec<_>>>()?;
        let given = |question: &Question| self.by_id.get(&question.id).context("there is no answer");
        let given = questions.iter().map(given).collect::<Result<Vec<_>>>()?;
        let answers: Vec<(usize, &str)> =
            places.iter().zip(&given).map(|(at, given)| (*at, given.answer.as_str())).collect();
        let in_questions = match questions.as_slice() {
            [one] => format!("{} {}", task.name(), one.id),
            _ => task.name().to_string(),
        };
        let judgements = task.judge_all(&answers).context(in_questions)?;
        let measures = task.measures();
        let answered = questions.into_iter().zip(given).zip(judgements);
        Ok(answered
            .map(|((question, given), judgement)| given.answered(question, judgement, measures))
            .collect())
    }
}

impl Answer {
    /// The line of results that it becomes.
    fn answered(&self, question: Question, judgement: Judgement, measures: &[&str]) -> Answered {
        let Question { id, group, text, reference, .. } = question;
        let Judgement { extracted, verdict, error, scores } = judgement;
        let Self { answer, prompt_tokens, completion_tokens, finished, .. } = self.clone();
        let scores = measures.iter().map(|name| (*name).to_string()).zip(scores).collect();
        Answered {
            id,
            group,
            question: text,
            reference,
            answer,
            extracted,
            verdict,
            scores,
            error,
            prompt_tokens,
            completion_tokens,
            finished,
        }
    }
}

/// Results lie in the order of the questions, so that the next one is known by their number.
fn check_order(task: &dyn Task, results: &[Answered]) -> Result<()> {
    if results.len() > task.len() {
        bail!("there are {} results of {}, which asks {} questions", results.len(), task.name(), task.len());
    }
    for (at, result) in results.iter().enumerate() {
        let id = task.question(at)?.id;
        if result.id != id {
            bail!("result {} of {} is of question `{}`, expected `{id}`", at + 1, task.name(), result.id);
        }
    }
    Ok(())
}
