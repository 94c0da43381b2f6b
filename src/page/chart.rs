//! Charts in SVG: a frame with its axes, and curves in it.

use std::fmt::Write as _;

use super::axis::Axis;
use super::escape;

/// A chart's width in pixels.
pub const WIDTH: f64 = 860.0;
/// Its usual height.
const HEIGHT: f64 = 300.0;
/// Room for labels: left of the plot, above it, below and on its right.
pub const LEFT: f64 = 70.0;
const ABOVE: f64 = 24.0;
const BELOW: f64 = 40.0;
const AROUND: f64 = 14.0;

/// One curve; points are `(x, y)` with ascending `x`.
#[derive(Debug, Clone)]
pub struct Curve {
    /// What it shows.
    pub label: &'static str,
    /// Its colour: `a`, `b`, `c` or `d`.
    pub class: &'static str,
    /// Finite numbers.
    pub points: Vec<(f64, f64)>,
}

/// A plot's place on the page and what its axes show.
#[derive(Debug, Clone, Copy)]
pub struct Frame {
    /// From left to right.
    pub x: Axis,
    /// From the bottom up.
    pub y: Axis,
    /// Of the whole chart, in pixels.
    pub height: f64,
}

impl Frame {
    /// Where a point lies, in pixels from the upper left corner.
    pub fn place(&self, (x, y): (f64, f64)) -> (f64, f64) {
        (
            LEFT + self.x.share(x) * (self.right() - LEFT),
            self.bottom() - self.y.share(y) * (self.bottom() - ABOVE),
        )
    }

    /// The right edge of the plot, in pixels.
    pub fn right(&self) -> f64 {
        WIDTH - AROUND
    }

    /// The lower edge of the plot, in pixels.
    pub fn bottom(&self) -> f64 {
        self.height - BELOW
    }

    /// The chart: title, lines and labels of the axes, then `inside`, which is SVG.
    pub fn draw(&self, title: &str, x_name: &str, inside: &str) -> String {
        let (title, x_name) = (escape(title), escape(x_name));
        let height = self.height;
        let (middle, below) = ((LEFT + self.right()) / 2.0, height - 4.0);
        format!(
            "<h2>{title}</h2>\n<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\">\n{}\
             <text text-anchor=\"middle\" x=\"{middle}\" y=\"{below}\">{x_name}</text>\n{inside}</svg>\n",
            self.grid()
        )
    }

    fn grid(&self) -> String {
        let (right, bottom) = (self.right(), self.bottom());
        let mut svg = String::new();
        for (value, label) in self.y.labels() {
            let (_, at) = self.place((self.x.bounds().0, value));
            let (end, middle) = (LEFT - 8.0, at + 4.0);
            // Writing to a string cannot fail.
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\n\
                 <text text-anchor=\"end\" x=\"{end}\" y=\"{middle:.1}\">{label}</text>"
            );
        }
        for (value, label) in self.x.labels() {
            let (at, _) = self.place((value, self.y.bounds().0));
            let below = bottom + 18.0;
            let _ = writeln!(svg, "<text text-anchor=\"middle\" x=\"{at:.1}\" y=\"{below}\">{label}</text>");
        }
        svg
    }

    /// A line through points in the colour of a class.
    pub fn polyline(&self, class: &str, points: &[(f64, f64)]) -> String {
        let list: Vec<String> =
            points.iter().map(|point| self.place(*point)).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        format!("<polyline class=\"{class}\" points=\"{}\" style=\"fill:none\"/>\n", list.join(" "))
    }
}

/// Curves over one axis; nothing where there is no point.
pub fn curves(title: &str, x_name: &str, curves: &[Curve]) -> String {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    if points().next().is_none() {
        return String::new();
    }
    let (x, y) = (Axis::over(points().map(|point| point.0)), Axis::over(points().map(|point| point.1)));
    let frame = Frame { x, y, height: HEIGHT };
    let mut inside = String::new();
    for (index, curve) in curves.iter().filter(|curve| !curve.points.is_empty()).enumerate() {
        inside += &drawn(curve, &frame);
        if curves.len() > 1 {
            let at = frame.right() - 90.0 * (index + 1) as f64;
            let _ = writeln!(
                inside,
                "<text class=\"{}\" x=\"{at}\" y=\"{}\">{}</text>",
                curve.class,
                ABOVE - 10.0,
                curve.label
            );
        }
    }
    frame.draw(title, x_name, &inside)
}

/// A line, and a dot for each of a few points: a line through one point would not be seen.
fn drawn(curve: &Curve, frame: &Frame) -> String {
    let mut svg = frame.polyline(curve.class, &curve.points);
    if curve.points.len() <= 50 {
        for (x, y) in curve.points.iter().map(|point| frame.place(*point)) {
            let _ =
                writeln!(svg, "<circle class=\"{}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\"/>", curve.class);
        }
    }
    svg
}
