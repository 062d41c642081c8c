//! PEFT's LoRA folders: `adapter_config.json` and the tensor names of `adapter_model.safetensors`.
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

use std::path::Path;

use regex::Regex;
use serde_json::{Map, Value, json};

use super::error::HfError;
use super::peft_read;
use super::read_json;

/// The name of the settings file in an adapter folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The name of the tensor file in an adapter folder.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// What PEFT puts before every module name in the tensor file.
const PREFIX: &str = "base_model.model.";

/// A regular expression for module names, compiled where it is made.
#[derive(Debug, Clone)]
pub struct ModulePattern {
    text: String,
    regex: Regex,
}

impl ModulePattern {
    /// A pattern for whole names, as `target_modules` and `exclude_modules` use it.
    ///
    /// # Errors
    /// Not a regular expression (the reason).
    pub fn whole(text: &str) -> Result<Self, String> {
        Self::new(text, &format!("^(?:{text})$"))
    }

    /// A pattern for the end of a name from a dot on, as `rank_pattern` and `alpha_pattern` use it.
    ///
    /// # Errors
    /// Not a regular expression (the reason).
    pub fn ending(text: &str) -> Result<Self, String> {
        Self::new(text, &format!(r"^(?:.*\.)?(?:{text})$"))
    }

    /// A pattern for a name, or for what it is inside of, as `modules_to_save` uses it.
    ///
    /// # Errors
    /// Not a regular expression (the reason).
    pub fn part(text: &str) -> Result<Self, String> {
        Self::new(text, &format!(r"^(?:|.*\.)(?:{text})(?:$|\.)"))
    }

    /// A pattern for what comes before a layer's number, as `layers_pattern` uses it.
    ///
    /// # Errors
    /// Not a regular expression (the reason).
    pub fn before_number(text: &str) -> Result<Self, String> {
        Self::new(text, &format!(r"^(?:|.*?\.)(?:{text})\.(?P<layer>\d+)\."))
    }

    fn new(text: &str, whole: &str) -> Result<Self, String> {
        match Regex::new(whole) {
            Ok(regex) => Ok(Self { text: text.to_string(), regex }),
            Err(error) if ["(?=", "(?!", "(?<=", "(?<!"].iter().any(|look| text.contains(look)) => {
                Err(format!("`{text}`: looking ahead or behind is not supported ({})", last_line(&error)))
            }
            Err(error) => Err(format!("`{text}` is not a regular expression: {}", last_line(&error))),
        }
    }

    /// The pattern as the user wrote it.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether a module's name matches.
    pub fn matches(&self, module: &str) -> bool {
        self.regex.is_match(module)
    }

    fn layer_number(&self, module: &str) -> Option<usize> {
        self.regex.captures(module)?.name("layer")?.as_str().parse().ok()
    }
}

impl PartialEq for ModulePattern {
    fn eq(&self, other: &Self) -> bool {
        self.regex.as_str() == other.regex.as_str()
    }
}

fn last_line(error: &regex::Error) -> String {
    error.to_string().lines().last().unwrap_or_default().trim_start_matches("error: ").to_string()
}

/// Which modules are meant.
#[derive(Debug, Clone, PartialEq)]
pub enum Modules {
    /// Every linear layer except the output head.
    AllLinear,
    /// Full names, or their ends after a dot.
    Names(Vec<String>),
    /// A regular expression for whole names.
    Pattern(ModulePattern),
}

impl Modules {
    /// A single text as `target_modules` has it: `all-linear` in any case, else a regular expression.
    ///
    /// # Errors
    /// Not a regular expression (the reason).
    pub fn from_text(text: &str) -> Result<Self, String> {
        match text.eq_ignore_ascii_case("all-linear") {
            true => Ok(Self::AllLinear),
            false => ModulePattern::whole(text).map(Self::Pattern),
        }
    }

    fn to_json(&self) -> Value {
        match self {
            Self::AllLinear => Value::from("all-linear"),
            Self::Names(names) => json!(names),
            Self::Pattern(pattern) => Value::from(pattern.text()),
        }
    }
}

impl std::fmt::Display for Modules {
    /// As it is written in a configuration.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}", self.to_json())
    }
}

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

