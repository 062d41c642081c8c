//! LDAdam: Adam in a subspace that moves at every step (arXiv 2410.16103).
//!
//! For `W [m, n]` with gradient G, written for the input side, which is taken where `m <= n` (output side: everything
//! transposed); t counts the steps done before this one, `c1 = 1 - b1^t`, `c2 = 1 - b2^t`:
//!
//! ```text
//! H = G + E                                                      error feedback  [m, n]
//! B = rho P_old M / c1 + (1 - rho) H,  P = QR(B (B^T P_old))     t = 0: SVD of H [m, r]
//! R = P^T H,  C = P^T P_old                                              [r, n], [r, r]
//! M~ = C M,  V~ = c2 |C^2 (V / c2 - (M / c1)^2) + (M~ / c1)^2|   squares entry by entry
//! E = H - P R + b1 / (1 - b1) (P_old M - P M~)                                   [m, n]
//! M = b1 M~ + (1 - b1) R,  V = b2 V~ + (1 - b2) R^2
//! W = (1 - lr decay) W - lr P (M / (1 - b1^(t+1))) / (sqrt(V / (1 - b2^(t+1))) + eps)
//! ```
//!
//! B is never formed: `Y = B^T P_old = rho M^T / c1 + (1 - rho) H^T P_old` uses `P_old^T P_old = I`, and
//! `B Y = rho P_old (M Y) / c1 + (1 - rho) H Y`. Y is scaled to norm 1 first, which QR does not see and f32 needs.
//!
//! State on the input side: `4 (m r + 2 r n)` bytes, and `4 m n` for E. Flops: `8 m n r` a step, `12 m n r` with E; a
//! QR of `[m, r]` every step.

use std::time::Instant;

use burn::tensor::Tensor;
use lowrank_kernels as kernels;

use super::one_side::{Energy, basis_on, decayed, directions, one_side, projected_size, rank_axis, scalar, scaled};
use super::rules::{AdamForm, Rule, RuleConfig};
use super::subspace::{Basis, ProjType, Side};
use super::{MatrixOptimizer, Report, State, StepRule};
use crate::linalg;

/// Keeps the scaling of Y finite where the gradient is 0.
const TINY: f64 = 1e-30;

/// Hyper-parameters, with the published defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct LdAdamConfig {
    /// r; at most the smaller dimension is used.
    pub rank: usize,
    /// Share of the momentum in the matrix whose range the next basis follows.
    pub rho: f64,
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the root of the corrected second moment.
    pub eps: f64,
    /// Whether what a step loses comes back in the next one, at the price of a buffer of the gradient's size.
    pub error_feedback: bool,
}

impl Default for LdAdamConfig {
    fn default() -> Self {
        Self { rank: 16, rho: 0.908, betas: (0.908, 0.99), eps: 1e-8, error_feedback: true }
    }
}

/// LDAdam on one matrix.
#[derive(Debug)]
pub struct LdAdam {
    config: LdAdamConfig,
    dims: [usize; 2],
    rank: usize,
    side: Side,
    rule: Box<dyn Rule>,
    basis: Option<Basis>,
    /// E.
    error: Option<Tensor<2>>,
    /// Steps done.
    step: u64,
    seconds: f64,
    energy: Option<Energy>,
    overlap: Option<Tensor<1>>,
}

impl LdAdam {
    /// LDAdam for a matrix `[m, n]`. Nothing in it is random: name and seed are those of every method's constructor.
    pub fn new(config: LdAdamConfig, _name: &str, _seed: u64, dims: [usize; 2]) -> Self {
        let rank = config.rank.min(dims[0]).min(dims[1]);
        let side = one_side(ProjType::Std, dims, rank);
        let rule = RuleConfig::AdamW { betas: config.betas, eps: config.eps, form: AdamForm::Torch };
        Self {
            rule: rule.build(rank_axis(side)),
            config,
            dims,
            rank,
            side,
            basis: None,
            error: None,
            step: 0,
            seconds: 0.0,
            energy: None,
            overlap: None,
        }
    }

