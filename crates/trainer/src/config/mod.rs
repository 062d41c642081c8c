//! The configuration of a run: what the user may write (`raw`), how it is read and checked (`resolve`), and what changed
//! between two runs (`diff`).
//!
//! One TOML file is the run; `--set a.b=value` is the only override and is checked like the file.

mod check;
mod diff;
mod key_error;
mod optimizer;
mod raw;
mod resolve;

pub use check::{device_name_is_valid, problems};
pub use diff::{Change, diff};
pub use optimizer::{
    Accumulation, AdamWConfig, ApolloConfig, Common, DctAdamwConfig, FiraConfig, GaloreConfig, GradientNorm,
    Granularity, Inner, LdadamConfig, LowRankCommon, Merge, Moments, OptimizerConfig, ProjType, QGaloreConfig,
    QWeightFormat, Residual, Score, WeightFormat,
};
pub use raw::{
    AdapterConfig, Dtype, EvaluationConfig, GradientCheckpointing, Init, InitLoraWeights, LoggingConfig, LoraConfig,
    OnNonFinite, ProgressStyle, ResumeFrom, RunConfig, Scheduler, TargetModules, TrainingConfig,
};
pub use resolve::{Purpose, load, load_for, resolved_toml, resolved_value};
