//! Adapter folders: `adapter_config.json` and the tensor names of `adapter_model.safetensors`, in peft's form and, for methods
//! that peft does not have, in our own.
//!
//! Which modules get an adapter, and with what rank and scale, is decided exactly as peft 0.21 decides it:
//! - a list of `target_modules` matches a module of that name or one whose name ends in `.` and an entry; a text is a regular
//!   expression that must match the whole name;
//! - `exclude_modules` the same way, and it wins; so do the `modules_to_save` and everything inside them;
//! - `layers_to_transform` keeps the layers of these numbers, the number being the first one in the name (after
//!   `layers_pattern`, if given); it does not apply to a module that is listed by its full name;
//! - the keys of `rank_pattern` and `alpha_pattern` are regular expressions for the end of the name, after a dot; the first
//!   that matches counts.
//!
//! Module names are those of the base model, such as `model.layers.0.self_attn.q_proj`. Two features of Python's regular
//! expressions do not exist here, looking around and back references; they are refused with a message.

mod keys;
mod metadata;
mod method;
mod modules;
mod read;
mod tensors;
mod write;

use std::path::Path;

use serde_json::Value;

pub use metadata::METADATA_KEY;
pub use method::{CordaMethod, MethodConfig};
pub use modules::{ModulePattern, Modules, is_saved_as, shortest_names};
pub use tensors::{AdapterTensor, KeyForm, Part};

use super::checkpoint::Checkpoint;
use super::error::HfError;
use super::read_json;
use modules::{first_number, is_head_or_embedding, is_named, pattern_value};

/// The name of the settings file in an adapter folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The name of the tensor file in an adapter folder.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// How a fresh adapter's factors start (`init_lora_weights`). Adapters that are loaded bring their values.
#[derive(Debug, Clone, PartialEq)]
pub enum InitLoraWeights {
    /// `true`: A uniform, B zero.
    Default,
    /// `false`: both random.
    Random,
    /// A named start that leaves the base model's weights as they are: `gaussian`, `orthogonal`, `eva`.
    Named(String),
}

/// The settings of an adapter. Patterns are compiled, so a value of this type can always be applied.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The method, with the settings that only it has.
    pub method: MethodConfig,
    /// Rank, at least 1; 0 for OFT, and the larger one for linear FLoRA, which have sizes of their own.
    pub r: usize,
    /// The scale is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with [`AdapterConfig::use_rslora`], where the method has one.
    pub lora_alpha: f64,
    /// Probability of dropping an entry of the adapter's input while training, from 0 up to 1, whatever the method calls it.
    pub lora_dropout: f64,
    /// Scale by the square root of the rank.
    pub use_rslora: bool,
    /// Modules that get an adapter.
    pub target_modules: Modules,
    /// Modules that get none although they are targets.
    pub exclude_modules: Option<Modules>,
    /// Ranks of single modules, the first match counts.
    pub rank_pattern: Vec<(ModulePattern, usize)>,
    /// `lora_alpha` of single modules, the first match counts.
    pub alpha_pattern: Vec<(ModulePattern, f64)>,
    /// Modules that are trained whole and stored beside the adapter.
    pub modules_to_save: Vec<ModulePattern>,
    /// Numbers of the layers that get an adapter; empty for all.
    pub layers_to_transform: Vec<usize>,
    /// What stands before the layer's number in a module's name; empty for anything.
    pub layers_pattern: Vec<ModulePattern>,
    /// How the factors of a fresh adapter start.
    pub init_lora_weights: InitLoraWeights,
    /// The model the adapter belongs to, for the reader.
    pub base_model_name_or_path: Option<String>,
    /// PEFT's name of the task, such as `CAUSAL_LM`.
    pub task_type: Option<String>,
}

impl AdapterConfig {
    /// LoRA of this rank and alpha on these modules, everything else as peft has it by default.
    pub fn new(r: usize, lora_alpha: f64, target_modules: Modules) -> Self {
        Self {
            method: MethodConfig::Lora,
            r,
            lora_alpha,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules,
            exclude_modules: None,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            modules_to_save: Vec::new(),
            layers_to_transform: Vec::new(),
            layers_pattern: Vec::new(),
            init_lora_weights: InitLoraWeights::Default,
            base_model_name_or_path: None,
            task_type: Some("CAUSAL_LM".to_string()),
        }
    }

    /// Reads `adapter_config.json` of an adapter folder, and the note in its tensor file where there is one.
    ///
    /// # Errors
    /// The file is missing or not JSON; a value is of the wrong type or out of range; a feature is switched on that is not
    /// supported. The text names the key. The tensor file is damaged.
    pub fn from_folder(folder: &Path) -> Result<Self, HfError> {
        let path = folder.join(CONFIG_FILE);
        if !path.is_file() {
            let hint = "give the folder that save_pretrained wrote for an adapter".to_string();
            let found = super::names_in(folder);
            return Err(HfError::MissingFile {
                folder: folder.to_path_buf(),
                wanted: CONFIG_FILE.to_string(),
                found,
                hint,
            });
        }
        let config = Self::from_json(&read_json(&path)?, &path)?;
        let weights = folder.join(WEIGHTS_FILE);
        if config.method != MethodConfig::Lora || !weights.is_file() {
            return Ok(config);
        }
        match Checkpoint::open_file(&weights)?.metadata(METADATA_KEY) {
            Some(note) => config.with_metadata(note, &weights),
            None => Ok(config),
        }
    }

