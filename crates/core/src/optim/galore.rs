//! GaLore: full-weight training with low-rank gradients (arXiv 2403.03507), published and projected.
//!
//! For a matrix `W [m, n]` with gradient `G = x^T dy`, a basis P of r directions (or Q, or both; [`super::subspace`]), a rule on
//! the projected gradient ([`super::rules`]) and a scale:
//!
//! ```text
//! every gap steps: P = leading left singular vectors of G
//! R = P^T G                              [r, n]
//! N = rule(R)                            Adam on R; M, V have the shape of R
//! W = (1 - lr decay) (W - scale P N)
//! ```
//!
//! `exact = true` is that algorithm to the letter: G is formed, its SVD is exact. Otherwise the backward pass forms
//! `R = (x P)^T dy` itself ([`kernels::projected_linear`]) and G never exists:
//!
//! * a refresh finds the basis from the factors x and dy by a randomised range finder ([`crate::linalg::range_finder`]), which
//!   starts from the momentum, the smoothed memory of the old subspace, and from fresh Gaussian columns;
//! * with several micro batches the basis of the next step comes from a sketch of the summed gradient (`lagged`), or from the
//!   first micro batch, or from the dense gradient of that one step;
//! * with `merge = deferred` the layer acts as `c W + P B` between refreshes: updates go to B in f32, decay to B and c, and W,
//!   which may have 16 bits, is written once per refresh. The trajectory is the same;
//! * the norm of G for clipping is estimated without bias: s extra columns of the basis, Gaussian and orthogonal to P, collect
//!   a sketch of the rest, and `E ||[P | S]^T G||^2 = ||G||^2`. `clip = exact` computes it from `x x^T` and `dy dy^T`.
//!
//! | | full Adam | GaLore | here |
//! | --- | --- | --- | --- |
//! | flops of the weight gradient, t tokens | `2 t m n` | `2 t m n + 2 m n r` | `2 t r (m + n)` |
//! | gradient | `m n` | `m n` | `r n` or `m r` |
//! | state, input side | `2 m n` | `m r + 2 r n` | `m r + 2 r n` |
//!
//! Every step adds `2 m n r` for the update itself.

use burn::tensor::{FloatDType, Tensor};
use lowrank_kernels::packed::Order;
use lowrank_kernels::{self as kernels, Weight};

use super::one_side::scalar;
use super::q_galore::{self, LazyGap};
use super::rules::Rule;
use super::subspace::{Basis, Side};
use super::{MatrixOptimizer, Report, State, StepRule};
use crate::directions::Directions;
use crate::projection::Gradient;

mod config;
mod refresh;

pub use config::{Accumulation, GaloreConfig, Merge, Moments, Norm};
use refresh::Plan;

/// Updates that are not yet in the weight: the layer acts as `keep W + P up`.
#[derive(Clone, Debug)]
struct Pending {
    up: Tensor<2>,
    keep: f64,
}

impl Pending {
    /// The weight with these updates.
    fn merge(&self, weight: Tensor<2>, left: &Tensor<2>) -> Tensor<2> {
        let weight = if self.keep == 1.0 { weight } else { weight * self.keep };
        kernels::gemm(left.clone(), self.up.clone(), Some(weight), 1.0)
    }
}

/// GaLore on one matrix.
#[derive(Debug)]
pub struct Galore {
    config: GaloreConfig,
    name: String,
    seed: u64,
    dims: [usize; 2],
    rank: usize,
    side: Side,
    /// Added to the step before it is compared with the gap, so that matrices refresh at different steps.
    offset: u64,
    rule: Box<dyn Rule>,
    /// P and Q: the basis, then the columns of the norm's sketch.
    collected: Option<[Option<Directions>; 2]>,
    /// Steps done.
    step: u64,
    refreshes: u64,
    lazy: Option<LazyGap>,
    plan: Plan,
    is_chosen: bool,
    /// Start block and sum of the lagged sketch of each side.
    sketch: Vec<(Tensor<2>, Option<Tensor<2>>)>,
    squared_norm: Option<Tensor<1>>,
    energy: Option<(Tensor<1>, Tensor<1>)>,
    overlap: Option<Tensor<1>>,
    seconds: f64,
    pending: Option<Pending>,
    /// Updates in the coordinates of the basis before, to be merged in this step.
    retired: Option<(Tensor<2>, Pending)>,
    /// The change of basis that the moments are yet to follow.
    turn: Option<Tensor<2>>,
}

