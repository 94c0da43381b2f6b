//! The merge report as a page.

use std::fmt::Write as _;

use super::report::{FormReport, Intervals, Measured, MergeReport, Model, REFERENCE};
use crate::checkpoint::merge::Step;
use crate::eval::statistics::{CONFIDENCE, Interval, RESAMPLES};
use crate::losses::divergence::Divergence;
use crate::page::interval::{Span, spans};
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

/// What divergences hold that are not of the forms.
const IN_BF16: &str = " Weights of every form were rounded to bf16 before they were used, as activations were: fp32 is here \
                       what bf16 is. On a GPU with room for four bytes a weight, and with <code>--device cpu</code>, all is computed in f32.";

fn comparison(measured: &Measured) -> String {
    let tokens = measured.models.first().map_or(0, |model| model.divergence.tokens);
    let mut table = format!(
        "<table class=\"numbers\">\n<caption>On {} held-out rows, {tokens} supervised tokens, computed in {}</caption>\n\
         <tr><th>model</th><th>loss</th><th>KL, mean</th><th>KL, 99 %</th><th>KL, max</th><th>flipped, %</th></tr>\n",
        measured.rows, measured.computed_in
    );
    for model in &measured.models {
        // Writing to a string cannot fail.
        let _ = writeln!(table, "<tr><th>{}</th>{}</tr>", escape(&model.name), cells(model));
    }
    table
        + "</table>\n"
        + &charts(&measured.models)
        + &format!(
            "<p>Loss and divergence (KL) are in nats a token; the divergence is that of {REFERENCE}, which is what was \
             trained, from each model. Flipped are tokens whose most likely word is another than {REFERENCE}'s. In \
             brackets and as lines: the middle {:.0} % of {RESAMPLES} resamples of the rows.{}</p>\n",
            100.0 * CONFIDENCE,
            if measured.computed_in == "bf16" { IN_BF16 } else { "" }
        )
}

fn cells(model: &Model) -> String {
    let Divergence { loss, kl_mean, kl_p99, kl_max, flipped_share, .. } = &model.divergence;
    let Intervals { loss: of_loss, kl_mean: of_kl, flipped_share: of_flipped } = &model.intervals;
    let loss = with_ends(*loss, *of_loss, |value| format!("{value:.4}"));
    if model.is_reference() {
        return format!("<td>{loss}</td>{}", "<td>–</td>".repeat(4));
    }
    // A line may break behind a hyphen, and not behind a minus.
    let small = |value: f64| format!("{value:.2e}").replace('-', "−");
    let percent = |value: f64| format!("{:.2}", 100.0 * value);
    format!(
        "<td>{loss}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td>",
        with_ends(*kl_mean, *of_kl, small),
        small(*kl_p99),
        small(*kl_max),
        with_ends(*flipped_share, *of_flipped, percent)
    )
}

fn with_ends(value: f64, interval: Option<Interval>, told: impl Fn(f64) -> String) -> String {
    let ends = interval
        .map(|Interval { low, high, .. }| format!(" <small>({} – {})</small>", told(low), told(high)));
    told(value) + &ends.unwrap_or_default()
}

/// Losses and flipped words with their intervals.
fn charts(models: &[Model]) -> String {
    let rows = |shown: &dyn Fn(&Model) -> Option<Interval>| -> Vec<(String, Vec<Option<Span>>)> {
        let span = |Interval { estimate, low, high }| Span { estimate, low, high };
        let row = |model: &Model| Some((model.name.clone(), vec![Some(span(shown(model)?))]));
        models.iter().filter_map(row).collect()
    };
    let flipped = |model: &Model| model.intervals.flipped_share.filter(|_| !model.is_reference());
    spans("Loss on held-out rows", "nats a token", &[], &rows(&|model| model.intervals.loss))
        + &spans("Tokens whose most likely word is another", "share", &[], &rows(&flipped))
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
    if values.iter().flatten().all(|value| *value == 0.0) {
        return format!("<h2>{}</h2>\n<p>Nothing.</p>\n", escape(title));
    }
    heat::map(title, &names, &columns, &values)
}
