//! What a run folder tells: `metrics.jsonl`, the resolved `config.toml`, and the scores on test data of a study.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::stats;
use crate::error::Problem;

/// File with the scores on test data, beside `metrics.jsonl`.
pub const TEST_FILE: &str = "test.json";
/// Folders of a run that hold no other runs.
const INNER: [&str; 5] = ["checkpoints", "tensorboard", "adapter", "model", ".git"];
/// Runs are looked for this many folders below the one that was named.
const DEPTH: usize = 6;

/// A run as far as it went.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RunRecord {
    /// Its folder.
    pub folder: PathBuf,
    /// Its resolved configuration; empty where there is none.
    pub config: toml::Table,
    /// Program that made it, with its commit.
    pub version: String,
    /// Device it ran on.
    pub device: String,
    /// Loss of every recorded step.
    pub train: Vec<(u64, f64)>,
    /// What every evaluation measured, by step.
    pub evals: Vec<(u64, BTreeMap<String, f64>)>,
    /// What the result scored on the test data of a study.
    pub test: Option<BTreeMap<String, f64>>,
    /// Last recorded step.
    pub step: u64,
    /// Whether it reached its end.
    pub finished: bool,
    /// Numbers that were trained.
    pub trainable: Option<u64>,
    /// Tokens that were trained on.
    pub tokens: u64,
    /// Largest memory in use.
    pub peak_bytes: Option<u64>,
    /// Bytes of the optimiser's state.
    pub optimizer_bytes: Option<u64>,
    /// Median over the recorded steps.
    pub tokens_per_second: Option<f64>,
    /// Median over the recorded steps.
    pub step_ms: Option<f64>,
    /// Duration; of a resumed run at least that of its steps.
    pub wall_seconds: Option<f64>,
}

impl RunRecord {
    /// The last value of a metric that an evaluation measured.
    pub fn validation(&self, key: &str) -> Option<f64> {
        self.evals.iter().rev().find_map(|(_, values)| values.get(key).copied())
    }

    /// All values of a metric, by step.
    pub fn eval_series(&self, key: &str) -> Vec<(u64, f64)> {
        self.evals.iter().filter_map(|(step, values)| Some((*step, *values.get(key)?))).collect()
    }

    /// Mean loss of the last tenth of the recorded steps: less noisy than the last one alone.
    pub fn train_loss(&self) -> Option<f64> {
        let count = self.train.len().div_ceil(10);
        let last = &self.train[self.train.len() - count..];
        (!last.is_empty()).then(|| last.iter().map(|(_, loss)| loss).sum::<f64>() / count as f64)
    }

    /// Seed of the configuration.
    pub fn seed(&self) -> Option<i64> {
        self.config.get("seed")?.as_integer()
    }

    /// Learning rate of the optimiser in the configuration.
    pub fn learning_rate(&self) -> Option<f64> {
        let (_, method) = self.config.get("optimizer")?.as_table()?.iter().next()?;
        let rate = method.get("learning_rate")?;
        rate.as_float().or_else(|| rate.as_integer().map(|rate| rate as f64))
    }
}

/// Reads the run in a folder.
///
/// # Errors
/// `metrics.jsonl` or `config.toml` is there but cannot be read. Lines that are no JSON are left out with a warning.
pub fn read(folder: &Path) -> Result<RunRecord, Problem> {
    let mut run = RunRecord { folder: folder.to_owned(), ..RunRecord::default() };
    if let Some(text) = read_if_there(&folder.join("config.toml"))? {
        run.version = header(&text, "# lowrank-train ");
        run.device = header(&text, "# device: ");
        run.config = toml::from_str(&text).map_err(|error| {
            Problem::run(format!("{} is not valid TOML", folder.join("config.toml").display())).source(error)
        })?;
    }
    if let Some(text) = read_if_there(&folder.join("metrics.jsonl"))? {
        read_metrics(&text, &mut run);
    }
    run.test = test_score(folder)?.and_then(|score| score.scores.ok());
    Ok(run)
}

/// A score on test data that a study wrote down.
#[derive(Debug, Clone, PartialEq)]
pub struct TestScore {
    /// The data, as a list of paths.
    pub data: Value,
    /// What was measured, or why nothing could be.
    pub scores: Result<BTreeMap<String, f64>, String>,
}

