//! Tables as text: `.csv` (commas, quotes as in RFC 4180) and `.tsv` (tabs, nothing is quoted, as in the GLUE files). The first
//! row names the columns.

use std::path::Path;

use serde_json::{Map, Value};

use super::error::DataError;
use super::record::BadRecord;
use super::source::{bad_file, empty, text_from_bytes};

/// The endings of the file names that are read as tables.
pub const ENDINGS: [&str; 2] = ["csv", "tsv"];

/// A row with the line that it begins at: an object of its fields.
pub type Row = (u64, Result<Value, BadRecord>);

/// Whether a file is a table by its name.
pub fn is_table(path: &Path) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase();
    ENDINGS.contains(&ending.as_str())
}

/// All rows of a table; every field is text.
///
/// # Errors
/// The file cannot be read, is not text, or has no rows; its first row names no column, or one twice. What is wrong with a
/// single row is part of the list.
pub fn read_table(path: &Path) -> Result<Vec<Row>, DataError> {
    let bytes = std::fs::read(path).map_err(|source| DataError::Io { path: path.to_path_buf(), source })?;
    let text = text_from_bytes(&bytes).map_err(|bad| bad_file(path, bad.reason, bad.hint))?;
    let is_tsv = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("tsv"));
    let mut rows = match is_tsv {
        true => tabs(text),
        false => commas(text).map_err(|line| {
            let reason = format!("the quote that opens at line {line} is never closed");
            bad_file(path, reason, "the file may be truncated; a quote inside a field is written twice")
        })?,
    }
    .into_iter();
    let Some((_, names)) = rows.next() else { return Err(empty(path)) };
    let repeated = names.iter().enumerate().find(|(index, name)| name.is_empty() || names[..*index].contains(name));
    if let Some((index, name)) = repeated {
        let reason = format!("the first row must name the columns; column {} is named {name:?}", index + 1);
        return Err(bad_file(path, reason, "give every column a name of its own in the first row"));
    }
    let rows: Vec<Row> = rows.map(|(line, fields)| (line, object(&names, fields))).collect();
    if rows.is_empty() { Err(empty(path)) } else { Ok(rows) }
}

fn object(names: &[String], fields: Vec<String>) -> Result<Value, BadRecord> {
    if fields.len() != names.len() {
        let reason = format!("expected {} fields as in the first row, found {}", names.len(), fields.len());
        return Err(BadRecord::new("wrong number of fields", reason));
    }
    Ok(Value::Object(names.iter().cloned().zip(fields.into_iter().map(Value::from)).collect::<Map<_, _>>()))
}

/// Rows of fields with the lines they begin at; blank lines are no rows.
type Fields = Vec<(u64, Vec<String>)>;

fn tabs(text: &str) -> Fields {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines.map(|(index, line)| (index as u64 + 1, line.split('\t').map(str::to_owned).collect())).collect()
}

/// Fails with the line of a quote that is never closed.
fn commas(text: &str) -> Result<Fields, u64> {
    let mut rows = Fields::new();
    let (mut fields, mut field) = (Vec::new(), String::new());
    let (mut line, mut row_line) = (1u64, 1u64);
    let mut quoted_from = None;
    let mut was_quoted = false;
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        line += u64::from(character == '\n');
        match (character, quoted_from) {
            ('"', Some(_)) if characters.peek() == Some(&'"') => {
                characters.next();
                field.push('"');
            }
            ('"', Some(_)) => quoted_from = None,
            (_, Some(_)) => field.push(character),
            ('"', None) if field.is_empty() && !was_quoted => (quoted_from, was_quoted) = (Some(line), true),
            (',', None) => {
                fields.push(std::mem::take(&mut field));
                was_quoted = false;
            }
            ('\r', None) if characters.peek() == Some(&'\n') => {}
            ('\n', None) => {
                end_row(&mut rows, row_line, &mut fields, &mut field, was_quoted);
                (row_line, was_quoted) = (line, false);
            }
            (_, None) => field.push(character),
        }
    }
    if let Some(line) = quoted_from {
        return Err(line);
    }
    end_row(&mut rows, row_line, &mut fields, &mut field, was_quoted);
    Ok(rows)
}

fn end_row(rows: &mut Fields, line: u64, fields: &mut Vec<String>, field: &mut String, was_quoted: bool) {
    if fields.is_empty() && !was_quoted && field.trim().is_empty() {
        field.clear();
        return;
    }
    fields.push(std::mem::take(field));
    rows.push((line, std::mem::take(fields)));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use serde_json::json;

    fn read(name: &str, text: &str) -> Result<Vec<Row>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        read_table(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn commas_and_quotes() {
        let text = "\u{feff}a,label\r\n\"x, \"\"y\"\"\nz\",1\r\n\n,\"\"\nlast,0";
        let rows = read("a.csv", text).unwrap();
        let values: Vec<(u64, Value)> = rows.into_iter().map(|(line, value)| (line, value.unwrap())).collect();
        assert_eq!(
            values,
            [
                (2, json!({"a": "x, \"y\"\nz", "label": "1"})),
                (5, json!({"a": "", "label": ""})),
                (6, json!({"a": "last", "label": "0"})),
            ]
        );
    }

    #[test]
    fn tabs_quote_nothing() {
        let rows = read("a.tsv", "index\tsentence\n0\tHe said \"no.\n1\t\n").unwrap();
        assert_eq!(rows[0], (2, Ok(json!({"index": "0", "sentence": "He said \"no."}))));
        assert_eq!(rows[1], (3, Ok(json!({"index": "1", "sentence": ""}))));
    }

    #[test]
    fn wrong_tables_are_named() {
        let error = read("a.csv", "a,a\n1,2\n").unwrap_err();
        assert!(error.contains("column 2 is named \"a\""), "{error}");
        let error = read("a.csv", "a,b\n\"1,2\n").unwrap_err();
        assert!(error.contains("the quote that opens at line 2 is never closed"), "{error}");
        assert!(read("a.csv", "a,b\n").unwrap_err().contains("holds no records"));
        let rows = read("a.csv", "a,b\n1\n").unwrap();
        assert!(rows[0].1.as_ref().unwrap_err().to_string().contains("expected 2 fields as in the first row, found 1"));
    }
}
