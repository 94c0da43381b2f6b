//! `granite runs`: what was trained, where it stands, and how two runs differ.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Error, Result};
use serde::Serialize;
use serde_json::Value;

use crate::checkpoint::run::{RUNS, RunFolder, Validations};
use crate::cli::{RunsArgs, RunsCommand};
use crate::error::{render, user_error};
use crate::metrics::event::Event;
use crate::metrics::jsonl;
use crate::progress;
use crate::recipe::{Recipe, TrainSpec};
use crate::stdout;

/// Shown in place of a key: that there is one may be told, which one may not.
const HIDDEN: &str = "(set)";

/// Runs the subcommand: findings on stdout.
///
/// # Errors
/// When a folder holds no run, or a file of a run to show or to compare is damaged.
pub fn run(args: &RunsArgs) -> Result<()> {
    match &args.command {
        RunsCommand::List { folder } => {
            let found = list(folder.as_deref())?;
            if args.json { stdout::json(&found) } else { stdout::text(&table(&found)) }
        }
        RunsCommand::Show { run } => {
            let (found, recipe) = read(run)?;
            if args.json {
                stdout::json(&Shown { run: &found, recipe: &recipe })
            } else {
                stdout::text(&told(&found, &recipe))
            }
        }
        RunsCommand::Compare { runs } => {
            let read = runs.iter().map(|run| read(run)).collect::<Result<Vec<_>>>()?;
            let compared = compared(read);
            if args.json { stdout::json(&compared) } else { stdout::text(&beside(&compared)) }
        }
    }
}

/// A run in numbers.
#[derive(Debug, Clone, Serialize)]
struct RunReport {
    name: String,
    /// As text: JSON has no other names, and a folder may have any.
    folder: String,
    /// `training`: a process holds its lock; `finished`: all its steps are taken, or it ended early for want of a
    /// smaller loss; else `stopped`.
    state: &'static str,
    base: String,
    dataset: String,
    steps: u64,
    epochs: f64,
    tokens: i64,
    hours: f64,
    tokens_per_second: f64,
    /// Of the last step.
    train_loss: Option<f64>,
    /// Step and loss of validations: the first, the least of those after a step, the last.
    first_validation: Option<(u64, f64)>,
    best_validation: Option<(u64, f64)>,
    last_validation: Option<(u64, f64)>,
    checkpoints: Vec<u64>,
}

/// A run that cannot be read.
#[derive(Debug, Serialize)]
struct DamagedRun {
    name: String,
    folder: String,
    /// `damaged`.
    state: &'static str,
    /// What is wrong.
    error: String,
}

/// A row of the list.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Listed {
    Whole(RunReport),
    Damaged(DamagedRun),
}

#[derive(Debug, Serialize)]
struct Shown<'a> {
    run: &'a RunReport,
    recipe: &'a Recipe,
}

/// Several runs: their numbers, and what their recipes do not agree in.
#[derive(Debug, Serialize)]
struct Compared {
    runs: Vec<RunReport>,
    /// By key of the recipe, a value a run; `null` where it is not set.
    differences: BTreeMap<String, Vec<Value>>,
}

/// The runs of the folder given, or of the usual one, by name.
fn list(given: Option<&Path>) -> Result<Vec<Listed>> {
    let folder = given.unwrap_or(Path::new(RUNS));
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return nothing(given),
        other => other.with_context(|| format!("cannot read folder `{}`", folder.display()))?,
    };
    let mut folders = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if RunFolder::at(&path).is_begun() {
            folders.push(path);
        }
    }
    folders.sort();
    Ok(folders.iter().map(|path| listed(path)).collect())
}

/// What a folder that is not there holds: the usual one is made by the first training, one that was named is a slip.
fn nothing(given: Option<&Path>) -> Result<Vec<Listed>> {
    given.map_or_else(
        || Ok(Vec::new()),
        |folder| {
            Err(user_error(
                format!("there is no folder `{}`", folder.display()),
                format!("name the folder that holds the runs, or none for `{RUNS}`"),
            ))
        },
    )
}

