//! Training data: files -> records -> token ids -> rows of a batch.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`source`] | files: JSONL, JSON, Parquet, plain text, hub data sets; yields raw records with their place in the file |
//! | [`record`] | raw record -> [`record::Record`]: which fields, which types, what is wrong with it |
//! | [`tokenize`] | records -> ids and which of them count in the loss, on all cores |
//! | [`cache`] | the result of tokenisation on disk, keyed by content |
//! | [`packing`] | which documents share a row, which rows share a batch |
//! | [`loader`] | batches without end, with a position that can be saved and resumed exactly |
//! | [`labelled`], [`table`], [`images`], [`pictures`], [`classes`] | texts and images with labels, for classification |
//! | [`examples`], [`class_loader`] | the same as batches |
//! | [`corpus`], [`stream`] | `streaming = true`: plain text of any size, read, tokenised and packed while training |
//!
//! [`prepare`] does all of it for a run; [`load`] for one list of files.

pub mod cache;
pub mod class_loader;
#[cfg(test)]
mod class_tests;
pub mod classes;
pub mod corpus;
pub mod error;
pub mod examples;
pub mod images;
#[cfg(test)]
mod input_tests;
pub mod labelled;
pub mod loader;
#[cfg(test)]
mod loader_tests;
mod messages;
pub mod packing;
pub mod pictures;
pub mod record;
pub mod resample;
pub mod source;
pub mod store;
pub mod stream;
pub mod table;
#[cfg(test)]
mod testing;
pub mod tokenize;

pub use cache::default_cache_folder;
pub use class_loader::{LabelledEvaluation, LabelledLoader};
pub use classes::LabelRules;
pub use corpus::{Corpus, StreamPosition, TextFiles};
pub use error::DataError;
pub use examples::{Examples, LabelledData, prepare_images, prepare_texts};
pub use loader::{Evaluation, Loader, LoaderConfig, LoaderState};
pub use pictures::ImageRules;
pub use record::{Located, Prompt, Record, read_records};
pub use store::{Dataset, ReadReport, Statistics};
pub use tokenize::Encoder;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Largest `max_seq_length`: far above anything useful, and low enough that a row can be made.
const LONGEST_ROW: usize = 1 << 20;

/// The `[data]` table of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// What to train on: a path, a list of paths, or a hub data set as `owner/name` or `owner/name:train/*.parquet`.
    /// Required for training. The end of the name tells the kind: `.jsonl`, `.ndjson`, `.json`, `.parquet`, `.txt`; of labelled
    /// texts also `.csv`, `.tsv`. Images: a folder that holds a folder of `.png` or `.jpg` files for each class.
    pub train: Paths,
    /// What to evaluate on, in the same form. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<Paths>,
    /// Without `eval`: how much of `train` is held out, as a number of records or a fraction below 1. Default 0.
    pub val_set_size: ValSetSize,
    /// Longest row in tokens. Default 512.
    pub max_seq_length: usize,
    /// Put several documents into one row, without attention between them. Default true.
    pub packing: bool,
    /// Read `train` while training instead of tokenising it first: plain text or JSONL with a field `text`, of any
    /// size. Rows are always full, documents go on in the next row. Needs `training.max_steps`; to evaluate, name
    /// `eval`. Default false.
    pub streaming: bool,
    /// Count prompts and user turns in the loss too. Default false.
    pub train_on_inputs: bool,
    /// What the records are. Default `auto`: told from the first record of each file.
    pub format: Format,
    /// What to do with a record that cannot be used. Default `error`.
    pub on_bad_record: OnBadRecord,
    /// Visit the data in a new random order in every epoch; of streamed data, the files. Default true.
    pub shuffle: bool,
    /// Without packing: rows are padded to a multiple of this many tokens. Default 8.
    pub pad_to_multiple_of: usize,
    /// Keep tokenised data on disk for the next run. Default true.
    pub cache: bool,
    /// Field names that differ, as `{ prompt = "question", completion = "answer" }`; of labelled texts `text`, `text_pair` and
    /// `label`. Default none.
    pub fields: BTreeMap<String, String>,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            train: Paths::Many(Vec::new()),
            eval: None,
            val_set_size: ValSetSize::Count(0),
            max_seq_length: 512,
            packing: true,
            streaming: false,
            train_on_inputs: false,
            format: Format::Auto,
            on_bad_record: OnBadRecord::Error,
            shuffle: true,
            pad_to_multiple_of: 8,
            cache: true,
            fields: BTreeMap::new(),
        }
    }
}

/// One path or several; or hub data sets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a path or a list of paths")]
pub enum Paths {
    /// A single path.
    One(String),
    /// Several, read in this order.
    Many(Vec<String>),
}

impl Paths {
    /// The entries in order.
    pub fn entries(&self) -> &[String] {
        match self {
            Paths::One(path) => std::slice::from_ref(path),
            Paths::Many(paths) => paths,
        }
    }

    /// Whether no path is given.
    pub fn is_empty(&self) -> bool {
        self.entries().iter().all(String::is_empty)
    }
}

