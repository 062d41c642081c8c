//! APOLLO and APOLLO-Mini: the full gradient, scaled as a random low-rank image of it tells (arXiv 2412.05270).
//!
//! For `W [m, n]` with gradient G, written for the input side (output side: `[n, r]`, and rows for columns):
//!
//! ```text
//! every gap steps: P = fresh Gaussian entries of variance 1/r                    [m, r]
//! R = P^T G,  N = M / (sqrt(V) + eps)      M, V: moments of R                    [r, n]
//! s_j = ||N_j|| / (||R_j|| + 1e-8)         one number per column j (APOLLO)      [1, n]
//! s = ||N|| / (||R|| + 1e-8)               one number (APOLLO-Mini)              [1, 1]
//! U = sqrt(scale) s G                      with Fira's norm-growth limiter       [m, n]
//! W = (1 - lr decay) (W - lr sqrt(1 - b2^t) / (1 - b1^t) U)
//! ```
//!
//! Nothing is projected back. `sqrt(scale)` comes before the limiter with `scale_front`, else after it; the limiter
//! tells the difference only where norms are near its 1e-8. P depends on the seed, the name and the number of the
//! refresh alone, so a checkpoint does not hold it.
//!
//! State: `4 (2 r n + 1)` bytes on the input side, and P, `4 m r` bytes, which is kept between refreshes to save its
//! generation. Flops: `2 m n r` a step.

use std::time::Instant;

use burn::tensor::{Device, Tensor};

use super::one_side::{
    Limiter, basis_on, correction, decayed, one_side, overlap, projected_size, rank_axis, ratio, scalar, scaled,
};
use super::rules::{AdamForm, Rule, RuleConfig};
use super::subspace::{Basis, ProjType, Side};
use super::{MatrixOptimizer, Report, State, StepRule};
use crate::linalg;

/// Hyper-parameters, with the published defaults of APOLLO.
#[derive(Clone, Debug, PartialEq)]
pub struct ApolloConfig {
    /// r; at most the smaller dimension is used. Published: a quarter of the hidden size.
    pub rank: usize,
    /// Steps between two random bases.
    pub update_proj_gap: u64,
    /// The update is multiplied by its root.
    pub scale: f64,
    /// Whether that comes before the limiter.
    pub scale_front: bool,
    /// One factor for the whole matrix (APOLLO-Mini) instead of one per column or row.
    pub tensor_wise: bool,
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Side. Two sides have no columns to scale: `full` is read as `std`, and `auto` compares the states alone.
    pub proj_type: ProjType,
    /// Whether the norm of the update may grow by at most 1 % a step.
    pub limiter: bool,
}

impl Default for ApolloConfig {
    fn default() -> Self {
        Self {
            rank: 256,
            update_proj_gap: 200,
            scale: 1.0,
            scale_front: false,
            tensor_wise: false,
            betas: (0.9, 0.999),
            eps: 1e-6,
            proj_type: ProjType::Std,
            limiter: true,
        }
    }
}

impl ApolloConfig {
    /// APOLLO-Mini: rank 1 and one factor.
    pub fn mini() -> Self {
        Self { rank: 1, scale: 128.0, tensor_wise: true, ..Self::default() }
    }
}

/// APOLLO on one matrix.
#[derive(Debug)]
pub struct Apollo {
    config: ApolloConfig,
    name: String,
    seed: u64,
    dims: [usize; 2],
    rank: usize,
    side: Side,
    rule: Box<dyn Rule>,
    /// Number of the refresh, and its P.
    basis: Option<(u64, Basis)>,
    limiter: Limiter,
    /// Steps done.
    step: u64,
    seconds: f64,
    overlap: Option<Tensor<1>>,
}

impl Apollo {
    /// APOLLO for the matrix `name` of shape `[m, n]`.
    pub fn new(config: ApolloConfig, name: &str, seed: u64, dims: [usize; 2]) -> Self {
        let rank = config.rank.min(dims[0]).min(dims[1]);
        let side = one_side(config.proj_type, dims, rank);
        let rule = RuleConfig::AdamW { betas: config.betas, eps: config.eps, form: AdamForm::Hf };
        Self {
            rule: rule.build(rank_axis(side)),
            name: name.to_owned(),
            config,
            seed,
            dims,
            rank,
            side,
            basis: None,
            limiter: Limiter::default(),
            step: 0,
            seconds: 0.0,
            overlap: None,
        }
    }

    fn gap(&self) -> u64 {
        self.config.update_proj_gap.max(1)
    }

    /// The P of a refresh.
    fn random_basis(&self, refresh: u64, device: &Device) -> Basis {
        let rows = projected_size(self.side, self.dims);
        let deviation = (1.0 / self.rank as f64).sqrt();
        let name = format!("{} apollo {refresh}", self.name);
        basis_on(self.side, linalg::gaussian(self.seed, &name, rows, self.rank, deviation, device))
    }

