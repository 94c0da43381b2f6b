//! Spider: execution accuracy of generated SQL on the real databases (Yu et al. 2018, Zhong et al. 2020).
//!
//! Prediction and gold are executed, read-only, and their results compared. As in the official evaluation,
//! `DISTINCT` is taken out of both, columns may be permuted, and the order of rows counts only where the gold
//! query has an `ORDER BY`. Databases without a row answer every query alike and are left out, counted.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::data::reader::read_records;
use crate::engine::{EngineHandle, FinishReason, Generation, Request, Sampling, SubmitError, TokenStream};
use crate::error::{is_missing_file, user_error, with_hint};
use crate::eval::database::{Database, QueryError, QueryLimits};
use crate::eval::result_set::same_answer;
use crate::eval::sql;
use crate::progress;

/// A question of `dev.json`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Question {
    /// The database.
    pub db_id: String,
    /// The question in words.
    pub question: String,
    /// The gold query.
    pub query: String,
}

/// Reads the questions of a `dev.json`, full or slim.
///
/// # Errors
/// When the file is missing or a record has not the three fields.
pub fn read_questions(path: &Path) -> Result<Vec<Question>> {
    let mut questions = Vec::new();
    read_records(path, &["dev.json"], &[], &mut |_, question| {
        questions.push(question);
        Ok(())
    })
    .map_err(|error| {
        if is_missing_file(&error) { with_hint(error, "mend the paths in `eval.spider`") } else { error }
    })?;
    Ok(questions)
}

/// The databases of a folder, each opened when first asked for.
#[derive(Debug)]
pub struct Databases {
    folder: PathBuf,
    limits: QueryLimits,
    opened: BTreeMap<String, Presence>,
}

/// What there is of a database.
#[derive(Debug)]
enum Presence {
    Missing,
    Empty,
    Usable(Database),
}

impl Databases {
    /// A folder of `<db_id>/<db_id>.sqlite`.
    pub fn new(folder: &Path, limits: QueryLimits) -> Self {
        Self { folder: folder.to_path_buf(), limits, opened: BTreeMap::new() }
    }

    fn find(&mut self, db_id: &str) -> Result<&Presence> {
        if !self.opened.contains_key(db_id) {
            let presence = self.look(db_id)?;
            self.opened.insert(db_id.to_string(), presence);
        }
        self.opened.get(db_id).context("the database was just opened")
    }

    fn look(&self, db_id: &str) -> Result<Presence> {
        let path = self.folder.join(db_id).join(format!("{db_id}.sqlite"));
        if !path.is_file() {
            return Ok(Presence::Missing);
        }
        let database = Database::open(&path, self.limits)?;
        let has_rows =
            database.has_rows().with_context(|| format!("cannot read database `{}`", path.display()))?;
        Ok(if has_rows { Presence::Usable(database) } else { Presence::Empty })
    }

    fn usable(&mut self, db_id: &str) -> Result<&Database> {
        match self.find(db_id)? {
            Presence::Usable(database) => Ok(database),
            Presence::Missing | Presence::Empty => anyhow::bail!("database `{db_id}` cannot be used"),
        }
    }
}

/// Which questions are asked, and which cannot be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// Indices of the questions that are asked, in the file's order.
    pub asked: Vec<usize>,
    /// Questions whose databases are empty.
    pub without_rows: usize,
    /// Questions whose databases are not there.
    pub without_database: usize,
}

/// Chooses at most `limit` of the usable questions, spread evenly over the file: its neighbours share a database.
///
/// # Errors
/// When a database is damaged, or no question can be asked.
pub fn select(questions: &[Question], databases: &mut Databases, limit: Option<usize>) -> Result<Selection> {
    let mut selection = Selection { asked: Vec::new(), without_rows: 0, without_database: 0 };
    for (index, question) in questions.iter().enumerate() {
        match databases.find(&question.db_id)? {
            Presence::Usable(_) => selection.asked.push(index),
            Presence::Empty => selection.without_rows += 1,
            Presence::Missing => selection.without_database += 1,
        }
    }
    if selection.asked.is_empty() {
        return Err(user_error(
            format!(
                "none of {} questions has a database with rows in `{}`",
                questions.len(),
                databases.folder.display()
            ),
            "set `eval.spider.databases` to the folder of `<db_id>/<db_id>.sqlite`",
        ));
    }
    selection.asked = spread(&selection.asked, limit);
    Ok(selection)
}