/// How much of the training data is held out for evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a number of records, or a fraction between 0 and 1")]
pub enum ValSetSize {
    /// This many records.
    Count(u64),
    /// This part of the records, in [0, 1).
    Fraction(f64),
}

/// What the records of a file are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Told from the keys of the first record.
    #[default]
    Auto,
    /// `{"text": ...}`: every token counts.
    Text,
    /// `{"prompt": ..., "completion": ...}`: the completion counts.
    PromptCompletion,
    /// `{"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}`: the assistant's turns count.
    Messages,
    /// `{"instruction": ..., "input": ..., "output": ...}` in the wording of the Alpaca project: the output counts.
    Alpaca,
}

/// What happens to a record that cannot be used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnBadRecord {
    /// The run stops and names file, line, field and reason.
    #[default]
    Error,
    /// It is left out; the number of such records and their reasons are reported.
    Skip,
}

impl DataConfig {
    /// Every problem that shows without opening a file, as `(key, what is wrong)`.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        if self.max_seq_length < 4 {
            problems.push(("max_seq_length", format!("is {}, must be at least 4", self.max_seq_length)));
        }
        if self.max_seq_length > LONGEST_ROW {
            problems.push(("max_seq_length", format!("is {}, must be at most {LONGEST_ROW}", self.max_seq_length)));
        }
        if self.pad_to_multiple_of == 0 {
            problems.push((
                "pad_to_multiple_of",
                "is 0, must be at least 1 (no padding beyond the longest row)".to_owned(),
            ));
        }
        match self.val_set_size {
            ValSetSize::Fraction(part) if !(0.0..1.0).contains(&part) => {
                problems.push((
                    "val_set_size",
                    format!("is {part}, must be a fraction in [0, 1) or a whole number of records"),
                ));
            }
            size if self.eval.is_some() && size.is_some() => {
                problems.push(("val_set_size", "is set beside `eval`; give one of the two".to_owned()));
            }
            _ => {}
        }
        if self.streaming {
            problems.extend(self.streaming_problems());
        }
        for (name, column) in &self.fields {
            let known: Vec<&str> = record::FIELDS.iter().chain(&labelled::FIELDS[1..]).copied().collect();
            if !known.contains(&name.as_str()) {
                problems.push(("fields", format!("has no field `{name}`; the fields are {}", known.join(", "))));
            }
            if column.is_empty() {
                problems.push(("fields", format!("gives `{name}` an empty name")));
            }
        }
        problems
    }

    fn streaming_problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        if !self.packing {
            problems
                .push(("packing", "is false, but with `streaming` rows are always packed; leave it out".to_owned()));
        }
        if self.val_set_size.is_some() {
            let reason = "is set, but `streaming` never sees all records at once; name other files as `eval`";
            problems.push(("val_set_size", reason.to_owned()));
        }
        if !matches!(self.format, Format::Auto | Format::Text) {
            let reason = "names prompts or chats, but `streaming` reads plain text; set streaming = false";
            problems.push(("format", reason.to_owned()));
        }
        problems
    }

    fn check(&self) -> Result<(), DataError> {
        match self.problems().into_iter().next() {
            Some((key, reason)) => Err(DataError::Config { key, reason }),
            None => Ok(()),
        }
    }
}

impl ValSetSize {
    /// Whether anything is held out.
    pub fn is_some(self) -> bool {
        match self {
            ValSetSize::Count(count) => count > 0,
            ValSetSize::Fraction(part) => part > 0.0,
        }
    }

    /// Records held out of `total`, at least one where anything is held out.
    fn records_of(self, total: u64) -> u64 {
        match self {
            ValSetSize::Count(count) => count,
            ValSetSize::Fraction(part) if part > 0.0 => ((total as f64 * part).round() as u64).max(1),
            ValSetSize::Fraction(_) => 0,
        }
    }
}

/// What is trained on.
#[derive(Debug, Clone)]
pub enum TrainingData {
    /// Tokens of all records, in memory.
    Tokenised(Arc<Dataset>),
    /// Files that are read while training.
    Streamed(Corpus),
}

/// The data of a run.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// What is trained on.
    pub train: TrainingData,
    /// What is evaluated on, if anything.
    pub eval: Option<Arc<Dataset>>,
}

