//! OLoRA: Orthonormal Low-Rank Adaptation (arXiv 2406.01775, section 3).
//!
//! `y = x (W - s A_0 B_0) + b + s (D(x) A) B`: LoRA whose factors start at the first r steps of a QR decomposition, which the
//! frozen base loses. In the paper's layout `W^T = Q R`; here `A_0 = R[:r]^T`, `B_0 = Q[:, :r]^T`.
//!
//! | paper (there transposed) | field | shape |
//! | --- | --- | --- |
//! | R_r | `down` | `[d_in, r]` |
//! | Q_r | `up` | `[r, d_out]` |
//! | both at the start | `start` | `[d_in, r]`, `[r, d_out]` |
//!
//! Trained: A and B, `r (d_in + d_out)` values. Cost: that of LoRA; the start takes `2 r d_in d_out + 8 r^2 d_out` flops on the
//! device, because the first r columns of Q come from the first r columns of `W^T` alone, and `R[:r] = Q_r^T W^T`.
//!
//! Signs: the diagonal of R is positive here and arbitrary in LAPACK; the product does not depend on it. As peft, s is not
//! divided out: the base loses s times the slice of the decomposition, so with r = min(d_in, d_out) it becomes zero only for s = 1.

use lowrank_kernels as kernels;

use super::start::check_rank;
use super::{Site, StartError};
use crate::LowRank;
use crate::linalg;

/// What one projection gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Olora {
    /// Rank, at most `min(d_in, d_out)`.
    pub r: usize,
    /// s.
    pub scale: f32,
    /// Dropout of the delta's input.
    pub dropout: f64,
}

impl Olora {
    /// Trained values of a `[d_in, d_out]` projection.
    pub fn parameters(&self, d_in: usize, d_out: usize) -> usize {
        self.r * (d_in + d_out)
    }

    /// The delta of a site; its base loses `s A_0 B_0`.
    ///
    /// # Errors
    /// A rank that the weight does not have.
    pub fn init(&self, site: &Site<'_>) -> Result<LowRank, StartError> {
        check_rank(site, "olora", self.r)?;
        let weight = site.weight.clone();
        let q = linalg::orthonormal(weight.clone().narrow(0, 0, self.r).transpose());
        let down = kernels::gemm(weight, q.clone(), None, 1.0);
        Ok(LowRank::new(down, q.transpose(), self.scale, self.dropout).with_start())
    }
}
