//! The training loop on one page: batches, step, log, evaluate, save.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use lowrank_core::optim::Optimizer;
use lowrank_kernels::launches::Launches;
use lowrank_models::{Network, NetworkBatch, save};

use crate::checkpoint::{self, Counters, Exact, WriteAdapter};
use crate::config::{Dtype, OnNonFinite, RunConfig};
use crate::error::Problem;
use crate::memory::{MemoryWatch, device_memory};
use crate::metrics::{EvalLine, Line, MetricsLog, SubspaceLine, SummaryLine, TrainLine};
use crate::plan::Plan;
use crate::progress::Progress;
use crate::rates::{Kinds, Rates};
use crate::run_dir::RunDir;
use crate::shortage::{self, Doing, Held, Shortage};
use crate::step::StepOptions;
use crate::task::{Batches, Evaluated, TrainingTask};
use crate::tensorboard::EventWriter;
use crate::update::{Measured, Unread, read_all, take_step};
pub use crate::update::{Reading, StepPlan, StepReport, optimizer_step, settle};

/// A micro batch of a task.
type BatchOf<T> = <<T as TrainingTask>::Model as Network>::Batch;

/// A run between two steps.
pub struct Run<'a, T: TrainingTask> {
    /// The configuration.
    pub config: &'a RunConfig,
    /// Its resolved text, stored in every checkpoint.
    pub config_text: String,
    /// Where everything is written.
    pub dir: RunDir,
    /// Model and adapter.
    pub task: T,
    /// Training batches.
    pub loader: T::Loader,
    /// Held-out data.
    pub evaluation: Option<T::Evaluation>,
    /// Optimiser state.
    pub optimizer: Optimizer,
    /// Where the run stands.
    pub counters: Counters,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// The metrics file.
    pub metrics: MetricsLog,
    /// When loss and norm of a step are read.
    pub reading: Reading,
    /// Counts kernels on a graphics card.
    pub launches: Option<Launches>,
    /// Memory of the device, or of the process where the device has none of its own.
    pub memory: MemoryWatch,
    /// Of the process, what was there before anything was loaded.
    pub bytes_outside: u64,
    /// Predicted memory, if there is a prediction.
    pub predicted: Option<Plan>,
    /// TensorBoard events.
    pub events: Option<EventWriter>,
    /// Set by a signal: stop after the current step.
    pub stop: Arc<AtomicBool>,
    /// Since the last line of the log.
    pub window: Window,
}

/// What happened since the last line of the log.
#[derive(Debug, Default)]
pub struct Window {
    steps: u64,
    tokens: usize,
    /// Time of the steps, waiting for the device included.
    seconds: f64,
    /// Time until the host had handed everything to the device.
    host_seconds: f64,
    /// Kernels launched.
    launches: u64,
    /// Steps whose loss and norm the host does not know yet: number and records of each.
    unread: Vec<(Unread, u64, Vec<u64>)>,
    /// The last step that was read.
    report: Option<StepReport>,
    /// Most bytes of gradients of any step of the run.
    gradient_bytes: usize,
}

/// How the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps were made, or early stopping.
    Finished(&'static str),
    /// A signal; a checkpoint was written.
    Interrupted,
}