/// Reads, tokenises (or finds in the cache) and splits the data of a run. Streamed training data is only looked at.
///
/// `seed` decides which records `val_set_size` holds out. `cache_folder` is where tokenised data is kept; `None` keeps none.
///
/// # Errors
/// A wrong setting, an unreadable file, a bad record under `on_bad_record = "error"`, or nothing left to train on.
pub fn prepare(
    config: &DataConfig,
    encoder: &Encoder<'_>,
    seed: u64,
    cache_folder: Option<&Path>,
) -> Result<Prepared, DataError> {
    if config.train.is_empty() {
        return Err(DataError::Config {
            key: "train",
            reason: "is not set: give a path, a list of paths or a hub data set".to_owned(),
        });
    }
    let eval = || -> Result<Option<Arc<Dataset>>, DataError> {
        let loaded = config.eval.as_ref().map(|paths| load("eval", paths, config, encoder, cache_folder));
        Ok(loaded.transpose()?.map(Arc::new))
    };
    if config.streaming {
        config.check()?;
        let corpus = Corpus::open(&config.train, config, encoder.tokenizer)?;
        return Ok(Prepared { train: TrainingData::Streamed(corpus), eval: eval()? });
    }
    let train = load("train", &config.train, config, encoder, cache_folder)?;
    let prepared = |train, eval| Prepared { train: TrainingData::Tokenised(Arc::new(train)), eval };
    if config.eval.is_some() || !config.val_set_size.is_some() {
        return Ok(prepared(train, eval()?));
    }
    let total = train.statistics().records;
    let held_out = config.val_set_size.records_of(total);
    if held_out >= total {
        let reason = format!("holds out {held_out} of {total} records; nothing is left to train on");
        return Err(DataError::Config { key: "val_set_size", reason });
    }
    let (train, eval) = train.split(held_out, seed);
    tracing::info!("held out {} of {total} records for evaluation", eval.statistics().records);
    Ok(prepared(train, Some(Arc::new(eval))))
}

/// Reads and tokenises one list of files, or takes the result from the cache. `name` is for messages.
///
/// # Errors
/// As [`prepare`].
pub fn load(
    name: &str,
    paths: &Paths,
    config: &DataConfig,
    encoder: &Encoder<'_>,
    cache_folder: Option<&Path>,
) -> Result<Dataset, DataError> {
    config.check()?;
    let files = source::resolve_files(paths.entries())?;
    let folder = cache_folder.filter(|_| config.cache);
    let dataset = match folder {
        Some(folder) => cache::load_or_tokenize(&files, config, encoder, folder)?,
        None => tokenize::tokenize_files(&files, config, encoder)?,
    };
    dataset.log(name);
    Ok(dataset)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::data::testing::{encoder, tokenizer, write};

    #[test]
    fn the_table_reads_both_forms_and_refuses_unknown_keys() {
        let config: DataConfig = toml::from_str(
            "train = \"a.jsonl\"\neval = [\"b.jsonl\", \"c.json\"]\nfields = { prompt = \"q\" }\nval_set_size = 0.1",
        )
        .unwrap();
        assert_eq!(config.train.entries(), ["a.jsonl"]);
        assert_eq!(config.eval.as_ref().unwrap().entries(), ["b.jsonl", "c.json"]);
        assert_eq!(config.val_set_size, ValSetSize::Fraction(0.1));
        assert_eq!(config.problems()[0].0, "val_set_size");
        let again: DataConfig = toml::from_str(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
        let error = toml::from_str::<DataConfig>("max_length = 3").unwrap_err().to_string();
        assert!(error.contains("max_length") && error.contains("max_seq_length"), "{error}");
    }

    #[test]
    fn settings_that_cannot_work_are_named() {
        let config = DataConfig {
            max_seq_length: 2,
            pad_to_multiple_of: 0,
            val_set_size: ValSetSize::Fraction(1.5),
            fields: [("question".to_owned(), "q".to_owned())].into(),
            ..DataConfig::default()
        };
        let keys: Vec<&str> = config.problems().iter().map(|(key, _)| *key).collect();
        assert_eq!(keys, ["max_seq_length", "pad_to_multiple_of", "val_set_size", "fields"]);
    }

    #[test]
    fn a_split_is_repeatable_and_takes_every_record_once() {
        let folder = tempfile::tempdir().unwrap();
        let lines: String = (0..40).map(|i| format!("{{\"text\": \"record number {i}\"}}\n")).collect();
        let path = write(&folder, "a.jsonl", lines.as_bytes());
        let tokenizer = tokenizer();
        let config =
            DataConfig { train: Paths::One(path), val_set_size: ValSetSize::Fraction(0.25), ..DataConfig::default() };
        let records =
            |dataset: &Dataset| -> Vec<u64> { dataset.documents().iter().map(|document| document.record).collect() };
        let run = |seed| prepare(&config, &encoder(&tokenizer), seed, None).unwrap();
        let (first, second, other) = (run(1), run(1), run(2));
        let held_out = first.eval.clone().unwrap();
        assert_eq!(held_out.statistics().records, 10);
        assert_eq!(held_out.fingerprint(), second.eval.unwrap().fingerprint());
        assert_ne!(records(&held_out), records(&other.eval.unwrap()));
        let TrainingData::Tokenised(train) = &first.train else { panic!("nothing was to be streamed") };
        let mut all = [records(train), records(&held_out)].concat();
        all.sort_unstable();
        assert_eq!(all, (0..40).collect::<Vec<u64>>());

        let greedy = DataConfig { val_set_size: ValSetSize::Count(40), ..config.clone() };
        let error = prepare(&greedy, &encoder(&tokenizer), 1, None).unwrap_err();
        assert!(error.to_string().contains("holds out 40 of 40 records"), "{error}");
        let error = prepare(&DataConfig::default(), &encoder(&tokenizer), 1, None).unwrap_err();
        assert!(error.to_string().contains("data.train is not set"), "{error}");
    }
}
