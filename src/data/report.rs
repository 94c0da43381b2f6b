//! `prepare_report.html`: what became of every source's records, with the texts to judge it by.

use std::fmt::Write as _;

use super::manifest::{Manifest, SourceReport};
use super::screen::Finding;
use super::store::Lineage;
use crate::page::{document, escape};

/// Findings of one source and reason that the page shows; `screened.jsonl` has all.
const FINDINGS: usize = 50;
/// Records of shortened examples that the page names.
const RECORDS: usize = 20;

/// What the page needs beside the style of all pages.
const STYLE: &str = "<style>
.pair { table-layout: fixed; width: 100%; } .pair td, .pair th { vertical-align: top; padding: .2rem 1rem .2rem 0; overflow-wrap: anywhere; }
.pair td { white-space: pre-wrap; } .pair th:first-child { width: 5.5rem; }
summary { cursor: pointer; margin: .3rem 0; }
</style>
";

/// The page; a function of the dataset alone, so that it repeats byte for byte.
pub fn page(manifest: &Manifest, findings: &[Finding], examples: &[Lineage]) -> String {
    let mut body = STYLE.to_string();
    // Writing to a string cannot fail.
    let _ = writeln!(
        body,
        "<p>Prepared for {} in rows of {} tokens: {} rows to train on ({:.1} % full), {} held out ({:.1} % full).</p>",
        escape(&manifest.model),
        manifest.sequence_length,
        manifest.train.rows,
        100.0 * manifest.train.packing_efficiency,
        manifest.validation.rows,
        100.0 * manifest.validation.packing_efficiency,
    );
    body += &sources(&manifest.sources);
    body += &left_out(&manifest.sources);
    body += &mask(&manifest.sources);
    for (reason, title) in [
        ("contaminated", "Found in an evaluation set"),
        ("near_duplicate", "Near duplicates"),
        ("duplicate", "Duplicates"),
    ] {
        body += &found(title, &manifest.sources, findings, reason);
    }
    body += &cleaned(&manifest.sources);
    body += &shortened(&manifest.sources, examples);
    let _ = writeln!(body, "<p><small>{}</small></p>", escape(&manifest.program));
    document("Prepared dataset", &body)
}

fn table(caption: &str, header: &[&str], rows: &[Vec<String>]) -> String {
    let mut text = format!("<table class=\"numbers\">\n<caption>{}</caption>\n<tr>", escape(caption));
    for name in header {
        let _ = write!(text, "<th>{}</th>", escape(name));
    }
    text += "</tr>\n";
    for row in rows {
        let cells: String = row.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect();
        let _ = writeln!(text, "<tr>{cells}</tr>");
    }
    text + "</table>\n"
}

fn sources(sources: &[SourceReport]) -> String {
    let rows: Vec<Vec<String>> = sources
        .iter()
        .map(|source| {
            vec![
                source.name.clone(),
                source.read.to_string(),
                source.taken.to_string(),
                source.validation.examples.to_string(),
                (source.train.tokens + source.validation.tokens).to_string(),
                source.licence.clone(),
            ]
        })
        .collect();
    table("Sources", &["source", "read", "taken", "held out", "tokens", "licence"], &rows)
}

fn left_out(sources: &[SourceReport]) -> String {
    let mut rows = Vec::new();
    for source in sources {
        let share = |count: usize| format!("{:.2} %", 100.0 * count as f64 / source.read.max(1) as f64);
        let row =
            |what: String, count: usize| vec![source.name.clone(), what, count.to_string(), share(count)];
        rows.extend(source.dropped.iter().map(|(reason, count)| row(spoken(reason), *count)));
        rows.extend(
            source.kept.iter().map(|(reason, count)| row(format!("{}, kept", spoken(reason)), *count)),
        );
        if source.not_sampled > 0 {
            rows.push(row("not sampled".to_string(), source.not_sampled));
        }
    }
    table("Left out", &["source", "why", "records", "of its records"], &rows)
}

fn spoken(reason: &str) -> String {
    reason.replace('_', " ")
}

fn mask(sources: &[SourceReport]) -> String {
    let rows: Vec<Vec<String>> = sources
        .iter()
        .map(|source| {
            vec![
                source.name.clone(),
                format!("{:.1} %", 100.0 * source.supervised_share),
                source.audit.responses.to_string(),
                source.audit.supervised_ends.to_string(),
            ]
        })
        .collect();
    table("Mask", &["source", "tokens supervised", "responses", "with a supervised end"], &rows)
}

