//! How good predictions are: the scores of the GLUE tasks.
//!
//! | score | of | definition |
//! | --- | --- | --- |
//! | accuracy | classes | share of right predictions |
//! | F1 | two classes | `2 tp / (2 tp + fp + fn)` of class 1 |
//! | macro F1 | classes | mean of the F1 of every class that occurs |
//! | Matthews | classes | correlation of two one-hot assignments (Gorodkin 2004), in [-1, 1] |
//! | Pearson | values | linear correlation |
//! | Spearman | values | Pearson's correlation of the ranks, ties sharing their mean rank |
//!
//! A ratio without a denominator is 0 for F1 and Matthews, as in scikit-learn, and NaN for the others.

use std::collections::{BTreeMap, BTreeSet};

/// All scores of predicted classes by name: `accuracy`, `matthews_correlation`, and `f1` of two classes or `macro_f1` of more.
pub fn of_classes(expected: &[i32], predicted: &[i32], classes: usize) -> BTreeMap<String, f64> {
    let f1 = match classes {
        0..=2 => ("f1", f1(expected, predicted, 1)),
        _ => ("macro_f1", macro_f1(expected, predicted)),
    };
    let all =
        [("accuracy", accuracy(expected, predicted)), f1, ("matthews_correlation", matthews(expected, predicted))];
    all.into_iter().map(|(name, score)| (name.to_owned(), score)).collect()
}

/// All scores of predicted values by name: `pearson`, `spearman`.
pub fn of_values(expected: &[f64], predicted: &[f64]) -> BTreeMap<String, f64> {
    let all = [("pearson", pearson(expected, predicted)), ("spearman", spearman(expected, predicted))];
    all.into_iter().map(|(name, score)| (name.to_owned(), score)).collect()
}

/// Share of right predictions; NaN of none.
pub fn accuracy(expected: &[i32], predicted: &[i32]) -> f64 {
    let right = expected.iter().zip(predicted).filter(|(expected, predicted)| expected == predicted).count();
    right as f64 / expected.len() as f64
}

/// F1 of one class.
pub fn f1(expected: &[i32], predicted: &[i32], class: i32) -> f64 {
    let pairs = expected.iter().zip(predicted).map(|(&expected, &predicted)| (expected == class, predicted == class));
    let (mut both, mut one) = (0u64, 0u64);
    for (is_expected, is_predicted) in pairs {
        both += u64::from(is_expected && is_predicted);
        one += u64::from(is_expected != is_predicted);
    }
    ratio(2.0 * both as f64, (2 * both + one) as f64)
}

/// Mean F1 of the classes that are expected or predicted at least once.
pub fn macro_f1(expected: &[i32], predicted: &[i32]) -> f64 {
    let classes: BTreeSet<i32> = expected.iter().chain(predicted).copied().collect();
    classes.iter().map(|&class| f1(expected, predicted, class)).sum::<f64>() / classes.len() as f64
}

/// The correlation coefficient of Matthews for any number of classes.
pub fn matthews(expected: &[i32], predicted: &[i32]) -> f64 {
    let count = |values: &[i32]| {
        let mut counts = BTreeMap::<i32, f64>::new();
        values.iter().for_each(|&class| *counts.entry(class).or_default() += 1.0);
        counts
    };
    let (expected_counts, predicted_counts) = (count(expected), count(predicted));
    let squares = |counts: &BTreeMap<i32, f64>| counts.values().map(|count| count * count).sum::<f64>();
    let both: f64 =
        expected_counts.iter().map(|(class, count)| count * predicted_counts.get(class).copied().unwrap_or(0.0)).sum();
    let total = expected.len() as f64;
    let right = expected.iter().zip(predicted).filter(|(expected, predicted)| expected == predicted).count() as f64;
    let spread = (total * total - squares(&expected_counts)) * (total * total - squares(&predicted_counts));
    ratio(right * total - both, spread.sqrt())
}

