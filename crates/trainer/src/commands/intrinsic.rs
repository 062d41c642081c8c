//! `lowrank-train intrinsic`: how few numbers train the model nearly as well as all its weights do (arXiv 1804.08838).
//!
//! Every d runs with every seed, as a study; with `--full-learning-rate` full training does too. The answer is the smallest d
//! whose runs reach the target, by the mean and by the best of its seeds. Nothing is interpolated.

use std::path::PathBuf;

use lowrank_core::optim::intrinsic::{Summary, Target, grid, smallest};
use toml::{Table, Value};

use crate::cli::IntrinsicArgs;
use crate::config::{OptimizerConfig, Purpose, RunConfig, load_for, resolved_value};
use crate::error::Problem;
use crate::study::file::{self, Study};
use crate::study::metric::Metric;
use crate::study::plan::{Options, run_study};
use crate::study::report::{Report, Row};
use crate::study::table;

/// Name of the variant that trains all weights.
const FULL: &str = "full";

/// Runs the command: prints the table of all runs and the answer.
///
/// # Errors
/// Settings that fit nothing, runs with another configuration in the way, an interruption.
pub fn run(args: &IntrinsicArgs) -> anyhow::Result<()> {
    let metric = Metric::new(args.metric.as_deref().unwrap_or("eval_loss"), None)?;
    check(args, &metric)?;
    let study = study(args, &configuration(args)?)?;
    let options = Options::new(args.runs, vec![]);
    let report = run_study(&study, &options)?;
    let text = format!("{}\n{}", table::terminal(&report), answer(&report, args)?);
    Ok(super::deliver(&text, None)?)
}

/// What has to be said on the command line for a target to exist.
fn check(args: &IntrinsicArgs, metric: &Metric) -> Result<(), Problem> {
    if args.target.is_none() && !metric.higher {
        return Err(Problem::config(format!("a share of {} is no target, for less of it is better", metric.name))
            .hint("name a value with --target, or a metric of which more is better with --metric"));
    }
    if args.target.is_none() && args.full_learning_rate.is_none() {
        return Err(Problem::config("there is nothing to take a share of")
            .hint("--full-learning-rate RATE trains all weights too; or name a value with --target"));
    }
    if args.seeds == 0 {
        return Err(Problem::config("--seeds is 0, must be at least 1"));
    }
    match dims(args) {
        dims if dims.is_empty() => {
            Err(Problem::config(format!("no step of the grid lies in {} to {}", args.from, args.to))
                .hint("steps are 1, 2, 3, 5, 8 of every decade; --dims names others"))
        }
        dims if dims.contains(&0) => Err(Problem::config("--dims holds 0, must be at least 1")),
        _ => Ok(()),
    }
}

/// The dimensions to try, ascending.
fn dims(args: &IntrinsicArgs) -> Vec<usize> {
    let mut dims = if args.dims.is_empty() { grid(args.from, args.to) } else { args.dims.clone() };
    dims.sort_unstable();
    dims.dedup();
    dims
}

fn configuration(args: &IntrinsicArgs) -> Result<RunConfig, Problem> {
    let Some(path) = &args.config.config else {
        return Err(Problem::config("no configuration was given").hint("lowrank-train intrinsic --config FILE"));
    };
    let config = load_for(Purpose::Use, path, &args.config.sets)?;
    match config.optimizer {
        OptimizerConfig::Intrinsic(_) => Ok(config),
        _ => Err(Problem::config(format!(
            "{} trains with [optimizer.{}]",
            path.display(),
            config.optimizer.common().key
        ))
        .hint("the search needs [optimizer.intrinsic]; --full-learning-rate adds runs of all weights to it")),
    }
}

/// Name of the variant of a d.
fn name(dims: usize) -> String {
    format!("d={dims}")
}

/// A table of one key.
fn nested(path: &[&str], value: impl Into<Value>) -> Value {
    path.iter().rev().fold(value.into(), |value, key| Value::Table(Table::from_iter([((*key).to_owned(), value)])))
}

/// The search as a study: one variant for each d, and one of all weights.
fn study(args: &IntrinsicArgs, config: &RunConfig) -> Result<Study, Problem> {
    let variant = |name: String, key: &str, value: Value| {
        Value::Table(Table::from_iter([("name".to_owned(), Value::String(name)), (key.to_owned(), value)]))
    };
    let number = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
    let mut variants: Vec<Value> = dims(args)
        .into_iter()
        .map(|dims| variant(name(dims), "set", nested(&["optimizer", "intrinsic", "dims"], number(dims))))
        .collect();
    if let Some(rate) = args.full_learning_rate {
        variants.push(variant(FULL.to_owned(), "optimizer", nested(&["adamw", "learning_rate"], rate)));
    }
    let first = i64::try_from(config.seed).unwrap_or(0);
    let seeds: Vec<Value> = (0..number(args.seeds)).map(|i| Value::Integer(first.saturating_add(i))).collect();
    let out: PathBuf = args.out.clone().unwrap_or_else(|| config.output_dir.clone());
    let document = Table::from_iter([
        ("base".to_owned(), resolved_value(config)?),
        ("output_dir".to_owned(), Value::String(out.to_string_lossy().into_owned())),
        ("seeds".to_owned(), Value::Array(seeds)),
        ("metric".to_owned(), Value::String(args.metric.clone().unwrap_or_else(|| "eval_loss".to_owned()))),
        ("keep".to_owned(), Value::String("numbers".to_owned())),
        ("variant".to_owned(), Value::Array(variants)),
    ]);
    let text =
        toml::to_string(&document).map_err(|error| Problem::config("the search cannot be written").source(error))?;
    file::parse("intrinsic", "the search", &text)
}

