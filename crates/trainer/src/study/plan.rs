//! What is run in which order: every learning rate with the seed of the grid, the best rate of each variant with the other
//! seeds, then the scores on test data. What is done is not repeated.

use super::file::{Budget, Planned, Study, StudyVariant};
use super::read;
use super::report::{GridPoint, Report, Variant, rate_text};
use super::run::{self, State};
use super::work::Work;
use crate::cli::StudyRuns;
use crate::error::Problem;

/// How a study is run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Make runs again whose configuration changed.
    pub fresh: bool,
    /// Try runs again that failed.
    pub retry: bool,
    /// Run nothing: report what is there.
    pub report_only: bool,
    /// Variants to run; empty for all. The report takes in the others as far as they were run.
    pub only: Vec<String>,
}

impl Options {
    /// As the command line says.
    pub fn new(StudyRuns { fresh, retry, report }: StudyRuns, only: Vec<String>) -> Self {
        Self { fresh, retry, report_only: report, only }
    }
}

/// Runs what is missing of a study and sums it up.
///
/// # Errors
/// Runs with another configuration are in the way, another process runs the study, the user stopped it, or the disk refuses.
pub fn run_study(study: &Study, options: &Options) -> Result<Report, Problem> {
    check_only(study, &options.only)?;
    if !options.report_only {
        let _lock = crate::run_dir::create_and_lock(&study.output_dir)?;
        prepare(study, options)?;
        let work = Work::new(study, options)?;
        work.everything()?;
    }
    report(study)
}

fn check_only(study: &Study, only: &[String]) -> Result<(), Problem> {
    let names: Vec<&str> = study.variants.iter().map(|variant| variant.name.as_str()).collect();
    match only.iter().find(|name| !names.contains(&name.as_str())) {
        Some(name) => Err(Problem::config(format!("--only {name}: {} has no such variant", study.file))
            .hint(format!("its variants are {}", names.join(", ")))),
        None => Ok(()),
    }
}

/// Variants that this call runs.
pub(super) fn chosen<'a>(study: &'a Study, options: &Options) -> Vec<&'a StudyVariant> {
    let wanted = |variant: &&StudyVariant| options.only.is_empty() || options.only.contains(&variant.name);
    study.variants.iter().filter(wanted).collect()
}

/// Refuses, or with `fresh` removes, runs with another configuration; with `retry` forgets failures.
fn prepare(study: &Study, options: &Options) -> Result<(), Problem> {
    let mut changed = vec![];
    for variant in chosen(study, options) {
        for planned in all_runs(study, variant)? {
            match run::state(&planned)? {
                State::Changed(_) if options.fresh => {
                    tracing::info!("removing {}: its configuration changed", planned.config.output_dir.display());
                    run::forget(&planned)?;
                }
                State::Changed(changes) => changed.push((planned, changes)),
                State::Failed(_) if options.retry => run::forget_failure(&planned)?,
                _ => {}
            }
        }
    }
    let Some((first, changes)) = changed.first() else { return Ok(()) };
    let list: String = changes.iter().take(8).map(|change| format!("\n  {change}")).collect();
    let others = match changed.len() - 1 {
        0 => String::new(),
        count => format!("\n  and {count} more runs"),
    };
    let shown = first.config.output_dir.display();
    Err(Problem::config(format!("{shown} holds a run with another configuration:{list}{others}"))
        .hint("--fresh removes these runs and makes them again; or name another output_dir"))
}

/// Every run that a variant can have.
pub(super) fn all_runs(study: &Study, variant: &StudyVariant) -> Result<Vec<Planned>, Problem> {
    let mut seeds = study.seeds.clone();
    if !seeds.contains(&study.grid_seed) {
        seeds.push(study.grid_seed);
    }
    let pairs = variant.rates.iter().flat_map(|&rate| seeds.iter().map(move |&seed| (rate, seed)));
    pairs.map(|(rate, seed)| study.run(variant, rate, seed)).collect()
}

/// The metric of a finished run on validation data, if it is a number.
fn validation(study: &Study, planned: &Planned) -> Result<Option<f64>, Problem> {
    if run::state(planned)? != State::Finished {
        return Ok(None);
    }
    let found = read::read(&planned.config.output_dir)?.validation(study.metric.key());
    Ok(found.filter(|value| value.is_finite()))
}

/// The rates that run with the seed of the grid. A single rate needs no search: it runs with that seed only if it is one of
/// the others.
pub(super) fn searched<'a>(study: &Study, variant: &'a StudyVariant) -> &'a [f64] {
    if variant.rates.len() > 1 || study.seeds.contains(&study.grid_seed) { &variant.rates } else { &[] }
}

