//! `lowrank-train --config F`: train.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lowrank_models::{adapters, parameters, save};

use crate::checkpoint::{self, Counters};
use crate::cli::{TrainArgs, VERSION};
use crate::config::{self, RunConfig};
use crate::data::{self, Evaluation, Loader, LoaderConfig, LoaderState, Prepared};
use crate::error::{Kind, Problem};
use crate::evaluate;
use crate::metrics::MetricsLog;
use crate::optimizer;
use crate::run_dir::{RunDir, SavedCheckpoint, write_atomically};
use crate::session::Session;
use crate::tensorboard::EventWriter;
use crate::train_loop::{Outcome, Run};

/// Shards of a written model hold at most this.
const SHARD_BYTES: u64 = 5 << 30;

/// Runs the command.
///
/// # Errors
/// A wrong configuration (exit code 2), a failed run (1), an interruption (130).
pub fn run(args: &TrainArgs) -> anyhow::Result<()> {
    let Some(path) = &args.config.config else {
        return Err(Problem::config("no configuration was given").hint("lowrank-train --config FILE").into());
    };
    let config = config::load(path, &args.overrides())?;
    train(&config)
}

/// Trains what a checked configuration describes.
///
/// # Errors
/// As [`run`].
pub fn train(config: &RunConfig) -> anyhow::Result<()> {
    let dir = RunDir::open(&config.output_dir, &config.training.resume_from_checkpoint)?;
    let resume = dir.checkpoint_to_resume(&config.training.resume_from_checkpoint)?;
    let mut session = Session::for_training(config)?;
    if optimizer::stores_bf16(&config.optimizer) {
        crate::device::compute_type(config::Dtype::Bf16, &session.device)?; // or says what the device cannot do
    }
    let mut optimizer = optimizer::build(config, &mut session.decoder)?;
    let prepared = prepare(config, &session)?;
    let config_text = config::resolved_toml(config, &session.device.description)?;
    announce(config, &session, &config_text);
    let restored = restore(resume.as_ref(), config, &mut session, &mut optimizer)?;
    write_atomically(&dir.config_path(), config_text.as_bytes())?;
    let (counters, loader) = loader(config, &session, &prepared, restored)?;
    let metrics = match &resume {
        Some(saved) => MetricsLog::resume(&dir.metrics_path(), saved.step)?,
        None => MetricsLog::open(&dir.metrics_path())?,
    };
    let events = match config.logging.tensorboard {
        true => Some(EventWriter::create(&dir.tensorboard_dir(), resume.as_ref().map(|saved| saved.step))?),
        false => None,
    };
    let evaluation = evaluation(config, &session, &prepared)?;
    let questions = match (&config.data.eval, config.evaluation.generate) {
        (Some(paths), true) => evaluate::questions(&session, paths.entries(), &config.data)?,
        _ => vec![],
    };
    let total_steps = total_steps(config, &loader);
    let stop = on_signals()?;
    let mut run = Run {
        config,
        config_text,
        dir,
        session,
        loader,
        evaluation,
        questions,
        optimizer,
        counters,
        total_steps,
        metrics,
        events,
        stop,
    };
    match run.train()? {
        Outcome::Interrupted => Err(Problem::interrupted(format!(
            "interrupted after step {} of {}; a checkpoint was written",
            run.counters.step, run.total_steps
        ))
        .hint("go on with --set training.resume_from_checkpoint=true")
        .into()),
        Outcome::Finished(_) => Ok(write_result(&mut run)?),
    }
}

/// Reads and tokenises the data of the run.
fn prepare(config: &RunConfig, session: &Session) -> Result<Prepared, Problem> {
    let cache = data::default_cache_folder();
    data::prepare(&config.data, &session.encoder(), config.seed, cache.as_deref()).map_err(data_problem)
}

/// A data error with its hint.
pub(super) fn data_problem(error: data::DataError) -> Problem {
    let hint = error.hint();
    let problem = match (&error, error.kind()) {
        (data::DataError::Config { .. }, _) => Problem::config("the [data] table cannot be used"),
        (_, Kind::Config) => Problem::config("cannot read the data"),
        _ => Problem::run("cannot read the data"),
    };
    let problem = problem.source(error);
    match hint {
        Some(hint) => problem.hint(hint),
        None => problem,
    }
}

