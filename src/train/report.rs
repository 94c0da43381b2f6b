//! `report.html` of a run: losses and learning rate as curves, on one page without anything from elsewhere.

use std::fmt::Write as _;

use anyhow::Result;

use crate::checkpoint::run::RunFolder;
use crate::metrics::event::Event;
use crate::metrics::jsonl;
use crate::output;

/// The page's name in the run's folder.
pub const FILE: &str = "report.html";

/// A chart's size in pixels.
const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 300.0;
/// Room for labels: left of the plot, below and around it.
const LEFT: f64 = 70.0;
const BELOW: f64 = 40.0;
const AROUND: f64 = 14.0;
/// A curve of more points is drawn as the means of so many stretches.
const MOST_POINTS: usize = 1000;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1f2328; --faint: #8b949e66; --a: #0969da; --b: #bc4c00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --a: #58a6ff; --b: #f0883e; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 900px; margin: 2rem auto; padding: 0 1rem; }
svg { width: 100%; height: auto; } text { fill: var(--ink); font-size: 12px; }
.grid { stroke: var(--faint); } polyline { fill: none; stroke-width: 1.6; }
.a { stroke: var(--a); fill: var(--a); } .b { stroke: var(--b); fill: var(--b); } text.a, text.b { stroke: none; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem 1.5rem .2rem 0; font-weight: normal; }
td { font-variant-numeric: tabular-nums; }
";

/// Writes the page of a run from its metrics, whole or not at all.
///
/// # Errors
/// When the metrics cannot be read or the page cannot be written.
pub fn write(run: &RunFolder, name: &str) -> Result<()> {
    let events = jsonl::read(&run.metrics())?;
    output::write_file(&run.path().join(FILE), page(name, &events).as_bytes())
}

/// One curve; points are `(step, value)` in ascending steps.
struct Curve {
    label: &'static str,
    class: &'static str,
    points: Vec<(f64, f64)>,
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
    let name = escape(name);
    let (figures, sources) = (figures(events), sources(events));
    let losses = chart("Loss in nats per supervised token", &[train, validation]);
    let rates = chart("Learning rate", &[rate]);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>{name}</title>\n\
         <style>{STYLE}</style>\n<h1>{name}</h1>\n{figures}{losses}{rates}{sources}</html>\n"
    )
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

/// A range of values with round bounds.
struct Axis {
    low: f64,
    high: f64,
    /// Distance of two labels.
    step: f64,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64>) -> Self {
        let (mut low, mut high) =
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        if high - low <= 1e-9 * high.abs() {
            // One value, or next to it: it lies in the middle.
            let half = if high == 0.0 { 0.5 } else { high.abs() / 2.0 };
            (low, high) = (low - half, high + half);
        }
        let step = round_step((high - low) / 5.0);
        Self { low: (low / step).floor() * step, high: (high / step).ceil() * step, step }
    }

    /// Where a value lies between the bounds, in `[0, 1]`.
    fn share(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    fn labels(&self) -> impl Iterator<Item = (f64, String)> + '_ {
        let count = ((self.high - self.low) / self.step).round() as usize;
        (0..=count).map(|index| {
            let value = self.low + index as f64 * self.step;
            (value, self.text(value))
        })
    }

    /// As many digits as tell two labels apart.
    fn text(&self, value: f64) -> String {
        let digits = -self.step.log10().floor();
        // What is left of a difference of equal numbers is no value.
        let value = if value.abs() < self.step / 2.0 { 0.0 } else { value };
        if digits > 3.0 && value != 0.0 {
            format!("{value:.1e}")
        } else {
            format!("{value:.0$}", digits.clamp(0.0, 3.0) as usize)
        }
    }
}

/// The first of 1, 2, 5 times a power of ten that is no smaller.
fn round_step(step: f64) -> f64 {
    let decade = 10f64.powf(step.log10().floor());
    [1.0, 2.0, 5.0]
        .map(|factor| factor * decade)
        .into_iter()
        .find(|one| *one >= step)
        .unwrap_or(10.0 * decade)
}

