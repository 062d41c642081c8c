//! The configuration of a variant: its base, tables that stand in place of those of the base, keys laid over. Every part keeps
//! its position, so that an error names the file and the line it comes from.

use std::path::Path;

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use crate::config::{Origins, RunConfig, lay_over, read_text, structure_problem, syntax_problem};
use crate::error::Problem;

/// Tables of a variant that stand in place of those of the base.
const REPLACED: [&str; 3] = ["adapter", "optimizer", "quantization"];

/// Where a variant comes from.
pub(super) struct Source<'a> {
    /// Shown name of the study.
    pub file: &'a str,
    /// Its text.
    pub text: &'a str,
    /// Its top level.
    pub study: &'a DeTable<'a>,
    /// The table of the variant.
    pub own: &'a DeTable<'a>,
    /// Name of the variant.
    pub name: &'a str,
}

impl Source<'_> {
    /// The base, with tables replaced and keys laid over.
    ///
    /// # Errors
    /// A base that cannot be read, or a result that is no configuration, with file, line and key.
    pub fn config(&self) -> Result<RunConfig, Problem> {
        let base_file = self.base_file()?;
        let base_text = base_file.as_deref().map(|file| read_text(Path::new(file))).transpose()?;
        // The text of the base lies behind that of the study, so that a position in an error tells which it belongs to.
        let address = self.text.len() + 1;
        let padded = base_text.as_deref().map(|text| " ".repeat(address) + text);
        let keys = self.keys()?;
        let mut origins = Origins { file: self.file.to_owned(), text: self.text, files: vec![], sets: vec![] };
        if let (Some(file), Some(text)) = (&base_file, &base_text) {
            origins.files.push((address, file.clone(), text));
        }
        let mut table = match &padded {
            Some(text) => DeTable::parse(text).map_err(|error| syntax_problem(&error, &origins))?.into_inner(),
            None => self.inline_base(),
        };
        for name in REPLACED {
            let Some((key, value)) = self.own.iter().find(|(key, _)| key.get_ref() == name) else { continue };
            table.remove(name);
            if value.get_ref().as_table().is_none_or(|replacement| !replacement.is_empty()) {
                table.insert(key.clone(), value.clone());
            }
        }
        for ((_, value), document) in self.sets().zip(&keys) {
            let mut overrides =
                DeTable::parse(document).map_err(|error| syntax_problem(&error, &origins))?.into_inner();
            put(&mut overrides, value.clone());
            lay_over(&mut table, overrides);
        }
        let document = Spanned::new(0..0, table.clone());
        RunConfig::deserialize(toml::Deserializer::from(document))
            .map_err(|error| structure_problem(&error, &table, &origins))
    }

    fn base(&self) -> Option<&Spanned<DeValue<'_>>> {
        self.own.get("base").or_else(|| self.study.get("base"))
    }

    /// Path of the base, unless it is a table.
    fn base_file(&self) -> Result<Option<String>, Problem> {
        match self.base().map(Spanned::get_ref) {
            Some(DeValue::String(path)) => Ok(Some(path.to_string())),
            Some(DeValue::Table(_)) => Ok(None),
            _ => Err(Problem::config(format!(
                "{}, variant `{}`: base is neither the path of a configuration nor a table",
                self.file, self.name
            ))),
        }
    }

    fn inline_base(&self) -> DeTable<'_> {
        self.base().and_then(|base| base.get_ref().as_table()).cloned().unwrap_or_default()
    }

    /// Keys and values of `set`: those of the study, then those of the variant.
    fn sets(&self) -> impl Iterator<Item = (&Spanned<DeString<'_>>, &Spanned<DeValue<'_>>)> {
        let tables = [self.study, self.own].into_iter().filter_map(|table| table.get("set")?.get_ref().as_table());
        tables.flatten()
    }

    /// A small document for every key of `set`, `a.b = 0` for `"a.b"`, in which the key has the position it has in the study.
    fn keys(&self) -> Result<Vec<String>, Problem> {
        let document = |(key, _): (&Spanned<DeString<'_>>, &Spanned<DeValue<'_>>)| {
            let start = key.span().start;
            let quoted = self.text.get(start..).is_some_and(|text| text.starts_with(['"', '\'']));
            let document = format!("{}{} = 0", " ".repeat(start + usize::from(quoted)), key.get_ref());
            DeTable::parse(&document).map_err(|_| {
                Problem::config(format!(
                    "{}, variant `{}`: set holds `{}`, which is not a key",
                    self.file,
                    self.name,
                    key.get_ref()
                ))
                .hint("write set = { \"adapter.lora.r\" = 16 }")
            })?;
            Ok(document)
        };
        self.sets().map(document).collect()
    }
}

/// Replaces the value at the end of the only path of a table.
fn put<'a>(table: &mut DeTable<'a>, value: Spanned<DeValue<'a>>) {
    let Some(key) = table.keys().next().cloned() else { return };
    let Some(inner) = table.get_mut(key.get_ref().as_ref()) else { return };
    match inner.get_mut() {
        DeValue::Table(below) => put(below, value),
        _ => *inner = value,
    }
}