/// A run's row: one that is damaged must not hide the others.
fn listed(path: &Path) -> Listed {
    match read(path) {
        Ok((found, _)) => Listed::Whole(found),
        Err(error) => {
            let (name, error) = (name_of(path), reason(&error));
            progress::note(format!("run `{name}` is damaged: {error}"));
            Listed::Damaged(DamagedRun { name, folder: path.display().to_string(), state: "damaged", error })
        }
    }
}

/// An error as the program tells it, to stand in a sentence.
fn reason(error: &Error) -> String {
    let told = render(error);
    told.strip_prefix("error: ").unwrap_or(&told).trim_end().to_string()
}

fn name_of(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// The run in a folder, or of a name among the usual ones.
fn read(run: &Path) -> Result<(RunReport, Recipe)> {
    let usual = Path::new(RUNS).join(run);
    let path = if RunFolder::at(run).is_begun() { run } else { usual.as_path() };
    let folder = RunFolder::at(path);
    if !folder.is_begun() {
        return Err(user_error(
            format!("there is no run `{}`: neither such a folder nor a name in `{RUNS}`", run.display()),
            "`granite runs list` tells their names",
        ));
    }
    let mut recipe = folder.recipe()?;
    // Here and not where it is shown, so that no way of showing a recipe can forget it.
    recipe.serve.api_key = recipe.serve.api_key.map(|_| HIDDEN.to_string());
    let events = jsonl::read(&folder.metrics())?;
    Ok((report(&folder, &recipe, &events)?, recipe))
}

fn report(folder: &RunFolder, recipe: &Recipe, events: &[Event]) -> Result<RunReport> {
    let steps: Vec<_> = events
        .iter()
        .filter_map(|event| if let Event::Step(step) = event { Some(step) } else { None })
        .collect();
    let validations: Vec<(u64, f64)> = events
        .iter()
        .filter_map(|event| match event {
            Event::Validation { step, loss, .. } => Some((*step, *loss)),
            _ => None,
        })
        .collect();
    let counted = counted(&validations);
    let last = steps.last();
    let tokens = steps.iter().map(|step| step.tokens).sum();
    // Not `sum`: of no numbers it is -0.
    let seconds = steps.iter().fold(0.0, |sum, step| sum + step.seconds);
    let taken = last.map_or(0, |step| step.step);
    let epochs = last.map_or(0.0, |step| step.epoch);
    Ok(RunReport {
        name: name_of(folder.path()),
        folder: folder.path().display().to_string(),
        state: match (folder.is_locked(), is_over(&recipe.train, taken, epochs, counted)) {
            (true, _) => "training",
            (false, true) => "finished",
            (false, false) => "stopped",
        },
        base: recipe.model.base.clone(),
        dataset: recipe.data.dataset.display().to_string(),
        steps: taken,
        epochs,
        tokens,
        hours: seconds / 3600.0,
        tokens_per_second: if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 },
        train_loss: last.map(|step| step.loss),
        first_validation: validations.first().copied(),
        best_validation: counted.best,
        last_validation: validations.last().copied(),
        checkpoints: folder.checkpoints()?,
    })
}

/// How the validations went, as the training counts them: the one before the first step is compared with nothing.
fn counted(validations: &[(u64, f64)]) -> Validations {
    let mut counted = Validations::default();
    for (step, loss) in validations.iter().filter(|(step, _)| *step > 0) {
        counted.add(*step, *loss);
    }
    counted
}

/// Whether a training has nothing left to do: by its steps, or because its loss has not fallen for long enough.
fn is_over(train: &TrainSpec, taken: u64, epochs: f64, counted: Validations) -> bool {
    counted.ends(train.early_stopping_patience)
        || train.max_steps.map_or(epochs >= train.epochs, |all| taken >= all)
}

fn compared(read: Vec<(RunReport, Recipe)>) -> Compared {
    let (runs, recipes): (Vec<RunReport>, Vec<Recipe>) = read.into_iter().unzip();
    let flat: Vec<BTreeMap<String, Value>> = recipes
        .iter()
        .map(|recipe| {
            let mut keys = BTreeMap::new();
            flatten("", &serde_json::json!(recipe), &mut keys);
            keys
        })
        .collect();
    let mut differences = BTreeMap::new();
    for key in flat.iter().flat_map(BTreeMap::keys) {
        let values: Vec<Value> =
            flat.iter().map(|keys| keys.get(key).cloned().unwrap_or(Value::Null)).collect();
        if values.windows(2).any(|pair| pair[0] != pair[1]) {
            differences.insert(key.clone(), values);
        }
    }
    Compared { runs, differences }
}

