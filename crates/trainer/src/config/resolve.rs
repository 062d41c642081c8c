//! Reads a configuration file and the `--set` overrides into a [`RunConfig`] that was checked.

use std::path::Path;

use serde::Deserialize;
use toml::de::{DeTable, DeValue};

use super::adapter::AdapterConfig;
use super::check;
use super::key_error::{Origins, structure_problem, syntax_problem};
use super::raw::RunConfig;
use crate::error::Problem;

/// What a configuration is read for, which decides what it must say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A training run: everything is required and checked.
    Train,
    /// `eval`, `generate` or `merge`: training data, steps and `output_dir` may be missing.
    Use,
}

/// Reads the configuration of a training run.
///
/// # Errors
/// A missing or unreadable file, text that is not TOML, an unknown key or a wrong type (one at a time, with its line), or
/// every value that makes no sense (all together, numbered).
pub fn load(path: &Path, sets: &[String]) -> Result<RunConfig, Problem> {
    load_for(Purpose::Train, path, sets)
}

/// Reads a configuration for any purpose; see [`load`].
///
/// # Errors
/// As [`load`].
pub fn load_for(purpose: Purpose, path: &Path, sets: &[String]) -> Result<RunConfig, Problem> {
    let text = read_text(path)?;
    let shown = path.display().to_string();
    let config = parse(&shown, &text, sets)?;
    let problems = check::problems(&config, purpose);
    match problems.as_slice() {
        [] => Ok(config),
        [only] => Err(Problem::config(format!("{shown}: {only}"))),
        several => {
            let list: String =
                several.iter().enumerate().map(|(i, problem)| format!("\n  {}. {problem}", i + 1)).collect();
            Err(Problem::config(format!("{shown} has {} problems:{list}", several.len())))
        }
    }
}

pub(crate) fn read_text(path: &Path) -> Result<String, Problem> {
    let shown = path.display();
    if path.is_dir() {
        return Err(Problem::config(format!("{shown} is a folder, expected a configuration file"))
            .hint("pass --config FILE.toml"));
    }
    let bytes = std::fs::read(path).map_err(|error| {
        Problem::config(format!("cannot read the configuration file {shown}"))
            .source(error)
            .hint("paths are relative to the current folder")
    })?;
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..offset].iter().filter(|byte| **byte == b'\n').count() + 1;
        Problem::config(format!("{shown}, line {line}: byte {offset} of the file is not UTF-8"))
            .hint("save the file as UTF-8 text")
    })
}

/// Reads the text of a file named `file` and lays the overrides over it. Only the structure is checked.
pub(super) fn parse(file: &str, text: &str, sets: &[String]) -> Result<RunConfig, Problem> {
    let mut origins = Origins { file: file.to_owned(), text, files: Vec::new(), sets: Vec::new() };
    let mut document = DeTable::parse(text).map_err(|error| syntax_problem(&error, &origins))?;

    // Every override is a small document whose text is moved behind all earlier text, so that a position in an error
    // tells which document it belongs to.
    let mut address = text.len() + 1;
    let mut documents = Vec::with_capacity(sets.len());
    for set in sets {
        let document = set_document(set, address)?;
        origins.sets.push((address, set));
        address += document.len() + 1;
        documents.push(document);
    }
    for set in &documents {
        let overrides = DeTable::parse(set).map_err(|error| syntax_problem(&error, &origins))?;
        lay_over(document.get_mut(), overrides.into_inner());
    }

    let table = document.get_ref().clone();
    let mut config = RunConfig::deserialize(toml::Deserializer::from(document))
        .map_err(|error| structure_problem(&error, &table, &origins))?;
    if config.adapter.as_ref().is_some_and(AdapterConfig::calibrates) {
        config.calibration.get_or_insert_default(); // so that the resolved file shows it
    }
    Ok(config)
}

/// The TOML document of one `--set key=value`, behind `address` spaces. A bare word becomes a string.
fn set_document(set: &str, address: usize) -> Result<String, Problem> {
    let example = "write --set key=value, for example --set optimizer.adamw.learning_rate=1e-4";
    let Some((key, value)) = set.split_once('=').map(|(key, value)| (key.trim(), value.trim())) else {
        return Err(Problem::config(format!("--set {set}: there is no `=`")).hint(example));
    };
    if key.is_empty() || DeTable::parse(&format!("{key} = 0")).is_err() {
        return Err(Problem::config(format!("--set {set}: `{key}` is not a key")).hint(example));
    }
    let padding = " ".repeat(address);
    let as_toml = format!("{padding}{key} = {value}");
    let error = match DeTable::parse(&as_toml) {
        Ok(_) => return Ok(as_toml),
        Err(error) => error,
    };
    // What looks like a list, a table or a quoted string was meant as one.
    if value.starts_with(['[', '{', '"', '\'']) {
        return Err(Problem::config(format!("--set {set}: not a TOML value: {}", error.message())));
    }
    Ok(format!("{padding}{key} = {}", toml::Value::String(value.to_owned())))
}

/// Puts every value of `above` into `below`. Tables are joined, anything else is replaced.
pub(crate) fn lay_over<'a>(below: &mut DeTable<'a>, above: DeTable<'a>) {
    for (key, value) in above {
        if let Some(old) = below.get_mut(key.get_ref().as_ref())
            && let DeValue::Table(old_table) = old.get_mut()
            && value.get_ref().is_table()
        {
            if let DeValue::Table(new_table) = value.into_inner() {
                lay_over(old_table, new_table);
            }
            continue;
        }
        below.insert(key, value);
    }
}

/// The configuration as a TOML value, for [`super::diff`].
///
/// # Errors
/// A path that is not UTF-8.
pub fn resolved_value(config: &RunConfig) -> Result<toml::Value, Problem> {
    toml::Value::try_from(config).map_err(unwritable)
}

/// Text of `config.toml` in the run directory: the configuration with every default filled in, below a comment that
/// says what made it. `device` is the description of the device that `auto` became.
///
/// # Errors
/// A path that is not UTF-8.
pub fn resolved_toml(config: &RunConfig, device: &str) -> Result<String, Problem> {
    let body = toml::to_string(config).map_err(unwritable)?;
    let device = device.replace('\n', " ");
    Ok(format!(
        "# Resolved configuration of this run, with every default filled in.\n# lowrank-train {}\n# device: {device}\n# seed: {}\n\n{body}",
        crate::cli::VERSION,
        config.seed
    ))
}

fn unwritable(error: toml::ser::Error) -> Problem {
    Problem::config("the configuration cannot be written as TOML").source(error)
}

#[cfg(test)]
#[path = "resolve_tests.rs"]
mod tests;