/// Every rate of a variant with its value on validation data.
fn grid(study: &Study, variant: &StudyVariant) -> Result<Vec<GridPoint>, Problem> {
    let point = |&rate: &f64| {
        let planned = study.run(variant, rate, study.grid_seed)?;
        Ok(GridPoint { rate, value: validation(study, &planned)? })
    };
    variant.rates.iter().map(point).collect()
}

/// The best rate of a grid. Where there is nothing to choose from, the only one.
fn pick(study: &Study, grid: &[GridPoint]) -> Option<f64> {
    let sign = if study.metric.higher { -1.0 } else { 1.0 };
    let known = grid.iter().filter_map(|point| Some((point.rate, sign * point.value?)));
    let best = known.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(rate, _)| rate);
    best.or_else(|| if grid.len() == 1 { Some(grid[0].rate) } else { None })
}

/// The runs of a variant that are scored and reported.
pub(super) fn picked(study: &Study, variant: &StudyVariant) -> Result<Vec<Planned>, Problem> {
    match pick(study, &grid(study, variant)?) {
        Some(rate) => study.seeds.iter().map(|&seed| study.run(variant, rate, seed)).collect(),
        None => Ok(vec![]),
    }
}

/// Sums up what has been run.
fn report(study: &Study) -> Result<Report, Problem> {
    let mut variants = vec![];
    for variant in &study.variants {
        variants.push(summed_up(study, variant)?);
    }
    let equal_tokens = study.budget == Budget::Tokens;
    let mut report = Report::new(&study.name, study.metric.clone(), study.test.is_some(), equal_tokens, variants);
    report.intro = intro(study);
    let date = chrono::Local::now().format("%Y-%m-%d %H:%M").to_string();
    report.origin.insert(0, ("command", format!("lowrank-train compare {}", study.file)));
    report.origin.push(("date", date));
    Ok(report)
}

fn summed_up(study: &Study, variant: &StudyVariant) -> Result<Variant, Problem> {
    let grid = grid(study, variant)?;
    let mut remarks = vec![];
    let mut runs = vec![];
    for &rate in searched(study, variant) {
        let state = run::state(&study.run(variant, rate, study.grid_seed)?)?;
        remarks.extend(remark(&format!("rate {}", rate_text(rate)), &state));
    }
    for planned in picked(study, variant)? {
        let state = run::state(&planned)?;
        if planned.seed != study.grid_seed {
            let place = format!("rate {}, seed {}", rate_text(planned.rate), planned.seed);
            remarks.extend(remark(&place, &state));
        }
        if matches!(state, State::Finished | State::Unfinished) {
            runs.push(read::read(&planned.config.output_dir)?);
        }
        let Some(test) = study.test.as_ref().filter(|_| state == State::Finished) else { continue };
        if let Err(reason) = run::is_scored(&planned.config.output_dir, test)? {
            // Scores on other data must not stand beside scores on these.
            if let Some(run) = runs.last_mut() {
                run.test = None;
            }
            let reason = reason.map(|reason| format!(": {}", reason.trim_end_matches('.'))).unwrap_or_default();
            remarks.push(format!("seed {} has no score on the test data{reason}", planned.seed));
        }
    }
    Ok(Variant { name: variant.name.clone(), grid, runs, remarks })
}

/// What a reader must know of a run that is not finished.
fn remark(place: &str, state: &State) -> Option<String> {
    match state {
        State::Finished | State::Unfinished => None,
        State::Missing => Some(format!("{place} has not run")),
        State::Failed(reason) => Some(format!("{place} failed: {}", reason.trim_end_matches('.'))),
        State::Changed(_) => Some(format!("{place} was run with another configuration and is left out")),
    }
}

fn intro(study: &Study) -> Vec<String> {
    let seeds: Vec<String> = study.seeds.iter().map(u64::to_string).collect();
    let searched = study.variants.iter().any(|variant| variant.rates.len() > 1);
    let shown = |paths: &crate::data::Paths| paths.entries().join(", ");
    let mut intro = vec![format!(
        "{} variants, {} {}.",
        study.variants.len(),
        if seeds.len() == 1 { "seed" } else { "seeds" },
        seeds.join(", ")
    )];
    let on = study.validation.as_ref().map(|paths| format!(" ({})", shown(paths))).unwrap_or_default();
    if searched {
        intro.push(format!(
            "The learning rate of each variant was picked by {} on validation data{on} with seed {}.",
            study.metric.label(),
            study.grid_seed
        ));
    }
    match &study.test {
        Some(test) => {
            intro.push(format!("The result of each run was then scored once on test data ({}).", shown(test)))
        }
        None if searched => {
            intro.push("There are no test data: the score is that of the data that picked the rate.".to_owned())
        }
        None => {}
    }
    if study.jobs > 1 {
        intro.push(format!("{} runs shared the machine at a time: their times cannot be compared.", study.jobs));
    }
    intro
}