/// Shows what will be run before step 0.
fn announce(config: &RunConfig, session: &Session, config_text: &str) {
    tracing::info!("lowrank-train {VERSION}, device {}, seed {}", session.device.description, config.seed);
    tracing::info!("kernels: {}", crate::device::kernels(&session.device.description));
    for line in config_text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        tracing::info!("  {line}");
    }
    let trained: usize =
        parameters::trained(&session.decoder).iter().map(|(_, dims)| dims.iter().product::<usize>()).sum();
    let total = save::parameter_count(&session.decoder);
    let share = 100.0 * trained as f64 / total.max(1) as f64;
    let what = match &session.adapter {
        Some(adapter) => format!("adapter on {} modules", adapter.attached.modules.len()),
        None => "the whole model".to_owned(),
    };
    tracing::info!("training {what}: {trained} of {total} parameters ({share:.2} %)");
}

/// Takes over a checkpoint, after telling what changed in the configuration since.
fn restore(
    resume: Option<&SavedCheckpoint>,
    config: &RunConfig,
    session: &mut Session,
    optimizer: &mut lowrank_core::optim::Optimizer,
) -> Result<Option<(Counters, LoaderState)>, Problem> {
    let Some(saved) = resume else { return Ok(None) };
    tracing::info!("resuming from {}", saved.path.display());
    let old = std::fs::read_to_string(saved.path.join("config.toml")).ok().and_then(|text| toml::from_str(&text).ok());
    if let Some(old) = old {
        for change in config::diff(&old, &config::resolved_value(config)?) {
            match change.matters {
                true => tracing::warn!("changed since the checkpoint: {change}"),
                false => tracing::info!("changed since the checkpoint: {change}"),
            }
        }
    }
    checkpoint::read(&saved.path, &mut session.decoder, optimizer).map(Some)
}

fn loader_config(config: &RunConfig, session: &Session) -> LoaderConfig {
    LoaderConfig {
        micro_batch_size: config.training.micro_batch_size,
        max_seq_length: config.data.max_seq_length,
        packing: config.data.packing,
        shuffle: config.data.shuffle,
        seed: config.seed,
        pad_id: session.tokenizer.pad_id(),
        pad_to_multiple_of: config.data.pad_to_multiple_of,
    }
}

fn loader(
    config: &RunConfig,
    session: &Session,
    prepared: &Prepared,
    restored: Option<(Counters, LoaderState)>,
) -> Result<(Counters, Loader), Problem> {
    let wanted = loader_config(config, session);
    let (counters, state) = match restored {
        Some((counters, state)) => (counters, Some(state)),
        None => (Counters::default(), None),
    };
    let loader = Loader::open(&prepared.train, wanted, state.as_ref()).map_err(data_problem)?;
    Ok((counters, loader))
}

fn evaluation(config: &RunConfig, session: &Session, prepared: &Prepared) -> Result<Option<Evaluation>, Problem> {
    let made = prepared.eval.clone().map(|data| Evaluation::new(data, loader_config(config, session)));
    made.transpose().map_err(data_problem)
}

/// Steps of the run: `max_steps`, or as many as the epochs need.
fn total_steps(config: &RunConfig, loader: &Loader) -> u64 {
    let training = &config.training;
    match (training.max_steps, training.num_epochs) {
        (Some(steps), _) => steps,
        (None, epochs) => {
            // Streamed data has no known length: the configuration was checked for max_steps.
            let batches = loader.batches_per_epoch(0).unwrap_or(0) as f64 * epochs.unwrap_or(1.0);
            (batches / training.gradient_accumulation_steps as f64).ceil() as u64
        }
    }
}

/// The first SIGINT or SIGTERM asks the loop to stop; a second one ends the process at once.
fn on_signals() -> Result<Arc<AtomicBool>, Problem> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, stop.clone())
            .and_then(|_| signal_hook::flag::register(signal, stop.clone()))
            .map_err(|error| Problem::run("cannot listen for signals").source(error))?;
    }
    Ok(stop)
}

/// Writes the adapter, or the whole model.
fn write_result(run: &mut Run<'_>) -> Result<(), Problem> {
    let failed = |error: &dyn std::error::Error| Problem::run(format!("cannot write the result: {error}"));
    crate::train_loop::settle(&mut run.session.decoder, &mut run.optimizer);
    let (session, config) = (&run.session, run.config);
    let folder = match &session.adapter {
        Some(adapter) => {
            let folder = run.dir.adapter_dir();
            adapters::save_adapter(&session.decoder, &adapter.config, &adapter.attached, &config.base_model, &folder)
                .map_err(|error| failed(&error))?;
            folder
        }
        None => {
            let folder = run.dir.model_dir();
            let dtype = crate::session::file_dtype(config.dtype);
            save::save_model(&session.decoder, &session.folder, &folder, dtype, SHARD_BYTES)
                .map_err(|error| failed(&error))?;
            folder
        }
    };
    tracing::info!("wrote {}", folder.display());
    Ok(())
}
