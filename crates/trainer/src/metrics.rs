//! `metrics.jsonl`: one JSON object a line, the record of a run that scripts and later commands read.
//!
//! A resumed run must leave the same file as one that was never stopped: lines behind the checkpoint are dropped when
//! the log is reopened, and only the keys in [`VOLATILE`] may differ. For that every line of a step is written, and
//! [`MetricsLog::sync`] called, before the checkpoint of that step is committed.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::Problem;

/// Keys that depend on the clock and the machine and so differ between two runs of the same training.
pub const VOLATILE: [&str; 13] = [
    "tensor_bytes",
    "step_ms",
    "host_ms",
    "launches",
    "measured_memory_bytes",
    "predicted_memory_bytes",
    "tokens_per_second",
    "memory_bytes",
    "peak_memory_bytes",
    "predicted_peak_memory_bytes",
    "wall_seconds",
    "seconds",
    "refresh_seconds",
];

/// One optimiser step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainLine {
    /// Number of the step, from 1.
    pub step: u64,
    /// Passes over the training data so far.
    pub epoch: f64,
    /// Mean loss over the counted tokens of the step, before the update.
    pub loss: f64,
    /// 2-norm of the whole gradient, before clipping.
    pub grad_norm: f64,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Tokens that were trained on since the start of the run, padding not counted.
    pub tokens: u64,
    /// Tokens per second since the line before.
    pub tokens_per_second: f64,
    /// Duration of a step in milliseconds, mean since the line before.
    pub step_ms: f64,
    /// On a graphics card: of it, the time until the host had put everything into the queue to the card. The queue is bounded, so
    /// it is near `step_ms` where the card is the slower one; what is left is the wait for the values of this line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_ms: Option<f64>,
    /// On a graphics card: kernels launched in a step, mean since the line before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub launches: Option<f64>,
    /// In f16: factor of the loss in the next backward pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// In f16: steps that were left out so far because a gradient did not fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped_steps: Option<u64>,
    /// Memory in use: of the device where it tells, else of the process.
    pub memory_bytes: u64,
    /// On a graphics card: what tensors use of it between two steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tensor_bytes: Option<u64>,
    /// Most bytes of gradients that existed at the same time.
    pub gradient_bytes: u64,
    /// Bytes of the optimiser's state.
    pub optimizer_bytes: u64,
    /// What low-rank methods tell of their subspaces.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub subspace: Option<SubspaceLine>,
}

/// The subspaces of all matrices that a low-rank method has.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SubspaceLine {
    /// Mean share of a gradient's energy inside its subspace, `||R||^2 / ||G||^2`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub captured_energy: Option<f64>,
    /// Mean overlap of a new subspace with the one before it, `||P_new^T P_old||^2 / r`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subspace_overlap: Option<f64>,
    /// Bases chosen so far, over all matrices.
    pub refreshes: u64,
    /// Time they took since the program started.
    pub refresh_seconds: f64,
}

/// One evaluation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EvalLine {
    /// Steps done when it was made; 0 before the first.
    pub step: u64,
    /// Mean loss over the counted tokens.
    pub loss: f64,
    /// `exp(loss)`, of language models.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Counted tokens; records, where each has one label.
    pub tokens: u64,
    /// Share of generated answers that equal the reference, where answers were generated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exact_match: Option<f64>,
    /// Number of generated answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exact_match_samples: Option<u64>,
    /// Scores of classifiers by name: `accuracy`, `f1` and so on.
    #[serde(flatten)]
    pub scores: BTreeMap<String, f64>,
    /// Duration in seconds.
    pub seconds: f64,
}

