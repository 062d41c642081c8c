//! The training loop on one page: batches, forward and backward, clip, update, log, evaluate, save.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use lowrank_core::Delta;
use lowrank_core::optim::Optimizer;
use lowrank_core::optim::adamw::StepRule;
use lowrank_core::projection::Gradient;
use lowrank_models::{Network, NetworkBatch, save};

use crate::checkpoint::{self, Counters, Exact, WriteAdapter};
use crate::config::{OnNonFinite, RunConfig};
use crate::error::Problem;
use crate::memory::MemoryWatch;
use crate::metrics::{EvalLine, Line, MetricsLog, SubspaceLine, SummaryLine, TrainLine};
use crate::progress::Progress;
use crate::rates::{Kinds, Rates};
use crate::run_dir::RunDir;
use crate::step::{Accumulated, Pass, Rules, StepOptions, apply};
use crate::task::{Batches, Evaluated, TrainingTask};
use crate::tensorboard::EventWriter;

/// What one optimiser step reports.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Mean loss over the counted tokens, before the update.
    pub loss: f64,
    /// 2-norm of all gradients, before clipping.
    pub grad_norm: f64,
    /// Whether the update was made.
    pub applied: bool,
    /// Most bytes of gradients that existed at the same time.
    pub gradient_bytes: usize,
}

/// The numbers one optimiser step needs.
pub struct StepPlan<'a> {
    /// How the passes are made.
    pub options: StepOptions,
    /// Number of the step, from 0.
    pub step: u64,
    /// Largest gradient norm; 0 for no clipping.
    pub max_grad_norm: f64,
    /// Denominator of each micro batch's loss.
    pub denominators: &'a [f64],
    /// Number of the first micro batch of this step within the run.
    pub first_key: u64,
    /// Rate and decay by name, whether a low-rank method has the parameter, and gradient scale.
    pub rule: &'a dyn Fn(&str, bool, f64) -> StepRule,
    /// Update segments while the backward pass goes on: needs a single micro batch and no clipping.
    pub immediate: bool,
}

/// One optimiser step over its micro batches. Without finite loss and gradient nothing is updated (an immediate update is
/// already made then; its run must stop).
pub fn optimizer_step<M: Network>(
    model: &mut M,
    optimizer: &mut Optimizer,
    batches: &[M::Batch],
    plan: &StepPlan<'_>,
) -> StepReport {
    let mut accumulated = Accumulated::default();
    let managed: BTreeSet<String> = prepare(model, optimizer, batches, plan);
    let unscaled = |name: &str| (plan.rule)(name, managed.contains(name), 1.0);
    let mut loss = 0.0;
    let mut pass = Pass::new(model, plan.options);
    for (index, batch) in batches.iter().enumerate() {
        let immediate: Option<Rules<'_>> = if plan.immediate { Some(&unscaled) } else { None };
        let (denominator, key) = (plan.denominators[index], plan.first_key + index as u64);
        let sum = pass.run(batch, denominator, key, &mut accumulated, optimizer, immediate);
        loss += sum / plan.denominators[index];
    }
    let grad_norm = accumulated.norm(optimizer);
    let gradient_bytes = accumulated.peak_bytes;
    let applied = loss.is_finite() && grad_norm.is_finite();
    if applied {
        let clip = if plan.max_grad_norm > 0.0 { (plan.max_grad_norm / (grad_norm + 1e-6)).min(1.0) } else { 1.0 };
        apply(model, &mut accumulated, optimizer, &|name| (plan.rule)(name, managed.contains(name), clip));
        constrain(model);
    }
    tell(model, optimizer.serving());
    StepReport { loss, grad_norm, applied, gradient_bytes }
}

/// Brings adapters back inside the constraint of their method, where it has one.
fn constrain<M: Network>(model: &mut M) {
    model.for_each_projection(&mut |_, projection| {
        projection.delta = projection.delta.take().map(Delta::constrained);
    });
}

/// Asks the optimiser what the backward passes shall hand over, and tells the linear layers. Returns the names of the
/// parameters that low-rank methods have.
fn prepare<M: Network>(
    model: &mut M,
    optimizer: &mut Optimizer,
    batches: &[M::Batch],
    plan: &StepPlan<'_>,
) -> BTreeSet<String> {
    // The head's gradient comes in chunks, each of which counts as a micro batch.
    let chunk = plan.options.head_chunk_tokens.max(1);
    let chunks: usize = batches.iter().map(|batch| batch.target_count().div_ceil(chunk)).sum();
    let in_head = head_weights(model);
    let passes = |name: &str| if in_head.contains(name) { chunks } else { batches.len() };
    let gradients = optimizer.begin(plan.step, &passes);
    let managed = gradients.keys().cloned().collect();
    tell(model, gradients);
    managed
}

/// Names of the weights of the head's linear layers.
fn head_weights<M: Network>(model: &M) -> BTreeSet<String> {
    M::head_projections(&model.head()).into_iter().map(|(module, _)| format!("{module}.weight")).collect()
}

