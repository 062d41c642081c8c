//! The report as one HTML file that needs nothing else: style, plots and the sorting of the table are inside.

use std::fmt::Write;

use super::charts::{Curves, Series};
use super::metric::Metric;
use super::pareto::{Pareto, Spot};
use super::read::RunRecord;
use super::report::{Report, Row, path_text, rate_text};
use super::stats::{self, CurvePoint};
use super::svg::{escape, short};
use super::table::{Cell, cells, columns, place_text};

const STYLE: &str = include_str!("report.css");
const SCRIPT: &str = include_str!("report.js");
/// A curve is drawn with at most about this many points.
const POINTS: usize = 150;

/// The whole page.
pub fn page(report: &Report) -> String {
    let title = escape(&report.title);
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n\
         <body>\n<main>\n<h1>{title}</h1>\n"
    );
    if !report.intro.is_empty() {
        let _ = writeln!(page, "<p class=\"intro\">{}</p>", escape(&report.intro.join(" ")));
    }
    if let Some(verdict) = report.verdict() {
        let score = report.score_label();
        let _ = writeln!(page, "<p class=\"verdict\"><b>By {}:</b> {}</p>", escape(&score), escape(&verdict));
    }
    page += &table(report);
    page += &notes(report);
    page += &plots(report);
    page += &runs(report);
    page += "<footer><dl>";
    for (name, value) in &report.origin {
        let _ = write!(page, "<dt>{}</dt><dd>{}</dd>", escape(name), escape(value));
    }
    let _ = write!(page, "</dl></footer>\n</main>\n<script>\n{SCRIPT}</script>\n</body>\n</html>\n");
    page
}

/// Number of a variant's colour: that of its row.
fn colour_class(index: usize) -> String {
    format!("s{}", index % super::charts::COLOURS)
}

fn table(report: &Report) -> String {
    let mut text = String::from("<div class=\"scroll\"><table class=\"sortable\">\n<thead><tr>");
    for column in columns(report) {
        let (head, note) = (escape(&column.head), escape(column.note));
        let _ = write!(text, "<th scope=\"col\" title=\"{note}\"><button type=\"button\">{head}</button></th>");
    }
    text += "</tr></thead>\n<tbody>\n";
    for (index, row) in report.rows.iter().enumerate() {
        let place = place_text(row);
        let kind = if matches!(place, "best" | "tied") { place } else { "plain" };
        let _ = write!(text, "<tr class=\"{kind}\">");
        for (column, cell) in cells(report, row).iter().enumerate() {
            text += &table_cell(cell, column == 0, index);
        }
        text += "</tr>\n";
    }
    text + "</tbody></table></div>\n"
}

fn table_cell(cell: &Cell, is_name: bool, index: usize) -> String {
    let shown = escape(&cell.text);
    let sort = cell.number.map(|number| format!(" data-sort=\"{number}\"")).unwrap_or_default();
    match is_name {
        true => format!("<th scope=\"row\"><i class=\"key {}\"></i>{shown}</th>", colour_class(index)),
        false => format!("<td{sort}>{shown}</td>"),
    }
}

fn notes(report: &Report) -> String {
    let mut text = String::from(
        "<p class=\"small\">Mean ± standard error over n seeds. Tied: the difference to the best is at most 2 standard errors of \
         that difference (Welch); a single run has no error and nothing is claimed of it. Step time and tokens/s are medians \
         over the steps, peak memory is the most of any seed, train loss the mean of the last tenth of the steps. \
         <b>*</b>: the best rate is at the edge of its grid. Click a head to sort.</p>\n",
    );
    if !report.notes.is_empty() {
        text += "<ul class=\"notes\">";
        for note in &report.notes {
            let _ = write!(text, "<li>{}</li>", escape(note));
        }
        text += "</ul>\n";
    }
    text
}

fn plots(report: &Report) -> String {
    let mut text = String::from("<div class=\"plots\">\n");
    for (curves, caption) in curve_plots(report) {
        text += &figure(&curves.title, &caption, &curves.svg());
    }
    for pareto in pareto_plots(report) {
        let caption = "Filled: no other variant is both cheaper and better; the dashed line is what a given cost buys. \
                       Bars: ± standard error.";
        text += &figure(&pareto.title, caption, &pareto.svg());
    }
    text + "</div>\n"
}

fn figure(title: &str, caption: &str, svg: &str) -> String {
    format!("<figure><h2>{}</h2>{svg}<figcaption>{}</figcaption></figure>\n", escape(title), escape(caption))
}