/// Findings of a reason, source by source.
fn found(title: &str, sources: &[SourceReport], findings: &[Finding], reason: &str) -> String {
    let mut text = String::new();
    for source in sources {
        let of_source: Vec<&Finding> =
            findings.iter().filter(|one| one.source == source.name && one.reason == reason).collect();
        if of_source.is_empty() {
            continue;
        }
        let _ = writeln!(text, "<h3>{}: {}</h3>", escape(&source.name), of_source.len());
        if of_source.len() > FINDINGS {
            let _ = writeln!(text, "<p>The first {FINDINGS}; <code>screened.jsonl</code> has all.</p>");
        }
        text.extend(of_source.iter().take(FINDINGS).map(|finding| pair(finding)));
    }
    if text.is_empty() { text } else { format!("<h2>{}</h2>\n{text}", escape(title)) }
}

fn pair(finding: &Finding) -> String {
    let Finding { record, of, question, response, .. } = finding;
    format!(
        "<details><summary>record {record}: {why}{kept}: {begin}</summary>\n<table class=\"pair\">\n\
         <tr><th></th><th>{first} {first_record}</th><th>{source} {record}</th></tr>\n\
         <tr><th>question</th><td>{}</td><td>{}</td></tr>\n\
         <tr><th>response</th><td>{}</td><td>{}</td></tr>\n</table>\n</details>\n",
        escape(&of.question),
        escape(question),
        escape(&of.response),
        escape(response),
        why = escape(&finding.why),
        kept = if finding.kept { ", kept" } else { "" },
        begin = escape(&question.chars().take(80).collect::<String>()),
        first = escape(&of.source),
        first_record = escape(&of.record),
        source = escape(&finding.source),
    )
}

fn cleaned(sources: &[SourceReport]) -> String {
    let mut rows = Vec::new();
    for SourceReport { name, cleaned, .. } in sources.iter().filter(|source| source.cleaned.examples > 0) {
        rows.push(vec![
            name.clone(),
            cleaned.examples.to_string(),
            cleaned.byte_order_marks.to_string(),
            cleaned.zero_width.to_string(),
            cleaned.control.to_string(),
        ]);
    }
    if rows.is_empty() {
        return String::new();
    }
    let header = ["source", "examples", "byte order marks", "zero-width", "control"];
    let mut text = table("Cleaned: characters removed", &header, &rows);
    for SourceReport { name, cleaned, .. } in sources {
        for shown in &cleaned.shown {
            let (name, place) = (escape(name), escape(&shown.text));
            let _ = writeln!(text, "<p>{name} {}: <code>{place}</code></p>", shown.record);
        }
    }
    text
}

fn shortened(sources: &[SourceReport], examples: &[Lineage]) -> String {
    let mut rows = Vec::new();
    for (at, source) in sources.iter().enumerate().filter(|(_, source)| source.shortened > 0) {
        let of_source = examples.iter().filter(|one| usize::from(one.source) == at && one.shortened);
        let mut records: Vec<String> = of_source.take(RECORDS).map(|one| one.record.to_string()).collect();
        if source.shortened > RECORDS {
            records.push("…".to_string());
        }
        rows.push(vec![source.name.clone(), source.shortened.to_string(), records.join(" ")]);
    }
    if rows.is_empty() {
        String::new()
    } else {
        table("Lost context to fit", &["source", "examples", "records"], &rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::screen::Origin;

    #[test]
    fn both_texts_of_a_pair_are_shown_and_cannot_break_the_page() {
        let finding = Finding {
            source: "s".to_string(),
            record: 7,
            reason: "near_duplicate".to_string(),
            kept: true,
            why: "question 0.90, response 1.00".to_string(),
            question: "Is <b> a tag?".to_string(),
            response: "yes & no".to_string(),
            of: Origin {
                source: "t".to_string(),
                record: "3".to_string(),
                question: "is </table> one?".to_string(),
                response: "no & yes".to_string(),
            },
        };
        let text = pair(&finding);
        for part in [
            "Is &lt;b&gt; a tag?",
            "is &lt;/table&gt; one?",
            "yes &amp; no",
            "no &amp; yes",
            "s 7",
            "t 3",
            "0.90",
            ", kept",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(text.matches("</table>").count(), 1);
        assert_eq!(found("x", &[], &[finding], "duplicate"), "");
    }
}