fn spread(all: &[usize], limit: Option<usize>) -> Vec<usize> {
    let count = limit.unwrap_or(all.len()).min(all.len());
    (0..count).map(|at| all[at * all.len() / count]).collect()
}

/// How a prediction fared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It gives what the gold query gives.
    Correct,
    /// It gives something else.
    Wrong,
    /// It is no query of this schema, or runs into a limit.
    Failed,
    /// The question did not fit the model's context.
    NotAsked,
    /// The gold query itself does not run: the question is left out of the score.
    GoldFailed,
}

/// One line of `predictions.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prediction {
    /// Record of the file, counted from 1.
    pub record: usize,
    /// The database.
    pub db_id: String,
    /// The question.
    pub question: String,
    /// The gold query.
    pub gold: String,
    /// What the model said.
    pub answer: String,
    /// The query in it.
    pub predicted: String,
    /// How it fared.
    pub verdict: Verdict,
    /// Why, where something failed.
    pub error: Option<String>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    pub completion_tokens: usize,
    /// The answer ended by itself, not at `max_tokens`.
    pub finished: bool,
}

/// Execution accuracy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SpiderReport {
    /// `correct / scored`.
    pub execution_accuracy: f64,
    /// Questions whose prediction gave the gold result.
    pub correct: usize,
    /// Questions that count: asked, with a gold query that runs.
    pub scored: usize,
    /// Predictions that gave a result at all.
    pub executable: usize,
    /// Questions that did not fit the context; they count as not correct.
    pub too_long: usize,
    /// Gold queries that do not run; left out.
    pub gold_failed: usize,
    /// Answers that were cut at `max_tokens`.
    pub cut: usize,
    /// Questions of the file whose databases hold no row; left out.
    pub without_rows: usize,
    /// Questions of the file whose databases are not there; left out.
    pub without_database: usize,
    /// Usable questions that `limit` left out.
    pub beyond_limit: usize,
}

/// Compares a predicted query with the gold one.
///
/// # Errors
/// When the database cannot be used.
pub fn judge(
    databases: &mut Databases,
    db_id: &str,
    gold: &str,
    predicted: &str,
) -> Result<(Verdict, Option<String>)> {
    let database = databases.usable(db_id)?;
    let run = |query: &str| database.query(&sql::without_distinct(query));
    let told = |error: QueryError| Some(error.to_string());
    Ok(match (run(gold), run(predicted)) {
        (Err(error), _) => (Verdict::GoldFailed, told(error)),
        (Ok(_), Err(error)) => (Verdict::Failed, told(error)),
        (Ok(expected), Ok(found)) => {
            let same = same_answer(&expected, &found, sql::orders_rows(gold));
            (if same { Verdict::Correct } else { Verdict::Wrong }, None)
        }
    })
}

/// Sums up predictions.
pub fn summarize(predictions: &[Prediction], questions: usize, selection: &Selection) -> SpiderReport {
    let count = |verdict: Verdict| predictions.iter().filter(|one| one.verdict == verdict).count();
    let (correct, gold_failed) = (count(Verdict::Correct), count(Verdict::GoldFailed));
    let scored = predictions.len() - gold_failed;
    let Selection { without_rows, without_database, .. } = *selection;
    SpiderReport {
        execution_accuracy: if scored == 0 { 0.0 } else { correct as f64 / scored as f64 },
        correct,
        scored,
        executable: correct + count(Verdict::Wrong),
        too_long: count(Verdict::NotAsked),
        gold_failed,
        cut: predictions.iter().filter(|one| one.verdict != Verdict::NotAsked && !one.finished).count(),
        without_rows,
        without_database,
        beyond_limit: questions - without_rows - without_database - selection.asked.len(),
    }
}

