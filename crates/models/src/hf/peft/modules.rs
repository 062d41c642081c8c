//! Module names, patterns for them, and lists of them, by peft's rules.

use regex::Regex;
use serde_json::{Value, json};

/// A regular expression for module names, compiled where it is made.
#[derive(Debug, Clone)]
pub struct ModulePattern {
    text: String,
    regex: Regex,
}

impl ModulePattern {
    /// A pattern for whole names, as `target_modules` and `exclude_modules` use it.
    ///
    /// # Errors
    /// Not a regular expression (the reason).
    pub fn whole(text: &str) -> Result<Self, String> {
        Self::new(text, &format!("^(?:{text})$"))
    }

    /// A pattern for the end of a name from a dot on, as `rank_pattern` and `alpha_pattern` use it.
    ///
    /// # Errors
    /// Not a regular expression (the reason).
    pub fn ending(text: &str) -> Result<Self, String> {
        Self::new(text, &format!(r"^(?:.*\.)?(?:{text})$"))
    }

    /// A pattern for a name, or for what it is inside of, as `modules_to_save` uses it.
    ///
    /// # Errors
    /// Not a regular expression (the reason).
    pub fn part(text: &str) -> Result<Self, String> {
        Self::new(text, &format!(r"^(?:|.*\.)(?:{text})(?:$|\.)"))
    }

    /// A pattern for what comes before a layer's number, as `layers_pattern` uses it.
    ///
    /// # Errors
    /// Not a regular expression (the reason).
    pub fn before_number(text: &str) -> Result<Self, String> {
        Self::new(text, &format!(r"^(?:|.*?\.)(?:{text})\.(?P<layer>\d+)\."))
    }

    fn new(text: &str, whole: &str) -> Result<Self, String> {
        match Regex::new(whole) {
            Ok(regex) => Ok(Self { text: text.to_string(), regex }),
            Err(error) if ["(?=", "(?!", "(?<=", "(?<!"].iter().any(|look| text.contains(look)) => {
                Err(format!("`{text}`: looking ahead or behind is not supported ({})", last_line(&error)))
            }
            Err(error) => Err(format!("`{text}` is not a regular expression: {}", last_line(&error))),
        }
    }

    /// The pattern as the user wrote it.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether a module's name matches.
    pub fn matches(&self, module: &str) -> bool {
        self.regex.is_match(module)
    }

    pub(super) fn layer_number(&self, module: &str) -> Option<usize> {
        self.regex.captures(module)?.name("layer")?.as_str().parse().ok()
    }
}

impl PartialEq for ModulePattern {
    fn eq(&self, other: &Self) -> bool {
        self.regex.as_str() == other.regex.as_str()
    }
}

fn last_line(error: &regex::Error) -> String {
    error.to_string().lines().last().unwrap_or_default().trim_start_matches("error: ").to_string()
}

/// Which modules are meant.
#[derive(Debug, Clone, PartialEq)]
pub enum Modules {
    /// Every linear layer except the output head.
    AllLinear,
    /// Full names, or their ends after a dot.
    Names(Vec<String>),
    /// A regular expression for whole names.
    Pattern(ModulePattern),
}

impl Modules {
    /// A single text as `target_modules` has it: `all-linear` in any case, else a regular expression.
    ///
    /// # Errors
    /// Not a regular expression (the reason).
    pub fn from_text(text: &str) -> Result<Self, String> {
        match text.eq_ignore_ascii_case("all-linear") {
            true => Ok(Self::AllLinear),
            false => ModulePattern::whole(text).map(Self::Pattern),
        }
    }

    pub(super) fn to_json(&self) -> Value {
        match self {
            Self::AllLinear => Value::from("all-linear"),
            Self::Names(names) => json!(names),
            Self::Pattern(pattern) => Value::from(pattern.text()),
        }
    }
}

impl std::fmt::Display for Modules {
    /// As it is written in a configuration.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}", self.to_json())
    }
}

pub(super) fn is_named(names: &[String], module: &str) -> bool {
    names
        .iter()
        .any(|name| module == name || module.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.')))
}

pub(super) fn is_head_or_embedding(module: &str) -> bool {
    let last = module.rsplit('.').next().unwrap_or(module);
    matches!(last, "lm_head" | "score" | "classifier" | "embed_tokens" | "word_embeddings")
}

/// Whether a module or parameter is, or is inside of, one whose name ends in this entry of `modules_to_save` (peft asks for
/// no dot before the entry).
pub fn is_saved_as(name: &str, entry: &str) -> bool {
    let around = name.match_indices('.').map(|(dot, _)| &name[..dot]);
    around.chain([name]).any(|name| name.ends_with(entry))
}

/// The first part of a name that is a number, with at least two parts before it and one after.
pub(super) fn first_number(module: &str) -> Option<usize> {
    let parts: Vec<&str> = module.split('.').collect();
    let (_, inner) = parts.split_last()?;
    inner.iter().skip(2).find(|part| !part.is_empty() && part.chars().all(|c| c.is_ascii_digit()))?.parse().ok()
}

pub(super) fn pattern_value<T: Copy>(patterns: &[(ModulePattern, T)], module: &str) -> Option<T> {
    let by_pattern = patterns.iter().find(|(pattern, _)| pattern.matches(module));
    let by_name = || patterns.iter().find(|(pattern, _)| pattern.text() == module);
    by_pattern.or_else(by_name).map(|(_, value)| *value)
}

/// The shortest list that names exactly the `matched` ones of `all` modules: their last name parts where no other module
/// ends in one of these, else the full names. Sorted. For writing `all-linear` or a pattern as a list that every reader
/// of the file understands.
pub fn shortest_names(matched: &[String], all: &[String]) -> Vec<String> {
    let sorted = |mut names: Vec<String>| {
        names.sort();
        names.dedup();
        names
    };
    let ends = sorted(matched.iter().map(|module| module.rsplit('.').next().unwrap_or(module).to_string()).collect());
    let is_exact = all.iter().all(|module| is_named(&ends, module) == matched.contains(module));
    if is_exact { ends } else { sorted(matched.to_vec()) }
}
