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
//! * a refresh finds the basis from the factors x and dy by a randomised range finder ([`linalg::range_finder`]), which starts
//!   from the momentum, the smoothed memory of the old subspace, and from fresh Gaussian columns;
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

use std::time::Instant;

use burn::tensor::{Device, FloatDType, Tensor};
use lowrank_kernels::packed::Order;
use lowrank_kernels::{self as kernels, Weight};

use super::q_galore::{self, LazyGap, Quantised};
use super::rules::{Rule, RuleConfig};
use super::subspace::{Basis, ProjType, Side};
use super::{MatrixOptimizer, Report, State, StepRule};
use crate::directions::Directions;
use crate::linalg;
use crate::projection::Gradient;

/// How a refresh over several micro batches gets its basis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accumulation {
    /// From a sketch of the summed gradient, for the steps after this one.
    #[default]
    Lagged,
    /// From the dense gradient, kept for this step.
    Dense,
    /// From the first micro batch.
    FirstMicroBatch,
}

/// How the norm of the whole gradient is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Norm {
    /// R exactly, the rest by a sketch.
    #[default]
    Hybrid,
    /// Exactly, from the factors; one micro batch only.
    Exact,
    /// That of R alone.
    Projected,
}

/// What happens to the moments when the basis changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Moments {
    /// Nothing, as published: they are read in the new coordinates.
    #[default]
    Keep,
    /// They are carried into the new coordinates (LDAdam, arXiv 2410.16103).
    Rotate,
}

/// When updates reach the weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Merge {
    /// In every step.
    #[default]
    Eager,
    /// At refreshes, and before the model is written. Input side only.
    Deferred,
}

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

/// Hyper-parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct GaloreConfig {
    /// r; at most the smaller dimension is used.
    pub rank: usize,
    /// Steps between two refreshes of the basis.
    pub update_proj_gap: u64,
    /// Factor of the update.
    pub scale: f64,
    /// Side.
    pub proj_type: ProjType,
    /// The published algorithm: dense gradient, exact SVD.
    pub exact: bool,
    /// Rule on R.
    pub rule: RuleConfig,
    /// Power iterations of a refresh from nothing; a refresh with a momentum needs one less.
    pub power_iterations: usize,
    /// Columns of the range finder beyond r.
    pub oversampling: usize,
    /// Columns of the norm's sketch.
    pub norm_sketch: usize,
    /// How the gradient norm is known.
    pub norm: Norm,
    /// Refresh over several micro batches.
    pub accumulation: Accumulation,
    /// Choose the signs of a new basis so that each direction agrees with its predecessor.
    pub align_sign: bool,
    /// Moments at a refresh.
    pub moments: Moments,
    /// When updates reach the weight.
    pub merge: Merge,
    /// Q-GaLore: basis held in 4 bits, lazy refreshes.
    pub quantised: Option<Quantised>,
    /// Tokens of a micro batch, for `proj_type = auto`.
    pub tokens: usize,
}

impl Default for GaloreConfig {
    fn default() -> Self {
        Self {
            rank: 128,
            update_proj_gap: 200,
            scale: 0.25,
            proj_type: ProjType::Input,
            exact: false,
            rule: RuleConfig::galore_adamw(),
            power_iterations: 1,
            oversampling: 16,
            norm_sketch: 8,
            norm: Norm::Hybrid,
            accumulation: Accumulation::Lagged,
            align_sign: true,
            moments: Moments::Keep,
            merge: Merge::Eager,
            quantised: None,
            tokens: 2048,
        }
    }
}

