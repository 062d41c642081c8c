//! Calibration of a repair, block by block: every block is measured on what the repaired blocks before it make of the samples.
//!
//! As in the code of EoRA, a block runs with its own weights while the inputs of its layers are measured, and once more with the
//! repaired ones to make the inputs of the next. Cost beside a pass over the whole model: a second forward, the repairs, and the
//! hidden states of all samples on the device, `4 d` bytes a token at most.

use std::collections::BTreeMap;

use burn::tensor::{Gradients, Tensor};
use lowrank_core::Projection;
use lowrank_core::calibration::{Moments, Sequences, Wanted};
use lowrank_core::optim::MatrixOptimizer as _;
use lowrank_core::projection::Gradient;
use lowrank_kernels as kernels;
use lowrank_models::network::{Network, NetworkBatch as _, integers};

use super::{Measured, Plan, share};
use crate::error::Problem;
use crate::progress::Phase;

/// Makes of a linear layer what the run will have in its place, given what was measured in its block.
pub type Repair<'a> = &'a dyn Fn(&str, &Projection, &Measured) -> Result<Projection, Problem>;

/// As [`super::measure_own`], with the blocks repaired one after the other. The model is left as it was.
pub(super) fn measure<M: Network>(
    model: &M,
    plan: &Plan<'_, M::Batch>,
    own: &BTreeMap<String, Wanted>,
    repair: Repair<'_>,
) -> Result<Measured, Problem> {
    let sequences = Sequences::default();
    let blocks = model.blocks().len();
    let phase = Phase::start(plan.style, format!("calibrating {blocks} blocks on {} batches", plan.batches.len()));
    let mut states: Vec<Tensor<2>> =
        plan.batches.iter().map(|batch| model.run_stem(model.stem(), &model.inputs(batch), false)).collect();
    let mut measured = Measured::new();
    for (index, block) in model.blocks().iter().enumerate() {
        let name = model.block_name(index);
        let (lifted, moments) = lifted::<M>(block, &name, own, &sequences);
        if !moments.is_empty() {
            for (batch, state) in plan.batches.iter().zip(&states) {
                let (rows, samples) = (plan.sequences)(batch);
                sequences.announce(rows, samples);
                let x = Tensor::from_inner(state.clone());
                let out = model.run_block(index, &lifted, x, &model.inputs(batch), false);
                observe(&M::projections(&lifted), &moments, &mut backward(out));
            }
        }
        let found = moments.into_iter().filter_map(|(part, moments)| Some((format!("{name}.{part}"), moments?)));
        let found: Measured = found.map(|(module, moments)| (module, moments.finish())).collect();
        let repaired = repaired::<M>(block, &name, &shared_in(plan.wanted, &name, &found), repair)?;
        measured.extend(found);
        for (batch, state) in plan.batches.iter().zip(&mut states) {
            *state = model.run_block(index, &repaired, state.clone(), &model.inputs(batch), false);
            if !crate::step::host(state.clone().sum().reshape([1])).iter().all(|sum| sum.is_finite()) {
                phase.finish();
                let what = format!("a hidden state of the records {:?} is not finite behind {name}", batch.records());
                return Err(Problem::run(what).hint("try dtype = \"f32\", or leave these records out"));
            }
        }
        phase.update(index as u64 + 1, blocks as u64);
    }
    measured.extend(head(model, plan, own, &states, &sequences));
    phase.finish();
    Ok(measured)
}

/// The moments of a segment's layers by their names within it; none for what is not measured.
type PartMoments = Vec<(String, Option<Moments>)>;

/// Gives the layers that are measured placeholders for their factors.
fn open(projections: Vec<(String, &mut Projection)>, names: &dyn Fn(&str) -> Option<Moments>) -> PartMoments {
    let opened = projections.into_iter().map(|(part, projection)| {
        let moments = names(&part);
        if moments.is_some() {
            projection.gradient = Gradient::factors();
            projection.lift_slots();
        }
        (part, moments)
    });
    let moments: PartMoments = opened.collect();
    if moments.iter().all(|(_, moments)| moments.is_none()) { vec![] } else { moments }
}

/// A block on the tape, and the moments of its layers; no moments where none is measured.
fn lifted<M: Network>(
    block: &M::Block,
    name: &str,
    own: &BTreeMap<String, Wanted>,
    sequences: &Sequences,
) -> (M::Block, PartMoments) {
    let mut lifted = burn::module::Module::train(block.clone());
    let names = |part: &str| own.get(&format!("{name}.{part}")).map(|wanted| Moments::new(*wanted, sequences));
    let moments = open(M::projections_mut(&mut lifted), &names);
    (lifted, moments)
}

/// Makes the layers hand over their inputs; gradients are of no interest.
fn backward<const D: usize>(out: Tensor<D>) -> Gradients {
    let zeros = Tensor::from_inner(out.clone().inner().zeros_like());
    kernels::backward_from(out, zeros)
}

fn observe(projections: &[(String, &Projection)], moments: &PartMoments, gradients: &mut Gradients) {
    for ((_, projection), (_, moments)) in projections.iter().zip(moments) {
        if let (Some(moments), Some((x, dy))) = (moments, projection.take_factors(gradients)) {
            moments.clone().observe(x, dy);
        }
    }
}

/// What was measured in a block, for every layer of it.
fn shared_in(wanted: &BTreeMap<String, Wanted>, name: &str, found: &Measured) -> Measured {
    let prefix = format!("{name}.");
    let inside = wanted.iter().filter(|(module, _)| module.starts_with(&prefix));
    share(&inside.map(|(module, wanted)| (module.clone(), *wanted)).collect(), found.clone())
}

fn repaired<M: Network>(
    block: &M::Block,
    name: &str,
    found: &Measured,
    repair: Repair<'_>,
) -> Result<M::Block, Problem> {
    let mut repaired = block.clone();
    for (part, projection) in M::projections_mut(&mut repaired) {
        *projection = repair(&format!("{name}.{part}"), projection, found)?;
    }
    Ok(repaired)
}

/// The layers of the head, behind the last block.
fn head<M: Network>(
    model: &M,
    plan: &Plan<'_, M::Batch>,
    own: &BTreeMap<String, Wanted>,
    states: &[Tensor<2>],
    sequences: &Sequences,
) -> Measured {
    let mut lifted = burn::module::Module::train(model.head());
    let names = |part: &str| own.get(part).map(|wanted| Moments::new(*wanted, sequences));
    let moments = open(M::head_projections_mut(&mut lifted), &names);
    if !moments.is_empty() {
        for (batch, state) in plan.batches.iter().zip(states) {
            for chunk in model.counted(batch).chunks(plan.options.head_chunk_tokens.max(1)) {
                let x = state.clone().select(0, integers(chunk, &model.device()));
                let losses = model.losses(&lifted, Tensor::from_inner(x), chunk, batch, false);
                observe(&M::head_projections(&lifted), &moments, &mut backward(losses));
            }
        }
    }
    moments.into_iter().filter_map(|(module, moments)| Some((module, moments?.finish()))).collect()
}
