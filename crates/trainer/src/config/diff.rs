//! What differs between the configuration of a run and the one it is resumed under, and which differences matter.

use std::collections::BTreeMap;
use std::fmt;

use toml::Value;

/// One key that differs.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Path of the key: `training.max_steps`.
    pub key: String,
    /// Value in the earlier configuration; none if it was not set.
    pub old: Option<Value>,
    /// Value in the new configuration; none if it is not set.
    pub new: Option<Value>,
    /// Whether the resumed run can differ from one that was never interrupted.
    pub matters: bool,
    /// Why it matters or not.
    pub reason: &'static str,
}

impl fmt::Display for Change {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |value: &Option<Value>| value.as_ref().map_or("not set".to_owned(), Value::to_string);
        write!(formatter, "{}: {} -> {} ({})", self.key, show(&self.old), show(&self.new), self.reason)
    }
}

/// Every key that differs between two resolved configurations, by name.
///
/// ```
/// use lowrank_train::config::diff;
///
/// let old = toml::from_str("seed = 1\n[logging]\nlogging_steps = 10").unwrap();
/// let new = toml::from_str("seed = 2\n[logging]\nlogging_steps = 5").unwrap();
/// let changes = diff(&old, &new);
/// assert_eq!(changes[0].to_string(), "logging.logging_steps: 10 -> 5 (only what is recorded)");
/// assert_eq!(changes[1].to_string(), "seed: 1 -> 2 (changes the training)");
/// assert_eq!((changes[0].matters, changes[1].matters), (false, true));
/// ```
pub fn diff(old: &Value, new: &Value) -> Vec<Change> {
    let (old_leaves, new_leaves) = (leaves(old), leaves(new));
    let keys: std::collections::BTreeSet<&String> = old_leaves.keys().chain(new_leaves.keys()).collect();
    keys.into_iter()
        .filter(|key| old_leaves.get(*key) != new_leaves.get(*key))
        .map(|key| {
            let (matters, reason) = weigh(key, old, new);
            let value = |leaves: &BTreeMap<String, &Value>| leaves.get(key).map(|value| (*value).clone());
            Change { key: key.clone(), old: value(&old_leaves), new: value(&new_leaves), matters, reason }
        })
        .collect()
}

/// Every value that is no table, by its path.
fn leaves(value: &Value) -> BTreeMap<String, &Value> {
    let mut found = BTreeMap::new();
    collect(String::new(), value, &mut found);
    found
}

fn collect<'a>(path: String, value: &'a Value, found: &mut BTreeMap<String, &'a Value>) {
    let Value::Table(table) = value else {
        found.insert(path, value);
        return;
    };
    for (key, inner) in table {
        let inner_path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        collect(inner_path, inner, found);
    }
}

/// Whether a key changes the mathematics of the run, and why. Keys that nobody listed matter.
fn weigh(key: &str, old: &Value, new: &Value) -> (bool, &'static str) {
    const RECORDED: (bool, &str) = (false, "only what is recorded");
    match key {
        "output_dir" => (false, "only where results go"),
        "training.resume_from_checkpoint" => (false, "only where the run starts from"),
        "training.save_steps" | "training.save_total_limit" => (false, "only which checkpoints are kept"),
        "training.eval_steps" | "training.eval_at_start" => RECORDED,
        "training.early_stopping_patience" => (false, "only when the run ends"),
        "training.max_steps" | "training.num_epochs" if length_is_free(old) && length_is_free(new) => {
            (false, "only when the run ends")
        }
        "training.max_steps" | "training.num_epochs" => (true, "changes the learning rate schedule"),
        "training.gradient_checkpointing" => (false, "same values, other memory and time"),
        "training.head_chunk_tokens" => (true, "other order of summation: bits may differ"),
        "device" => (true, "other device: bits may differ"),
        "data.eval" => RECORDED,
        "data.cache" | "calibration.cache" => (false, "same values, other time"),
        _ if key.starts_with("logging.") || key.starts_with("evaluation.") => RECORDED,
        _ => (true, "changes the training"),
    }
}

/// Whether the learning rate of a step does not depend on the length of the run.
fn length_is_free(config: &Value) -> bool {
    let training = config.get("training");
    let key = |name: &str| training.and_then(|training| training.get(name));
    key("lr_scheduler").and_then(Value::as_str) == Some("constant") && key("warmup_ratio").is_none()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn changes(old: &str, new: &str) -> Vec<String> {
        diff(&toml::from_str(old).unwrap(), &toml::from_str(new).unwrap())
            .iter()
            .map(|change| format!("{}{change}", if change.matters { "! " } else { "  " }))
            .collect()
    }

    #[test]
    fn equal_configurations_have_no_changes() {
        assert!(changes("a = 1\n[b]\nc = [1, 2]", "a = 1\n[b]\nc = [1, 2]").is_empty());
    }

    #[test]
    fn set_unset_and_changed_keys_are_named_and_weighed() {
        assert_eq!(
            changes(
                "device = \"cpu\"\noutput_dir = \"a\"\n[adapter.lora]\nr = 8",
                "device = \"cuda\"\noutput_dir = \"b\"\n[data]\nval_set_size = 0.1"
            ),
            [
                "! adapter.lora.r: 8 -> not set (changes the training)",
                "! data.val_set_size: not set -> 0.1 (changes the training)",
                "! device: \"cpu\" -> \"cuda\" (other device: bits may differ)",
                "  output_dir: \"a\" -> \"b\" (only where results go)",
            ]
        );
    }

    #[test]
    fn the_length_of_a_run_matters_only_to_a_schedule_that_depends_on_it() {
        let run = |steps: u32, rest: &str| format!("[training]\nmax_steps = {steps}\n{rest}");
        let constant = "lr_scheduler = \"constant\"";
        assert_eq!(
            changes(&run(10, constant), &run(20, constant)),
            ["  training.max_steps: 10 -> 20 (only when the run ends)"]
        );
        let cosine = "lr_scheduler = \"cosine\"";
        assert_eq!(
            changes(&run(10, cosine), &run(20, cosine)),
            ["! training.max_steps: 10 -> 20 (changes the learning rate schedule)"]
        );
        let warm = "lr_scheduler = \"constant\"\nwarmup_ratio = 0.1";
        assert_eq!(
            changes(&run(10, warm), &run(20, warm)),
            ["! training.max_steps: 10 -> 20 (changes the learning rate schedule)"]
        );
    }
}
