//! From runs to the rows of a report: one row for each variant, with the runs of its learning rate.

use std::collections::BTreeSet;
use std::path::Path;

use super::metric::Metric;
use super::read::RunRecord;
use super::stats::{self, Place, Summary};

/// Tokens of two variants may differ by this share before the report says so.
const EQUAL: f64 = 0.01;

/// A learning rate of a grid and what it gave on validation data; none if it failed or has not run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GridPoint {
    /// The rate.
    pub rate: f64,
    /// The metric on validation data, with the seed of the grid.
    pub value: Option<f64>,
}

/// A variant before it is summed up.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Variant {
    /// Its name.
    pub name: String,
    /// The grid of learning rates; empty where none was searched.
    pub grid: Vec<GridPoint>,
    /// The runs with the rate that was picked, one for each seed.
    pub runs: Vec<RunRecord>,
    /// What is missing or failed, in words.
    pub remarks: Vec<String>,
}

/// A variant summed up.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The variant, with all its runs.
    pub variant: Variant,
    /// Learning rate of the runs.
    pub rate: Option<f64>,
    /// Whether that rate is the lowest or highest of several, so that a better one may lie outside.
    pub at_edge: bool,
    /// The metric on validation data at the end.
    pub validation: Option<Summary>,
    /// The metric on test data.
    pub test: Option<Summary>,
    /// Mean loss of the last tenth of the recorded training steps.
    pub train_loss: Option<Summary>,
    /// Numbers that were trained.
    pub trainable: Option<f64>,
    /// Largest memory of any run.
    pub peak_bytes: Option<f64>,
    /// Bytes of the optimiser's state.
    pub optimizer_bytes: Option<f64>,
    /// Median over the runs.
    pub tokens_per_second: Option<f64>,
    /// Median over the runs.
    pub step_ms: Option<f64>,
    /// Mean over the runs.
    pub wall_seconds: Option<f64>,
    /// Mean over the runs.
    pub tokens: Option<f64>,
    /// Where it stands; none without a score.
    pub place: Option<Place>,
}

impl Row {
    /// What the variant is judged by: the score on test data, else that on validation data.
    pub fn score(&self, on_test: bool) -> Option<Summary> {
        if on_test { self.test } else { self.validation }
    }

    /// The runs that count: finished ones, or all where none is finished.
    pub fn counted(&self) -> Vec<&RunRecord> {
        counted(&self.variant.runs)
    }
}

fn counted(runs: &[RunRecord]) -> Vec<&RunRecord> {
    let finished: Vec<&RunRecord> = runs.iter().filter(|run| run.finished).collect();
    if finished.is_empty() { runs.iter().collect() } else { finished }
}

/// Everything that the table, the CSV file and the HTML page show.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Name of the study, or `Comparison`.
    pub title: String,
    /// Sentences that say what was done.
    pub intro: Vec<String>,
    /// What is compared.
    pub metric: Metric,
    /// Whether the score is the one on test data.
    pub on_test: bool,
    /// The variants, the best first.
    pub rows: Vec<Row>,
    /// What a reader must know: unequal tokens, failed runs, rates at the edge of their grid.
    pub notes: Vec<String>,
    /// Command, program, device and date.
    pub origin: Vec<(&'static str, String)>,
}

impl Report {
    /// Sums up the variants and sorts them by their score. With `equal_tokens`, a note says where variants were trained on
    /// different amounts.
    pub fn new(title: &str, metric: Metric, on_test: bool, equal_tokens: bool, variants: Vec<Variant>) -> Self {
        let mut rows: Vec<Row> = variants.into_iter().map(|variant| row(variant, &metric)).collect();
        // A run that is under way has no score that could be compared.
        let scores: Vec<Option<Summary>> = rows
            .iter()
            .map(|row| row.score(on_test).filter(|_| row.variant.runs.iter().any(|run| run.finished)))
            .collect();
        for (row, place) in rows.iter_mut().zip(stats::places(&scores, metric.higher)) {
            row.place = place;
        }
        let key = |row: &Row| {
            let mean = row.score(on_test).map_or(f64::INFINITY, |score| score.mean);
            (row.place.is_none(), if metric.higher && mean.is_finite() { -mean } else { mean })
        };
        rows.sort_by(|a, b| {
            let (a, b) = (key(a), key(b));
            a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
        });
        let mut report =
            Self { title: title.to_owned(), intro: vec![], metric, on_test, rows, notes: vec![], origin: vec![] };
        report.origin = report.origin_of_runs();
        report.notes = report.own_notes(equal_tokens);
        report
    }

    /// Where the score comes from, in words: `exact match (%) on test data`.
    pub fn score_label(&self) -> String {
        format!("{} on {} data", self.metric.label(), if self.on_test { "test" } else { "validation" })
    }

