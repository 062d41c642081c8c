//! Runs a folder of reference cases: one line each, exit status 1 if any failed.

use std::io::Write;
use std::path::PathBuf;

use clap::Parser;
use lowrank_testkit::goldens::{self, Options, Outcome, Report};

/// Compares lowrank with reference results of torch, transformers and peft.
///
/// Prints `passed NAME`, `failed NAME: why` or `unsupported NAME: why` for every case; the exit status is 1 if any failed.
/// LOWRANK_SMOLLM2 names the folder of the real checkpoint, for the cases that need it.
#[derive(Parser)]
struct Arguments {
    /// Folder of cases; without it LOWRANK_GOLDENS, else the copy that belongs to the source.
    folder: Option<PathBuf>,
    /// Where to run: cpu, wgpu, vulkan, cuda, metal, with an index after a colon, or auto.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Run only the case of this name, or if there is none, those whose name contains it; may be repeated.
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,
    /// Rebuild each block in the backward pass, use small chunks of logits and update layer by layer where that is possible.
    #[arg(long)]
    small_memory: bool,
    /// Write every measured error and its limit to standard error.
    #[arg(long)]
    details: bool,
}

fn main() {
    match run(&Arguments::parse()) {
        Ok(true) => {}
        Ok(false) => std::process::exit(1),
        Err(problem) => {
            let _ = writeln!(std::io::stderr(), "error: {problem}");
            std::process::exit(2);
        }
    }
}

/// Whether no case failed.
fn run(arguments: &Arguments) -> Result<bool, String> {
    let from_environment = std::env::var_os("LOWRANK_GOLDENS").filter(|path| !path.is_empty()).map(PathBuf::from);
    let folder = arguments.folder.clone().or(from_environment).unwrap_or_else(goldens::committed_folder);
    let mut options = Options::on(&arguments.device).map_err(|problem| problem.to_string())?;
    if arguments.small_memory {
        options = options.with_small_memory();
    }
    let names = chosen(goldens::names(&folder)?, &arguments.only);
    if names.is_empty() {
        return Err(format!("{} holds no such case (a case is a folder with case.json)", folder.display()));
    }
    let mut none_failed = true;
    for name in names {
        let report = goldens::run(&folder, &name, &options);
        none_failed &= !matches!(report.outcome, Outcome::Failed(_));
        writeln!(std::io::stdout(), "{}", report.line()).map_err(|error| error.to_string())?;
        if arguments.details {
            show(&report);
        }
    }
    Ok(none_failed)
}

fn chosen(names: Vec<String>, only: &[String]) -> Vec<String> {
    let is_meant =
        |name: &String, part: &String| name == part || (!names.contains(part) && name.contains(part.as_str()));
    names.iter().filter(|name| only.is_empty() || only.iter().any(|part| is_meant(name, part))).cloned().collect()
}

fn show(report: &Report) {
    for check in report.checks.list() {
        let _ = writeln!(std::io::stderr(), "    {:<42} {:>10.2e} of {:.2e}", check.what, check.error, check.limit);
    }
}
