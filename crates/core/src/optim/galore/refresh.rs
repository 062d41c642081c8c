//! How GaLore chooses its basis.
//!
//! A refresh is due at steps 0, gap, 2 gap, ... (Q-GaLore's gap grows). The new basis comes from one of three:
//!
//! | what a refresh sees | how |
//! | --- | --- |
//! | the dense gradient (`exact`, `accumulation = dense`) | exact SVD |
//! | x and dy of the only or first micro batch | range finder: momentum and Gaussian columns, power iterations |
//! | x and dy of several (`lagged`, but for the first step) | `sum G S`, S as above, no power iterations; for the next step |
//!
//! `install` then fixes its signs, measures the overlap with the old one, notes the turn that the moments may follow, and adds the
//! columns of the norm's sketch.

use std::time::Instant;

use burn::tensor::{Device, FloatDType, Tensor};
use lowrank_kernels::{self as kernels, Weight};

use super::{Accumulation, Galore, Moments, Norm};
use crate::directions::Directions;
use crate::linalg;
use crate::optim::MatrixOptimizer;
use crate::optim::q_galore::LazyGap;
use crate::optim::subspace::{Basis, Side};

/// What the backward passes of the current step hand over, and what becomes of the basis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Plan {
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

impl Galore {
    fn gap(&self) -> u64 {
        self.lazy.as_ref().map_or(self.config.update_proj_gap, LazyGap::gap)
    }

    fn refresh_is_due(&self) -> bool {
        self.collected.is_none() || (self.step + self.offset).is_multiple_of(self.gap())
    }

    /// What the coming step does.
    pub(super) fn next_plan(&self, micro_batches: usize) -> Plan {
        let is_due = self.refresh_is_due();
        match (is_due, self.config.accumulation) {
            _ if self.config.exact => Plan::Dense { refresh: is_due },
            (false, _) if self.config.norm == Norm::Exact => Plan::Norm,
            (false, _) => Plan::Projected,
            (true, Accumulation::Dense) if micro_batches > 1 => Plan::Dense { refresh: true },
            (true, Accumulation::Lagged) if micro_batches > 1 && self.collected.is_some() => Plan::RefreshLagged,
            (true, _) => Plan::RefreshNow,
        }
    }

    /// What the factors of a micro batch are to the basis: the first ones give it, or all of them add up to the next.
    pub(super) fn refresh_from_factors(&mut self, x: &Tensor<2>, dy: &Tensor<2>) {
        let started = Instant::now();
        match self.plan {
            Plan::RefreshNow if !self.is_chosen => {
                let basis = self.basis_of_factors(x, dy);
                self.install(basis);
                self.is_chosen = true;
            }
            Plan::RefreshLagged => self.add_to_sketch(x, dy),
            _ => {}
        }
        self.seconds += started.elapsed().as_secs_f64();
    }

    /// Takes the basis of the dense gradient into use.
    pub(super) fn refresh_from_gradient(&mut self, g: &Tensor<2>) {
        let started = Instant::now();
        let basis = self.basis_of_gradient(g);
        self.install(basis);
        self.seconds += started.elapsed().as_secs_f64();
    }

    /// Takes the basis of the sketches into use, at the end of a step. The weight gets its pending updates first: they are in the
    /// coordinates of the old one.
    pub(super) fn refresh_from_sketch(&mut self, weight: Tensor<2>) -> Tensor<2> {
        let started = Instant::now();
        let weight = self.settle(weight);
        if let Some(basis) = self.basis_of_sketch() {
            self.install(basis);
            self.turn_moments();
        }
        self.seconds += started.elapsed().as_secs_f64();
        weight
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

    /// Columns of the norm's sketch.
    fn sketch_columns(&self) -> usize {
        let is_sketched = !self.config.exact && self.config.norm == Norm::Hybrid;
        if is_sketched { self.config.norm_sketch } else { 0 }
    }

    /// Collects for a basis as it is held, and for the columns of the norm's sketch.
    pub(super) fn use_basis(&mut self, basis: [Option<Weight>; 2]) {
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
    pub(super) fn turn_moments(&mut self) {
        if let Some(change) = self.turn.take() {
            self.rule.rotate(&change);
        }
    }
}