impl Galore {
    /// GaLore for the matrix `name` of shape `[m, n]`. Matrices refresh `offset` steps earlier than the first.
    pub fn new(config: GaloreConfig, name: &str, seed: u64, dims: [usize; 2], offset: u64) -> Self {
        let [m, n] = dims;
        let rank = config.rank.min(m).min(n);
        let side = config.proj_type.side(m, n, rank, config.tokens);
        let rank_axis = usize::from(side == Side::Output);
        Self {
            rule: config.rule.build(rank_axis),
            lazy: config.quantised.as_ref().map(|quantised| LazyGap::new(quantised, config.update_proj_gap)),
            name: name.to_owned(),
            seed,
            dims,
            rank,
            side,
            offset,
            collected: None,
            step: 0,
            refreshes: 0,
            plan: Plan::Projected,
            is_chosen: false,
            sketch: vec![],
            squared_norm: None,
            energy: None,
            overlap: None,
            seconds: 0.0,
            pending: None,
            retired: None,
            turn: None,
            config,
        }
    }

    /// The side in use.
    pub fn side(&self) -> Side {
        self.side
    }

    /// The basis in use: the first r columns of what is collected, in f32.
    pub fn basis(&self) -> Option<Basis> {
        let [left, right] = self.collected.as_ref()?;
        let values = |side: &Option<Directions>| side.as_ref().map(|directions| directions.basis(self.rank));
        Some(Basis { left: values(left), right: values(right) })
    }

    /// How the layer acts now with the updates that are not in its weight.
    fn offset(&self) -> Option<kernels::Offset> {
        let (down, pending) = (self.basis()?.left?, self.pending.as_ref()?);
        Some(kernels::Offset { down, up: pending.up.clone(), keep: pending.keep as f32 })
    }

    /// The pending updates in the coordinates of the collected basis: its further columns have none.
    fn widened_pending(&self) -> Option<(Tensor<2>, f32)> {
        let pending = self.pending.as_ref()?;
        let columns = self.collected.as_ref()?[0].as_ref()?.dims()[1];
        let [rank, n] = pending.up.dims();
        let up = match columns - rank {
            0 => pending.up.clone(),
            more => Tensor::cat(vec![pending.up.clone(), Tensor::zeros([more, n], &pending.up.device())], 0),
        };
        Some((up, pending.keep as f32))
    }

    /// What the backward pass would have collected for the factors.
    fn collect_factors(&self, x: &Tensor<2>, dy: &Tensor<2>) -> Tensor<2> {
        let Some(bases) = &self.collected else { unreachable!("a basis was chosen before") };
        let [left, right] = bases.each_ref().map(|side| side.as_ref().map(|side| side.values(FloatDType::F32)));
        let rows = match left {
            Some(left) => kernels::gemm(x.clone(), left, None, 1.0),
            None => x.clone(),
        };
        let columns = match right {
            Some(right) => kernels::gemm(dy.clone(), right, None, 1.0),
            None => dy.clone(),
        };
        kernels::gemm(rows.transpose(), columns, None, 1.0)
    }

    /// The part of a collected gradient that belongs to the basis.
    fn low_rank_part(&self, collected: Tensor<2>) -> Tensor<2> {
        let [rows, cols] = collected.dims();
        let rows = if self.side == Side::Output { rows } else { self.rank };
        let cols = if self.side == Side::Input { cols } else { self.rank };
        collected.slice([0..rows, 0..cols])
    }
}

