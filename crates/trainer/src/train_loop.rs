//! The training loop on one page: batches, forward and backward, clip, update, log, evaluate, save.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use lowrank_core::optim::adamw::StepRule;
use lowrank_core::optim::{Optimizer, Schedule, ScheduleKind};
use lowrank_core::projection::Gradient;
use lowrank_models::adapters::for_each_projection;
use lowrank_models::{Batch, parameters};
use regex::RegexSet;

use crate::checkpoint::{self, Counters, Exact};
use crate::config::{AdapterConfig, LoraConfig, OnNonFinite, RunConfig, Scheduler};
use crate::data::{Evaluation, Loader};
use crate::error::Problem;
use crate::evaluate::{self, Question};
use crate::metrics::{EvalLine, Line, MetricsLog, SubspaceLine, SummaryLine, TrainLine, process_memory};
use crate::progress::Progress;
use crate::run_dir::RunDir;
use crate::session::Session;
use crate::step::{Accumulated, Pass, Rules, StepOptions, apply, default_head_chunk};
use crate::tensorboard::EventWriter;

/// Learning rate and decay of every parameter at any step.
pub struct Rates {
    schedule: Schedule,
    learning_rate: f64,
    /// Learning rate of parameters that a low-rank method does not manage, or that are outside the blocks' linear layers.
    plain: f64,
    /// No low-rank method: the linear layers are told by their names.
    is_adamw: bool,
    weight_decay: f64,
    no_decay: RegexSet,
    /// LoRA+: factor of B, and the learning rate of embedding factors.
    plus: Option<(f64, f64)>,
}

impl Rates {
    /// The rates of a run of `total_steps`.
    ///
    /// # Errors
    /// `no_decay` holds something that is no regular expression.
    pub fn new(config: &RunConfig, total_steps: u64) -> Result<Self, Problem> {
        let (training, optimizer) = (&config.training, config.optimizer.common());
        let kind = match training.lr_scheduler {
            Scheduler::Constant => ScheduleKind::Constant,
            Scheduler::Linear => ScheduleKind::Linear,
            Scheduler::Cosine => ScheduleKind::Cosine,
            Scheduler::WarmupStableDecay => {
                ScheduleKind::WarmupStableDecay { decay_steps: training.decay(total_steps) as usize }
            }
        };
        let schedule = Schedule {
            kind,
            total_steps: total_steps as usize,
            warmup_steps: training.warmup(total_steps) as usize,
            min_ratio: training.min_lr_ratio,
        };
        let no_decay = RegexSet::new(optimizer.no_decay)
            .map_err(|error| Problem::config("no_decay of the optimizer holds no regular expression").source(error))?;
        let plus = match &config.adapter {
            Some(AdapterConfig::Lora(LoraConfig { loraplus_lr_ratio: Some(ratio), loraplus_lr_embedding, .. })) => {
                Some((*ratio, loraplus_lr_embedding.unwrap_or(optimizer.learning_rate)))
            }
            _ => None,
        };
        let (learning_rate, plain) = (optimizer.learning_rate, optimizer.plain_learning_rate);
        let is_adamw = config.optimizer.low_rank().is_none();
        let weight_decay = optimizer.weight_decay;
        Ok(Self { schedule, learning_rate, plain, is_adamw, weight_decay, no_decay, plus })
    }

    /// The base learning rate at a step, counted from 0.
    pub fn base(&self, step: u64) -> f64 {
        self.learning_rate * self.schedule.factor(step as usize)
    }

    /// Rate and decay of one parameter. LoRA+ (arXiv 2402.12354): B, and vectors trained beside the adapter, learn at
    /// `ratio` times the rate; vectors are then not decayed.
    /// `is_managed`: a low-rank method has the parameter.
    pub fn rule(&self, name: &str, is_managed: bool, step: u64, gradient_scale: f64) -> StepRule {
        let factor = self.schedule.factor(step as usize);
        let is_embedding = name.starts_with("model.embed_tokens.delta");
        let is_vector = name.ends_with("norm.weight") || name.ends_with(".bias");
        let (rate, decays) = match self.plus {
            Some((_, embedding)) if is_embedding => (embedding, true),
            Some((ratio, _)) if name.ends_with(".delta.up") => (self.learning_rate * ratio, true),
            Some((ratio, _)) if is_vector => (self.learning_rate * ratio, false),
            _ if is_managed || (self.is_adamw && is_linear(name)) => (self.learning_rate, true),
            _ => (self.plain, true),
        };
        let weight_decay = if decays && !self.no_decay.is_match(name) { self.weight_decay } else { 0.0 };
        StepRule { learning_rate: rate * factor, weight_decay, gradient_scale }
    }
}

/// Whether a parameter belongs to a linear layer of a block: its weight, or an adapter's factor beside it.
fn is_linear(name: &str) -> bool {
    name.contains("_proj.") && !name.ends_with(".bias")
}

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
pub fn optimizer_step(
    decoder: &mut lowrank_models::Decoder,
    optimizer: &mut Optimizer,
    batches: &[Batch],
    plan: &StepPlan<'_>,
) -> StepReport {
    let mut accumulated = Accumulated::default();
    let managed: BTreeSet<String> = prepare(decoder, optimizer, batches, plan);
    let unscaled = |name: &str| (plan.rule)(name, managed.contains(name), 1.0);
    let mut loss = 0.0;
    let mut pass = Pass::new(decoder, plan.options);
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
        apply(decoder, &mut accumulated, optimizer, &|name| (plan.rule)(name, managed.contains(name), clip));
    }
    tell(decoder, optimizer.serving());
    StepReport { loss, grad_norm, applied, gradient_bytes }
}

