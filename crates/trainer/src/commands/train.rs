//! `lowrank-train --config F`: train.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lowrank_kernels::launches::Launches;
use lowrank_models::save;

use crate::checkpoint::{self, Counters};
use crate::classification::ClassifierSession;
use crate::cli::{TrainArgs, VERSION};
use crate::commands::plan::available_bytes;
use crate::config::{self, Dtype, OnNonFinite, RunConfig, Task};
use crate::error::Problem;
use crate::memory::MemoryWatch;
use crate::metrics::{MetricsLog, process_memory};
use crate::optimizer;
use crate::plan::{self, Category, Machine, Plan};
use crate::run_dir::{RunDir, SavedCheckpoint, write_atomically};
use crate::session::Session;
use crate::shortage::{self, Doing};
use crate::task::{Batches, LoaderStateOf, TrainingTask};
use crate::tensorboard::EventWriter;
use crate::train_loop::{Outcome, Reading, Run, Window};

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
    match config.task {
        Task::CausalLm => train_task::<Session>(config),
        Task::SequenceClassification | Task::ImageClassification => train_task::<ClassifierSession>(config),
    }
}

fn train_task<T: TrainingTask>(config: &RunConfig) -> anyhow::Result<()> {
    let mut run = match shortage::catch(|| prepare::<T>(config)) {
        Ok(run) => run?,
        Err(shortage) => {
            let device = &config.device;
            let text = shortage::message(device, Doing::Loading, &shortage, "the weights alone did not fit");
            return Err(Problem::run(text).hint(shortage::hint(&[])).into());
        }
    };
    match run.train()? {
        Outcome::Interrupted => Err(Problem::interrupted(format!(
            "interrupted after step {} of {}; a checkpoint was written",
            run.counters.step, run.total_steps
        ))
        .hint("go on with --set training.resume_from_checkpoint=true")
        .into()),
        Outcome::Finished(_) => Ok(run.guarded(Doing::Saving, write_result)?),
    }
}

/// Everything a run needs, before its first step.
///
/// # Errors
/// As [`run`].
pub fn prepare<T: TrainingTask>(config: &RunConfig) -> anyhow::Result<Run<'_, T>> {
    let at_start = process_memory().current_bytes;
    let dir = RunDir::open(&config.output_dir, &config.training.resume_from_checkpoint)?;
    let resume = dir.checkpoint_to_resume(&config.training.resume_from_checkpoint)?;
    let mut task = T::open(config, resume.as_ref().map(|saved| saved.path.as_path()))?;
    if optimizer::stores_bf16(&config.optimizer) {
        crate::device::compute_type(config::Dtype::Bf16, task.device())?; // or says what the device cannot do
    }
    let mut optimizer = optimizer::build(config, task.model_mut())?;
    let data = task.read(config)?;
    let config_text = config::resolved_toml(config, &task.device().description)?;
    announce(config, &task, &config_text);
    let memory = MemoryWatch::new(&task.device().device);
    let predicted = announce_memory(config, &task);
    let restored = restore(resume.as_ref(), config, &mut task, &mut optimizer)?;
    write_atomically(&dir.config_path(), config_text.as_bytes())?;
    let (counters, state) = restored.unzip();
    let loader = task.loader(config, &data, state.as_ref())?;
    let metrics = match &resume {
        Some(saved) => MetricsLog::resume(&dir.metrics_path(), saved.step)?,
        None => MetricsLog::open(&dir.metrics_path())?,
    };
    let events = match config.logging.tensorboard {
        true => Some(EventWriter::create(&dir.tensorboard_dir(), resume.as_ref().map(|saved| saved.step))?),
        false => None,
    };
    let evaluation = task.evaluation(config, &data)?;
    let reading = reading(config, &task);
    Ok(Run {
        config,
        config_text,
        dir,
        total_steps: total_steps(config, &loader),
        task,
        loader,
        evaluation,
        optimizer,
        counters: counters.unwrap_or_default(),
        metrics,
        reading,
        launches: if reading == Reading::Later { Launches::watch() } else { None },
        bytes_outside: if memory.is_on_device() { 0 } else { at_start },
        memory,
        predicted,
        window: Window::default(),
        events,
        stop: on_signals()?,
    })
}

