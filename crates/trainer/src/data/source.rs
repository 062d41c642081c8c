//! Data files as a stream of raw records, each with its place in the file.
//!
//! JSONL and Parquet are read piece by piece, so that a file larger than the memory can be tokenised; a `.json` array and a
//! `.txt` document are read whole. A `.json` file that holds one object a line is read as JSONL.

use std::cell::Cell;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::path::{Path, PathBuf};
use std::sync::Once;

use lowrank_models::hf::{HfError, resolve_dataset_files};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::DataError;
use super::record::BadRecord;

/// The endings of the file names that are read.
pub const ENDINGS: [&str; 5] = ["jsonl", "ndjson", "json", "parquet", "txt"];

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// How places in a file are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Numbering {
    /// Lines from 1.
    Line,
    /// Elements of an array from 0.
    Element,
    /// Rows of a table from 0.
    Row,
    /// The file is one record.
    Whole,
}

impl Numbering {
    /// A place as shown to the user: `train.jsonl:17`, `train.parquet, row 3`.
    pub fn location(self, path: &Path, position: u64) -> String {
        let path = path.display();
        match self {
            Numbering::Line => format!("{path}:{position}"),
            Numbering::Element => format!("{path}, element {position} (from 0)"),
            Numbering::Row => format!("{path}, row {position} (from 0)"),
            Numbering::Whole => path.to_string(),
        }
    }
}

/// A record as it lies in the file.
#[derive(Debug)]
pub enum Raw {
    /// Bytes that should be one JSON object.
    Line(Vec<u8>),
    /// A JSON value that should be an object.
    Value(Value),
    /// Bytes that should be a document.
    Document(Vec<u8>),
    /// What could not be read.
    Bad(BadRecord),
}

/// An open data file.
pub struct Source {
    path: PathBuf,
    numbering: Numbering,
    reader: Reader,
    /// Number of the next line, element or row.
    position: u64,
    /// Share of the file that was read, in [0, 1].
    fraction: f64,
    size_bytes: u64,
    read_bytes: u64,
}

enum Reader {
    Lines(Box<dyn BufRead + Send>),
    Elements { values: std::vec::IntoIter<Value>, total: usize },
    Rows { rows: Box<RowIter<'static>>, total: i64, wanted: Vec<String> },
    Document(Option<Vec<u8>>),
}

impl Source {
    /// Opens a file. Of a table, only the `wanted` columns are converted; the others appear as null.
    ///
    /// # Errors
    /// The file cannot be read, is empty, has an unknown ending, or is not what its ending says.
    pub fn open(path: &Path, wanted: &[String]) -> Result<Self, DataError> {
        let file = File::open(path).map_err(|source| io(path, source))?;
        let metadata = file.metadata().map_err(|source| io(path, source))?;
        if metadata.is_dir() {
            return Err(bad_file(path, "is a folder; expected a file", "list the files of the folder"));
        }
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase();
        if !ENDINGS.contains(&ending.as_str()) {
            let reason = format!("cannot tell the kind of file from the ending `{ending}`");
            return Err(bad_file(path, reason, format!("rename it to one of .{}", ENDINGS.join(", ."))));
        }
        if metadata.len() == 0 {
            return Err(empty(path));
        }
        let (numbering, reader) = match ending.as_str() {
            "parquet" => (Numbering::Row, open_parquet(path, file, wanted)?),
            "txt" => (Numbering::Whole, Reader::Document(Some(read_whole(path, file)?))),
            "json" => open_json(path, file)?,
            _ => (Numbering::Line, Reader::Lines(Box::new(BufReader::new(file)))),
        };
        let position = u64::from(numbering == Numbering::Line);
        Ok(Self {
            path: path.to_path_buf(),
            numbering,
            reader,
            position,
            fraction: 0.0,
            size_bytes: metadata.len(),
            read_bytes: 0,
        })
    }

    /// How places in this file are counted.
    pub fn numbering(&self) -> Numbering {
        self.numbering
    }

    /// The share of the file that was read, in [0, 1].
    pub fn fraction(&self) -> f64 {
        self.fraction
    }

    /// At most `count` more records with their positions; an empty list at the end of the file. Blank lines are no records.
    ///
    /// # Errors
    /// The file cannot be read further. What is wrong with a single record is part of the list.
    pub fn next_chunk(&mut self, count: usize) -> Result<Vec<(u64, Raw)>, DataError> {
        let mut chunk = Vec::with_capacity(count.min(4096));
        while chunk.len() < count {
            let Some(raw) = self.next_raw()? else { break };
            if !matches!(&raw, Raw::Line(line) if line.iter().all(u8::is_ascii_whitespace)) {
                chunk.push((self.position, raw));
            }
            self.position += 1;
        }
        Ok(chunk)
    }

