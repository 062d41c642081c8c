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

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use lowrank_kernels as kernels;

use super::one_side::{Energy, basis_on, decayed, one_side, projected_size, rank_axis, scaled};
use super::subspace::{Basis, ProjType, Side};
use super::{MatrixOptimizer, Report, State, StepRule};
use crate::linalg;
use crate::projection::Gradient;

mod selection;

pub use selection::Score;

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
            self.select_from_factors(&x, &dy);
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
mod tests;