/// `||x^T dy||^2` without the product: `sum (x x^T) * (dy dy^T)`, in tiles of rows (`2 t^2 (m + n)` flops).
pub fn ghost_norm(x: &Tensor<2>, dy: &Tensor<2>) -> Tensor<1> {
    const TILE: usize = 1024;
    let tokens = x.dims()[0];
    let gram = |a: &Tensor<2>, rows: std::ops::Range<usize>| {
        let tile = a.clone().slice([rows, 0..a.dims()[1]]);
        kernels::gemm(tile, a.clone().transpose(), None, 1.0)
    };
    (0..tokens)
        .step_by(TILE)
        .map(|from| {
            let rows = from..(from + TILE).min(tokens);
            (gram(x, rows.clone()) * gram(dy, rows)).sum()
        })
        .reduce(|sum, part| sum + part)
        .unwrap_or_else(|| Tensor::zeros([1], &x.device()))
}

impl MatrixOptimizer for Galore {
    fn collect(&mut self, micro_batches: usize) -> Gradient {
        self.squared_norm = None;
        self.is_chosen = false;
        self.sketch.clear();
        self.plan = self.next_plan(micro_batches);
        match (self.plan, &self.collected) {
            (Plan::Dense { .. }, _) => Gradient::Full,
            (Plan::Projected, Some([left, right])) => {
                Gradient::Projected { left: left.clone(), right: right.clone(), pending: self.widened_pending() }
            }
            _ => Gradient::Factors { offset: self.offset(), slots: None },
        }
    }

    fn keeps_weight(&self) -> bool {
        self.config.merge == Merge::Deferred && self.retired.is_none() && self.plan != Plan::RefreshLagged
    }

    fn serving(&self) -> Option<Gradient> {
        let kernels::Offset { down, up, keep } = self.offset()?;
        Some(Gradient::Projected { left: Some(down.into()), right: None, pending: Some((up, keep)) })
    }

    fn settle(&mut self, weight: Tensor<2>) -> Tensor<2> {
        let left = self.basis().and_then(|basis| basis.left);
        match (self.pending.take(), left) {
            (Some(pending), Some(left)) => pending.merge(weight, &left),
            _ => weight,
        }
    }

    fn observe(&mut self, x: Tensor<2>, dy: Tensor<2>) -> Tensor<2> {
        if self.config.norm == Norm::Exact {
            let part = ghost_norm(&x, &dy);
            self.squared_norm = Some(match self.squared_norm.take() {
                Some(sum) => sum + part,
                None => part,
            });
        }
        self.refresh_from_factors(&x, &dy);
        self.collect_factors(&x, &dy)
    }

    fn squared_norm(&self, collected: &Tensor<2>) -> Tensor<1> {
        self.squared_norm.clone().unwrap_or_else(|| kernels::sum_squares(collected.clone()))
    }

    /// A basis that came from this gradient is dropped; the next step chooses again.
    fn leave_out(&mut self) {
        if std::mem::take(&mut self.is_chosen) {
            (self.collected, self.turn, self.overlap) = (None, None, None);
        }
    }

    /// The exact norm was taken from the factors.
    fn rescaled(&mut self, factor: &Tensor<1>) {
        self.squared_norm = self.squared_norm.take().map(|norm| norm * factor.clone() * factor.clone());
    }