    /// The basis of the coming step, from `H` and what the steps before have left.
    fn next_basis(&self, h: &Tensor<2>) -> Basis {
        let (Some(old), Some(momentum)) = (self.basis.as_ref().and_then(directions), self.rule.momentum()) else {
            let svd = linalg::svd(h.clone(), self.rank);
            let leading = if self.side == Side::Input { svd.left } else { svd.right };
            return basis_on(self.side, linalg::fix_signs(leading));
        };
        // From here on as on the input side: H [m, n], M [r, n].
        let (h, momentum) = match self.side {
            Side::Output => (h.clone().transpose(), momentum.transpose()),
            _ => (h.clone(), momentum),
        };
        let rho = self.config.rho;
        let share = rho / (1.0 - self.config.betas.0.powi(self.step.min(i32::MAX as u64) as i32));
        let rest = (1.0 - rho) as f32;
        let y = kernels::gemm(h.clone().transpose(), old.clone(), Some(momentum.clone().transpose() * share), rest);
        let norm: Tensor<2> = kernels::sum_squares(y.clone()).sqrt().reshape([1, 1]);
        let y = y / (norm + TINY);
        let inner = kernels::gemm(momentum, y.clone(), None, 1.0);
        let outer = kernels::gemm(old.clone(), inner, None, share as f32);
        basis_on(self.side, linalg::orthonormal(kernels::gemm(h, y, Some(outer), rest)))
    }

    /// `P_new^T P_old`.
    fn change(&self, new: &Basis) -> Option<Tensor<2>> {
        let (new, old) = (directions(new)?.clone(), directions(self.basis.as_ref()?)?.clone());
        Some(kernels::gemm(new.transpose(), old, None, 1.0))
    }
}

impl MatrixOptimizer for LdAdam {
    fn step(&mut self, weight: Tensor<2>, collected: Tensor<2>, rule: StepRule) -> Tensor<2> {
        let gradient = scaled(collected, rule.gradient_scale);
        let h = match self.error.take() {
            Some(error) => gradient + error,
            None => gradient,
        };
        let started = Instant::now();
        let basis = self.next_basis(&h);
        self.seconds += started.elapsed().as_secs_f64();
        let low = basis.project(h.clone());
        self.energy = Some(Energy::of(&low, &h));
        let before = self.rule.momentum();
        let change = self.change(&basis);
        if let Some(change) = &change {
            self.rule.rotate(change);
        }
        // Both bases are orthonormal.
        self.overlap = change.map(|change| kernels::sum_squares(change) / self.rank as f64);
        if self.config.error_feedback {
            let lost = self.config.betas.0 / (1.0 - self.config.betas.0);
            self.error = Some(match (&self.basis, before, self.rule.momentum()) {
                (Some(old), Some(before), Some(after)) => {
                    let error = basis.add_back(h, low.clone() + after * lost, -1.0);
                    old.add_back(error, before, lost)
                }
                _ => basis.add_back(h, low.clone(), -1.0),
            });
        }
        let update = self.rule.step(low, rule.learning_rate);
        let weight = basis.add_back(decayed(weight, rule), update, -1.0);
        self.basis = Some(basis);
        self.step += 1;
        weight
    }

    fn save(&self) -> State {
        let mut state = State::default();
        self.rule.save(&mut state);
        state.numbers.insert("ldadam_step".to_owned(), self.step);
        if let Some(directions) = self.basis.as_ref().and_then(directions) {
            state.tensors.insert("basis".to_owned(), directions.clone());
        }
        if let Some(error) = &self.error {
            state.tensors.insert("error".to_owned(), error.clone());
        }
        state
    }

    fn restore(&mut self, mut state: State) -> Result<(), String> {
        self.step = state.number("ldadam_step")?;
        let shape = [projected_size(self.side, self.dims), self.rank];
        self.basis = state.optional_tensor("basis", shape)?.map(|directions| basis_on(self.side, directions));
        self.error = state.optional_tensor("error", self.dims)?;
        if self.step > 0 {
            self.rule.restore(&mut state)?;
            self.basis.as_ref().ok_or("basis is missing")?;
            if self.config.error_feedback {
                self.error.as_ref().ok_or("error is missing")?;
            }
        }
        Ok(())
    }

