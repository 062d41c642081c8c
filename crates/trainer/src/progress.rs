//! What is seen while a run goes on: a bar on a terminal, log lines elsewhere, all on standard error.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle as BarStyle};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::config::ProgressStyle;
use crate::metrics::{EvalLine, Line, SummaryLine, TrainLine};

/// All bars of the process. Log lines are written through it, so that they appear above the bars.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Sends log lines to standard error without breaking a bar. Shows what this program says from `info` on (with `verbose`,
/// from `debug` on) and warnings of the libraries; the environment variable `RUST_LOG` says it in detail. A second call
/// changes nothing.
pub fn init_logging(verbose: bool) {
    let level = if verbose { "debug" } else { "info" };
    let directives = ["lowrank_train", "lowrank_models", "lowrank_core", "lowrank_kernels"]
        .iter()
        .fold("warn".to_owned(), |list, target| format!("{list},{target}={level}"));
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(directives));
    let terminal = std::io::stderr().is_terminal();
    let logger =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(AboveBars).with_target(false).with_ansi(terminal);
    // Fails only if a logger is there already. On a terminal the bar shows the time.
    let _ = if terminal { logger.without_time().try_init() } else { logger.try_init() };
}

#[derive(Clone, Copy)]
struct AboveBars;

impl Write for AboveBars {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        BARS.suspend(|| std::io::stderr().write_all(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

impl<'a> MakeWriter<'a> for AboveBars {
    type Writer = AboveBars;

    fn make_writer(&'a self) -> AboveBars {
        AboveBars
    }
}

/// How progress is shown here and now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shown {
    Bar,
    Lines,
    Nothing,
}

fn shown(style: ProgressStyle) -> Shown {
    match style {
        ProgressStyle::Auto if std::io::stderr().is_terminal() => Shown::Bar,
        ProgressStyle::Auto | ProgressStyle::Plain => Shown::Lines,
        ProgressStyle::Bar => Shown::Bar,
        ProgressStyle::None => Shown::Nothing,
    }
}

/// Progress of a training run.
#[derive(Debug)]
pub struct Progress {
    shown: Shown,
    bar: ProgressBar,
    total: u64,
    done_before: u64,
    started: Instant,
}

impl Progress {
    /// Starts to show a run of `total` steps of which `done` were made before it was resumed.
    pub fn start(style: ProgressStyle, total: u64, done: u64) -> Self {
        let shown = shown(style);
        let bar = if shown == Shown::Bar { BARS.add(ProgressBar::new(total)) } else { ProgressBar::hidden() };
        bar.set_style(template("{bar:24} {pos}/{len} {wide_msg}"));
        bar.set_position(done);
        Self { shown, bar, total, done_before: done, started: Instant::now() }
    }

    /// A step is done. Cheap: to be called after every step.
    pub fn advance(&self, step: u64) {
        self.bar.set_position(step);
    }

    /// Shows a line of the metrics: a step in the bar or as a log line, an evaluation and the summary as a log line.
    pub fn record(&self, line: &Line) {
        match (self.shown, line) {
            (Shown::Nothing, _) => {}
            (Shown::Bar, Line::Train(train)) => {
                self.bar.set_position(train.step);
                self.bar.set_message(self.step_text(train));
            }
            (Shown::Lines, Line::Train(train)) => {
                tracing::info!("step {}/{} {}", train.step, self.total, self.step_text(train));
            }
            (_, Line::Eval(eval)) => tracing::info!("{}", eval_text(eval)),
            (_, Line::Summary(summary)) => tracing::info!("{}", summary_text(summary)),
        }
    }

    /// Takes the bar away.
    pub fn finish(self) {
        self.bar.finish_and_clear();
        BARS.remove(&self.bar);
    }

    fn step_text(&self, line: &TrainLine) -> String {
        let left = time_left(self.started.elapsed(), line.step.saturating_sub(self.done_before), self.total, line.step);
        train_text(line, left)
    }
}

/// Time for the rest of the steps at the mean speed since the start.
fn time_left(elapsed: Duration, steps_made: u64, total: u64, step: u64) -> Duration {
    if steps_made == 0 {
        return Duration::ZERO;
    }
    let seconds = elapsed.as_secs_f64() / steps_made as f64 * total.saturating_sub(step) as f64;
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

fn train_text(line: &TrainLine, left: Duration) -> String {
    format!(
        "| loss {:.4} | grad norm {:.3} | lr {:.2e} | {:.0} tok/s | {} | {} left",
        line.loss,
        line.grad_norm,
        line.learning_rate,
        line.tokens_per_second,
        bytes_text(line.memory_bytes),
        duration_text(left)
    )
}

fn eval_text(line: &EvalLine) -> String {
    let mut text = format!("eval at step {} | loss {:.4}", line.step, line.loss);
    if let Some(perplexity) = line.perplexity {
        text.push_str(&format!(" | perplexity {perplexity:.3}"));
    }
    text + &scores_text(line.exact_match, &line.scores)
}

fn scores_text(exact_match: Option<f64>, scores: &BTreeMap<String, f64>) -> String {
    let mut text = exact_match.map_or(String::new(), |share| format!(" | exact match {:.1} %", 100.0 * share));
    for (name, score) in scores {
        text.push_str(&format!(" | {} {score:.4}", name.replace('_', " ")));
    }
    text
}

fn summary_text(line: &SummaryLine) -> String {
    let mut text = format!("done after {} steps | train loss {:.4}", line.step, line.train_loss);
    if let Some(loss) = line.eval_loss {
        text.push_str(&format!(" | eval loss {loss:.4}"));
    }
    text.push_str(&scores_text(line.exact_match, &line.scores));
    let wall = Duration::try_from_secs_f64(line.wall_seconds).unwrap_or_default();
    text.push_str(&format!(" | peak {} | {}", bytes_text(line.peak_memory_bytes), duration_text(wall)));
    text
}

/// A number of bytes with a binary unit: `1.50 GiB`.
pub fn bytes_text(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.2} {}", UNITS[unit]) }
}

/// A duration in its two largest units: `2h 05m`, `3m 20s`, `45s`.
pub fn duration_text(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d {:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// A long piece of work before or after the steps, such as loading weights or tokenising: a spinner or a bar on a
/// terminal, a log line at its start and end elsewhere.
#[derive(Debug)]
pub struct Phase {
    label: String,
    shown: Shown,
    bar: ProgressBar,
    started: Instant,
}

impl Phase {
    /// Shows that the work has begun. The label names it as in `loading 272 tensors`.
    pub fn start(style: ProgressStyle, label: impl Into<String>) -> Self {
        let (label, shown) = (label.into(), shown(style));
        let bar = if shown == Shown::Bar { BARS.add(ProgressBar::no_length()) } else { ProgressBar::hidden() };
        bar.set_style(template("{spinner} {msg} {elapsed}"));
        bar.set_message(label.clone());
        if shown == Shown::Bar {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        if shown == Shown::Lines {
            tracing::info!("{label} ...");
        }
        Self { label, shown, bar, started: Instant::now() }
    }

    /// Shows how much is done. May be called often and from any thread.
    pub fn update(&self, done: u64, total: u64) {
        if self.bar.length() != Some(total) {
            self.bar.set_length(total);
            self.bar.set_style(template("{spinner} {msg} {bar:24} {pos}/{len} {eta}"));
        }
        self.bar.set_position(done);
    }

    /// Takes the bar or spinner away without a word.
    pub fn clear(self) {
        self.bar.finish_and_clear();
        BARS.remove(&self.bar);
    }

    /// The work is done; logs how long it took.
    pub fn finish(self) {
        let seconds = self.started.elapsed().as_secs_f64();
        self.bar.finish_and_clear();
        BARS.remove(&self.bar);
        if self.shown != Shown::Nothing {
            tracing::info!("{}: {seconds:.1} s", self.label);
        }
    }
}

fn template(text: &str) -> BarStyle {
    // Only a template with a mistake in it fails, and the test below builds them all.
    BarStyle::with_template(text).unwrap_or_else(|_| BarStyle::default_bar())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn train() -> TrainLine {
        TrainLine {
            step: 10,
            epoch: 0.1,
            loss: 2.34567,
            grad_norm: 1.5,
            learning_rate: 2e-4,
            tokens: 5120,
            tokens_per_second: 512.4,
            step_ms: 1000.0,
            host_ms: None,
            launches: None,
            loss_scale: None,
            skipped_steps: None,
            memory_bytes: 3 << 29,
            tensor_bytes: None,
            gradient_bytes: 0,
            optimizer_bytes: 0,
            subspace: None,
        }
    }

    #[test]
    fn a_step_as_text() {
        let left = time_left(Duration::from_secs(20), 10, 200, 10);
        assert_eq!(
            train_text(&train(), left),
            "| loss 2.3457 | grad norm 1.500 | lr 2.00e-4 | 512 tok/s | 1.50 GiB | 6m 20s left"
        );
        let mut bad = train();
        bad.loss = f64::NAN;
        assert!(train_text(&bad, left).starts_with("| loss NaN |"));
    }

    #[test]
    fn an_evaluation_and_a_summary_as_text() {
        let eval = EvalLine {
            step: 50,
            loss: 0.5,
            perplexity: Some(1.6487),
            tokens: 10,
            exact_match: Some(0.925),
            exact_match_samples: Some(200),
            scores: BTreeMap::new(),
            seconds: 2.0,
        };
        assert_eq!(eval_text(&eval), "eval at step 50 | loss 0.5000 | perplexity 1.649 | exact match 92.5 %");
        let summary = SummaryLine {
            step: 200,
            ended_by: "max_steps".to_owned(),
            train_loss: 0.25,
            eval_loss: Some(0.5),
            best_eval_loss: None,
            best_step: None,
            exact_match: None,
            scores: [("matthews_correlation".to_owned(), 0.5)].into(),
            trainable_parameters: 1,
            total_parameters: 2,
            tokens: 3,
            peak_memory_bytes: 1 << 20,
            predicted_peak_memory_bytes: None,
            measured_memory_bytes: BTreeMap::new(),
            predicted_memory_bytes: BTreeMap::new(),
            wall_seconds: 3725.0,
        };
        assert_eq!(
            summary_text(&summary),
            "done after 200 steps | train loss 0.2500 | eval loss 0.5000 | matthews correlation 0.5000 | peak 1.00 MiB | 1h 02m"
        );
    }

    #[test]
    fn sizes_and_durations() {
        assert_eq!(["0 B", "1023 B", "1.00 KiB"], [0, 1023, 1024].map(bytes_text).each_ref().map(String::as_str));
        assert_eq!(bytes_text(u64::MAX), "16777216.00 TiB");
        let texts = [0, 59, 60, 3599, 3600, 90_000].map(|seconds| duration_text(Duration::from_secs(seconds)));
        assert_eq!(texts, ["0s", "59s", "1m 00s", "59m 59s", "1h 00m", "1d 01h"]);
    }

    #[test]
    fn time_left_survives_odd_values() {
        assert_eq!(time_left(Duration::from_secs(9), 0, 10, 0), Duration::ZERO);
        assert_eq!(time_left(Duration::from_secs(9), 3, 2, 5), Duration::ZERO);
        assert_eq!(time_left(Duration::MAX, 1, u64::MAX, 1), Duration::MAX);
    }

    #[test]
    fn every_template_is_valid_and_no_style_fails_without_a_terminal() {
        for text in [
            "{bar:24} {pos}/{len} {wide_msg}",
            "{spinner} {msg} {elapsed}",
            "{spinner} {msg} {bar:24} {pos}/{len} {eta}",
        ] {
            BarStyle::with_template(text).unwrap();
        }
        for style in [ProgressStyle::Auto, ProgressStyle::Bar, ProgressStyle::Plain, ProgressStyle::None] {
            let progress = Progress::start(style, 10, 2);
            progress.advance(3);
            progress.record(&Line::Train(train()));
            progress.finish();
            let phase = Phase::start(style, "loading");
            phase.update(1, 2);
            phase.finish();
        }
    }
}
