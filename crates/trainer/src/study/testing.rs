//! Runs made by hand, and a check of markup, for the tests of this module.

use std::collections::BTreeMap;

use super::read::RunRecord;
use super::report::{GridPoint, Variant};

/// Asserts that every element is closed in order and that no number is NaN or infinite.
pub(super) fn well_formed(markup: &str) {
    let mut open: Vec<&str> = vec![];
    let mut rest = markup;
    while let Some(start) = rest.find('<') {
        let after = &rest[start + 1..];
        // Style sheets and scripts may hold any letter.
        let raw = ["style", "script"].into_iter().find(|name| after.starts_with(&format!("{name}>")));
        if let Some(name) = raw {
            let end = after.find(&format!("</{name}>"));
            assert!(end.is_some(), "{name} is not closed");
            rest = &after[end.unwrap_or(0) + name.len() + 3..];
            continue;
        }
        let end = after.find('>');
        assert!(end.is_some(), "a tag without an end: {}", &after[..after.len().min(60)]);
        let (tag, behind) = after.split_at(end.unwrap_or(0));
        rest = &behind[1..];
        assert!(!tag.contains('<'), "a tag in a tag: {tag}");
        let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap_or_default();
        if tag.starts_with('!') || tag.ends_with('/') || name == "meta" {
            continue;
        } else if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "closed out of order");
        } else {
            assert_eq!(tag.matches('"').count() % 2, 0, "odd quotes: {tag}");
            open.push(name);
        }
    }
    assert!(open.is_empty(), "not closed: {open:?}");
    for bad in ["NaN", "inf ", "inf\"", "infL"] {
        assert!(!markup.contains(bad), "{bad} in {markup}");
    }
}

/// A finished run of ten steps whose loss falls to `loss`.
pub(super) fn run(rate: f64, seed: u64, loss: f64, trainable: u64) -> RunRecord {
    let config =
        format!("seed = {seed}\noutput_dir = \"runs/{rate}-{seed}\"\n[optimizer.adamw]\nlearning_rate = {rate:?}\n");
    let value = |step: u64| loss + 4.0 / step as f64 - 0.4;
    RunRecord {
        folder: format!("runs/{rate}-{seed}").into(),
        config: toml::from_str(&config).unwrap_or_default(),
        version: "0.1.0 (abc)".to_owned(),
        device: "cpu (2 threads)".to_owned(),
        train: (1..=10).map(|step| (step, value(step))).collect(),
        evals: [5, 10]
            .map(|step| (step, BTreeMap::from([("loss".to_owned(), value(step)), ("exact_match".to_owned(), 0.5)])))
            .to_vec(),
        test: Some(BTreeMap::from([("loss".to_owned(), loss + 0.1), ("exact_match".to_owned(), 0.75)])),
        step: 10,
        finished: true,
        trainable: Some(trainable),
        tokens: 10_240,
        peak_bytes: Some(50 << 20),
        optimizer_bytes: Some(8 * trainable),
        tokens_per_second: Some(51_234.0),
        step_ms: Some(20.5),
        wall_seconds: Some(0.25),
    }
}

/// Three seeds of a variant whose rate was searched.
pub(super) fn variant(name: &str, losses: [f64; 3], trainable: u64) -> Variant {
    let seeds = losses.iter().zip(1..);
    Variant {
        name: name.to_owned(),
        grid: vec![
            GridPoint { rate: 1e-3, value: Some(losses[0] + 0.5) },
            GridPoint { rate: 2e-3, value: Some(losses[0]) },
            GridPoint { rate: 4e-3, value: None },
        ],
        runs: seeds.map(|(&loss, seed)| run(2e-3, seed, loss, trainable)).collect(),
        remarks: vec![],
    }
}
