//! Estimates with their intervals, one row a name and one colour a series.

use std::fmt::Write as _;

use super::axis::Axis;
use super::chart::WIDTH;
use super::escape;

/// Room for names on the left, above beside the legend's lines, below for the axis, in pixels.
const LEFT: f64 = 190.0;
const ABOVE: f64 = 12.0;
const BELOW: f64 = 42.0;
const RIGHT: f64 = 20.0;
/// Between two series of a row, and what a row has beyond them.
const LINE: f64 = 15.0;
const GAP: f64 = 12.0;
/// The colours of the style sheet, in turn.
const COLOURS: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];

/// An estimate and its ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    /// Where the dot stands.
    pub estimate: f64,
    /// Left end of the line.
    pub low: f64,
    /// Right end of the line.
    pub high: f64,
}

/// A chart: `rows` are names with one span for each of `series`, where there is
/// one; a single series needs no name. Nothing without any span.
pub fn spans(title: &str, x_name: &str, series: &[String], rows: &[(String, Vec<Option<Span>>)]) -> String {
    let ends =
        || rows.iter().flat_map(|(_, spans)| spans.iter().flatten()).flat_map(|one| [one.low, one.high]);
    if ends().next().is_none() {
        return String::new();
    }
    let axis = Axis::over(ends());
    let row = GAP + LINE * series.len().max(1) as f64;
    let above = ABOVE + places(series).last().map_or(0.0, |(_, y)| *y);
    let bottom = above + row * rows.len() as f64;
    let mut inside = grid(&axis, above, bottom) + &legend(series);
    for (at, (name, spans)) in rows.iter().enumerate() {
        let top = above + row * at as f64;
        let middle = top + row / 2.0 + 4.0;
        // Writing to a string cannot fail.
        let _ = writeln!(
            inside,
            "<text text-anchor=\"end\" x=\"{}\" y=\"{middle:.1}\">{}</text>",
            LEFT - 10.0,
            escape(name)
        );
        for (place, span) in spans.iter().enumerate() {
            let y = top + GAP / 2.0 + LINE * (place as f64 + 0.5);
            inside += &span.map_or_else(String::new, |span| drawn(&axis, span, place, y, series));
        }
    }
    let (title, x_name) = (escape(title), escape(x_name));
    let (height, middle) = (bottom + BELOW, (LEFT + WIDTH - RIGHT) / 2.0);
    format!(
        "<h2>{title}</h2>\n<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\">\n{inside}\
         <text text-anchor=\"middle\" x=\"{middle}\" y=\"{:.1}\">{x_name}</text>\n</svg>\n",
        height - 6.0
    )
}

fn x_of(axis: &Axis, value: f64) -> f64 {
    LEFT + axis.share(value) * (WIDTH - RIGHT - LEFT)
}

fn colour(series: usize) -> &'static str {
    COLOURS[series % COLOURS.len()]
}

fn grid(axis: &Axis, above: f64, bottom: f64) -> String {
    let mut svg = String::new();
    for (value, label) in axis.labels() {
        let (x, below) = (x_of(axis, value), bottom + 16.0);
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{above:.1}\" y2=\"{bottom:.1}\"/>\n\
             <text text-anchor=\"middle\" x=\"{x:.1}\" y=\"{below:.1}\">{label}</text>"
        );
    }
    svg
}

fn legend(series: &[String]) -> String {
    let mut svg = String::new();
    for ((at, name), (x, y)) in series.iter().enumerate().zip(places(series)) {
        let class = colour(at);
        let _ = writeln!(
            svg,
            "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{:.1}\" r=\"4\"/>\n<text class=\"{class}\" x=\"{:.1}\" y=\"{y:.1}\">{}</text>",
            y - 4.0,
            x + 9.0,
            escape(name)
        );
    }
    svg
}

/// Where each name of the legend stands: from left to right, in as many lines as they need.
fn places(series: &[String]) -> Vec<(f64, f64)> {
    let (mut x, mut y) = (LEFT, 14.0);
    let place = |name: &String| {
        // Letters are about seven pixels wide.
        let width = 34.0 + 7.0 * name.chars().count() as f64;
        if x > LEFT && x + width > WIDTH {
            (x, y) = (LEFT, y + LINE);
        }
        let place = (x, y);
        x += width;
        place
    };
    series.iter().map(place).collect()
}

fn drawn(axis: &Axis, span: Span, place: usize, y: f64, series: &[String]) -> String {
    let class = colour(place);
    let (low, middle, high) = (x_of(axis, span.low), x_of(axis, span.estimate), x_of(axis, span.high));
    let name = series.get(place).map_or("", String::as_str);
    format!(
        "<line class=\"{class}\" x1=\"{low:.1}\" x2=\"{high:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke-width=\"2\"/>\n\
         <circle class=\"{class}\" cx=\"{middle:.1}\" cy=\"{y:.1}\" r=\"4\"><title>{} {:.4} ({:.4} to {:.4})</title></circle>\n",
        escape(name),
        span.estimate,
        span.low,
        span.high
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_span_is_drawn_in_the_colour_of_its_series() {
        let span = |at: f64| Some(Span { estimate: at, low: at - 0.1, high: at + 0.1 });
        let series = ["base".to_string(), "<adapter>".to_string()];
        let rows =
            [("gsm8k".to_string(), vec![span(0.3), span(0.5)]), ("mbpp".to_string(), vec![None, span(0.2)])];
        let svg = spans("Scores & more", "score", &series, &rows);
        // Two dots of the legend and three of estimates.
        assert_eq!(svg.matches("<circle").count(), 5);
        assert_eq!(svg.matches("<circle class=\"b\"").count(), 3);
        assert!(
            svg.contains("&lt;adapter&gt;")
                && !svg.contains("<adapter>")
                && svg.contains("Scores &amp; more")
        );
        let many: Vec<String> = (0..8).map(|at| format!("merged-{at}-of-a-long-name")).collect();
        let row = [("gsm8k".to_string(), (0..8).map(|at| span(0.1 * f64::from(at))).collect())];
        let svg = spans("t", "x", &many, &row);
        // Each series has a colour of its own, and no name of the legend goes past the edge.
        assert!(COLOURS.iter().all(|class| svg.matches(&format!("<circle class=\"{class}\"")).count() == 2));
        assert!(
            places(&many).iter().zip(&many).all(|((x, _), name)| x + 9.0 + 7.0 * name.len() as f64 <= WIDTH)
        );
        assert_eq!(spans("t", "x", &series, &[]), "");
        assert_eq!(spans("t", "x", &series, &[("a".to_string(), vec![None])]), "");
    }
}
