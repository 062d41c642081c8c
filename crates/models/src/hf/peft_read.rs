//! Reads `adapter_config.json` into an [`AdapterConfig`]: every key is either used, known to be without effect here, or must
//! be switched off.

use std::path::Path;

use serde_json::{Map, Value};

use super::error::HfError;
use super::peft::{AdapterConfig, InitLoraWeights, ModulePattern, Modules};

/// Keys that decide something here.
const USED: &[&str] = &[
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "bias",
    "base_model_name_or_path",
    "task_type",
];

/// Keys that say nothing about the result: descriptions, and details of features that other keys switch on.
const WITHOUT_EFFECT: &[&str] = &[
    "auto_mapping",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
];

/// Starts that change the base model's weights, so that the adapter fits only the changed base.
const CHANGES_BASE: &[&str] = &["pissa", "olora", "corda", "loftq", "lora_ga"];

pub(crate) fn read(json: &Value, origin: &Path) -> Result<AdapterConfig, HfError> {
    let Some(keys) = json.as_object() else {
        return Err(HfError::bad_file(origin, "expected a JSON object", "this is not an adapter_config.json"));
    };
    let keys = Keys { keys, origin };
    keys.check_method()?;
    keys.check_unsupported()?;
    let config = AdapterConfig {
        r: keys.count("r")?.unwrap_or(8),
        lora_alpha: keys.number("lora_alpha")?.unwrap_or(8.0),
        lora_dropout: keys.number("lora_dropout")?.unwrap_or(0.0),
        use_rslora: keys.flag("use_rslora")?,
        target_modules: keys.target_modules()?,
        exclude_modules: keys.modules("exclude_modules", |text| ModulePattern::whole(text).map(Modules::Pattern))?,
        rank_pattern: keys.pattern_map("rank_pattern", "a rank", |value| value.as_u64().map(|rank| rank as usize))?,
        alpha_pattern: keys.pattern_map("alpha_pattern", "a number", Value::as_f64)?,
        modules_to_save: keys.patterns("modules_to_save", ModulePattern::part)?,
        layers_to_transform: keys.layers()?,
        layers_pattern: keys.patterns("layers_pattern", ModulePattern::before_number)?,
        init_lora_weights: keys.init()?,
        base_model_name_or_path: keys.text("base_model_name_or_path")?,
        task_type: keys.text("task_type")?,
    };
    validate(&config, origin)?;
    Ok(config)
}

pub(crate) fn validate(config: &AdapterConfig, origin: &Path) -> Result<(), HfError> {
    let fail = |key: &str, reason: String, hint: &str| Err(adapter_error(origin, key, reason, hint));
    if config.r == 0 {
        return fail("r", "expected a rank of at least 1, got 0".to_string(), "common ranks are 8, 16 and 32");
    }
    if let Some((pattern, _)) = config.rank_pattern.iter().find(|(_, rank)| *rank == 0) {
        return fail("rank_pattern", format!("`{}`: expected a rank of at least 1, got 0", pattern.text()), "");
    }
    let alphas = config.alpha_pattern.iter().map(|(_, alpha)| *alpha).chain([config.lora_alpha]);
    if let Some(alpha) = alphas.into_iter().find(|alpha| !alpha.is_finite()) {
        return fail("lora_alpha", format!("expected a finite number, got {alpha}"), "");
    }
    if !(0.0..=1.0).contains(&config.lora_dropout) {
        return fail("lora_dropout", format!("expected a probability from 0 to 1, got {}", config.lora_dropout), "");
    }
    let by_name = matches!(config.target_modules, Modules::Names(_));
    if !by_name && !config.layers_to_transform.is_empty() {
        let hint = "list the names of the modules, or put the layers into the regular expression";
        return fail("layers_to_transform", "cannot be combined with target_modules given as a text".to_string(), hint);
    }
    if !config.layers_pattern.is_empty() && config.layers_to_transform.is_empty() {
        return fail(
            "layers_pattern",
            "has no effect without layers_to_transform".to_string(),
            "set layers_to_transform too",
        );
    }
    Ok(())
}

fn adapter_error(origin: &Path, key: &str, reason: String, hint: &str) -> HfError {
    HfError::Adapter { origin: origin.to_path_buf(), key: key.to_string(), reason, hint: hint.to_string() }
}

/// Null, false, zero, and whatever is empty.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
    }
}

struct Keys<'a> {
    keys: &'a Map<String, Value>,
    origin: &'a Path,
}

