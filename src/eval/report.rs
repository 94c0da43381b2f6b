//! `report.json` for programs and `report.html` for people: one page without anything from elsewhere.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::tasks::spider::SpiderReport;
use crate::losses::{LossOf, LossReport};
use crate::page::{document, escape};

/// The format that this program writes.
pub const FORMAT_VERSION: u32 = 1;

/// What was measured, of which model, on which data.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// See [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Name and version of the program.
    pub program: String,
    /// Name of the recipe.
    pub recipe: String,
    /// `base`, `adapter`, `merged`, or a folder.
    pub model: String,
    /// Where the model was read.
    pub model_path: String,
    /// Names the content of the base weights.
    pub base_hash: String,
    /// The dataset whose validation rows were measured.
    pub dataset: String,
    /// Losses; absent when no row is held out.
    pub validation: Option<LossReport>,
    /// Spider's execution accuracy; absent when the recipe names no questions.
    pub spider: Option<SpiderReport>,
    /// How long it took.
    pub seconds: f64,
}

/// Writes both files into an existing folder.
///
/// # Errors
/// When a file cannot be written.
pub fn write(folder: &Path, report: &Report) -> Result<()> {
    let mut json = serde_json::to_vec_pretty(report)?;
    json.push(b'\n');
    for (name, contents) in [("report.json", json), ("report.html", html(report).into_bytes())] {
        let path = folder.join(name);
        std::fs::write(&path, contents).with_context(|| format!("cannot write `{}`", path.display()))?;
    }
    Ok(())
}

/// The report as a page.
pub fn html(report: &Report) -> String {
    let title = format!("{} · {}", report.recipe, report.model);
    let mut body = String::new();
    if let Some(losses) = &report.validation {
        body.push_str(&loss_table(losses));
    }
    if let Some(spider) = &report.spider {
        body.push_str(&spider_table(spider));
    }
    // Writing into a String cannot fail.
    let _ = writeln!(
        body,
        "<p><small>model <code>{}</code>, dataset <code>{}</code>, {}, {:.0} s</small></p>",
        escape(&report.model_path),
        escape(&report.dataset),
        escape(&report.program),
        report.seconds
    );
    document(&title, &body)
}

fn loss_table(losses: &LossReport) -> String {
    let mut table = String::from(
        "<table class=\"numbers\"><caption>Held-out rows</caption>\n\
         <tr><th>source</th><th>loss</th><th>perplexity</th><th>tokens</th><th>sequences</th></tr>\n",
    );
    for LossOf { name, loss, perplexity, tokens, sequences } in losses.sources.iter().chain([&losses.overall])
    {
        let _ = writeln!(
            table,
            "<tr><td>{}</td><td>{loss:.4}</td><td>{perplexity:.3}</td><td>{tokens}</td><td>{sequences}</td></tr>",
            escape(name)
        );
    }
    table.push_str("</table>\n");
    table
}

fn spider_table(spider: &SpiderReport) -> String {
    let rows = [
        ("execution accuracy", format!("{:.3}", spider.execution_accuracy)),
        ("correct", format!("{} of {}", spider.correct, spider.scored)),
        ("queries that ran", spider.executable.to_string()),
        ("answers cut at the limit", spider.cut.to_string()),
        ("questions too long for the context", spider.too_long.to_string()),
        ("gold queries that do not run, left out", spider.gold_failed.to_string()),
        ("questions on empty databases, left out", spider.without_rows.to_string()),
        ("questions without a database, left out", spider.without_database.to_string()),
        ("questions beyond the limit, left out", spider.beyond_limit.to_string()),
    ];
    let mut table = String::from("<table class=\"numbers\"><caption>Spider</caption>\n");
    for (name, value) in rows {
        let _ = writeln!(table, "<tr><td>{name}</td><td>{value}</td></tr>");
    }
    table.push_str("</table>\n");
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_break_the_page() {
        let report = Report {
            format_version: FORMAT_VERSION,
            program: "granite".to_string(),
            recipe: "<script>&\"".to_string(),
            model: "base".to_string(),
            model_path: "a<b".to_string(),
            base_hash: String::new(),
            dataset: String::new(),
            validation: None,
            spider: None,
            seconds: 0.0,
        };
        let page = html(&report);
        assert!(
            !page.contains("<script")
                && page.contains("&lt;script&gt;&amp;&quot;")
                && page.contains("a&lt;b")
        );
    }
}
