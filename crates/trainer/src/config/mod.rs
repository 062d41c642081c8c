//! The configuration of a run: what the user may write (`raw`), how it is read and checked (`resolve`), and what changed
//! between two runs (`diff`).
//!
//! One TOML file is the run; `--set a.b=value` is the only override and is checked like the file.

mod check;
mod diff;
mod key_error;
mod raw;
mod resolve;

pub use check::{device_name_is_valid, problems};
pub use diff::{Change, diff};
pub use raw::{
    AdamWConfig, AdapterConfig, Dtype, EvaluationConfig, GradientCheckpointing, InitLoraWeights, LoggingConfig,
    LoraConfig, OnNonFinite, OptimizerConfig, ProgressStyle, ResumeFrom, RunConfig, Scheduler, TargetModules,
    TrainingConfig,
};
pub use resolve::{Purpose, load, load_for, resolved_toml, resolved_value};
