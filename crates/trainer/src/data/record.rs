//! Records: which fields they have, in which types, and what is wrong with those that cannot be used.

use std::fmt;
use std::path::PathBuf;

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::error::DataError;
use super::messages::{check_messages, check_tools};
use super::source::{Numbering, Raw, Source, bad_file, empty, kind_of, resolve_files, text_from_bytes};
use super::{DataConfig, Format, OnBadRecord};

/// The names of all fields that are read; `data.fields` maps them to the names in the file.
pub const FIELDS: [&str; 8] = ["text", "prompt", "completion", "messages", "tools", "instruction", "input", "output"];

/// How many records are read and worked on at a time.
const CHUNK: usize = 2048;

/// One training example.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// A document of which every token counts.
    Text(String),
    /// A prompt and what should follow it, as plain text (Alpaca records end up here too).
    PromptCompletion {
        /// What the model is given; may be empty.
        prompt: String,
        /// What it should write; never empty.
        completion: String,
    },
    /// A conversation for the chat template.
    Messages {
        /// Objects with `role`, `content` and whatever else the template knows; no entry is null.
        messages: Vec<Value>,
        /// A list of tool descriptions, or null.
        tools: Value,
    },
}

/// What a model is asked when a record's answer is to be generated.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Plain text.
    Text(String),
    /// The conversation before the answer.
    Chat {
        /// The messages before the last answer.
        messages: Vec<Value>,
        /// A list of tool descriptions, or null.
        tools: Value,
    },
}

impl Record {
    /// The record as a question and its expected answer: the completion, or the content of the last assistant message.
    /// `None` for plain text and for conversations that do not end with an answer in text.
    pub fn question(&self) -> Option<(Prompt, String)> {
        match self {
            Record::Text(_) => None,
            Record::PromptCompletion { prompt, completion } => Some((Prompt::Text(prompt.clone()), completion.clone())),
            Record::Messages { messages, tools } => {
                let (last, before) = messages.split_last()?;
                let answer = last["content"].as_str().filter(|_| last["role"] == "assistant")?;
                Some((Prompt::Chat { messages: before.to_vec(), tools: tools.clone() }, answer.to_owned()))
            }
        }
    }
}

/// Why a record cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadRecord {
    /// The sort of problem, for counting.
    pub kind: &'static str,
    /// The field in question, as it is called in the file; empty where it is the whole record.
    pub field: String,
    /// What is wrong, with expected and got.
    pub reason: String,
    /// What to do about it; empty for the usual advice.
    pub hint: String,
}

impl BadRecord {
    /// A problem of the whole record.
    pub fn new(kind: &'static str, reason: impl Into<String>) -> Self {
        Self { kind, field: String::new(), reason: reason.into(), hint: String::new() }
    }

    /// Names the field, unless a deeper one is named already.
    pub fn in_field(mut self, field: &str) -> Self {
        if self.field.is_empty() {
            self.field = field.to_owned();
        }
        self
    }

    /// Adds advice.
    pub fn with_hint(mut self, hint: &str) -> Self {
        self.hint = hint.to_owned();
        self
    }
}

impl fmt::Display for BadRecord {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.field.as_str() {
            "" => formatter.write_str(&self.reason),
            field => write!(formatter, "field `{field}`: {}", self.reason),
        }
    }
}

/// A record and where it came from.
#[derive(Debug, Clone, PartialEq)]
pub struct Located {
    /// `train.jsonl:17`
    pub location: String,
    /// The record.
    pub record: Record,
}

/// Reads all records of some files without tokenising them, for evaluation by generation.
///
/// # Errors
/// As [`super::prepare`].
pub fn read_records(entries: &[String], config: &DataConfig) -> Result<Vec<Located>, DataError> {
    let files = resolve_files(entries)?;
    let mut reader = RecordReader::new(&files, config);
    let mut records = Vec::new();
    while let Some(chunk) = reader.next_chunk()? {
        let path = &files[chunk.file];
        for parsed in chunk.records {
            let location = chunk.numbering.location(path, parsed.position);
            match parsed.record {
                Ok(record) => records.push(Located { location, record }),
                Err(bad) if config.on_bad_record == OnBadRecord::Error => {
                    return Err(DataError::Record { location, bad });
                }
                Err(bad) => tracing::warn!("skipped {location}: {bad}"),
            }
        }
    }
    Ok(records)
}

/// One record of a chunk.
#[derive(Debug)]
pub(super) struct Parsed {
    /// Line, element or row.
    pub position: u64,
    /// Number over all files, from 0, bad ones included.
    pub number: u64,
    /// The record, or what is wrong with it.
    pub record: Result<Record, BadRecord>,
}

