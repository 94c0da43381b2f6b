//! `report.json` for programs and `report.html` for people: one page without anything from elsewhere.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::comparison::{Comparison, LossOf, LossSummary, TaskSummary};
use super::statistics::{Interval, Test};
use super::task::{Answered, Verdict};
use crate::output;
use crate::page::interval::{Span, spans};
use crate::page::{document, escape};

/// The format that this program writes.
pub const FORMAT_VERSION: u32 = 2;

/// Answers of a task that the page shows; all of them are in the results' files.
const SHOWN: usize = 20;
/// Characters of a reference in the list of answers.
const FORETASTE: usize = 90;
/// Characters of a text that the page shows.
const SHOWN_LETTERS: usize = 1500;

/// What was measured, of which models, on which data.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// See [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Name and version of the program.
    pub program: String,
    /// Name of the recipe.
    pub recipe: String,
    /// The dataset whose validation rows were measured; absent where only answers were judged.
    pub dataset: Option<String>,
    /// Chooses the resamples.
    pub seed: u64,
    /// Resamples of an interval.
    pub resamples: usize,
    /// What an interval covers.
    pub confidence: f64,
    /// The models, in the order in which they were named.
    pub models: Vec<ModelReport>,
    /// Models side by side.
    pub comparisons: Vec<Comparison>,
}

/// What was measured of a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelReport {
    /// As it was asked for: `base`, `adapter`, `merged`, or a folder of weights or of answers.
    pub name: String,
    /// How it calls itself: `adapter step-000500`; `given answers` where it is known by its answers alone.
    pub label: String,
    /// Where its base weights, or its answers, were read.
    pub path: String,
    /// Names the content of the base weights; absent where there are none.
    pub base_hash: Option<String>,
    /// The folder of its results, one JSON object a line, below the report's.
    pub results: String,
    /// Losses; absent when no row is held out.
    pub losses: Option<LossSummary>,
    /// Scores by task.
    pub tasks: Vec<TaskSummary>,
}

/// Answers that the page shows: a task, and what each model said.
#[derive(Debug, Clone, PartialEq)]
pub struct Shown<'a> {
    /// The task.
    pub task: &'a str,
    /// The answers of each model, in the order of the report's.
    pub answers: Vec<&'a [Answered]>,
}

