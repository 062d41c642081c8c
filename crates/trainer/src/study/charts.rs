//! Plots of curves as SVG, with the spread over seeds, and what all plots share. Colours come from the page's style sheet by
//! class, so that a plot follows light and dark; names stand beside what they name.

use std::fmt::Write;

use super::stats::CurvePoint;
use super::svg::{Axis, band, escape, line, short, spread};

/// Colours of the style sheet; what comes after takes them again with dashes.
pub const COLOURS: usize = 8;
pub(super) const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 400.0;
pub(super) const LEFT: f64 = 62.0;
pub(super) const TOP: f64 = 14.0;
pub(super) const BOTTOM: f64 = 352.0;
/// Width of a letter of a label, about.
pub(super) const LETTER: f64 = 7.4;
/// Height of a line of labels.
const LINE: f64 = 14.0;

/// A named curve.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Shown beside its end.
    pub name: String,
    /// Number of its colour.
    pub colour: usize,
    /// Shown when the pointer rests on it.
    pub note: String,
    /// By rising x.
    pub points: Vec<CurvePoint>,
}

/// What a plot of curves shows.
#[derive(Debug, Clone, PartialEq)]
pub struct Curves {
    /// Read aloud in place of the picture.
    pub title: String,
    /// Name of the x axis.
    pub x_label: String,
    /// Name of the y axis.
    pub y_label: String,
    /// Whether x is logarithmic.
    pub log_x: bool,
    /// Whether the single points are marked.
    pub marks: bool,
    /// The y axis ends here; what lies beyond is cut off.
    pub y_limits: (f64, f64),
    /// The curves.
    pub series: Vec<Series>,
}

impl Curves {
    /// The whole picture. Points that are not finite are left out.
    pub fn svg(&self) -> String {
        let mut finite = self.clone();
        for series in &mut finite.series {
            series.points.retain(|point| point.x.is_finite() && point.mean.is_finite());
            for point in &mut series.points {
                point.error = point.error.filter(|error| error.is_finite());
            }
        }
        finite.draw()
    }

    fn draw(&self) -> String {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let longest = self.series.iter().map(|series| series.name.chars().count()).max().unwrap_or(0);
        let right = WIDTH - (longest.min(26) as f64 * LETTER + 22.0);
        let x = Axis::over(points().map(|point| point.x), self.log_x, (LEFT, right));
        let ends = points().flat_map(|point| {
            let error = point.error.unwrap_or(0.0);
            [point.mean - error, point.mean + error]
        });
        let (least, most) = self.y_limits;
        let means = points().map(|point| point.mean.clamp(least, most));
        let (low, high) = means.fold((f64::MAX, f64::MIN), |(low, high), mean| (low.min(mean), high.max(mean)));
        let log_y = low > 0.0 && high / low > 20.0;
        // Below zero a logarithm ends; an error bar may.
        let y = Axis::over(
            ends.map(|end| end.clamp(if log_y { least.max(low / 2.0) } else { least }, most)),
            log_y,
            (BOTTOM, TOP),
        );
        let mut svg = open(&self.title);
        frame(&mut svg, &x, &y, &self.x_label, &self.y_label);
        // A hash of the text: two plots of a page must not share a name.
        let clip = self.title.bytes().fold(7u64, |sum, byte| sum.wrapping_mul(131).wrapping_add(byte.into()));
        let _ = write!(
            svg,
            "<clipPath id=\"c{clip}\"><rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{:.1}\"/></clipPath>",
            right - LEFT,
            BOTTOM - TOP
        );
        let names = self.label_positions(&y);
        for (series, name_y) in self.series.iter().zip(names) {
            self.draw_series(&mut svg, series, &x, &y, name_y, clip);
        }
        svg + "</svg>"
    }

    fn label_positions(&self, y: &Axis) -> Vec<f64> {
        let end = |series: &Series| series.points.last().map_or(TOP, |last| y.at(last.mean).clamp(TOP, BOTTOM));
        let ends: Vec<f64> = self.series.iter().map(end).collect();
        spread(&ends, LINE, TOP + 4.0, BOTTOM)
    }

