//! Texts and pairs of texts with a label, for classification: files -> records -> token ids.
//!
//! Fields go by the names of the GLUE tasks, looked for in this order in the first record of each file:
//!
//! | first text | second text |
//! | --- | --- |
//! | `sentence1` | `sentence2` |
//! | `premise` | `hypothesis` |
//! | `question1` | `question2` |
//! | `question` | `sentence` or `passage` |
//! | `text_a` | `text_b` |
//! | `text` | `text_pair`, or none |
//! | `sentence` | none |
//!
//! and `label`. `data.fields = { text = "...", text_pair = "...", label = "..." }` names others. Files are those of
//! [`super::source`] and the tables of [`super::table`]. A record longer than a row is cut at the end of its longer text.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lowrank_models::hf::Tokenizer;
use rayon::prelude::*;
use serde_json::{Map, Value};

use super::classes::{LabelRules, RawLabel, Understood, understand};
use super::error::DataError;
use super::examples::Place;
use super::record::{BadRecord, into_text, parse};
use super::source::{Numbering, Source, bad_file, kind_of, resolve_files};
use super::store::ReadReport;
use super::table::{is_table, read_table};
use super::{DataConfig, OnBadRecord};

/// The names of the fields that `data.fields` may map to others.
pub const FIELDS: [&str; 3] = ["text", "text_pair", "label"];

/// The field of the label, where `data.fields` names no other.
const LABEL: &str = "label";

/// Pairs of fields that may hold the texts.
const PAIRS: [(&str, &str); 7] = [
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
];

/// Fields that may hold a single text.
const SINGLE: [&str; 3] = ["text", "sentence", "text_a"];

/// Texts with labels, tokenised.
#[derive(Debug, Clone, PartialEq)]
pub struct Texts {
    /// Ids of all texts, one after the other.
    pub ids: Vec<u32>,
    /// Their token types.
    pub types: Vec<u32>,
    /// Where each text begins in `ids`, and where the last one ends.
    pub starts: Vec<usize>,
}

impl Texts {
    /// The ids and types of a text.
    pub fn text(&self, index: usize) -> (&[u32], &[u32]) {
        let range = self.starts[index]..self.starts[index + 1];
        (&self.ids[range.clone()], &self.types[range])
    }

