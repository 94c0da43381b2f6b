//! Heat maps: a table of numbers as coloured cells, on a logarithmic scale.

use std::fmt::Write as _;

use super::axis::Axis;
use super::chart::WIDTH;
use super::escape;

/// Room for the names of rows, and above for those of columns, in pixels.
const LEFT: f64 = 90.0;
const ABOVE: f64 = 22.0;
const CELL_HEIGHT: f64 = 20.0;
/// The faintest cell that is above 0, of 1.
const FAINTEST: f64 = 0.08;

/// A map with `rows` over `columns`; `values[row][column]`, a cell whose value is not above 0 stays empty.
pub fn map(title: &str, rows: &[&str], columns: &[String], values: &[Vec<f64>]) -> String {
    let scale = Axis::decades(values.iter().flatten().copied());
    let width = (WIDTH - LEFT) / columns.len().max(1) as f64;
    let height = ABOVE + CELL_HEIGHT * rows.len() as f64;
    let mut inside = names(rows, columns, width);
    for (row, values) in values.iter().enumerate() {
        for (column, value) in values.iter().enumerate() {
            let (x, y) = (LEFT + width * column as f64, ABOVE + CELL_HEIGHT * row as f64);
            let name = (rows.get(row).copied().unwrap_or(""), columns.get(column).map_or("", String::as_str));
            inside += &cell((x, y, width), *value, name, &scale);
        }
    }
    let (low, high) = scale.bounds();
    let title = escape(title);
    format!(
        "<h2>{title}</h2>\n<p>From {low:e} (faint) to {high:e} (full), by decades.</p>\n\
         <svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\">\n{inside}</svg>\n"
    )
}

fn names(rows: &[&str], columns: &[String], width: f64) -> String {
    let mut svg = String::new();
    for (row, name) in rows.iter().enumerate() {
        let (x, y) = (LEFT - 8.0, ABOVE + CELL_HEIGHT * (row as f64 + 0.7));
        // Writing to a string cannot fail.
        let _ = writeln!(svg, "<text text-anchor=\"end\" x=\"{x}\" y=\"{y:.1}\">{}</text>", escape(name));
    }
    // As many as have room: 24 pixels a name.
    let every = (24.0 / width).ceil().max(1.0) as usize;
    for (column, name) in columns.iter().enumerate().step_by(every) {
        let (x, y) = (LEFT + width * (column as f64 + 0.5), ABOVE - 6.0);
        let _ = writeln!(svg, "<text text-anchor=\"middle\" x=\"{x:.1}\" y=\"{y}\">{}</text>", escape(name));
    }
    svg
}

fn cell((x, y, width): (f64, f64, f64), value: f64, (row, column): (&str, &str), scale: &Axis) -> String {
    // An empty cell says what it is worth too.
    let opacity =
        if value > 0.0 { FAINTEST + (1.0 - FAINTEST) * scale.share(value).clamp(0.0, 1.0) } else { 0.0 };
    format!(
        "<rect class=\"a\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill-opacity=\"{opacity:.3}\" \
         stroke-opacity=\"0.15\"><title>{} {}: {value:.3e}</title></rect>\n",
        (width - 1.0).max(1.0),
        CELL_HEIGHT - 1.0,
        escape(column),
        escape(row)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn larger_values_are_fuller_and_nothing_is_empty() {
        let columns = ["0".to_string(), "1".to_string(), "2".to_string()];
        let svg = map("t<", &["q"], &columns, &[vec![1e-3, 1e-1, 0.0]]);
        assert!(svg.contains("<h2>t&lt;</h2>") && svg.matches("<rect").count() == 3);
        for (value, opacity) in [("1.000e-3", "0.080"), ("1.000e-1", "1.000"), ("0.000e0", "0.000")] {
            let at = svg.lines().find(|line| line.contains(value)).unwrap_or_default();
            assert!(at.contains(&format!("fill-opacity=\"{opacity}\"")), "{at}");
        }
    }

    #[test]
    fn no_columns_and_odd_numbers_are_no_panic() {
        assert!(map("t", &[], &[], &[]).contains("<svg"));
        let svg = map("t", &["q"], &["0".to_string()], &[vec![f64::NAN, f64::INFINITY]]);
        assert!(svg.contains("fill-opacity=\"0.000\""));
    }
}
