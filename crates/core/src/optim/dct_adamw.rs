//! DCT-AdamW: the basis is r columns of a fixed cosine basis, chosen by gradient energy (arXiv 2505.17967).
//!
//! For `W [m, n]` with gradient G, written for the input side, which is taken where `m <= n` (output side: scores of
//! the columns of `G Q`); Q is the orthonormal DCT-II basis of size `d = min(m, n)`, its directions in columns:
//!
//! ```text
//! A = G + E                                  with error feedback                 [m, n]
//! S = Q^T A                                  on steps 1, gap, 2 gap, ...         [m, n]
//! keep the r rows of S with the largest l2 (or l1) norm, ties by lowest index; P = those columns of Q, in index order
//! M = O^T M,  V = |O^T V|,  O = P_old^T P                                        [r, n]
//! R = P^T A,  E = A - P R                                                        [r, n], [m, n]
//! W = (1 - lr decay) W - lr P AdamW(R)       torch form
//! ```
//!
//! All directions come from one orthogonal matrix, so O is a 0/1 matrix with at most one 1 a row and column: moments of
//! directions that stay are moved, those of new ones start at 0 (`rotate_subspace`). Indices are stored in ascending
//! order; the released code stores them by score, so without the rotation its rows meet different old moments.
//!
//! With the l2 score, `||A - P R||^2 = ||A||^2 - (kept scores) <= (1 - r / d) ||A||^2`, and no other r columns of Q do
//! better.
//!
//! `projected = true` never forms G: between refreshes the backward pass hands over R alone. A refresh sees the factors
//! `x [t, m]` and `dy [t, n]` of its first micro batch and selects from
//!
//! * the exact scores `||q_j^T G||^2 = diag((x Q)^T (dy dy^T) (x Q))` where `t < m n / (m + n)`;
//! * else a sketch: squared row norms of `Q^T (x^T (dy S))` with S Gaussian, 32 columns of variance 1/32. Unbiased,
//!   with a relative deviation of 1/4 a score, so directions near the r-th place may be exchanged, and the
//!   bound above holds approximately.
//!
//! Later micro batches of that step use the same selection: the first one speaks for the whole batch. Sums of absolute
//! values cannot be computed from factors, and error feedback needs G: [`DctAdamWConfig::check`] refuses both.
//!
//! State on the input side: `4 (2 r n + r)` bytes, and `4 m n` for E; Q is shared by all matrices of one d. Flops:
//! `2 d m n` to select, `2 m n r` to project without, `2 m n r` for the update. Scores, indices and what follows from them stay on
//! the device.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use burn::tensor::{DType, Device, Int, IntDType, Tensor, TensorData};
use lowrank_kernels as kernels;

use super::one_side::{Energy, basis_on, decayed, one_side, projected_size, rank_axis, scaled};
use super::subspace::{Basis, ProjType, Side};
use super::{MatrixOptimizer, Report, State, StepRule};
use crate::linalg;
use crate::projection::Gradient;

/// Columns of the sketch of the scores.
const SKETCH: usize = 32;

/// The cosine bases in use, one for each size and device. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct DctBases(Arc<Mutex<Vec<(Device, Tensor<2>)>>>);

impl DctBases {
    /// Q, `[d, d]`.
    pub fn get(&self, d: usize, device: &Device) -> Tensor<2> {
        let mut bases = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, basis)) = bases.iter().find(|(place, basis)| place == device && basis.dims()[0] == d) {
            return basis.clone();
        }
        let basis = linalg::dct::basis(d, device);
        bases.push((device.clone(), basis.clone()));
        basis
    }

    /// Bytes of all bases.
    pub fn bytes(&self) -> usize {
        let bases = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bases.iter().map(|(_, basis)| 4 * basis.shape().num_elements()).sum()
    }
}

/// How much of the gradient a direction carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Score {
    /// Sum of absolute values, the released code's default.
    L1,
    /// Sum of squares: optimal for the projection error, and known from sketches.
    #[default]
    L2,
}