    /// Number of texts.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What was read of some files.
#[derive(Debug, Clone)]
pub struct LabelledTexts {
    /// The tokens.
    pub texts: Texts,
    /// Where each came from.
    pub places: Vec<Place>,
    /// Labels and names of the classes.
    pub understood: Understood,
    /// What was cut and skipped.
    pub report: ReadReport,
}

/// One record before its label is understood.
struct Example {
    ids: Vec<u32>,
    types: Vec<u32>,
    cut: bool,
    label: RawLabel,
}

/// Reads and tokenises files.
///
/// # Errors
/// A file cannot be read, its fields are not known, a record is bad under `on_bad_record = "error"`, or none is left.
pub fn read_texts(
    entries: &[String],
    config: &DataConfig,
    tokenizer: &Tokenizer,
    rules: &LabelRules,
) -> Result<LabelledTexts, DataError> {
    let tokenizer = tokenizer.cutting_at(config.max_seq_length)?;
    let mut texts = Texts { ids: vec![], types: vec![], starts: vec![0] };
    let (mut places, mut labels, mut report) = (vec![], vec![], ReadReport::default());
    let mut number = 0;
    for path in files(entries)? {
        let path: Arc<Path> = path.into();
        let (numbering, rows) = rows(&path, config)?;
        let fields = Fields::of_file(&path, &rows, numbering, config)?;
        let examples: Vec<_> = rows
            .into_par_iter()
            .map(|(position, row)| (position, row.and_then(|row| fields.example(row, &tokenizer))))
            .collect();
        for (position, example) in examples {
            let place = Place { path: path.clone(), numbering, position, record: number };
            number += 1;
            match example {
                Ok(example) => {
                    report.truncated += u64::from(example.cut);
                    texts.ids.extend(example.ids);
                    texts.types.extend(example.types);
                    texts.starts.push(texts.ids.len());
                    places.push(place);
                    labels.push(example.label);
                }
                Err(bad) if config.on_bad_record == OnBadRecord::Error => {
                    return Err(DataError::Record { location: place.to_string(), bad });
                }
                Err(bad) => report.skip(&place.to_string(), &bad),
            }
        }
    }
    if places.is_empty() {
        return Err(DataError::NothingLeft { skipped: report.skipped_count(), reasons: report.reasons() });
    }
    let understood = understand(&labels, rules, |index| places[index].to_string())?;
    Ok(LabelledTexts { texts, places, understood, report })
}

/// Tables are local files; everything else is found as for language models.
fn files(entries: &[String]) -> Result<Vec<PathBuf>, DataError> {
    let mut files = vec![];
    for entry in entries {
        match is_table(Path::new(entry)) {
            true => files.push(PathBuf::from(entry)),
            false => files.extend(resolve_files(std::slice::from_ref(entry))?),
        }
    }
    Ok(files)
}

type Rows = Vec<(u64, Result<Value, BadRecord>)>;

/// All records of a file as objects.
fn rows(path: &Path, config: &DataConfig) -> Result<(Numbering, Rows), DataError> {
    if is_table(path) {
        return Ok((Numbering::Line, read_table(path)?));
    }
    let mut source = Source::open(path, &wanted(config))?;
    if source.numbering() == Numbering::Whole {
        let hint = "give a table or JSON lines with the fields `text` and `label`";
        return Err(bad_file(path, "plain text has no labels", hint));
    }
    let mut rows = vec![];
    loop {
        let chunk = source.next_chunk(4096)?;
        if chunk.is_empty() {
            return if rows.is_empty() { Err(super::source::empty(path)) } else { Ok((source.numbering(), rows)) };
        }
        rows.extend(chunk.into_iter().map(|(position, raw)| (position, parse(raw, "text"))));
    }
}

/// The columns of a Parquet file that may be needed.
fn wanted(config: &DataConfig) -> Vec<String> {
    let pairs = PAIRS.iter().flat_map(|(first, second)| [*first, *second]);
    let usual = pairs.chain(SINGLE).chain([LABEL]).map(str::to_owned);
    usual.chain(config.fields.values().cloned()).collect()
}

/// The names of the fields in a file.
struct Fields {
    first: String,
    second: Option<String>,
    label: String,
    is_table: bool,
}

impl Fields {
    fn of_file(path: &Path, rows: &Rows, numbering: Numbering, config: &DataConfig) -> Result<Self, DataError> {
        let label = config.fields.get(LABEL).map_or(LABEL, String::as_str).to_owned();
        let is_table = is_table(path);
        let named = |field: &str| config.fields.get(field).cloned();
        if let Some(first) = named("text") {
            return Ok(Self { first, second: named("text_pair"), label, is_table });
        }
        let found = rows.iter().find_map(|(position, row)| Some((position, row.as_ref().ok()?.as_object()?)));
        let Some((position, object)) = found else {
            // Every record is bad; the first of them will be named.
            return Ok(Self { first: "text".to_owned(), second: None, label, is_table });
        };
        let has = |field: &&str| object.contains_key(*field);
        let pair = PAIRS.iter().find(|(first, second)| has(first) && has(second));
        let single = SINGLE.iter().find(|field| has(field));
        let (first, second) = match (pair, single) {
            (Some((first, second)), _) => (*first, Some((*second).to_owned())),
            (None, Some(single)) => (*single, None),
            (None, None) => return Err(unknown_fields(path, &numbering.location(path, *position), object)),
        };
        Ok(Self { first: first.to_owned(), second, label, is_table })
    }

    fn example(&self, row: Value, tokenizer: &Tokenizer) -> Result<Example, BadRecord> {
        let Value::Object(mut row) = row else {
            let reason = format!("expected a JSON object, found {}", kind_of(&row));
            return Err(BadRecord::new("not an object", reason));
        };
        let label = take(&mut row, &self.label)?;
        let label = RawLabel::from_value(&label, self.is_table).map_err(|bad| bad.in_field(&self.label))?;
        let first = text(&mut row, &self.first)?;
        let second = self.second.as_ref().map(|field| text(&mut row, field)).transpose()?;
        let encoding = tokenizer
            .encode_pair(&first, second.as_deref())
            .map_err(|error| BadRecord::new("refused by the tokenizer", error.to_string()))?;
        if encoding.ids.is_empty() {
            return Err(BadRecord::new("empty", "is empty").in_field(&self.first));
        }
        Ok(Example { ids: encoding.ids, types: encoding.types, cut: encoding.cut, label })
    }
}

fn take(row: &mut Map<String, Value>, field: &str) -> Result<Value, BadRecord> {
    match row.remove(field) {
        None => Err(BadRecord::new("missing field", "is missing").in_field(field)),
        Some(Value::Null) => Err(BadRecord::new("missing field", "is null").in_field(field)),
        Some(value) => Ok(value),
    }
}

fn text(row: &mut Map<String, Value>, field: &str) -> Result<String, BadRecord> {
    into_text(take(row, field)?).map_err(|bad| bad.in_field(field))
}

fn unknown_fields(path: &Path, location: &str, object: &Map<String, Value>) -> DataError {
    let found = object.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
    let pairs = PAIRS.iter().map(|(first, second)| format!("`{first}` and `{second}`")).collect::<Vec<_>>().join(", ");
    bad_file(
        path,
        format!(
            "no text in the first record ({location}): it has the fields {found}; expected {pairs}, `text` or `sentence`"
        ),
        "name the fields, for example data.fields = { text = \"headline\", text_pair = \"body\", label = \"topic\" }",
    )
}
