//! Typed reading of a JSON object: every getter says which key failed, what was expected and what stands there.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::ConfigError;

/// A JSON object inside a file. Unless a getter says otherwise, null counts as absent.
#[derive(Clone)]
pub(crate) struct Keys<'a> {
    map: &'a Map<String, Value>,
    origin: &'a Path,
    /// Keys that this object is nested in, each with a dot: `rope_scaling.`, or empty at the top level.
    prefix: String,
}

impl<'a> Keys<'a> {
    /// The whole file.
    pub fn of_file(value: &'a Value, origin: &'a Path) -> Result<Self, ConfigError> {
        match value {
            Value::Object(map) => Ok(Self { map, origin, prefix: String::new() }),
            other => Err(ConfigError::NotAnObject { origin: origin.to_path_buf(), got: describe(other) }),
        }
    }

    /// The file, for errors.
    pub fn origin(&self) -> PathBuf {
        self.origin.to_path_buf()
    }

    /// Whether `key` has no value.
    pub fn is_absent_or_null(&self, key: &str) -> bool {
        self.get(key).is_none()
    }

    /// A nested object; an empty one counts as absent.
    pub fn object(&self, key: &str) -> Result<Option<Keys<'a>>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) if map.is_empty() => Ok(None),
            Some(Value::Object(map)) => {
                Ok(Some(Keys { map, origin: self.origin, prefix: format!("{}{key}.", self.prefix) }))
            }
            Some(other) => Err(self.wrong_type(key, "an object", other)),
        }
    }

    /// A string.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong_type(key, "a string", other)),
        }
    }

    /// A list of strings.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let texts = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        texts.map(Some).ok_or_else(|| self.wrong_type(key, "a list of strings", value))
    }

    /// The first entry of a list of strings; an empty list counts as absent.
    pub fn first_text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        Ok(self.texts(key)?.and_then(|texts| texts.first().copied()))
    }

    /// true or false.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.wrong_type(key, "true or false", other)),
        }
    }

    /// A whole number from 1 to `max`.
    pub fn size(&self, key: &str, max: usize) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(size) if size >= 1 && size <= max as u64 => Ok(Some(size as usize)),
            _ => Err(self.wrong_type(key, &size_range(max), value)),
        }
    }

    /// A list of whole numbers from 1 to `max`; a single number counts as a list of one.
    pub fn sizes(&self, key: &str, max: usize) -> Result<Option<Vec<usize>>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let size =
            |value: &Value| value.as_u64().filter(|&size| size >= 1 && size <= max as u64).map(|size| size as usize);
        let sizes = match value {
            Value::Array(list) if !list.is_empty() => list.iter().map(size).collect(),
            one => size(one).map(|size| vec![size]),
        };
        sizes.map(Some).ok_or_else(|| self.wrong_type(key, &format!("{}, or a list of such", size_range(max)), value))
    }

    /// A whole number, 0 included.
    pub fn count(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
        count.map(Some).ok_or_else(|| self.wrong_type(key, "a whole number", value))
    }

    /// As [`Keys::size`], where null means `None` and only an absent key has the default.
    pub fn size_or_null(&self, key: &str, max: usize, default: Option<usize>) -> Result<Option<usize>, ConfigError> {
        if !self.map.contains_key(key) {
            return Ok(default);
        }
        self.size(key, max)
    }

    /// As [`Keys::size`]; an absent key is an error.
    pub fn required_size(&self, key: &str, max: usize) -> Result<usize, ConfigError> {
        self.size(key, max)?.ok_or_else(|| self.missing(key, size_range(max)))
    }

    /// A number above 0 that a 32-bit float can hold.
    pub fn positive(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(number) if number as f32 > 0.0 && (number as f32).is_finite() => Ok(Some(number)),
            _ => Err(self.wrong_type(key, POSITIVE, value)),
        }
    }

    /// As [`Keys::positive`], where null means `None` and only an absent key has the default.
    pub fn positive_or_null(&self, key: &str, default: Option<f64>) -> Result<Option<f64>, ConfigError> {
        if !self.map.contains_key(key) {
            return Ok(default);
        }
        self.positive(key)
    }

    /// As [`Keys::positive`]; an absent key is an error.
    pub fn required_positive(&self, key: &str) -> Result<f64, ConfigError> {
        self.positive(key)?.ok_or_else(|| self.missing(key, POSITIVE.to_string()))
    }

    /// Any finite number.
    pub fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value.as_f64().map(Some).ok_or_else(|| self.wrong_type(key, "a number", value))
    }

    /// A token id. Only an absent key has the default; null, and -1 as early Llama files have it, mean none.
    pub fn token_id(&self, key: &str, default: Option<u32>) -> Result<Option<u32>, ConfigError> {
        match self.map.get(key) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(value) if value.as_i64() == Some(-1) => Ok(None),
            Some(value) => as_id(value).map(Some).ok_or_else(|| self.wrong_type(key, "a token id or null", value)),
        }
    }

    /// As [`Keys::token_id`], or a list of ids.
    pub fn token_ids(&self, key: &str, default: Option<u32>) -> Result<Vec<u32>, ConfigError> {
        let Some(value @ Value::Array(list)) = self.map.get(key) else {
            return Ok(self.token_id(key, default)?.into_iter().collect());
        };
        let ids: Option<Vec<u32>> = list.iter().map(as_id).collect();
        ids.ok_or_else(|| self.wrong_type(key, "a token id, a list of token ids or null", value))
    }

    /// The error for a value that has the right type but makes no model.
    pub fn invalid(&self, key: &str, expected: impl Into<String>, got: String) -> ConfigError {
        ConfigError::Invalid { origin: self.origin(), key: self.full(key), expected: expected.into(), got }
    }

    /// The error for a value that other programs know and this one does not.
    pub fn unsupported(&self, key: &str, expected: &str, hint: &str) -> ConfigError {
        ConfigError::Unsupported {
            origin: self.origin(),
            key: self.full(key),
            expected: expected.to_string(),
            got: self.map.get(key).map_or_else(|| "nothing".to_string(), describe),
            hint: hint.to_string(),
        }
    }

    fn missing(&self, key: &str, expected: String) -> ConfigError {
        ConfigError::Missing { origin: self.origin(), key: self.full(key), expected }
    }

    fn wrong_type(&self, key: &str, expected: &str, got: &Value) -> ConfigError {
        self.invalid(key, expected, describe(got))
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn full(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }
}

const POSITIVE: &str = "a number above 0";

fn size_range(max: usize) -> String {
    format!("a whole number from 1 to {max}")
}

fn as_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// The value as it stands in the file, cut to a readable length, and its type.
fn describe(value: &Value) -> String {
    let kind = match value {
        Value::Null => return "null".to_string(),
        Value::Bool(flag) => return flag.to_string(),
        Value::Number(number) => return number.to_string(),
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    let text = value.to_string();
    let shown: String = text.chars().take(60).collect();
    let dots = if shown.len() < text.len() { "..." } else { "" };
    format!("{shown}{dots} ({kind})")
}