/// Some records of one file.
#[derive(Debug)]
pub(super) struct Chunk {
    /// Index of the file.
    pub file: usize,
    /// What its records are.
    pub format: Format,
    /// How its positions are counted.
    pub numbering: Numbering,
    /// The records in order.
    pub records: Vec<Parsed>,
    /// The share of the file that was read with this chunk, in [0, 1].
    pub fraction: f64,
}

/// All records of some files, chunk by chunk; a chunk is parsed on all cores.
pub(super) struct RecordReader<'a> {
    files: &'a [PathBuf],
    config: &'a DataConfig,
    columns: Columns<'a>,
    current: Option<(Source, Option<Format>)>,
    file: usize,
    records_in_file: u64,
    number: u64,
}

impl<'a> RecordReader<'a> {
    pub fn new(files: &'a [PathBuf], config: &'a DataConfig) -> Self {
        Self { files, config, columns: Columns { config }, current: None, file: 0, records_in_file: 0, number: 0 }
    }

    /// The next chunk; `None` after the last file.
    ///
    /// # Errors
    /// A file cannot be read, holds no records, or its format cannot be told.
    pub fn next_chunk(&mut self) -> Result<Option<Chunk>, DataError> {
        while let Some(path) = self.files.get(self.file) {
            let (mut source, known) = match self.current.take() {
                Some(current) => current,
                None => (Source::open(path, &self.columns.all())?, None),
            };
            let raw = source.next_chunk(CHUNK)?;
            if raw.is_empty() {
                if self.records_in_file == 0 {
                    return Err(empty(path));
                }
                self.file += 1;
                self.records_in_file = 0;
                continue;
            }
            let text_field = self.columns.name("text");
            let raw: Vec<(u64, Result<Value, BadRecord>)> =
                raw.into_par_iter().map(|(position, raw)| (position, parse(raw, text_field))).collect();
            let format = match known {
                Some(format) => Some(format),
                None => self.format_of(path, source.numbering(), &raw)?,
            };
            let first = self.number;
            let columns = &self.columns;
            let records: Vec<Parsed> = raw
                .into_par_iter()
                .enumerate()
                .map(|(index, (position, value))| {
                    let record = value.and_then(|value| columns.record(value, format.unwrap_or_default()));
                    Parsed { position, number: first + index as u64, record }
                })
                .collect();
            self.number += records.len() as u64;
            self.records_in_file += records.len() as u64;
            let (numbering, fraction) = (source.numbering(), source.fraction());
            self.current = Some((source, format));
            return Ok(Some(Chunk {
                file: self.file,
                format: format.unwrap_or_default(),
                numbering,
                records,
                fraction,
            }));
        }
        Ok(None)
    }

    /// The format of a file from its first chunk; `None` while no record of it is an object.
    fn format_of(
        &self,
        path: &std::path::Path,
        numbering: Numbering,
        records: &[(u64, Result<Value, BadRecord>)],
    ) -> Result<Option<Format>, DataError> {
        let wanted = self.config.format;
        if numbering == Numbering::Whole {
            return match wanted {
                Format::Auto | Format::Text => Ok(Some(Format::Text)),
                _ => Err(bad_file(
                    path,
                    "is plain text, but data.format names another kind of record",
                    "leave data.format at \"auto\", or convert the file to JSONL",
                )),
            };
        }
        if wanted != Format::Auto {
            return Ok(Some(wanted));
        }
        let Some((position, object)) =
            records.iter().find_map(|(position, value)| Some((position, value.as_ref().ok()?.as_object()?)))
        else {
            return Ok(None);
        };
        match self.columns.detect(object) {
            Some(format) => Ok(Some(format)),
            None => {
                let found: Vec<String> = object.keys().map(|key| format!("`{key}`")).collect();
                let found = if found.is_empty() {
                    "no fields at all".to_owned()
                } else {
                    format!("the fields {}", found.join(", "))
                };
                let location = numbering.location(path, *position);
                Err(bad_file(
                    path,
                    format!(
                        "cannot tell the format from the first record ({location}): it has {found}; expected `text`, `prompt` and `completion`, `messages`, or `instruction` and `output`"
                    ),
                    "name the fields, for example data.fields = { prompt = \"question\", completion = \"answer\" }",
                ))
            }
        }
    }
}

/// Bytes to a JSON value; a text document becomes an object with that text.
pub(super) fn parse(raw: Raw, text_field: &str) -> Result<Value, BadRecord> {
    match raw {
        Raw::Bad(bad) => Err(bad),
        Raw::Value(value) => Ok(value),
        Raw::Document(bytes) => {
            let text = Value::from(text_from_bytes(&bytes)?);
            Ok(Value::Object(Map::from_iter([(text_field.to_owned(), text)])))
        }
        Raw::Line(bytes) => {
            let text = text_from_bytes(&bytes)?;
            serde_json::from_str(text.trim()).map_err(|error| {
                let message = error.to_string();
                let message = message.split(" at line ").next().unwrap_or_default();
                let hint = if error.is_eof() {
                    "the line ends too early: the file may be truncated, or hold one object over several lines"
                } else {
                    ""
                };
                BadRecord::new("not valid JSON", format!("not valid JSON at column {}: {message}", error.column()))
                    .with_hint(hint)
            })
        }
    }
}