    fn step(&mut self, weight: Tensor<2>, collected: Tensor<2>, rule: StepRule) -> Tensor<2> {
        let whole = self.squared_norm(&collected);
        let low = match self.plan {
            Plan::Dense { refresh } => {
                if refresh {
                    self.refresh_from_gradient(&collected);
                }
                let Some(basis) = self.basis() else { unreachable!("the first step refreshes") };
                basis.project(collected)
            }
            _ => self.low_rank_part(collected),
        };
        self.energy = Some((kernels::sum_squares(low.clone()), whole));
        let low = if rule.gradient_scale == 1.0 { low } else { low * rule.gradient_scale };
        self.turn_moments();
        let update = self.rule.step(low, rule.learning_rate);
        let keep = 1.0 - rule.learning_rate * rule.weight_decay;
        let mut weight = match self.config.merge {
            Merge::Eager => {
                let Some(basis) = self.basis() else { unreachable!("the first step refreshes") };
                let weight = basis.add_back(weight, update, -self.config.scale);
                if keep < 1.0 { weight * keep } else { weight }
            }
            Merge::Deferred => {
                let before = self.pending.take().map(|pending| (pending.up, pending.keep));
                let (up, kept) = before.unwrap_or_else(|| (update.zeros_like(), 1.0));
                self.pending = Some(Pending { up: (up - update * self.config.scale) * keep, keep: kept * keep });
                match self.retired.take() {
                    Some((left, pending)) => pending.merge(weight, &left),
                    None => weight,
                }
            }
        };
        if self.plan == Plan::RefreshLagged {
            weight = self.refresh_from_sketch(weight);
        }
        self.step += 1;
        weight
    }

    fn save(&self) -> State {
        let mut state = State::default();
        self.rule.save(&mut state);
        state.numbers.insert("galore_step".to_owned(), self.step);
        state.numbers.insert("refreshes".to_owned(), self.refreshes);
        for (key, side) in ["left", "right"].into_iter().zip(self.collected.iter().flatten()) {
            match side {
                Some(Directions::Packed { basis, .. }) => q_galore::save_basis(key, basis, &mut state),
                Some(dense) => {
                    state.tensors.insert(key.to_owned(), dense.basis(self.rank));
                }
                None => {}
            }
        }
        if let Some(pending) = &self.pending {
            state.tensors.insert("pending".to_owned(), pending.up.clone());
            state.numbers.insert("pending_keep".to_owned(), pending.keep.to_bits());
        }
        if let Some(lazy) = &self.lazy {
            lazy.save(&mut state);
        }
        state
    }

    fn restore(&mut self, mut state: State) -> Result<(), String> {
        self.step = state.number("galore_step")?;
        self.refreshes = state.number("refreshes")?;
        let [m, n] = self.dims;
        let mut side = |key: &str, rows: usize, order: Order| -> Result<Option<Weight>, String> {
            let dims = [rows, self.rank];
            Ok(match &self.config.quantised {
                Some(quantised) => quantised.restore_basis(key, dims, order, &mut state)?.map(Weight::Packed),
                None => state.optional_tensor(key, dims)?.map(Weight::Dense),
            })
        };
        let basis = [side("left", m, q_galore::LEFT)?, side("right", n, q_galore::RIGHT)?];
        if self.refreshes > 0 && basis.iter().all(Option::is_none) {
            return Err(format!("{} refreshes were made, but there is no basis", self.refreshes));
        }
        self.pending = match state.optional_tensor("pending", [self.rank, n])? {
            Some(up) => Some(Pending { up, keep: f64::from_bits(state.number("pending_keep")?) }),
            None => None,
        };
        if let Some(lazy) = &mut self.lazy {
            lazy.restore(&mut state)?;
        }
        self.rule.restore(&mut state)?;
        if basis.iter().any(Option::is_some) {
            self.use_basis(basis);
        }
        Ok(())
    }

    fn report(&self) -> Report {
        Report {
            energy: self.energy.as_ref().map(|(low, whole)| scalar(low) / scalar(whole).max(f64::MIN_POSITIVE)),
            refreshes: self.refreshes,
            refresh_seconds: self.seconds,
            overlap: self.overlap.as_ref().map(scalar),
        }
    }

    fn state_bytes(&self) -> usize {
        let basis: usize = self.collected.iter().flatten().flatten().map(Directions::bytes).sum();
        let pending = self.pending.as_ref().map_or(0, |pending| 4 * pending.up.shape().num_elements());
        basis + pending + self.rule.state_bytes()
    }
}

#[cfg(test)]
mod tests;