/// The score of a run on test data, where a study wrote one.
///
/// # Errors
/// The file is there but cannot be read.
pub fn test_score(folder: &Path) -> Result<Option<TestScore>, Problem> {
    let path = folder.join(TEST_FILE);
    let Some(text) = read_if_there(&path)? else { return Ok(None) };
    let value: Value = serde_json::from_str(&text)
        .map_err(|error| Problem::run(format!("{} is not valid JSON", path.display())).source(error))?;
    let reason = || value.get("failed").and_then(Value::as_str).unwrap_or("for an unknown reason").to_owned();
    let scores = value.get("scores").and_then(Value::as_object).map(numbers).ok_or_else(reason);
    Ok(Some(TestScore { data: value.get("data").cloned().unwrap_or_default(), scores }))
}

fn read_if_there(path: &Path) -> Result<Option<String>, Problem> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Problem::run(format!("cannot read {}", path.display())).source(error)),
    }
}

/// The rest of the first line that begins like this.
fn header(text: &str, begin: &str) -> String {
    text.lines().find_map(|line| line.strip_prefix(begin)).unwrap_or_default().to_owned()
}

fn read_metrics(text: &str, run: &mut RunRecord) {
    let (mut step_ms, mut speeds, mut memory) = (vec![], vec![], 0);
    let last = text.lines().count();
    for (index, line) in text.lines().enumerate() {
        let Ok(Value::Object(line)) = serde_json::from_str::<Value>(line) else {
            // A run that goes on right now may be in the middle of its last line.
            if index + 1 < last {
                let path = run.folder.join("metrics.jsonl");
                tracing::warn!("{}, line {}: left out, it is not a JSON object", path.display(), index + 1);
            }
            continue;
        };
        let step = whole(&line, "step").unwrap_or(0);
        run.step = run.step.max(step);
        match line.get("kind").and_then(Value::as_str) {
            Some("train") => {
                run.train.push((step, number(&line, "loss")));
                run.tokens = whole(&line, "tokens").unwrap_or(run.tokens);
                run.optimizer_bytes = whole(&line, "optimizer_bytes").or(run.optimizer_bytes);
                memory = memory.max(whole(&line, "memory_bytes").unwrap_or(0));
                step_ms.push(number(&line, "step_ms"));
                speeds.push(number(&line, "tokens_per_second"));
            }
            Some("eval") => run.evals.push((step, numbers(&line))),
            Some("summary") => {
                run.finished = true;
                run.trainable = whole(&line, "trainable_parameters");
                run.tokens = whole(&line, "tokens").unwrap_or(run.tokens);
                memory = memory.max(whole(&line, "peak_memory_bytes").unwrap_or(0));
                run.wall_seconds = Some(number(&line, "wall_seconds"));
            }
            _ => {}
        }
    }
    run.peak_bytes = (memory > 0).then_some(memory);
    run.step_ms = stats::median(warm(&step_ms));
    run.tokens_per_second = stats::median(warm(&speeds));
    let mean_ms = step_ms.iter().sum::<f64>() / step_ms.len().max(1) as f64;
    let of_steps = mean_ms * run.step as f64 / 1e3;
    run.wall_seconds = run.wall_seconds.map(|wall| wall.max(of_steps)).or((of_steps > 0.0).then_some(of_steps));
}

/// All but the first, which warms up; the first if it is the only one.
fn warm(values: &[f64]) -> &[f64] {
    if values.len() > 1 { &values[1..] } else { values }
}

/// A number of a line; NaN where it is null because it is not finite, or missing.
fn number(line: &Map<String, Value>, key: &str) -> f64 {
    line.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN)
}

fn whole(line: &Map<String, Value>, key: &str) -> Option<u64> {
    line.get(key).and_then(Value::as_u64)
}

/// Every number of an object, and as NaN what is null.
fn numbers(object: &Map<String, Value>) -> BTreeMap<String, f64> {
    let value = |value: &Value| if value.is_null() { Some(f64::NAN) } else { value.as_f64() };
    object.iter().filter_map(|(key, found)| Some((key.clone(), value(found)?))).collect()
}

/// The run folders at or below a folder, sorted.
///
/// # Errors
/// A folder cannot be listed.
pub fn run_folders(folder: &Path) -> Result<Vec<PathBuf>, Problem> {
    let mut found = vec![];
    search(folder, DEPTH, &mut found)?;
    found.sort();
    Ok(found)
}