impl<T: TrainingTask> Run<'_, T> {
    /// Trains to the end, to an early stop or to an interruption.
    ///
    /// # Errors
    /// A loss that is not finite under `on_non_finite = "stop"`; anything the disk refuses.
    pub fn train(&mut self) -> Result<Outcome, Problem> {
        let started = Instant::now();
        let rates = Rates::new(self.config, self.total_steps, Kinds::of(self.task.model_mut()))?;
        self.counters.loss_scale =
            (self.config.dtype == Dtype::F16).then(|| self.counters.loss_scale.unwrap_or_default());
        let progress = Progress::start(self.config.logging.progress, self.total_steps, self.counters.step);
        if self.counters.step == 0 && self.config.training.eval_at_start {
            self.guarded(Doing::Evaluation, |run| run.evaluate(&progress))?;
        }
        let mut ended_by = if self.config.training.max_steps.is_some() { "max_steps" } else { "num_epochs" };
        while self.counters.step < self.total_steps {
            // Looked at before a step, so that a run resumed from its last checkpoint does not train on.
            if self.stops_early() {
                ended_by = "early_stopping";
                break;
            }
            let number = self.counters.step + 1;
            self.guarded(Doing::Step(number), |run| run.step(&rates, &progress))?;
            let step = self.counters.step;
            let is_last = step == self.total_steps;
            let due = |every: Option<u64>| every.is_some_and(|every| step.is_multiple_of(every));
            if self.evaluation.is_some() && (is_last || due(self.config.training.eval_steps)) {
                self.guarded(Doing::Evaluation, |run| run.evaluate(&progress))?;
            }
            let is_done = is_last || self.stops_early();
            let interrupted = self.stop.load(Ordering::Relaxed);
            let is_best = self.counters.best.is_some_and(|(_, best)| best == step);
            if is_done || interrupted || is_best || due(Some(self.config.training.save_steps)) {
                self.guarded(Doing::Saving, Self::save)?;
            }
            if interrupted && !is_done {
                progress.finish();
                return Ok(Outcome::Interrupted);
            }
        }
        let summary = self.summary(ended_by, started);
        let memory = shortage::comparison(&summary.measured_memory_bytes, Some(&summary.predicted_memory_bytes));
        self.record(&Line::Summary(summary), &progress)?;
        tracing::info!("memory: {memory}");
        self.metrics.sync()?;
        progress.finish();
        Ok(Outcome::Finished(ended_by))
    }

    /// Runs a part of the run.
    ///
    /// # Errors
    /// Those of the part. Where the device has no memory left, the error says what holds it.
    pub fn guarded<R>(
        &mut self,
        doing: Doing,
        part: impl FnOnce(&mut Self) -> Result<R, Problem>,
    ) -> Result<R, Problem> {
        match shortage::catch(|| part(self)) {
            Ok(result) => result,
            Err(shortage) => Err(self.out_of_memory(doing, &shortage)),
        }
    }

    fn out_of_memory(&mut self, doing: Doing, shortage: &Shortage) -> Problem {
        let in_use = device_memory(&self.task.device().device).map_or(0, |memory| memory.in_use_bytes);
        let held = Held::by(self.task.model_mut(), &self.optimizer);
        let plan = self.predicted.as_ref();
        let device = &self.task.device().description;
        let blame = shortage::blame(doing, &held, in_use, plan);
        let what = shortage::message(device, doing, shortage, &blame);
        let savings = plan.and_then(|plan| self.task.savings(self.config, plan).ok()).unwrap_or_default();
        match self.last_good() {
            Ok(good) => Problem::run(format!("{what}; {good}")),
            Err(_) => Problem::run(what),
        }
        .hint(shortage::hint(&savings))
    }

    /// Where the run could be taken up again.
    fn last_good(&self) -> Result<String, Problem> {
        Ok(match self.dir.latest_complete()? {
            Some(saved) => format!("the last good checkpoint is {}", saved.path.display()),
            None => "there is no checkpoint yet".to_owned(),
        })
    }

    fn stops_early(&self) -> bool {
        let patience = self.config.training.early_stopping_patience;
        patience.is_some_and(|patience| self.counters.evaluations_since_best >= patience)
    }

    fn step(&mut self, rates: &Rates, progress: &Progress) -> Result<(), Problem> {
        let started = Instant::now();
        let launched = self.launches.as_ref().map_or(0, Launches::count);
        let training = &self.config.training;
        let wanted = 0..training.gradient_accumulation_steps;
        let batches = wanted.map(|_| self.loader.next_batch()).collect::<Result<Vec<BatchOf<T>>, _>>()?;
        let targets: usize = batches.iter().map(NetworkBatch::target_count).sum();
        let denominators = vec![targets.max(1) as f64; batches.len()];
        let step = self.counters.step;
        let plan = StepPlan {
            options: StepOptions {
                checkpointing: training.gradient_checkpointing,
                head_chunk_tokens: self.head_chunk_tokens(),
                seed: self.config.seed,
            },
            max_grad_norm: training.max_grad_norm,
            denominators: &denominators,
            first_key: self.counters.micro_batches,
            step,
            rule: &|name, is_managed, scale| rates.rule(name, is_managed, step, scale),
            immediate: crate::optimizer::updates_immediately(self.config),
        };
        let (model, optimizer) = (self.task.model_mut(), &mut self.optimizer);
        let scale = self.counters.loss_scale.map_or(1.0, |loss| loss.scale);
        let measured = take_step(model, optimizer, &batches, &plan, scale, self.reading);
        self.window.host_seconds += started.elapsed().as_secs_f64();
        self.window.launches += self.launches.as_ref().map_or(0, Launches::count) - launched;
        let records: Vec<u64> = batches.iter().flat_map(|batch| batch.records().iter().copied()).collect();
        match measured {
            Measured::Read(report) => self.take_note(report, step + 1, records)?,
            Measured::Unread(unread) => self.window.unread.push((*unread, step + 1, records)),
        }
        let tokens: usize = batches.iter().map(NetworkBatch::token_count).sum();
        self.counters.step += 1;
        self.counters.tokens += tokens as u64;
        self.counters.micro_batches += batches.len() as u64;
        self.window.steps += 1;
        self.window.tokens += tokens;
        self.window.seconds += started.elapsed().as_secs_f64();
        progress.advance(self.counters.step);
        let is_last = self.counters.step == self.total_steps;
        if is_last || step == 0 || self.counters.step.is_multiple_of(self.config.logging.logging_steps) {
            self.log_step(rates, progress)?;
        }
        Ok(())
    }

    /// Learns what the steps since the last time measured: one read from the device.
    ///
    /// # Errors
    /// The first step that was not finite, as if it had just been made: nothing was written since.
    fn catch_up(&mut self) -> Result<(), Problem> {
        let started = Instant::now();
        let (unread, steps): (Vec<_>, Vec<_>) =
            self.window.unread.drain(..).map(|(unread, step, records)| (unread, (step, records))).unzip();
        for (report, (step, records)) in read_all(unread).into_iter().zip(steps) {
            self.take_note(report, step, records)?;
        }
        self.window.seconds += started.elapsed().as_secs_f64();
        Ok(())
    }

    /// Takes over what a step measured; refuses what is not finite.
    fn take_note(&mut self, report: StepReport, step: u64, records: Vec<u64>) -> Result<(), Problem> {
        match (report.applied, &mut self.counters.loss_scale) {
            (true, Some(loss)) => loss.note_good(),
            (true, None) => {}
            (false, Some(loss)) if report.loss.is_finite() && loss.can_shrink() => {
                let before = loss.scale;
                loss.shrink();
                let after = loss.scale;
                tracing::warn!(
                    "step {step}: a gradient does not fit into f16 at a loss scale of {before}; the update is left out, and the \
                     scale is now {after}"
                );
            }
            (false, _) => self.refuse_non_finite(&report, step, records)?,
        }
        self.counters.train_loss = Exact(report.loss);
        self.window.gradient_bytes = self.window.gradient_bytes.max(report.gradient_bytes);
        self.window.report = Some(report);
        Ok(())
    }

    /// Writes the line of the step that was just made. Times are means over the steps since the last line.
    fn log_step(&mut self, rates: &Rates, progress: &Progress) -> Result<(), Problem> {
        self.catch_up()?;
        let Some(report) = self.window.report else { return Ok(()) };
        let gradient_bytes = self.window.gradient_bytes;
        let Window { steps, tokens, seconds, host_seconds, launches, .. } =
            std::mem::replace(&mut self.window, Window { gradient_bytes, ..Window::default() });
        let memory = self.memory.read();
        let of_device = |value: f64| (self.reading == Reading::Later).then_some(value / steps as f64);
        let line = Line::Train(TrainLine {
            step: self.counters.step,
            epoch: self.loader.progress(),
            loss: report.loss,
            grad_norm: report.grad_norm,
            learning_rate: rates.base(self.counters.step - 1),
            tokens: self.counters.tokens,
            tokens_per_second: tokens as f64 / seconds,
            step_ms: 1e3 * seconds / steps as f64,
            host_ms: of_device(1e3 * host_seconds),
            launches: self.launches.as_ref().and_then(|_| of_device(launches as f64)),
            memory_bytes: memory.current_bytes,
            tensor_bytes: device_memory(&self.task.device().device).map(|memory| memory.in_use_bytes),
            loss_scale: self.counters.loss_scale.map(|loss| loss.scale),
            skipped_steps: self.counters.loss_scale.map(|loss| loss.skipped_steps),
            gradient_bytes: report.gradient_bytes as u64,
            optimizer_bytes: self.optimizer.state_bytes() as u64,
            subspace: self.subspace(),
        });
        self.record(&line, progress)
    }

    /// What the low-rank methods tell together: mean captured energy and overlap, all refreshes.
    fn subspace(&self) -> Option<SubspaceLine> {
        let reports = self.optimizer.reports();
        if reports.is_empty() {
            return None;
        }
        let mean = |values: Vec<f64>| match values.len() {
            0 => None,
            count => Some(values.iter().sum::<f64>() / count as f64),
        };
        Some(SubspaceLine {
            captured_energy: mean(reports.values().filter_map(|report| report.energy).collect()),
            subspace_overlap: mean(reports.values().filter_map(|report| report.overlap).collect()),
            refreshes: reports.values().map(|report| report.refreshes).sum(),
            refresh_seconds: reports.values().map(|report| report.refresh_seconds).sum(),
        })
    }

    fn head_chunk_tokens(&self) -> usize {
        self.config.training.head_chunk_tokens.unwrap_or_else(|| self.task.model().default_head_chunk())
    }

    fn record(&mut self, line: &Line, progress: &Progress) -> Result<(), Problem> {
        self.metrics.write(line)?;
        if let Some(events) = &mut self.events {
            events.write(line)?;
        }
        progress.record(line);
        Ok(())
    }

    /// Stops the run, or warns, where the loss or the gradient is not finite.
    fn refuse_non_finite(&self, report: &StepReport, step: u64, mut records: Vec<u64>) -> Result<(), Problem> {
        records.sort_unstable();
        records.dedup();
        let shown: Vec<String> = records.iter().take(8).map(|&r| self.loader.describe_record(r)).collect();
        let more = if records.len() > shown.len() {
            format!(" and {} more", records.len() - shown.len())
        } else {
            String::new()
        };
        let what = format!(
            "step {step}: the loss is {} and the gradient norm {}; the records of this step: {}{more}",
            report.loss,
            report.grad_norm,
            shown.join(", ")
        );
        if self.config.training.on_non_finite == OnNonFinite::Skip {
            tracing::warn!("{what}; the update is left out");
            return Ok(());
        }
        Err(Problem::run(format!("{what}; {}", self.last_good()?))
            .hint("lower the learning rate, look at the records, or set training.on_non_finite = \"skip\""))
    }

    fn evaluate(&mut self, progress: &Progress) -> Result<(), Problem> {
        self.catch_up()?;
        let Some(evaluation) = &self.evaluation else { return Ok(()) };
        let started = Instant::now();
        let Evaluated { loss, count, perplexity, exact_match, scores } =
            self.task.evaluate(self.config, evaluation, self.head_chunk_tokens())?;
        self.counters.eval_loss = Some(Exact(loss));
        self.counters.exact_match = exact_match.map(|(share, _)| Exact(share));
        self.counters.scores = scores.iter().map(|(name, &score)| (name.clone(), Exact(score))).collect();
        match self.counters.best {
            Some((best, _)) if loss >= best.0 || loss.is_nan() => self.counters.evaluations_since_best += 1,
            _ => {
                self.counters.best = Some((Exact(loss), self.counters.step));
                self.counters.evaluations_since_best = 0;
            }
        }
        let line = Line::Eval(EvalLine {
            step: self.counters.step,
            loss,
            perplexity,
            tokens: count,
            exact_match: exact_match.map(|(share, _)| share),
            exact_match_samples: exact_match.map(|(_, samples)| samples),
            scores,
            seconds: started.elapsed().as_secs_f64(),
        });
        self.record(&line, progress)
    }

    /// Writes a checkpoint, then deletes the oldest ones beyond the limit.
    fn save(&mut self) -> Result<(), Problem> {
        self.catch_up()?;
        self.metrics.sync()?;
        let writer = self.dir.begin_checkpoint(self.counters.step)?;
        let (task, base_model) = (&self.task, &self.config.base_model);
        let write_adapter =
            task.adapter().map(|adapter| move |folder: &Path| task.save_adapter(adapter, base_model, folder));
        checkpoint::write(
            writer.path(),
            task.model(),
            write_adapter.as_ref().map(|write| write as &WriteAdapter<'_>),
            &self.optimizer,
            &self.counters,
            self.loader.state(),
            &self.config_text,
        )?;
        writer.commit()?;
        if let Some(limit) = self.config.training.save_total_limit {
            let best: Vec<u64> = self.counters.best.iter().map(|&(_, step)| step).collect();
            self.dir.prune(limit, &best)?;
        }
        Ok(())
    }

    fn summary(&mut self, ended_by: &str, started: Instant) -> SummaryLine {
        let peak_bytes = self.memory.read().peak_bytes;
        let held = Held::by(self.task.model_mut(), &self.optimizer);
        let of_run = peak_bytes.saturating_sub(self.bytes_outside);
        let (trained, total) = save::parameter_counts(self.task.model());
        SummaryLine {
            step: self.counters.step,
            ended_by: ended_by.to_owned(),
            train_loss: self.counters.train_loss.0,
            eval_loss: self.counters.eval_loss.map(|loss| loss.0),
            best_eval_loss: self.counters.best.map(|(loss, _)| loss.0),
            best_step: self.counters.best.map(|(_, step)| step),
            exact_match: self.counters.exact_match.map(|share| share.0),
            scores: self.counters.scores.iter().map(|(name, score)| (name.clone(), score.0)).collect(),
            trainable_parameters: trained as u64,
            total_parameters: total as u64,
            tokens: self.counters.tokens,
            peak_memory_bytes: peak_bytes,
            predicted_peak_memory_bytes: self.predicted.as_ref().map(|plan| plan.peak_bytes + self.bytes_outside),
            measured_memory_bytes: shortage::measured(&held, self.window.gradient_bytes as u64, of_run),
            predicted_memory_bytes: self.predicted.as_ref().map(shortage::predicted).unwrap_or_default(),
            wall_seconds: started.elapsed().as_secs_f64(),
        }
    }
}