    /// The P of the coming step.
    fn basis(&mut self, device: &Device) -> Basis {
        let refresh = self.step / self.gap();
        match self.basis.take() {
            Some((current, basis)) if current == refresh => basis,
            old => {
                let started = Instant::now();
                let basis = self.random_basis(refresh, device);
                // A restored state has no basis; the last one follows from the seed too.
                let old = old.map(|(_, old)| old);
                let old = old.or_else(|| Some(self.random_basis(refresh.checked_sub(1)?, device)));
                self.overlap = old.and_then(|old| overlap(&basis, &old));
                self.seconds += started.elapsed().as_secs_f64();
                basis
            }
        }
    }

    /// s.
    fn factor(&self, normed: &Tensor<2>, low: &Tensor<2>) -> Tensor<2> {
        if !self.config.tensor_wise {
            return ratio(normed, low, rank_axis(self.side));
        }
        let flat = |values: &Tensor<2>| -> Tensor<2> { values.clone().reshape([1, values.shape().num_elements()]) };
        ratio(&flat(normed), &flat(low), 1)
    }
}

impl MatrixOptimizer for Apollo {
    fn step(&mut self, weight: Tensor<2>, collected: Tensor<2>, rule: StepRule) -> Tensor<2> {
        let gradient = scaled(collected, rule.gradient_scale);
        let basis = self.basis(&gradient.device());
        let low = basis.project(gradient.clone());
        self.basis = Some((self.step / self.gap(), basis));
        self.step += 1;
        // The rule multiplies by the learning rate and the correction: with its inverse, what comes out is N.
        let correction = correction(self.config.betas, self.step);
        let normed = self.rule.step(low.clone(), 1.0 / correction);
        let factor = self.factor(&normed, &low);
        let root = self.config.scale.sqrt();
        let (front, rear) = if self.config.scale_front { (root, 1.0) } else { (1.0, root) };
        let update = gradient * scaled(factor, front);
        let update = if self.config.limiter { self.limiter.apply(update) } else { update };
        decayed(weight - update * (rule.learning_rate * correction * rear), rule)
    }

    fn save(&self) -> State {
        let mut state = State::default();
        self.rule.save(&mut state);
        self.limiter.save(&mut state);
        state.numbers.insert("apollo_step".to_owned(), self.step);
        state
    }

    fn restore(&mut self, mut state: State) -> Result<(), String> {
        self.step = state.number("apollo_step")?;
        self.basis = None;
        self.limiter.restore(&mut state)?;
        if self.step > 0 {
            self.rule.restore(&mut state)?;
        }
        let mut shape = self.dims;
        shape[rank_axis(self.side)] = self.rank;
        match self.rule.momentum().map(|momentum| momentum.dims()) {
            Some(found) if found != shape => Err(format!("moments have shape {found:?}, expected {shape:?}")),
            _ => Ok(()),
        }
    }

    /// No energy: a random projection keeps a gradient's length on average, whatever its rank.
    fn report(&self) -> Report {
        Report {
            energy: None,
            refreshes: self.step.div_ceil(self.gap()),
            refresh_seconds: self.seconds,
            overlap: self.overlap.as_ref().map(scalar),
        }
    }