/// A graphics card is not made to wait for the host, where no step may have to be left out.
fn reading<T: TrainingTask>(config: &RunConfig, task: &T) -> Reading {
    let is_card = matches!(plan::machine_of(&task.device().description), Machine::Gpu);
    let may_leave_out = config.training.on_non_finite == OnNonFinite::Skip || config.dtype == Dtype::F16;
    if is_card && !may_leave_out { Reading::Later } else { Reading::EveryStep }
}

/// Shows what will be run before step 0.
fn announce<T: TrainingTask>(config: &RunConfig, task: &T, config_text: &str) {
    let device = &task.device().description;
    tracing::info!("lowrank-train {VERSION}, device {device}, seed {}", config.seed);
    tracing::info!("kernels: {}", crate::device::kernels(device));
    for line in config_text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        tracing::info!("  {line}");
    }
    let (trained, total) = save::parameter_counts(task.model());
    let share = 100.0 * trained as f64 / total.max(1) as f64;
    let what = match task.adapter() {
        Some(adapter) => format!("adapter on {} modules", adapter.attached.modules.len()),
        None => "the whole model".to_owned(),
    };
    tracing::info!("training {what}: {trained} of {total} parameters ({share:.2} %)");
}

/// Shows how much memory the run will need beside the program itself, and returns it. The system ends a process that asks for
/// more than there is without a word, so what does not fit is told before.
fn announce_memory<T: TrainingTask>(config: &RunConfig, task: &T) -> Option<Plan> {
    match task.predicted(config)? {
        Ok(plan) => {
            let peak = plan::show(plan.peak_bytes);
            tracing::info!("predicted peak {peak} ({}): {}", plan.peak_phase.name(), plan.summary());
            let available = available_bytes(plan::machine_of(&task.device().description));
            if let Some(available) = available.filter(|&available| plan.peak_bytes > available + resting(&plan)) {
                let savings = task.savings(config, &plan).unwrap_or_default();
                tracing::warn!(
                    "{peak} are needed, and {} are available: the system may end this process. {}",
                    plan::show(available + resting(&plan)),
                    shortage::hint(&savings)
                );
            }
            Some(plan)
        }
        Err(problem) => {
            tracing::warn!("memory cannot be predicted: {problem}");
            None
        }
    }
}

/// What the loaded model has taken already.
fn resting(plan: &Plan) -> u64 {
    plan.of(Category::Weights) + plan.of(Category::Adapter)
}

/// Takes over a checkpoint, after telling what changed in the configuration since.
fn restore<T: TrainingTask>(
    resume: Option<&SavedCheckpoint>,
    config: &RunConfig,
    task: &mut T,
    optimizer: &mut lowrank_core::optim::Optimizer,
) -> Result<Option<(Counters, LoaderStateOf<T>)>, Problem> {
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
    checkpoint::read(&saved.path, task.model_mut(), optimizer).map(Some)
}

/// Steps of the run: `max_steps`, or as many as the epochs need.
fn total_steps(config: &RunConfig, loader: &impl Batches) -> u64 {
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
fn write_result<T: TrainingTask>(run: &mut Run<'_, T>) -> Result<(), Problem> {
    crate::train_loop::settle(run.task.model_mut(), &mut run.optimizer);
    let (task, config) = (&run.task, run.config);
    let folder = match task.adapter() {
        Some(adapter) => {
            let folder = run.dir.adapter_dir();
            task.save_adapter(adapter, &config.base_model, &folder)
                .map_err(|error| Problem::run(format!("cannot write the result: {error}")))?;
            folder
        }
        None => {
            let folder = run.dir.model_dir();
            task.save_model(config, &folder)?;
            folder
        }
    };
    tracing::info!("wrote {}", folder.display());
    Ok(())
}
