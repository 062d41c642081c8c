//! One optimiser step: passes over its micro batches, norm, clipping, update.
//!
//! Loss and norm of a step are needed for the log, and to refuse what is not finite. On the CPU they are read at once, which costs
//! nothing. A graphics card would wait for the host in every step; there ([`Reading::Later`]) they stay on the device, clipping is a
//! product with a number that only the device knows, and the host reads all steps since the last time in one go: before a line
//! of the log, an evaluation or a checkpoint is made of them ([`read_all`]). The bytes that leave the device in between are none.
//!
//! A step that may have to be left out is decided on the host, in which the optimiser counts its steps: where the run goes on
//! after a loss that is not finite, and with a loss scale, one read of a few bytes follows every backward pass.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::{FloatDType, Tensor};
use lowrank_core::Delta;
use lowrank_core::optim::Optimizer;
use lowrank_core::optim::adamw::StepRule;
use lowrank_core::projection::Gradient;
use lowrank_kernels as kernels;
use lowrank_models::{Network, NetworkBatch};

use crate::step::{Accumulated, Losses, Pass, Rules, StepOptions, apply};

/// Added to a norm before it divides, as torch does.
const TINY: f64 = 1e-6;

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

/// When the host learns what a step measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reading {
    /// Before the update, which is left out where something is not finite.
    #[default]
    EveryStep,
    /// When it asks ([`read_all`]). Every update is made: a run must stop at the first step that was not finite, and keep nothing
    /// of what came after it.
    Later,
}

/// What a step measured.
#[derive(Clone, Debug)]
pub enum Measured {
    /// Known on the host.
    Read(StepReport),
    /// Still on the device.
    Unread(Box<Unread>),
}

/// Loss and gradient norm of a step on the device.
#[derive(Clone, Debug)]
pub struct Unread {
    /// `[2]`, f32.
    values: Tensor<1>,
    gradient_bytes: usize,
}

/// Reads what several steps measured, in one transfer.
pub fn read_all(unread: Vec<Unread>) -> Vec<StepReport> {
    if unread.is_empty() {
        return vec![];
    }
    let bytes: Vec<usize> = unread.iter().map(|step| step.gradient_bytes).collect();
    let values = crate::step::host(Tensor::cat(unread.into_iter().map(|step| step.values).collect(), 0));
    let report = |(values, &gradient_bytes): (&[f32], &usize)| {
        let (loss, grad_norm) = (f64::from(values[0]), f64::from(values[1]));
        StepReport { loss, grad_norm, applied: loss.is_finite() && grad_norm.is_finite(), gradient_bytes }
    };
    values.chunks_exact(2).zip(&bytes).map(report).collect()
}

/// One optimiser step over its micro batches, read at once. Without finite loss and gradient nothing is updated (an immediate
/// update is already made then; its run must stop).
pub fn optimizer_step<M: Network>(
    model: &mut M,
    optimizer: &mut Optimizer,
    batches: &[M::Batch],
    plan: &StepPlan<'_>,
) -> StepReport {
    match take_step(model, optimizer, batches, plan, 1.0, Reading::EveryStep) {
        Measured::Read(report) => report,
        Measured::Unread(unread) => read_all(vec![*unread]).remove(0),
    }
}

/// One optimiser step. The backward pass starts from `loss_scale` times the loss; norm and update are those of the loss.
pub fn take_step<M: Network>(
    model: &mut M,
    optimizer: &mut Optimizer,
    batches: &[M::Batch],
    plan: &StepPlan<'_>,
    loss_scale: f64,
    reading: Reading,
) -> Measured {
    let mut accumulated = Accumulated::default();
    let managed: BTreeSet<String> = prepare(model, optimizer, batches, plan);
    let rule = |name: &str, scale: f64| (plan.rule)(name, managed.contains(name), scale);
    let unscaled = |name: &str| rule(name, 1.0 / loss_scale);
    let mut pass = Pass::new(model, plan.options);
    let mut losses = vec![];
    for (index, batch) in batches.iter().enumerate() {
        let immediate: Option<Rules<'_>> = if plan.immediate { Some(&unscaled) } else { None };
        let (denominator, key) = (plan.denominators[index] / loss_scale, plan.first_key + index as u64);
        losses.push(pass.run(batch, denominator, key, &mut accumulated, optimizer, immediate));
    }
    let gradient_bytes = accumulated.peak_bytes;
    let losses = losses.into_iter().zip(plan.denominators.iter().copied());
    let measured = match reading {
        Reading::EveryStep => {
            let loss = losses.fold(0.0, |loss, (losses, denominator)| loss + losses.read() / denominator);
            let grad_norm = accumulated.norm(optimizer) / loss_scale;
            let applied = loss.is_finite() && grad_norm.is_finite();
            if applied {
                let limit = plan.max_grad_norm;
                let clip = if limit > 0.0 { (limit / (grad_norm + TINY)).min(1.0) } else { 1.0 };
                apply(model, &mut accumulated, optimizer, &|name| rule(name, clip / loss_scale));
                constrain(model);
            } else {
                optimizer.leave_out();
            }
            Measured::Read(StepReport { loss, grad_norm, applied, gradient_bytes })
        }
        Reading::Later => {
            let zero = || Tensor::<1>::zeros([1], &model.device());
            let loss = mean_loss(losses).unwrap_or_else(zero);
            let squares = accumulated.squares(optimizer);
            let norm = if squares.is_empty() { zero() } else { kernels::sum_all(squares).sum().sqrt() };
            let norm = norm * (1.0 / loss_scale);
            if plan.max_grad_norm > 0.0 {
                let clip = (norm.clone() + TINY).recip().mul_scalar(plan.max_grad_norm).clamp_max(1.0);
                optimizer.clip(clip);
            }
            apply(model, &mut accumulated, optimizer, &unscaled);
            constrain(model);
            let values = Tensor::cat(vec![loss, norm.cast(FloatDType::F32)], 0);
            Measured::Unread(Box::new(Unread { values, gradient_bytes }))
        }
    };
    tell(model, optimizer.serving());
    measured
}

/// The loss of a step on the device.
fn mean_loss(losses: impl Iterator<Item = (Losses, f64)>) -> Option<Tensor<1>> {
    losses.filter_map(|(losses, denominator)| Some(losses.sum()? / denominator)).reduce(|sum, part| sum + part)
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