/// Tells the linear layers how they act and what they hand over, by name of the weight.
fn tell<M: Network>(model: &mut M, mut gradients: BTreeMap<String, Gradient>) {
    if gradients.is_empty() {
        return;
    }
    model.for_each_projection(&mut |module, projection| {
        if let Some(gradient) = gradients.remove(&format!("{module}.weight")) {
            projection.gradient = gradient;
        }
    });
}

/// Puts every update that is still pending into its weight: the model is then its parameters alone.
pub fn settle<M: Network>(model: &mut M, optimizer: &mut Optimizer) {
    model.map_parameters(&mut |name, value| optimizer.settle(name, value));
    model.for_each_projection(&mut |_, projection| projection.gradient = Gradient::Full);
}

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
    /// Memory of the device, or of the process where the device has none of its own.
    pub memory: MemoryWatch,
    /// Predicted peak of that memory, if there is a prediction.
    pub predicted_bytes: Option<u64>,
    /// TensorBoard events.
    pub events: Option<EventWriter>,
    /// Set by a signal: stop after the current step.
    pub stop: Arc<AtomicBool>,
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
        let progress = Progress::start(self.config.logging.progress, self.total_steps, self.counters.step);
        if self.counters.step == 0 && self.config.training.eval_at_start {
            self.evaluate(&progress)?;
        }
        let mut ended_by = if self.config.training.max_steps.is_some() { "max_steps" } else { "num_epochs" };
        while self.counters.step < self.total_steps {
            // Looked at before a step, so that a run resumed from its last checkpoint does not train on.
            if self.stops_early() {
                ended_by = "early_stopping";
                break;
            }
            self.step(&rates, &progress)?;
            let step = self.counters.step;
            let is_last = step == self.total_steps;
            let due = |every: Option<u64>| every.is_some_and(|every| step.is_multiple_of(every));
            if self.evaluation.is_some() && (is_last || due(self.config.training.eval_steps)) {
                self.evaluate(&progress)?;
            }
            let is_done = is_last || self.stops_early();
            let interrupted = self.stop.load(Ordering::Relaxed);
            let is_best = self.counters.best.is_some_and(|(_, best)| best == step);
            if is_done || interrupted || is_best || due(Some(self.config.training.save_steps)) {
                self.save()?;
            }
            if interrupted && !is_done {
                progress.finish();
                return Ok(Outcome::Interrupted);
            }
        }
        let summary = self.summary(ended_by, started);
        self.record(&Line::Summary(summary), &progress)?;
        self.metrics.sync()?;
        progress.finish();
        Ok(Outcome::Finished(ended_by))
    }

    fn stops_early(&self) -> bool {
        let patience = self.config.training.early_stopping_patience;
        patience.is_some_and(|patience| self.counters.evaluations_since_best >= patience)
    }

    fn step(&mut self, rates: &Rates, progress: &Progress) -> Result<(), Problem> {
        let started = Instant::now();
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
        let report = optimizer_step(self.task.model_mut(), &mut self.optimizer, &batches, &plan);
        if !report.applied {
            self.refuse_non_finite(&report, &batches)?;
        }
        let tokens: usize = batches.iter().map(NetworkBatch::token_count).sum();
        self.counters.step += 1;
        self.counters.tokens += tokens as u64;
        self.counters.micro_batches += batches.len() as u64;
        self.counters.train_loss = Exact(report.loss);
        progress.advance(self.counters.step);
        let is_last = self.counters.step == self.total_steps;
        if is_last || step == 0 || self.counters.step.is_multiple_of(self.config.logging.logging_steps) {
            let seconds = started.elapsed().as_secs_f64();
            let subspace = self.subspace();
            let line = Line::Train(TrainLine {
                step: self.counters.step,
                epoch: self.loader.progress(),
                loss: report.loss,
                grad_norm: report.grad_norm,
                learning_rate: rates.base(step),
                tokens: self.counters.tokens,
                tokens_per_second: tokens as f64 / seconds,
                step_ms: seconds * 1e3,
                memory_bytes: self.memory.read().current_bytes,
                gradient_bytes: report.gradient_bytes as u64,
                optimizer_bytes: self.optimizer.state_bytes() as u64,
                subspace,
            });
            self.record(&line, progress)?;
        }
        Ok(())
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
    fn refuse_non_finite(&self, report: &StepReport, batches: &[BatchOf<T>]) -> Result<(), Problem> {
        let step = self.counters.step + 1;
        let mut records: Vec<u64> = batches.iter().flat_map(|batch| batch.records().iter().copied()).collect();
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
        let good = match self.dir.latest_complete()? {
            Some(saved) => format!("the last good checkpoint is {}", saved.path.display()),
            None => "there is no checkpoint yet".to_owned(),
        };
        Err(Problem::run(format!("{what}; {good}"))
            .hint("lower the learning rate, look at the records, or set training.on_non_finite = \"skip\""))
    }

    fn evaluate(&mut self, progress: &Progress) -> Result<(), Problem> {
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
            peak_memory_bytes: self.memory.read().peak_bytes,
            predicted_peak_memory_bytes: self.predicted_bytes,
            wall_seconds: started.elapsed().as_secs_f64(),
        }
    }
}