/// Writes both files into a folder, each whole or not at all.
///
/// # Errors
/// When a file cannot be written.
pub fn write(folder: &Path, report: &Report, shown: &[Shown<'_>]) -> Result<()> {
    let mut json = serde_json::to_vec_pretty(report)?;
    json.push(b'\n');
    output::write_file(&folder.join("report.json"), &json)?;
    output::write_file(&folder.join("report.html"), html(report, shown).as_bytes())
}

/// The report as a page.
pub fn html(report: &Report, shown: &[Shown<'_>]) -> String {
    let names: Vec<&str> = report.models.iter().map(|model| model.name.as_str()).collect();
    let mut body = score_table(report) + &score_chart(report) + &group_tables(report);
    body += &loss_table(report);
    body += &loss_chart(report);
    body += &comparison_table(&report.comparisons);
    body += &verdict_table(report);
    for one in shown {
        body += &examples(one, &names);
    }
    body += &method(report);
    document(&format!("{} · {}", report.recipe, names.join(", ")), &body)
}

fn with_ends(interval: Option<Interval>) -> String {
    let Some(Interval { estimate, low, high }) = interval else { return "–".to_string() };
    format!("{estimate:.3} <small>({low:.3} – {high:.3})</small>")
}

fn header(first: &str, report: &Report) -> String {
    let names = report.models.iter().map(|model| format!("<th>{}</th>", escape(&model.name)));
    format!("<tr><th>{first}</th>{}</tr>\n", names.collect::<String>())
}

fn row(name: &str, cells: impl Iterator<Item = String>) -> String {
    let cells: String = cells.map(|cell| format!("<td>{cell}</td>")).collect();
    format!("<tr><td>{name}</td>{cells}</tr>\n")
}

fn table(caption: &str, rows: &str) -> String {
    if rows.is_empty() {
        return String::new();
    }
    format!("<table class=\"numbers\"><caption>{caption}</caption>\n{rows}</table>\n")
}

/// The tasks of the report with their measures, as the first model that has them lists them.
fn measures(report: &Report) -> Vec<(&str, &'static str)> {
    let mut found = Vec::new();
    for task in report.models.iter().flat_map(|model| &model.tasks) {
        for measure in &task.measures {
            if !found.contains(&(task.name.as_str(), measure.name)) {
                found.push((task.name.as_str(), measure.name));
            }
        }
    }
    found
}

fn score(tasks: &[TaskSummary], task: &str, measure: &str) -> Option<Interval> {
    let task = tasks.iter().find(|one| one.name == task)?;
    task.measures.iter().find(|one| one.name == measure)?.score
}

fn score_table(report: &Report) -> String {
    let mut rows = String::new();
    for (task, measure) in measures(report) {
        let scored = report.models.iter().flat_map(|model| &model.tasks).find(|one| one.name == task);
        let name =
            format!("{task} <small>{measure}, {} questions</small>", scored.map_or(0, |one| one.scored));
        rows += &row(&name, report.models.iter().map(|model| with_ends(score(&model.tasks, task, measure))));
    }
    if rows.is_empty() { rows } else { table("Scores", &(header("task", report) + &rows)) }
}

fn span(interval: Interval) -> Span {
    Span { estimate: interval.estimate, low: interval.low, high: interval.high }
}

fn series(report: &Report) -> Vec<String> {
    report.models.iter().map(|model| model.name.clone()).collect()
}

fn score_chart(report: &Report) -> String {
    let rows: Vec<(String, Vec<Option<Span>>)> = measures(report)
        .into_iter()
        .map(|(task, measure)| {
            let of = report.models.iter().map(|model| score(&model.tasks, task, measure).map(span));
            (format!("{task} {measure}"), of.collect())
        })
        .collect();
    spans("Scores with their intervals", "score", &series(report), &rows)
}

fn group_tables(report: &Report) -> String {
    let mut tables = String::new();
    for (name, measure) in measures(report) {
        let tasks: Vec<Option<&TaskSummary>> =
            report.models.iter().map(|model| model.tasks.iter().find(|one| one.name == name)).collect();
        // A single part is the whole, which the scores have said.
        let Some(groups) = tasks.iter().flatten().map(|task| &task.groups).find(|groups| groups.len() > 1)
        else {
            continue;
        };
        let mut rows = String::new();
        for group in groups {
            let cells = tasks.iter().map(|task| {
                let found = task.and_then(|task| task.groups.iter().find(|one| one.name == group.name));
                let of = found.and_then(|found| found.measures.iter().find(|one| one.name == measure));
                with_ends(of.and_then(|of| of.score))
            });
            let label = format!("{} <small>{} questions</small>", escape(&group.name), group.scored);
            rows += &row(&label, cells);
        }
        tables += &table(&format!("{name}: {measure} by part"), &(header("part", report) + &rows));
    }
    tables
}

/// The losses of each source, and of all, for each model.
fn loss_rows(report: &Report) -> Vec<(&str, Vec<Option<&LossOf>>)> {
    let first = report.models.iter().find_map(|model| model.losses.as_ref());
    let names = first.into_iter().flat_map(parts).map(|part| part.name.as_str());
    let row = |name| report.models.iter().map(|model| loss_named(model, name)).collect();
    names.map(|name| (name, row(name))).collect()
}

fn loss_named<'a>(model: &'a ModelReport, name: &str) -> Option<&'a LossOf> {
    parts(model.losses.as_ref()?).find(|part| part.name == name)
}

fn parts(losses: &LossSummary) -> impl Iterator<Item = &LossOf> {
    losses.sources.iter().chain([&losses.overall])
}

fn loss_table(report: &Report) -> String {
    let mut rows = String::new();
    for (name, losses) in loss_rows(report) {
        let Some(first) = losses.iter().flatten().next() else { continue };
        let label =
            format!("{} <small>{} tokens, {} sequences</small>", escape(name), first.tokens, first.sequences);
        rows += &row(&label, losses.iter().map(|loss| with_ends(loss.map(|one| one.loss))));
        let perplexity =
            |loss: &Option<&LossOf>| loss.map_or("–".to_string(), |one| format!("{:.3}", one.perplexity));
        rows += &row("<small>perplexity</small>", losses.iter().map(perplexity));
    }
    if rows.is_empty() {
        return rows;
    }
    table("Losses of held-out rows, in nats a token", &(header("source", report) + &rows))
}