/// The end of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SummaryLine {
    /// Steps done.
    pub step: u64,
    /// Why the run ended: `"max_steps"`, `"num_epochs"`, `"early_stopping"`.
    pub ended_by: String,
    /// Loss of the last step.
    pub train_loss: f64,
    /// Loss of the last evaluation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// Lowest loss of an evaluation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best_eval_loss: Option<f64>,
    /// Step of that evaluation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best_step: Option<u64>,
    /// Exact match of the last evaluation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exact_match: Option<f64>,
    /// Scores of the last evaluation by name.
    #[serde(flatten)]
    pub scores: BTreeMap<String, f64>,
    /// Numbers that were trained.
    pub trainable_parameters: u64,
    /// Numbers in the model and the adapter.
    pub total_parameters: u64,
    /// Tokens that were trained on.
    pub tokens: u64,
    /// Largest memory in use over the run.
    pub peak_memory_bytes: u64,
    /// What was predicted for it at the start, where a prediction could be made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predicted_peak_memory_bytes: Option<u64>,
    /// Measured memory: parts that a run holds between steps, gradients, and the rest of the peak as `temporary`.
    pub measured_memory_bytes: BTreeMap<String, u64>,
    /// What was predicted for them at the moment of the most, where a prediction could be made.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub predicted_memory_bytes: BTreeMap<String, u64>,
    /// Duration of the run since it was last started.
    pub wall_seconds: f64,
}

/// One line of the log. On disk the kind is the first key.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Line {
    /// `{"kind":"train",...}`
    Train(TrainLine),
    /// `{"kind":"eval",...}`
    Eval(EvalLine),
    /// `{"kind":"summary",...}`
    Summary(SummaryLine),
}

impl Line {
    /// Number of the step the line belongs to.
    pub fn step(&self) -> u64 {
        match self {
            Line::Train(line) => line.step,
            Line::Eval(line) => line.step,
            Line::Summary(line) => line.step,
        }
    }

    /// The series that are drawn, as name and value: `train/loss` and so on. A summary has none.
    pub fn scalars(&self) -> Vec<(String, f64)> {
        let named = |scalars: Vec<(&str, f64)>| scalars.into_iter().map(|(n, value)| (n.to_owned(), value)).collect();
        match self {
            Line::Train(line) => {
                let mut scalars = vec![
                    ("train/loss", line.loss),
                    ("train/grad_norm", line.grad_norm),
                    ("train/learning_rate", line.learning_rate),
                    ("train/epoch", line.epoch),
                    ("train/tokens", line.tokens as f64),
                    ("train/tokens_per_second", line.tokens_per_second),
                    ("train/step_ms", line.step_ms),
                    ("train/memory_bytes", line.memory_bytes as f64),
                    ("train/gradient_bytes", line.gradient_bytes as f64),
                    ("train/optimizer_bytes", line.optimizer_bytes as f64),
                ];
                scalars.extend(line.tensor_bytes.map(|bytes| ("train/tensor_bytes", bytes as f64)));
                scalars.extend(line.host_ms.map(|ms| ("train/host_ms", ms)));
                scalars.extend(line.launches.map(|count| ("train/launches", count)));
                scalars.extend(line.loss_scale.map(|scale| ("train/loss_scale", scale)));
                scalars.extend(line.skipped_steps.map(|steps| ("train/skipped_steps", steps as f64)));
                if let Some(subspace) = &line.subspace {
                    scalars.extend(subspace.captured_energy.map(|share| ("train/captured_energy", share)));
                    scalars.extend(subspace.subspace_overlap.map(|share| ("train/subspace_overlap", share)));
                    scalars.push(("train/refreshes", subspace.refreshes as f64));
                }
                named(scalars)
            }
            Line::Eval(line) => {
                let mut scalars = vec![("eval/loss", line.loss)];
                scalars.extend(line.perplexity.map(|perplexity| ("eval/perplexity", perplexity)));
                scalars.extend(line.exact_match.map(|share| ("eval/exact_match", share)));
                let mut scalars: Vec<(String, f64)> = named(scalars);
                scalars.extend(line.scores.iter().map(|(name, score)| (format!("eval/{name}"), *score)));
                scalars
            }
            Line::Summary(_) => Vec::new(),
        }
    }

