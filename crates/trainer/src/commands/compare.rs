//! `lowrank-train compare`: runs a study, or compares runs that are there.

use std::path::{Path, PathBuf};

use crate::cli::CompareArgs;
use crate::error::Problem;
use crate::run_dir::write_atomically;
use crate::study::metric::Metric;
use crate::study::plan::{Options, run_study};
use crate::study::report::Report;
use crate::study::{file, group, html, read, table};

/// Runs the command: prints the table and writes the report.
///
/// # Errors
/// A study or folder that cannot be used, an interruption, or a variant of a study that has no score.
pub fn run(args: &CompareArgs) -> anyhow::Result<()> {
    let file = study_file(&args.paths)?;
    let is_study = file.is_some();
    let (report, out) = match file {
        Some(path) => study(path, args)?,
        None => (folders(args)?, args.out.clone()),
    };
    let mut text = table::terminal(&report);
    if let Some(verdict) = report.verdict() {
        text += &format!("\nBy {}: {verdict}\n", report.score_label());
    }
    for note in &report.notes {
        text += &format!("- {note}\n");
    }
    super::deliver(&text, None)?;
    match &out {
        Some(folder) => write(&report, folder)?,
        None => tracing::info!("--out DIR writes report.md, report.csv and report.html with plots"),
    }
    // What was not to be run is not missed.
    let wanted = |name: &String| args.only.is_empty() || args.only.contains(name);
    let without = report.rows.iter().filter(|row| row.place.is_none()).map(|row| &row.variant.name);
    let failed: Vec<&str> = without.filter(|name| wanted(name)).map(String::as_str).collect();
    match failed.is_empty() || args.runs.report || !is_study {
        true => Ok(()),
        false => Err(Problem::run(format!("there is no score for {}", failed.join(", ")))
            .hint("the notes above say why; log.txt in a run's folder says more; --retry tries again")
            .into()),
    }
}

/// The study file, if that is what was named.
fn study_file(paths: &[PathBuf]) -> Result<Option<&Path>, Problem> {
    let is_study = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "toml");
    match paths {
        [only] if is_study(only) => Ok(Some(only)),
        _ => match paths.iter().find(|path| is_study(path)) {
            Some(path) => Err(Problem::config(format!("{} is a study, but other paths are named too", path.display()))
                .hint("compare one study, or any number of run folders")),
            None => Ok(None),
        },
    }
}

fn study(path: &Path, args: &CompareArgs) -> Result<(Report, Option<PathBuf>), Problem> {
    let mut study = file::load(path)?;
    if let Some(name) = &args.metric {
        study.metric = Metric::new(name, None)?;
    }
    let options = Options::new(args.runs, args.only.clone());
    let report = run_study(&study, &options)?;
    Ok((report, Some(args.out.clone().unwrap_or_else(|| study.output_dir.clone()))))
}

/// A report of run folders.
fn folders(args: &CompareArgs) -> Result<Report, Problem> {
    let only_for_studies = [
        ("--fresh", args.runs.fresh),
        ("--retry", args.runs.retry),
        ("--report", args.runs.report),
        ("--only", !args.only.is_empty()),
    ];
    if let Some((option, _)) = only_for_studies.iter().find(|(_, given)| *given) {
        return Err(Problem::config(format!("{option} is for a study, but run folders are named"))
            .hint("lowrank-train compare STUDY.toml"));
    }
    let mut runs = vec![];
    for path in &args.paths {
        if !path.exists() {
            return Err(Problem::config(format!("there is no folder {}", path.display()))
                .hint("name a study (.toml) or folders of runs; paths are relative to the current folder"));
        }
        // Beside run folders, runs/* names logs and the like.
        let found = if path.is_dir() { read::run_folders(path)? } else { vec![] };
        if found.is_empty() {
            tracing::warn!("{}: left out, it is no run folder and holds none (no metrics.jsonl)", path.display());
        }
        for folder in found {
            runs.push(read::read(&folder)?);
        }
    }
    if runs.is_empty() {
        return Err(Problem::config("there is no run in what was named").hint("a run folder holds metrics.jsonl"));
    }
    runs.sort_by(|a, b| a.folder.cmp(&b.folder));
    runs.dedup_by(|a, b| a.folder == b.folder);
    let metric = Metric::new(args.metric.as_deref().unwrap_or("eval_loss"), None)?;
    let on_test = runs.iter().all(|run| run.test.is_some());
    let mut report = Report::new("Comparison", metric, on_test, true, group::group(runs));
    let date = chrono::Local::now().format("%Y-%m-%d %H:%M").to_string();
    report.origin.push(("date", date));
    Ok(report)
}

fn write(report: &Report, folder: &Path) -> Result<(), Problem> {
    std::fs::create_dir_all(folder).map_err(|error| {
        Problem::config(format!("cannot write into {}", folder.display())).source(error).hint("choose another --out")
    })?;
    let files = [
        ("report.md", table::markdown(report)),
        ("report.csv", table::csv(report)),
        ("report.html", html::page(report)),
    ];
    for (name, text) in files {
        write_atomically(&folder.join(name), text.as_bytes())?;
    }
    tracing::info!("wrote report.md, report.csv and report.html in {}", folder.display());
    Ok(())
}
