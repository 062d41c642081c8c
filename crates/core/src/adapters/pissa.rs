//! PiSSA: Principal Singular values and Singular vectors Adaptation (arXiv 2404.02948, section 3).
//!
//! `y = x (W - s A_0 B_0) + b + s (D(x) A) B`: LoRA whose factors start at the leading part of W, which the frozen base loses.
//! With `W = U diag(S) V^T` and its r largest triples: `A_0 = U_r diag(sqrt(S_r / s))`, `B_0 = diag(sqrt(S_r / s)) V_r^T`.
//!
//! | paper (there transposed) | field | shape |
//! | --- | --- | --- |
//! | A | `down` | `[d_in, r]` |
//! | B | `up` | `[r, d_out]` |
//! | A, B at the start | `start` | `[d_in, r]`, `[r, d_out]` |
//!
//! Trained: A and B, `r (d_in + d_out)` values. Cost: that of LoRA; the start takes `O(d_in d_out min(d_in, d_out))` on the host,
//! or with `niter` rounds of randomised iteration `(4 + 4 niter) (r + 10) d_in d_out` flops on the device.
//!
//! As peft, s is divided out before the root, so that `s A_0 B_0` is the best approximation of rank r whatever s is. The
//! randomised start searches ten columns more than peft, which is nearer to the exact one; either way the base loses exactly
//! what the factors hold.

use super::start::{check_rank, check_scale, row};
use super::{Site, StartError};
use crate::LowRank;
use crate::linalg::{self, OVERSAMPLING, Svd};

/// What one projection gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pissa {
    /// Rank, at most `min(d_in, d_out)`.
    pub r: usize,
    /// s, above 0.
    pub scale: f32,
    /// Dropout of the delta's input.
    pub dropout: f64,
    /// Rounds of the randomised decomposition; none for the exact one.
    pub niter: Option<usize>,
}

impl Pissa {
    /// Trained values of a `[d_in, d_out]` projection.
    pub fn parameters(&self, d_in: usize, d_out: usize) -> usize {
        self.r * (d_in + d_out)
    }

    /// The delta of a site; its base loses `s A_0 B_0`.
    ///
    /// # Errors
    /// A rank that the weight does not have; an s that is not above 0.
    pub fn init(&self, site: &Site<'_>) -> Result<LowRank, StartError> {
        check_rank(site, "pissa", self.r)?;
        check_scale(site, "pissa", self.scale)?;
        let weight = site.weight.clone();
        let Svd { left, values, right } = match self.niter {
            None => linalg::svd(weight, self.r),
            Some(rounds) => linalg::randomized_svd(weight, self.r, OVERSAMPLING, rounds, site.stream.bits(0)),
        };
        let root = row(values.iter().map(|value| (value / f64::from(self.scale)).sqrt()), &left.device());
        let (down, up) = (left * root.clone(), (right * root).transpose());
        Ok(LowRank::new(down, up, self.scale, self.dropout).with_start())
    }
}
