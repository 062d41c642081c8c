//! What holds the memory of a run, and what is said when there is none left. [`crate::memory`] reads how much it is.
//!
//! | device | when an allocation fails |
//! | --- | --- |
//! | graphics card | the tensor carries the error to the first read of anything computed from it, which panics |
//! | CPU | the system ends the process: a prediction that does not fit is told at the start |
//!
//! [`catch`] stands around every part of a run that may touch the device. Where a panic under it means that memory has run out,
//! the run ends with an error that names what holds the memory and what to change. Nothing is written after such an error,
//! so the last checkpoint stays good.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{LazyLock, Mutex, PoisonError};

use lowrank_core::optim::Optimizer;
use lowrank_models::{Network, parameters};
use regex::Regex;

use crate::plan::advice::Suggestion;
use crate::plan::{Category, Plan, show};

/// What a run holds between two steps, by shape and type.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Weights of the base model.
    pub weights: u64,
    /// Parameters of the adapter.
    pub adapter: u64,
    /// Moments, bases, and what else the optimiser keeps.
    pub optimizer: u64,
}

impl Held {
    /// Adds up what there is. Nothing is read from the device.
    pub fn by<M: Network>(model: &mut M, optimizer: &Optimizer) -> Self {
        let mut held = Self { optimizer: optimizer.state_bytes() as u64, ..Self::default() };
        parameters::visit(model, "", |entry| {
            let value = (entry.value)();
            let bytes = (value.shape().num_elements() * value.dtype().size()) as u64;
            match entry.name.contains(".delta.") {
                true => held.adapter += bytes,
                false => held.weights += bytes,
            }
        });
        model.for_each_projection(&mut |_, projection| {
            if projection.weight.is_quantised() {
                held.weights += projection.weight.bytes() as u64;
            }
        });
        held
    }
}

/// Measured bytes by category, as far as they can be told apart: all that comes and goes within a step is one.
pub fn measured(held: &Held, gradients: u64, peak: u64) -> BTreeMap<String, u64> {
    let known = held.weights + held.adapter + held.optimizer + gradients;
    let rows = [
        ("weights", held.weights),
        ("adapter", held.adapter),
        ("gradients", gradients),
        ("optimizer", held.optimizer),
        ("temporary", peak.saturating_sub(known)),
    ];
    rows.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect()
}

/// A prediction by the same categories. Its moment of the most is not that of each category.
pub fn predicted(plan: &Plan) -> BTreeMap<String, u64> {
    let of = |categories: &[Category]| categories.iter().map(|&category| plan.of(category)).sum::<u64>();
    let rows = [
        ("weights", of(&[Category::Weights])),
        ("adapter", of(&[Category::Adapter])),
        ("gradients", of(&[Category::Gradients])),
        ("optimizer", of(&[Category::Optimizer, Category::Projector])),
        ("temporary", of(&[Category::Activations, Category::Logits, Category::Workspace])),
    ];
    rows.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect()
}

/// `weights 10.0 MiB (predicted 10.0 MiB), ...`: the categories that are not empty.
pub fn comparison(measured: &BTreeMap<String, u64>, predicted: Option<&BTreeMap<String, u64>>) -> String {
    let shown = |name: &str| {
        let bytes = measured.get(name).copied().unwrap_or(0);
        let expected = predicted.and_then(|predicted| predicted.get(name)).copied();
        let expected_text = expected.map_or(String::new(), |bytes| format!(" (predicted {})", show(bytes)));
        (bytes > 0 || expected.unwrap_or(0) > 0).then(|| format!("{name} {}{expected_text}", show(bytes)))
    };
    let rows = ["weights", "adapter", "gradients", "optimizer", "temporary"];
    rows.into_iter().filter_map(shown).collect::<Vec<_>>().join(", ")
}

/// Memory has run out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// Size of the buffer that could not be had, where it is known.
    pub bytes: Option<u64>,
}

/// The last shortage that any thread panicked with: a graphics API reports it on a thread of its own.
static SEEN: Mutex<Option<Shortage>> = Mutex::new(None);