/// The metric of every finished run of a variant; one without a number reaches nothing.
fn metrics(report: &Report, row: &Row) -> Vec<f64> {
    let finished = row.variant.runs.iter().filter(|run| run.finished);
    finished.map(|run| run.validation(report.metric.key()).unwrap_or(f64::NAN)).collect()
}

/// The smallest d, in words.
fn answer(report: &Report, args: &IntrinsicArgs) -> Result<String, Problem> {
    let of = |name: &str| report.rows.iter().find(|row| row.variant.name == name).map(|row| metrics(report, row));
    let target = match args.target {
        Some(value) => Target { value, higher_is_better: report.metric.higher },
        None => {
            let all = of(FULL).unwrap_or_default();
            let whole = Target::share(0.0, 0.0).summary(&all, Summary::Mean);
            let baseline = whole.ok_or_else(|| Problem::run("no run of all weights came to its end"))?;
            Target::share(baseline, args.share)
        }
    };
    let runs: Vec<(usize, f64)> = dims(args)
        .into_iter()
        .flat_map(|dims| of(&name(dims)).unwrap_or_default().into_iter().map(move |metric| (dims, metric)))
        .collect();
    let sign = if target.higher_is_better { "at least" } else { "at most" };
    let value = report.metric.shown(target.value);
    let mut text = format!("smallest d with {} {sign} {value:.4}:\n", report.metric.label());
    for (label, summary) in [("mean of the seeds", Summary::Mean), ("best of the seeds", Summary::Best)] {
        match smallest(target, &runs, summary) {
            Some(dims) => text += &format!("  {dims} by the {label}\n"),
            None => text += &format!("  none of these by the {label}\n"),
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::{AdamWConfig, IntrinsicConfig};
    use crate::data::Paths;

    fn args() -> IntrinsicArgs {
        IntrinsicArgs { seeds: 2, from: 100, to: 300, share: 0.9, target: Some(3.0), ..IntrinsicArgs::default() }
    }

    fn config() -> RunConfig {
        let mut config = RunConfig {
            base_model: "m".to_owned(),
            output_dir: "runs/search".into(),
            optimizer: OptimizerConfig::Intrinsic(IntrinsicConfig::default()),
            ..RunConfig::default()
        };
        config.data.train = Paths::One("train.jsonl".to_owned());
        config.data.eval = Some(Paths::One("eval.jsonl".to_owned()));
        config.training.max_steps = Some(10);
        config
    }

    #[test]
    fn the_search_is_a_study_of_every_dimension_and_of_all_weights() {
        let args = IntrinsicArgs { full_learning_rate: Some(1e-4), ..args() };
        let study = study(&args, &config()).unwrap();
        let names: Vec<&str> = study.variants.iter().map(|variant| variant.name.as_str()).collect();
        assert_eq!(names, ["d=100", "d=200", "d=300", "full"]);
        assert_eq!(study.seeds, [42, 43]);
        let dims_of = |index: usize| {
            let variant = &study.variants[index];
            study.run(variant, variant.rates[0], 42).unwrap().config.optimizer
        };
        let OptimizerConfig::Intrinsic(table) = dims_of(1) else { unreachable!() };
        assert_eq!(table.dims, 200);
        assert_eq!(dims_of(3), OptimizerConfig::Adamw(AdamWConfig { learning_rate: 1e-4, ..AdamWConfig::default() }));
    }

    #[test]
    fn a_search_without_a_target_is_refused() {
        let metric = |name: &str| Metric::new(name, None).unwrap();
        let without = IntrinsicArgs { target: None, ..args() };
        let text = |args: &IntrinsicArgs, name: &str| check(args, &metric(name)).unwrap_err().to_string();
        assert_eq!(text(&without, "eval_loss"), "a share of eval_loss is no target, for less of it is better");
        assert_eq!(text(&without, "accuracy"), "there is nothing to take a share of");
        assert_eq!(text(&IntrinsicArgs { from: 4, to: 4, ..args() }, "f1"), "no step of the grid lies in 4 to 4");
        assert_eq!(text(&IntrinsicArgs { dims: vec![5, 0], ..args() }, "f1"), "--dims holds 0, must be at least 1");
        assert!(check(&args(), &metric("eval_loss")).is_ok());
    }
}
