//! LoRA-XS: Low-Rank Adaptation with eXtremely Small number of parameters (arXiv 2405.17604, section 3).
//!
//! `y = x W + b + s ((D(x) A) M) B` with A and B frozen at the leading part of W, `W = U diag(S) V^T`: `A = U_r`,
//! `B = diag(S_r) V_r^T`.
//!
//! | paper (there transposed) | field | shape |
//! | --- | --- | --- |
//! | A | `down`, frozen | `[d_in, r]` |
//! | R | `core` (its transpose) | `[r, r]` |
//! | B | `up`, frozen | `[r, d_out]` |
//!
//! Trained: M, `r^2` values, whatever the width of the layer. Start: `M ~ N(0, 1e-5)` by deviation, so the first output is the
//! base's but for five digits. Cost: forward that of LoRA and `2 r^2 d_out` once; nothing of the size of x is kept, because A is
//! frozen. The start decomposes W on the host, or, for a large W and a small r, by ten randomised iterations on the device.
//!
//! S is on the side of the outputs here. The authors' code puts it on the side of the inputs (`A = U_r diag(S_r)`,
//! `B = V_r^T`): the same layers can be reached, but M differs by `diag(S_r) M_there diag(S_r)^-1`, and so do the steps that an
//! optimiser makes.

use super::start::{check_rank, in_rows, row};
use super::{Site, StartError};
use crate::LowRank;
use crate::linalg;

/// Deviation of the values M starts from.
const DEVIATION: f64 = 1e-5;

/// What one projection gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraXs {
    /// Rank, at most `min(d_in, d_out)`.
    pub r: usize,
    /// s.
    pub scale: f32,
    /// Dropout of the delta's input.
    pub dropout: f64,
}

impl LoraXs {
    /// Trained values of a projection of any size.
    pub fn parameters(&self, _d_in: usize, _d_out: usize) -> usize {
        self.r * self.r
    }

    /// The delta of a site.
    ///
    /// # Errors
    /// A rank that the weight does not have.
    pub fn init(&self, site: &Site<'_>) -> Result<LowRank, StartError> {
        check_rank(site, "lora_xs", self.r)?;
        let found = linalg::truncated_svd(site.weight.clone(), self.r, site.stream.bits(0));
        let device = found.left.device();
        let up = (found.right * row(found.values, &device)).transpose();
        let core = site.stream.normal_tensor(self.r, self.r, DEVIATION, &device);
        Ok(LowRank::new(in_rows(found.left), in_rows(up), self.scale, self.dropout).with_core(core).frozen_factors())
    }
}
