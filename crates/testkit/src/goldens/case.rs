//! `case.json`, and which cases are within what this version can do.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::FloatDType;
use lowrank_core::optim::{Schedule, ScheduleKind};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::tensors::{self, Tensors};
use super::{Stop, failed, start};

/// A case. Keys that are not listed here are remarks.
#[derive(Clone, Debug, Deserialize)]
pub struct Case {
    /// Its folder.
    #[serde(skip)]
    pub folder: PathBuf,
    /// What kind of case it is.
    #[serde(default)]
    pub kind: String,
    /// Folder of the model, relative to that of all cases; a remark may follow.
    #[serde(default)]
    pub model: String,
    /// `causal_lm`, `seq_cls` or `image_cls`.
    #[serde(default = "causal_lm")]
    pub task: String,
    /// Type of the weights and activations, as torch calls it.
    #[serde(default = "float32")]
    pub compute_dtype: String,
    /// Reference results that are single numbers.
    #[serde(default)]
    pub expected: Expected,
    /// How far off each may be.
    #[serde(default)]
    pub tolerance: Map<String, Value>,

    /// Texts with their ids.
    #[serde(default)]
    pub tokenizer: Vec<TokenizerExample>,
    /// Conversations with their text and ids.
    #[serde(default)]
    pub chat: Vec<ChatExample>,
    /// `sequence_I`: positions whose logits are in `logits_sequence_I`.
    #[serde(default)]
    pub logit_rows: BTreeMap<String, Vec<usize>>,
    /// A continuation by the most likely token.
    #[serde(default)]
    pub greedy: Option<Greedy>,
    /// Ids of a single sequence, its labels too (instead of `input_ids` among the tensors).
    #[serde(default)]
    pub ids: Option<Vec<u32>>,
    /// The text of `ids`.
    #[serde(default)]
    pub text: Option<String>,

    /// A training run's method: the settings of a peft configuration, with `type`.
    #[serde(default)]
    pub method: Map<String, Value>,
    /// A training run's settings.
    #[serde(default)]
    pub train: Option<Train>,
    /// File of the batches.
    #[serde(default = "batches_file")]
    pub batches: String,
    /// Number of trained values.
    #[serde(default)]
    pub trainable_parameters: Option<usize>,
}

fn causal_lm() -> String {
    "causal_lm".to_owned()
}

fn float32() -> String {
    "float32".to_owned()
}

fn batches_file() -> String {
    "batches.safetensors".to_owned()
}

/// Reference results that are single numbers.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Expected {
    /// Of a forward pass.
    pub loss: Option<f64>,
    /// Before training, on the first batch.
    pub initial_loss_batch0: Option<f64>,
    /// Before each update.
    #[serde(default)]
    pub losses: Vec<f64>,
    /// Of each update, before clipping.
    #[serde(default)]
    pub grad_norms: Vec<f64>,
    /// After training, on the first batch.
    pub final_loss_batch0: Option<f64>,
    /// File of the reference tensors.
    pub tensors: Option<String>,
}

/// A text and its ids.
#[derive(Clone, Debug, Deserialize)]
pub struct TokenizerExample {
    /// The text.
    pub text: String,
    /// With the tokens that the tokenizer puts around a text.
    pub ids: Vec<u32>,
    /// Without them.
    pub ids_no_special: Option<Vec<u32>>,
}

/// A conversation that waits for an answer.
#[derive(Clone, Debug, Deserialize)]
pub struct ChatExample {
    /// Its messages.
    pub messages: Vec<Value>,
    /// Rendered.
    pub text: String,
    /// Tokenised.
    pub ids: Option<Vec<u32>>,
    /// Whether the text ends where an answer begins.
    #[serde(default = "yes")]
    pub add_generation_prompt: bool,
}

fn yes() -> bool {
    true
}

/// A continuation by the most likely token.
#[derive(Clone, Debug, Deserialize)]
pub struct Greedy {
    /// Ids.
    pub prompt: Vec<u32>,
    /// What follows; end-of-text is a token like any other.
    pub new_tokens: Vec<u32>,
    /// The new tokens as text.
    pub text: Option<String>,
    /// The smallest difference between the two largest logits on the way.
    pub smallest_top2_margin: Option<f64>,
}

/// Settings of a training run.
#[derive(Clone, Debug, Deserialize)]
pub struct Train {
    /// Updates.
    pub steps: usize,
    /// Which one, with its settings.
    pub optimizer: Optimizer,
    /// `constant`, or a name as transformers has it, or an object with `name` and settings.
    #[serde(default)]
    pub lr_schedule: Value,
    /// Steps in which the learning rate rises.
    #[serde(default)]
    pub warmup_steps: usize,
    /// Micro batches of an update.
    #[serde(default = "one")]
    pub grad_accum: usize,
    /// How they are averaged.
    #[serde(default)]
    pub accum_mean: AccumMean,
    /// Largest gradient norm.
    pub max_grad_norm: Option<f64>,
}