    fn report(&self) -> Report {
        Report {
            energy: self.energy.as_ref().map(Energy::share),
            refreshes: self.step,
            refresh_seconds: self.seconds,
            overlap: self.overlap.as_ref().map(scalar),
        }
    }

    fn state_bytes(&self) -> usize {
        let error = self.error.as_ref().map_or(0, |error| error.shape().num_elements());
        self.rule.state_bytes() + 4 * (self.basis.as_ref().map_or(0, Basis::len) + error)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::host_oracle::{Host, RULE, assert_resumes, device, random};
    use super::*;

    /// Q of `Y = QR`, diagonal of R positive, by Gram and Schmidt.
    fn gram_schmidt(y: &Host) -> Host {
        let mut q = y.clone();
        for j in 0..q.cols {
            for k in 0..j {
                let inner: f64 = (0..q.rows).map(|i| q.at(i, j) * q.at(i, k)).sum();
                q = Host::new(q.rows, q.cols, |i, c| q.at(i, c) - if c == j { inner * q.at(i, k) } else { 0.0 });
            }
            let norm = q.norms(0)[j];
            q = Host::new(q.rows, q.cols, |i, c| q.at(i, c) / if c == j { norm } else { 1.0 });
        }
        q
    }

    fn add(a: &Host, b: &Host, factor: f64) -> Host {
        a.zip(b, |a, b| a + factor * b)
    }

    /// Four steps against the formulas, all on the input side; `flip` runs the optimiser on the transposed problem.
    fn compare(config: &LdAdamConfig, flip: bool) {
        let (m, n, r) = (5, 7, config.rank);
        let turned = |host: &Host| if flip { host.t() } else { host.clone() };
        let mut optimizer = LdAdam::new(config.clone(), "w", 1, if flip { [n, m] } else { [m, n] });
        let (b1, b2) = config.betas;
        let mut weight = device(&turned(&Host::of(&random(7, m, n))));
        let (mut first, mut second) = (Host::zeros(r, n), Host::zeros(r, n));
        let mut error = Host::zeros(m, n);
        let mut old = Host::zeros(m, r);
        for t in 0..4 {
            let gradient = Host::of(&random(t as u64, m, n));
            let before = turned(&Host::of(&weight));
            weight = optimizer.step(weight, device(&turned(&gradient)), RULE);
            let saved = optimizer.save();
            let p = Host::of(&saved.tensors["basis"]);
            let h = add(&gradient.map(|g| 0.5 * g), &error, 1.0);
            let (c1, c2) = (1.0 - b1.powi(t), 1.0 - b2.powi(t));
            if t > 0 {
                let b = add(&h.map(|h| (1.0 - config.rho) * h), &old.mul(&first), config.rho / c1);
                p.assert_close(&gram_schmidt(&b.mul(&b.t().mul(&old))), 1e-4);
            }
            p.t().mul(&p).assert_close(&Host::new(r, r, |i, j| f64::from(u8::from(i == j))), 1e-5);
            let low = p.t().mul(&h);
            let rest = add(&h, &p.mul(&low), -1.0);
            assert!(p.t().mul(&rest).norm() < 1e-5);
            error = rest;
            if t > 0 {
                let c = p.t().mul(&old);
                let moved = c.mul(&first);
                let lost = add(&old.mul(&first), &p.mul(&moved), -1.0);
                error = add(&error, &lost, b1 / (1.0 - b1));
                let spread = second.zip(&first, |v, m| v / c2 - (m / c1).powi(2));
                second = c.map(|c| c * c).mul(&spread).zip(&moved, |v, m| c2 * (v + (m / c1).powi(2)).abs());
                first = moved;
            }
            if config.error_feedback {
                turned(&Host::of(&saved.tensors["error"])).assert_close(&error, 1e-4);
            } else {
                assert!(!saved.tensors.contains_key("error"));
                error = Host::zeros(m, n);
            }
            first = first.zip(&low, |m, r| b1 * m + (1.0 - b1) * r);
            second = second.zip(&low, |v, r| b2 * v + (1.0 - b2) * r * r);
            let (c1, c2) = (1.0 - b1.powi(t + 1), 1.0 - b2.powi(t + 1));
            let step = p.mul(&first.zip(&second, |m, v| (m / c1) / ((v / c2).sqrt() + config.eps)));
            let expected = before.zip(&step, |w, u| (1.0 - 0.05 * 0.1) * w - 0.05 * u);
            turned(&Host::of(&weight)).assert_close(&expected, 1e-4);
            old = p;
        }
        assert_eq!(optimizer.report().refreshes, 4);
        assert!((0.0..=1.001).contains(&optimizer.report().overlap.unwrap()));
    }

    #[test]
    fn steps_follow_the_formulas() {
        for error_feedback in [true, false] {
            let config = LdAdamConfig { rank: 3, error_feedback, ..LdAdamConfig::default() };
            compare(&config, false);
            compare(&config, true);
        }
    }

    #[test]
    fn a_basis_that_stays_is_plain_adam() {
        // Rows 0 and 1 of every gradient live on columns of their own, so B B^T is diagonal and P = [e_0, e_1] every
        // time.
        let mut optimizer = LdAdam::new(LdAdamConfig { rank: 2, ..LdAdamConfig::default() }, "w", 1, [4, 6]);
        let mut weight = random(7, 4, 6);
        let (mut plain, mut first, mut second) = (weight.clone(), weight.zeros_like(), weight.zeros_like());
        for t in 0..6u32 {
            let values = Host::of(&random(u64::from(t), 4, 6));
            let keep = |i: usize, j: usize| (i == 0 && j < 3) || (i == 1 && j >= 3);
            let size = |i: usize| if i == 0 { 3.0 } else { 1.0 };
            let gradient = device(&Host::new(4, 6, |i, j| if keep(i, j) { size(i) * values.at(i, j) } else { 0.0 }));
            weight = optimizer.step(weight, gradient.clone(), RULE);
            let rule = kernels::AdamW {
                learning_rate: 0.05,
                betas: (0.908, 0.99),
                eps: 1e-8,
                weight_decay: 0.1,
                step: t + 1,
                gradient_scale: 0.5,
            };
            (plain, first, second) = kernels::adamw(plain, first, second, gradient, rule);
            Host::of(&weight).assert_close(&Host::of(&plain), 1e-5);
            assert!(Host::of(&optimizer.save().tensors["error"]).norm() < 1e-5);
        }
        assert!((optimizer.report().overlap.unwrap() - 1.0).abs() < 1e-5);
        assert!((optimizer.report().energy.unwrap() - 1.0).abs() < 1e-5);
    }

    #[test]
    fn a_zero_gradient_gives_finite_steps() {
        let mut optimizer = LdAdam::new(LdAdamConfig { rank: 2, ..LdAdamConfig::default() }, "w", 1, [4, 6]);
        let mut weight = random(7, 4, 6);
        for size in [0.0, 0.0, 1e-12, 1.0] {
            weight = optimizer.step(weight, random(3, 4, 6) * size, RULE);
            assert!(linalg::host(weight.clone()).iter().all(|value| value.is_finite()));
        }
    }

    #[test]
    fn a_restored_optimiser_continues_bit_by_bit() {
        for error_feedback in [true, false] {
            for dims in [[5, 4], [4, 5]] {
                let config = LdAdamConfig { rank: 2, error_feedback, ..LdAdamConfig::default() };
                assert_resumes(|| Box::new(LdAdam::new(config.clone(), "w", 1, dims)), dims, 3, 6);
            }
        }
        let mut optimizer = LdAdam::new(LdAdamConfig { rank: 2, ..LdAdamConfig::default() }, "w", 1, [4, 6]);
        optimizer.step(random(1, 4, 6), random(2, 4, 6), RULE);
        assert_eq!(optimizer.state_bytes(), 4 * (4 * 2 + 2 * 2 * 6 + 4 * 6));
        let plain = LdAdamConfig { rank: 2, error_feedback: false, ..LdAdamConfig::default() };
        assert!(optimizer.restore(LdAdam::new(plain, "w", 1, [4, 6]).save()).is_ok());
    }
}