/// Asks the optimiser what the backward passes shall hand over, and tells the linear layers. Returns the names of the
/// parameters that low-rank methods have.
fn prepare(
    decoder: &mut lowrank_models::Decoder,
    optimizer: &mut Optimizer,
    batches: &[Batch],
    plan: &StepPlan<'_>,
) -> BTreeSet<String> {
    // The head's gradient comes in chunks, each of which counts as a micro batch.
    let chunk = plan.options.head_chunk_tokens.max(1);
    let chunks: usize = batches.iter().map(|batch| batch.target_count().div_ceil(chunk)).sum();
    let passes = |name: &str| if name.starts_with("lm_head") { chunks } else { batches.len() };
    let gradients = optimizer.begin(plan.step, &passes);
    let managed = gradients.keys().cloned().collect();
    tell(decoder, gradients);
    managed
}

/// Tells the linear layers how they act and what they hand over, by name of the weight.
fn tell(decoder: &mut lowrank_models::Decoder, mut gradients: BTreeMap<String, Gradient>) {
    if gradients.is_empty() {
        return;
    }
    for_each_projection(decoder, |module, projection| {
        if let Some(gradient) = gradients.remove(&format!("{module}.weight")) {
            projection.gradient = gradient;
        }
    });
}

/// Puts every update that is still pending into its weight: the model is then its parameters alone.
pub fn settle(decoder: &mut lowrank_models::Decoder, optimizer: &mut Optimizer) {
    decoder.map_parameters(&mut |name, value| optimizer.settle(name, value));
    for_each_projection(decoder, |_, projection| projection.gradient = Gradient::Full);
}

/// A run between two steps.
pub struct Run<'a> {
    /// The configuration.
    pub config: &'a RunConfig,
    /// Its resolved text, stored in every checkpoint.
    pub config_text: String,
    /// Where everything is written.
    pub dir: RunDir,
    /// Model and tokenizer.
    pub session: Session,
    /// Training batches.
    pub loader: Loader,
    /// Held-out data.
    pub evaluation: Option<Evaluation>,
    /// Held-out questions for exact match.
    pub questions: Vec<Question>,
    /// Optimiser state.
    pub optimizer: Optimizer,
    /// Where the run stands.
    pub counters: Counters,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// The metrics file.
    pub metrics: MetricsLog,
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

impl Run<'_> {
    /// Trains to the end, to an early stop or to an interruption.
    ///
    /// # Errors
    /// A loss that is not finite under `on_non_finite = "stop"`; anything the disk refuses.
    pub fn train(&mut self) -> Result<Outcome, Problem> {
        let started = Instant::now();
        let rates = Rates::new(self.config, self.total_steps)?;
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
        self.record(&Line::Summary(self.summary(ended_by, started)), &progress)?;
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
        let batches = wanted.map(|_| self.loader.next_batch()).collect::<Result<Vec<Batch>, _>>()?;
        let targets: usize = batches.iter().map(Batch::target_count).sum();
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
        let report = optimizer_step(&mut self.session.decoder, &mut self.optimizer, &batches, &plan);
        if !report.applied {
            self.refuse_non_finite(&report, &batches)?;
        }
        let tokens: usize = batches.iter().map(Batch::token_count).sum();
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
                memory_bytes: process_memory().current_bytes,
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
        let vocab = self.session.decoder.config.vocab_size;
        self.config.training.head_chunk_tokens.unwrap_or_else(|| default_head_chunk(vocab))
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
    fn refuse_non_finite(&self, report: &StepReport, batches: &[Batch]) -> Result<(), Problem> {
        let step = self.counters.step + 1;
        let mut records: Vec<u64> = batches.iter().flat_map(|batch| batch.records.iter().copied()).collect();
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
        let (loss, tokens) = evaluate::loss(&self.session.decoder, evaluation, self.head_chunk_tokens(), |_, _| {});
        let answers = match self.config.evaluation.generate && !self.questions.is_empty() {
            true => Some(evaluate::exact_match(&self.session, &self.questions, &self.config.evaluation, |_, _| {})?),
            false => None,
        };
        self.counters.eval_loss = Some(Exact(loss));
        let exact_match = answers.as_ref().map(evaluate::Answers::exact_match);
        self.counters.exact_match = exact_match.map(Exact);
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
            perplexity: loss.exp(),
            tokens,
            exact_match,
            exact_match_samples: answers.map(|answers| answers.total),
            seconds: started.elapsed().as_secs_f64(),
        });
        self.record(&line, progress)
    }

    /// Writes a checkpoint, then deletes the oldest ones beyond the limit.
    fn save(&mut self) -> Result<(), Problem> {
        self.metrics.sync()?;
        let writer = self.dir.begin_checkpoint(self.counters.step)?;
        checkpoint::write(
            writer.path(),
            &self.session.decoder,
            self.session.adapter.as_ref(),
            &self.config.base_model,
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

    fn summary(&self, ended_by: &str, started: Instant) -> SummaryLine {
        let trained = parameters::trained(&self.session.decoder);
        let count = |dims: &[usize]| dims.iter().product::<usize>() as u64;
        SummaryLine {
            step: self.counters.step,
            ended_by: ended_by.to_owned(),
            train_loss: self.counters.train_loss.0,
            eval_loss: self.counters.eval_loss.map(|loss| loss.0),
            best_eval_loss: self.counters.best.map(|(loss, _)| loss.0),
            best_step: self.counters.best.map(|(_, step)| step),
            exact_match: self.counters.exact_match.map(|share| share.0),
            trainable_parameters: trained.iter().map(|(_, dims)| count(dims)).sum(),
            total_parameters: lowrank_models::save::parameter_count(&self.session.decoder) as u64,
            tokens: self.counters.tokens,
            peak_memory_bytes: process_memory().peak_bytes,
            wall_seconds: started.elapsed().as_secs_f64(),
        }
    }
}
