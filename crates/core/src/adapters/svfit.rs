//! SVFit: fine-tuning of singular values (arXiv 2409.05926).
//!
//! `y = x W_e + b + ((D(x) P_r) * sigma) Q_r` with `W = P diag(S) Q`, `W_e = W - P_r diag(S_r) Q_r`: the r largest singular values
//! are trained, their vectors and the rest of W are frozen. Here in the form `y = x W + b + ((D(x) P_r) * (sigma - S_r)) Q_r`,
//! which is the same function, starts at the base's output to the bit and leaves the base as it is, quantised or not.
//!
//! | paper | field | shape |
//! | --- | --- | --- |
//! | U_r | `down` (P_r), frozen | `[d_in, r]` |
//! | sigma | `core` | `[1, r]` |
//! | sigma at the start, S_r | `core_start`, frozen | `[1, r]` |
//! | V_r | `up` (Q_r), frozen | `[r, d_out]` |
//!
//! Trained: sigma, `r` values. There is no alpha. Cost: forward `2 t r (d_in + d_out)` flops beside the base; for a large r, the
//! likely choice, the layer is merged for one product instead. The start decomposes W on the host, or, for a large W and a
//! small r, by ten randomised iterations on the device.
//!
//! S_r is `diag(P_r^T W Q_r^T)`, which [`values`] computes from the vectors as they are saved: a stored sigma meets the same
//! origin to the bit when it is loaded. No code of the authors is published; with dropout only the change of sigma is dropped.

use burn::tensor::Tensor;
use lowrank_kernels as kernels;

use super::start::{check_rank, in_rows};
use super::{Site, StartError};
use crate::LowRank;
use crate::linalg;

/// What one projection gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Svfit {
    /// Number of singular values, at most `min(d_in, d_out)`.
    pub r: usize,
    /// Dropout of the delta's input.
    pub dropout: f64,
}

impl Svfit {
    /// Trained values of a projection of any size.
    pub fn parameters(&self, _d_in: usize, _d_out: usize) -> usize {
        self.r
    }

    /// The delta of a site.
    ///
    /// # Errors
    /// A rank that the weight does not have.
    pub fn init(&self, site: &Site<'_>) -> Result<LowRank, StartError> {
        check_rank(site, "svfit", self.r)?;
        let found = linalg::truncated_svd(site.weight.clone(), self.r, site.stream.bits(0));
        let (down, up) = (found.left, found.right.transpose());
        let sigma = values(&down, &site.weight, &up);
        Ok(self.stored(down, sigma, up, &site.weight))
    }

    /// The delta of stored vectors and values over a weight: that of [`Svfit::init`] where they come from it.
    ///
    /// # Shapes
    /// `down [d_in, r]`, `sigma [1, r]`, `up [r, d_out]`, `weight [d_in, d_out]` in f32.
    pub fn stored(&self, down: Tensor<2>, sigma: Tensor<2>, up: Tensor<2>, weight: &Tensor<2>) -> LowRank {
        let origin = values(&down, weight, &up);
        LowRank::new(down, up, 1.0, self.dropout).with_core(sigma).with_core_start(origin).frozen_factors()
    }
}

/// `diag(P^T W Q^T)` as `[1, r]`: the singular values that go with singular vectors.
///
/// # Shapes
/// `down [d_in, r]`, `weight [d_in, d_out]`, `up [r, d_out]`.
pub fn values(down: &Tensor<2>, weight: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    let image = kernels::gemm(in_rows(down.clone().transpose()), weight.clone(), None, 1.0);
    (image * in_rows(up.clone())).sum_dim(1).transpose()
}
