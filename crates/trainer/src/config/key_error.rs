//! Turns an error of the TOML reader into text a user can act on: the place, the line, the key, what was expected and
//! what was found, and for a misspelt name the one that was probably meant.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

use crate::error::Problem;

/// Where a piece of configuration came from. All texts share one address space: the file begins at 0, and the text of
/// each `--set` lies behind it.
pub(crate) struct Origins<'a> {
    /// Shown name of the file.
    pub file: String,
    /// Text of the file.
    pub text: &'a str,
    /// First address, shown name and text of further files that parts of the document come from, by rising address.
    pub files: Vec<(usize, String, &'a str)>,
    /// First address and argument of every `--set`.
    pub sets: Vec<(usize, &'a str)>,
}

impl Origins<'_> {
    /// `run.toml, line 3, column 1` or `--set a=b`.
    fn place(&self, address: usize) -> String {
        if let Some((_, argument)) = self.set_at(address) {
            return format!("--set {argument}");
        }
        let (file, text, offset) = self.file_at(address);
        let (line, column, _) = locate(text, offset);
        format!("{file}, line {line}, column {column}")
    }

    /// The line of the file at this address, as `\n  3 | text`; empty for a `--set`.
    fn excerpt(&self, address: usize) -> String {
        if self.set_at(address).is_some() {
            return String::new();
        }
        let (_, text, offset) = self.file_at(address);
        let (number, _, line) = locate(text, offset);
        format!("\n  {number} | {line}")
    }

    /// The file that holds an address, and the offset in it.
    fn file_at(&self, address: usize) -> (&str, &str, usize) {
        match self.files.iter().rev().find(|(start, ..)| *start <= address) {
            Some((start, name, text)) => (name, text, address - start),
            None => (&self.file, self.text, address),
        }
    }

    fn set_at(&self, address: usize) -> Option<&(usize, &str)> {
        self.sets.iter().rev().find(|(start, _)| *start <= address)
    }
}

/// Line number, column in characters (both from 1) and text of the line at a byte offset.
fn locate(text: &str, offset: usize) -> (usize, usize, &str) {
    let mut offset = offset.min(text.len());
    while !text.is_char_boundary(offset) {
        offset -= 1;
    }
    let before = &text[..offset];
    let start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let line = text[start..].lines().next().unwrap_or("");
    (before.matches('\n').count() + 1, text[start..offset].chars().count() + 1, line)
}

/// A document that is not TOML.
pub(crate) fn syntax_problem(error: &toml::de::Error, origins: &Origins<'_>) -> Problem {
    let address = error.span().map_or(0, |span| span.start);
    Problem::config(format!(
        "{}: not valid TOML: {}{}",
        origins.place(address),
        error.message(),
        origins.excerpt(address)
    ))
}

/// A TOML document that is not a configuration. `table` is the document that was read.
pub(crate) fn structure_problem(error: &toml::de::Error, table: &DeTable<'_>, origins: &Origins<'_>) -> Problem {
    let Some(span) = error.span() else {
        return Problem::config(format!("{}: {}", origins.file, error.message()));
    };
    let found = find_key(table, &span);
    let (what, hint) = explain(error.message(), found.as_ref());
    let place = format!("{}: {what}{}", origins.place(span.start), origins.excerpt(span.start));
    let problem = Problem::config(place);
    match hint {
        Some(hint) => problem.hint(hint),
        None => problem,
    }
}

/// A key of the document: its parts from the top, and whether the error points at the key and not at its value.
struct FoundKey {
    parts: Vec<String>,
    at_key: bool,
}

impl FoundKey {
    fn path(&self) -> String {
        self.parts.join(".")
    }

    /// `[optimizer.adamw]`, the table that holds the key.
    fn table(&self) -> String {
        match self.parts.split_last() {
            Some((_, [])) | None => "at the top level".to_owned(),
            Some((_, parents)) => format!("in [{}]", parents.join(".")),
        }
    }
}

fn find_key(table: &DeTable<'_>, span: &Range<usize>) -> Option<FoundKey> {
    for (key, value) in table {
        let name = key.get_ref().to_string();
        if key.span() == *span {
            return Some(FoundKey { parts: vec![name], at_key: true });
        }
        if let DeValue::Table(inner) = value.get_ref()
            && let Some(mut found) = find_key(inner, span)
        {
            found.parts.insert(0, name);
            return Some(found);
        }
        // A list of tables, such as [[variant]].
        if let DeValue::Array(items) = value.get_ref() {
            let mut tables = items.iter().filter_map(|item| item.get_ref().as_table());
            if let Some(mut found) = tables.find_map(|inner| find_key(inner, span)) {
                found.parts.insert(0, name);
                return Some(found);
            }
        }
        let inside = value.span().start <= span.start && span.end <= value.span().end;
        if inside && !matches!(value.get_ref(), DeValue::Table(_)) || value.span() == *span {
            return Some(FoundKey { parts: vec![name], at_key: false });
        }
    }
    None
}

