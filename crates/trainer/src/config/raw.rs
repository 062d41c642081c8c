//! What a configuration file may say: plain structs with every default visible in a `Default` implementation. This file
//! is long because it is the reference of all keys; it holds no logic.
//!
//! Unknown keys are refused. Relative paths are relative to the folder the program is started in. A key without a
//! default is an `Option` and is left out of the resolved file while it is not set.
//!
//! The methods are externally tagged tables: `[adapter.lora]`, `[optimizer.adamw]`. A new method adds one row to
//! [`AdapterConfig`] (in `adapter.rs`) or [`OptimizerConfig`] (in `optimizer.rs`).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::adapter::AdapterConfig;
use super::calibration::CalibrationConfig;
use super::classification::ClassificationConfig;
use super::optimizer::OptimizerConfig;
use super::quantization::QuantizationConfig;
use crate::data::DataConfig;

/// A whole run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// What the model learns to do. Default `causal_lm`.
    pub task: Task,
    /// Folder of a Hugging Face checkpoint, or a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`. Required.
    pub base_model: String,
    /// Where the weights of the base model come from. Default `pretrained`.
    pub init: Init,
    /// Folder that receives everything the run writes. Required.
    pub output_dir: PathBuf,
    /// `auto`, `cpu`, or `cuda`, `vulkan`, `metal`, `wgpu`, each with an optional index as in `cuda:1`. Default `auto`:
    /// CUDA, then a real GPU through wgpu, then the CPU.
    pub device: String,
    /// Number format of the base weights and of the arithmetic of the model. Default `f32`. Trained parameters and optimiser
    /// state are f32. On a graphics card that computes in `bf16` take that; `f16` is for those that do not.
    pub dtype: Dtype,
    /// Seed of the initial adapter or random weights, of dropout and of the shuffle. Default 42.
    pub seed: u64,
    /// Folder of a PEFT adapter to go on from; its `adapter_config.json` then gives the rank and the targets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_adapter: Option<PathBuf>,
    /// What is trained beside the frozen base model. Without an `[adapter]` table every weight is trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterConfig>,
    /// How the frozen weights are held in fewer bits. Without a `[quantization]` table they have the type `dtype`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantization: Option<QuantizationConfig>,
    /// What an adapter's start is measured on. Only for methods that need it, and there by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationConfig>,
    /// What labels are. Only for classification, and there by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classification: Option<ClassificationConfig>,
    /// How gradients become updates. Default `[optimizer.adamw]`.
    pub optimizer: OptimizerConfig,
    /// What is trained on.
    pub data: DataConfig,
    /// How long, how fast, in which portions.
    pub training: TrainingConfig,
    /// What is shown and recorded.
    pub logging: LoggingConfig,
    /// What an evaluation does beside the loss.
    pub evaluation: EvaluationConfig,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            task: Task::default(),
            base_model: String::new(),
            init: Init::default(),
            output_dir: PathBuf::new(),
            device: "auto".to_owned(),
            dtype: Dtype::default(),
            seed: 42,
            init_adapter: None,
            adapter: None,
            quantization: None,
            calibration: None,
            classification: None,
            optimizer: OptimizerConfig::default(),
            data: DataConfig::default(),
            training: TrainingConfig::default(),
            logging: LoggingConfig::default(),
            evaluation: EvaluationConfig::default(),
        }
    }
}

/// What a model learns to do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Predict the next token of a text.
    #[default]
    CausalLm,
    /// Tell the class of a text, or of a pair of texts, or a number (BERT, RoBERTa).
    SequenceClassification,
    /// Tell the class of an image (ViT).
    ImageClassification,
}

impl Task {
    /// The word in the file.
    pub fn name(self) -> &'static str {
        match self {
            Self::CausalLm => "causal_lm",
            Self::SequenceClassification => "sequence_classification",
            Self::ImageClassification => "image_classification",
        }
    }
}

/// Where the weights of the base model come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// The checkpoint in `base_model`.
    #[default]
    Pretrained,
    /// Random, as Hugging Face starts a model; `base_model` needs only `config.json` and the tokenizer's files.
    Random,
}

/// A number format.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// 32-bit IEEE.
    #[default]
    F32,
    /// 16 bits with the exponent range of f32.
    Bf16,
    /// 16-bit IEEE. The loss is scaled, so that gradients do not underflow, and a step whose gradients overflow is left out.
    F16,
}

/// Layers by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a list of names, or a string: \"all-linear\" or one regular expression")]
pub enum TargetModules {
    /// `"all-linear"` (every linear layer but the head, and no convolution), or a regular expression that must match the whole name.
    Pattern(String),
    /// Last parts of names: `["q_proj", "v_proj"]`.
    Names(Vec<String>),
}

impl TargetModules {
    /// The word that stands for every linear layer but the head.
    pub const ALL_LINEAR: &str = "all-linear";
}

impl Default for TargetModules {
    fn default() -> Self {
        Self::Pattern(Self::ALL_LINEAR.to_owned())
    }
}