/// The settings of a LoRA adapter. Patterns are compiled, so a value of this type can always be applied.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// Rank, at least 1.
    pub r: usize,
    /// The scale is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with [`AdapterConfig::use_rslora`].
    pub lora_alpha: f64,
    /// Probability of dropping an entry of the adapter's input while training, from 0 up to 1.
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

    /// Reads `adapter_config.json` of an adapter folder.
    ///
    /// # Errors
    /// The file is missing or not JSON; a value is of the wrong type or out of range; a feature is switched on that is not
    /// supported. The text names the key.
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
        Self::from_json(&read_json(&path)?, &path)
    }

    /// Reads settings in the form of `adapter_config.json`; `origin` is for messages.
    ///
    /// # Errors
    /// As [`AdapterConfig::from_folder`].
    pub fn from_json(json: &Value, origin: &Path) -> Result<Self, HfError> {
        peft_read::read(json, origin)
    }

    /// Checks the numbers: ranks at least 1, alphas finite, dropout from 0 to 1.
    ///
    /// # Errors
    /// Names the key that is out of range.
    pub fn validate(&self, origin: &Path) -> Result<(), HfError> {
        peft_read::validate(self, origin)
    }

    /// Whether a module gets an adapter. With `all-linear` the caller asks for linear layers only; the output heads
    /// (`lm_head`, `score`, `classifier`) and embeddings are left out here.
    pub fn targets(&self, module: &str) -> bool {
        if self.is_excluded(module) {
            return false;
        }
        let names = match &self.target_modules {
            Modules::AllLinear => return !is_head_or_embedding(module),
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

    /// What the product of a module's factors is multiplied by.
    pub fn scale_of(&self, module: &str) -> f64 {
        let rank = self.rank_of(module) as f64;
        self.alpha_of(module) / if self.use_rslora { rank.sqrt() } else { rank }
    }

    /// The content of `adapter_config.json`, as peft 0.21 and the programs that read its files expect it.
    pub fn to_json(&self) -> Value {
        let pattern_map = |pairs: Vec<(&str, Value)>| {
            Value::Object(pairs.into_iter().map(|(key, value)| (key.to_string(), value)).collect())
        };
        let texts = |patterns: &[ModulePattern]| match patterns.is_empty() {
            true => Value::Null,
            false => patterns.iter().map(|pattern| Value::from(pattern.text())).collect(),
        };
        let init = match &self.init_lora_weights {
            InitLoraWeights::Default => Value::Bool(true),
            InitLoraWeights::Random => Value::Bool(false),
            InitLoraWeights::Named(name) => Value::from(name.as_str()),
        };
        let layers = if self.layers_to_transform.is_empty() { Value::Null } else { json!(self.layers_to_transform) };
        let mut keys = Map::new();
        let mut set = |key: &str, value: Value| drop(keys.insert(key.to_string(), value));
        set(
            "alpha_pattern",
            pattern_map(self.alpha_pattern.iter().map(|(key, alpha)| (key.text(), number(*alpha))).collect()),
        );
        set("auto_mapping", Value::Null);
        set("base_model_name_or_path", json!(self.base_model_name_or_path));
        set("bias", Value::from("none"));
        set("exclude_modules", self.exclude_modules.as_ref().map_or(Value::Null, Modules::to_json));
        set("fan_in_fan_out", Value::Bool(false));
        set("inference_mode", Value::Bool(true));
        set("init_lora_weights", init);
        set("layers_pattern", texts(&self.layers_pattern));
        set("layers_to_transform", layers);
        set("lora_alpha", number(self.lora_alpha));
        set("lora_dropout", Value::from(self.lora_dropout));
        set("modules_to_save", texts(&self.modules_to_save));
        set("peft_type", Value::from("LORA"));
        set("r", Value::from(self.r));
        set(
            "rank_pattern",
            pattern_map(self.rank_pattern.iter().map(|(key, rank)| (key.text(), Value::from(*rank))).collect()),
        );
        set("revision", Value::Null);
        set("target_modules", self.target_modules.to_json());
        set("task_type", json!(self.task_type));
        set("use_dora", Value::Bool(false));
        set("use_rslora", Value::Bool(self.use_rslora));
        Value::Object(keys)
    }

    fn is_excluded(&self, module: &str) -> bool {
        let excluded = match &self.exclude_modules {
            None => false,
            Some(Modules::AllLinear) => !is_head_or_embedding(module),
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

/// Whole numbers as such, as peft writes them.
fn number(value: f64) -> Value {
    match value.fract() == 0.0 && value.abs() < 1e15 {
        true => Value::from(value as i64),
        false => Value::from(value),
    }
}

fn is_named(names: &[String], module: &str) -> bool {
    names
        .iter()
        .any(|name| module == name || module.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.')))
}

fn is_head_or_embedding(module: &str) -> bool {
    let last = module.rsplit('.').next().unwrap_or(module);
    matches!(last, "lm_head" | "score" | "classifier" | "embed_tokens")
}

/// Whether a module or parameter is, or is inside of, one whose name ends in this entry of `modules_to_save` (peft asks for
/// no dot before the entry).
pub fn is_saved_as(name: &str, entry: &str) -> bool {
    let around = name.match_indices('.').map(|(dot, _)| &name[..dot]);
    around.chain([name]).any(|name| name.ends_with(entry))
}

/// The first part of a name that is a number, with at least two parts before it and one after.
fn first_number(module: &str) -> Option<usize> {
    let parts: Vec<&str> = module.split('.').collect();
    let (_, inner) = parts.split_last()?;
    inner.iter().skip(2).find(|part| !part.is_empty() && part.chars().all(|c| c.is_ascii_digit()))?.parse().ok()
}

fn pattern_value<T: Copy>(patterns: &[(ModulePattern, T)], module: &str) -> Option<T> {
    let by_pattern = patterns.iter().find(|(pattern, _)| pattern.matches(module));
    let by_name = || patterns.iter().find(|(pattern, _)| pattern.text() == module);
    by_pattern.or_else(by_name).map(|(_, value)| *value)
}

/// The shortest list that names exactly the `matched` ones of `all` modules: their last name parts where no other module
/// ends in one of these, else the full names. Sorted. For writing `all-linear` or a pattern as a list that every reader
/// of the file understands.
pub fn shortest_names(matched: &[String], all: &[String]) -> Vec<String> {
    let sorted = |mut names: Vec<String>| {
        names.sort();
        names.dedup();
        names
    };
    let ends = sorted(matched.iter().map(|module| module.rsplit('.').next().unwrap_or(module).to_string()).collect());
    let is_exact = all.iter().all(|module| is_named(&ends, module) == matched.contains(module));
    if is_exact { ends } else { sorted(matched.to_vec()) }
}

/// What a tensor of an adapter file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdapterTensor {
    /// `lora_A.weight` `[r, in]` of a module.
    A(String),
    /// `lora_B.weight` `[out, r]` of a module.
    B(String),
    /// `lora_embedding_A` `[r, vocab]` of an embedding.
    EmbeddingA(String),
    /// `lora_embedding_B` `[dim, r]` of an embedding.
    EmbeddingB(String),
    /// A whole parameter of a module to save, by the base model's name, such as `lm_head.weight`.
    Saved(String),
    /// A copy of the base model's weight that peft adds where an embedding is adapted, by the base model's name.
    BaseCopy(String),
}

impl AdapterTensor {
    /// Reads a key of the tensor file; `None` where it is not one of these (another method's tensor, or a foreign prefix).
    pub fn from_key(key: &str) -> Option<Self> {
        let name = key.strip_prefix(PREFIX)?;
        // Some writers keep the adapter's name in the key, as peft has it in memory.
        let name =
            name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".").replace(".default", "");
        let owner = |end: &str| name.strip_suffix(end).map(str::to_string);
        if let Some(module) = owner(".lora_A.weight") {
            return Some(Self::A(module));
        }
        if let Some(module) = owner(".lora_B.weight") {
            return Some(Self::B(module));
        }
        if let Some(module) = owner(".lora_embedding_A") {
            return Some(Self::EmbeddingA(module));
        }
        if let Some(module) = owner(".lora_embedding_B") {
            return Some(Self::EmbeddingB(module));
        }
        if let Some((module, parameter)) = name.split_once(".base_layer.") {
            return Some(Self::BaseCopy(format!("{module}.{parameter}")));
        }
        let is_other_method =
            [".lora_", ".vera_", ".randlora_", ".oft_", ".hra_"].iter().any(|mark| name.contains(mark));
        (!is_other_method).then_some(Self::Saved(name))
    }

    /// The key in the tensor file.
    pub fn key(&self) -> String {
        match self {
            Self::A(module) => format!("{PREFIX}{module}.lora_A.weight"),
            Self::B(module) => format!("{PREFIX}{module}.lora_B.weight"),
            Self::EmbeddingA(module) => format!("{PREFIX}{module}.lora_embedding_A"),
            Self::EmbeddingB(module) => format!("{PREFIX}{module}.lora_embedding_B"),
            Self::Saved(parameter) => format!("{PREFIX}{parameter}"),
            Self::BaseCopy(parameter) => match parameter.rsplit_once('.') {
                Some((module, last)) => format!("{PREFIX}{module}.base_layer.{last}"),
                None => format!("{PREFIX}{parameter}"),
            },
        }
    }
}
