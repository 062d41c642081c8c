//! Access to the keys of an `adapter_config.json`: every value is checked for its type, and errors name the key.

use std::path::Path;

use serde_json::{Map, Value};

use super::InitLoraWeights;
use super::modules::{ModulePattern, Modules};
use crate::hf::error::HfError;

/// Starts that change the base model's weights, so that the adapter fits only the changed base.
const CHANGES_BASE: &[&str] = &["pissa", "olora", "corda", "loftq", "lora_ga"];

pub(super) fn adapter_error(origin: &Path, key: &str, reason: String, hint: &str) -> HfError {
    HfError::Adapter { origin: origin.to_path_buf(), key: key.to_string(), reason, hint: hint.to_string() }
}

/// Null, false, zero, and whatever is empty.
pub(super) fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
    }
}

pub(super) struct Keys<'a> {
    pub keys: &'a Map<String, Value>,
    pub origin: &'a Path,
}

impl Keys<'_> {
    pub fn fail<T>(&self, key: &str, reason: impl Into<String>, hint: &str) -> Result<T, HfError> {
        Err(adapter_error(self.origin, key, reason.into(), hint))
    }

    pub fn wrong_type<T>(&self, key: &str, expected: &str, got: &Value) -> Result<T, HfError> {
        self.fail(key, format!("expected {expected}, got {got}"), "")
    }

    /// The value of a key, null counting as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    pub fn count(&self, key: &str) -> Result<Option<usize>, HfError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(count) => Ok(Some(count as usize)),
                None => self.wrong_type(key, "a whole number", value),
            },
        }
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>, HfError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number)),
                None => self.wrong_type(key, "a number", value),
            },
        }
    }

    pub fn flag(&self, key: &str) -> Result<bool, HfError> {
        self.flag_or(key, false)
    }

    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool, HfError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => self.wrong_type(key, "true or false", other),
        }
    }

    pub fn text(&self, key: &str) -> Result<Option<String>, HfError> {
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

    pub fn target_modules(&self) -> Result<Modules, HfError> {
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

    pub fn modules(
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

    pub fn patterns(
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

    pub fn ranks(&self) -> Result<Vec<(ModulePattern, usize)>, HfError> {
        self.pattern_map("rank_pattern", "a rank", |value| value.as_u64().map(|rank| rank as usize))
    }

    pub fn alphas(&self) -> Result<Vec<(ModulePattern, f64)>, HfError> {
        self.pattern_map("alpha_pattern", "a number", Value::as_f64)
    }

    /// The seed of random factors.
    pub fn seed(&self) -> Result<u64, HfError> {
        Ok(self.count("projection_prng_key")?.unwrap_or(0) as u64)
    }

    /// Refuses files without their random factors.
    pub fn saved_projection(&self) -> Result<(), HfError> {
        match self.flag_or("save_projection", true)? {
            true => Ok(()),
            false => self.fail(
                "save_projection",
                "is false: the random factors are not in the file, and only torch's generator makes them again",
                "save the adapter again with peft and save_projection = true",
            ),
        }
    }

    pub fn layers(&self) -> Result<Vec<usize>, HfError> {
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

    pub fn init(&self) -> Result<InitLoraWeights, HfError> {
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
