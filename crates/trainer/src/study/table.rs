//! The table of a report: for the terminal, as Markdown, and as CSV with every run.

use super::read::RunRecord;
use super::report::{Report, Row, path_text, rate_text};
use super::stats::{Place, Summary};
use super::svg::short;
use crate::progress::{bytes_text, duration_text};

/// A column: its head, and what a reader may want to know about it.
pub struct Column {
    /// Text at its top.
    pub head: String,
    /// What it holds, in a sentence.
    pub note: &'static str,
}

/// A field of the table.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Cell {
    /// What is shown.
    pub text: String,
    /// What it is sorted by, where that is a number.
    pub number: Option<f64>,
}

/// The columns of a report.
pub fn columns(report: &Report) -> Vec<Column> {
    let metric = report.metric.label();
    let column = |head: &str, note: &'static str| Column { head: head.to_owned(), note };
    let mut columns = vec![
        column("variant", "Name of the variant"),
        column("rate", "Learning rate; the best of the grid on validation data where there was a grid"),
        column("n", "Number of seeds"),
        Column {
            head: format!("{metric}, validation"), note: "Last evaluation: mean ± standard error over the seeds"
        },
    ];
    if report.on_test {
        columns.push(Column {
            head: format!("{metric}, test"),
            note: "Result on test data: mean ± standard error over the seeds",
        });
    }
    columns.extend([
        column(
            "place",
            "best; tied: within 2 standard errors of the difference to the best; n = 1: nothing is claimed",
        ),
        column("train loss", "Mean of the last tenth of the recorded steps"),
        column("trained", "Trainable parameters"),
        column("peak memory", "Most memory in use, of any seed"),
        column("optimizer", "Bytes of the optimiser's state"),
        column("tokens/s", "Median over the steps"),
        column("step ms", "Median over the steps, the first left out"),
        column("time", "Mean duration of a run"),
        column("tokens", "Tokens trained on, padding not counted"),
    ]);
    columns
}

/// The fields of a row, one for each column.
pub fn cells(report: &Report, row: &Row) -> Vec<Cell> {
    let text = |text: String, number: Option<f64>| Cell { text, number: number.filter(|number| number.is_finite()) };
    let with = |number: Option<f64>, show: &dyn Fn(f64) -> String| match number.filter(|number| number.is_finite()) {
        Some(number) => text(show(number), Some(number)),
        None => text("-".to_owned(), None),
    };
    let score = |summary: &Option<Summary>| match summary {
        Some(summary) => text(report.metric.text(summary.mean, summary.error), Some(summary.mean)),
        None => text("-".to_owned(), None),
    };
    let edge = if row.at_edge { " *" } else { "" };
    let mut cells = vec![
        text(row.variant.name.clone(), None),
        with(row.rate, &|rate| rate_text(rate) + edge),
        with(Some(row.counted().len() as f64), &|count| format!("{count}")),
        score(&row.validation),
    ];
    if report.on_test {
        cells.push(score(&row.test));
    }
    let seconds = |seconds: f64| match seconds < 10.0 {
        true => format!("{seconds:.1}s"),
        false => duration_text(std::time::Duration::try_from_secs_f64(seconds).unwrap_or_default()),
    };
    cells.extend([
        text(place_text(row).to_owned(), row.place.map(|place| place as u8 as f64)),
        with(row.train_loss.map(|loss| loss.mean), &|loss| format!("{loss:.4}")),
        with(row.trainable, &short),
        with(row.peak_bytes, &|bytes| bytes_text(bytes as u64)),
        with(row.optimizer_bytes, &|bytes| bytes_text(bytes as u64)),
        with(row.tokens_per_second, &short),
        with(row.step_ms, &|ms| if ms < 100.0 { format!("{ms:.1}") } else { format!("{ms:.0}") }),
        with(row.wall_seconds, &seconds),
        with(row.tokens, &short),
    ]);
    cells
}

/// The place in words.
pub fn place_text(row: &Row) -> &'static str {
    match row.place {
        Some(Place::Best) if row.counted().len() == 1 => "best, n = 1",
        Some(Place::Best) => "best",
        Some(Place::Tied) => "tied",
        Some(Place::Behind) => "",
        Some(Place::Unknown) => "n = 1",
        None if row.variant.runs.is_empty() => "no run",
        None if row.variant.runs.iter().all(|run| run.finished) => "no score",
        None => "unfinished",
    }
}