fn search(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<(), Problem> {
    if folder.join("metrics.jsonl").is_file() {
        found.push(folder.to_owned());
        return Ok(());
    }
    if depth == 0 {
        return Ok(());
    }
    let unreadable = |error| Problem::run(format!("cannot list {}", folder.display())).source(error);
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let is_inner = path.file_name().is_some_and(|name| INNER.iter().any(|inner| name == *inner));
        if path.is_dir() && !is_inner && !path.is_symlink() {
            search(&path, depth - 1, found)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const CONFIG: &str = "# Resolved\n# lowrank-train 0.1.0 (abc)\n# device: cpu (2 threads)\n\nseed = 3\n[optimizer.adamw]\nlearning_rate = 0.005\n";

    fn train(step: u64, loss: &str, ms: f64) -> String {
        format!(
            "{{\"kind\":\"train\",\"step\":{step},\"loss\":{loss},\"tokens\":{},\"step_ms\":{ms},\"tokens_per_second\":{},\
             \"memory_bytes\":100,\"optimizer_bytes\":64}}\n",
            10 * step,
            1e4 / ms
        )
    }

    fn folder(metrics: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.toml"), CONFIG).unwrap();
        std::fs::write(folder.path().join("metrics.jsonl"), metrics).unwrap();
        folder
    }

    #[test]
    fn a_finished_run() {
        let eval = |step, loss| format!("{{\"kind\":\"eval\",\"step\":{step},\"loss\":{loss},\"exact_match\":0.5}}\n");
        let summary = "{\"kind\":\"summary\",\"step\":3,\"tokens\":30,\"trainable_parameters\":7,\
                       \"peak_memory_bytes\":200,\"wall_seconds\":0.1}\n";
        let text = [train(1, "4", 900.0), eval(0, 5.0), train(2, "3", 10.0), train(3, "2", 30.0), eval(3, 2.5)];
        let folder = folder(&(text.concat() + summary));
        std::fs::write(folder.path().join(TEST_FILE), "{\"data\":[\"t\"],\"scores\":{\"loss\":2.75}}").unwrap();
        let run = read(folder.path()).unwrap();
        assert_eq!((run.version.as_str(), run.device.as_str()), ("0.1.0 (abc)", "cpu (2 threads)"));
        assert_eq!((run.seed(), run.learning_rate(), run.finished), (Some(3), Some(0.005), true));
        assert_eq!(run.eval_series("loss"), [(0, 5.0), (3, 2.5)]);
        assert_eq!((run.validation("loss"), run.validation("exact_match")), (Some(2.5), Some(0.5)));
        assert_eq!(run.test.as_ref().unwrap()["loss"], 2.75);
        assert_eq!((run.step_ms, run.trainable, run.peak_bytes), (Some(20.0), Some(7), Some(200)));
        assert_eq!(run.train_loss(), Some(2.0));
        assert!((run.wall_seconds.unwrap() - 0.94).abs() < 1e-9, "the steps took longer than the last start");
    }

    #[test]
    fn a_run_that_is_under_way_or_diverged() {
        let text = train(1, "4", 10.0) + &train(2, "null", 20.0) + "{\"kind\":\"trai";
        let run = read(folder(&text).path()).unwrap();
        assert_eq!((run.finished, run.step, run.tokens, run.trainable), (false, 2, 20, None));
        assert!(run.train_loss().unwrap().is_nan());
        assert_eq!((run.validation("loss"), run.peak_bytes, run.step_ms), (None, Some(100), Some(20.0)));
        assert_eq!(read(Path::new("no/such/folder")).unwrap().train, []);
    }

    #[test]
    fn runs_are_found_below_a_folder() {
        let root = tempfile::tempdir().unwrap();
        for name in ["b/seed-1", "a", "a/checkpoints/step-1", "c/adapter"] {
            std::fs::create_dir_all(root.path().join(name)).unwrap();
        }
        for name in ["b/seed-1", "a", "c/adapter"] {
            std::fs::write(root.path().join(name).join("metrics.jsonl"), "").unwrap();
        }
        let found = run_folders(root.path()).unwrap();
        let names: Vec<&Path> = found.iter().map(|path| path.strip_prefix(root.path()).unwrap()).collect();
        assert_eq!(names, [Path::new("a"), Path::new("b/seed-1")]);
    }
}