/// Whether a message of CubeCL, wgpu or a driver says that there is no memory left.
pub fn shortage(message: &str) -> Option<Shortage> {
    static WORDS: LazyLock<Option<Regex>> = LazyLock::new(|| {
        Regex::new(r"(?i)out[ -]of[ -](device[ -])?memory|OUT_OF_(DEVICE_|HOST_)?MEMORY|can't allocate buffer of size")
            .ok()
    });
    static SIZE: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"allocating (\d+) bytes|buffer of size: (\d+)|allocation of (\d+) bytes").ok());
    WORDS.as_ref().filter(|words| words.is_match(message))?;
    let found = SIZE.as_ref().and_then(|size| size.captures(message));
    let number = found.and_then(|found| (1..=3).find_map(|group| found.get(group)?.as_str().parse().ok()));
    Some(Shortage { bytes: number })
}

/// The text of a panic.
fn text(payload: &(dyn std::any::Any + Send)) -> &str {
    match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "",
    }
}

/// From now on a panic for want of memory is noted and not printed: [`catch`] turns it into an error. All others are printed as
/// before.
pub fn quiet_shortages() {
    let printing = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| match shortage(text(info.payload())) {
        Some(found) => *SEEN.lock().unwrap_or_else(PoisonError::into_inner) = Some(found),
        // What follows from a shortage on another thread is caught as well.
        None if SEEN.lock().unwrap_or_else(PoisonError::into_inner).is_some() => {}
        None => printing(info),
    }));
}

/// Runs a part of a run. A panic for want of memory becomes an error, any other goes on.
///
/// # Errors
/// Memory has run out; what the part changed is not to be used any more.
pub fn catch<R>(part: impl FnOnce() -> R) -> Result<R, Shortage> {
    catch_unwind(AssertUnwindSafe(part)).map_err(|payload| {
        let elsewhere = || SEEN.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match shortage(text(payload.as_ref())).or_else(elsewhere) {
            Some(shortage) => shortage,
            None => resume_unwind(payload),
        }
    })
}

/// What the run was doing when memory ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// Loading the model, attaching the adapter.
    Loading,
    /// A training step, by its number from 1.
    Step(u64),
    /// An evaluation.
    Evaluation,
    /// Writing a checkpoint or the result.
    Saving,
}

/// The sentence of the error.
pub fn message(device: &str, doing: Doing, shortage: &Shortage, blame: &str) -> String {
    let during = match doing {
        Doing::Loading => "while the model was loaded".to_owned(),
        Doing::Step(step) => format!("in step {step} or in one before it that was not read yet"),
        Doing::Evaluation => "in an evaluation".to_owned(),
        Doing::Saving => "while a checkpoint was written".to_owned(),
    };
    let wanted = match shortage.bytes {
        Some(bytes) => format!("a buffer of {} could not be had", show(bytes)),
        None => "a buffer could not be had".to_owned(),
    };
    format!("device {device} is out of memory {during}: {wanted}; {blame}")
}

/// What to change: the best of what a plan suggests.
pub fn hint(savings: &[Suggestion]) -> String {
    const SHOWN: usize = 3;
    if savings.is_empty() {
        return "use a smaller training.micro_batch_size, data.max_seq_length or training.head_chunk_tokens, or \
                training.gradient_checkpointing = \"block\"; lowrank-train plan --config FILE shows what a run needs"
            .to_owned();
    }
    let shown = savings.iter().take(SHOWN).map(|saving| {
        let sets: Vec<String> = saving.set.iter().map(|key| format!("--set '{key}'")).collect();
        format!("{} (saves {}: {})", sets.join(" "), show(saving.saves_bytes), saving.cost)
    });
    let list = shown.collect::<Vec<_>>().join("; or ");
    format!("{list}; lowrank-train plan --config FILE shows what a run needs")
}

/// What holds the memory, for the message: the category that is largest where it does not fit.
pub fn blame(doing: Doing, held: &Held, in_use: u64, plan: Option<&Plan>) -> String {
    // Weights that are not all there are the ones that did not fit.
    if doing == Doing::Loading || in_use < held.weights {
        return format!("the weights alone are {}", show(held.weights));
    }
    let Some(plan) = plan else {
        let known = format!(
            "weights {}, adapter {}, optimizer {}",
            show(held.weights),
            show(held.adapter),
            show(held.optimizer)
        );
        return format!("{known} are held between steps; the rest is activations and gradients");
    };
    let comes_and_goes = Category::ALL.iter().filter(|category| **category != Category::Weights);
    let largest = comes_and_goes.max_by_key(|category| plan.of(**category)).map_or("activations", |c| c.name());
    format!(
        "beside the weights most of it is {largest}: predicted are {} in all ({})",
        show(plan.peak_bytes),
        plan.summary()
    )
}

#[cfg(test)]
#[path = "shortage_tests.rs"]
mod tests;