fn one() -> usize {
    1
}

/// Optimiser settings.
#[derive(Clone, Debug, Deserialize)]
pub struct Optimizer {
    /// `adamw` is the only one so far.
    pub name: String,
    /// Learning rate.
    pub lr: f64,
    /// AdamW's.
    #[serde(default = "default_betas")]
    pub betas: (f64, f64),
    /// AdamW's.
    #[serde(default = "default_eps")]
    pub eps: f64,
    /// Of every trained tensor.
    #[serde(default)]
    pub weight_decay: f64,
    /// Anything else, which must be switched off.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

fn default_betas() -> (f64, f64) {
    (0.9, 0.999)
}

fn default_eps() -> f64 {
    1e-8
}

/// Settings of a GaLore run.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GaloreCase {
    /// r.
    pub rank: usize,
    /// Steps between projections.
    pub update_proj_gap: u64,
    /// Factor of the update.
    pub scale: f64,
    /// Side, as galore-torch calls it.
    pub proj_type: GaloreSide,
    /// Sign of the singular vectors.
    pub svd_sign: Option<String>,
}

/// A base whose target weights are held as NF4.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nf4Case {
    /// Values that share a scale.
    pub blocksize: usize,
    /// Whether the scales are quantised too.
    pub double_quant: bool,
}

/// Sides of the transposed gradient.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GaloreSide {
    /// The smaller dimension.
    Std,
    /// The larger one.
    ReverseStd,
    /// The input side.
    Right,
    /// The output side.
    Left,
    /// Both.
    Full,
}

/// How the micro batches of an update are averaged.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum AccumMean {
    /// The mean of their means.
    MicroBatches,
    /// The sum over all counted tokens, divided by their number.
    #[default]
    Tokens,
}

/// Settings of a LoRA configuration that are honoured (through the adapter's own configuration file) or without effect.
const LORA_KEYS: &[&str] = &[
    "type",
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "use_dora",
    "corda_config",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "randomize",
    "task_type",
    "inference_mode",
    "peft_type",
    "nf4",
];
/// Starts that leave the base as it is; the factors are in the case.
const PLAIN_STARTS: &[&str] = &["gaussian", "orthogonal", "eva"];

fn not_yet(what: impl std::fmt::Display) -> Stop {
    Stop::Unsupported(format!("{what} is not implemented yet"))
}

/// Null, false, zero and everything empty.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty() || text == "none",
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
    }
}

impl Case {
    /// Reads `case.json` of a folder.
    ///
    /// # Errors
    /// It is not readable; it is of a kind that is neither a forward pass nor a training run.
    pub fn read(folder: &Path) -> Result<Self, Stop> {
        let path = folder.join("case.json");
        let located = |error: &dyn std::fmt::Display| failed(format!("{}: {error}", path.display()));
        let text = std::fs::read_to_string(&path).map_err(|error| located(&error))?;
        let json: Value = serde_json::from_str(&text).map_err(|error| located(&error))?;
        match json["kind"].as_str() {
            Some("forward" | "train" | "quant_8bit_blockwise" | "quant_4bit" | "adamw_8bit") => {}
            kind => return Err(not_yet(kind.unwrap_or("a case without a kind"))),
        }
        let case: Self = serde_json::from_value(json).map_err(|error| located(&error))?;
        Ok(Self { folder: folder.to_path_buf(), ..case })
    }

    /// Whether this version can run the case.
    ///
    /// # Errors
    /// It cannot; the text says what is missing.
    pub fn supported(&self) -> Result<(), Stop> {
        match self.task.as_str() {
            "causal_lm" | "seq_cls" | "image_cls" => {}
            task => return Err(not_yet(format!("the task {task}"))),
        }
        self.compute_dtype()?;
        let Some(train) = &self.train else { return Ok(()) };
        self.supported_method()?;
        let wanted = if self.galore()?.is_some() { "galore_adamw" } else { "adamw" };
        if train.optimizer.name.to_lowercase() != wanted {
            return Err(not_yet(format!("the optimiser {}", train.optimizer.name)));
        }
        let speed_only = |key: &str| ["foreach", "fused", "capturable"].contains(&key);
        if let Some((key, _)) = train.optimizer.other.iter().find(|(key, value)| !speed_only(key) && !is_off(value)) {
            return Err(not_yet(format!("{key} of the optimiser")));
        }
        train.schedule().map(|_| ())
    }

