//! The chat template of a model: messages to text, and which part of the text the assistant wrote.
//!
//! Templates are Jinja programs written for transformers, so the environment is set up as it is there: `trim_blocks` and
//! `lstrip_blocks`, loop controls, Python's methods of strings and dicts, `raise_exception`, `strftime_now`, and a `tojson`
//! that prints what Python's `json.dumps(..., ensure_ascii=False)` prints. The rendered text contains the special tokens:
//! encode it without adding them again.

use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use chrono::{DateTime, Local, TimeZone};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Value as Jinja, ValueKind};
use minijinja::{Environment, Error, ErrorKind};
use regex::Regex;
use serde_json::{Map, Value};

use super::chat_json::{to_jinja, to_json};
use super::error::HfError;
use super::tokenizer::token_text;
use super::{read_json_if_there, read_text};

const NAME: &str = "chat";
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A compiled chat template with the special tokens of its model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    origin: PathBuf,
    /// `bos_token` and the like, as text.
    special: Map<String, Value>,
    /// The moment `strftime_now` tells; `None` for the real one.
    now: Arc<Mutex<Option<DateTime<Local>>>>,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RenderedChat {
    /// The text of the whole conversation.
    pub text: String,
    /// What the assistant wrote, in order.
    pub assistant: Vec<AssistantSpan>,
}

/// The part of [`RenderedChat::text`] that one assistant message is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AssistantSpan {
    /// Index of the message, from 0.
    pub message: usize,
    /// Bytes of the text: from after the header that asks for an answer up to and including the token that ends the turn.
    /// White space that the template puts behind that token is not included.
    pub range: Range<usize>,
}

impl ChatTemplate {
    /// The template of a model folder: `chat_template.jinja`, else `chat_template.json`, else `chat_template` of
    /// `tokenizer_config.json` (of several named ones, `default`); `None` where there is none (a base model).
    ///
    /// # Errors
    /// A file is not valid, or the template does not compile (the text has the line).
    pub fn from_folder(folder: &Path) -> Result<Option<Self>, HfError> {
        let config_path = folder.join("tokenizer_config.json");
        let config = read_json_if_there(&config_path)?;
        let names = [config.clone(), read_json_if_there(&folder.join("special_tokens_map.json"))?];
        let special = SPECIAL_TOKENS.iter().filter_map(|key| {
            let text = names.iter().flatten().find_map(|json| token_text(&json[*key]))?;
            Some((key.to_string(), Value::from(text)))
        });
        let special = special.collect();

        let jinja = folder.join("chat_template.jinja");
        if jinja.is_file() {
            return Self::new(&read_text(&jinja)?, &jinja, special).map(Some);
        }
        let json_path = folder.join("chat_template.json");
        for (path, json) in [(&json_path, read_json_if_there(&json_path)?), (&config_path, config)] {
            let Some(json) = json else { continue };
            if let Some(source) = pick_template(&json["chat_template"]) {
                return Self::new(source, path, special).map(Some);
            }
        }
        Ok(None)
    }

