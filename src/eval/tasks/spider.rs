//! Spider: execution accuracy of generated SQL on the real databases (Yu et al. 2018, Zhong et al. 2020).
//!
//! Prediction and gold are executed, read-only, and their results compared. As in the official test-suite
//! evaluation, `DISTINCT` is taken out of both, columns may be permuted, the order of rows counts only where the
//! gold query has an `ORDER BY`, and a prediction must agree on every SQLite file of the database's folder: one in
//! the plain release, many in the distilled suite. The gold query's values are never lent to the prediction.
//! Databases without a row answer every query alike and are left out, counted.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::data::example::{Message, Role};
use crate::data::reader::read_records;
use crate::data::source::spider::Schemas;
use crate::error::{is_missing_file, user_error, with_hint};
use crate::eval::database::{Database, QueryError, QueryLimits};
use crate::eval::hardness::Hardness;
use crate::eval::result_set::same_answer;
use crate::eval::sql;
use crate::eval::task::{Judgement, Prompt, Question as Asked, Task, Verdict, spread};
use crate::recipe::SpiderEvalSpec;

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
    /// The files of its folder that hold rows.
    Usable(Vec<Database>),
}

impl Databases {
    /// A folder of `<db_id>/*.sqlite`.
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
        let files = self.files(db_id)?;
        if files.is_empty() {
            return Ok(Presence::Missing);
        }
        let mut usable = Vec::new();
        for path in files {
            let database = Database::open(&path, self.limits)?;
            let has_rows =
                database.has_rows().with_context(|| format!("cannot read database `{}`", path.display()))?;
            usable.extend(has_rows.then_some(database));
        }
        Ok(if usable.is_empty() { Presence::Empty } else { Presence::Usable(usable) })
    }

    /// The files of a database, by name.
    fn files(&self, db_id: &str) -> Result<Vec<PathBuf>> {
        sqlite_files(&self.folder.join(db_id))
    }

    fn usable(&mut self, db_id: &str) -> Result<&[Database]> {
        match self.find(db_id)? {
            Presence::Usable(databases) => Ok(databases),
            Presence::Missing | Presence::Empty => anyhow::bail!("database `{db_id}` cannot be used"),
        }
    }
}

/// The SQLite files of a folder, by name; none where there is no folder.
fn sqlite_files(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let in_folder = || format!("cannot read folder `{}`", folder.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(in_folder)? {
        let path = entry.with_context(in_folder)?.path();
        if path.is_file() && path.extension().is_some_and(|end| end == "sqlite") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
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
    let ordered = sql::orders_rows(gold);
    let (gold, predicted) = (sql::as_evaluated(gold), sql::as_evaluated(predicted));
    let mut verdict = (Verdict::Correct, None);
    for database in databases.usable(db_id)? {
        verdict = compare(database, &gold, &predicted, ordered);
        if verdict.0 != Verdict::Correct {
            break;
        }
    }
    Ok(verdict)
}

fn compare(database: &Database, gold: &str, predicted: &str, ordered: bool) -> (Verdict, Option<String>) {
    let told = |error: QueryError| Some(error.to_string());
    match (database.query(gold), database.query(predicted)) {
        (Err(error), _) => (Verdict::GoldFailed, told(error)),
        (Ok(_), Err(error)) => (Verdict::Failed, told(error)),
        (Ok(expected), Ok(found)) if same_answer(&expected, &found, ordered) => (Verdict::Correct, None),
        _ => (Verdict::Wrong, None),
    }
}

/// The task.
#[derive(Debug)]
pub struct Spider {
    questions: Vec<Question>,
    selection: Selection,
    databases: Databases,
    schemas: Schemas,
    max_tokens: usize,
}

impl Spider {
    /// Reads questions and schemas, and finds the databases.
    ///
    /// # Errors
    /// When a file is missing or damaged, or no question can be asked.
    pub fn open(spec: &SpiderEvalSpec, limit: Option<usize>) -> Result<Self> {
        let schemas = Schemas::read(&spec.tables)?;
        let questions = read_questions(&spec.path)?;
        let mut databases = Databases::new(&spec.databases, QueryLimits::default());
        let selection = select(&questions, &mut databases, limit.or(spec.limit))?;
        Ok(Self { questions, selection, databases, schemas, max_tokens: spec.max_tokens })
    }

    fn asked(&self, at: usize) -> (usize, &Question) {
        let index = self.selection.asked[at];
        (index, &self.questions[index])
    }
}

impl Task for Spider {
    fn name(&self) -> &'static str {
        "spider"
    }

    fn measures(&self) -> &'static [&'static str] {
        &["execution_accuracy"]
    }

    fn len(&self) -> usize {
        self.selection.asked.len()
    }

    fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    fn question(&self, at: usize) -> Result<Asked> {
        let (index, Question { db_id, question, query }) = self.asked(at);
        let prompt = self.schemas.prompt(db_id, question)?;
        Ok(Asked {
            id: (index + 1).to_string(),
            group: Hardness::of(query).to_string(),
            prompt: Prompt::Chat(vec![Message::new(Role::User, prompt)]),
            text: format!("{db_id}: {question}"),
            reference: query.clone(),
        })
    }

    fn judge(&mut self, at: usize, answer: &str) -> Result<Judgement> {
        let extracted = sql::extract(answer);
        let index = self.selection.asked[at];
        let Question { db_id, query, .. } = &self.questions[index];
        let (verdict, error) = judge(&mut self.databases, db_id, query, &extracted)?;
        let scores = vec![f64::from(u8::from(verdict == Verdict::Correct))];
        Ok(Judgement { extracted, verdict, error, scores })
    }

    fn files(&self) -> Result<Vec<PathBuf>> {
        let asked = self.selection.asked.iter().filter_map(|at| self.questions.get(*at));
        let used: BTreeSet<&str> = asked.map(|question| question.db_id.as_str()).collect();
        let files = used.iter().map(|db_id| self.databases.files(db_id));
        Ok(files.collect::<Result<Vec<_>>>()?.concat())
    }

    fn left_out(&self) -> BTreeMap<String, usize> {
        let Selection { asked, without_rows, without_database } = &self.selection;
        let beyond = self.questions.len() - asked.len() - without_rows - without_database;
        [
            ("databases without rows", *without_rows),
            ("databases that are not there", *without_database),
            ("beyond the limit", beyond),
        ]
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(reason, count)| (reason.to_string(), count))
        .collect()
    }
}
