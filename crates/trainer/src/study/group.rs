//! Runs that were made without a study: which of them are the same but for the seed, and what to call them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use toml::{Table, Value};

use super::read::RunRecord;
use super::report::{Variant, path_text};

/// Keys in which runs of one variant may differ.
const FREE: [&str; 8] = [
    "seed",
    "output_dir",
    "training.resume_from_checkpoint",
    "training.save_steps",
    "training.save_total_limit",
    "logging.logging_steps",
    "logging.tensorboard",
    "logging.progress",
];
/// A name tells at most this many keys in which a variant differs from its namesakes.
const TOLD: usize = 3;

/// Puts runs together whose configurations differ only in the seed and in where results go.
pub fn group(runs: Vec<RunRecord>) -> Vec<Variant> {
    let mut groups: Vec<(BTreeMap<String, String>, Vec<RunRecord>)> = vec![];
    for run in runs {
        let settings = settings(&run.config);
        // A run without a configuration is like no other.
        let known = groups.iter_mut().find(|(known, _)| *known == settings && !settings.is_empty());
        match known {
            Some((_, members)) => members.push(run),
            None => groups.push((settings, vec![run])),
        }
    }
    let names = names(&groups);
    let variants = groups.into_iter().zip(names).map(|((_, runs), name)| {
        let remarks = repeated_seeds(&runs).into_iter().collect();
        Variant { name, grid: vec![], runs, remarks }
    });
    variants.collect()
}

fn repeated_seeds(runs: &[RunRecord]) -> Option<String> {
    let seeds: BTreeSet<Option<i64>> = runs.iter().map(RunRecord::seed).collect();
    (seeds.len() < runs.len())
        .then(|| format!("{} runs have only {} seeds, so its standard error is too small", runs.len(), seeds.len()))
}

/// Every value of a configuration that makes a variant, by its path.
fn settings(config: &Table) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    collect("", config, &mut found);
    found.retain(|key, _| !FREE.contains(&key.as_str()));
    found
}

fn collect(path: &str, table: &Table, found: &mut BTreeMap<String, String>) {
    for (key, value) in table {
        let inner = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match value {
            Value::Table(table) => collect(&inner, table, found),
            other => {
                found.insert(inner, other.to_string());
            }
        }
    }
}

/// A name for every group: the part of its path that the others do not share, and where that is not enough the settings.
fn names(groups: &[(BTreeMap<String, String>, Vec<RunRecord>)]) -> Vec<String> {
    let folders = |runs: &[RunRecord]| runs.iter().map(|run| parts(&run.folder)).collect::<Vec<_>>();
    let shared: Vec<Vec<String>> = groups.iter().map(|(_, runs)| common(&folders(runs))).collect();
    let all = common(&shared);
    // Of a single group the whole path is its name.
    let skip = if groups.len() > 1 { all.len() } else { 0 };
    let mut names: Vec<String> = shared.iter().map(|path| path[skip.min(path.len())..].join("/")).collect();
    for index in 0..names.len() {
        let namesakes: Vec<usize> = (0..names.len()).filter(|&other| shared[other] == shared[index]).collect();
        if namesakes.len() > 1 || names[index].is_empty() {
            let settings: Vec<&BTreeMap<String, String>> = namesakes.iter().map(|&other| &groups[other].0).collect();
            let told = difference(&groups[index].0, &settings);
            let given =
                if names[index].is_empty() && told.is_empty() { path_text(&groups[index].1[0].folder) } else { told };
            names[index] = [std::mem::take(&mut names[index]), given].join(" ").trim().to_owned();
        }
    }
    names
}

/// The settings of one that the others do not share: `learning_rate=0.002 r=8`.
fn difference(own: &BTreeMap<String, String>, all: &[&BTreeMap<String, String>]) -> String {
    let keys: BTreeSet<&String> = all.iter().flat_map(|settings| settings.keys()).collect();
    let differing = keys.into_iter().filter(|key| all.iter().any(|settings| settings.get(*key) != own.get(*key)));
    let told = differing.filter_map(|key| {
        let value = own.get(key)?;
        Some(format!("{}={}", key.rsplit('.').next().unwrap_or(key), value.trim_matches('"')))
    });
    told.take(TOLD).collect::<Vec<_>>().join(" ")
}

fn parts(path: &Path) -> Vec<String> {
    let names = path.components().filter(|part| !matches!(part, Component::CurDir));
    names.map(|part| part.as_os_str().to_string_lossy().into_owned()).collect()
}

/// The parts that all paths begin with.
fn common(paths: &[Vec<String>]) -> Vec<String> {
    let Some((first, others)) = paths.split_first() else { return vec![] };
    let same = |at: &usize| others.iter().all(|path| path.get(*at) == first.get(*at));
    (0..first.len()).take_while(same).map(|at| first[at].clone()).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn run(folder: &str, config: &str) -> RunRecord {
        RunRecord { folder: folder.into(), config: toml::from_str(config).unwrap(), ..RunRecord::default() }
    }

    fn grouped(runs: Vec<RunRecord>) -> Vec<(String, usize)> {
        group(runs).into_iter().map(|variant| (variant.name, variant.runs.len())).collect()
    }

    #[test]
    fn seeds_are_put_together() {
        let config = |seed: u32, r: u32| {
            format!(
                "seed = {seed}\noutput_dir = \"{seed}\"\n[adapter.lora]\nr = {r}\n[logging]\nlogging_steps = {seed}"
            )
        };
        let runs = vec![
            run("runs/small/seed-1", &config(1, 4)),
            run("runs/big/seed-1", &config(1, 8)),
            run("./runs/small/seed-2", &config(2, 4)),
        ];
        assert_eq!(
            grouped(runs),
            [("small".to_owned(), 2), ("big".to_owned(), 1)]
                .map(|(name, count)| { (if name == "big" { "big/seed-1".to_owned() } else { name }, count) })
        );
    }

    #[test]
    fn namesakes_are_told_apart_by_what_differs() {
        let config =
            |seed: u32, rate: f64| format!("seed = {seed}\n[optimizer.adamw]\nlearning_rate = {rate}\neps = 1.0");
        let runs = [(1, 0.1), (2, 0.1), (1, 0.2), (2, 0.2)]
            .map(|(seed, rate)| run(&format!("runs/lora/lr-{rate}-seed-{seed}"), &config(seed, rate)));
        let expected = [("learning_rate=0.1".to_owned(), 2), ("learning_rate=0.2".to_owned(), 2)];
        assert_eq!(grouped(runs.to_vec()), expected);
        let mut with_other = runs.to_vec();
        with_other.push(run("runs/full", "seed = 1"));
        assert_eq!(grouped(with_other)[0].0, "lora learning_rate=0.1");
    }

    #[test]
    fn runs_without_a_configuration_stay_alone() {
        assert_eq!(grouped(vec![run("a", ""), run("b", "")]), [("a".to_owned(), 1), ("b".to_owned(), 1)]);
        assert_eq!(grouped(vec![run("runs/a", "seed = 1")]), [("runs/a".to_owned(), 1)]);
        assert!(grouped(vec![]).is_empty());
    }

    #[test]
    fn a_seed_that_was_run_twice_is_no_second_measurement() {
        let runs = vec![run("a/1", "seed = 1\nr = 2"), run("a/2", "seed = 1\nr = 2")];
        assert_eq!(group(runs)[0].remarks, ["2 runs have only 1 seeds, so its standard error is too small"]);
    }
}
