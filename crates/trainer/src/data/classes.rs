//! Labels as they lie in a file to what a classifier is trained on: numbers of classes, or values.

use serde_json::Value;

use lowrank_models::classifier::Labels;

use super::error::DataError;
use super::record::BadRecord;
use super::source::kind_of;

/// What labels are.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LabelRules {
    /// Labels are numbers to come close to; otherwise classes.
    pub regression: bool,
    /// Names of the classes in order, where they are known. Names that only number (`LABEL_0`) give way to those of the data.
    pub classes: Vec<String>,
}

/// A label as it lies in the file.
#[derive(Debug, Clone, PartialEq)]
pub enum RawLabel {
    /// A whole number.
    Integer(i64),
    /// Another number.
    Number(f64),
    /// A name.
    Name(String),
}

impl RawLabel {
    /// From a field. Text from a table may be a number.
    ///
    /// # Errors
    /// No number, text or truth value.
    pub fn from_value(value: &Value, is_table: bool) -> Result<Self, BadRecord> {
        match value {
            Value::Bool(value) => Ok(Self::Integer(i64::from(*value))),
            Value::Number(number) => {
                let whole = number.as_i64().or_else(|| number.as_f64().and_then(whole));
                Ok(whole.map_or_else(|| Self::Number(number.as_f64().unwrap_or(f64::NAN)), Self::Integer))
            }
            Value::String(text) if text.trim().is_empty() => Err(BadRecord::new("empty", "is empty")),
            Value::String(text) if is_table => Ok(Self::from_text(text.trim())),
            Value::String(text) => Ok(Self::Name(text.clone())),
            other => {
                let reason = format!("expected a number or a name, found {}", kind_of(other));
                Err(BadRecord::new("wrong type", reason))
            }
        }
    }

    fn from_text(text: &str) -> Self {
        match (text.parse::<i64>(), text.parse::<f64>()) {
            (Ok(whole), _) => Self::Integer(whole),
            (_, Ok(number)) => whole(number).map_or(Self::Number(number), Self::Integer),
            _ => Self::Name(text.to_owned()),
        }
    }
}

/// A float that is a whole number, as some programs write numbers of classes.
fn whole(number: f64) -> Option<i64> {
    (number.fract() == 0.0 && number.abs() < 1e15).then_some(number as i64)
}

/// `LABEL_0`, `LABEL_1`, ...: names that say nothing.
pub fn are_numbered(names: &[String]) -> bool {
    names == lowrank_models::classifier::config::numbered(names.len())
}

/// Labels that are understood.
#[derive(Debug, Clone, PartialEq)]
pub struct Understood {
    /// One entry a record.
    pub labels: Labels,
    /// Names of the classes in order; a single one for regression.
    pub classes: Vec<String>,
}

/// Turns the labels of a file into classes or values. Numbers are classes from 0 on; names are sorted, unless the rules have
/// them in an order. `location` tells where a record is.
///
/// # Errors
/// A label that fits neither the others nor the rules; the message names the first.
pub fn understand(
    raw: &[RawLabel],
    rules: &LabelRules,
    location: impl Fn(usize) -> String,
) -> Result<Understood, DataError> {
    if rules.regression {
        return values(raw, rules, location);
    }
    let is_named = raw.iter().any(|label| matches!(label, RawLabel::Name(_)));
    let classes = if is_named { named_classes(raw, rules) } else { numbered_classes(raw, rules) };
    let class = |(index, label): (usize, &RawLabel)| {
        let found = match (label, is_named) {
            (RawLabel::Integer(id), false) => usize::try_from(*id).ok().filter(|&id| id < classes.len()),
            (RawLabel::Name(name), _) => classes.iter().position(|class| class == name),
            _ => None,
        };
        let class = found.and_then(|id| i32::try_from(id).ok());
        class.ok_or_else(|| DataError::Record { location: location(index), bad: no_class(label, is_named, &classes) })
    };
    let labels = raw.iter().enumerate().map(class).collect::<Result<Vec<i32>, _>>()?;
    Ok(Understood { labels: Labels::Classes(labels), classes })
}

fn values(raw: &[RawLabel], rules: &LabelRules, location: impl Fn(usize) -> String) -> Result<Understood, DataError> {
    let value = |(index, label): (usize, &RawLabel)| {
        let value = match label {
            RawLabel::Integer(value) => *value as f32,
            RawLabel::Number(value) => *value as f32,
            RawLabel::Name(_) => f32::NAN,
        };
        let bad = || BadRecord::new("no number", format!("expected a number for regression, found {}", shown(label)));
        let bad = || bad().in_field("label").with_hint("for classes, do not ask for regression");
        if value.is_finite() { Ok(value) } else { Err(DataError::Record { location: location(index), bad: bad() }) }
    };
    let labels = raw.iter().enumerate().map(value).collect::<Result<Vec<f32>, _>>()?;
    let classes = rules.classes.first().cloned().unwrap_or_else(|| "LABEL_0".to_owned());
    Ok(Understood { labels: Labels::Values(labels), classes: vec![classes] })
}

