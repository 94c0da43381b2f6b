//! The page of `granite bench attention`: TFLOP/s against length, and the tables.

use std::fmt::Write as _;

use super::attention::{Figures, PASSES, PassOf, Row, beside, number, present};
use crate::page::chart::{Curve, curves};
use crate::page::{document, escape};

/// What is drawn, and in which colour.
const DRAWN: [(&str, &str); 4] = [("Hopper", "a"), ("cuDNN", "b"), ("portable", "c"), ("flash", "d")];

/// The page.
pub(super) fn page(figures: &Figures) -> String {
    let Figures { heads, kv_heads, head_dim, .. } = figures;
    let mut body = format!(
        "<p>Causal attention in bf16 on {}, {heads} query and {kv_heads} key heads of {head_dim}. All in one run, in turn; \
         half of the square is counted, and 2.5 times as much backward. Ours gives the same bits every time, libtorch's \
         backward passes do where they are called ordered.</p>\n",
        escape(&figures.gpu)
    );
    for (name, pass) in PASSES {
        body += &plot(figures, name, pass);
        body += &table(figures, name, pass);
    }
    body += &memory(figures);
    let _ = writeln!(body, "<p><small>{}</small></p>", escape(figures.program));
    document("Attention", &body)
}

/// Over the batches that are of one length and not packed.
fn plot(figures: &Figures, name: &str, pass: PassOf) -> String {
    let lines = DRAWN.map(|(label, class)| {
        let rows = figures.rows.iter().filter(|row| !row.packed);
        let point = |row: &Row| Some((*row.lengths.first()? as f64, *pass(row).tflop_per_s.get(label)?));
        let mut points: Vec<(f64, f64)> = rows.filter_map(point).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Curve { label, class, points }
    });
    curves(&format!("TFLOP/s {name}"), "tokens of a sequence", &lines)
}

fn table(figures: &Figures, name: &str, pass: PassOf) -> String {
    let columns = present(figures, pass);
    let mut text =
        format!("<table class=\"numbers\">\n<caption>{name}, TFLOP/s</caption>\n<tr><th>batch</th>");
    // Writing to a string cannot fail.
    for column in &columns {
        let _ = write!(text, "<th>{column}</th>");
    }
    text += "<th>ours over libtorch</th></tr>\n";
    for row in &figures.rows {
        let _ = write!(text, "<tr><td>{}</td>", escape(&row.name));
        for column in &columns {
            let _ = write!(text, "<td>{}</td>", number(pass(row).tflop_per_s.get(column), 0));
        }
        let _ = writeln!(text, "<td>{}</td></tr>", number(pass(row).ratio.as_ref(), 2));
    }
    text + "</table>\n"
}

fn memory(figures: &Figures) -> String {
    let mut text = format!(
        "<table class=\"numbers\">\n<caption>Memory beside operands and gradients</caption>\n\
         <tr><th>batch</th><th>MiB</th><th>of eager attention ({:.1} bytes a score)</th></tr>\n",
        figures.eager_bytes_per_score
    );
    for row in &figures.rows {
        let (mib, share) = beside(row);
        let _ =
            writeln!(text, "<tr><td>{}</td><td>{mib:.1}</td><td>{share:.2} %</td></tr>", escape(&row.name));
    }
    text + "</table>\n"
}

#[cfg(test)]
mod tests {
    use super::super::attention::tests::made_up;
    use super::*;

    #[test]
    fn curves_are_of_batches_of_one_length_and_rows_of_all() {
        let page = page(&made_up());
        // Four curves of two points each, forward and backward.
        assert_eq!(page.matches("<circle ").count(), 2 * 4 * 2, "{page}");
        assert_eq!(page.matches("<polyline ").count(), 2 * 4);
        assert_eq!(page.matches("<tr><td>").count(), 3 * 3);
        assert!(page.contains("<td>packed uneven 8192</td><td>183</td><td>–</td>"), "{page}");
        assert!(page.contains("Imaginary &amp; Sons 1") && !page.contains("NaN") && !page.contains("http"));
    }
}
