//! A study file: one base configuration, variants of it, learning rates, seeds.
//!
//! ```toml
//! base = "configs/compare/base.toml"     # path, or a whole configuration as a table
//! output_dir = "runs/compare/mine"
//! seeds = [1, 2, 3]
//!
//! [data]
//! validation = "data/demo/eval.jsonl"    # picks the learning rate
//! test = "data/demo/test.jsonl"          # is scored once, at the end
//!
//! [[variant]]
//! name = "LoRA"
//! adapter = { lora = { r = 8 } }         # the whole table, in place of that of the base
//! learning_rates = [1e-3, 2e-3]
//!
//! [[variant]]
//! name = "full"
//! adapter = {}                           # an empty table takes that of the base away
//! set = { "training.micro_batch_size" = 4, optimizer.adamw.weight_decay = 0.1 }
//! ```
//!
//! A variant begins as its own `base` or that of the study. Then its `adapter`, `optimizer` and `quantization` tables stand in
//! place of those of the base, and the keys of `set` (first those of the study, then its own) are laid over: tables are
//! joined, other values replaced.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;
use toml::de::DeTable;

use super::metric::Metric;
use super::variant::Source;
use crate::config::{
    Origins, Purpose, ResumeFrom, RunConfig, problems, read_text, resolved_value, structure_problem, syntax_problem,
};
use crate::data::{Paths, ValSetSize};
use crate::error::Problem;

/// A table that is read later.
type Keys = BTreeMap<String, IgnoredAny>;

/// What the file may say; tables of configurations are read later, each with its variant.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    #[serde(default)]
    base: Option<IgnoredAny>,
    #[serde(default)]
    output_dir: PathBuf,
    #[serde(default)]
    seeds: Vec<u64>,
    grid_seed: Option<u64>,
    metric: Option<String>,
    higher_is_better: Option<bool>,
    #[serde(default)]
    budget: Budget,
    jobs: Option<usize>,
    #[serde(default)]
    keep: Keep,
    #[serde(rename = "set")]
    _set: Option<Keys>,
    #[serde(default)]
    data: RawData,
    #[serde(default)]
    variant: Vec<RawVariant>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawData {
    validation: Option<Paths>,
    test: Option<Paths>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVariant {
    #[serde(default)]
    name: String,
    base: Option<IgnoredAny>,
    #[serde(rename = "set")]
    _set: Option<Keys>,
    #[serde(rename = "adapter")]
    _adapter: Option<Keys>,
    #[serde(rename = "optimizer")]
    _optimizer: Option<Keys>,
    #[serde(rename = "quantization")]
    _quantization: Option<Keys>,
    learning_rates: Option<Vec<f64>>,
}

/// What all variants must have had the same amount of, else the report says so.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// Tokens trained on.
    #[default]
    Tokens,
    /// Nothing: the variants are meant to differ.
    Any,
}

/// What stays of a run that is done and scored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// Checkpoints, results and numbers.
    All,
    /// The adapter or model and the numbers; checkpoints are removed.
    #[default]
    Weights,
    /// Only metrics, configuration, log and scores.
    Numbers,
}

/// A study whose configurations were checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Study {
    /// Name of the file without its ending.
    pub name: String,
    /// The file as it was named.
    pub file: String,
    /// Folder of all runs and of the report.
    pub output_dir: PathBuf,
    /// What variants are compared by.
    pub metric: Metric,
    /// Seeds of the runs with the picked rate.
    pub seeds: Vec<u64>,
    /// Seed of the search for the rate.
    pub grid_seed: u64,
    /// Data that picks the rate, where the study names it.
    pub validation: Option<Paths>,
    /// Data that the picked runs are scored on.
    pub test: Option<Paths>,
    /// What must be equal.
    pub budget: Budget,
    /// Runs at the same time.
    pub jobs: usize,
    /// What stays of a run.
    pub keep: Keep,
    /// The variants, in the order of the file.
    pub variants: Vec<StudyVariant>,
}