/// Hyper-parameters. Published defaults, except for the score and the rotation.
#[derive(Clone, Debug, PartialEq)]
pub struct DctAdamWConfig {
    /// r; at most the smaller dimension is used.
    pub rank: usize,
    /// Steps between two selections.
    pub update_proj_gap: u64,
    /// Score.
    pub score: Score,
    /// Whether moments follow their directions.
    pub rotate_subspace: bool,
    /// Whether what the projection loses comes back in the next step, at the price of a buffer of the gradient's size.
    pub error_feedback: bool,
    /// Whether the gradient is projected in the backward pass.
    pub projected: bool,
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the root of the corrected second moment.
    pub eps: f64,
}

impl Default for DctAdamWConfig {
    fn default() -> Self {
        Self {
            rank: 128,
            update_proj_gap: 1,
            score: Score::L2,
            rotate_subspace: true,
            error_feedback: false,
            projected: false,
            betas: (0.9, 0.999),
            eps: 1e-8,
        }
    }
}

impl DctAdamWConfig {
    /// What a projected backward pass cannot do, in words.
    pub fn check(&self) -> Result<(), String> {
        if self.projected && self.error_feedback {
            return Err("error feedback needs the whole gradient: set projected or error_feedback to false".to_owned());
        }
        if self.projected && self.score == Score::L1 {
            return Err("the l1 score needs the whole gradient: set projected to false or score to l2".to_owned());
        }
        Ok(())
    }
}

/// DCT-AdamW on one matrix.
#[derive(Debug)]
pub struct DctAdamW {
    config: DctAdamWConfig,
    name: String,
    seed: u64,
    dims: [usize; 2],
    rank: usize,
    side: Side,
    bases: DctBases,
    /// Columns of Q in use, ascending, `[r]` i32.
    indices: Option<Tensor<1, Int>>,
    /// M and V, shaped as R.
    moments: Option<(Tensor<2>, Tensor<2>)>,
    /// E.
    error: Option<Tensor<2>>,
    /// Steps done.
    step: u64,
    refreshes: u64,
    /// The first micro batch of this step is yet to select.
    is_selecting: bool,
    /// The coming step gets R instead of G.
    is_projected: bool,
    seconds: f64,
    energy: Option<Energy>,
    /// How many directions the last selection kept, read only when somebody asks.
    kept: Option<Tensor<1, Int>>,
}

impl DctAdamW {
    /// DCT-AdamW for the matrix `name` of shape `[m, n]`, with bases to share. A `projected` that
    /// [`DctAdamWConfig::check`] refuses is ignored.
    pub fn new(config: DctAdamWConfig, name: &str, seed: u64, dims: [usize; 2], bases: DctBases) -> Self {
        let rank = config.rank.min(dims[0]).min(dims[1]);
        Self {
            side: one_side(ProjType::Std, dims, rank),
            config: DctAdamWConfig { projected: config.projected && config.check().is_ok(), ..config },
            name: name.to_owned(),
            seed,
            dims,
            rank,
            bases,
            indices: None,
            moments: None,
            error: None,
            step: 0,
            refreshes: 0,
            is_selecting: false,
            is_projected: false,
            seconds: 0.0,
            energy: None,
            kept: None,
        }
    }

    /// The columns of Q in use; waits for the device.
    pub fn indices(&self) -> Option<Vec<u32>> {
        let data = self.indices.clone()?.into_data();
        Some(data.iter::<i64>().map(|index| index as u32).collect())
    }

    /// d.
    fn size(&self) -> usize {
        projected_size(self.side, self.dims)
    }

    fn is_due(&self) -> bool {
        self.indices.is_none() || (self.step + 1).is_multiple_of(self.config.update_proj_gap.max(1))
    }

    /// The chosen columns of Q, gathered anew: keeping them would cost more than they do.
    fn basis(&self, device: &Device) -> Basis {
        let q = self.bases.get(self.size(), device);
        let chosen = self.indices.clone().unwrap_or_else(|| indices_on(&[], device));
        basis_on(self.side, q.select(1, chosen))
    }