    fn supported_method(&self) -> Result<(), Stop> {
        let method = &self.method;
        match method.get("type").and_then(Value::as_str) {
            Some("full") => {
                return match method.iter().find(|(key, value)| *key != "type" && !is_off(value)) {
                    Some((key, _)) => Err(not_yet(format!("{key} in full training"))),
                    None => Ok(()),
                };
            }
            Some("galore") => return self.galore().map(|_| ()),
            Some("lora") => {}
            Some("vera" | "randlora" | "hra" | "oft" | "lora_xs" | "lora_sb" | "svfit" | "tucker") => return Ok(()),
            other => return Err(not_yet(other.unwrap_or("a method without a type"))),
        }
        match method.get("init_lora_weights") {
            Some(Value::String(start))
                if !PLAIN_STARTS.contains(&start.as_str()) && start::residual_method(method).is_none() =>
            {
                return Err(not_yet(start));
            }
            _ => {}
        }
        if method.get("lora_dropout").is_some_and(|value| !is_off(value)) {
            return Err(Stop::Unsupported("torch's random masks of lora_dropout cannot be repeated".to_owned()));
        }
        let is_known = |key: &str| LORA_KEYS.contains(&key) || key == "init_lora_weights";
        match method.iter().find(|(key, value)| !is_known(key) && !is_off(value)) {
            Some((key, _)) => Err(not_yet(key)),
            None => Ok(()),
        }
    }

    /// Whether the model is a classifier.
    pub fn is_classification(&self) -> bool {
        self.task != "causal_lm"
    }

    /// Whether the base is trained, and not an adapter.
    pub fn is_full(&self) -> bool {
        matches!(self.method.get("type").and_then(Value::as_str), Some("full" | "galore"))
    }

    /// The settings of a case of GaLore.
    ///
    /// # Errors
    /// A setting that is missing or not known.
    pub fn galore(&self) -> Result<Option<GaloreCase>, Stop> {
        if self.method.get("type").and_then(Value::as_str) != Some("galore") {
            return Ok(None);
        }
        let remarks = |key: &str| ["type", "low_rank_parameters"].contains(&key);
        let settings = self.method.iter().filter(|(key, _)| !remarks(key)).map(|(k, v)| (k.clone(), v.clone()));
        let galore: GaloreCase = serde_json::from_value(Value::Object(settings.collect())).map_err(not_yet)?;
        if galore.svd_sign.as_deref().is_some_and(|sign| sign != "max_abs_positive") {
            return Err(not_yet("another convention for the signs of singular vectors"));
        }
        Ok(Some(galore))
    }

    /// How the weights of the targets are held, where that is as NF4.
    ///
    /// # Errors
    /// A setting that is missing or not known.
    pub fn nf4(&self) -> Result<Option<Nf4Case>, Stop> {
        let Some(settings) = self.method.get("nf4").filter(|value| !is_off(value)) else { return Ok(None) };
        serde_json::from_value(settings.clone()).map(Some).map_err(not_yet)
    }

    /// Whether the method names this module by the end of its name.
    pub fn targets(&self, module: &str) -> bool {
        let last = module.rsplit('.').next().unwrap_or(module);
        let names = self.method.get("target_modules").and_then(Value::as_array);
        names.is_some_and(|names| names.iter().any(|name| name.as_str() == Some(last)))
    }

    /// Burn's name of the type that weights and activations have.
    ///
    /// # Errors
    /// An unknown one.
    pub fn compute_dtype(&self) -> Result<FloatDType, Stop> {
        match self.compute_dtype.trim_start_matches("torch.") {
            "float32" => Ok(FloatDType::F32),
            "bfloat16" => Ok(FloatDType::BF16),
            "float16" => Ok(FloatDType::F16),
            other => Err(not_yet(format!("compute type {other}"))),
        }
    }

    /// A limit of the case, where it has one.
    pub fn limit(&self, key: &str) -> Option<f64> {
        self.tolerance.get(key).and_then(Value::as_f64)
    }

    /// The reference tensors; none where the case has no file of them.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn tensors(&self) -> Result<Tensors, Stop> {
        match &self.expected.tensors {
            Some(file) => tensors::read(&self.folder.join(file)),
            None => Ok(Tensors::new()),
        }
    }
}

impl Train {
    /// The learning rate's factor at every step.
    ///
    /// # Errors
    /// A schedule that is not known.
    pub fn schedule(&self) -> Result<Schedule, Stop> {
        let settings = &self.lr_schedule;
        let name = settings.as_str().or(settings["name"].as_str()).or(settings["type"].as_str()).unwrap_or("constant");
        let number = |key: &str| settings[key].as_f64();
        let kind = match name {
            "constant" | "constant_with_warmup" => ScheduleKind::Constant,
            "linear" => ScheduleKind::Linear,
            "cosine" => ScheduleKind::Cosine,
            "warmup_stable_decay" | "wsd" => {
                let decay_steps = number("decay_steps").or(number("num_decay_steps")).unwrap_or(0.0) as usize;
                ScheduleKind::WarmupStableDecay { decay_steps }
            }
            other => return Err(not_yet(format!("the schedule {other}"))),
        };
        let warmup = number("warmup_steps").or(number("num_warmup_steps"));
        let min_ratio = number("min_ratio").or(number("min_lr_ratio")).unwrap_or(0.0);
        let warmup_steps = warmup.map_or(self.warmup_steps, |steps| steps as usize);
        Ok(Schedule { kind, total_steps: self.steps, warmup_steps, min_ratio })
    }
}
