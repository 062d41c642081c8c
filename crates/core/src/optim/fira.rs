//! Fira: GaLore plus the part of the gradient outside the subspace (arXiv 2410.01623).
//!
//! For `W [m, n]` with gradient G, written for the input side (output side: `Q [n, r]`, and rows for columns):
//!
//! ```text
//! every gap steps: P = leading r left singular vectors of G, signs fixed         [m, r]
//! R = P^T G,  N = M / (sqrt(V) + eps)      M, V: moments of R                    [r, n]
//! s_j = ||N_j|| / (||R_j|| + 1e-8)         one number per column j               [1, n]
//! E = (G - P R) s                          what Adam would do outside            [m, n]
//! l = max(||E|| / (e + 1e-8), 1.01) / 1.01;  E = E / l;  e = ||E||               limiter
//! W = (1 - lr decay) (W - lr sqrt(1 - b2^t) / (1 - b1^t) (scale P N + E))
//! ```
//!
//! The released code forms the residual as `G - scale P R`, so a part of the gradient inside the subspace is stepped
//! twice: [`Residual::Code`]. The default is the text's formula. An `e` of 0 (nothing stepped yet) does not limit; the
//! released code would hold such a matrix near 0 for thousands of steps.
//!
//! State: `4 (m r + 2 r n + 1)` bytes on the input side. Flops: `6 m n r` a step, and an SVD of G on the host every gap
//! steps.

use std::time::Instant;

use burn::tensor::Tensor;
use lowrank_kernels as kernels;

use super::rules::{AdamForm, Rule, RuleConfig};
use super::subspace::{Basis, ProjType, Side};
use super::{MatrixOptimizer, Report, State, StepRule};
use crate::linalg;

/// Largest growth of a limited norm in one step.
const GROWTH: f64 = 1.01;

/// Added to norms before they divide.
const TINY: f64 = 1e-8;

/// Which part of the gradient counts as outside the subspace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Residual {
    /// `G - P R`, as the paper says.
    #[default]
    Text,
    /// `G - scale P R`, as the released code does.
    Code,
}

/// Hyper-parameters, with the published defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct FiraConfig {
    /// r; at most the smaller dimension is used.
    pub rank: usize,
    /// Steps between two refreshes of the basis.
    pub update_proj_gap: u64,
    /// Factor of the part inside the subspace.
    pub scale: f64,
    /// The part outside.
    pub residual: Residual,
    /// Whether its norm may grow by at most 1 % a step.
    pub limiter: bool,
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Side. Two sides have no columns to compare: `full` is read as `std`, and `auto` compares the states alone.
    pub proj_type: ProjType,
}

impl Default for FiraConfig {
    fn default() -> Self {
        Self {
            rank: 128,
            update_proj_gap: 200,
            scale: 0.25,
            residual: Residual::Text,
            limiter: true,
            betas: (0.9, 0.999),
            eps: 1e-6,
            proj_type: ProjType::Std,
        }
    }
}

/// Fira on one matrix.
#[derive(Debug)]
pub struct Fira {
    config: FiraConfig,
    dims: [usize; 2],
    rank: usize,
    side: Side,
    rule: Box<dyn Rule>,
    basis: Option<Basis>,
    limiter: Limiter,
    /// Steps done.
    step: u64,
    refreshes: u64,
    seconds: f64,
    energy: Option<Energy>,
    overlap: Option<Tensor<1>>,
}

impl Fira {
    /// Fira for a matrix `[m, n]`. Nothing in it is random: name and seed are those of every method's constructor.
    pub fn new(config: FiraConfig, _name: &str, _seed: u64, dims: [usize; 2]) -> Self {
        let rank = config.rank.min(dims[0]).min(dims[1]);
        let side = one_side(config.proj_type, dims, rank);
        let rule = RuleConfig::AdamW { betas: config.betas, eps: config.eps, form: AdamForm::Hf };
        Self {
            rule: rule.build(rank_axis(side)),
            config,
            dims,
            rank,
            side,
            basis: None,
            limiter: Limiter::default(),
            step: 0,
            refreshes: 0,
            seconds: 0.0,
            energy: None,
            overlap: None,
        }
    }

    fn refresh(&mut self, gradient: &Tensor<2>) -> Basis {
        let started = Instant::now();
        let svd = linalg::svd(gradient.clone(), self.rank);
        let directions = if self.side == Side::Input { svd.left } else { svd.right };
        let basis = basis_on(self.side, linalg::fix_signs(directions));
        self.overlap = self.basis.as_ref().and_then(|old| overlap(&basis, old));
        self.refreshes += 1;
        self.seconds += started.elapsed().as_secs_f64();
        basis
    }
}