    fn next_raw(&mut self) -> Result<Option<Raw>, DataError> {
        let path = &self.path;
        match &mut self.reader {
            Reader::Lines(lines) => {
                let mut line = Vec::new();
                let bytes = lines.read_until(b'\n', &mut line).map_err(|source| io(path, source))?;
                self.read_bytes += bytes as u64;
                self.fraction = self.read_bytes as f64 / self.size_bytes.max(1) as f64;
                if self.position == 1 && line.starts_with(BYTE_ORDER_MARK) {
                    line.drain(..BYTE_ORDER_MARK.len());
                }
                Ok((bytes > 0).then_some(Raw::Line(line)))
            }
            Reader::Elements { values, total } => {
                let value = values.next();
                self.fraction = 1.0 - values.len() as f64 / (*total).max(1) as f64;
                Ok(value.map(Raw::Value))
            }
            Reader::Rows { rows, total, wanted } => {
                let row = guarded(|| rows.next()).map_err(|reason| damaged_row(path, self.position, &reason))?;
                let Some(row) = row else { return Ok(None) };
                let row = row.map_err(|error| damaged_row(path, self.position, &error.to_string()))?;
                self.fraction = (self.position + 1) as f64 / (*total).max(1) as f64;
                Ok(Some(object_from_row(row, wanted).map_or_else(Raw::Bad, Raw::Value)))
            }
            Reader::Document(document) => {
                self.fraction = 1.0;
                Ok(document.take().map(Raw::Document))
            }
        }
    }
}

/// Text from bytes, without a byte order mark.
///
/// # Errors
/// The bytes are not UTF-8, or there is a NUL byte among them.
pub fn text_from_bytes(bytes: &[u8]) -> Result<&str, BadRecord> {
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        let found = bytes.get(at).copied().unwrap_or_default();
        BadRecord::new("invalid UTF-8", format!("not valid UTF-8: byte {at} is 0x{found:02x}"))
            .with_hint("convert the file to UTF-8, for example with iconv")
    })?;
    match text.find('\0') {
        Some(at) => Err(BadRecord::new("NUL byte", format!("byte {at} is NUL, which no text contains"))
            .with_hint("the file is binary or damaged")),
        None => Ok(text),
    }
}

/// Paths as given by the user to files: local files as they are; `owner/name` or `owner/name:pattern` from the hub.
///
/// # Errors
/// A path does not exist and is no hub data set that can be fetched.
pub fn resolve_files(entries: &[String]) -> Result<Vec<PathBuf>, DataError> {
    let mut files = Vec::new();
    for entry in entries {
        let path = Path::new(entry);
        match hub_name(entry).filter(|_| !path.exists()) {
            Some((repo, pattern)) => files.extend(fetch(entry, repo, pattern)?),
            None => files.push(path.to_path_buf()),
        }
    }
    match files.is_empty() {
        true => Err(DataError::Config { key: "train", reason: "is an empty list".to_owned() }),
        false => Ok(files),
    }
}

fn fetch(entry: &str, repo: &str, pattern: &str) -> Result<Vec<PathBuf>, DataError> {
    resolve_dataset_files(repo, pattern).map_err(|error: HfError| {
        bad_file(
            Path::new(entry),
            format!("there is no such local file, and as a hub data set: {error}"),
            "give the path of a file, or the id of a data set",
        )
    })
}

