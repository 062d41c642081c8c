//! A calibration pass: the first samples of some data run through the base model before an adapter is attached.
//!
//! Some adapters start from what their data does to a layer: CorDA and EoRA from the second moment of its inputs, LoRA-SB from
//! the gradient of its weight. [`measure`] runs forward and backward as a training step does ([`crate::step`]), with an optimiser
//! that looks at every target's x and dy and never steps ([`Moments`]); [`measure_cached`] keeps the result on disk.
//!
//! A repair (EoRA) is measured block by block behind repaired blocks instead, where the plan has one ([`Repair`]).
//!
//! A batch's loss is the mean over its counted tokens, divided by its number of samples, as LoRA-SB's code has it; only the sign
//! of the summed gradient matters there. Layers that read the same input (q, k and v; gate and up) share one second moment.
//!
//! Cost beside forward and backward over t tokens: `2 t d_in^2` flops and `d_in^2` f32 values for each distinct input,
//! `2 t d_in d_out` and `d_in d_out` for each gradient, all on the device.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use burn::module::Module as _;
use lowrank_core::Base;
use lowrank_core::adapters::Statistics;
use lowrank_core::calibration::{Covariance, Moments, Sequences, Wanted};
use lowrank_core::optim::{AdamWConfig, Optimizer};
use lowrank_core::projection::Gradient;
use lowrank_models::{Batch, Network, NetworkBatch};

use crate::config::{CalibrationConfig, ProgressStyle};
use crate::data::{DataError, Loader, LoaderConfig, TrainingData};
use crate::error::Problem;
use crate::progress::Phase;
use crate::step::{Accumulated, Pass, StepOptions};

mod cache;
mod in_order;
#[cfg(test)]
mod tests;

pub use cache::{Identity, hash_model, measure_cached};
pub use in_order::Repair;

/// What was measured, by module.
pub type Measured = BTreeMap<String, Statistics>;

/// A pass to be made.
pub struct Plan<'a, B> {
    /// What is measured at which module.
    pub wanted: &'a BTreeMap<String, Wanted>,
    /// What is run.
    pub batches: &'a [B],
    /// Rows of a batch's hidden states, and which of them are the tokens of each sample, without padding.
    pub sequences: &'a dyn Fn(&B) -> (usize, Vec<Range<usize>>),
    /// How the passes are made.
    pub options: StepOptions,
    /// What takes the place of a layer once its block was measured, where the blocks are measured one after the other.
    pub repair: Option<Repair<'a>>,
    /// How progress is shown.
    pub style: ProgressStyle,
}

/// The first samples of a run's data, one to a row and in the order of the data; of streamed data, the first rows.
///
/// # Errors
/// A size is 0; streamed data cannot be read.
pub fn first_batches(
    data: &TrainingData,
    loading: &LoaderConfig,
    config: &CalibrationConfig,
) -> Result<Vec<Batch>, DataError> {
    let loading = LoaderConfig {
        micro_batch_size: config.batch_size,
        packing: matches!(data, TrainingData::Streamed(_)),
        shuffle: false,
        pad_to_multiple_of: 1,
        ..loading.clone()
    };
    let mut loader = Loader::open(data, loading, None)?;
    let most = loader.batches_per_epoch(0).unwrap_or(usize::MAX);
    let (mut batches, mut left) = (vec![], config.samples);
    while left > 0 && batches.len() < most {
        let batch = first_rows(loader.next_batch()?, left);
        left -= batch.rows;
        batches.push(batch);
    }
    Ok(batches)
}

/// The first rows of a batch.
fn first_rows(mut batch: Batch, rows: usize) -> Batch {
    batch.rows = batch.rows.min(rows);
    let size = batch.rows * batch.cols;
    for values in [&mut batch.input_ids, &mut batch.targets, &mut batch.positions, &mut batch.first_key] {
        values.truncate(size);
    }
    batch
}

/// The rows of a decoder's batch of one sample a row: padding, which has position 0, is at the right.
pub fn decoder_sequences(batch: &Batch) -> (usize, Vec<Range<usize>>) {
    let length = |row: usize| {
        let positions = &batch.positions[row * batch.cols..][..batch.cols];
        positions.iter().rposition(|&position| position != 0).map_or(1.min(batch.cols), |last| last + 1)
    };
    let sequences = (0..batch.rows).map(|row| row * batch.cols..row * batch.cols + length(row));
    (batch.rows * batch.cols, sequences.collect())
}

/// The last part of names whose modules read one input.
const SHARED_INPUTS: &[&[&str]] =
    &[&["q_proj", "k_proj", "v_proj"], &["query", "key", "value"], &["gate_proj", "up_proj"]];

/// For every module whose second moment is wanted, the one that measures it.
fn leaders(wanted: &BTreeMap<String, Wanted>) -> BTreeMap<&str, &str> {
    let mut first: BTreeMap<(&str, Option<usize>, &str), &str> = BTreeMap::new();
    let mut leaders = BTreeMap::new();
    for (module, wanted) in wanted {
        let Some(kind) = wanted.covariance else { continue };
        let (place, name) = module.rsplit_once('.').unwrap_or(("", module));
        let group = SHARED_INPUTS.iter().position(|names| names.contains(&name));
        let kind = if kind == Covariance::Sum { "sum" } else { "mean" };
        let key = (if group.is_some() { place } else { module.as_str() }, group, kind);
        leaders.insert(module.as_str(), *first.entry(key).or_insert(module));
    }
    leaders
}