/// Training loss, its second half, the metric over the steps, and the search for the rate.
fn curve_plots(report: &Report) -> Vec<(Curves, String)> {
    let longest = report.rows.iter().flat_map(|row| row.counted()).map(|run| run.train.len()).max().unwrap_or(0);
    let width = (longest / 30) | 1; // a thirtieth of the course, and as much before a point as behind it
    let train = |row: &Row| mean_curve(row, &|run| stats::smooth(&run.train, width));
    let smoothed = if width > 1 { format!(", averaged over {width} recorded steps") } else { String::new() };
    let spread = "Mean over the seeds, band ± standard error";
    let steps = |title: &str, y_label: &str, series: Vec<Series>| Curves {
        title: title.to_owned(),
        x_label: "step".to_owned(),
        y_label: y_label.to_owned(),
        log_x: false,
        marks: false,
        y_limits: (f64::NEG_INFINITY, f64::INFINITY),
        series,
    };
    let mut plots = vec![];
    let whole = series(report, &train);
    let last = whole.iter().filter_map(|series| Some(series.points.last()?.x)).fold(0.0, f64::max);
    let late = series(report, &|row| train(row).into_iter().filter(|point| point.x >= last / 2.0).collect());
    plots.push((steps("Training loss", "loss", whole), format!("{spread}{smoothed}.")));
    let mut late = steps("Training loss, second half", "loss", late);
    late.y_limits =
        without_outliers(late.series.iter().flat_map(|series| &series.points).map(|point| point.mean), false);
    plots.push((late, format!("{spread}{smoothed}. What diverged may lie outside.")));
    let metric = &report.metric;
    let over_steps = |row: &Row| mean_curve(row, &|run| shown_series(metric, run));
    let mut evals = steps(
        &format!("{} on validation data", capital(&metric.label())),
        &metric.label(),
        series(report, &over_steps),
    );
    evals.marks = true;
    plots.push((evals, format!("{spread}.")));
    plots.extend(grid_plot(report));
    plots.retain(|(plot, _)| plot.series.iter().any(|series| series.points.len() > 1));
    plots
}

fn shown_series(metric: &Metric, run: &RunRecord) -> Vec<(u64, f64)> {
    run.eval_series(metric.key()).into_iter().map(|(step, value)| (step, metric.shown(value))).collect()
}

fn mean_curve(row: &Row, of: &dyn Fn(&RunRecord) -> Vec<(u64, f64)>) -> Vec<CurvePoint> {
    let runs: Vec<Vec<(u64, f64)>> = row.counted().into_iter().map(of).collect();
    let curve = stats::mean_curve(&runs);
    let every = curve.len().div_ceil(POINTS).max(1);
    let last = curve.len().saturating_sub(1);
    curve
        .into_iter()
        .enumerate()
        .filter(|(index, _)| index % every == 0 || *index == last)
        .map(|(_, point)| point)
        .collect()
}

/// One series for each row that has points.
fn series(report: &Report, of: &dyn Fn(&Row) -> Vec<CurvePoint>) -> Vec<Series> {
    let rows = report.rows.iter().enumerate();
    let all = rows.map(|(colour, row)| Series {
        name: row.variant.name.clone(),
        colour,
        note: note(report, row),
        points: of(row),
    });
    all.filter(|series| !series.points.is_empty()).collect()
}

/// What a pointer that rests on a variant is told.
fn note(report: &Report, row: &Row) -> String {
    let mut note = row.variant.name.clone();
    if let Some(score) = row.score(report.on_test) {
        let _ = write!(note, ": {} {}", report.score_label(), report.metric.text(score.mean, score.error));
    }
    let _ = write!(note, ", n = {}", row.counted().len());
    if let Some(rate) = row.rate {
        let _ = write!(note, ", rate {}", rate_text(rate));
    }
    if let Some(trainable) = row.trainable {
        let _ = write!(note, ", {} parameters", short(trainable));
    }
    note
}

/// Limits that keep what is near the best values: those far off would press all others together.
fn without_outliers(values: impl Iterator<Item = f64>, higher: bool) -> (f64, f64) {
    let mut sorted: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let (Some(&low), Some(&high), Some(middle)) = (sorted.first(), sorted.last(), stats::median(&sorted)) else {
        return (f64::NEG_INFINITY, f64::INFINITY);
    };
    match higher {
        true => (low.max(high - 3.0 * (high - middle)), high),
        false => (low, high.min(low + 3.0 * (middle - low))),
    }
}