    /// The line as JSON. JSON has no NaN: a value that is not finite becomes null, and a `"non_finite"` object at the end
    /// gives it as text.
    fn to_json(&self) -> Result<String, serde_json::Error> {
        let mut value = serde_json::to_value(self)?;
        let non_finite: Map<String, Value> = self
            .scalars()
            .into_iter()
            .filter(|(_, number)| !number.is_finite())
            .map(|(name, number)| (name.rsplit('/').next().unwrap_or(&name).to_owned(), number.to_string().into()))
            .collect();
        if let (false, Value::Object(object)) = (non_finite.is_empty(), &mut value) {
            object.insert("non_finite".to_owned(), Value::Object(non_finite));
        }
        serde_json::to_string(&value)
    }
}

/// The open log of a run.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Starts a log at `path`. Lines of an earlier run are dropped.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn open(path: &Path) -> Result<Self, Problem> {
        Self::replace(path, "")
    }

    /// Reopens the log of a run that goes on after `step`: keeps the lines up to that step and drops later ones, a
    /// summary, and a last line that was cut off while it was written. A missing file is an empty log.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn resume(path: &Path, step: u64) -> Result<Self, Problem> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(Problem::run(format!("cannot read {}", path.display())).source(error)),
        };
        Self::replace(path, &kept_lines(path, &String::from_utf8_lossy(&bytes), step))
    }

    /// Puts `content` in place of the file in one move and opens it for appending.
    fn replace(path: &Path, content: &str) -> Result<Self, Problem> {
        crate::run_dir::write_atomically(path, content.as_bytes())?;
        let file = OpenOptions::new().append(true).open(path).map_err(|error| cannot_write(path, error))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Appends one line. It reaches the operating system at once and the disk with [`MetricsLog::sync`].
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&mut self, line: &Line) -> Result<(), Problem> {
        let mut text = line
            .to_json()
            .map_err(|error| Problem::run(format!("cannot write {}", self.path.display())).source(error))?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(|error| cannot_write(&self.path, error))
    }

    /// Brings every line to the disk. To be called before a checkpoint is committed.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn sync(&self) -> Result<(), Problem> {
        self.file.sync_data().map_err(|error| cannot_write(&self.path, error))
    }
}

fn cannot_write(path: &Path, error: std::io::Error) -> Problem {
    Problem::run(format!("cannot write {}", path.display())).source(error).hint("is the disk full?")
}

/// The lines that belong to the first `step` steps, each with its newline.
fn kept_lines(path: &Path, text: &str, step: u64) -> String {
    let mut kept = String::with_capacity(text.len());
    for (index, line) in text.lines().enumerate() {
        let Ok(value) = serde_json::from_str::<Value>(line) else {
            tracing::warn!("{}, line {}: dropped, it is not a JSON object", path.display(), index + 1);
            continue;
        };
        let line_step = value.get("step").and_then(Value::as_u64).unwrap_or(u64::MAX);
        let is_summary = value.get("kind").and_then(Value::as_str) == Some("summary");
        if line_step <= step && !is_summary {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}

/// A line of the log without the keys in [`VOLATILE`]: what two runs of the same training have in common, bit by bit.
/// Null if the line is no JSON.
pub fn deterministic_view(line: &str) -> Value {
    let mut value = serde_json::from_str(line).unwrap_or(Value::Null);
    if let Value::Object(object) = &mut value {
        for key in VOLATILE {
            object.remove(key);
            if let Some(Value::Object(non_finite)) = object.get_mut("non_finite") {
                non_finite.remove(key);
            }
        }
    }
    value
}

/// Memory of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessMemory {
    /// Resident bytes now; 0 where the system does not tell.
    pub current_bytes: u64,
    /// Most resident bytes so far; 0 where the system does not tell.
    pub peak_bytes: u64,
}

/// Reads the memory of this process from `/proc/self/status`.
pub fn process_memory() -> ProcessMemory {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    ProcessMemory { current_bytes: status_bytes(&status, "VmRSS:"), peak_bytes: status_bytes(&status, "VmHWM:") }
}

fn status_bytes(status: &str, key: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("");
    let kibibytes: u64 = line.trim().trim_end_matches("kB").trim().parse().unwrap_or(0);
    kibibytes * 1024
}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
