//! The subcommands, one file each.

pub mod analyze;
mod classify;
pub mod compare;
pub mod doctor;
pub mod eval;
pub mod generate;
pub mod intrinsic;
pub mod merge;
pub mod plan;
pub mod tokenizer;
pub mod train;

use std::path::{Path, PathBuf};

use crate::cli::{Command, ConfigArgs, ModelArgs};
use crate::config::{Dtype, ProgressStyle, Purpose, RunConfig, load_for};
use crate::error::Problem;
use crate::session::Session;

/// Runs a command.
///
/// # Errors
/// Whatever went wrong, with its exit code.
pub fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Train(args) => train::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Tokenizer(args) => tokenizer::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Intrinsic(args) => intrinsic::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Analyze(args) => analyze::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    }
}

/// The configuration a command was given, or the defaults.
fn configuration(args: &ConfigArgs) -> Result<RunConfig, Problem> {
    match &args.config {
        Some(path) => load_for(Purpose::Use, path, &args.sets),
        None => Ok(RunConfig::default()),
    }
}

/// What a run of this configuration wrote last: its adapter, or its whole model.
enum Written {
    Adapter(PathBuf),
    Model(PathBuf),
    Nothing,
}

fn written(config: &RunConfig) -> Written {
    let (adapter, model) = (config.output_dir.join("adapter"), config.output_dir.join("model"));
    if config.output_dir.as_os_str().is_empty() {
        Written::Nothing
    } else if adapter.join("adapter_config.json").is_file() {
        Written::Adapter(adapter)
    } else if model.join("config.json").is_file() {
        Written::Model(model)
    } else {
        Written::Nothing
    }
}

/// The model a command works on: `--model` and `--adapter`, else what the run of the configuration wrote, else its base.
fn open(config: &RunConfig, model: &ModelArgs, device: Option<&str>, dtype: Option<Dtype>) -> Result<Session, Problem> {
    let device = device.unwrap_or(&config.device);
    let dtype = dtype.unwrap_or(config.dtype);
    let style = ProgressStyle::Auto;
    let open = |base: &str| Session::open(base, device, dtype, style);
    let with_adapter = |base: &str, folder: &Path| -> Result<Session, Problem> {
        let mut session = open(base)?;
        session.load_adapter(folder)?;
        tracing::info!("adapter {}", folder.display());
        Ok(session)
    };
    let base = model.model.as_deref().unwrap_or(&config.base_model);
    match (&model.model, &model.adapter) {
        (_, Some(folder)) => with_adapter(base, folder),
        (Some(base), None) => open(base),
        (None, None) => match written(config) {
            Written::Adapter(folder) => with_adapter(base, &folder),
            Written::Model(folder) => open(&folder.to_string_lossy()),
            Written::Nothing => {
                tracing::info!("the run of this configuration has written nothing yet: using its base model");
                open(base)
            }
        },
    }
}

/// Text to standard output, or atomically to a file.
fn deliver(text: &str, out: Option<&Path>) -> Result<(), Problem> {
    use std::io::Write;
    match out {
        Some(path) => crate::run_dir::write_atomically(path, text.as_bytes()),
        None => std::io::stdout()
            .write_all(text.as_bytes())
            .map_err(|error| Problem::run("cannot write to standard output").source(error)),
    }
}
