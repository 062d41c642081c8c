//! What training did to a model, in numbers: every linear layer before and after, and the activations between the blocks.
//!
//! The definitions are in [`lowrank_core::diagnostics`].

use burn::tensor::{Tensor, TensorData};
use lowrank_core::Projection;
use lowrank_core::diagnostics::{self as numbers, Decomposition, PowerLaw, View};
use lowrank_core::linalg::host;
use lowrank_models::network::{Network, integers};
use lowrank_models::{Batch, Decoder, Inputs};
use serde::Serialize;

use crate::error::Problem;

/// Share of a weight's entries in the principal and in the low-magnitude mask.
pub const MASK_SHARE: f64 = 0.3;
/// Relative change from which an entry counts as changed.
const ETA: f32 = 1e-3;
/// Singular values below this share of the largest are not counted in a rank.
const RANK_EPS: f64 = 1e-5;

/// A number of one model and of the other.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Pair<T> {
    /// Of the model that is compared with.
    pub before: T,
    /// Of the analysed one.
    pub after: T,
}

/// A linear layer before and after training. What is undefined (an update that is zero) is absent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerRow {
    /// Name of the module.
    pub module: String,
    /// `[d_in, d_out]`.
    pub dims: [usize; 2],
    /// `norm(dW) / norm(W)`.
    pub update_norm: f64,
    /// Singular values of dW above a hundred-thousandth of the largest.
    pub update_rank: usize,
    /// Effective rank of dW.
    pub update_effective_rank: Option<f64>,
    /// Stable rank of dW.
    pub update_stable_rank: Option<f64>,
    /// Effective rank of W.
    pub effective_rank: Pair<Option<f64>>,
    /// Stable rank of W.
    pub stable_rank: Pair<Option<f64>>,
    /// Drift of the singular values of W.
    pub spectrum_drift: Option<f64>,
    /// Largest angle between the leading directions of both, input side, in degrees.
    pub input_angle: Option<f64>,
    /// The same on the output side.
    pub output_angle: Option<f64>,
    /// Similarity of the leading subspace of dW with that of W, input side.
    pub update_in_input_space: Option<f64>,
    /// The same on the output side.
    pub update_in_output_space: Option<f64>,
    /// Share of the entries that change in bf16 which lie outside the principal ones; by chance 0.7.
    pub off_principal_share: Option<f64>,
    /// Share of them among the smallest 30 % of the weights; by chance 0.3.
    pub low_magnitude_share: Option<f64>,
    /// Entries that do not change by a thousandth.
    pub unchanged_share: Option<f64>,
}

/// The residual stream behind a block.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ActivationRow {
    /// Number of the block.
    pub block: usize,
    /// RankMe.
    pub rank_me: Pair<Option<f64>>,
    /// Participation ratio of the covariance.
    pub participation_ratio: Pair<Option<f64>>,
    /// alpha-ReQ.
    pub alpha: Pair<Option<f64>>,
    /// How well a power law fits.
    pub alpha_r_squared: Pair<Option<f64>>,
}

/// Everything that was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Analysis {
    /// What was analysed.
    pub of: String,
    /// What it was compared with.
    pub against: String,
    /// Directions that were compared.
    pub directions: usize,
    /// Linear layers in model order.
    pub layers: Vec<LayerRow>,
    /// Tokens of the activations.
    pub tokens: usize,
    /// Blocks in order; empty without data.
    pub activations: Vec<ActivationRow>,
}

/// The linear layers of a model with their names. Handles: nothing is copied.
pub fn projections(decoder: &Decoder) -> Vec<(String, Projection)> {
    let mut found = vec![];
    let mut add = |name: &str, projection: &mut Projection| found.push((name.to_owned(), projection.clone()));
    decoder.clone().for_each_projection(&mut add);
    found
}

/// The weight that acts, adapter included, row by row.
fn acting(projection: &Projection) -> Vec<f32> {
    let weight = projection.weight.values();
    host(match &projection.delta {
        Some(delta) => delta.merged(weight),
        None => weight,
    })
}