/// `owner/name` or `owner/name:pattern`, unless it looks like a data file.
fn hub_name(entry: &str) -> Option<(&str, &str)> {
    let (repo, pattern) = entry.split_once(':').unwrap_or((entry, ""));
    let shape = Regex::new(r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$").ok()?;
    let ending = Path::new(repo).extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    (shape.is_match(repo) && !ENDINGS.contains(&ending)).then_some((repo, pattern))
}

fn open_json(path: &Path, file: File) -> Result<(Numbering, Reader), DataError> {
    let bytes = read_whole(path, file)?;
    let text = text_from_bytes(&bytes).map_err(|bad| bad_file(path, bad.reason, bad.hint))?;
    if text.trim_start().starts_with('{') {
        return Ok((Numbering::Line, Reader::Lines(Box::new(std::io::Cursor::new(bytes)))));
    }
    let value: Value = serde_json::from_str(text).map_err(|error| {
        bad_file(path, format!("not valid JSON: {error}"), "expected one array of objects; the file may be truncated")
    })?;
    match value {
        Value::Array(values) if values.is_empty() => Err(empty(path)),
        Value::Array(values) => {
            Ok((Numbering::Element, Reader::Elements { total: values.len(), values: values.into_iter() }))
        }
        other => Err(bad_file(
            path,
            format!("holds {}; expected an array of objects", kind_of(&other)),
            "write [{...}, {...}], or one object a line",
        )),
    }
}

fn open_parquet(path: &Path, file: File, wanted: &[String]) -> Result<Reader, DataError> {
    let fail = |reason: String| {
        bad_file(
            path,
            format!("not a usable Parquet file: {reason}"),
            "download or write the file again; it may be truncated",
        )
    };
    let reader =
        guarded(|| SerializedFileReader::new(file)).map_err(&fail)?.map_err(|error| fail(error.to_string()))?;
    let total = reader.metadata().file_metadata().num_rows();
    if total == 0 {
        return Err(empty(path));
    }
    let rows = guarded(|| RowIter::from_file_into(Box::new(reader))).map_err(&fail)?;
    Ok(Reader::Rows { rows: Box::new(rows), total, wanted: wanted.to_vec() })
}

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs a piece of the Parquet reader, which panics on some damaged files; such a panic prints nothing.
fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = take_hook();
        set_hook(Box::new(move |info| {
            if !GUARDED.get() {
                usual(info);
            }
        }));
    });
    GUARDED.set(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(false);
    result.map_err(|_| "the file is damaged".to_owned())
}

fn object_from_row(row: Row, wanted: &[String]) -> Result<Value, BadRecord> {
    let mut object = Map::new();
    for (name, field) in row.into_columns() {
        let value = match wanted.contains(&name) {
            true => value_from_field(field).map_err(|bad| bad.in_field(&name))?,
            false => Value::Null,
        };
        object.insert(name, value);
    }
    Ok(Value::Object(object))
}

fn value_from_field(field: Field) -> Result<Value, BadRecord> {
    let value = match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::from(value),
        Field::Byte(value) => Value::from(value),
        Field::Short(value) => Value::from(value),
        Field::Int(value) => Value::from(value),
        Field::Long(value) => Value::from(value),
        Field::UByte(value) => Value::from(value),
        Field::UShort(value) => Value::from(value),
        Field::UInt(value) => Value::from(value),
        Field::ULong(value) => Value::from(value),
        Field::Float(value) => Value::from(value),
        Field::Double(value) => Value::from(value),
        Field::Str(value) => Value::from(value),
        // Text that the writer did not mark as text.
        Field::Bytes(bytes) => Value::from(text_from_bytes(bytes.data())?),
        Field::Group(row) => {
            let entries =
                row.into_columns().into_iter().map(|(name, field)| value_from_field(field).map(|value| (name, value)));
            Value::Object(entries.collect::<Result<_, _>>()?)
        }
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().cloned().map(value_from_field).collect::<Result<_, _>>()?)
        }
        Field::MapInternal(map) => {
            let entries = map.entries().iter().cloned().map(|(key, value)| {
                let key = match key {
                    Field::Str(key) => key,
                    other => other.to_string(),
                };
                value_from_field(value).map(|value| (key, value))
            });
            Value::Object(entries.collect::<Result<_, _>>()?)
        }
        // Dates, decimals and the like, as they are printed.
        other => Value::from(other.to_string()),
    };
    Ok(value)
}

/// A JSON value's type in words.
pub(super) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn read_whole(path: &Path, mut file: File) -> Result<Vec<u8>, DataError> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|source| io(path, source))?;
    Ok(bytes)
}

fn io(path: &Path, source: std::io::Error) -> DataError {
    DataError::Io { path: path.to_path_buf(), source }
}

pub(super) fn empty(path: &Path) -> DataError {
    bad_file(path, "the file holds no records", "it may be the result of a failed download or an interrupted export")
}

fn damaged_row(path: &Path, row: u64, reason: &str) -> DataError {
    bad_file(
        path,
        format!("cannot read row {row} (from 0): {reason}"),
        "download or write the file again; it may be truncated",
    )
}

pub(super) fn bad_file(path: &Path, reason: impl Into<String>, hint: impl Into<String>) -> DataError {
    DataError::File { path: path.to_path_buf(), reason: reason.into(), hint: hint.into() }
}