    /// Reads settings in the form of `adapter_config.json`; `origin` is for messages. What is stored as LoRA stays LoRA here:
    /// [`AdapterConfig::with_metadata`] adds what the tensor file says.
    ///
    /// # Errors
    /// As [`AdapterConfig::from_folder`].
    pub fn from_json(json: &Value, origin: &Path) -> Result<Self, HfError> {
        read::read(json, origin)
    }

    /// Checks the numbers: ranks at least 1, alphas finite, dropout from 0 to 1.
    ///
    /// # Errors
    /// Names the key that is out of range.
    pub fn validate(&self, origin: &Path) -> Result<(), HfError> {
        read::validate(self, origin)
    }

    /// Whether a linear layer or an embedding gets an adapter. `all-linear` leaves out embeddings and the output heads
    /// (`lm_head`, `score`, `classifier`).
    pub fn targets(&self, module: &str) -> bool {
        self.chooses(module, true)
    }

    /// Whether a convolution gets an adapter: `all-linear` means none of them.
    pub fn targets_convolution(&self, module: &str) -> bool {
        self.chooses(module, false)
    }

    fn chooses(&self, module: &str, is_linear: bool) -> bool {
        if self.is_excluded(module, is_linear) {
            return false;
        }
        let names = match &self.target_modules {
            Modules::AllLinear => return is_linear && !is_head_or_embedding(module),
            Modules::Pattern(pattern) => return pattern.matches(module),
            Modules::Names(names) => names,
        };
        if names.iter().any(|name| name == module) {
            return true;
        }
        is_named(names, module) && self.is_chosen_layer(module)
    }

    /// Whether a module is trained whole: it, or a module around it, is one of `modules_to_save`.
    pub fn saves(&self, module: &str) -> bool {
        self.modules_to_save.iter().any(|entry| is_saved_as(module, entry.text()))
    }

    /// The rank of a module's adapter.
    pub fn rank_of(&self, module: &str) -> usize {
        pattern_value(&self.rank_pattern, module).unwrap_or(self.r)
    }

    /// The alpha of a module's adapter.
    pub fn alpha_of(&self, module: &str) -> f64 {
        pattern_value(&self.alpha_pattern, module).unwrap_or(self.lora_alpha)
    }

    /// What the product of a module's factors is multiplied by; 1 where the method has no scale.
    pub fn scale_of(&self, module: &str) -> f64 {
        if let MethodConfig::Tucker { scale, .. } = self.method {
            return scale;
        }
        if !self.method.has_alpha() {
            return 1.0;
        }
        let rank = self.rank_of(module) as f64;
        self.alpha_of(module) / if self.use_rslora { rank.sqrt() } else { rank }
    }

    /// The content of `adapter_config.json`, as peft 0.21 and the programs that read its files expect it. Methods that peft does
    /// not have get our own form.
    pub fn to_json(&self) -> Value {
        write::to_json(&self.as_stored())
    }

    /// The settings for a folder whose adapter sits on `attached`, of `all` modules of the model: the targets as a list of names
    /// where they are given as `all-linear`, or where peft has no key for what chooses them.
    pub fn with_names(&self, attached: &[String], all: &[String]) -> Self {
        let mut config = self.clone();
        let has_exclude = !matches!(self.method, MethodConfig::Vera { .. } | MethodConfig::RandLora { .. });
        if self.exclude_modules.is_some() && !has_exclude {
            config.exclude_modules = None;
            config.layers_to_transform.clear();
            config.layers_pattern.clear();
            config.target_modules = Modules::Names(shortest_names(attached, all));
        } else if self.target_modules == Modules::AllLinear {
            config.target_modules = Modules::Names(shortest_names(attached, all));
        }
        config
    }

    fn is_excluded(&self, module: &str, is_linear: bool) -> bool {
        let excluded = match &self.exclude_modules {
            None => false,
            Some(Modules::AllLinear) => is_linear && !is_head_or_embedding(module),
            Some(Modules::Pattern(pattern)) => pattern.matches(module),
            Some(Modules::Names(names)) => is_named(names, module),
        };
        excluded || self.modules_to_save.iter().any(|pattern| pattern.matches(module))
    }

    fn is_chosen_layer(&self, module: &str) -> bool {
        if self.layers_to_transform.is_empty() {
            return true;
        }
        let layer = match self.layers_pattern.is_empty() {
            true => first_number(module),
            false => self.layers_pattern.iter().find_map(|pattern| pattern.layer_number(module)),
        };
        layer.is_some_and(|layer| self.layers_to_transform.contains(&layer))
    }
}
