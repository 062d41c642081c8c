//! The `messages` and `tools` fields of a record: their shape is checked and evened out for the chat template.

use serde_json::Value;

use super::record::{BadRecord, into_text, no_nul};
use super::source::kind_of;

/// The messages of a conversation.
///
/// # Errors
/// The value is no list of messages; the reason names the message.
pub(super) fn check_messages(value: Value) -> Result<Vec<Value>, BadRecord> {
    let Value::Array(messages) = value else {
        return Err(BadRecord::new("wrong type", format!("expected an array of messages, found {}", kind_of(&value))));
    };
    if messages.is_empty() {
        return Err(BadRecord::new("empty", "is an empty list"));
    }
    let check = |(index, message)| {
        check_message(message)
            .map_err(|bad| BadRecord { reason: format!("message {index} (from 0): {}", bad.reason), ..bad })
    };
    messages.into_iter().enumerate().map(check).collect()
}

/// A message without null entries (tables have them in every column that another message uses), its content as one string.
fn check_message(message: Value) -> Result<Value, BadRecord> {
    let Value::Object(mut message) = message else {
        return Err(BadRecord::new("wrong type", format!("expected an object, found {}", kind_of(&message))));
    };
    message.retain(|_, value| !value.is_null());
    match message.get("role") {
        Some(Value::String(role)) if !role.is_empty() => {}
        Some(other) => {
            return Err(BadRecord::new("wrong type", format!("`role` must be a non-empty string, found {other}")));
        }
        None => {
            let hint =
                "messages are objects with `role` and `content`; rename `from` and `value` if the file has these";
            return Err(BadRecord::new("missing field", "`role` is missing").with_hint(hint));
        }
    }
    match message.remove("content") {
        Some(content) => {
            let content = content_text(content)?;
            message.insert("content".to_owned(), Value::from(content));
        }
        // An assistant that only calls tools says nothing.
        None if message.contains_key("tool_calls") => {}
        None => return Err(BadRecord::new("missing field", "`content` is missing")),
    }
    Ok(Value::Object(message))
}

fn content_text(content: Value) -> Result<String, BadRecord> {
    let Value::Array(parts) = content else {
        return into_text(content).map_err(|bad| BadRecord {
            reason: format!("`content`: {}", bad.reason),
            hint: String::new(),
            ..bad
        });
    };
    let part_text = |part: &Value| match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => no_nul(text.to_owned()),
        (Some(kind), _) if kind != "text" => Err(BadRecord::new(
            "wrong type",
            format!("`content` has a part of type `{kind}`; only text can be trained on"),
        )),
        _ => Err(BadRecord::new("wrong type", "`content` has a part that is not {\"type\": \"text\", \"text\": ...}")),
    };
    parts.iter().map(part_text).collect()
}

/// A list of tools, or null; some tables hold the list as JSON text.
///
/// # Errors
/// The value is something else.
pub(super) fn check_tools(tools: Value) -> Result<Value, BadRecord> {
    let tools = match tools {
        Value::String(text) if text.trim().is_empty() => Value::Null,
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| BadRecord::new("not valid JSON", format!("is text that is not JSON: {error}")))?,
        other => other,
    };
    match tools {
        Value::Null | Value::Array(_) => Ok(tools),
        other => Err(BadRecord::new("wrong type", format!("expected an array of tools, found {}", kind_of(&other)))),
    }
}