/// Every value under its key: `train.lr`.
fn flatten(path: &str, value: &Value, into: &mut BTreeMap<String, Value>) {
    let Value::Object(fields) = value else {
        into.insert(path.to_string(), value.clone());
        return;
    };
    for (name, below) in fields {
        flatten(&if path.is_empty() { name.clone() } else { format!("{path}.{name}") }, below, into);
    }
}

/// One line a run.
fn table(runs: &[Listed]) -> String {
    if runs.is_empty() {
        return "no run".to_string();
    }
    let head =
        ["run", "state", "steps", "epochs", "train loss", "validation", "best", "tokens/s", "checkpoints"];
    let mut rows = vec![head.map(String::from)];
    rows.extend(runs.iter().map(|run| match run {
        Listed::Whole(run) => row(run),
        Listed::Damaged(run) => {
            [run.name.as_str(), run.state, "-", "-", "-", "-", "-", "-", "-"].map(String::from)
        }
    }));
    aligned(&rows)
}

fn row(run: &RunReport) -> [String; 9] {
    [
        run.name.clone(),
        run.state.to_string(),
        run.steps.to_string(),
        format!("{:.2}", run.epochs),
        number(run.train_loss),
        number(run.last_validation.map(|(_, loss)| loss)),
        at_step(run.best_validation),
        format!("{:.0}", run.tokens_per_second),
        run.checkpoints.len().to_string(),
    ]
}

fn told(run: &RunReport, recipe: &Recipe) -> String {
    let mut rows: Vec<[String; 2]> =
        figures(run).into_iter().map(|(name, value)| [name.to_string(), value]).collect();
    rows.insert(1, ["folder".to_string(), run.folder.clone()]);
    let mut text = aligned(&rows);
    // A recipe that was read can be written.
    let _ = write!(text, "\n{}", toml::to_string(recipe).unwrap_or_default());
    text
}

/// Runs side by side, a column each, and below what their recipes differ in.
fn beside(compared: &Compared) -> String {
    let columns: Vec<Vec<(&str, String)>> = compared.runs.iter().map(figures).collect();
    let mut rows: Vec<Vec<String>> = Vec::new();
    for (index, (name, _)) in columns.first().into_iter().flatten().enumerate() {
        let values = columns.iter().filter_map(|column| column.get(index)).map(|(_, value)| value.clone());
        rows.push(std::iter::once((*name).to_string()).chain(values).collect());
    }
    for (key, values) in &compared.differences {
        rows.push(std::iter::once(key.clone()).chain(values.iter().map(Value::to_string)).collect());
    }
    aligned(&rows)
}

fn figures(run: &RunReport) -> Vec<(&'static str, String)> {
    let checkpoints: Vec<String> = run.checkpoints.iter().map(u64::to_string).collect();
    vec![
        ("run", run.name.clone()),
        ("state", run.state.to_string()),
        ("base", run.base.clone()),
        ("dataset", run.dataset.clone()),
        ("steps", run.steps.to_string()),
        ("epochs", format!("{:.2}", run.epochs)),
        ("tokens", run.tokens.to_string()),
        ("tokens/s", format!("{:.0}", run.tokens_per_second)),
        ("hours of steps", format!("{:.2}", run.hours)),
        ("train loss", number(run.train_loss)),
        ("first validation", at_step(run.first_validation)),
        ("best validation", at_step(run.best_validation)),
        ("last validation", at_step(run.last_validation)),
        ("checkpoints", if checkpoints.is_empty() { "-".to_string() } else { checkpoints.join(", ") }),
    ]
}

fn number(loss: Option<f64>) -> String {
    loss.map_or_else(|| "-".to_string(), |loss| format!("{loss:.4}"))
}

fn at_step(validation: Option<(u64, f64)>) -> String {
    validation.map_or_else(|| "-".to_string(), |(step, loss)| format!("{loss:.4} at {step}"))
}

/// Columns as wide as what stands in them.
fn aligned(rows: &[impl AsRef<[String]>]) -> String {
    let columns = rows.iter().map(|row| row.as_ref().len()).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.as_ref().get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.as_ref().iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}
