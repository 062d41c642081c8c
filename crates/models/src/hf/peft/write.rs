//! Writes `adapter_config.json`: peft's keys, which are named differently for every method, or our own.

use serde_json::{Map, Value, json};

use super::method::{MethodConfig, write_method};
use super::modules::{ModulePattern, Modules};
use super::{AdapterConfig, InitLoraWeights};

/// The key of alpha; none where the method has no scale, or one of its own.
pub(super) fn alpha_key(method: &MethodConfig) -> Option<&'static str> {
    match method {
        MethodConfig::RandLora { .. } => Some("randlora_alpha"),
        MethodConfig::LoraXs | MethodConfig::LoraSb { .. } => Some("alpha"),
        // A LoRA in the file, whose scale of 1 must be written.
        MethodConfig::Eora { .. } => Some("lora_alpha"),
        method if method.has_alpha() => Some("lora_alpha"),
        _ => None,
    }
}

/// The key of the dropout; none where the method has none.
pub(super) fn dropout_key(method: &MethodConfig) -> Option<&'static str> {
    match method {
        MethodConfig::Vera { .. } => Some("vera_dropout"),
        MethodConfig::RandLora { .. } => Some("randlora_dropout"),
        MethodConfig::Hra { .. } | MethodConfig::Oft { .. } => None,
        method if method.peft_type().is_none() => Some("dropout"),
        _ => Some("lora_dropout"),
    }
}

/// `config` has ranks and alphas as they are stored.
pub(super) fn to_json(config: &AdapterConfig) -> Value {
    let mut keys = Map::new();
    match config.method.peft_type() {
        Some("LORA") => {
            shared_keys(config, &mut keys);
            peft_keys("LORA", &mut keys);
            keys.insert("exclude_modules".to_string(), excluded(config));
            lora_keys(config, &mut keys);
        }
        Some(name) => {
            shared_keys(config, &mut keys);
            peft_keys(name, &mut keys);
            keys.insert("init_weights".to_string(), Value::Bool(true));
            if config.exclude_modules.is_some() || name == "HRA" || name == "OFT" {
                keys.insert("exclude_modules".to_string(), excluded(config));
            }
            write_method(&config.method, &mut keys);
        }
        None => own_keys(config, &mut keys),
    }
    let mut number_keys = vec![("r", Value::from(config.r))];
    number_keys.extend(alpha_key(&config.method).map(|key| (key, number(config.lora_alpha))));
    number_keys.extend(dropout_key(&config.method).map(|key| (key, Value::from(config.lora_dropout))));
    keys.extend(number_keys.into_iter().map(|(key, value)| (key.to_string(), value)));
    // As peft does, which sorts them.
    keys.sort_keys();
    Value::Object(keys)
}

/// Keys of every form.
fn shared_keys(config: &AdapterConfig, keys: &mut Map<String, Value>) {
    let layers = &config.layers_to_transform;
    let shared = [
        ("base_model_name_or_path", json!(config.base_model_name_or_path)),
        ("layers_pattern", texts(&config.layers_pattern)),
        ("layers_to_transform", if layers.is_empty() { Value::Null } else { json!(layers) }),
        ("modules_to_save", texts(&config.modules_to_save)),
        ("target_modules", config.target_modules.to_json()),
        ("task_type", json!(config.task_type)),
    ];
    keys.extend(shared.into_iter().map(|(key, value)| (key.to_string(), value)));
}

/// Keys of every file in peft's form.
fn peft_keys(name: &str, keys: &mut Map<String, Value>) {
    let described = [
        ("auto_mapping", Value::Null),
        ("bias", Value::from("none")),
        ("inference_mode", Value::Bool(true)),
        ("peft_type", Value::from(name)),
        ("revision", Value::Null),
    ];
    keys.extend(described.into_iter().map(|(key, value)| (key.to_string(), value)));
    if name != "HRA" {
        keys.insert("fan_in_fan_out".to_string(), Value::Bool(false));
    }
}

/// Keys of LoRA alone.
fn lora_keys(config: &AdapterConfig, keys: &mut Map<String, Value>) {
    let init = match &config.init_lora_weights {
        InitLoraWeights::Default => Value::Bool(true),
        InitLoraWeights::Random => Value::Bool(false),
        InitLoraWeights::Named(name) => Value::from(name.as_str()),
    };
    let lora = [
        ("alpha_pattern", pattern_map(&config.alpha_pattern, |alpha| number(*alpha))),
        ("init_lora_weights", init),
        ("rank_pattern", pattern_map(&config.rank_pattern, |rank| Value::from(*rank))),
        ("use_dora", Value::Bool(config.method == MethodConfig::Dora)),
        ("use_rslora", Value::Bool(config.use_rslora)),
    ];
    keys.extend(lora.into_iter().map(|(key, value)| (key.to_string(), value)));
}

/// Our own form, which leaves out what is not set.
fn own_keys(config: &AdapterConfig, keys: &mut Map<String, Value>) {
    shared_keys(config, keys);
    keys.insert("type".to_string(), Value::from(config.method.name()));
    keys.insert("exclude_modules".to_string(), excluded(config));
    keys.insert("alpha_pattern".to_string(), pattern_map(&config.alpha_pattern, |alpha| number(*alpha)));
    keys.insert("rank_pattern".to_string(), pattern_map(&config.rank_pattern, |rank| Value::from(*rank)));
    keys.retain(|_, value| !value.is_null() && value.as_object().is_none_or(|map| !map.is_empty()));
    write_method(&config.method, keys);
}

fn excluded(config: &AdapterConfig) -> Value {
    config.exclude_modules.as_ref().map_or(Value::Null, Modules::to_json)
}

fn texts(patterns: &[ModulePattern]) -> Value {
    match patterns.is_empty() {
        true => Value::Null,
        false => patterns.iter().map(|pattern| Value::from(pattern.text())).collect(),
    }
}

pub(super) fn pattern_map<T>(pairs: &[(ModulePattern, T)], value: impl Fn(&T) -> Value) -> Value {
    Value::Object(pairs.iter().map(|(key, entry)| (key.text().to_string(), value(entry))).collect())
}

/// Whole numbers as such, as peft writes them.
pub(super) fn number(value: f64) -> Value {
    match value.fract() == 0.0 && value.abs() < 1e15 {
        true => Value::from(value as i64),
        false => Value::from(value),
    }
}
