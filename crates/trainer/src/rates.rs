//! Learning rate and weight decay of every parameter.

use std::collections::BTreeSet;

use lowrank_core::optim::adamw::StepRule;
use lowrank_core::optim::{Schedule, ScheduleKind};
use lowrank_models::{Network, parameters};
use regex::RegexSet;

use crate::config::{AdapterConfig, LoraConfig, RunConfig, Scheduler};
use crate::error::Problem;

/// Learning rate and decay of every parameter at any step.
pub struct Rates {
    schedule: Schedule,
    learning_rate: f64,
    /// Learning rate of parameters that a low-rank method does not manage, or that are outside the blocks' linear layers and
    /// the convolutions.
    plain: f64,
    /// No low-rank method: the linear layers are told by their names.
    is_adamw: bool,
    weight_decay: f64,
    no_decay: RegexSet,
    /// LoRA+: factor of B, and the learning rate of embedding factors.
    plus: Option<(f64, f64)>,
    kinds: Kinds,
}

/// What the parameters of a model are, by name: all that rates depend on.
#[derive(Clone, Debug, Default)]
pub struct Kinds {
    /// Linear layers of the blocks, and convolutions.
    pub linear: BTreeSet<String>,
    /// Parameters that are vectors: norms and biases.
    pub vectors: BTreeSet<String>,
    /// The module of the token embedding.
    pub embedding: Option<&'static str>,
}

impl Kinds {
    /// Those of a model.
    pub fn of<M: Network>(model: &mut M) -> Self {
        let embedding = model.embedding().map(|(name, _)| name);
        let mut kinds = Self { embedding, ..Self::default() };
        for (index, block) in model.blocks().iter().enumerate() {
            let layers =
                M::projections(block).into_iter().map(|(name, _)| format!("{}.{name}", model.block_name(index)));
            kinds.linear.extend(layers);
        }
        model.for_each_convolution(&mut |name, _| kinds.linear.extend([name.to_owned()]));
        parameters::visit(model, "", |entry| {
            if entry.dims.len() == 1 {
                kinds.vectors.insert(entry.name.to_owned());
            }
        });
        kinds
    }

    /// Whether a parameter belongs to a linear layer of a block or to a convolution: its weight, or an adapter's factor beside it.
    fn is_linear(&self, name: &str) -> bool {
        let module = name.split_once(".delta.").or(name.rsplit_once('.')).map_or(name, |(module, _)| module);
        self.linear.contains(module) && !name.ends_with(".bias")
    }

    /// Whether a parameter is an adapter's factor beside the token embedding.
    fn is_in_embedding_delta(&self, name: &str) -> bool {
        let rest = self.embedding.and_then(|module| name.strip_prefix(module));
        rest.is_some_and(|rest| rest.starts_with(".delta"))
    }
}

impl Rates {
    /// The rates of a run of `total_steps`.
    ///
    /// # Errors
    /// `no_decay` holds something that is no regular expression.
    pub fn new(config: &RunConfig, total_steps: u64, kinds: Kinds) -> Result<Self, Problem> {
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
        Ok(Self { schedule, learning_rate, plain, is_adamw, weight_decay, no_decay, plus, kinds })
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
        let is_embedding = self.kinds.is_in_embedding_delta(name);
        let is_vector = self.kinds.vectors.contains(name);
        let (rate, decays) = match self.plus {
            Some((_, embedding)) if is_embedding => (embedding, true),
            Some((ratio, _)) if name.ends_with(".delta.up") => (self.learning_rate * ratio, true),
            Some((ratio, _)) if is_vector => (self.learning_rate * ratio, false),
            _ if is_managed || (self.is_adamw && self.kinds.is_linear(name)) => (self.learning_rate, true),
            _ => (self.plain, true),
        };
        let weight_decay = if decays && !self.no_decay.is_match(name) { self.weight_decay } else { 0.0 };
        StepRule { learning_rate: rate * factor, weight_decay, gradient_scale }
    }
}