    /// Takes the r best directions into use, and moves the moments.
    fn select(&mut self, scores: Tensor<2>) -> Tensor<1, Int> {
        let new = kernels::top_columns(scores, self.rank);
        self.refreshes += 1;
        if let Some(old) = self.indices.replace(new.clone()) {
            let sources = Sources::of(&new, old);
            if let Some((m, v)) = self.moments.take_if(|_| self.config.rotate_subspace) {
                let axis = rank_axis(self.side);
                self.moments = Some((sources.moved(m, axis), sources.moved(v, axis)));
            }
            self.kept = Some(sources.is_kept.sum());
        }
        new
    }

    /// Selects from a gradient and returns its projection, which is a part of the same product.
    fn select_dense(&mut self, gradient: &Tensor<2>) -> Tensor<2> {
        let started = Instant::now();
        let device = gradient.device();
        let q = self.bases.get(self.size(), &device);
        let all = match self.side {
            Side::Output => kernels::gemm(gradient.clone(), q, None, 1.0),
            _ => kernels::gemm(q.transpose(), gradient.clone(), None, 1.0),
        };
        let weighted = if self.config.score == Score::L1 { all.clone().abs() } else { all.clone().square() };
        let chosen = self.select(weighted.sum_dim(1 - rank_axis(self.side)));
        self.seconds += started.elapsed().as_secs_f64();
        all.select(rank_axis(self.side), chosen)
    }

    /// `||q_j^T x^T dy||^2` (output side: `||x^T dy q_j||^2`) for every direction, exactly or by a sketch.
    fn factor_scores(&self, x: &Tensor<2>, dy: &Tensor<2>) -> Tensor<2> {
        let [m, n] = self.dims;
        let tokens = x.dims()[0];
        // From here on as on the input side: `inside` has the columns that Q meets.
        let (inside, outside) = if self.side == Side::Output { (dy, x) } else { (x, dy) };
        let q = self.bases.get(self.size(), &x.device());
        if tokens * (m + n) < m * n {
            let turned = kernels::gemm(inside.clone(), q, None, 1.0);
            let gram = kernels::gemm(outside.clone(), outside.clone().transpose(), None, 1.0);
            (turned.clone() * kernels::gemm(gram, turned, None, 1.0)).sum_dim(0)
        } else {
            let name = format!("{} dct {}", self.name, self.refreshes);
            let deviation = (1.0 / SKETCH as f64).sqrt();
            let start = linalg::gaussian(self.seed, &name, outside.dims()[1], SKETCH, deviation, &x.device());
            let thin = kernels::gemm(outside.clone(), start, None, 1.0);
            let sketch = kernels::gemm(inside.clone().transpose(), thin, None, 1.0);
            kernels::gemm(q.transpose(), sketch, None, 1.0).square().sum_dim(1)
        }
    }

    /// The projection of a whole gradient, with selection and error feedback, and the scale it still needs.
    fn project(&mut self, collected: Tensor<2>, scale: f64) -> (Tensor<2>, f64) {
        let (gradient, scale) = match (self.config.error_feedback, self.error.take()) {
            (true, Some(error)) => (scaled(collected, scale) + error, 1.0),
            (true, None) => (scaled(collected, scale), 1.0),
            (false, _) => (collected, scale),
        };
        let low = match self.is_due() {
            true => self.select_dense(&gradient),
            false => self.basis(&gradient.device()).project(gradient.clone()),
        };
        self.energy = Some(Energy::of(&low, &gradient));
        if self.config.error_feedback {
            self.error = Some(self.basis(&gradient.device()).add_back(gradient, low.clone(), -1.0));
        }
        (low, scale)
    }
}

/// Where the directions of a selection were in the one before.
struct Sources {
    /// Places, 0 where there was none.
    places: Tensor<1, Int>,
    /// 1 where there was one, else 0; `[r, 1]`.
    is_kept: Tensor<2, Int>,
}