    fn draw_series(&self, svg: &mut String, series: &Series, x: &Axis, y: &Axis, name_y: f64, clip: u64) {
        let Some(last) = series.points.last() else { return };
        let _ = write!(svg, "<g class=\"series {}\"><title>{}</title>", class(series.colour), escape(&series.note));
        let _ = write!(svg, "<g clip-path=\"url(#c{clip})\">");
        let spread: Vec<(f64, f64, f64)> = series
            .points
            .iter()
            .filter_map(|point| {
                let error = point.error?;
                Some((x.at(point.x), y.at(point.mean - error), y.at(point.mean + error)))
            })
            .collect();
        if spread.len() > 1 {
            let _ = write!(svg, "<path class=\"band\" d=\"{}\"/>", band(&spread));
        }
        let path = line(series.points.iter().map(|point| (x.at(point.x), y.at(point.mean))));
        let _ = write!(svg, "<path class=\"line\" d=\"{path}\"/>");
        if self.marks || series.points.len() == 1 {
            for point in &series.points {
                self.mark(svg, series, point, x, y);
            }
        }
        svg.push_str("</g>");
        let (end_x, end_y) = (x.at(last.x), y.at(last.mean).clamp(TOP, BOTTOM));
        let name_x = x.to + 14.0;
        let _ = write!(
            svg,
            "<path class=\"leader\" d=\"M{end_x:.1} {end_y:.1}L{:.1} {name_y:.1}\"/>\
             <text class=\"name\" x=\"{name_x:.1}\" y=\"{:.1}\">{}</text></g>",
            name_x - 3.0,
            name_y + 4.0,
            escape(&shortened(&series.name))
        );
    }

    fn mark(&self, svg: &mut String, series: &Series, point: &CurvePoint, x: &Axis, y: &Axis) {
        let error = point.error.map(|error| format!(" ± {}", short(error))).unwrap_or_default();
        let _ = write!(
            svg,
            "<circle class=\"point\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"><title>{}, {} {}: {:.4}{error}</title></circle>",
            x.at(point.x),
            y.at(point.mean),
            escape(&series.name),
            escape(&self.x_label),
            short(point.x),
            point.mean
        );
    }
}

/// Class of the style sheet for the number of a colour.
pub(super) fn class(colour: usize) -> String {
    let dashes = ["", " dash", " dots"][(colour / COLOURS) % 3];
    format!("s{}{dashes}", colour % COLOURS)
}

/// A name that fits beside a plot.
pub(super) fn shortened(name: &str) -> String {
    match name.chars().count() > 26 {
        true => name.chars().take(25).chain(['…']).collect(),
        false => name.to_owned(),
    }
}

/// Begins a picture.
pub(super) fn open(title: &str) -> String {
    let title = escape(title);
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\" xmlns=\"http://www.w3.org/2000/svg\">"
    )
}

/// Grid lines, ticks and the names of the axes.
pub(super) fn frame(svg: &mut String, x: &Axis, y: &Axis, x_label: &str, y_label: &str) {
    let right = x.to;
    svg.push_str("<g class=\"axes\">");
    for (value, text) in y.ticks(5) {
        let at = y.at(value);
        let _ = write!(
            svg,
            "<path class=\"grid\" d=\"M{LEFT} {at:.1}L{right:.1} {at:.1}\"/><text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" \
             text-anchor=\"end\">{text}</text>",
            LEFT - 7.0,
            at + 4.0
        );
    }
    for (value, text) in x.ticks(6) {
        let at = x.at(value);
        let _ = write!(
            svg,
            "<path class=\"mark\" d=\"M{at:.1} {BOTTOM}L{at:.1} {:.1}\"/><text class=\"tick\" x=\"{at:.1}\" y=\"{:.1}\" \
             text-anchor=\"middle\">{text}</text>",
            BOTTOM + 5.0,
            BOTTOM + 19.0
        );
    }
    let _ = write!(
        svg,
        "<path class=\"mark\" d=\"M{LEFT} {BOTTOM}L{right:.1} {BOTTOM}\"/>\
         <text class=\"axis\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
         <text class=\"axis\" transform=\"translate(14 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text></g>",
        (LEFT + right) / 2.0,
        HEIGHT - 8.0,
        escape(x_label),
        (TOP + BOTTOM) / 2.0,
        escape(y_label)
    );
}

#[cfg(test)]
#[path = "charts_tests.rs"]
mod tests;