fn ratio(numerator: f64, denominator: f64) -> f64 {
    if denominator == 0.0 { 0.0 } else { numerator / denominator }
}

/// Pearson's correlation coefficient; NaN where one side is constant.
pub fn pearson(expected: &[f64], predicted: &[f64]) -> f64 {
    let count = expected.len() as f64;
    let mean = |values: &[f64]| values.iter().sum::<f64>() / count;
    let (mean_expected, mean_predicted) = (mean(expected), mean(predicted));
    let (mut product, mut expected_square, mut predicted_square) = (0.0, 0.0, 0.0);
    for (expected, predicted) in expected.iter().zip(predicted) {
        let (expected, predicted) = (expected - mean_expected, predicted - mean_predicted);
        product += expected * predicted;
        expected_square += expected * expected;
        predicted_square += predicted * predicted;
    }
    (product / (expected_square.sqrt() * predicted_square.sqrt())).clamp(-1.0, 1.0)
}

/// Spearman's rank correlation coefficient; NaN where one side is constant.
pub fn spearman(expected: &[f64], predicted: &[f64]) -> f64 {
    pearson(&ranks(expected), &ranks(predicted))
}

/// Ranks from 1 on; equal values share the mean of theirs.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut before = 0;
    for group in order.chunk_by(|&a, &b| values[a] == values[b]) {
        // A group of n that begins after `before` others has the ranks before + 1 to before + n.
        let rank = before as f64 + (group.len() + 1) as f64 / 2.0;
        group.iter().for_each(|&index| ranks[index] = rank);
        before += group.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(expected: f64, got: f64) {
        assert!((expected - got).abs() < 1e-12, "expected {expected}, got {got}");
    }

    #[test]
    fn two_classes() {
        // tp 4, fp 2, fn 1, tn 3
        let expected = [0, 0, 0, 1, 1, 1, 1, 0, 1, 0];
        let predicted = [0, 1, 0, 1, 1, 0, 1, 0, 1, 1];
        near(0.7, accuracy(&expected, &predicted));
        near(8.0 / 11.0, f1(&expected, &predicted, 1));
        near((12.0 - 2.0) / (6.0f64 * 5.0 * 5.0 * 4.0).sqrt(), matthews(&expected, &predicted));
        let scores = of_classes(&expected, &predicted, 2);
        assert_eq!(scores.keys().collect::<Vec<_>>(), ["accuracy", "f1", "matthews_correlation"]);
        near(1.0, matthews(&expected, &expected));
        near(0.0, matthews(&expected, &[1; 10]));
        near(0.0, f1(&[0, 0], &[0, 0], 1));
    }

    #[test]
    fn several_classes() {
        let expected = [0, 1, 2, 2, 1, 0, 2, 1, 3];
        let predicted = [0, 2, 2, 2, 1, 1, 0, 1, 1];
        near((0.5 + 4.0 / 7.0 + 2.0 / 3.0) / 4.0, macro_f1(&expected, &predicted));
        near(0.364_178_520_364_614_95, matthews(&expected, &predicted)); // numpy, from the covariances of one-hot rows
        assert!(of_classes(&expected, &predicted, 4).contains_key("macro_f1"));
    }

    #[test]
    fn values_with_ties() {
        let expected = [1.0, 2.5, 2.5, 4.0, 0.2, 5.0];
        let predicted = [1.2, 2.0, 3.1, 3.1, 0.1, 4.0];
        assert_eq!(ranks(&expected), [2.0, 3.5, 3.5, 5.0, 1.0, 6.0]);
        near(0.947_251_914_982_601_8, pearson(&expected, &predicted)); // numpy.corrcoef
        near(0.955_882_352_941_176_4, spearman(&expected, &predicted)); // numpy.corrcoef of the ranks
        near(1.0, spearman(&[1.0, 2.0, 3.0], &[1.0, 10.0, 100.0]));
        assert!(of_values(&[1.0, 1.0], &[1.0, 2.0])["pearson"].is_nan());
    }
}
