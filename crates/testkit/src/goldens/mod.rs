//! Runs a folder of reference cases.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`case`] | `case.json`, and which cases are within what this version can do |
//! | [`tensors`] | the tensors of a case |
//! | [`checks`] | measured errors beside their limits |
//! | [`subject`] | the kinds of model: how each is loaded, fed and read |
//! | [`forward`] | forward passes of language models, tokenizers, chat templates, greedy continuations |
//! | [`classify`] | forward passes of classifiers |
//! | [`train`] | training runs |
//! | [`start`] | their adapters |
//!
//! Whether a case is unsupported is decided by its content (task, method, optimiser), never by its name.

mod bitsandbytes;
pub mod case;
pub mod checks;
pub mod classify;
pub mod forward;
pub mod quant;
pub mod quant4;
pub mod start;
pub mod subject;
pub mod tensors;
pub mod train;

use std::path::{Path, PathBuf};

use lowrank_models::{Classifier, Decoder};
use lowrank_train::config::GradientCheckpointing;
use lowrank_train::device::ChosenDevice;

use case::Case;
use checks::Checks;

/// How cases are run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where.
    pub device: ChosenDevice,
    /// Whether the device is the CPU, on which the limits of a case apply; elsewhere wider ones do.
    pub is_cpu: bool,
    /// What a block keeps between forward and backward.
    pub checkpointing: GradientCheckpointing,
    /// Tokens whose logits exist at the same time; `None` for the trainer's own choice.
    pub head_chunk_tokens: Option<usize>,
    /// Update layer by layer in the backward pass, where a step is one micro batch without clipping.
    pub immediate: bool,
    /// Folder of the real checkpoint, for the cases that need it.
    pub smollm2: Option<PathBuf>,
}

impl Options {
    /// The trainer's own choices on the device of this name, the real checkpoint as `LOWRANK_SMOLLM2` says.
    ///
    /// # Errors
    /// There is no such device.
    pub fn on(device: &str) -> Result<Self, lowrank_train::error::Problem> {
        Ok(Self {
            device: lowrank_train::device::choose(device)?,
            is_cpu: device == "cpu",
            checkpointing: GradientCheckpointing::None,
            head_chunk_tokens: None,
            immediate: false,
            smollm2: std::env::var_os("LOWRANK_SMOLLM2").filter(|path| !path.is_empty()).map(PathBuf::from),
        })
    }

    /// The same with everything that saves memory: blocks rebuilt in the backward pass, small chunks of logits, updates layer
    /// by layer. Results are to be the same.
    pub fn with_small_memory(self) -> Self {
        Self { checkpointing: GradientCheckpointing::Block, head_chunk_tokens: Some(24), immediate: true, ..self }
    }
}

/// What became of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every error is within its limit.
    Passed,
    /// Something is not; which.
    Failed(String),
    /// This version cannot run it; why.
    Unsupported(String),
}

/// Why a case ended before its checks could be judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Something that should work does not.
    Failed(String),
    /// It asks for something that is not there yet.
    Unsupported(String),
}

/// Any error as a failure.
pub(crate) fn failed(error: impl std::fmt::Display) -> Stop {
    Stop::Failed(error.to_string())
}

/// One case and what became of it.
#[derive(Clone, Debug)]
pub struct Report {
    /// Name of the case's folder.
    pub name: String,
    /// What became of it.
    pub outcome: Outcome,
    /// What was measured.
    pub checks: Checks,
}

impl Report {
    /// `passed NAME`, `failed NAME: why` or `unsupported NAME: why`, on one line.
    pub fn line(&self) -> String {
        let one_line = |why: &str| why.split_whitespace().collect::<Vec<_>>().join(" ");
        match &self.outcome {
            Outcome::Passed => format!("passed {}", self.name),
            Outcome::Failed(why) => format!("failed {}: {}", self.name, one_line(why)),
            Outcome::Unsupported(why) => format!("unsupported {}: {}", self.name, one_line(why)),
        }
    }
}

/// The copy of the cases that belongs to this crate.
pub fn committed_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens")
}

/// Names of the cases in a folder: its subfolders with a `case.json`, sorted.
///
/// # Errors
/// The folder cannot be read.
pub fn names(folder: &Path) -> Result<Vec<String>, String> {
    let entries = std::fs::read_dir(folder).map_err(|error| format!("{}: cannot read: {error}", folder.display()))?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.path().join("case.json").is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    Ok(names)
}

/// Runs one case. A panic inside counts as a failure.
pub fn run(folder: &Path, name: &str, options: &Options) -> Report {
    let mut checks = Checks::default();
    let attempt = std::panic::AssertUnwindSafe(|| run_case(folder, name, options, &mut checks));
    let result = std::panic::catch_unwind(attempt).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
        Err(Stop::Failed(format!("panicked: {}", text.unwrap_or("without a message"))))
    });
    let outcome = match (result, checks.failure()) {
        (Err(Stop::Unsupported(why)), _) => Outcome::Unsupported(why),
        (Err(Stop::Failed(why)), _) => Outcome::Failed(why),
        (Ok(()), Some(why)) => Outcome::Failed(why),
        (Ok(()), None) if checks.is_empty() => Outcome::Failed("the case holds nothing to compare".to_owned()),
        (Ok(()), None) => Outcome::Passed,
    };
    Report { name: name.to_owned(), outcome, checks }
}

fn run_case(folder: &Path, name: &str, options: &Options, checks: &mut Checks) -> Result<(), Stop> {
    let case = Case::read(&folder.join(name))?;
    match case.kind.as_str() {
        "quant_8bit_blockwise" => return quant::run_quant8(&case, options, checks),
        "quant_4bit" => return quant4::run(&case, options, checks),
        "adamw_8bit" => return quant::run_adamw8bit(&case, options, checks),
        _ => case.supported()?,
    }
    let model = model_folder(folder, &case.model, options)?;
    match (case.is_classification(), &case.train) {
        (false, Some(_)) => train::run::<Decoder>(&case, &model, options, checks),
        (false, None) => forward::run(&case, &model, options, checks),
        (true, Some(_)) => train::run::<Classifier>(&case, &model, options, checks),
        (true, None) => classify::run(&case, &model, options, checks),
    }
}

/// The folder of a case's model: beside the cases, in this crate's copy, or the real checkpoint.
fn model_folder(folder: &Path, model: &str, options: &Options) -> Result<PathBuf, Stop> {
    let path = model.split_whitespace().next().unwrap_or_default(); // a remark may follow
    let beside = [folder.join(path), committed_folder().join(path)];
    if let Some(found) = beside.into_iter().find(|folder| !path.is_empty() && folder.join("config.json").is_file()) {
        return Ok(found);
    }
    if !path.to_lowercase().starts_with("smollm2") {
        return Err(Stop::Failed(format!("there is no model {path} in {}", folder.display())));
    }
    let Some(real) = &options.smollm2 else {
        return Err(Stop::Unsupported("needs the real checkpoint (LOWRANK_SMOLLM2)".to_owned()));
    };
    match real.join("config.json").is_file() {
        true => Ok(real.clone()),
        false => Err(Stop::Failed(format!("LOWRANK_SMOLLM2 = {} is not a model folder", real.display()))),
    }
}