fn loss_chart(report: &Report) -> String {
    let rows: Vec<(String, Vec<Option<Span>>)> = loss_rows(report)
        .into_iter()
        .map(|(name, losses)| {
            (name.to_string(), losses.iter().map(|loss| loss.map(|one| span(one.loss))).collect())
        })
        .collect();
    spans("Losses with their intervals", "nats a token", &series(report), &rows)
}

fn comparison_table(comparisons: &[Comparison]) -> String {
    if comparisons.is_empty() {
        return String::new();
    }
    let mut rows = String::from(
        "<tr><th>second − first</th><th>difference</th><th>p</th><th>larger</th><th>smaller</th><th>examples</th></tr>\n",
    );
    for Comparison { first, second, of, measure, paired } in comparisons {
        let test = match paired.test {
            Test::McNemar => "McNemar",
            Test::PairedBootstrap => "bootstrap",
        };
        let Interval { estimate, low, high } = paired.difference;
        let name = format!("{} − {}: {of} {}", escape(second), escape(first), escape(measure));
        let cells = [
            format!("{estimate:+.4} <small>({low:+.4} – {high:+.4})</small>"),
            format!("{} <small>{test}</small>", p_value(paired.p_value)),
            paired.larger.to_string(),
            paired.smaller.to_string(),
            paired.examples.to_string(),
        ];
        rows += &row(&name, cells.into_iter());
    }
    table("Side by side, on the same examples", &rows)
}

/// Four places; what is smaller is not zero.
fn p_value(p: f64) -> String {
    if p < 1e-4 { "&lt; 0.0001".to_string() } else { format!("{p:.4}") }
}

fn verdict_table(report: &Report) -> String {
    let mut rows = String::new();
    for model in &report.models {
        for task in &model.tasks {
            let mut parts: Vec<String> = task
                .verdicts
                .iter()
                .map(|(name, count)| format!("{} {count}", name.replace('_', " ")))
                .collect();
            if task.cut > 0 {
                parts.push(format!("of these, cut at the limit {}", task.cut));
            }
            parts.extend(
                task.left_out
                    .iter()
                    .filter(|(_, count)| **count > 0)
                    .map(|(why, count)| format!("left out, {why}: {count}")),
            );
            let name = format!("{} {}", escape(&model.name), task.name);
            let _ = writeln!(rows, "<tr><td>{name}</td><td>{}</td></tr>", escape(&parts.join(" · ")));
        }
    }
    if rows.is_empty() {
        return rows;
    }
    format!("<table><caption>What became of the answers</caption>\n{rows}</table>\n")
}

/// The first few answers, to be read: the models' one under the other.
fn examples(shown: &Shown<'_>, names: &[&str]) -> String {
    let most = shown.answers.iter().map(|answers| answers.len()).max().unwrap_or(0);
    let mut html = format!("<h2>{}: the first {} answers</h2>\n", shown.task, most.min(SHOWN));
    for at in 0..most.min(SHOWN) {
        let Some(first) = shown.answers.iter().find_map(|answers| answers.get(at)) else { continue };
        let mut marks = String::new();
        let mut said = String::new();
        for (name, answers) in names.iter().zip(&shown.answers) {
            let Some(one) = answers.get(at) else { continue };
            marks.push_str(mark(one.verdict));
            let scores: Vec<String> =
                one.scores.iter().map(|(measure, score)| format!("{measure} {score:.2}")).collect();
            let _ = writeln!(
                said,
                "<p><b>{}</b> {} <small>{}{}</small></p><pre>{}</pre>",
                escape(name),
                mark(one.verdict),
                escape(&scores.join(", ")),
                one.error.as_ref().map(|error| format!(" · {}", escape(error))).unwrap_or_default(),
                clipped(&one.answer)
            );
        }
        let _ = write!(
            html,
            "<details><summary>{marks} {} <small>{}</small></summary>\n<p>asked</p><pre>{}</pre>\n<p>reference</p><pre>{}</pre>\n{said}</details>\n",
            escape(&first.id),
            escape(&foretaste(first)),
            clipped(&first.question),
            clipped(&first.reference)
        );
    }
    html
}