/// What each module measures itself; none of the sums of another.
fn own(wanted: &BTreeMap<String, Wanted>) -> BTreeMap<String, Wanted> {
    let leaders = leaders(wanted);
    let own = wanted.iter().map(|(module, wanted)| {
        let leads = leaders.get(module.as_str()).is_some_and(|leader| *leader == module);
        (module.clone(), Wanted { covariance: wanted.covariance.filter(|_| leads), ..*wanted })
    });
    own.filter(|(_, wanted)| *wanted != Wanted::default()).collect()
}

/// Gives every module the second moment that another one measured for it.
fn share(wanted: &BTreeMap<String, Wanted>, mut measured: Measured) -> Measured {
    for (module, leader) in leaders(wanted) {
        if module != leader
            && let Some(found) = measured.get(leader).cloned()
        {
            let entry = measured.entry(module.to_owned()).or_default();
            (entry.covariance, entry.samples) = (found.covariance, found.samples);
        }
    }
    measured
}

/// Runs the batches through the model and returns what was measured. The model, whose adapters are not attached yet, is left as
/// it was.
///
/// # Errors
/// A wanted module that the model does not have, or that has an adapter or no dense weight; a loss that is not finite.
pub fn measure<M: Network>(model: &mut M, plan: &Plan<'_, M::Batch>) -> Result<Measured, Problem> {
    Ok(share(plan.wanted, measure_own(model, plan, &own(plan.wanted))?))
}

fn measure_own<M: Network>(
    model: &mut M,
    plan: &Plan<'_, M::Batch>,
    wanted: &BTreeMap<String, Wanted>,
) -> Result<Measured, Problem> {
    if let Some(repair) = plan.repair {
        let trained = open_targets(model, wanted)?; // refuses what cannot be measured
        close_targets(model, &trained);
        return in_order::measure(model, plan, wanted, repair);
    }
    let sequences = Sequences::default();
    let moments: BTreeMap<&str, Moments> =
        wanted.iter().map(|(module, wanted)| (module.as_str(), Moments::new(*wanted, &sequences))).collect();
    let mut optimizer = Optimizer::adamw(AdamWConfig::default());
    for (module, moments) in &moments {
        optimizer.manage(&format!("{module}.weight"), Box::new(moments.clone()));
    }
    let trained = open_targets(model, wanted)?;
    let outcome = run(model, plan, &mut optimizer, &sequences);
    close_targets(model, &trained);
    outcome?;
    Ok(moments.into_iter().map(|(module, moments)| (module.to_owned(), moments.finish())).collect())
}

/// Makes the wanted layers hand over their factors. Returns whether their weights were trained before.
fn open_targets<M: Network>(
    model: &mut M,
    wanted: &BTreeMap<String, Wanted>,
) -> Result<BTreeMap<String, bool>, Problem> {
    let (mut found, mut unfit) = (BTreeMap::new(), vec![]);
    model.for_each_projection(&mut |module, projection| {
        if !wanted.contains_key(module) {
            return;
        }
        let dense = if let Base::Dense(weight) = &projection.weight { Some(weight.clone()) } else { None };
        match dense {
            Some(weight) if projection.delta.is_none() => {
                found.insert(module.to_owned(), weight.clone().train().is_require_grad());
                // A layer counts as trained where its weight is; as it hands over factors, no gradient of it is formed.
                projection.weight = Base::Dense(weight.set_require_grad(true));
                projection.gradient = Gradient::factors();
            }
            _ => unfit.push(module.to_owned()),
        }
    });
    let missing: Vec<&String> = wanted.keys().filter(|module| !found.contains_key(*module)).collect();
    if missing.is_empty() {
        return Ok(found);
    }
    close_targets(model, &found);
    let list = missing.iter().map(|module| module.as_str()).collect::<Vec<_>>().join(", ");
    let problem = Problem::run(format!("calibration cannot measure {list}"));
    Err(match unfit.is_empty() {
        true => problem.hint("the model has no linear layers of these names"),
        false => problem.hint("it measures dense layers before an adapter is attached"),
    })
}

fn close_targets<M: Network>(model: &mut M, trained: &BTreeMap<String, bool>) {
    model.for_each_projection(&mut |module, projection| {
        if let (Some(trained), Base::Dense(weight)) = (trained.get(module), &projection.weight) {
            projection.weight = Base::Dense(weight.clone().set_require_grad(*trained));
            projection.gradient = Gradient::Full;
        }
    });
}

fn run<M: Network>(
    model: &mut M,
    plan: &Plan<'_, M::Batch>,
    optimizer: &mut Optimizer,
    sequences: &Sequences,
) -> Result<(), Problem> {
    let total = plan.batches.len() as u64;
    let phase = Phase::start(plan.style, format!("calibrating on {total} batches"));
    let mut pass = Pass::new(model, plan.options);
    for (index, batch) in plan.batches.iter().enumerate() {
        let (rows, samples) = (plan.sequences)(batch);
        let denominator = (batch.target_count().max(1) * samples.len().max(1)) as f64;
        sequences.announce(rows, samples);
        // What the layers hand over is looked at and dropped: nothing accumulates but the sums.
        let loss = pass.run(batch, denominator, index as u64, &mut Accumulated::default(), optimizer, None).read();
        if !loss.is_finite() {
            phase.finish();
            let what = format!("the loss of calibration batch {index} (records {:?}) is {loss}", batch.records());
            return Err(Problem::run(what).hint("try dtype = \"f32\", or leave these records out"));
        }
        phase.update(index as u64 + 1, total);
    }
    phase.finish();
    Ok(())
}

/// The folder that keeps what was measured, beside the tokens.
pub fn default_cache_folder() -> Option<std::path::PathBuf> {
    crate::data::default_cache_folder().as_deref().and_then(Path::parent).map(|base| base.join("calibration"))
}