fn chart(title: &str, curves: &[Curve]) -> String {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    if points().next().is_none() {
        return String::new();
    }
    let (x, y) = (Axis::over(points().map(|point| point.0)), Axis::over(points().map(|point| point.1)));
    let mut svg = format!(
        "<h2>{title}</h2>\n<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\">\n"
    );
    svg += &grid(&x, &y);
    for (index, curve) in curves.iter().filter(|curve| !curve.points.is_empty()).enumerate() {
        svg += &drawn(curve, &x, &y);
        if curves.len() > 1 {
            let at = WIDTH - AROUND - 90.0 * (index + 1) as f64;
            // Writing to a string cannot fail.
            let _ = writeln!(
                svg,
                "<text class=\"{}\" x=\"{at}\" y=\"{}\">{}</text>",
                curve.class,
                AROUND + 14.0,
                curve.label
            );
        }
    }
    svg + "</svg>\n"
}

fn grid(x: &Axis, y: &Axis) -> String {
    let (right, bottom) = (WIDTH - AROUND, HEIGHT - BELOW);
    let mut svg = String::new();
    for (value, label) in y.labels() {
        let at = vertical(y, value);
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>"
        );
        let (end, middle) = (LEFT - 8.0, at + 4.0);
        let _ = writeln!(svg, "<text text-anchor=\"end\" x=\"{end}\" y=\"{middle:.1}\">{label}</text>");
    }
    for (value, label) in x.labels() {
        let at = horizontal(x, value);
        let below = bottom + 18.0;
        let _ = writeln!(svg, "<text text-anchor=\"middle\" x=\"{at:.1}\" y=\"{below}\">{label}</text>");
    }
    let (middle, below) = ((LEFT + right) / 2.0, HEIGHT - 4.0);
    let _ = writeln!(svg, "<text text-anchor=\"middle\" x=\"{middle}\" y=\"{below}\">step</text>");
    svg
}

/// A line, and a dot for each of a few points: a line through one point would not be seen.
fn drawn(curve: &Curve, x: &Axis, y: &Axis) -> String {
    let at: Vec<(f64, f64)> =
        curve.points.iter().map(|point| (horizontal(x, point.0), vertical(y, point.1))).collect();
    let list: Vec<String> = at.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let mut svg =
        format!("<polyline class=\"{}\" points=\"{}\" style=\"fill:none\"/>\n", curve.class, list.join(" "));
    if at.len() <= 50 {
        for (x, y) in at {
            let _ =
                writeln!(svg, "<circle class=\"{}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\"/>", curve.class);
        }
    }
    svg
}

fn horizontal(axis: &Axis, value: f64) -> f64 {
    LEFT + axis.share(value) * (WIDTH - AROUND - LEFT)
}

fn vertical(axis: &Axis, value: f64) -> f64 {
    HEIGHT - BELOW - axis.share(value) * (HEIGHT - BELOW - AROUND)
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

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
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
        assert!(points.iter().all(|(x, y)| (LEFT..=WIDTH).contains(x) && (0.0..=HEIGHT - BELOW).contains(y)));
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
    fn labels_are_round_and_long_runs_are_thinned() {
        let labels: Vec<String> = Axis::over([0.13, 1.02].into_iter()).labels().map(|one| one.1).collect();
        assert_eq!(labels, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0", "1.2"]);
        let labels: Vec<String> = Axis::over([0.0, 2e-4].into_iter()).labels().map(|one| one.1).collect();
        assert_eq!(labels, ["0.000", "5.0e-5", "1.0e-4", "1.5e-4", "2.0e-4"]);
        let points: Vec<(f64, f64)> = (0..2500).map(|at| (f64::from(at), 2.0)).collect();
        let thin = thinned(&points);
        assert_eq!((thin.len(), thin[0]), (834, (1.0, 2.0)));
    }
}
