//! JSON in chat templates: values going in, and the `tojson` filter as transformers defines it.

use minijinja::value::{Kwargs, Value as Jinja, ValueKind};
use minijinja::{Error, ErrorKind};
use serde_json::Value;

/// JSON as the template engine's value; objects keep their order.
pub(crate) fn to_jinja(value: &Value) -> Jinja {
    match value {
        Value::Null => Jinja::from(()),
        Value::Bool(value) => Jinja::from(*value),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Jinja::from(number),
            (None, Some(number)) => Jinja::from(number),
            (None, None) => Jinja::from(number.as_f64()),
        },
        Value::String(text) => Jinja::from(text.as_str()),
        Value::Array(items) => items.iter().map(to_jinja).collect(),
        Value::Object(entries) => Jinja::from_pairs(entries.iter().map(|(key, value)| (key.as_str(), to_jinja(value)))),
    }
}

/// The `tojson` filter: `json.dumps` with Python's separators, nothing escaped for HTML.
pub(crate) fn to_json(value: Jinja, indent: Option<usize>, options: Kwargs) -> Result<Jinja, Error> {
    let indent = indent.or(options.get::<Option<usize>>("indent")?);
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let style = JsonStyle {
        indent,
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        item: separators
            .as_ref()
            .and_then(|pair| pair.first())
            .cloned()
            .unwrap_or_else(|| if indent.is_some() { "," } else { ", " }.to_string()),
        key: separators.as_ref().and_then(|pair| pair.get(1)).cloned().unwrap_or_else(|| ": ".to_string()),
    };
    options.assert_all_used()?;
    let mut out = String::new();
    style.print(&value, 0, &mut out)?;
    Ok(Jinja::from_safe_string(out))
}

/// The options of Python's `json.dumps`.
struct JsonStyle {
    indent: Option<usize>,
    ensure_ascii: bool,
    sort_keys: bool,
    item: String,
    key: String,
}

impl JsonStyle {
    fn print(&self, value: &Jinja, depth: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&value.to_string()),
            ValueKind::String => {
                let quoted = Value::from(value.as_str().unwrap_or_default()).to_string();
                out.push_str(&if self.ensure_ascii { ascii_only(&quoted) } else { quoted });
            }
            ValueKind::Seq | ValueKind::Iterable => self.print_list(value, depth, out)?,
            ValueKind::Map => self.print_map(value, depth, out)?,
            kind => return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: {kind} is not a JSON value"))),
        }
        Ok(())
    }

    fn print_list(&self, value: &Jinja, depth: usize, out: &mut String) -> Result<(), Error> {
        let mut is_empty = true;
        out.push('[');
        for item in value.try_iter()? {
            self.separate(is_empty, depth + 1, out);
            self.print(&item, depth + 1, out)?;
            is_empty = false;
        }
        self.close(is_empty, depth, ']', out);
        Ok(())
    }

    fn print_map(&self, value: &Jinja, depth: usize, out: &mut String) -> Result<(), Error> {
        let mut keys: Vec<Jinja> = value.try_iter()?.collect();
        if self.sort_keys {
            keys.sort();
        }
        let mut is_empty = true;
        out.push('{');
        for key in keys {
            self.separate(is_empty, depth + 1, out);
            self.print(&Jinja::from(key.to_string()), depth + 1, out)?;
            out.push_str(&self.key);
            self.print(&value.get_item(&key)?, depth + 1, out)?;
            is_empty = false;
        }
        self.close(is_empty, depth, '}', out);
        Ok(())
    }

    fn separate(&self, is_first: bool, depth: usize, out: &mut String) {
        if !is_first {
            out.push_str(&self.item);
        }
        self.new_line(depth, out);
    }

    fn close(&self, is_empty: bool, depth: usize, bracket: char, out: &mut String) {
        if !is_empty {
            self.new_line(depth, out);
        }
        out.push(bracket);
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }
}

/// Every character beyond ASCII as JSON's escape of four hexadecimal digits, in two halves where it needs them.
fn ascii_only(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c.is_ascii() {
            true => out.push(c),
            false => out.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}"))),
        }
    }
    out
}