/// The names of the fields in the file.
struct Columns<'a> {
    config: &'a DataConfig,
}

impl Columns<'_> {
    fn name<'b>(&'b self, field: &'b str) -> &'b str {
        self.config.fields.get(field).map_or(field, String::as_str)
    }

    fn all(&self) -> Vec<String> {
        FIELDS.iter().map(|field| self.name(field).to_owned()).collect()
    }

    fn detect(&self, object: &Map<String, Value>) -> Option<Format> {
        let has = |field: &str| object.get(self.name(field)).is_some_and(|value| !value.is_null());
        let known = [
            (Format::Messages, has("messages")),
            (Format::PromptCompletion, has("prompt") && has("completion")),
            (Format::Alpaca, has("instruction") && has("output")),
            (Format::Text, has("text")),
        ];
        known.into_iter().find_map(|(format, fits)| fits.then_some(format))
    }

    fn record(&self, value: Value, format: Format) -> Result<Record, BadRecord> {
        let mut object = match value {
            Value::Object(object) => object,
            other => {
                return Err(BadRecord::new(
                    "not an object",
                    format!("expected a JSON object, found {}", kind_of(&other)),
                ));
            }
        };
        match format {
            Format::Text => Ok(Record::Text(self.text(&mut object, "text", not_blank)?)),
            Format::PromptCompletion => {
                let prompt = self.text(&mut object, "prompt", Ok)?;
                let completion = self.text(&mut object, "completion", not_blank)?;
                Ok(Record::PromptCompletion { prompt, completion })
            }
            Format::Alpaca => {
                let instruction = self.text(&mut object, "instruction", not_blank)?;
                let input = match object.get(self.name("input")) {
                    None | Some(Value::Null) => String::new(),
                    Some(_) => self.text(&mut object, "input", Ok)?,
                };
                let completion = self.text(&mut object, "output", not_blank)?;
                Ok(Record::PromptCompletion { prompt: alpaca_prompt(&instruction, &input), completion })
            }
            Format::Messages => {
                let messages = self.take(&mut object, "messages")?;
                let messages = check_messages(messages).map_err(|bad| bad.in_field(self.name("messages")))?;
                let tools = object.remove(self.name("tools")).unwrap_or_default();
                let tools = check_tools(tools).map_err(|bad| bad.in_field(self.name("tools")))?;
                Ok(Record::Messages { messages, tools })
            }
            Format::Auto => Err(BadRecord::new("not an object", "the format of the file is not known")),
        }
    }

    fn take(&self, object: &mut Map<String, Value>, field: &str) -> Result<Value, BadRecord> {
        let name = self.name(field);
        match object.remove(name) {
            None => Err(BadRecord::new("missing field", "is missing").in_field(name)),
            Some(Value::Null) => Err(BadRecord::new("missing field", "is null").in_field(name)),
            Some(value) => Ok(value),
        }
    }

    fn text(
        &self,
        object: &mut Map<String, Value>,
        field: &str,
        check: impl Fn(String) -> Result<String, BadRecord>,
    ) -> Result<String, BadRecord> {
        let value = self.take(object, field)?;
        into_text(value).and_then(check).map_err(|bad| bad.in_field(self.name(field)))
    }
}

pub(super) fn into_text(value: Value) -> Result<String, BadRecord> {
    match value {
        Value::String(text) => no_nul(text),
        Value::Array(_) | Value::Object(_) => {
            let bad = BadRecord::new("wrong type", format!("expected a string, found {}", kind_of(&value)));
            Err(bad.with_hint("conversations belong into a field `messages`"))
        }
        other => Err(BadRecord::new("wrong type", format!("expected a string, found {} ({other})", kind_of(&other)))),
    }
}

pub(super) fn no_nul(text: String) -> Result<String, BadRecord> {
    match text.find('\0') {
        Some(at) => Err(BadRecord::new("NUL byte", format!("contains a NUL character at byte {at}"))),
        None => Ok(text),
    }
}

fn not_blank(text: String) -> Result<String, BadRecord> {
    match text.trim().is_empty() {
        true => Err(BadRecord::new("empty", "is empty")),
        false => Ok(text),
    }
}

fn alpaca_prompt(instruction: &str, input: &str) -> String {
    if input.trim().is_empty() {
        return format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        );
    }
    format!(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    )
}
