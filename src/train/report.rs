//! `report.html` of a run: losses and learning rate as curves, on one page without anything from elsewhere.

use std::fmt::Write as _;

use anyhow::Result;

use crate::checkpoint::run::RunFolder;
use crate::metrics::event::Event;
use crate::metrics::jsonl;
use crate::output;
use crate::page::chart::{Curve, curves};
use crate::page::{document, escape};

/// The page's name in the run's folder.
pub const FILE: &str = "report.html";

/// A curve of more points is drawn as the means of so many stretches.
const MOST_POINTS: usize = 1000;

/// Writes the page of a run from its metrics, whole or not at all.
///
/// # Errors
/// When the metrics cannot be read or the page cannot be written.
pub fn write(run: &RunFolder, name: &str) -> Result<()> {
    let events = jsonl::read(&run.metrics())?;
    output::write_file(&run.path().join(FILE), page(name, &events).as_bytes())
}

fn page(name: &str, events: &[Event]) -> String {
    let train = curve("training", "a", events, |event| match event {
        Event::Step(step) => Some(step.loss),
        _ => None,
    });
    let validation = curve("validation", "b", events, |event| match event {
        Event::Validation { loss, .. } => Some(*loss),
        _ => None,
    });
    let rate = curve("learning rate", "a", events, |event| match event {
        Event::Step(step) => Some(step.lr),
        _ => None,
    });
    let (figures, sources) = (figures(events), sources(events));
    let losses = curves("Loss in nats per supervised token", "step", &[train, validation]);
    let rates = curves("Learning rate", "step", &[rate]);
    document(name, &format!("{figures}{losses}{rates}{sources}"))
}

fn curve(
    label: &'static str,
    class: &'static str,
    events: &[Event],
    value: impl Fn(&Event) -> Option<f64>,
) -> Curve {
    let points: Vec<(f64, f64)> = events
        .iter()
        .filter_map(|event| Some((event.step() as f64, value(event).filter(|value| value.is_finite())?)))
        .collect();
    Curve { label, class, points: thinned(&points) }
}

/// At most `MOST_POINTS` points: the means of equal stretches.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let stretch = points.len().div_ceil(MOST_POINTS).max(1);
    let mean = |part: &[(f64, f64)]| {
        let count = part.len() as f64;
        let sum = part.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / count, sum.1 / count)
    };
    points.chunks(stretch).map(mean).collect()
}

/// The numbers of the run's end.
fn figures(events: &[Event]) -> String {
    let mut rows = String::new();
    let mut row = |name: &str, value: String| {
        let _ = writeln!(rows, "<tr><th>{name}</th><td>{value}</td></tr>");
    };
    let steps =
        events.iter().filter_map(|event| if let Event::Step(step) = event { Some(step) } else { None });
    if let Some(last) = steps.clone().next_back() {
        row("steps", last.step.to_string());
        row("epochs", format!("{:.2}", last.epoch));
        row("tokens", steps.clone().map(|step| step.tokens).sum::<i64>().to_string());
        row("training loss of the last step", format!("{:.4}", last.loss));
        row("hours of steps", format!("{:.2}", steps.map(|step| step.seconds).sum::<f64>() / 3600.0));
    }
    let validations: Vec<(u64, f64)> = events.iter().filter_map(validation).collect();
    if let (Some(first), Some(last)) = (validations.first(), validations.last()) {
        row(
            "validation loss",
            format!("{:.4} at step {}, {:.4} at step {}", first.1, first.0, last.1, last.0),
        );
        let best = validations.iter().fold(first, |best, one| if one.1 < best.1 { one } else { best });
        row("least validation loss", format!("{:.4} at step {}", best.1, best.0));
    }
    format!("<table>\n{rows}</table>\n")
}

fn validation(event: &Event) -> Option<(u64, f64)> {
    if let Event::Validation { step, loss, .. } = event { Some((*step, *loss)) } else { None }
}

/// The losses of the last validation, by source.
fn sources(events: &[Event]) -> String {
    let last = events.iter().rev().find_map(|event| match event {
        Event::Validation { sources, .. } => Some(sources),
        _ => None,
    });
    let Some(sources) = last else { return String::new() };
    let rows: String = sources
        .iter()
        .map(|(name, loss)| format!("<tr><th>{}</th><td>{loss:.4}</td></tr>\n", escape(name)))
        .collect();
    format!("<h2>Last validation by source</h2>\n<table>\n{rows}</table>\n")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail loudly")]
mod tests {
    use super::*;
    use crate::metrics::event::StepEvent;

    fn step(step: u64, loss: f64) -> Event {
        let (epoch, lr, grad_norm, seconds) = (step as f64 / 10.0, 2e-4 * step as f64, 1.0, 0.5);
        let rows = Vec::new();
        Event::Step(StepEvent {
            step,
            epoch,
            loss,
            lr,
            grad_norm,
            rows,
            tokens: 7,
            supervised_tokens: 3,
            seconds,
        })
    }

    fn validation(step: u64, loss: f64) -> Event {
        let sources = [("a<b".to_string(), loss)].into_iter().collect();
        Event::Validation { step, loss, perplexity: loss.exp(), tokens: 5, sources }
    }

    /// Every number of every `points="x,y x,y"`.
    fn drawn_points(page: &str) -> Vec<(f64, f64)> {
        page.split("points=\"")
            .skip(1)
            .flat_map(|rest| rest.split('"').next().unwrap().split(' '))
            .map(|point| point.split_once(',').unwrap())
            .map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap()))
            .collect()
    }

    #[test]
    fn curves_lie_in_their_charts_and_names_are_escaped() {
        let mut events = vec![validation(0, 3.5)];
        events.extend((1..=40).map(|at| step(at, 3.0 - at as f64 / 20.0)));
        events.push(validation(40, 1.25));
        let page = page("<run> & co", &events);
        assert!(page.contains("<h1>&lt;run&gt; &amp; co</h1>") && page.contains("a&lt;b"));
        assert!(page.contains("3.5000 at step 0, 1.2500 at step 40"));
        let points = drawn_points(&page);
        assert_eq!(points.len(), 40 + 2 + 40);
        assert!(points.iter().all(|(x, y)| (70.0..=860.0).contains(x) && (0.0..=260.0).contains(y)));
        // A falling loss goes down the page.
        assert!(points[0].1 < points[39].1 && points[0].0 < points[39].0);
        assert!(!page.contains("NaN") && !page.contains("inf") && !page.contains("http"));
    }

    #[test]
    fn few_and_odd_events_make_a_page_too() {
        let odd = [step(1, 0.0), step(2, 0.0)];
        let broken = [step(1, f64::NAN), validation(1, f64::INFINITY)];
        for events in [&[][..], &odd[..1], &odd[..], &broken[..1]] {
            let points = drawn_points(&page("r", events));
            assert!(points.iter().all(|(x, y)| x.is_finite() && y.is_finite()), "{points:?}");
        }
        assert_eq!(drawn_points(&page("r", &broken)).len(), 1, "the rate alone");
    }

    #[test]
    fn long_runs_are_thinned() {
        let points: Vec<(f64, f64)> = (0..2500).map(|at| (f64::from(at), 2.0)).collect();
        let thin = thinned(&points);
        assert_eq!((thin.len(), thin[0]), (834, (1.0, 2.0)));
    }
}