    fn state_bytes(&self) -> usize {
        let basis = self.basis.as_ref().map_or(0, |(_, basis)| basis.len());
        self.rule.state_bytes() + 4 * basis + self.limiter.bytes()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::host_oracle::{Host, HostAdam, RULE, assert_resumes, random};
    use super::super::one_side::directions;
    use super::*;

    /// Four steps against the formulas.
    fn compare(dims: [usize; 2], config: &ApolloConfig) {
        let [m, n] = dims;
        let mut apollo = Apollo::new(config.clone(), "w", 5, dims);
        let is_input = m <= n;
        let axis = usize::from(!is_input);
        let r = config.rank;
        let mut adam =
            HostAdam::new(if is_input { r } else { m }, if is_input { n } else { r }, config.betas, config.eps);
        let mut weight = random(7, m, n);
        let mut previous: Option<f64> = None;
        for t in 1..=4u64 {
            let gradient = random(t, m, n) * if t == 3 { 5.0 } else { 1.0 };
            let before = Host::of(&weight);
            weight = apollo.step(weight, gradient.clone(), RULE);
            let g = Host::of(&gradient).map(|g| 0.5 * g);
            let p = Host::of(directions(&apollo.basis.as_ref().unwrap().1).unwrap());
            let drawn = apollo.random_basis((t - 1) / 3, &weight.device());
            assert_eq!(p.values, Host::of(directions(&drawn).unwrap()).values);
            let low = if is_input { p.t().mul(&g) } else { g.mul(&p) };
            let normed = adam.normed(&low);
            let (from, to) = if config.tensor_wise {
                (vec![low.norm(); m.max(n)], vec![normed.norm(); m.max(n)])
            } else {
                (low.norms(axis), normed.norms(axis))
            };
            let s: Vec<f64> = to.iter().zip(from).map(|(n, r)| n / (r + 1e-8)).collect();
            let root = config.scale.sqrt();
            let front = if config.scale_front { root } else { 1.0 };
            let mut u = Host::new(m, n, |i, j| g.at(i, j) * s[if is_input { j } else { i }] * front);
            if let (Some(previous), true) = (previous, config.limiter) {
                let l = (u.norm() / (previous + 1e-8)).max(1.01) / 1.01;
                u = u.map(|u| u / l);
            }
            previous = Some(u.norm());
            let size = 0.05 * correction(config.betas, t) * root / front;
            let expected = before.zip(&u, |w, u| 0.995 * (w - size * u));
            Host::of(&weight).assert_close(&expected, 1e-5);
        }
        assert_eq!(apollo.report().refreshes, 2);
    }

    #[test]
    fn steps_follow_the_formulas() {
        let apollo = ApolloConfig { rank: 2, update_proj_gap: 3, ..ApolloConfig::default() };
        let mini = ApolloConfig { update_proj_gap: 3, ..ApolloConfig::mini() };
        for config in [
            apollo.clone(),
            ApolloConfig { limiter: false, scale: 4.0, ..apollo.clone() },
            ApolloConfig { scale: 4.0, scale_front: true, ..apollo },
            mini.clone(),
            ApolloConfig { scale_front: true, ..mini },
        ] {
            compare([4, 6], &config);
            compare([6, 4], &config);
        }
    }

    #[test]
    fn columns_keep_their_direction_and_the_first_step_its_size() {
        // At t = 1 and eps = 0, |N| = (1 - b1) / sqrt(1 - b2), so a column steps by lr sqrt(r) / ||R_j|| of itself.
        let config = ApolloConfig { rank: 3, eps: 0.0, ..ApolloConfig::default() };
        let mut apollo = Apollo::new(config, "w", 5, [4, 6]);
        let gradient = random(1, 4, 6);
        let rule = StepRule { learning_rate: 1.0, weight_decay: 0.0, gradient_scale: 1.0 };
        let step = Host::of(&(apollo.step(Tensor::zeros([4, 6], &Device::flex()), gradient.clone(), rule) * -1.0));
        let p = Host::of(directions(&apollo.basis.as_ref().unwrap().1).unwrap());
        let g = Host::of(&gradient);
        let low = p.t().mul(&g).norms(0);
        step.assert_close(&Host::new(4, 6, |i, j| g.at(i, j) * 3f64.sqrt() / low[j]), 1e-5);
    }

    #[test]
    fn a_scaled_loss_changes_nothing_without_eps() {
        // N does not change with the length of G, so neither does s G.
        let run = |length: f64| {
            let config = ApolloConfig { rank: 2, eps: 0.0, update_proj_gap: 2, ..ApolloConfig::default() };
            let mut apollo = Apollo::new(config, "w", 5, [4, 6]);
            (0..4).fold(random(7, 4, 6), |weight, t| apollo.step(weight, random(t, 4, 6) * length, RULE))
        };
        Host::of(&run(8.0)).assert_close(&Host::of(&run(1.0)), 1e-5);
    }

    #[test]
    fn bases_have_variance_one_over_r_and_differ() {
        let config = ApolloConfig { rank: 16, ..ApolloConfig::default() };
        let mut apollo = Apollo::new(config.clone(), "w", 5, [256, 300]);
        let device = Device::flex();
        let values = |apollo: &Apollo, refresh| {
            linalg::host(directions(&apollo.random_basis(refresh, &device)).unwrap().clone())
        };
        let first = values(&apollo, 0);
        let mean = first.iter().map(|value| f64::from(value * value)).sum::<f64>() / first.len() as f64;
        // Standard error of a mean of 4096 squares: sqrt(2 / 4096) of it; the bound is four of them.
        assert!((mean * 16.0 - 1.0).abs() < 0.09, "{mean}");
        assert_ne!(first, values(&apollo, 1));
        assert_ne!(first, values(&Apollo::new(config.clone(), "v", 5, [256, 300]), 0));
        assert_ne!(first, values(&Apollo::new(config, "w", 6, [256, 300]), 0));
        apollo.step(random(1, 256, 300), random(2, 256, 300), RULE);
        assert_eq!(values(&apollo, 0), first);
    }

    #[test]
    fn a_restored_optimiser_continues_bit_by_bit() {
        for split in [0, 1, 3, 4] {
            for config in [ApolloConfig { rank: 2, ..ApolloConfig::default() }, ApolloConfig::mini()] {
                let config = ApolloConfig { update_proj_gap: 3, ..config };
                let new = || -> Box<dyn MatrixOptimizer> { Box::new(Apollo::new(config.clone(), "w", 1, [5, 4])) };
                assert_resumes(new, [5, 4], split, 8);
            }
        }
        let mut apollo = Apollo::new(ApolloConfig { rank: 2, ..ApolloConfig::default() }, "w", 1, [4, 6]);
        apollo.step(random(1, 4, 6), random(2, 4, 6), RULE);
        assert!(apollo.save().tensors.values().all(|tensor| tensor.dims() != [4, 2]), "P is not saved");
        assert_eq!(apollo.state_bytes(), 4 * (2 * 2 * 6 + 1 + 4 * 2));
        let mut other = Apollo::new(ApolloConfig { rank: 3, ..ApolloConfig::default() }, "w", 1, [4, 6]);
        assert!(other.restore(apollo.save()).is_err());
    }
}