    /// The best variant and those that are tied with it, as a sentence; none without a score.
    pub fn verdict(&self) -> Option<String> {
        let named = |place: Place| -> Vec<&str> {
            self.rows.iter().filter(|row| row.place == Some(place)).map(|row| row.variant.name.as_str()).collect()
        };
        let (best, tied) = (named(Place::Best), named(Place::Tied));
        let best = best.first()?;
        let others = self.rows.iter().filter(|row| row.place.is_some()).count() - 1;
        let single = named(Place::Unknown).len();
        Some(match (tied.as_slice(), others) {
            (_, 0) => format!("Only {best} has a score."),
            ([], _) if single == others => {
                format!("{best} has the best mean; single runs have no standard error, so nothing is claimed (n = 1).")
            }
            ([], _) => format!("{best} is best; no other variant is within 2 standard errors of it."),
            (tied, _) => format!(
                "{best} has the best mean; {} {} within 2 standard errors of the difference and cannot be told apart from it.",
                tied.join(", "),
                if tied.len() == 1 { "is" } else { "are" }
            ),
        })
    }

    fn origin_of_runs(&self) -> Vec<(&'static str, String)> {
        let runs = || self.rows.iter().flat_map(|row| &row.variant.runs);
        let distinct = |of: fn(&RunRecord) -> &str| {
            let found: BTreeSet<&str> = runs().map(of).filter(|text| !text.is_empty()).collect();
            found.into_iter().collect::<Vec<_>>().join("; ")
        };
        let list = [("program", distinct(|run| &run.version)), ("device", distinct(|run| &run.device))];
        list.into_iter().filter(|(_, text)| !text.is_empty()).collect()
    }

    fn own_notes(&self, equal_tokens: bool) -> Vec<String> {
        let mut notes = vec![];
        let tokens = || self.rows.iter().filter_map(|row| Some((row.tokens?, row.variant.name.as_str())));
        let least = tokens().min_by(|a, b| a.0.total_cmp(&b.0));
        let most = tokens().max_by(|a, b| a.0.total_cmp(&b.0));
        if let (Some(least), Some(most)) = (least, most)
            && equal_tokens
            && least.0 < (1.0 - EQUAL) * most.0
        {
            notes.push(format!(
                "The variants were not trained on equally many tokens: {} on {:.0}, {} on {:.0}.",
                least.1, least.0, most.1, most.0
            ));
        }
        for row in &self.rows {
            let name = &row.variant.name;
            if row.at_edge
                && let Some(rate) = row.rate
            {
                notes.push(format!(
                    "{name}: the picked rate {} is at the edge of its grid, a better one may lie outside.",
                    rate_text(rate)
                ));
            }
            notes.extend(row.variant.remarks.iter().map(|remark| format!("{name}: {remark}.")));
        }
        notes
    }

    /// The runs of a row as a sentence on how far they are, where they are not all finished.
    pub fn progress_of(row: &Row) -> Option<String> {
        let unfinished: Vec<&RunRecord> = row.variant.runs.iter().filter(|run| !run.finished).collect();
        let last = unfinished.iter().map(|run| run.step).max()?;
        Some(format!("{} of {} runs unfinished, at step {last}", unfinished.len(), row.variant.runs.len()))
    }
}

fn row(variant: Variant, metric: &Metric) -> Row {
    let runs = counted(&variant.runs);
    let values =
        |of: &dyn Fn(&RunRecord) -> Option<f64>| -> Vec<f64> { runs.iter().filter_map(|run| of(run)).collect() };
    let summary = |of: &dyn Fn(&RunRecord) -> Option<f64>| stats::summarise(&values(of));
    let mean = |of: &dyn Fn(&RunRecord) -> Option<f64>| summary(of).map(|summary| summary.mean);
    let most = |of: &dyn Fn(&RunRecord) -> Option<f64>| summary(of).map(|summary| summary.highest);
    let median = |of: &dyn Fn(&RunRecord) -> Option<f64>| stats::median(&values(of)).filter(|value| value.is_finite());
    let rate = runs.first().and_then(|run| run.learning_rate());
    let (lowest, highest) = variant
        .grid
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), point| (low.min(point.rate), high.max(point.rate)));
    let key = metric.key();
    let mut row = Row {
        rate,
        at_edge: lowest < highest && rate.is_some_and(|rate| rate <= lowest || rate >= highest),
        validation: summary(&|run| run.validation(key)),
        test: summary(&|run| run.test.as_ref()?.get(key).copied()),
        train_loss: summary(&|run| run.train_loss()),
        trainable: mean(&|run| run.trainable.map(|count| count as f64)),
        peak_bytes: most(&|run| run.peak_bytes.map(|bytes| bytes as f64)),
        optimizer_bytes: most(&|run| run.optimizer_bytes.map(|bytes| bytes as f64)),
        tokens_per_second: median(&|run| run.tokens_per_second),
        step_ms: median(&|run| run.step_ms),
        wall_seconds: mean(&|run| run.wall_seconds),
        tokens: mean(&|run| Some(run.tokens as f64)),
        place: None,
        variant: Variant::default(),
    };
    row.variant = variant;
    row.variant.remarks.extend(Report::progress_of(&row));
    row
}

/// A learning rate with at most four digits: `2e-4`, `0.01`.
pub fn rate_text(rate: f64) -> String {
    // Through text: only there are decimal digits rounded exactly.
    let rate = format!("{rate:.3e}").parse().unwrap_or(rate);
    if (1e-3..1e5).contains(&rate) { format!("{rate}") } else { format!("{rate:e}") }
}

/// A path as it is shown: with `/`, and without a leading `./`.
pub fn path_text(path: &Path) -> String {
    let text = path.to_string_lossy().replace('\\', "/");
    text.strip_prefix("./").map(str::to_owned).unwrap_or(text)
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