/// Both models' linear layers side by side.
///
/// # Errors
/// They have other layers, or layers of other sizes.
pub fn layers(
    before: &Decoder,
    after: &Decoder,
    directions: usize,
    mut done: impl FnMut(u64, u64),
) -> Result<Vec<LayerRow>, Problem> {
    let (before, after) = (projections(before), projections(after));
    check_same(&before, &after)?;
    let total = after.len() as u64;
    let mut rows = vec![];
    for ((name, old), (_, new)) in before.iter().zip(&after) {
        rows.extend(layer(name, old.dims(), &acting(old), &acting(new), directions));
        done(rows.len() as u64, total);
    }
    Ok(rows)
}

fn check_same(before: &[(String, Projection)], after: &[(String, Projection)]) -> Result<(), Problem> {
    let shown = |(name, projection): &(String, Projection)| format!("{name} {:?}", projection.dims());
    let differs = before.iter().zip(after).find(|(old, new)| shown(old) != shown(new));
    let what = match differs {
        Some((old, new)) => format!("one has {}, the other {}", shown(old), shown(new)),
        None if before.len() != after.len() => {
            format!("one has {} linear layers, the other {}", before.len(), after.len())
        }
        None => return Ok(()),
    };
    Err(Problem::config(format!("the two models do not match: {what}"))
        .hint("compare a run with its own base model, or two runs on the same base"))
}

/// One layer; `None` where the values do not fill the shape.
pub fn layer(name: &str, dims: [usize; 2], before: &[f32], after: &[f32], directions: usize) -> Option<LayerRow> {
    let [rows, cols] = dims;
    let update: Vec<f32> = before.iter().zip(after).map(|(old, new)| new - old).collect();
    let view = |values| View::new(values, rows, cols);
    let (old, new) = (view(before)?, view(after)?);
    let of = |view| Decomposition::of(view, directions);
    let (old_parts, new_parts, update_parts) = (of(old), of(new), of(view(&update)?));
    let norm = |values: &[f64]| values.iter().map(|s| s * s).sum::<f64>().sqrt();
    let widest = |angles: Vec<f64>| angles.into_iter().reduce(f64::max);
    let changed = numbers::bf16_mask(before, after);
    let principal = numbers::principal_entries(old, &old_parts, directions, MASK_SHARE);
    Some(LayerRow {
        module: name.to_owned(),
        dims,
        update_norm: norm(&update_parts.values) / norm(&old_parts.values).max(f64::MIN_POSITIVE),
        update_rank: numbers::numerical_rank(&update_parts.values, RANK_EPS),
        update_effective_rank: numbers::effective_rank(&update_parts.values),
        update_stable_rank: numbers::stable_rank(&update_parts.values),
        effective_rank: pair(&old_parts, &new_parts, |parts| numbers::effective_rank(&parts.values)),
        stable_rank: pair(&old_parts, &new_parts, |parts| numbers::stable_rank(&parts.values)),
        spectrum_drift: numbers::spectrum_drift(&old_parts.values, &new_parts.values),
        input_angle: widest(numbers::principal_angles(&old_parts.left, &new_parts.left)),
        output_angle: widest(numbers::principal_angles(&old_parts.right, &new_parts.right)),
        update_in_input_space: numbers::subspace_similarity(&old_parts.left, &update_parts.left),
        update_in_output_space: numbers::subspace_similarity(&old_parts.right, &update_parts.right),
        off_principal_share: numbers::off_principal_share(&principal, &changed),
        low_magnitude_share: numbers::overlap(&numbers::lowest(before, MASK_SHARE), &changed),
        unchanged_share: numbers::unchanged_share(before, after, ETA),
    })
}

fn pair<A, T>(before: &A, after: &A, of: impl Fn(&A) -> T) -> Pair<T> {
    Pair { before: of(before), after: of(after) }
}

/// What is measured of the activations behind one block.
struct Measured {
    rank_me: Option<f64>,
    participation_ratio: Option<f64>,
    power_law: Option<PowerLaw>,
}

fn measure(activations: &[f32], width: usize) -> Option<Measured> {
    let view = View::new(activations, activations.len() / width.max(1), width)?;
    let spectrum = numbers::covariance_spectrum(view);
    Some(Measured {
        rank_me: numbers::rank_me(&Decomposition::of(view, 0).values),
        participation_ratio: numbers::participation_ratio(&spectrum),
        power_law: numbers::alpha_req(&spectrum),
    })
}