/// Rewrites a message of serde. Returns the sentence and a hint.
fn explain(message: &str, found: Option<&FoundKey>) -> (String, Option<String>) {
    let key = found.map_or_else(|| "this value".to_owned(), |found| format!("`{}`", found.path()));
    if let Some(rest) = message.strip_prefix("unknown field ") {
        let (name, valid) = quoted_names(rest);
        let table = found.map_or_else(String::new, |found| format!(" {}", found.table()));
        return (format!("unknown key `{name}`{table}"), Some(suggestion(&name, &valid, "keys")));
    }
    if let Some(rest) = message.strip_prefix("unknown variant ") {
        let (name, valid) = quoted_names(rest);
        let what = match found {
            Some(found) if found.at_key => format!("unknown method `{name}` {}", found.table()),
            _ => format!("{key}: unknown value \"{name}\""),
        };
        return (what, Some(suggestion(&name, &valid, "values")));
    }
    if message.starts_with("wanted exactly 1 element") {
        return (format!("{key}: expected exactly one table below it, got none or several"), None);
    }
    let got = message.strip_prefix("invalid type: ").or_else(|| message.strip_prefix("invalid value: "));
    if let Some((got, expected)) = got.and_then(|rest| rest.split_once(", expected ")) {
        return (format!("{key}: expected {}, got {got}", plain_type(expected)), None);
    }
    (format!("{key}: {message}"), None)
}

/// The types of Rust in words of TOML.
fn plain_type(expected: &str) -> &str {
    match expected {
        "usize" | "u64" | "u32" => "a whole number, 0 or more",
        "i64" | "i32" => "a whole number",
        "f64" | "f32" => "a number",
        "a boolean" => "true or false",
        "path string" => "a path",
        "a sequence" => "a list",
        "a map" => "a table",
        other if other.starts_with("struct ") => "a table",
        other => other,
    }
}

/// The first back-quoted name of a message, and all others.
fn quoted_names(message: &str) -> (String, Vec<String>) {
    let mut names = message.split('`').skip(1).step_by(2).map(str::to_owned);
    (names.next().unwrap_or_default(), names.collect())
}

fn suggestion(name: &str, valid: &[String], noun: &str) -> String {
    let list = valid.join(", ");
    match closest(name, valid) {
        Some(near) => format!("did you mean `{near}`? Valid {noun} here: {list}"),
        None => format!("valid {noun} here: {list}"),
    }
}

/// The valid name with the fewest edits, if at most a third of the letters differ.
pub(super) fn closest<'a>(name: &str, valid: &'a [String]) -> Option<&'a str> {
    let (distance, near) = valid
        .iter()
        .map(|candidate| (edit_distance(name, candidate), candidate))
        .min_by_key(|(distance, _)| *distance)?;
    (distance <= near.chars().count().div_ceil(3)).then_some(near.as_str())
}

/// Insertions, deletions, substitutions and swaps of neighbours that turn `left` into `right`.
fn edit_distance(left: &str, right: &str) -> usize {
    let (left, right): (Vec<char>, Vec<char>) = (left.chars().collect(), right.chars().collect());
    let mut before_last = vec![0; right.len() + 1];
    let mut last: Vec<usize> = (0..=right.len()).collect();
    for i in 1..=left.len() {
        let mut row = vec![i; right.len() + 1];
        for j in 1..=right.len() {
            let substitution = last[j - 1] + usize::from(left[i - 1] != right[j - 1]);
            row[j] = substitution.min(last[j] + 1).min(row[j - 1] + 1);
            let swapped = i > 1 && j > 1 && left[i - 1] == right[j - 2] && left[i - 2] == right[j - 1];
            if swapped {
                row[j] = row[j].min(before_last[j - 2] + 1);
            }
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distances() {
        for (left, right, distance) in [
            ("", "", 0),
            ("", "ab", 2),
            ("kitten", "sitting", 3),
            ("ab", "ba", 1),
            ("learnig_rate", "learning_rate", 1),
        ] {
            assert_eq!(edit_distance(left, right), distance, "{left} {right}");
            assert_eq!(edit_distance(right, left), distance, "{right} {left}");
        }
    }

    #[test]
    fn a_far_name_gets_no_suggestion() {
        let valid = ["learning_rate".to_owned(), "betas".to_owned()];
        assert_eq!(closest("lerning_rate", &valid), Some("learning_rate"));
        assert_eq!(closest("momentum", &valid), None);
        assert_eq!(closest("x", &[]), None);
    }

    #[test]
    fn positions_count_characters_from_one() {
        let text = "a = 1\nb = \"é\" x\n";
        assert_eq!(locate(text, 0), (1, 1, "a = 1"));
        assert_eq!(locate(text, 6), (2, 1, "b = \"é\" x"));
        assert_eq!(locate(text, 14), (2, 8, "b = \"é\" x"));
        assert_eq!(locate(text, 999), (3, 1, ""));
        assert_eq!(locate("", 5), (1, 1, ""));
    }
}