/// The table in columns of equal width.
pub fn terminal(report: &Report) -> String {
    let heads: Vec<String> = columns(report).into_iter().map(|column| column.head).collect();
    let rows: Vec<Vec<String>> = report.rows.iter().map(|row| texts(report, row)).collect();
    let lines = || std::iter::once(&heads).chain(&rows);
    let width = |column: usize| lines().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let show = |line: &Vec<String>| {
        let fields = line.iter().zip(&widths).enumerate().map(|(index, (text, &width))| {
            // The name is aligned to the left, everything else to the right.
            if index == 0 { format!("{text:<width$}") } else { format!("{text:>width$}") }
        });
        fields.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let rule = "─".repeat(widths.iter().sum::<usize>() + 2 * (widths.len() - 1)) + "\n";
    let mut text = show(&heads) + &rule;
    text.extend(rows.iter().map(show));
    text
}

fn texts(report: &Report, row: &Row) -> Vec<String> {
    cells(report, row).into_iter().map(|cell| cell.text).collect()
}

/// The whole report as Markdown.
pub fn markdown(report: &Report) -> String {
    let mut text = format!("# {}\n\n", report.title);
    for sentence in &report.intro {
        text += &format!("{sentence}\n");
    }
    if !report.intro.is_empty() {
        text.push('\n');
    }
    for (name, value) in &report.origin {
        text += &format!("- {name}: {value}\n");
    }
    if let Some(verdict) = report.verdict() {
        text += &format!("\nBy {}: {verdict}\n", report.score_label());
    }
    let columns = columns(report);
    let line = |fields: &[String]| {
        let fields: Vec<String> = fields.iter().map(|field| field.replace('|', "\\|")).collect();
        format!("| {} |\n", fields.join(" | "))
    };
    text += "\n";
    text += &line(&columns.iter().map(|column| column.head.clone()).collect::<Vec<_>>());
    let rules = (0..columns.len()).map(|index| if index == 0 { "---" } else { "---:" });
    text += &line(&rules.map(str::to_owned).collect::<Vec<_>>());
    for row in &report.rows {
        text += &line(&texts(report, row));
    }
    text += &notes(report);
    text += &grids(report);
    text
}

/// What a reader must know below the table.
fn notes(report: &Report) -> String {
    let mut text = String::from(
        "\nMean ± standard error over n seeds. Place: tied variants differ from the best by at most 2 standard errors of the \
         difference (Welch). Step time, tokens/s: medians over the steps; peak memory: most of any seed; train loss: mean \
         of the last tenth of the steps. `*`: the best rate is at the edge of its grid.\n",
    );
    if !report.notes.is_empty() {
        text.push('\n');
    }
    for note in &report.notes {
        text += &format!("- {note}\n");
    }
    text
}

/// What every learning rate gave.
fn grids(report: &Report) -> String {
    let searched = || report.rows.iter().filter(|row| row.variant.grid.len() > 1);
    if searched().next().is_none() {
        return String::new();
    }
    let label = report.metric.label();
    let mut text = format!(
        "\n{label} on validation data by learning rate, with the seed of the grid:\n\n| variant | rate: {label} |\n| --- | --- |\n"
    );
    for row in searched() {
        let point = |point: &super::report::GridPoint| match point.value.filter(|value| value.is_finite()) {
            Some(value) => format!("{}: {}", rate_text(point.rate), report.metric.text(value, None)),
            None => format!("{}: failed or not run", rate_text(point.rate)),
        };
        let points: Vec<String> = row.variant.grid.iter().map(point).collect();
        text += &format!("| {} | {} |\n", row.variant.name, points.join("; "));
    }
    text
}

const CSV_HEAD: &str = "row,variant,folder,learning_rate,seed,n,metric,validation,validation_error,test,test_error,place,\
train_loss,trainable_parameters,peak_memory_bytes,optimizer_bytes,tokens_per_second,step_ms,wall_seconds,tokens,steps,finished";

/// One line for every variant and one for every run, with all digits.
pub fn csv(report: &Report) -> String {
    let mut text = format!("{CSV_HEAD}\n");
    for row in &report.rows {
        text += &csv_variant(report, row);
        for run in &row.variant.runs {
            text += &csv_run(report, row, run);
        }
    }
    text
}

fn csv_variant(report: &Report, row: &Row) -> String {
    let mean = |summary: &Option<Summary>| number(summary.map(|summary| summary.mean));
    let error = |summary: &Option<Summary>| number(summary.and_then(|summary| summary.error));
    let counted = row.counted();
    csv_line(&[
        "variant".to_owned(),
        row.variant.name.clone(),
        String::new(),
        number(row.rate),
        String::new(),
        counted.len().to_string(),
        report.metric.name.clone(),
        mean(&row.validation),
        error(&row.validation),
        mean(&row.test),
        error(&row.test),
        place_text(row).to_owned(),
        mean(&row.train_loss),
        number(row.trainable),
        number(row.peak_bytes),
        number(row.optimizer_bytes),
        number(row.tokens_per_second),
        number(row.step_ms),
        number(row.wall_seconds),
        number(row.tokens),
        number(counted.iter().map(|run| run.step as f64).reduce(f64::max)),
        (!counted.is_empty() && row.variant.runs.iter().all(|run| run.finished)).to_string(),
    ])
}

fn csv_run(report: &Report, row: &Row, run: &RunRecord) -> String {
    let whole = |value: Option<u64>| number(value.map(|value| value as f64));
    csv_line(&[
        "run".to_owned(),
        row.variant.name.clone(),
        path_text(&run.folder),
        number(run.learning_rate()),
        run.seed().map(|seed| seed.to_string()).unwrap_or_default(),
        "1".to_owned(),
        report.metric.name.clone(),
        number(run.validation(report.metric.key())),
        String::new(),
        number(run.test.as_ref().and_then(|scores| scores.get(report.metric.key()).copied())),
        String::new(),
        String::new(),
        number(run.train_loss()),
        whole(run.trainable),
        whole(run.peak_bytes),
        whole(run.optimizer_bytes),
        number(run.tokens_per_second),
        number(run.step_ms),
        number(run.wall_seconds),
        run.tokens.to_string(),
        run.step.to_string(),
        run.finished.to_string(),
    ])
}

fn number(value: Option<f64>) -> String {
    value.filter(|value| value.is_finite()).map(|value| value.to_string()).unwrap_or_default()
}

fn csv_line(fields: &[String]) -> String {
    let field = |field: &String| match field.contains([',', '"', '\n']) {
        true => format!("\"{}\"", field.replace('"', "\"\"")),
        false => field.clone(),
    };
    fields.iter().map(field).collect::<Vec<_>>().join(",") + "\n"
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
