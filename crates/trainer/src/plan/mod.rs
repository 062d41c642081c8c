//! How much memory a run will need, by category, before it is started: from its configuration and the model's `config.json`
//! alone.
//!
//! A training step is run without values: every buffer is a size with an owner ([`ledger`]), every operation makes the result
//! and keeps what the real one does ([`operations`], [`layers`]), the tape frees in the order of Burn's ([`tape`]), and the
//! step goes through the segments in the order of [`crate::step`] ([`pass`]). The peak is the moment of the most, not the sum of
//! the categories' own peaks: gradients grow while activations are freed. The first step, an ordinary one and each in which
//! a low-rank method chooses another subspace are run ([`matrices`]).
//!
//! Exact to the operation: weights, adapter, gradients, moments, bases, what the tape keeps, logits, gradients of activations.
//! Estimated: packing buffers of matrix products, faer's workspace in a host SVD, and on a graphics card the temporaries of
//! plain operations (attention there holds several score matrices) without what its allocator keeps in pools.
//! Left out: the program itself and its data ("process" in the table of `lowrank-train plan`), evaluation, which needs less
//! than training, and allocations of a few hundred bytes for each node of the tape. Rows are taken as full, so short batches
//! need less.
//!
//! `tests/plan.rs` compares the prediction with the allocations of real runs.

mod adapters;
pub mod advice;
mod block;
mod classifier;
mod encoder;
mod ends;
pub mod layers;
pub mod ledger;
pub mod matrices;
pub mod methods;
pub mod model;
pub mod operations;
mod optimizers;
pub mod pass;
mod refresh;
pub mod setup;
pub mod tape;

use lowrank_models::classifier::ClassifierConfig;
use lowrank_models::config::DecoderConfig;
use lowrank_models::network::head_chunk;
use serde::Serialize;

use crate::config::RunConfig;
use crate::error::Problem;
pub use ledger::{Category, Phase};
pub use operations::Machine;

/// The memory of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// Most bytes at any moment.
    pub peak_bytes: u64,
    /// What is done at that moment.
    pub peak_phase: Phase,
    /// By category, at that moment.
    pub categories: Vec<Share>,
    /// Most bytes in each phase of a step.
    pub phases: Vec<PhasePeak>,
    /// The weights of the base by the form they are stored in.
    pub storage: Vec<Storage>,
    /// Bytes between two steps: weights, adapter, state.
    pub resting_bytes: u64,
    /// Tokens of a micro batch, padding included.
    pub tokens: u64,
    /// Numbers that are trained.
    pub trainable_parameters: u64,
    /// Numbers in the model and the adapter.
    pub total_parameters: u64,
}

/// What a category takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Share {
    /// The category.
    pub category: Category,
    /// Its bytes.
    pub bytes: u64,
}

/// Weights of one form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Storage {
    /// `f32`, `16 bits`, or the bits of a value with its share of the scales.
    pub format: String,
    /// How many.
    pub values: u64,
    /// What they take.
    pub bytes: u64,
}

/// The peak of a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PhasePeak {
    /// The phase.
    pub phase: Phase,
    /// Most bytes in it.
    pub bytes: u64,
}

impl Plan {
    /// Bytes of a category at the peak.
    pub fn of(&self, category: Category) -> u64 {
        self.categories.iter().find(|share| share.category == category).map_or(0, |share| share.bytes)
    }

    /// `weights 10.0 MiB, activations 3.2 MiB`: the categories that are not empty.
    pub fn summary(&self) -> String {
        let shown = |share: &Share| format!("{} {}", share.category.name(), show(share.bytes));
        let shares: Vec<String> = self.categories.iter().filter(|share| share.bytes > 0).map(shown).collect();
        shares.join(", ")
    }
}

/// A model by its `config.json`.
#[derive(Clone, Copy, Debug)]
pub enum Subject<'a> {
    /// A causal language model.
    Decoder(&'a DecoderConfig),
    /// A classifier.
    Classifier {
        /// Its sizes.
        config: &'a ClassifierConfig,
        /// Parameters that its checkpoint does not have, which are trained beside an adapter.
        fresh: &'a [String],
    },
}

impl<'a> From<&'a DecoderConfig> for Subject<'a> {
    fn from(decoder: &'a DecoderConfig) -> Self {
        Self::Decoder(decoder)
    }
}

impl Subject<'_> {
    /// Rows of the head's chunk where the configuration names none.
    fn head_chunk(self) -> usize {
        head_chunk(match self {
            Self::Decoder(decoder) => decoder.vocab_size,
            Self::Classifier { config, .. } => {
                config.labels.len().max(config.encoder().map_or(0, |encoder| encoder.hidden_size))
            }
        })
    }
}

/// Predicts the memory of a training run of this configuration on a machine.
///
/// # Errors
/// A pattern that is no regular expression; an adapter folder that cannot be read; a model that is no transformer.
pub fn predict<'a>(config: &RunConfig, subject: impl Into<Subject<'a>>, machine: Machine) -> Result<Plan, Problem> {
    Ok(of(&setup::describe(config, subject, machine)?))
}

/// The plan of what was described.
pub fn of(setup: &pass::Setup) -> Plan {
    let needs = pass::run(setup);
    let parameters = setup.model.parameters();
    let values = |parameters: &[&model::Parameter]| parameters.iter().map(|parameter| parameter.values() as u64).sum();
    let trained: Vec<_> = parameters.iter().copied().filter(|parameter| parameter.trained).collect();
    let categories = Category::ALL.iter().zip(needs.peak);
    Plan {
        peak_bytes: needs.peak.iter().sum(),
        peak_phase: needs.phase,
        categories: categories.map(|(&category, bytes)| Share { category, bytes }).collect(),
        phases: needs.phases.into_iter().map(|(phase, bytes)| PhasePeak { phase, bytes }).collect(),
        storage: storage(&parameters),
        resting_bytes: needs.rest.iter().sum(),
        tokens: setup.shape.tokens() as u64,
        trainable_parameters: values(&trained),
        total_parameters: values(&parameters),
    }
}

fn storage(parameters: &[&model::Parameter]) -> Vec<Storage> {
    let mut found: Vec<Storage> = vec![];
    for parameter in parameters.iter().filter(|parameter| parameter.category == Category::Weights) {
        let (format, values, bytes) = (parameter.format.name(), parameter.values() as u64, parameter.bytes() as u64);
        match found.iter_mut().find(|storage| storage.format == format) {
            Some(storage) => (storage.values, storage.bytes) = (storage.values + values, storage.bytes + bytes),
            None => found.push(Storage { format, values, bytes }),
        }
    }
    found
}

/// The machine behind a device's description.
pub fn machine_of(description: &str) -> Machine {
    match description.starts_with("cpu") {
        true => Machine::Cpu { threads: rayon::current_num_threads() },
        false => Machine::Gpu,
    }
}

/// Bytes for people: `1.5 GiB`.
pub fn show(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["B", "KiB", "MiB", "GiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if unit == 0 {
        0
    } else if value < 10.0 {
        2
    } else {
        1
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