impl Sources {
    fn of(new: &Tensor<1, Int>, old: Tensor<1, Int>) -> Self {
        let (r, device) = (new.dims()[0], new.device());
        let same = new.clone().reshape([r, 1]).expand([r, r]).equal(old.reshape([1, r]).expand([r, r]));
        let same = same.int().cast(IntDType::I32); // at most one 1 a row
        let place = Tensor::<1, Int>::arange(0..r as i64, (&device, DType::I32)).reshape([1, r]).expand([r, r]);
        Self { places: (same.clone() * place).sum_dim(1).reshape([r]), is_kept: same.sum_dim(1) }
    }

    /// `O^T M`: the rows (axis 0) or columns of M at their new places, 0 where there is no source.
    fn moved(&self, moment: Tensor<2>, axis: usize) -> Tensor<2> {
        let dims = moment.dims();
        let mut wide = [1, 1];
        wide[axis] = dims[axis];
        let is_new = self.is_kept.clone().reshape(wide).equal_scalar(0).expand(dims);
        moment.select(axis, self.places.clone()).mask_fill(is_new, 0.0f32)
    }
}

/// Indices as a tensor.
fn indices_on(indices: &[u32], device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = indices.iter().map(|&index| index as i32).collect();
    Tensor::from_data(TensorData::new(values, [indices.len()]), (device, DType::I32))
}

impl MatrixOptimizer for DctAdamW {
    fn collect(&mut self, _micro_batches: usize) -> Gradient {
        self.is_projected = self.config.projected;
        self.is_selecting = self.config.projected && self.is_due();
        match &self.moments {
            _ if !self.config.projected => Gradient::Full,
            Some((first, _)) if !self.is_selecting => {
                let Basis { left, right } = self.basis(&first.device());
                Gradient::Projected { left: left.map(Into::into), right: right.map(Into::into), pending: None }
            }
            _ => Gradient::factors(),
        }
    }

    fn observe(&mut self, x: Tensor<2>, dy: Tensor<2>) -> Tensor<2> {
        if std::mem::take(&mut self.is_selecting) {
            let started = Instant::now();
            let scores = self.factor_scores(&x, &dy);
            self.select(scores);
            self.seconds += started.elapsed().as_secs_f64();
        }
        let Basis { left, right } = self.basis(&x.device());
        let rows = match left {
            Some(left) => kernels::gemm(x, left, None, 1.0),
            None => x,
        };
        let columns = match right {
            Some(right) => kernels::gemm(dy, right, None, 1.0),
            None => dy,
        };
        kernels::gemm(rows.transpose(), columns, None, 1.0)
    }

    fn step(&mut self, weight: Tensor<2>, collected: Tensor<2>, rule: StepRule) -> Tensor<2> {
        let (low, scale) = match std::mem::take(&mut self.is_projected) {
            true => (collected, rule.gradient_scale),
            false => self.project(collected, rule.gradient_scale),
        };
        self.step += 1;
        let (first, second) = self.moments.take().unwrap_or_else(|| (low.zeros_like(), low.zeros_like()));
        let adamw = kernels::AdamW {
            learning_rate: rule.learning_rate,
            betas: self.config.betas,
            eps: self.config.eps,
            weight_decay: 0.0,
            step: self.step.min(i32::MAX as u64) as u32,
            gradient_scale: scale,
        };
        // AdamW on a parameter that is 0: what comes out is minus the step.
        let (update, first, second) = kernels::adamw(low.zeros_like(), first, second, low, adamw);
        self.moments = Some((first, second));
        self.basis(&weight.device()).add_back(decayed(weight, rule), update, 1.0)
    }

    fn save(&self) -> State {
        let mut state = State::default();
        state.numbers.insert("dct_step".to_owned(), self.step);
        state.numbers.insert("refreshes".to_owned(), self.refreshes);
        if let Some(indices) = self.indices() {
            state.bytes.insert("indices".to_owned(), indices.iter().flat_map(|index| index.to_le_bytes()).collect());
        }
        if let Some((first, second)) = &self.moments {
            state.tensors.insert("first".to_owned(), first.clone());
            state.tensors.insert("second".to_owned(), second.clone());
        }
        if let Some(error) = &self.error {
            state.tensors.insert("error".to_owned(), error.clone());
        }
        state
    }