/// How questions become tokens and tokens become text.
pub struct Speaker<'a> {
    /// The prompt of a question, as `prepare` builds it.
    pub prompt: &'a dyn Fn(&Question) -> Result<Vec<u32>>,
    /// An answer as text, without special tokens.
    pub decode: &'a dyn Fn(&[u32]) -> Result<String>,
    /// Tokens that end an answer.
    pub stop_token_ids: Vec<u32>,
    /// Longest answer.
    pub max_tokens: usize,
}

impl std::fmt::Debug for Speaker<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Speaker").field("max_tokens", &self.max_tokens).finish_non_exhaustive()
    }
}

/// A question on its way through the engine.
struct Asked {
    index: usize,
    prompt_tokens: usize,
    answer: Result<TokenStream, SubmitError>,
}

/// Asks the selected questions greedily and judges the answers; each is handed to `keep` as it comes.
///
/// # Errors
/// When a prompt cannot be built, the engine fails, or `keep` does.
pub fn ask(
    questions: &[Question],
    selection: &Selection,
    databases: &mut Databases,
    engine: &EngineHandle,
    speaker: &Speaker<'_>,
    mut keep: impl FnMut(&Prediction) -> Result<()>,
) -> Result<Vec<Prediction>> {
    let bar = progress::bar(selection.asked.len() as u64, "spider", "questions");
    let mut predictions = Vec::with_capacity(selection.asked.len());
    let mut under_way = VecDeque::new();
    let mut left = selection.asked.iter().copied();
    loop {
        // As many as the engine takes: it need not wait for a prompt while there is one.
        while under_way.len() < UNDER_WAY
            && let Some(index) = left.next()
        {
            under_way.push_back(submit(index, &questions[index], engine, speaker)?);
        }
        let Some(asked) = under_way.pop_front() else { break };
        let question = &questions[asked.index];
        let prediction = conclude(asked, question, databases, speaker)
            .with_context(|| format!("question {}: `{}`", predictions.len() + 1, question.question))?;
        keep(&prediction)?;
        predictions.push(prediction);
        let correct = predictions.iter().filter(|one| one.verdict == Verdict::Correct).count();
        bar.set_message(format!("{correct} correct"));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(predictions)
}

/// Questions in the engine at once; its queue must hold as many.
pub const UNDER_WAY: usize = 8;

fn submit(index: usize, question: &Question, engine: &EngineHandle, speaker: &Speaker<'_>) -> Result<Asked> {
    let prompt = (speaker.prompt)(question)
        .with_context(|| format!("cannot build the prompt of record {}", index + 1))?;
    let request = Request {
        prompt,
        max_tokens: speaker.max_tokens,
        sampling: Sampling::GREEDY,
        stop_token_ids: speaker.stop_token_ids.clone(),
    };
    let prompt_tokens = request.prompt.len();
    match engine.submit(request) {
        Err(error @ (SubmitError::Stopped | SubmitError::Overloaded { .. } | SubmitError::Invalid(_))) => {
            Err(error).with_context(|| format!("cannot ask the question of record {}", index + 1))
        }
        answer => Ok(Asked { index, prompt_tokens, answer }),
    }
}

fn conclude(
    asked: Asked,
    question: &Question,
    databases: &mut Databases,
    speaker: &Speaker<'_>,
) -> Result<Prediction> {
    let Asked { index, prompt_tokens, answer } = asked;
    let mut prediction = Prediction {
        record: index + 1,
        db_id: question.db_id.clone(),
        question: question.question.clone(),
        gold: question.query.clone(),
        answer: String::new(),
        predicted: String::new(),
        verdict: Verdict::NotAsked,
        error: None,
        prompt_tokens,
        completion_tokens: 0,
        finished: false,
    };
    match answer {
        Err(error) => prediction.error = Some(error.to_string()),
        Ok(stream) => {
            let generation: Generation = stream.wait()?;
            prediction.answer = (speaker.decode)(&generation.ids())?;
            prediction.predicted = sql::extract(&prediction.answer);
            prediction.completion_tokens = generation.finished.usage.completion_tokens;
            prediction.finished = generation.finished.reason == FinishReason::Stop;
            (prediction.verdict, prediction.error) =
                judge(databases, &question.db_id, &question.query, &prediction.predicted)?;
        }
    }
    Ok(prediction)
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
    }
}
