//! The configuration of a run: what the user may write (`raw`), how it is read and checked (`resolve`), and what changed
//! between two runs (`diff`).
//!
//! One TOML file is the run; `--set a.b=value` is the only override and is checked like the file.

mod adapter;
mod calibration;
mod check;
mod check_adapter;
mod classification;
mod diff;
mod key_error;
mod optimizer;
mod quantization;
mod raw;
mod resolve;

pub use adapter::{
    AdapterCommon, AdapterConfig, Alpha, CordaConfig, CordaMethod, DoraConfig, EoraConfig, HraConfig, InitLoraWeights,
    LoraConfig, LoraSbConfig, LoraXsConfig, OftConfig, OloraConfig, PissaConfig, RandloraConfig, SvfitConfig,
    TuckerConfig, VeraConfig,
};
pub use calibration::CalibrationConfig;
pub use check::{device_name_is_valid, problems};
pub use classification::ClassificationConfig;
pub use diff::{Change, diff};
pub(crate) use key_error::{Origins, structure_problem, syntax_problem};
pub use optimizer::{
    Accumulation, AdamWConfig, ApolloConfig, Common, DctAdamwConfig, FiraConfig, GaloreConfig, GradientNorm,
    Granularity, Inner, IntrinsicConfig, LdadamConfig, LowRankCommon, Merge, Moments, OptimizerConfig, ProjType,
    QGaloreConfig, QWeightFormat, Residual, Score, WeightFormat,
};
pub use quantization::{Int4Config, Int8Config, Nf4Config, QuantizationConfig};
pub use raw::{
    Dtype, EvaluationConfig, GradientCheckpointing, Init, LoggingConfig, OnNonFinite, ProgressStyle, ResumeFrom,
    RunConfig, Scheduler, TargetModules, Task, TrainingConfig,
};
pub use resolve::{Purpose, load, load_for, resolved_toml, resolved_value};
pub(crate) use resolve::{lay_over, read_text};