    /// Compiles a template. `special` holds `bos_token`, `eos_token` and so on as text; `origin` is for messages.
    ///
    /// # Errors
    /// The template does not compile.
    pub fn new(source: &str, origin: &Path, special: Map<String, Value>) -> Result<Self, HfError> {
        let now = Arc::new(Mutex::new(None));
        let fail = |error: &Error, hint: &str| template_error(origin, error, hint);
        let mut environment = environment(Arc::clone(&now)).map_err(|error| fail(&error, ""))?;
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| fail(&error, "the template uses something that is not Jinja as transformers runs it"))?;
        Ok(Self { environment, source: source.to_string(), origin: origin.to_path_buf(), special, now })
    }

    /// The template's text, for fingerprints and for writing it beside a model.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the text depends on the day it is rendered.
    pub fn uses_date(&self) -> bool {
        self.source.contains("strftime_now")
    }

    /// Fixes the moment that `strftime_now` tells (seconds since 1970), so that a resumed run renders the same text.
    pub fn set_now(&mut self, unix_seconds: i64) {
        if let Ok(mut now) = self.now.lock() {
            *now = Local.timestamp_opt(unix_seconds, 0).single();
        }
    }

    /// The text of a conversation. With `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// Messages are objects with `role`, `content` and whatever else the template knows.
    ///
    /// # Errors
    /// The template fails or refuses the conversation (`raise_exception`), for example where roles must alternate.
    pub fn render(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String, HfError> {
        self.render_with_tools(messages, add_generation_prompt, &Value::Null)
    }

    /// [`ChatTemplate::render`] with tool descriptions: a list of JSON schemas, or null.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_with_tools(
        &self,
        messages: &[Value],
        add_generation_prompt: bool,
        tools: &Value,
    ) -> Result<String, HfError> {
        let special = self.special.iter().map(|(key, value)| (key.as_str(), to_jinja(value)));
        let conversation = [
            ("messages", messages.iter().map(to_jinja).collect()),
            ("tools", to_jinja(tools)),
            ("documents", Jinja::from(())),
            ("add_generation_prompt", Jinja::from(add_generation_prompt)),
        ];
        let context = Jinja::from_pairs(special.chain(conversation));
        let template = self.environment.get_template(NAME).map_err(|error| template_error(&self.origin, &error, ""))?;
        template.render(context).map_err(|error| {
            template_error(
                &self.origin,
                &error,
                "check the roles and their order; not every template accepts a system message or two turns of one role",
            )
        })
    }

    /// The text of a conversation and the bytes of each assistant message in it, for a loss on the answers only.
    ///
    /// An answer starts where the rendering of the messages before it, with the generation prompt, ends, and it ends where
    /// the rendering up to and including it ends. Templates that render a turn differently once others follow (dropping
    /// the thoughts of earlier turns, moving the system message) fail that test; there the content is found by changing it
    /// and looking where the text differs, and what the template puts around an answer that comes last is looked for
    /// around it.
    ///
    /// # Errors
    /// The template fails, or neither way finds the answer ([`HfError::NotPrefixStable`]).
    pub fn render_with_spans(&self, messages: &[Value], tools: &Value) -> Result<RenderedChat, HfError> {
        let text = self.render_with_tools(messages, false, tools)?;
        let mut assistant = Vec::new();
        let answers = messages.iter().enumerate().filter(|(_, message)| message["role"] == "assistant");
        for (message, _) in answers {
            let range = self.find_answer(&text, messages, message, tools)?;
            assistant.push(AssistantSpan { message, range });
        }
        Ok(RenderedChat { text, assistant })
    }

    fn find_answer(
        &self,
        text: &str,
        messages: &[Value],
        index: usize,
        tools: &Value,
    ) -> Result<Range<usize>, HfError> {
        let not_stable = |reason: &str| HfError::NotPrefixStable {
            origin: self.origin.clone(),
            message: index,
            reason: reason.to_string(),
        };
        let before = self.render_with_tools(&messages[..index], true, tools)?;
        let through = self.render_with_tools(&messages[..=index], false, tools)?;
        let start = match text.starts_with(&before) {
            true => Some(before.len()),
            false => self.find_start(text, messages, index, tools, &before, &through)?,
        };
        let end = match text.starts_with(&through) {
            true => Some(through.len()),
            false => self.find_end(text, messages, index, tools, &through)?,
        };
        let start = start.ok_or_else(|| not_stable("the messages before it render differently once it follows"))?;
        let end = end.ok_or_else(|| not_stable("it renders differently once other messages follow"))?;
        if end <= start {
            return Err(not_stable("the template leaves it out"));
        }
        // White space behind the end-of-turn token is not the assistant's; behind the bare content it is what ends the turn.
        let answer = &text[start..end];
        let trimmed = answer.trim_end();
        let written = messages[index]["content"].as_str().unwrap_or_default().trim_end();
        let bare = !written.is_empty() && trimmed.ends_with(written);
        let length = if bare || trimmed.is_empty() { answer.len() } else { trimmed.len() };
        Ok(start..start + length)
    }

    /// The start of an answer: that of its content, less what stands between the generation prompt and the content when the
    /// answer comes last, if that stands here too.
    fn find_start(
        &self,
        text: &str,
        messages: &[Value],
        index: usize,
        tools: &Value,
        before: &str,
        through: &str,
    ) -> Result<Option<usize>, HfError> {
        let Some(changed) = with_content(messages, index, |_| MARK.to_string()) else { return Ok(None) };
        let content_start = common_prefix(text, &self.render_with_tools(&changed, false, tools)?);
        let last_start = common_prefix(through, &self.render_with_tools(&changed[..=index], false, tools)?);
        if content_start == text.len() {
            return Ok(None);
        }
        let lead =
            if through.starts_with(before) { through.get(before.len()..last_start).unwrap_or_default() } else { "" };
        let lead = if text[..content_start].ends_with(lead) { lead.len() } else { 0 };
        Ok(Some(content_start - lead))
    }

    /// The end of an answer: what follows its content when it comes last must follow it here too.
    fn find_end(
        &self,
        text: &str,
        messages: &[Value],
        index: usize,
        tools: &Value,
        through: &str,
    ) -> Result<Option<usize>, HfError> {
        let Some(changed) = with_content(messages, index, |content| format!("{content}{MARK}")) else {
            return Ok(None);
        };
        let rest_of = |whole: &str, changed: &str| whole.len() - common_suffix(whole, changed);
        let end_of_turn = &through[rest_of(through, &self.render_with_tools(&changed[..=index], false, tools)?)..];
        let content_end = rest_of(text, &self.render_with_tools(&changed, false, tools)?);
        let found = content_end > 0 && !end_of_turn.is_empty() && text[content_end..].starts_with(end_of_turn);
        Ok(found.then_some(content_end + end_of_turn.len()))
    }
}