/// Runs a model block by block over batches and measures the counted rows behind each block.
fn blocks(decoder: &Decoder, batches: &[Batch], mut done: impl FnMut()) -> Vec<Measured> {
    let device = Network::device(decoder);
    let mut streams: Vec<(Inputs, Tensor<2>, Vec<i32>)> = batches
        .iter()
        .map(|batch| {
            let inputs = decoder.inputs(batch);
            let hidden = decoder.run_stem(decoder.stem(), &inputs, false);
            (inputs, hidden, decoder.counted(batch))
        })
        .collect();
    let width = decoder.hidden_size();
    let mut measured = vec![];
    for (index, block) in decoder.blocks().iter().enumerate() {
        let mut values = vec![];
        for (inputs, hidden, rows) in &mut streams {
            let empty = Tensor::from_data(TensorData::new(vec![0.0f32], [1, 1]), &device);
            let x = std::mem::replace(hidden, empty);
            *hidden = decoder.run_block(index, block, x, inputs, false);
            values.extend(host(hidden.clone().select(0, integers(rows, &device))));
        }
        measured.extend(measure(&values, width));
        done();
    }
    measured
}

/// The activations of both models on the same batches.
pub fn activations(
    before: &Decoder,
    after: &Decoder,
    batches: &[Batch],
    mut done: impl FnMut(u64, u64),
) -> Vec<ActivationRow> {
    let total = 2 * before.blocks().len() as u64;
    let mut count = 0;
    let mut advance = || {
        count += 1;
        done(count, total);
    };
    let old = blocks(before, batches, &mut advance);
    let new = blocks(after, batches, &mut advance);
    let row = |(block, (old, new)): (usize, (&Measured, &Measured))| ActivationRow {
        block,
        rank_me: pair(old, new, |measured| measured.rank_me),
        participation_ratio: pair(old, new, |measured| measured.participation_ratio),
        alpha: pair(old, new, |measured| measured.power_law.map(|law| law.alpha)),
        alpha_r_squared: pair(old, new, |measured| measured.power_law.map(|law| law.r_squared)),
    };
    old.iter().zip(&new).enumerate().map(row).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use lowrank_core::random::Stream;

    fn normals(count: usize, name: &str) -> Vec<f32> {
        let stream = Stream::new(1, name);
        (0..count as u64).map(|i| 0.02 * stream.normal(i) as f32).collect()
    }

    /// An update of rank two: its rank is two, and it is no larger than it was made.
    #[test]
    fn an_update_of_rank_two_is_seen_as_one() {
        let (m, n) = (40, 24);
        let before = normals(m * n, "weight");
        let (a, b) = (normals(m * 2, "a"), normals(2 * n, "b"));
        let after: Vec<f32> = (0..m * n)
            .map(|i| before[i] + (0..2).map(|l| a[2 * (i / n) + l] * b[l * n + i % n]).sum::<f32>())
            .collect();
        let row = layer("w", [m, n], &before, &after, 2).unwrap();
        assert_eq!(row.update_rank, 2);
        let (stable, effective) = (row.update_stable_rank.unwrap(), row.update_effective_rank.unwrap());
        assert!(1.0 <= stable && stable <= effective && effective <= 2.001, "{row:?}");
        assert!(row.spectrum_drift.unwrap() <= row.update_norm, "Mirsky's bound: {row:?}");
        assert!((0.0..=1.0).contains(&row.off_principal_share.unwrap()));
    }

    #[test]
    fn a_layer_that_did_not_change_has_no_update() {
        let weight = normals(30 * 20, "weight");
        let row = layer("w", [30, 20], &weight, &weight, 4).unwrap();
        assert_eq!((row.update_norm, row.update_rank, row.update_effective_rank), (0.0, 0, None));
        assert_eq!((row.spectrum_drift, row.unchanged_share, row.off_principal_share), (Some(0.0), Some(1.0), None));
        assert!(row.input_angle.unwrap() < 1e-5 && row.output_angle.unwrap() < 1e-5);
        assert_eq!(row.effective_rank.before, row.effective_rank.after);
        assert_eq!(layer("w", [30, 21], &weight, &weight, 4), None);
    }
}