    fn restore(&mut self, mut state: State) -> Result<(), String> {
        self.step = state.number("dct_step")?;
        self.refreshes = state.number("refreshes")?;
        let indices = state.bytes.remove("indices").map(|bytes| self.read_indices(&bytes)).transpose()?;
        let mut shape = self.dims;
        shape[rank_axis(self.side)] = self.rank;
        let (first, second) = (state.optional_tensor("first", shape)?, state.optional_tensor("second", shape)?);
        self.moments = first.zip(second);
        self.error = state.optional_tensor("error", self.dims)?;
        // Without moments no step was made, and the first one selects.
        let device = self.moments.as_ref().map(|(first, _)| first.device());
        self.indices = indices.as_ref().zip(device).map(|(indices, device)| indices_on(indices, &device));
        if self.step > 0 {
            indices.as_ref().ok_or("indices are missing")?;
            self.moments.as_ref().ok_or("first or second is missing")?;
            if self.config.error_feedback {
                self.error.as_ref().ok_or("error is missing")?;
            }
        }
        Ok(())
    }

    /// The energy is unknown where only R is.
    fn report(&self) -> Report {
        Report {
            energy: self.energy.as_ref().map(Energy::share),
            refreshes: self.refreshes,
            refresh_seconds: self.seconds,
            overlap: self.kept.as_ref().map(|kept| kept.clone().into_scalar::<i32>() as f64 / self.rank as f64),
        }
    }

    fn state_bytes(&self) -> usize {
        let elements = |tensor: &Tensor<2>| tensor.shape().num_elements();
        let moments = self.moments.as_ref().map_or(0, |(first, second)| elements(first) + elements(second));
        let error = self.error.as_ref().map_or(0, elements);
        4 * (self.indices.as_ref().map_or(0, |_| self.rank) + moments + error)
    }
}

