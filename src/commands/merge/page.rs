//! The merge report as a page.

use std::fmt::Write as _;

use super::report::{FormReport, Measured, MergeReport, Model};
use crate::checkpoint::merge::Step;
use crate::losses::divergence::Divergence;
use crate::page::{self, escape, heat};
use crate::recipe::Projection;

/// The whole page.
pub fn of(report: &MergeReport) -> String {
    let mut body = facts(report);
    for beyond in &report.beyond {
        // Writing to a string cannot fail.
        let _ = writeln!(body, "<p><strong>Refused:</strong> {}</p>", escape(beyond));
    }
    body += &match &report.measured {
        Some(measured) => comparison(measured),
        None => "<p>Nothing was measured: there were no held-out rows.</p>\n".to_string(),
    };
    if let Some(first) = report.forms.first() {
        let title = "Size of the update, relative to the weight's";
        body += &layers(title, &first.matrices, |step| step.update);
    }
    for FormReport { form, matrices, .. } in &report.forms {
        let title = format!("What storing as {} changes, relative to the weight's size", form.name());
        body += &layers(&title, matrices, |step| step.rounding);
    }
    page::document(&format!("Merge of {}", report.recipe), &body)
}

fn facts(report: &MergeReport) -> String {
    let mut table = String::from("<table>\n");
    let forms: Vec<String> = report
        .forms
        .iter()
        .map(|form| format!("{} ({:.1} MB)", form.form.name(), form.bytes as f64 / 1e6))
        .collect();
    let rows = [
        ("base", report.base.clone()),
        ("merged onto", format!("{} weights", report.merged_onto)),
        ("adapter", report.adapter.display().to_string()),
        ("rank, scale", format!("{}, {}", report.rank, report.scale)),
        ("forms", forms.join(", ")),
        ("program", report.program.clone()),
    ];
    for (name, value) in rows {
        let _ = writeln!(table, "<tr><th>{name}</th><td>{}</td></tr>", escape(&value));
    }
    table + "</table>\n"
}

fn comparison(measured: &Measured) -> String {
    let tokens = measured.models.first().map_or(0, |model| model.divergence.tokens);
    let mut table = format!(
        "<table class=\"numbers\">\n<caption>On {} held-out rows, {tokens} supervised tokens</caption>\n\
         <tr><th></th><th>loss</th><th>KL, mean</th><th>99 %</th><th>max</th><th>flipped</th></tr>\n",
        measured.rows
    );
    for Model { name, divergence } in &measured.models {
        let Divergence { loss, kl_mean, kl_p99, kl_max, flipped_share, .. } = divergence;
        let _ = writeln!(
            table,
            "<tr><th>{}</th><td>{loss:.4}</td><td>{kl_mean:.2e}</td><td>{kl_p99:.2e}</td><td>{kl_max:.2e}</td>\
             <td>{:.2} %</td></tr>",
            escape(name),
            flipped_share * 100.0
        );
    }
    table
        + "</table>\n<p>Loss and divergence in nats a token; the divergence is that of base + adapter from each model; \
           flipped are tokens whose most likely word is another than base + adapter's.</p>\n"
}

fn layers(title: &str, steps: &[Step], value: impl Fn(&Step) -> f64) -> String {
    let layers = steps.iter().map(|step| step.layer + 1).max().unwrap_or(0);
    let columns: Vec<String> = (0..layers).map(|layer| layer.to_string()).collect();
    let names = Projection::ALL.map(Projection::name);
    let row = |name: &str| {
        let mut row = vec![0.0; layers];
        for step in steps.iter().filter(|step| step.projection == name) {
            row[step.layer] = value(step);
        }
        row
    };
    let values: Vec<Vec<f64>> = names.iter().map(|name| row(name)).collect();
    heat::map(title, &names, &columns, &values)
}