/// What the backward passes of the current step hand over, and what becomes of the basis.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Plan {
    /// The projected gradient.
    Projected,
    /// Factors, for the exact norm alone.
    Norm,
    /// Factors; the first micro batch gives the basis.
    RefreshNow,
    /// Factors; a sketch of their sum gives the next basis.
    RefreshLagged,
    /// The dense gradient; with a refresh where it is due.
    Dense { refresh: bool },
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

    fn gap(&self) -> u64 {
        self.lazy.as_ref().map_or(self.config.update_proj_gap, LazyGap::gap)
    }

    fn refresh_is_due(&self) -> bool {
        self.collected.is_none() || (self.step + self.offset).is_multiple_of(self.gap())
    }

    /// Columns of the norm's sketch.
    fn sketch_columns(&self) -> usize {
        let is_sketched = !self.config.exact && self.config.norm == Norm::Hybrid;
        if is_sketched { self.config.norm_sketch } else { 0 }
    }

    fn gaussian(&self, purpose: &str, rows: usize, cols: usize, deviation: f64, device: &Device) -> Tensor<2> {
        let name = format!("{} {purpose} {}", self.name, self.refreshes);
        linalg::gaussian(self.seed, &name, rows, cols, deviation, device)
    }

    /// Start block of a range finder on vectors of length `rows`: the momentum's directions, then Gaussian columns. `axis` is
    /// the axis of the momentum that has this length.
    fn start_block(&self, rows: usize, axis: usize, device: &Device) -> (Tensor<2>, bool) {
        let columns = (self.rank + self.config.oversampling).min(rows);
        let momentum = if self.side == Side::Both { None } else { self.rule.momentum() };
        let purpose = if axis == 0 { "start rows" } else { "start columns" };
        match momentum {
            Some(momentum) if columns > self.rank || columns == rows => {
                let warm = if axis == 0 { momentum } else { momentum.transpose() };
                let warm = warm.slice([0..rows, 0..self.rank.min(columns)]);
                let fresh = columns - warm.dims()[1];
                if fresh == 0 {
                    return (linalg::orthonormal(warm), true);
                }
                let warm = linalg::orthonormal(warm);
                let fresh = self.gaussian(purpose, rows, fresh, (1.0 / rows as f64).sqrt(), device);
                (Tensor::cat(vec![warm, fresh], 1), true)
            }
            _ => (self.gaussian(purpose, rows, columns, 1.0, device), false),
        }
    }

    /// The basis of the gradient `x^T dy`.
    fn basis_of_factors(&self, x: &Tensor<2>, dy: &Tensor<2>) -> Basis {
        let [m, n] = self.dims;
        let device = x.device();
        let iterations = |is_warm: bool| self.config.power_iterations.saturating_sub(usize::from(is_warm));
        match self.side {
            Side::Input => {
                let (start, is_warm) = self.start_block(n, 1, &device);
                let found = linalg::range_finder(x, dy, start, iterations(is_warm), self.rank);
                Basis { left: Some(found.basis), right: None }
            }
            Side::Output => {
                let (start, is_warm) = self.start_block(m, 0, &device);
                let found = linalg::range_finder(dy, x, start, iterations(is_warm), self.rank);
                Basis { left: None, right: Some(found.basis) }
            }
            Side::Both => {
                let (start, is_warm) = self.start_block(n, 1, &device);
                let found = linalg::range_finder(x, dy, start, iterations(is_warm), self.rank);
                // The rows of R are the right singular vectors times their singular values, in order.
                let right = linalg::orthonormal(found.projected.transpose());
                Basis { left: Some(found.basis), right: Some(right) }
            }
        }
    }

    fn basis_of_gradient(&self, g: &Tensor<2>) -> Basis {
        let svd = linalg::svd(g.clone(), self.rank);
        Basis {
            left: (self.side != Side::Output).then_some(svd.left),
            right: (self.side != Side::Input).then_some(svd.right),
        }
    }

    /// Adds a micro batch to the sketches of the next basis.
    fn add_to_sketch(&mut self, x: &Tensor<2>, dy: &Tensor<2>) {
        let [m, n] = self.dims;
        let device = x.device();
        if self.sketch.is_empty() {
            if self.side != Side::Output {
                self.sketch.push((self.start_block(n, 1, &device).0, None));
            }
            if self.side != Side::Input {
                self.sketch.push((self.start_block(m, 0, &device).0, None));
            }
        }
        let is_output = self.side == Side::Output;
        for (index, (start, sum)) in self.sketch.iter_mut().enumerate() {
            let (a, b) = if is_output || index == 1 { (dy, x) } else { (x, dy) };
            let thin = kernels::gemm(b.clone(), start.clone(), None, 1.0);
            *sum = Some(kernels::gemm(a.clone().transpose(), thin, sum.take(), 1.0));
        }
    }

    /// The basis of the sketches.
    fn basis_of_sketch(&mut self) -> Option<Basis> {
        let found: Vec<Tensor<2>> = std::mem::take(&mut self.sketch)
            .into_iter()
            .filter_map(|(_, sum)| Some(linalg::sketch_basis(sum?, self.rank).0))
            .collect();
        let mut found = found.into_iter();
        let first = found.next()?;
        Some(match self.side {
            Side::Input => Basis { left: Some(first), right: None },
            Side::Output => Basis { left: None, right: Some(first) },
            Side::Both => Basis { left: Some(first), right: found.next() },
        })
    }

    /// Takes a new basis into use: signs, moments, quantisation, the sketch of the norm.
    fn install(&mut self, new: Basis) {
        let old = self.basis();
        if let (Some(pending), Some(left)) = (self.pending.take(), old.as_ref().and_then(|old| old.left.clone())) {
            self.retired = Some((left, pending));
        }
        let signed = |new: Option<Tensor<2>>, old: Option<&Tensor<2>>| {
            new.map(|new| match old {
                Some(old) if self.config.align_sign => linalg::align_signs(new, old.clone()),
                _ => linalg::fix_signs(new),
            })
        };
        let new = Basis {
            left: signed(new.left, old.as_ref().and_then(|old| old.left.as_ref())),
            right: signed(new.right, old.as_ref().and_then(|old| old.right.as_ref())),
        };
        if let Some(old) = &old {
            let pairs = [(&new.left, &old.left), (&new.right, &old.right)];
            let changes: Vec<Tensor<2>> = pairs
                .into_iter()
                .filter_map(|(new, old)| {
                    Some(kernels::gemm(new.clone()?.transpose(), old.clone()?, None, 1.0)) // P_new^T P_old
                })
                .collect();
            let share = 1.0 / (self.rank * changes.len().max(1)) as f64;
            let squares = changes.iter().map(|change| kernels::sum_squares(change.clone()) * share);
            self.overlap = squares.reduce(|sum, part| sum + part);
            if let (Moments::Rotate, [change]) = (self.config.moments, changes.as_slice()) {
                self.turn = Some(change.clone());
            }
        }
        self.refreshes += 1;
        self.set(new);
    }

    /// Quantises the basis where the method does, and adds the columns of the norm's sketch.
    fn set(&mut self, basis: Basis) {
        let held = match (&self.config.quantised, &mut self.lazy) {
            (Some(quantised), Some(lazy)) => {
                lazy.watch(quantised, basis.left.as_ref().or(basis.right.as_ref()));
                quantised.pack(basis).map(|side| side.map(Weight::Packed))
            }
            _ => [basis.left, basis.right].map(|side| side.map(Weight::Dense)),
        };
        self.use_basis(held);
    }

    fn use_basis(&mut self, basis: [Option<Weight>; 2]) {
        let columns = self.sketch_columns();
        let widened = |basis: Option<Weight>, purpose: &str| {
            let basis = basis?;
            let rows = basis.dims()[0];
            let columns = columns.min(rows - self.rank);
            let sketch = (columns > 0).then(|| {
                let values = basis.dense(FloatDType::F32);
                let deviation = (1.0 / columns as f64).sqrt();
                let sketch = self.gaussian(purpose, rows, columns, deviation, &values.device());
                let inside = kernels::gemm(values.clone().transpose(), sketch.clone(), None, 1.0);
                kernels::gemm(values, inside, Some(sketch), -1.0)
            });
            Some(match (basis, sketch) {
                (Weight::Packed(basis), others) => Directions::Packed { basis, others },
                (Weight::Dense(basis), Some(others)) => Directions::Dense(Tensor::cat(vec![basis, others], 1)),
                (Weight::Dense(basis), None) => Directions::Dense(basis),
            })
        };
        let [left, right] = basis;
        self.collected = Some([widened(left, "norm rows"), widened(right, "norm columns")]);
    }

    /// Takes the moments to the basis in use.
    fn turn_moments(&mut self) {
        if let Some(change) = self.turn.take() {
            self.rule.rotate(&change);
        }
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
        let is_due = self.refresh_is_due();
        self.squared_norm = None;
        self.is_chosen = false;
        self.sketch.clear();
        self.plan = match (is_due, self.config.accumulation) {
            _ if self.config.exact => Plan::Dense { refresh: is_due },
            (false, _) if self.config.norm == Norm::Exact => Plan::Norm,
            (false, _) => Plan::Projected,
            (true, Accumulation::Dense) if micro_batches > 1 => Plan::Dense { refresh: true },
            (true, Accumulation::Lagged) if micro_batches > 1 && self.collected.is_some() => Plan::RefreshLagged,
            (true, _) => Plan::RefreshNow,
        };
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
        let started = Instant::now();
        match self.plan {
            Plan::RefreshNow if !self.is_chosen => {
                let basis = self.basis_of_factors(&x, &dy);
                self.install(basis);
                self.is_chosen = true;
            }
            Plan::RefreshLagged => self.add_to_sketch(&x, &dy),
            _ => {}
        }
        self.seconds += started.elapsed().as_secs_f64();
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
                let started = Instant::now();
                if refresh {
                    let basis = self.basis_of_gradient(&collected);
                    self.install(basis);
                }
                self.seconds += started.elapsed().as_secs_f64();
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
            let started = Instant::now();
            weight = self.settle(weight);
            if let Some(basis) = self.basis_of_sketch() {
                self.install(basis);
                self.turn_moments();
            }
            self.seconds += started.elapsed().as_secs_f64();
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

/// The value of a `[1]` tensor.
fn scalar(tensor: &Tensor<1>) -> f64 {
    f64::from(tensor.clone().into_scalar::<f32>())
}

#[cfg(test)]
#[path = "galore_tests.rs"]
mod tests;
