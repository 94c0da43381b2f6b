//! The page of `granite bench kernels`: the roofline, with every kernel as a point, and the table.

use std::fmt::Write as _;

use super::kernels::{Figure, Figures};
use crate::kernels::check::rates::{Ceilings, Rate};
use crate::page::axis::Axis;
use crate::page::chart::{Frame, LEFT};
use crate::page::{document, escape};

const HEIGHT: f64 = 460.0;

/// Pixels between the numbers of two points.
const APART: f64 = 19.0;

/// The page.
pub(super) fn page(figures: &Figures) -> String {
    let Ceilings { copy_gb_per_s, gemm_tflop_per_s } = figures.ceilings;
    let body = format!(
        "<p>Measured in one run on {}: its own copy moves {copy_gb_per_s:.0} GB/s, a product of bf16 matrices does \
         {gemm_tflop_per_s:.0} TFLOP/s. A kernel that reads more than it writes may lie a little above the copy. An \
         operation of a kernel's definition counts as one FLOP, an exponential too; bytes are those that it must \
         move.</p>\n{}{}<p><small>{}</small></p>\n",
        escape(&figures.gpu),
        plot(figures),
        table(&figures.kernels),
        escape(figures.program)
    );
    document("Kernels and the roofline", &body)
}

fn plot(figures: &Figures) -> String {
    let Ceilings { copy_gb_per_s, gemm_tflop_per_s } = figures.ceilings;
    // TFLOP/s of one FLOP a byte, and where more of them no longer help.
    let slope = copy_gb_per_s / 1e3;
    let ridge = gemm_tflop_per_s / slope;
    let points: Vec<(f64, f64)> =
        figures.kernels.iter().map(|one| (one.rate.flop_per_byte, one.tflop_per_s)).collect();
    let x = Axis::decades(points.iter().map(|point| point.0).chain([ridge, 2.0 * ridge]));
    let y = Axis::decades(points.iter().map(|point| point.1).chain([gemm_tflop_per_s]));
    let frame = Frame { x, y, height: HEIGHT };
    let ((left, right), (low, _)) = (x.bounds(), y.bounds());
    let begin = left.max(low / slope);
    let roof = [(begin, begin * slope), (ridge, gemm_tflop_per_s), (right, gemm_tflop_per_s)];
    let mut inside = frame.polyline("b", &roof);
    inside += &names(&frame, &figures.ceilings, ridge);
    inside += &numbered(&frame, &points, &figures.kernels);
    frame.draw("TFLOP/s over FLOP per byte", "FLOP per byte", &inside)
}

/// What the two lines are.
fn names(frame: &Frame, ceilings: &Ceilings, ridge: f64) -> String {
    let Ceilings { copy_gb_per_s, gemm_tflop_per_s } = ceilings;
    let (at, top) = frame.place((ridge, *gemm_tflop_per_s));
    // Left of the slope, where it has risen to a place between the kernels and the ridge.
    let between = ridge.powf(0.7);
    let (beside, height) = frame.place((between, between * copy_gb_per_s / 1e3));
    let mut svg = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(
        svg,
        "<text class=\"b\" text-anchor=\"end\" x=\"{:.1}\" y=\"{:.1}\">bf16 product {gemm_tflop_per_s:.0} TFLOP/s</text>\n\
         <text class=\"b\" text-anchor=\"end\" x=\"{:.1}\" y=\"{height:.1}\">device copy {copy_gb_per_s:.0} GB/s</text>\n\
         <line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top:.1}\" y2=\"{:.1}\"/>",
        at - 12.0,
        top + 4.0,
        beside - 12.0,
        frame.bottom()
    );
    svg
}