/// A variant of a study.
#[derive(Debug, Clone, PartialEq)]
pub struct StudyVariant {
    /// Its name, also that of its folder.
    pub name: String,
    /// Learning rates to try, at least one.
    pub rates: Vec<f64>,
    config: RunConfig,
}

/// One run of a study.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// Name of its variant.
    pub variant: String,
    /// Its learning rate.
    pub rate: f64,
    /// Its seed.
    pub seed: u64,
    /// Its configuration; `output_dir` is its folder.
    pub config: RunConfig,
}

impl Study {
    /// The run of a variant with a rate and a seed.
    ///
    /// # Errors
    /// A path that is not UTF-8.
    pub fn run(&self, variant: &StudyVariant, rate: f64, seed: u64) -> Result<Planned, Problem> {
        let mut config = with_rate(&variant.config, rate)?;
        config.seed = seed;
        let below = format!("runs/{}/lr-{rate:e}/seed-{seed}", variant.name);
        config.output_dir = self.output_dir.join(below);
        Ok(Planned { variant: variant.name.clone(), rate, seed, config })
    }
}

/// The configuration with another learning rate of its optimiser.
fn with_rate(config: &RunConfig, rate: f64) -> Result<RunConfig, Problem> {
    let mut value = resolved_value(config)?;
    let method = config.optimizer.common().key;
    if let Some(table) = value.get_mut("optimizer").and_then(|table| table.get_mut(method)?.as_table_mut()) {
        table.insert("learning_rate".to_owned(), toml::Value::Float(rate));
    }
    let failed = |error| Problem::config("the configuration of a run cannot be made").source(error);
    RunConfig::deserialize(value).map_err(failed)
}

/// Reads a study and the configurations it names.
///
/// # Errors
/// A missing file, text that is not TOML, an unknown key or a wrong type (with its line), or every value of the study that
/// makes no sense (numbered).
pub fn load(path: &Path) -> Result<Study, Problem> {
    let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    parse(&name, &path.display().to_string(), &read_text(path)?)
}

/// Reads the text of a study.
///
/// # Errors
/// As [`load`].
pub fn parse(name: &str, file: &str, text: &str) -> Result<Study, Problem> {
    let origins = Origins { file: file.to_owned(), text, files: vec![], sets: vec![] };
    let document = DeTable::parse(text).map_err(|error| syntax_problem(&error, &origins))?;
    let table = document.get_ref().clone();
    let raw = Raw::deserialize(toml::Deserializer::from(document))
        .map_err(|error| structure_problem(&error, &table, &origins))?;
    let (metric, found) = check(&raw);
    let metric = refuse(file, "", &found).and(metric)?;
    let tables = table.get("variant").and_then(|list| list.get_ref().as_array());
    let tables = tables.into_iter().flatten().filter_map(|item| item.get_ref().as_table());
    let mut variants = vec![];
    for (raw_variant, own) in raw.variant.iter().zip(tables) {
        let source = Source { file, text, study: &table, own, name: &raw_variant.name };
        variants.push(variant(&source, raw_variant, &raw.data, &metric)?);
    }
    Ok(Study {
        name: name.to_owned(),
        file: file.to_owned(),
        output_dir: raw.output_dir,
        metric,
        grid_seed: raw.grid_seed.unwrap_or(raw.seeds[0]), // `check` refuses a study without seeds
        seeds: raw.seeds,
        validation: raw.data.validation,
        test: raw.data.test,
        budget: raw.budget,
        jobs: raw.jobs.unwrap_or(1),
        keep: raw.keep,
        variants,
    })
}