fn grid_plot(report: &Report) -> Option<(Curves, String)> {
    let metric = &report.metric;
    let points = |row: &Row| -> Vec<CurvePoint> {
        let searched: &[_] = if row.variant.grid.len() > 1 { &row.variant.grid } else { &[] };
        let known =
            searched.iter().filter_map(|point| Some((point.rate, point.value.filter(|value| value.is_finite())?)));
        known.map(|(x, value)| CurvePoint { x, mean: metric.shown(value), error: None }).collect()
    };
    let mut series = series(report, &points);
    series.iter_mut().for_each(|series| series.points.sort_by(|a, b| a.x.total_cmp(&b.x)));
    if series.is_empty() {
        return None;
    }
    let values = series.iter().flat_map(|series| &series.points).map(|point| point.mean);
    let y_limits = without_outliers(values, metric.higher);
    let plot = Curves {
        title: "Search for the learning rate".to_owned(),
        x_label: "learning rate".to_owned(),
        y_label: format!("{}, validation", metric.label()),
        log_x: true,
        marks: true,
        y_limits,
        series,
    };
    Some((plot, "One seed for each rate. Values far off are cut; report.md has them all.".to_owned()))
}

fn pareto_plots(report: &Report) -> Vec<Pareto> {
    let quality = capital(&report.metric.label());
    let mebibytes = |bytes: Option<f64>| bytes.map(|bytes| bytes / (1 << 20) as f64);
    let costs: [(&str, &str, bool, &dyn Fn(&Row) -> Option<f64>); 3] = [
        ("trainable parameters", "trainable parameters", true, &|row| row.trainable),
        ("peak memory", "peak memory (MiB)", false, &|row| mebibytes(row.peak_bytes)),
        ("time per step", "time per step (ms)", false, &|row| row.step_ms),
    ];
    costs
        .into_iter()
        .map(|(name, x_label, log_x, cost)| {
            let spots = report.rows.iter().enumerate().filter_map(|(colour, row)| {
                let score = row.score(report.on_test)?;
                let x = cost(row).filter(|x| x.is_finite() && *x > 0.0)?;
                Some(Spot {
                    name: row.variant.name.clone(),
                    colour,
                    note: format!("{}, {x_label} {}", note(report, row), short(x)),
                    x,
                    y: report.metric.shown(score.mean),
                    error: score.error.map(|error| report.metric.shown(error)),
                })
            });
            let spots: Vec<Spot> = spots.collect();
            let far = |low: f64, high: f64| high > 10.0 * low;
            let range = spots.iter().fold((f64::MAX, 0.0f64), |(low, high), spot| (low.min(spot.x), high.max(spot.x)));
            Pareto {
                title: format!("{quality} and {name}"),
                x_label: x_label.to_owned(),
                y_label: report.score_label(),
                log_x: log_x || far(range.0, range.1),
                higher: report.metric.higher,
                spots,
            }
        })
        .filter(|plot| plot.spots.len() > 1)
        .collect()
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

/// Every run with its folder, closed at first.
fn runs(report: &Report) -> String {
    let count: usize = report.rows.iter().map(|row| row.variant.runs.len()).sum();
    let mut text = format!(
        "<details><summary>All {count} runs of the table</summary><div class=\"scroll\"><table>\n<thead><tr><th scope=\"col\">variant</th>\
         <th scope=\"col\">seed</th><th scope=\"col\">rate</th><th scope=\"col\">validation</th><th scope=\"col\">test</th>\
         <th scope=\"col\">steps</th><th scope=\"col\">folder</th></tr></thead>\n<tbody>\n"
    );
    let key = report.metric.key();
    let shown = |value: Option<f64>| match value.filter(|value| value.is_finite()) {
        Some(value) => report.metric.text(value, None),
        None => "-".to_owned(),
    };
    for row in &report.rows {
        for run in &row.variant.runs {
            let _ = writeln!(
                text,
                "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}{}</td><td class=\"path\">{}</td></tr>",
                escape(&row.variant.name),
                run.seed().map(|seed| seed.to_string()).unwrap_or_default(),
                run.learning_rate().map(rate_text).unwrap_or_default(),
                shown(run.validation(key)),
                shown(run.test.as_ref().and_then(|scores| scores.get(key).copied())),
                run.step,
                if run.finished { "" } else { " (unfinished)" },
                escape(&path_text(&run.folder))
            );
        }
    }
    text + "</tbody></table></div></details>\n"
}

#[cfg(test)]
#[path = "html_tests.rs"]
mod tests;