impl DctAdamW {
    /// Indices as [`MatrixOptimizer::save`] writes them: u32, little endian.
    fn read_indices(&self, bytes: &[u8]) -> Result<Vec<u32>, String> {
        let (words, rest) = bytes.as_chunks::<4>();
        let indices: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let is_ascending = indices.is_sorted_by(|a, b| a < b);
        let is_inside = indices.last().is_some_and(|&last| (last as usize) < self.size());
        if rest.is_empty() && indices.len() == self.rank && is_ascending && is_inside {
            Ok(indices)
        } else {
            Err(format!("indices must be {} ascending numbers below {}, got {indices:?}", self.rank, self.size()))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::FloatDType;

    use super::super::host_oracle::{Host, RULE, assert_resumes, device, random};
    use super::*;
    use crate::Directions;

    fn optimizer(config: &DctAdamWConfig, dims: [usize; 2]) -> DctAdamW {
        DctAdamW::new(config.clone(), "w", 3, dims, DctBases::default())
    }

    fn small() -> DctAdamWConfig {
        DctAdamWConfig { rank: 3, ..DctAdamWConfig::default() }
    }

    fn q(d: usize) -> Host {
        Host::of(&linalg::dct::basis(d, &Device::flex()))
    }

    /// Some columns of Q.
    fn columns(q: &Host, indices: &[u32]) -> Host {
        Host::new(q.rows, indices.len(), |i, j| q.at(i, indices[j] as usize))
    }

    /// Six steps against the formulas, all on the input side; `flip` runs the optimiser on the transposed problem.
    fn compare(config: &DctAdamWConfig, flip: bool) {
        let (m, n, r) = (6, 9, config.rank);
        let turned = |host: &Host| if flip { host.t() } else { host.clone() };
        let mut dct = optimizer(config, if flip { [n, m] } else { [m, n] });
        let (b1, b2) = config.betas;
        let q = q(m);
        let mut weight = device(&turned(&Host::of(&random(7, m, n))));
        let (mut first, mut second) = (Host::zeros(r, n), Host::zeros(r, n));
        let mut error = Host::zeros(m, n);
        let mut old: Option<Vec<u32>> = None;
        for t in 1..=6 {
            let gradient = Host::of(&random(t as u64, m, n));
            let before = turned(&Host::of(&weight));
            weight = dct.step(weight, device(&turned(&gradient)), RULE);
            let a = gradient.map(|g| 0.5 * g).zip(&error, |g, e| g + e);
            if t == 1 || t % config.update_proj_gap as i32 == 0 {
                let s = q.t().mul(&a);
                let power = if config.score == Score::L1 { 1 } else { 2 };
                let score = |i: usize| (0..n).map(|j| s.at(i, j).abs().powi(power)).sum::<f64>();
                let mut order: Vec<usize> = (0..m).collect();
                order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
                let mut chosen: Vec<u32> = order[..r].iter().map(|&index| index as u32).collect();
                chosen.sort_unstable();
                assert_eq!(dct.indices().unwrap(), chosen);
                if let (Some(old), true) = (&old, config.rotate_subspace) {
                    // The explicit O^T M.
                    let o = columns(&q, old).t().mul(&columns(&q, &chosen));
                    first = o.t().mul(&first);
                    second = o.t().mul(&second).map(f64::abs);
                }
                old = Some(chosen);
            }
            let p = columns(&q, old.as_ref().unwrap());
            let low = p.t().mul(&a);
            if config.error_feedback {
                error = a.zip(&p.mul(&low), |a, inside| a - inside);
                turned(&Host::of(dct.error.as_ref().unwrap())).assert_close(&error, 1e-5);
            }
            first = first.zip(&low, |m, r| b1 * m + (1.0 - b1) * r);
            second = second.zip(&low, |v, r| b2 * v + (1.0 - b2) * r * r);
            let (c1, c2) = (1.0 - b1.powi(t), 1.0 - b2.powi(t));
            let step = p.mul(&first.zip(&second, |m, v| (m / c1) / ((v / c2).sqrt() + config.eps)));
            let expected = before.zip(&step, |w, u| (1.0 - 0.05 * 0.1) * w - 0.05 * u);
            turned(&Host::of(&weight)).assert_close(&expected, 1e-5);
            // Contraction, and what is lost is exactly what is not kept.
            let lost = a.zip(&p.mul(&low), |a, inside| a - inside).norm().powi(2);
            assert!((lost - (a.norm().powi(2) - low.norm().powi(2))).abs() < 1e-4 * a.norm().powi(2));
            if config.score == Score::L2 && config.update_proj_gap == 1 {
                assert!(lost <= (1.0 - r as f64 / m as f64) * a.norm().powi(2) * 1.000_01);
            }
        }
    }

    #[test]
    fn steps_follow_the_formulas() {
        for config in [
            small(),
            DctAdamWConfig { update_proj_gap: 3, ..small() },
            DctAdamWConfig { score: Score::L1, update_proj_gap: 2, ..small() },
            DctAdamWConfig { error_feedback: true, ..small() },
            DctAdamWConfig { rotate_subspace: false, ..small() },
        ] {
            compare(&config, false);
            compare(&config, true);
        }
    }

    #[test]
    fn no_other_directions_do_better() {
        let gradient = random(4, 5, 8);
        let mut dct = optimizer(&DctAdamWConfig { rank: 2, ..small() }, [5, 8]);
        dct.step(random(1, 5, 8), gradient.clone(), RULE);
        let (q, g) = (q(5), Host::of(&gradient));
        let kept = |indices: &[u32]| columns(&q, indices).t().mul(&g).norm();
        let ours = kept(&dct.indices().unwrap());
        for a in 0..5 {
            for b in 0..a {
                assert!(kept(&[b, a]) <= ours + 1e-6);
            }
        }
        let energy = dct.report().energy.unwrap();
        assert!((energy - (ours / g.norm()).powi(2)).abs() < 1e-5);
    }

    #[test]
    fn all_directions_lose_nothing() {
        let mut dct = optimizer(&DctAdamWConfig { rank: 9, error_feedback: true, ..small() }, [4, 6]);
        dct.step(random(1, 4, 6), random(2, 4, 6), RULE);
        assert_eq!(dct.indices().unwrap(), [0, 1, 2, 3]);
        assert!(Host::of(dct.error.as_ref().unwrap()).norm() < 1e-5);
    }

    /// Moments follow their directions, whichever are new; the share that was kept is what the indices say.
    #[test]
    fn moments_follow_their_directions() {
        let device = Device::flex();
        for (old, new) in
            [([1, 4, 7], [1, 4, 7]), ([1, 4, 7], [0, 4, 9]), ([1, 4, 7], [4, 5, 7]), ([1, 2, 3], [4, 5, 6])]
        {
            let sources = Sources::of(&indices_on(&new, &device), indices_on(&old, &device));
            let moment = Host::of(&random(5, 3, 4));
            for axis in [0, 1] {
                let turned = |host: &Host| if axis == 0 { host.clone() } else { host.t() };
                let moved = turned(&Host::of(&sources.moved(self::device(&turned(&moment)), axis)));
                let expected = Host::new(3, 4, |i, j| match old.iter().position(|&index| index == new[i]) {
                    Some(source) => moment.at(source, j),
                    None => 0.0,
                });
                moved.assert_close(&expected, 0.0);
            }
            let kept = new.iter().filter(|&index| old.contains(index)).count();
            assert_eq!(sources.is_kept.sum().into_scalar::<i32>() as usize, kept);
        }
    }

    #[test]
    fn factor_scores_are_those_of_the_gradient() {
        // t = 2 < 5 * 8 / 13 takes the Gram matrix, t = 40 the sketch.
        for dims in [[5, 8], [8, 5]] {
            for tokens in [2, 40] {
                let dct = optimizer(&small(), dims);
                let (x, dy) = (random(1, tokens, dims[0]), random(2, tokens, dims[1]));
                let g = Host::of(&x).t().mul(&Host::of(&dy));
                let all = if dims[0] < dims[1] { q(5).t().mul(&g) } else { q(5).t().mul(&g.t()) };
                let exact = all.norms(1);
                let scores = linalg::host(dct.factor_scores(&x, &dy));
                assert_eq!(scores.len(), 5);
                let total: f64 = exact.iter().map(|norm| norm * norm).sum();
                for (score, norm) in scores.iter().zip(exact) {
                    // A sketched score has a relative deviation of sqrt(2 / 32); the bound is four of them.
                    let bound = if tokens == 2 { 1e-5 * total } else { norm * norm };
                    assert!((f64::from(*score) - norm * norm).abs() <= bound, "{score} {}", norm * norm);
                }
            }
        }
    }

    #[test]
    fn projected_and_full_gradients_give_the_same_steps() {
        // With few tokens the scores are exact, so both select the same directions.
        for (dims, gap, micro_batches) in [([6, 9], 1, 1), ([6, 9], 3, 2), ([9, 6], 3, 1), ([9, 6], 1, 1)] {
            let config = DctAdamWConfig { update_proj_gap: gap, ..small() };
            let mut full = optimizer(&config, dims);
            let mut projected = optimizer(&DctAdamWConfig { projected: true, ..config }, dims);
            let mut weight = random(7, dims[0], dims[1]);
            let mut copy = weight.clone();
            for t in 0..7u64 {
                let collect = projected.collect(micro_batches);
                let (mut whole, mut low): (Option<Tensor<2>>, Option<Tensor<2>>) = (None, None);
                for batch in 0..micro_batches as u64 {
                    // The first micro batch dominates, so that its selection is that of the sum.
                    let size = if batch == 0 { 1.0 } else { 1e-3 };
                    let x = random(100 + 10 * t + batch, 3, dims[0]) * size;
                    let dy = random(200 + 10 * t + batch, 3, dims[1]);
                    let g = kernels::gemm(x.clone().transpose(), dy.clone(), None, 1.0);
                    let part = match &collect {
                        Gradient::Factors { .. } => projected.observe(x, dy),
                        Gradient::Projected { left, right, .. } => {
                            let values =
                                |side: &Option<Directions>| side.as_ref().map(|side| side.values(FloatDType::F32));
                            let basis = Basis { left: values(left), right: values(right) };
                            basis.project(g.clone())
                        }
                        Gradient::Full => unreachable!("projected"),
                    };
                    whole = Some(whole.map_or(g.clone(), |sum| sum + g));
                    low = Some(low.map_or(part.clone(), |sum| sum + part));
                }
                let is_refresh = t == 0 || (t + 1) % gap == 0;
                assert_eq!(matches!(collect, Gradient::Factors { .. }), is_refresh, "step {t}");
                assert!(matches!(full.collect(micro_batches), Gradient::Full));
                weight = full.step(weight, whole.unwrap(), RULE);
                copy = projected.step(copy, low.unwrap(), RULE);
                assert_eq!(full.indices(), projected.indices(), "step {t}");
                Host::of(&copy).assert_close(&Host::of(&weight), 1e-5);
            }
            assert_eq!(full.state_bytes(), projected.state_bytes());
        }
    }

    #[test]
    fn bases_are_shared_by_size() {
        let (bases, device) = (DctBases::default(), Device::flex());
        for d in [4, 6, 4] {
            assert_eq!(bases.clone().get(d, &device).dims(), [d, d]);
        }
        assert_eq!(bases.bytes(), 4 * (16 + 36));
    }

    #[test]
    fn a_restored_optimiser_continues_bit_by_bit() {
        for split in [0, 1, 3, 4] {
            for config in [
                small(),
                DctAdamWConfig { update_proj_gap: 3, ..small() },
                DctAdamWConfig { error_feedback: true, ..small() },
            ] {
                assert_resumes(|| Box::new(optimizer(&config, [5, 4])), [5, 4], split, 8);
            }
        }
        let mut dct = optimizer(&small(), [4, 6]);
        dct.step(random(1, 4, 6), random(2, 4, 6), RULE);
        assert_eq!(dct.state_bytes(), 4 * (2 * 3 * 6 + 3));
        let mut state = dct.save();
        state.bytes.insert("indices".to_owned(), vec![1, 0, 0, 0]);
        assert!(optimizer(&small(), [4, 6]).restore(state).unwrap_err().contains("indices"));
    }

    #[test]
    fn a_restored_projected_optimiser_collects_the_same() {
        let config = DctAdamWConfig { projected: true, update_proj_gap: 10, ..small() };
        let mut dct = optimizer(&config, [4, 6]);
        assert!(matches!(dct.collect(1), Gradient::Factors { .. }));
        let low = dct.observe(random(1, 8, 4), random(2, 8, 6));
        let weight = dct.step(random(3, 4, 6), low, RULE);
        let mut fresh = optimizer(&config, [4, 6]);
        fresh.restore(dct.save()).unwrap();
        let mut results = vec![];
        for dct in [&mut dct, &mut fresh] {
            let Gradient::Projected { left: Some(left), right: None, .. } = dct.collect(1) else {
                unreachable!("no refresh")
            };
            let left = left.values(FloatDType::F32);
            let low = kernels::gemm(left.transpose(), random(4, 4, 6), None, 1.0);
            results.push(linalg::host(dct.step(weight.clone(), low, RULE)));
        }
        assert_eq!(results[0], results[1]);
    }

    #[test]
    fn impossible_combinations_are_refused() {
        let config = DctAdamWConfig { projected: true, ..small() };
        assert!(config.check().is_ok());
        assert!(DctAdamWConfig { error_feedback: true, ..config.clone() }.check().is_err());
        assert!(DctAdamWConfig { score: Score::L1, ..config }.check().is_err());
    }
}