/// `[training]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingConfig {
    /// Number of optimiser steps. Exactly one of `max_steps` and `num_epochs` is required.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Number of passes over the training data; a fraction is allowed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_epochs: Option<f64>,
    /// Rows in one forward pass. Default 1. Activation memory grows with it.
    pub micro_batch_size: usize,
    /// Forward passes per optimiser step. Default 1. Costs time, not memory.
    pub gradient_accumulation_steps: usize,
    /// Course of the learning rate. Default `linear`.
    pub lr_scheduler: Scheduler,
    /// Steps of linear warm-up from zero. Default 0. Not together with `warmup_ratio`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u64>,
    /// Warm-up as a share of all steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_ratio: Option<f64>,
    /// Share of all steps in which `warmup_stable_decay` falls at the end. Default 0.1. Only for that schedule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_ratio: Option<f64>,
    /// Learning rate at the end of a falling schedule, as a share of its peak. Default 0.
    pub min_lr_ratio: f64,
    /// Largest 2-norm of all gradients together; larger ones are scaled down. Default 1. 0 switches clipping off.
    pub max_grad_norm: f64,
    /// What is recomputed in the backward pass. Default `none`.
    pub gradient_checkpointing: GradientCheckpointing,
    /// Evaluate after every so many steps. Default: only at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_steps: Option<u64>,
    /// Evaluate before the first step too. Default false.
    pub eval_at_start: bool,
    /// Write a checkpoint after every so many steps. Default 500. One is always written at the end, on interruption and
    /// after an evaluation with a new lowest loss.
    pub save_steps: u64,
    /// Checkpoints to keep: the newest, and the best one if that is another. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_total_limit: Option<usize>,
    /// `true`: go on from the newest complete checkpoint in `output_dir`, if there is one; or the folder of a
    /// checkpoint. Default false: `output_dir` must not hold a run.
    pub resume_from_checkpoint: ResumeFrom,
    /// Stop after so many evaluations in a row without a new lowest loss. Default: never. Needs `eval_steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stopping_patience: Option<u64>,
    /// What a loss or gradient that is not finite does. Default `stop`.
    pub on_non_finite: OnNonFinite,
    /// Tokens whose logits exist at the same time. Default: chosen by the size of the vocabulary. Fewer tokens take less
    /// memory and more time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_chunk_tokens: Option<usize>,
}

impl Default for TrainingConfig {
    fn default() -> Self {
        Self {
            max_steps: None,
            num_epochs: None,
            micro_batch_size: 1,
            gradient_accumulation_steps: 1,
            lr_scheduler: Scheduler::default(),
            warmup_steps: None,
            warmup_ratio: None,
            decay_ratio: None,
            min_lr_ratio: 0.0,
            max_grad_norm: 1.0,
            gradient_checkpointing: GradientCheckpointing::default(),
            eval_steps: None,
            eval_at_start: false,
            save_steps: 500,
            save_total_limit: None,
            resume_from_checkpoint: ResumeFrom::default(),
            early_stopping_patience: None,
            on_non_finite: OnNonFinite::default(),
            head_chunk_tokens: None,
        }
    }
}

impl TrainingConfig {
    /// Warm-up steps of a run of `total_steps`.
    pub fn warmup(&self, total_steps: u64) -> u64 {
        match (self.warmup_steps, self.warmup_ratio) {
            (Some(steps), _) => steps,
            (None, Some(ratio)) => (ratio * total_steps as f64).ceil() as u64,
            (None, None) => 0,
        }
    }

    /// Steps in which `warmup_stable_decay` falls at the end of a run of `total_steps`.
    pub fn decay(&self, total_steps: u64) -> u64 {
        (self.decay_ratio.unwrap_or(Self::DEFAULT_DECAY_RATIO) * total_steps as f64).ceil() as u64
    }

    /// Value of `decay_ratio` that holds while the key is not set.
    pub const DEFAULT_DECAY_RATIO: f64 = 0.1;
}

/// Course of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheduler {
    /// Stays at the peak.
    Constant,
    /// Falls on a line to `min_lr_ratio` at the last step.
    #[default]
    Linear,
    /// Falls on half a cosine to `min_lr_ratio` at the last step.
    Cosine,
    /// Stays at the peak, then falls on a line in the last `decay_ratio` of the steps.
    WarmupStableDecay,
}

/// What is kept from the forward for the backward pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GradientCheckpointing {
    /// Everything: fastest, and activation memory grows with the number of blocks.
    #[default]
    None,
    /// Only the input of every block, which is computed again in the backward pass: about a third more time, and the
    /// activation memory of one block.
    Block,
}

/// What a loss or gradient that is not finite does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnNonFinite {
    /// End the run with an error that names the step and the records.
    #[default]
    Stop,
    /// Leave the step out, warn and go on.
    Skip,
}

/// Where a run starts from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true, false or the folder of a checkpoint")]
pub enum ResumeFrom {
    /// `true`: the newest complete checkpoint of `output_dir`, if any. `false`: from the start.
    Newest(bool),
    /// The folder of one checkpoint.
    Folder(PathBuf),
}

impl Default for ResumeFrom {
    fn default() -> Self {
        Self::Newest(false)
    }
}

/// `[logging]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoggingConfig {
    /// Record and show every so many steps. Default 10.
    pub logging_steps: u64,
    /// Write TensorBoard event files beside `metrics.jsonl`. Default true.
    pub tensorboard: bool,
    /// How progress is shown. Default `auto`.
    pub progress: ProgressStyle,
}

impl Default for LoggingConfig {
    fn default() -> Self {
        Self { logging_steps: 10, tensorboard: true, progress: ProgressStyle::default() }
    }
}

/// How progress is shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProgressStyle {
    /// A bar on a terminal, lines elsewhere.
    #[default]
    Auto,
    /// A bar.
    Bar,
    /// A line every `logging_steps` steps.
    Plain,
    /// No progress; warnings and messages remain.
    None,
}

/// `[evaluation]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluationConfig {
    /// Also generate an answer to every prompt (greedily) and report the share that equals the reference. Default true;
    /// plain text has no prompts and is evaluated by its loss alone.
    pub generate: bool,
    /// Longest answer, in tokens. Default 256.
    pub max_new_tokens: usize,
    /// Number of records to answer, from the first on. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_samples: Option<usize>,
}

impl Default for EvaluationConfig {
    fn default() -> Self {
        Self { generate: true, max_new_tokens: 256, num_samples: None }
    }
}