/// Points, each with its number of the table at the end of a line: most points lie side by side.
fn numbered(frame: &Frame, points: &[(f64, f64)], kernels: &[Figure]) -> String {
    let mut places: Vec<(usize, (f64, f64))> =
        points.iter().map(|point| frame.place(*point)).enumerate().collect();
    // Of two in one place the lower one's line goes further left, so that the two do not cross.
    places.sort_by(|(_, a), (_, b)| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
    let wanted: Vec<f64> = places.iter().map(|(_, place)| place.0).collect();
    let (low, foot) = (frame.bottom() - 8.0, frame.bottom() - 22.0);
    let mut svg = String::new();
    for ((index, (x, y)), at) in places.into_iter().zip(spread(&wanted)) {
        let Rate { kernel, gb_per_s, .. } = &kernels[index].rate;
        let _ = writeln!(
            svg,
            "<line class=\"leader\" x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{at:.1}\" y2=\"{foot:.1}\"/>\n\
             <circle class=\"a\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"><title>{}: {gb_per_s:.0} GB/s</title></circle>\n\
             <text text-anchor=\"middle\" x=\"{at:.1}\" y=\"{low:.1}\">{}</text>",
            escape(kernel),
            index + 1
        );
    }
    svg
}

/// Places next to those wanted, which ascend, but never nearer to each other than [`APART`].
fn spread(wanted: &[f64]) -> Vec<f64> {
    let mut next = LEFT + APART / 2.0;
    let mut places = Vec::with_capacity(wanted.len());
    for at in wanted {
        places.push(at.max(next));
        next = at.max(next) + APART;
    }
    places
}

fn table(kernels: &[Figure]) -> String {
    let mut rows = String::from(
        "<table class=\"numbers\">\n<tr><th>kernel</th><th>shape</th><th>GB/s</th><th>of the copy</th><th>FLOP per byte</th></tr>\n",
    );
    for (index, Figure { rate, share_of_copy, .. }) in kernels.iter().enumerate() {
        let Rate { kernel, shape, gb_per_s, flop_per_byte } = rate;
        let _ = writeln!(
            rows,
            "<tr><td>{} {}</td><td>{}</td><td>{gb_per_s:.0}</td><td>{:.1} %</td><td>{flop_per_byte:.2}</td></tr>",
            index + 1,
            escape(kernel),
            escape(shape),
            100.0 * share_of_copy
        );
    }
    rows + "</table>\n"
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail loudly")]
mod tests {
    use super::super::kernels::tests::made_up;
    use super::*;

    /// Values of an attribute, in their order.
    fn values(page: &str, attribute: &str) -> Vec<f64> {
        let lead = format!(" {attribute}=\"");
        page.split(&lead).skip(1).map(|rest| rest.split('"').next().unwrap().parse().unwrap()).collect()
    }

    /// The corners of the roof in pixels.
    fn roof(page: &str) -> Vec<(f64, f64)> {
        let line = page.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        let points = line.split(' ').map(|point| point.split_once(',').unwrap());
        points.map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap())).collect()
    }

    #[test]
    fn every_kernel_is_a_point_in_the_plot_and_a_row() {
        let page = page(&made_up());
        let (x, y) = (values(&page, "cx"), values(&page, "cy"));
        assert_eq!((x.len(), y.len()), (5, 5));
        assert!(x.iter().all(|x| (70.0..=846.0).contains(x)) && y.iter().all(|y| (14.0..=420.0).contains(y)));
        assert!(x.is_sorted(), "points are drawn from left to right: {x:?}");
        assert_eq!(page.matches("<tr><td>").count(), 5);
        assert!(page.contains("<td>3 swiglu</td><td>8192 × 12800 bf16</td><td>1500</td><td>50.0 %</td>"));
        assert!(page.contains("5 a&lt;b") && page.contains("Imaginary &amp; Sons 1"));
        assert!(!page.contains("NaN") && !page.contains("inf") && !page.contains("http"));
    }

    #[test]
    fn the_roof_is_the_copy_up_to_the_product() {
        let mut figures = made_up();
        figures.kernels.truncate(1);
        let rate = Rate { gb_per_s: 3000.0, ..figures.kernels[0].rate.clone() };
        figures.kernels[0] = Figure::new(rate, &figures.ceilings);
        let page = page(&figures);
        // It begins where the axes do, rises to the ridge, goes on level to the right edge.
        let roof = roof(&page);
        let [(x0, y0), (x1, y1), (x2, y2)] = roof[..] else { panic!("{roof:?}") };
        assert_eq!((x0, x2), (70.0, 846.0));
        assert!(y0 > y1 && y1 == y2, "{roof:?}");
        // A kernel as fast as the copy lies on it; factors are distances.
        let (x, y) = (values(&page, "cx")[0], values(&page, "cy")[0]);
        assert!((y0 + (x - x0) / (x1 - x0) * (y1 - y0) - y).abs() < 0.3, "({x}, {y}) beside {roof:?}");
    }

    #[test]
    fn numbers_of_neighbours_stand_apart() {
        assert_eq!(spread(&[100.0, 100.0, 101.0, 300.0]), [100.0, 119.0, 138.0, 300.0]);
        assert!(spread(&[]).is_empty());
    }
}