fn mark(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Correct => "✓",
        Verdict::Wrong => "✗",
        Verdict::Failed => "⚠",
        Verdict::NotAsked | Verdict::GoldFailed => "–",
    }
}

/// What tells a question from its neighbours in a list: its part, and how its reference begins.
fn foretaste(one: &Answered) -> String {
    let words: Vec<&str> = one.reference.split_whitespace().collect();
    let whole = words.join(" ");
    let short: String = whole.chars().take(FORETASTE).collect();
    let dots = if short.len() < whole.len() { "…" } else { "" };
    // Names of held-out examples begin with their part.
    let part = if one.id.starts_with(&one.group) { "" } else { one.group.as_str() };
    format!("{part} {short}{dots}")
}

fn clipped(text: &str) -> String {
    let short: String = text.chars().take(SHOWN_LETTERS).collect();
    let rest = text.chars().count().saturating_sub(SHOWN_LETTERS);
    escape(&if rest > 0 { format!("{short}\n… {rest} characters more") } else { short })
}

fn method(report: &Report) -> String {
    let mut models = String::new();
    for model in &report.models {
        let _ = write!(
            models,
            "<br><code>{}</code> is {}: <code>{}</code>, results in <code>{}</code>",
            escape(&model.name),
            escape(&model.label),
            escape(&model.path),
            escape(&model.results)
        );
    }
    let dataset = report.dataset.iter().map(|path| format!("dataset <code>{}</code>, ", escape(path)));
    let dataset: String = dataset.collect();
    format!(
        "<p><small>Intervals hold the middle {:.0} % of {} resamples of the examples (seed {}); where all scores are 0 \
         or all are 1 they are the exact bounds of Clopper and Pearson. p is the chance of a difference as large when \
         there is none; several of them on one page are not corrected for their number. Answers of models are greedy.\
         {models}<br>{dataset}{}</small></p>\n",
        100.0 * report.confidence,
        report.resamples,
        report.seed,
        escape(&report.program)
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn answered(text: &str) -> Answered {
        Answered {
            id: text.to_string(),
            group: text.to_string(),
            question: text.to_string(),
            reference: text.to_string(),
            answer: text.repeat(300),
            extracted: text.to_string(),
            verdict: Verdict::Wrong,
            scores: BTreeMap::from([("m".to_string(), 0.5)]),
            error: Some(text.to_string()),
            prompt_tokens: 1,
            completion_tokens: 1,
            finished: true,
        }
    }

    #[test]
    fn a_list_of_answers_tells_them_apart() {
        let mut one = answered("easy");
        one.reference = format!("SELECT  1\n{}", "x".repeat(200));
        one.id = "7".to_string();
        assert_eq!(foretaste(&one), format!("easy SELECT 1 {}…", "x".repeat(81)));
        (one.id, one.group, one.reference) =
            ("dolly#3".to_string(), "dolly".to_string(), "Paris".to_string());
        assert_eq!(foretaste(&one), " Paris");
    }

    #[test]
    fn nothing_that_is_said_can_break_the_page() {
        let bad = "<script>&\"";
        let model = ModelReport {
            name: bad.to_string(),
            label: bad.to_string(),
            path: bad.to_string(),
            base_hash: None,
            results: bad.to_string(),
            losses: None,
            tasks: Vec::new(),
        };
        let report = Report {
            format_version: FORMAT_VERSION,
            program: "granite".to_string(),
            recipe: bad.to_string(),
            dataset: Some(bad.to_string()),
            seed: 1,
            resamples: 1,
            confidence: 0.95,
            models: vec![model],
            comparisons: Vec::new(),
        };
        let answers = [answered(bad)];
        let page = html(&report, &[Shown { task: "t", answers: vec![&answers] }]);
        assert!(!page.contains("<script") && page.contains("&lt;script&gt;&amp;&quot;"));
        assert!(page.contains("characters more") && page.contains("✗"));
        assert!(!page.contains("src=") && !page.contains("href="), "the page needs nothing from elsewhere");
    }
}
