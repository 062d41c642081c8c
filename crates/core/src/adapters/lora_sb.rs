//! LoRA-SB: LoRA Silver Bullet (arXiv 2411.19557, sections 3 and 4).
//!
//! `y = x W + b + s ((D(x) A) M) B` with frozen A and B, as LoRA-XS, but all three come from an estimate of the first step of a
//! full fine-tuning: `-eta sign(G) = U diag(S) V^T`, where G is the gradient of W summed over the first samples and sign is what
//! Adam makes of a first gradient. `A = U_r`, `B = V_r^T`, `M_0 = diag(S_r) / s`.
//!
//! | paper (there transposed) | field | shape |
//! | --- | --- | --- |
//! | A | `down`, frozen, orthonormal columns | `[d_in, r]` |
//! | R | `core` (its transpose) | `[r, r]` |
//! | B | `up`, frozen, orthonormal rows | `[r, d_out]` |
//!
//! Trained: M, `r^2` values. With s = 1, which alpha = r gives, a gradient step of M moves W by the projection of the full
//! gradient on the span of A and B. Cost: that of LoRA-XS; the start needs one pass over some samples with a full gradient of
//! every target, and one decomposition.
//!
//! The first output is not the base's: the delta starts at the best approximation of rank r of that step, so training starts
//! one step in. A and B depend on data and are part of what is saved. The reference keeps them in bf16, here they are f32.

use super::start::{check_rank, check_scale, gradient, in_rows, row};
use super::{Site, StartError};
use crate::LowRank;
use crate::linalg;

/// What one projection gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraSb {
    /// Rank, at most `min(d_in, d_out)`.
    pub r: usize,
    /// s, above 0.
    pub scale: f32,
    /// Dropout of the delta's input.
    pub dropout: f64,
    /// Length of the estimated step of every weight.
    pub eta: f64,
}

impl LoraSb {
    /// Trained values of a projection of any size.
    pub fn parameters(&self, _d_in: usize, _d_out: usize) -> usize {
        self.r * self.r
    }

    /// The delta of a site.
    ///
    /// # Errors
    /// A rank that the weight does not have; an s that is not above 0; no gradient, or one of zeros.
    pub fn init(&self, site: &Site<'_>) -> Result<LowRank, StartError> {
        check_rank(site, "lora_sb", self.r)?;
        check_scale(site, "lora_sb", self.scale)?;
        let step = -gradient(site, "lora_sb")?.sign();
        let found = linalg::truncated_svd(step, self.r, site.stream.bits(0));
        let device = found.left.device();
        let eta = self.eta / f64::from(self.scale);
        let core =
            burn::tensor::Tensor::eye(self.r, &device) * row(found.values.iter().map(|value| eta * value), &device);
        let delta = LowRank::new(in_rows(found.left), in_rows(found.right.transpose()), self.scale, self.dropout);
        Ok(delta.with_core(core).frozen_factors())
    }
}