fn named_classes(raw: &[RawLabel], rules: &LabelRules) -> Vec<String> {
    if !rules.classes.is_empty() && !are_numbered(&rules.classes) {
        return rules.classes.clone();
    }
    let mut names: Vec<String> = raw
        .iter()
        .filter_map(|label| match label {
            RawLabel::Name(name) => Some(name.clone()),
            _ => None,
        })
        .collect();
    names.sort();
    names.dedup();
    // As many as the model has: names that it lacks stay numbers.
    let missing = rules.classes.iter().skip(names.len()).cloned().collect::<Vec<_>>();
    names.extend(missing);
    names
}

/// Most classes that a file of numbers may mean.
const MOST_CLASSES: i64 = 1 << 20;

fn numbered_classes(raw: &[RawLabel], rules: &LabelRules) -> Vec<String> {
    if !rules.classes.is_empty() {
        return rules.classes.clone();
    }
    let ids = raw.iter().filter_map(|label| match label {
        RawLabel::Integer(id) if *id < MOST_CLASSES => Some(*id),
        _ => None,
    });
    let largest = ids.max().unwrap_or(0).max(1);
    lowrank_models::classifier::config::numbered(largest as usize + 1)
}

fn no_class(label: &RawLabel, is_named: bool, classes: &[String]) -> BadRecord {
    let known = match is_named {
        true => format!("one of the names {}", listed(classes)),
        false => format!("a whole number from 0 to {}", classes.len() - 1),
    };
    let hint = match label {
        RawLabel::Integer(-1) => "-1 marks records without a label: leave them out",
        RawLabel::Number(_) => "for numbers to come close to, ask for regression",
        _ => "check the number and the names of the classes",
    };
    BadRecord::new("no class", format!("expected {known}, found {}", shown(label))).in_field("label").with_hint(hint)
}

fn listed(names: &[String]) -> String {
    let mut text = names.iter().take(8).map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
    if names.len() > 8 {
        text += &format!(" and {} more", names.len() - 8);
    }
    text
}

fn shown(label: &RawLabel) -> String {
    match label {
        RawLabel::Integer(value) => value.to_string(),
        RawLabel::Number(value) => value.to_string(),
        RawLabel::Name(name) => format!("{name:?}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use serde_json::json;

    fn run(values: &[Value], is_table: bool, rules: &LabelRules) -> Result<Understood, String> {
        let raw: Vec<RawLabel> = values.iter().map(|value| RawLabel::from_value(value, is_table).unwrap()).collect();
        understand(&raw, rules, |index| format!("a.csv:{}", index + 2)).map_err(|error| error.to_string())
    }

    #[test]
    fn numbers_are_classes_and_names_are_sorted() {
        let rules = LabelRules::default();
        let numbers = run(&[json!(2), json!(0), json!(1.0)], false, &rules).unwrap();
        assert_eq!(numbers.labels, Labels::Classes(vec![2, 0, 1]));
        assert_eq!(numbers.classes, ["LABEL_0", "LABEL_1", "LABEL_2"]);
        let names = run(&[json!("no"), json!("yes"), json!("no")], false, &rules).unwrap();
        assert_eq!(
            (names.labels, names.classes.as_slice()),
            (Labels::Classes(vec![0, 1, 0]), &["no".to_owned(), "yes".to_owned()][..])
        );
        assert_eq!(run(&[json!("1"), json!("0")], true, &rules).unwrap().labels, Labels::Classes(vec![1, 0]));
        assert_eq!(run(&[json!(true), json!(false)], true, &rules).unwrap().labels, Labels::Classes(vec![1, 0]));
    }

    #[test]
    fn known_classes_keep_their_order() {
        let known = |names: &[&str]| LabelRules {
            regression: false,
            classes: names.iter().map(|name| (*name).to_owned()).collect(),
        };
        let labels = run(&[json!("b"), json!("a")], false, &known(&["b", "a"])).unwrap();
        assert_eq!(labels.labels, Labels::Classes(vec![0, 1]));
        let error = run(&[json!("b"), json!("c")], false, &known(&["b", "a"])).unwrap_err();
        assert!(
            error.contains("a.csv:3: field `label`: expected one of the names \"b\", \"a\", found \"c\""),
            "{error}"
        );
        let labels = run(&[json!("b"), json!("a")], false, &known(&["LABEL_0", "LABEL_1", "LABEL_2"])).unwrap();
        assert_eq!(labels.classes, ["a", "b", "LABEL_2"]);
        let error = run(&[json!(5)], false, &known(&["LABEL_0", "LABEL_1"])).unwrap_err();
        assert!(error.contains("expected a whole number from 0 to 1, found 5"), "{error}");
        assert!(run(&[json!(-1), json!(1)], false, &LabelRules::default()).unwrap_err().contains("found -1"));
        assert!(run(&[json!(1), json!("a")], false, &LabelRules::default()).unwrap_err().contains("found 1"));
    }

    #[test]
    fn regression_takes_numbers() {
        let rules = LabelRules { regression: true, classes: vec![] };
        let values = run(&[json!("4.25"), json!("3")], true, &rules).unwrap();
        assert_eq!((values.labels, values.classes.len()), (Labels::Values(vec![4.25, 3.0]), 1));
        assert!(run(&[json!("good")], false, &rules).unwrap_err().contains("expected a number for regression"));
        assert!(run(&[json!(0.5)], false, &LabelRules::default()).unwrap_err().contains("expected a whole number"));
    }
}
