//! The plot of all rows that have been measured so far.
//!
//! Enters: ratios. Leaves: an SVG of one panel for each mix: overcommit to the right, throughput against enough memory upward, a
//! line for each way.
use super::Way;
use std::fmt::Write;

/// A way's ratio at one overcommit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    pub(super) way: Way,
    pub(super) overcommit: f64,
    pub(super) ratio: f64,
}

const PANEL: f64 = 220.0;
const HEIGHT: f64 = 180.0;
const MARGIN: f64 = 40.0;
/// The ratio at the upper edge.
const TOP: f64 = 1.25;

const fn colour(way: Way) -> &'static str {
    match way {
        Way::Enough => "#888888",
        Way::Plimsoll => "#1b6ca8",
        Way::Kernel => "#c8553d",
        Way::Balloon => "#5a8f3d",
    }
}

fn x(panel: usize, overcommit: f64) -> f64 {
    let left = MARGIN + (PANEL + MARGIN) * f64::from(u32::try_from(panel).unwrap_or(0));
    left + (overcommit - 1.0) / 2.0 * PANEL
}

fn y(ratio: f64) -> f64 {
    MARGIN + (1.0 - ratio.clamp(0.0, TOP) / TOP) * HEIGHT
}

/// The SVG of these panels.
pub(super) fn svg(panels: &[(&str, Vec<Point>)]) -> String {
    let width = MARGIN + (PANEL + MARGIN) * f64::from(u32::try_from(panels.len()).unwrap_or(0));
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        HEIGHT + 3.0 * MARGIN
    );
    for (panel, (name, points)) in panels.iter().enumerate() {
        let _ = draw(&mut text, panel, name, points);
    }
    for (nth, way) in (0..).zip(Way::SHORT) {
        let (left, below) = (MARGIN + 160.0 * f64::from(nth), HEIGHT + 2.6 * MARGIN);
        let _ = writeln!(
            text,
            "<text x=\"{left}\" y=\"{below}\" fill=\"{}\">{}</text>",
            colour(way),
            way.about()
        );
    }
    text + "</svg>\n"
}

fn draw(text: &mut String, panel: usize, name: &str, points: &[Point]) -> std::fmt::Result {
    let (left, right) = (x(panel, 1.0), x(panel, 3.0));
    writeln!(
        text,
        "<text x=\"{left}\" y=\"{}\">{name}: operations/s against enough memory</text>",
        MARGIN - 12.0
    )?;
    for ratio in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let at = y(ratio);
        writeln!(text, "<line x1=\"{left}\" x2=\"{right}\" y1=\"{at}\" y2=\"{at}\" stroke=\"#dddddd\"/>")?;
        writeln!(text, "<text x=\"{}\" y=\"{at}\" text-anchor=\"end\">{ratio}</text>", left - 4.0)?;
    }
    for overcommit in [1.0, 1.5, 2.0, 3.0] {
        let (at, below) = (x(panel, overcommit), HEIGHT + MARGIN + 14.0);
        writeln!(text, "<text x=\"{at}\" y=\"{below}\" text-anchor=\"middle\">{overcommit:.1}</text>")?;
    }
    for way in Way::SHORT {
        let mut line: Vec<(f64, f64)> = points
            .iter()
            .filter(|point| point.way == way)
            .map(|point| (point.overcommit, point.ratio))
            .collect();
        line.sort_by(|one, other| one.0.total_cmp(&other.0));
        let corners: Vec<String> = line
            .iter()
            .map(|(overcommit, ratio)| format!("{:.1},{:.1}", x(panel, *overcommit), y(*ratio)))
            .collect();
        writeln!(
            text,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\"/>",
            corners.join(" "),
            colour(way)
        )?;
        for (overcommit, ratio) in line {
            let (cx, cy) = (x(panel, overcommit), y(ratio));
            writeln!(text, "<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"3\" fill=\"{}\"/>", colour(way))?;
        }
    }
    Ok(())
}