impl Keys<'_> {
    fn fail<T>(&self, key: &str, reason: impl Into<String>, hint: &str) -> Result<T, HfError> {
        Err(adapter_error(self.origin, key, reason.into(), hint))
    }

    fn wrong_type<T>(&self, key: &str, expected: &str, got: &Value) -> Result<T, HfError> {
        self.fail(key, format!("expected {expected}, got {got}"), "")
    }

    /// The value of a key, null counting as absent.
    fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    fn check_method(&self) -> Result<(), HfError> {
        match self.get("peft_type") {
            Some(Value::String(method)) if method == "LORA" => Ok(()),
            Some(other) => {
                self.fail("peft_type", format!("expected \"LORA\", got {other}"), "only LoRA adapters are read here")
            }
            None => {
                self.fail("peft_type", "missing; expected \"LORA\"", "this is not the configuration of a PEFT adapter")
            }
        }
    }

    /// A key that is neither used nor without effect must be off.
    fn check_unsupported(&self) -> Result<(), HfError> {
        for (key, value) in self.keys {
            let is_known = USED.contains(&key.as_str()) || WITHOUT_EFFECT.contains(&key.as_str());
            if !is_known && !is_off(value) {
                return self.fail(
                    key,
                    format!("is set to {value}, which is not supported"),
                    "merge the adapter with peft, or train one without this feature",
                );
            }
        }
        match self.get("bias") {
            None => Ok(()),
            Some(Value::String(bias)) if bias == "none" => Ok(()),
            Some(other) => {
                self.fail("bias", format!("expected \"none\", got {other}"), "trained biases are not supported")
            }
        }
    }

    fn count(&self, key: &str) -> Result<Option<usize>, HfError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(count) => Ok(Some(count as usize)),
                None => self.wrong_type(key, "a whole number", value),
            },
        }
    }

    fn number(&self, key: &str) -> Result<Option<f64>, HfError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number)),
                None => self.wrong_type(key, "a number", value),
            },
        }
    }

    fn flag(&self, key: &str) -> Result<bool, HfError> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => self.wrong_type(key, "true or false", other),
        }
    }

    fn text(&self, key: &str) -> Result<Option<String>, HfError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => self.wrong_type(key, "a text", other),
        }
    }

    fn names(&self, key: &str, items: &[Value]) -> Result<Vec<String>, HfError> {
        let mut names = Vec::new();
        for item in items {
            match item.as_str() {
                Some(name) => names.push(name.to_string()),
                None => return self.wrong_type(key, "a list of names", item),
            }
        }
        Ok(names)
    }

    fn target_modules(&self) -> Result<Modules, HfError> {
        let modules = self.modules("target_modules", Modules::from_text)?;
        match modules {
            Some(modules) => Ok(modules),
            None => self.fail(
                "target_modules",
                "missing",
                "list the modules that have an adapter, such as [\"q_proj\", \"v_proj\"]",
            ),
        }
    }

    fn modules(
        &self,
        key: &str,
        from_text: impl Fn(&str) -> Result<Modules, String>,
    ) -> Result<Option<Modules>, HfError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) if text.is_empty() => Ok(None),
            Some(Value::String(text)) => match from_text(text) {
                Ok(modules) => Ok(Some(modules)),
                Err(reason) => self.fail(key, reason, "list the module names instead"),
            },
            Some(Value::Array(items)) if items.is_empty() => Ok(None),
            Some(Value::Array(items)) => Ok(Some(Modules::Names(self.names(key, items)?))),
            Some(other) => self.wrong_type(key, "a text or a list of names", other),
        }
    }

    fn patterns(
        &self,
        key: &str,
        compile: impl Fn(&str) -> Result<ModulePattern, String>,
    ) -> Result<Vec<ModulePattern>, HfError> {
        let names = match self.get(key) {
            None => Vec::new(),
            Some(Value::String(text)) if text.is_empty() => Vec::new(),
            Some(Value::String(text)) => vec![text.clone()],
            Some(Value::Array(items)) => self.names(key, items)?,
            Some(other) => return self.wrong_type(key, "a list of names", other),
        };
        names.iter().map(|name| compile(name).or_else(|reason| self.fail(key, reason, ""))).collect()
    }

    fn pattern_map<T>(
        &self,
        key: &str,
        wanted: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<(ModulePattern, T)>, HfError> {
        let entries = match self.get(key) {
            None => return Ok(Vec::new()),
            Some(Value::Object(entries)) => entries,
            Some(other) => return self.wrong_type(key, "an object of patterns and numbers", other),
        };
        let mut pairs = Vec::new();
        for (text, value) in entries {
            let pattern = ModulePattern::ending(text).or_else(|reason| self.fail(key, reason, ""))?;
            match read(value) {
                Some(value) => pairs.push((pattern, value)),
                None => return self.wrong_type(&format!("{key}.{text}"), wanted, value),
            }
        }
        Ok(pairs)
    }

    fn layers(&self) -> Result<Vec<usize>, HfError> {
        let key = "layers_to_transform";
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(items)) => {
                let number = |item: &Value| item.as_u64().map(|layer| layer as usize);
                items
                    .iter()
                    .map(|item| number(item).map_or_else(|| self.wrong_type(key, "layer numbers", item), Ok))
                    .collect()
            }
            Some(_) => Ok(self.count(key)?.into_iter().collect()),
        }
    }

    fn init(&self) -> Result<InitLoraWeights, HfError> {
        let key = "init_lora_weights";
        match self.get(key) {
            None | Some(Value::Bool(true)) => Ok(InitLoraWeights::Default),
            Some(Value::Bool(false)) => Ok(InitLoraWeights::Random),
            Some(Value::String(name)) if CHANGES_BASE.iter().any(|start| name.to_lowercase().starts_with(start)) => {
                let reason =
                    format!("`{name}` changes the base model's weights, so the adapter does not fit the original ones");
                self.fail(
                    key,
                    reason,
                    "convert it with peft: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
                )
            }
            Some(Value::String(name)) if ["gaussian", "orthogonal", "eva"].contains(&name.as_str()) => {
                Ok(InitLoraWeights::Named(name.clone()))
            }
            Some(other) => self.wrong_type(key, "true, false, \"gaussian\", \"orthogonal\" or \"eva\"", other),
        }
    }
}