/// A private-use character, which no content begins or ends with.
const MARK: &str = "\u{F8FE}";

/// The messages with the text of one changed; `None` where that message's content is not text.
fn with_content(messages: &[Value], index: usize, change: impl Fn(&str) -> String) -> Option<Vec<Value>> {
    let content = change(messages[index]["content"].as_str()?);
    let mut changed = messages.to_vec();
    changed[index]["content"] = Value::from(content);
    Some(changed)
}

/// Bytes of the longest common beginning of two texts, in whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum()
}

/// Bytes of the longest common ending of two texts, in whole characters.
fn common_suffix(a: &str, b: &str) -> usize {
    a.chars().rev().zip(b.chars().rev()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum()
}

/// A template given as text, or the `default` (else the first) of a list of named ones.
fn pick_template(value: &Value) -> Option<&str> {
    if let Some(source) = value.as_str() {
        return Some(source);
    }
    let named = value.as_array()?;
    let default = named.iter().find(|entry| entry["name"] == "default").or(named.first())?;
    default["template"].as_str()
}

/// `{% generation %}` marks the assistant's text for transformers' own loss mask and renders as nothing; a condition that
/// always holds has the same effect on the white space around it.
fn without_generation_tags(source: &str) -> String {
    let Ok(tag) = Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}") else { return source.to_string() };
    let replaced = tag.replace_all(source, |found: &regex::Captures<'_>| {
        let statement = if found.get(2).is_some() { "endif" } else { "if true" };
        format!("{{%{} {statement} {}%}}", &found[1], &found[3])
    });
    replaced.into_owned()
}

fn environment(now: Arc<Mutex<Option<DateTime<Local>>>>) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, state, value| match python_word(value) {
        Some(word) => out.write_str(word).map_err(Error::from),
        None => minijinja::escape_formatter(out, state, value),
    });
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", move |format: String| -> Result<String, Error> {
        let moment = now.lock().ok().and_then(|now| *now).unwrap_or_else(Local::now);
        let mut text = String::new();
        match write!(text, "{}", moment.format(&format)) {
            Ok(()) => Ok(text),
            Err(_) => Err(Error::new(ErrorKind::InvalidOperation, format!("strftime_now: bad format `{format}`"))),
        }
    });
    Ok(environment)
}

/// How Python prints the values whose names differ.
fn python_word(value: &Jinja) -> Option<&'static str> {
    match value.kind() {
        ValueKind::None => Some("None"),
        ValueKind::Bool if value.is_true() => Some("True"),
        ValueKind::Bool => Some("False"),
        _ => None,
    }
}

fn template_error(origin: &Path, error: &Error, hint: &str) -> HfError {
    let mut reason = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let _ = write!(reason, ": {cause}");
        source = cause.source();
    }
    HfError::Template { origin: origin.to_path_buf(), reason, hint: hint.to_string() }
}