impl MatrixOptimizer for Fira {
    fn step(&mut self, weight: Tensor<2>, collected: Tensor<2>, rule: StepRule) -> Tensor<2> {
        let gradient = scaled(collected, rule.gradient_scale);
        let basis = match self.basis.take() {
            Some(basis) if !self.step.is_multiple_of(self.config.update_proj_gap.max(1)) => basis,
            old => {
                self.basis = old;
                self.refresh(&gradient)
            }
        };
        self.step += 1;
        let low = basis.project(gradient.clone());
        self.energy = Some(Energy::of(&low, &gradient));
        // The rule multiplies by the learning rate and the correction: with its inverse, what comes out is N.
        let correction = correction(self.config.betas, self.step);
        let normed = self.rule.step(low.clone(), 1.0 / correction);
        let inside = if self.config.residual == Residual::Code { self.config.scale } else { 1.0 };
        let outside = basis.add_back(gradient, low.clone(), -inside) * ratio(&normed, &low, rank_axis(self.side));
        let outside = if self.config.limiter { self.limiter.apply(outside) } else { outside };
        let size = rule.learning_rate * correction;
        let weight = basis.add_back(weight - outside * size, normed, -size * self.config.scale);
        self.basis = Some(basis);
        decayed(weight, rule)
    }

    fn save(&self) -> State {
        let mut state = State::default();
        self.rule.save(&mut state);
        self.limiter.save(&mut state);
        state.numbers.insert("fira_step".to_owned(), self.step);
        state.numbers.insert("refreshes".to_owned(), self.refreshes);
        if let Some(directions) = self.basis.as_ref().and_then(directions) {
            state.tensors.insert("basis".to_owned(), directions.clone());
        }
        state
    }

    fn restore(&mut self, mut state: State) -> Result<(), String> {
        self.step = state.number("fira_step")?;
        self.refreshes = state.number("refreshes")?;
        let shape = [projected_size(self.side, self.dims), self.rank];
        self.basis = state.optional_tensor("basis", shape)?.map(|directions| basis_on(self.side, directions));
        self.limiter.restore(&mut state)?;
        if self.step > 0 {
            self.rule.restore(&mut state)?;
            self.basis.as_ref().ok_or("basis is missing")?;
        }
        Ok(())
    }

    fn report(&self) -> Report {
        Report {
            energy: self.energy.as_ref().map(Energy::share),
            refreshes: self.refreshes,
            refresh_seconds: self.seconds,
            overlap: self.overlap.as_ref().map(scalar),
        }
    }

