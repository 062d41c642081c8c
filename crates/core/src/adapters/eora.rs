//! EoRA: Eigenspace Low-Rank Approximation (arXiv 2410.21271, section 3).
//!
//! `y = x W_base + b + (D(x) A) B`: a delta that repairs a compressed base. With what the base lost, `D = W - W_base`, and the
//! covariance C of the layer's inputs, `A B = D E E^T`, where E are the r leading eigenvectors of `D^T C D`. Of all products of
//! rank r it leaves the least error of the outputs, `||(D - A B)^T x^T||^2 = sum_{i > r} Sig_i^2` over the calibration inputs.
//!
//! | paper (there transposed) | field | shape |
//! | --- | --- | --- |
//! | A | `down` | `[d_in, r]` |
//! | B | `up` | `[r, d_out]` |
//!
//! Trained: nothing in the paper; here A and B (`r (d_in + d_out)` values) unless `trained` is off: a repaired base is a good
//! start of LoRA. There is no alpha, s = 1. The start takes one decomposition of the smaller of C and `D^T C D` on the host, or,
//! for a large layer and a small r, a few products on the device.
//!
//! The paper computes `A = diag(sqrt(Sig)) V^T S^-1` with a root S of C, which fails where C is singular (fewer tokens than
//! d_in). `Sig V^T S^-1 = E^T D^T` needs no inverse: `B = diag(sqrt(Sig)) E^T`, `A = D E diag(1 / sqrt(Sig))`, with Sig bounded
//! from below by 1e-7 of the largest (the product does not depend on it) and both factors zero where D is. C is divided by the
//! mean of its diagonal, so that the balance of the factors does not depend on the number of tokens. C is a plain sum over the
//! samples; the reference's running mean gives early samples less weight. As in the reference, the trainer measures block by block,
//! each on what the repaired blocks before it make of the samples.

use burn::tensor::Tensor;
use lowrank_kernels as kernels;

use super::start::{check_rank, covariance, row};
use super::{Site, StartError};
use crate::LowRank;
use crate::linalg;

/// Smallest Sig that is told from 0, as a part of the largest.
const RESOLVED: f64 = f32::EPSILON as f64;

/// What one projection gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Eora {
    /// Rank, at most `min(d_in, d_out)`.
    pub r: usize,
    /// Dropout of the delta's input.
    pub dropout: f64,
    /// Whether A and B are trained.
    pub trained: bool,
}

impl Eora {
    /// Trained values of a `[d_in, d_out]` projection.
    pub fn parameters(&self, d_in: usize, d_out: usize) -> usize {
        if self.trained { self.r * (d_in + d_out) } else { 0 }
    }

    /// The delta of a site.
    ///
    /// # Errors
    /// A rank that the weight does not have; a base that lost nothing because it is not compressed; no covariance, or one that
    /// says nothing.
    pub fn init(&self, site: &Site<'_>) -> Result<LowRank, StartError> {
        check_rank(site, "eora", self.r)?;
        let lost = site
            .residual
            .clone()
            .ok_or_else(|| StartError::NeedsResidual { method: "eora", module: site.module.to_owned() })?;
        let (covariance, mean) = covariance(site, "eora")?;
        let (values, outputs) = self.directions(covariance / mean, lost.clone(), site.stream.bits(0));
        let largest = values.first().copied().unwrap_or(0.0);
        let roots = values.iter().map(|value| value.max(RESOLVED * largest).sqrt()).collect::<Vec<_>>();
        let inverse = roots.iter().map(|root| if *root > 0.0 { root.recip() } else { 0.0 });
        let device = lost.device();
        let down = kernels::gemm(lost, outputs.clone(), None, 1.0) * row(inverse, &device);
        let up = (outputs * row(roots.iter().copied(), &device)).transpose();
        let delta = LowRank::new(down, up, 1.0, self.dropout);
        Ok(if self.trained { delta } else { delta.frozen() })
    }

    /// Sig and `E [d_out, r]`.
    fn directions(&self, covariance: Tensor<2>, lost: Tensor<2>, seed: u64) -> (Vec<f64>, Tensor<2>) {
        let [d_in, d_out] = lost.dims();
        match linalg::is_exact(d_in, d_out, self.r) {
            true => linalg::root_svd(covariance, lost, self.r),
            false => linalg::randomized_root_svd(covariance, lost, self.r, seed),
        }
    }
}
