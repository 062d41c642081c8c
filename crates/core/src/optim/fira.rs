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

use super::one_side::{
    Energy, Limiter, basis_on, correction, decayed, directions, one_side, overlap, projected_size, rank_axis, ratio,
    scalar, scaled,
};
use super::rules::{AdamForm, Rule, RuleConfig};
use super::subspace::{Basis, ProjType, Side};
use super::{MatrixOptimizer, Report, State, StepRule};
use crate::linalg;

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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::host_oracle::{Host, HostAdam, RULE, assert_resumes, random};
    use super::*;

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
