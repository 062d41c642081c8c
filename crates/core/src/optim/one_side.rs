//! What the methods that project one side share: sides, overlaps, the limiter of a norm's growth, the ratio of two norms.

use burn::tensor::Tensor;
use lowrank_kernels as kernels;

use super::subspace::{Basis, ProjType, Side};
use super::{State, StepRule};

/// Largest growth of a limited norm in one step.
const GROWTH: f64 = 1.01;

/// Added to norms before they divide.
const TINY: f64 = 1e-8;

/// The norm-growth limiter: a sequence of updates whose norm grows by at most 1 % a step.
#[derive(Clone, Debug, Default)]
pub(super) struct Limiter {
    /// Norm of the last update after limiting, `[1, 1]` on the device: reading it every step would stall a GPU.
    previous: Option<Tensor<2>>,
}

impl Limiter {
    /// The update, shrunk where it is too long.
    pub(super) fn apply(&mut self, update: Tensor<2>) -> Tensor<2> {
        let norm: Tensor<2> = kernels::sum_squares(update.clone()).sqrt().reshape([1, 1]);
        let Some(previous) = self.previous.take() else {
            self.previous = Some(norm);
            return update;
        };
        let is_unset = previous.clone().equal_scalar(0.0f32);
        let growth = (norm.clone() / (previous + TINY)).clamp_min(GROWTH);
        let shrink = (growth / GROWTH).mask_fill(is_unset, 1.0f32);
        self.previous = Some(norm / shrink.clone());
        update / shrink
    }

    pub(super) fn save(&self, state: &mut State) {
        if let Some(previous) = &self.previous {
            state.tensors.insert("limiter".to_owned(), previous.clone());
        }
    }

    pub(super) fn restore(&mut self, state: &mut State) -> Result<(), String> {
        self.previous = state.optional_tensor("limiter", [1, 1])?;
        Ok(())
    }

    pub(super) fn bytes(&self) -> usize {
        4 * usize::from(self.previous.is_some())
    }
}

/// Squared norms of the projected and the whole gradient of the last step, read only when somebody asks.
#[derive(Clone, Debug)]
pub(super) struct Energy {
    low: Tensor<1>,
    whole: Tensor<1>,
}

impl Energy {
    pub(super) fn of(low: &Tensor<2>, whole: &Tensor<2>) -> Self {
        Self { low: kernels::sum_squares(low.clone()), whole: kernels::sum_squares(whole.clone()) }
    }

    /// `||R||^2 / ||G||^2`.
    pub(super) fn share(&self) -> f64 {
        scalar(&self.low) / scalar(&self.whole).max(f64::MIN_POSITIVE)
    }
}

/// The side of a method that projects one side only.
pub(super) fn one_side(proj_type: ProjType, [m, n]: [usize; 2], rank: usize) -> Side {
    match proj_type.side(m, n, rank, 0) {
        Side::Both => ProjType::Std.side(m, n, rank, 0),
        side => side,
    }
}

/// Which axis of R has length r.
pub(super) fn rank_axis(side: Side) -> usize {
    usize::from(side == Side::Output)
}

/// Length of the dimension that is projected.
pub(super) fn projected_size(side: Side, dims: [usize; 2]) -> usize {
    dims[rank_axis(side)]
}

/// Directions in columns as a basis of one side.
pub(super) fn basis_on(side: Side, directions: Tensor<2>) -> Basis {
    match side {
        Side::Output => Basis { left: None, right: Some(directions) },
        _ => Basis { left: Some(directions), right: None },
    }
}

/// The directions of a basis of one side.
pub(super) fn directions(basis: &Basis) -> Option<&Tensor<2>> {
    basis.left.as_ref().or(basis.right.as_ref())
}

/// `r ||P_new^T P_old||^2 / (||P_new||^2 ||P_old||^2)`: for orthonormal bases the mean squared cosine, `||.||^2 / r`.
pub(super) fn overlap(new: &Basis, old: &Basis) -> Option<Tensor<1>> {
    let (new, old) = (directions(new)?.clone(), directions(old)?.clone());
    let rank = new.dims()[1] as f64;
    let common = kernels::gemm(new.clone().transpose(), old.clone(), None, 1.0);
    Some(kernels::sum_squares(common) * rank / (kernels::sum_squares(new) * kernels::sum_squares(old)))
}

/// `||N_j|| / (||R_j|| + 1e-8)` along an axis: how far Adam steps for one unit of gradient.
pub(super) fn ratio(normed: &Tensor<2>, low: &Tensor<2>, axis: usize) -> Tensor<2> {
    let norms = |values: &Tensor<2>| values.clone().square().sum_dim(axis).sqrt();
    norms(normed) / (norms(low) + TINY)
}

/// `sqrt(1 - b2^t) / (1 - b1^t)`, the factor of the learning rate in the published form of Adam.
pub(super) fn correction(betas: (f64, f64), step: u64) -> f64 {
    let step = step.min(i32::MAX as u64) as i32;
    (1.0 - betas.1.powi(step)).sqrt() / (1.0 - betas.0.powi(step))
}

/// `factor x`.
pub(super) fn scaled(x: Tensor<2>, factor: f64) -> Tensor<2> {
    if factor == 1.0 { x } else { x * factor }
}

/// `(1 - lr decay) W`.
pub(super) fn decayed(weight: Tensor<2>, rule: StepRule) -> Tensor<2> {
    scaled(weight, 1.0 - rule.learning_rate * rule.weight_decay)
}

/// The value of a `[1]` tensor.
pub(super) fn scalar(tensor: &Tensor<1>) -> f64 {
    f64::from(tensor.clone().into_scalar::<f32>())
}