/// The metric, and one sentence for every value that makes no sense.
fn check(raw: &Raw) -> (Result<Metric, Problem>, Vec<String>) {
    let mut found = vec![];
    let mut require = |good: bool, problem: &dyn Fn() -> String| {
        if !good {
            found.push(problem());
        }
    };
    require(!raw.output_dir.as_os_str().is_empty(), &|| {
        "output_dir is missing: name the folder for the runs and the report".to_owned()
    });
    require(!raw.seeds.is_empty(), &|| {
        "seeds is missing: list at least one, for a standard error two or more".to_owned()
    });
    require(distinct(&raw.seeds), &|| "seeds holds a seed twice".to_owned());
    require(raw.jobs != Some(0), &|| "jobs is 0, must be at least 1".to_owned());
    require(!raw.variant.is_empty(), &|| "there is no variant: add a [[variant]] table for each".to_owned());
    let mut names = BTreeSet::new();
    for (number, variant) in (1..).zip(&raw.variant) {
        let name = &variant.name;
        let shown = if name.is_empty() { format!("variant {number}") } else { format!("variant `{name}`") };
        require(!name.is_empty(), &|| format!("{shown} has no name"));
        let fits = !name.starts_with('.')
            && name.chars().all(|letter| letter.is_alphanumeric() || "-_.+ ()=".contains(letter));
        require(fits, &|| {
            format!("{shown}: the name is that of a folder too: letters, digits, spaces and - _ . + ( ) = only")
        });
        require(name.is_empty() || names.insert(name.to_lowercase()), &|| format!("{shown} is there twice"));
        let base = variant.base.is_some() || raw.base.is_some();
        require(base, &|| format!("{shown} has no base: name a configuration as base of the study or of the variant"));
        if let Some(rates) = &variant.learning_rates {
            require(!rates.is_empty(), &|| {
                format!("{shown}: learning_rates is empty; leave it out to use the rate of its configuration")
            });
            let bad = rates.iter().find(|rate| !(rate.is_finite() && **rate > 0.0));
            require(bad.is_none(), &|| {
                format!("{shown}: learning_rates holds {}, must be greater than 0", bad.unwrap_or(&0.0))
            });
            let texts: Vec<String> = rates.iter().map(|rate| format!("{rate:e}")).collect();
            require(distinct(&texts), &|| format!("{shown}: learning_rates holds a rate twice"));
        }
    }
    (Metric::new(raw.metric.as_deref().unwrap_or("eval_loss"), raw.higher_is_better), found)
}

fn distinct<T: Ord>(values: &[T]) -> bool {
    values.iter().collect::<BTreeSet<_>>().len() == values.len()
}

/// One error for a list of problems.
fn refuse(file: &str, place: &str, problems: &[String]) -> Result<(), Problem> {
    match problems {
        [] => Ok(()),
        [only] => Err(Problem::config(format!("{file}{place}: {only}"))),
        several => {
            let list: String = (1..).zip(several).map(|(number, problem)| format!("\n  {number}. {problem}")).collect();
            Err(Problem::config(format!("{file}{place} has {} problems:{list}", several.len())))
        }
    }
}

/// The checked configuration of a variant, and its rates.
fn variant(source: &Source<'_>, raw: &RawVariant, data: &RawData, metric: &Metric) -> Result<StudyVariant, Problem> {
    let mut config = source.config()?;
    // What the study gives every run, so that a base may leave it out.
    config.output_dir = PathBuf::from("runs");
    config.training.resume_from_checkpoint = ResumeFrom::Newest(true);
    if let Some(validation) = &data.validation {
        config.data.eval = Some(validation.clone());
        config.data.val_set_size = ValSetSize::Count(0);
    }
    let rates = raw.learning_rates.clone().unwrap_or_else(|| vec![config.optimizer.common().learning_rate]);
    // The rate of the base is checked too where it is used.
    let mut found = problems(&with_rate(&config, rates[0])?, Purpose::Train);
    if config.data.eval.is_none() && matches!(config.data.val_set_size, ValSetSize::Count(0)) {
        found.push("there is nothing to pick the learning rate on: set data.validation in the study".to_owned());
    }
    if metric.name == "exact_match" && !config.evaluation.generate {
        found.push("the metric is exact_match, but evaluation.generate is false".to_owned());
    }
    refuse(source.file, &format!(", variant `{}`", source.name), &found)?;
    Ok(StudyVariant { name: raw.name.clone(), rates, config })
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