    fn state_bytes(&self) -> usize {
        self.rule.state_bytes() + 4 * self.basis.as_ref().map_or(0, Basis::len) + self.limiter.bytes()
    }
}

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

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::{Device, TensorData};

    use super::*;

    pub(in crate::optim) const RULE: StepRule =
        StepRule { learning_rate: 0.05, weight_decay: 0.1, gradient_scale: 0.5 };

    /// A matrix on the host in f64, as plain as it gets.
    #[derive(Clone, Debug)]
    pub(in crate::optim) struct Host {
        pub rows: usize,
        pub cols: usize,
        pub values: Vec<f64>,
    }

    impl Host {
        pub fn new(rows: usize, cols: usize, value: impl Fn(usize, usize) -> f64) -> Self {
            let values = (0..rows * cols).map(|at| value(at / cols, at % cols)).collect();
            Self { rows, cols, values }
        }

        pub fn zeros(rows: usize, cols: usize) -> Self {
            Self::new(rows, cols, |_, _| 0.0)
        }

        pub fn of(tensor: &Tensor<2>) -> Self {
            let [rows, cols] = tensor.dims();
            let values = linalg::host(tensor.clone());
            Self::new(rows, cols, |i, j| f64::from(values[i * cols + j]))
        }

        pub fn at(&self, i: usize, j: usize) -> f64 {
            self.values[i * self.cols + j]
        }

        pub fn t(&self) -> Self {
            Self::new(self.cols, self.rows, |i, j| self.at(j, i))
        }

        pub fn mul(&self, other: &Self) -> Self {
            assert_eq!(self.cols, other.rows);
            Self::new(self.rows, other.cols, |i, j| (0..self.cols).map(|k| self.at(i, k) * other.at(k, j)).sum())
        }

        pub fn zip(&self, other: &Self, f: impl Fn(f64, f64) -> f64) -> Self {
            assert_eq!((self.rows, self.cols), (other.rows, other.cols));
            Self::new(self.rows, self.cols, |i, j| f(self.at(i, j), other.at(i, j)))
        }

        pub fn map(&self, f: impl Fn(f64) -> f64) -> Self {
            Self::new(self.rows, self.cols, |i, j| f(self.at(i, j)))
        }

        pub fn norm(&self) -> f64 {
            self.values.iter().map(|value| value * value).sum::<f64>().sqrt()
        }

        /// Norms over an axis: one per column (axis 0) or row (axis 1).
        pub fn norms(&self, axis: usize) -> Vec<f64> {
            let lines = if axis == 0 { self.t() } else { self.clone() };
            (0..lines.rows).map(|i| (0..lines.cols).map(|j| lines.at(i, j).powi(2)).sum::<f64>().sqrt()).collect()
        }

        /// Asserts that both are equal up to `tolerance` of the norm.
        pub fn assert_close(&self, other: &Self, tolerance: f64) {
            let error = self.zip(other, |a, b| a - b).norm();
            assert!(error <= tolerance * other.norm().max(1e-3), "error {error:e} at norm {:e}", other.norm());
        }
    }

    /// A random matrix of the device under test.
    pub(in crate::optim) fn random(seed: u64, rows: usize, cols: usize) -> Tensor<2> {
        linalg::gaussian(seed, "test", rows, cols, 1.0, &Device::flex())
    }

    /// A matrix of given values.
    pub(in crate::optim) fn device(host: &Host) -> Tensor<2> {
        let values = host.values.iter().map(|&value| value as f32).collect::<Vec<_>>();
        Tensor::from_data(TensorData::new(values, [host.rows, host.cols]), &Device::flex())
    }

    /// Asserts that two optimisers, one of them restored from the other's state after `split` steps, stay equal bit by
    /// bit.
    pub(in crate::optim) fn assert_resumes(
        new: impl Fn() -> Box<dyn MatrixOptimizer>,
        dims: [usize; 2],
        split: u64,
        steps: u64,
    ) {
        let mut whole = new();
        let mut weight = random(99, dims[0], dims[1]);
        let mut resumed: Option<(Box<dyn MatrixOptimizer>, Tensor<2>)> = None;
        for step in 0..steps {
            if step == split {
                let mut fresh = new();
                fresh.restore(whole.save()).unwrap();
                assert_eq!(fresh.save().numbers, whole.save().numbers);
                resumed = Some((fresh, weight.clone()));
            }
            let gradient = random(step, dims[0], dims[1]);
            whole.collect(1);
            weight = whole.step(weight, gradient.clone(), RULE);
            if let Some((optimizer, copy)) = &mut resumed {
                optimizer.collect(1);
                *copy = optimizer.step(copy.clone(), gradient, RULE);
                assert_eq!(linalg::host(copy.clone()), linalg::host(weight.clone()), "step {step}");
                assert_eq!(optimizer.state_bytes(), whole.state_bytes());
            }
        }
        assert!(resumed.is_some());
    }

    /// HF-form Adam on a host matrix, M and V starting at 0: the N of every step.
    pub(in crate::optim) struct HostAdam {
        pub m: Host,
        pub v: Host,
        pub betas: (f64, f64),
        pub eps: f64,
    }

    impl HostAdam {
        pub fn new(rows: usize, cols: usize, betas: (f64, f64), eps: f64) -> Self {
            Self { m: Host::zeros(rows, cols), v: Host::zeros(rows, cols), betas, eps }
        }

        pub fn normed(&mut self, r: &Host) -> Host {
            let (b1, b2) = self.betas;
            self.m = self.m.zip(r, |m, r| b1 * m + (1.0 - b1) * r);
            self.v = self.v.zip(r, |v, r| b2 * v + (1.0 - b2) * r * r);
            self.m.zip(&self.v, |m, v| m / (v.sqrt() + self.eps))
        }
    }

    /// Three steps against the formulas; the basis is the optimiser's own.
    fn compare(dims: [usize; 2], residual: Residual) {
        let [m, n] = dims;
        let config = FiraConfig { rank: 2, update_proj_gap: 2, residual, ..FiraConfig::default() };
        let mut fira = Fira::new(config.clone(), "w", 1, dims);
        let is_input = m <= n;
        let axis = usize::from(!is_input);
        let mut adam =
            HostAdam::new(if is_input { 2 } else { m }, if is_input { n } else { 2 }, config.betas, config.eps);
        let mut weight = random(7, m, n);
        let mut previous: Option<f64> = None;
        for t in 1..=3u64 {
            // The third gradient is long, so that the limiter acts.
            let gradient = random(t, m, n) * if t == 3 { 5.0 } else { 1.0 };
            let before = Host::of(&weight);
            weight = fira.step(weight, gradient.clone(), RULE);
            let g = Host::of(&gradient).map(|g| 0.5 * g);
            let p = Host::of(directions(fira.basis.as_ref().unwrap()).unwrap());
            let project = |g: &Host| if is_input { p.t().mul(g) } else { g.mul(&p) };
            let back = |low: &Host| if is_input { p.mul(low) } else { low.mul(&p.t()) };
            let low = project(&g);
            let normed = adam.normed(&low);
            let s: Vec<f64> = normed.norms(axis).iter().zip(low.norms(axis)).map(|(n, r)| n / (r + 1e-8)).collect();
            let factor = if residual == Residual::Code { config.scale } else { 1.0 };
            let rest = g.zip(&back(&low), |g, inside| g - factor * inside);
            let mut e = Host::new(m, n, |i, j| rest.at(i, j) * s[if is_input { j } else { i }]);
            if let Some(previous) = previous {
                let l = (e.norm() / (previous + 1e-8)).max(1.01) / 1.01;
                e = e.map(|e| e / l);
                assert!(e.norm() <= 1.010_001 * previous);
            }
            previous = Some(e.norm());
            let size = 0.05 * correction(config.betas, t);
            let update = back(&normed).zip(&e, |n, e| size * (config.scale * n + e));
            let expected = before.zip(&update, |w, u| (1.0 - 0.05 * 0.1) * (w - u));
            Host::of(&weight).assert_close(&expected, 1e-5);
        }
        assert_eq!(fira.report().refreshes, 2);
        assert!((0.0..=1.0).contains(&fira.report().energy.unwrap()));
        assert!((0.0..=1.001).contains(&fira.report().overlap.unwrap()));
    }

    #[test]
    fn steps_follow_the_formulas() {
        for residual in [Residual::Text, Residual::Code] {
            compare([4, 6], residual);
            compare([6, 4], residual);
        }
    }

    #[test]
    fn full_rank_without_scale_has_no_residual() {
        let config = FiraConfig { rank: 9, scale: 1.0, update_proj_gap: 3, ..FiraConfig::default() };
        let mut fira = Fira::new(config.clone(), "w", 1, [4, 6]);
        let mut adam = HostAdam::new(4, 6, config.betas, config.eps);
        let mut weight = random(7, 4, 6);
        for t in 1..=5 {
            let gradient = random(t, 4, 6);
            let before = Host::of(&weight);
            weight = fira.step(weight, gradient.clone(), RULE);
            // GaLore: the same without E.
            let p = Host::of(directions(fira.basis.as_ref().unwrap()).unwrap());
            let update = p.mul(&adam.normed(&p.t().mul(&Host::of(&gradient).map(|g| 0.5 * g))));
            let size = 0.05 * correction(config.betas, t);
            let expected = before.zip(&update, |w, u| 0.995 * (w - size * u));
            Host::of(&weight).assert_close(&expected, 1e-5);
        }
    }

    #[test]
    fn the_limiter_bounds_growth_and_starts_after_zero() {
        let mut limiter = Limiter::default();
        let mut last = 0.0;
        for scale in [0.0, 1.0, 1.005, 50.0, 0.1, 0.5, 7.0] {
            let norm = Host::of(&limiter.apply(random(3, 3, 5) * scale)).norm();
            assert!(last == 0.0 || norm <= 1.010_001 * last, "{norm} after {last}");
            last = norm;
        }
        assert!(last > 0.0);
    }

    #[test]
    fn a_restored_optimiser_continues_bit_by_bit() {
        for split in [0, 1, 3, 4] {
            let config = FiraConfig { rank: 2, update_proj_gap: 3, ..FiraConfig::default() };
            assert_resumes(|| Box::new(Fira::new(config.clone(), "w", 1, [5, 4])), [5, 4], split, 8);
        }
        let mut fira = Fira::new(FiraConfig { rank: 2, ..FiraConfig::default() }, "w", 1, [4, 6]);
        fira.step(random(1, 4, 6), random(2, 4, 6), RULE);
        assert_eq!(fira.state_bytes(), 4 * (4 * 2 + 2 * 2 * 6 + 1));
        let mut other = Fira::new(FiraConfig { rank: 3, ..FiraConfig::default() }, "w", 1, [4, 6]);
        assert!(other.restore(fira.save()).is_err());
    }
}
