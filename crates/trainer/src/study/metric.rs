//! The numbers that runs are compared by, and which way is better.

use crate::error::Problem;

/// Name and direction of what runs are compared by; the row of a new task's metric goes here.
const KNOWN: [(&str, bool); 14] = [
    ("eval_loss", false),
    ("perplexity", false),
    ("exact_match", true),
    ("accuracy", true),
    ("top1_accuracy", true),
    ("top5_accuracy", true),
    ("f1", true),
    ("macro_f1", true),
    ("matthews", true),
    ("matthews_correlation", true),
    ("pearson", true),
    ("spearman", true),
    ("mse", false),
    ("error_rate", false),
];

/// Shares of a whole, shown in percent.
const SHARES: [&str; 4] = ["exact_match", "accuracy", "top1_accuracy", "top5_accuracy"];

/// What runs are compared by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metric {
    /// Its name in the study: `eval_loss`, or a key of an evaluation's result.
    pub name: String,
    /// Whether more is better.
    pub higher: bool,
}

impl Default for Metric {
    fn default() -> Self {
        Self { name: "eval_loss".to_owned(), higher: false }
    }
}

impl Metric {
    /// The metric of this name. `higher` tells the direction of one that is not known here.
    ///
    /// # Errors
    /// An unknown name without a direction, or a direction that contradicts the known one.
    pub fn new(name: &str, higher: Option<bool>) -> Result<Self, Problem> {
        let known = KNOWN.iter().find(|(known, _)| *known == name).map(|(_, higher)| *higher);
        let higher = match (known, higher) {
            (Some(known), Some(said)) if known != said => {
                return Err(Problem::config(format!(
                    "metric = \"{name}\" is known to be better when {}, but higher_is_better says the opposite",
                    if known { "higher" } else { "lower" }
                ))
                .hint("leave higher_is_better out"));
            }
            (Some(known), _) => known,
            (None, Some(said)) => said,
            (None, None) => {
                let names: Vec<&str> = KNOWN.iter().map(|(name, _)| *name).collect();
                return Err(Problem::config(format!("metric = \"{name}\" is not known, nor whether more is better"))
                    .hint(format!("known: {}; for another one set higher_is_better", names.join(", "))));
            }
        };
        Ok(Self { name: name.to_owned(), higher })
    }

    /// Its key in an evaluation's result.
    pub fn key(&self) -> &str {
        if self.name == "eval_loss" { "loss" } else { &self.name }
    }

    /// Whether it is shown in percent.
    pub fn is_share(&self) -> bool {
        SHARES.contains(&self.name.as_str())
    }

    /// In words: `eval loss`, `exact match (%)`.
    pub fn label(&self) -> String {
        let words = self.name.replace('_', " ");
        if self.is_share() { format!("{words} (%)") } else { words }
    }

    /// The number as it is shown: shares in percent.
    pub fn shown(&self, value: f64) -> f64 {
        if self.is_share() { 100.0 * value } else { value }
    }

    /// Mean and standard error as they are shown, with as many digits as the error deserves.
    pub fn text(&self, mean: f64, error: Option<f64>) -> String {
        let (mean, error) = (self.shown(mean), error.map(|error| self.shown(error)));
        let digits = digits(mean, error, if self.is_share() { 1 } else { 3 });
        match error {
            Some(error) => format!("{mean:.digits$} ± {error:.digits$}"),
            None => format!("{mean:.digits$}"),
        }
    }
}

/// Digits behind the point: two of the error, or four of a small value; at least `least`, at most six.
fn digits(mean: f64, error: Option<f64>, least: usize) -> usize {
    let deserved = match error {
        Some(error) if error > 0.0 => 1.0 - error.log10().floor(),
        _ if least < 3 => 1.0,
        _ => (3.0 - mean.abs().max(1e-9).log10().floor()).min(4.0).max(if mean.abs() < 0.01 { 5.0 } else { 0.0 }),
    };
    (deserved.max(0.0) as usize).clamp(least, 6)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn directions_are_known_or_said() {
        assert!(!Metric::new("eval_loss", None).unwrap().higher);
        assert!(Metric::new("exact_match", Some(true)).unwrap().higher);
        assert!(Metric::new("bleu", Some(true)).unwrap().higher);
        let unknown = Metric::new("bleu", None).unwrap_err();
        assert_eq!(unknown.to_string(), "metric = \"bleu\" is not known, nor whether more is better");
        assert!(unknown.hint.unwrap().starts_with("known: eval_loss, perplexity, exact_match,"));
        let opposite = Metric::new("eval_loss", Some(true)).unwrap_err();
        assert!(opposite.to_string().contains("better when lower"), "{opposite}");
    }

    #[test]
    fn numbers_have_the_digits_of_their_error() {
        let loss = Metric::default();
        assert_eq!(loss.text(3.5941, Some(0.0254)), "3.594 ± 0.025");
        assert_eq!(loss.text(3.5941, Some(0.00254)), "3.5941 ± 0.0025");
        assert_eq!(loss.text(3.59412, None), "3.594");
        assert_eq!(loss.text(0.59412, None), "0.5941");
        assert_eq!(loss.text(0.00412, None), "0.00412");
        assert_eq!(loss.text(0.5, Some(0.0)), "0.5000 ± 0.0000");
        let share = Metric::new("exact_match", None).unwrap();
        assert_eq!(share.text(0.925, Some(0.0123)), "92.5 ± 1.2");
        assert_eq!((share.text(0.925, None), share.label()), ("92.5".to_owned(), "exact match (%)".to_owned()));
    }
}
