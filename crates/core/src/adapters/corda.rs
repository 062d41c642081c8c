//! CorDA: Context-Oriented Decomposition Adaptation (arXiv 2406.05223, section 3).
//!
//! `y = x (W - s A_0 B_0) + b + s (D(x) A) B`: as PiSSA, but the part of W that moves into the factors is chosen by what the
//! inputs of some text make of it. With the covariance C of the layer's inputs, `C' = C + damp mean(diag C) I` and
//! `C' W = L diag(S) U^T`: `A_0 = W U_I diag(1 / sqrt(s S_I))`, `B_0 = diag(sqrt(S_I / s)) U_I^T`. I are the r largest triples
//! (instruction-previewed mode, `ipm`: train what the text uses) or the r smallest (knowledge-preserved mode, `kpm`: leave it).
//!
//! | paper (there transposed) | field | shape |
//! | --- | --- | --- |
//! | A | `down` | `[d_in, r]` |
//! | B | `up` | `[r, d_out]` |
//! | A, B at the start | `start` | `[d_in, r]`, `[r, d_out]` |
//!
//! Trained: A and B, `r (d_in + d_out)` values. Cost: that of LoRA; the start takes a decomposition of a `[d_in, d_out]` matrix
//! and one inverse of C in f32, on the host. For `ipm` with a large W and a small r, the decomposition is randomised.
//!
//! The paper writes `A = V C'^-1`; that is `diag(1 / S) U^T W^T`, so no inverse enters the factors and `s A_0 B_0 = W U_I U_I^T`
//! is exact however C is conditioned. The damping starts at 0.01 and doubles until `||C' C'^-1 - I|| < 0.05` in f32, as in
//! peft: it decides U, so the inverse is taken for this test alone. The product `C' W` is taken in f64 (peft: f32), which the
//! small triples of `kpm` need. A triple of which f32 knows nothing (`S_i < 1e-7 S_1`) is balanced as if it were at that bound;
//! the product is unchanged.

use burn::tensor::Tensor;
use lowrank_kernels as kernels;

use super::start::{check_rank, check_scale, covariance, row};
use super::{Site, StartError};
use crate::LowRank;
use crate::linalg::{self, ITERATIONS, OVERSAMPLING, Operator};

/// Part of the mean of C's diagonal that is added to it.
const DAMPING: f64 = 0.01;
/// Largest `||C' C'^-1 - I||`.
const INVERSE_ERROR: f64 = 0.05;
/// Doublings after which C' is a multiple of I for f32.
const DOUBLINGS: usize = 40;
/// Smallest singular value that is told from 0, as a part of the largest.
const RESOLVED: f64 = f32::EPSILON as f64;

/// Which triples are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CordaMethod {
    /// The r largest, which the calibration text uses most.
    #[default]
    Ipm,
    /// The r smallest, which it uses least.
    Kpm,
}

/// What one projection gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Corda {
    /// Rank, at most `min(d_in, d_out)`.
    pub r: usize,
    /// s, above 0.
    pub scale: f32,
    /// Dropout of the delta's input.
    pub dropout: f64,
    /// Which triples are trained.
    pub method: CordaMethod,
}

impl Corda {
    /// Trained values of a `[d_in, d_out]` projection.
    pub fn parameters(&self, d_in: usize, d_out: usize) -> usize {
        self.r * (d_in + d_out)
    }

    /// The delta of a site; its base loses `s A_0 B_0`.
    ///
    /// # Errors
    /// A rank that the weight does not have; an s that is not above 0; no covariance, or one that says nothing.
    pub fn init(&self, site: &Site<'_>) -> Result<LowRank, StartError> {
        check_rank(site, "corda", self.r)?;
        check_scale(site, "corda", self.scale)?;
        let (covariance, mean) = covariance(site, "corda")?;
        let damped = damped(covariance, mean, INVERSE_ERROR).ok_or_else(|| StartError::NothingMeasured {
            method: "corda",
            module: site.module.to_owned(),
            what: "the covariance of the inputs",
            got: "a matrix without an inverse".to_owned(),
        })?;
        let [d_in, d_out] = site.dims();
        let is_exact = self.method == CordaMethod::Kpm || linalg::is_exact(d_in, d_out, self.r);
        let (values, outputs) = self.slice(site, damped, is_exact);
        let scale = f64::from(self.scale);
        let device = outputs.device();
        let down = kernels::gemm(site.weight.clone(), outputs.clone(), None, 1.0)
            * row(values.iter().map(|value| (scale * value).sqrt().recip()), &device);
        let up = (outputs * row(values.iter().map(|value| (value / scale).sqrt()), &device)).transpose();
        Ok(LowRank::new(down, up, self.scale, self.dropout).with_start())
    }

    /// `S_I`, bounded from below, and `U_I [d_out, r]`.
    fn slice(&self, site: &Site<'_>, damped: Tensor<2>, is_exact: bool) -> (Vec<f64>, Tensor<2>) {
        let weight = site.weight.clone();
        let found = if is_exact {
            linalg::svd_of_product(damped, weight)
        } else {
            let product = |a: Tensor<2>, b: Tensor<2>| kernels::gemm(a, b, None, 1.0);
            let image = |z| product(damped.clone(), product(weight.clone(), z));
            let preimage = |y| product(weight.clone().transpose(), product(damped.clone(), y));
            let operator = Operator { dims: weight.dims(), image: &image, preimage: &preimage };
            linalg::operator_svd(&operator, self.r, OVERSAMPLING, ITERATIONS, site.stream.bits(0), &weight.device())
        };
        let first = match self.method {
            CordaMethod::Ipm => 0,
            CordaMethod::Kpm => found.values.len() - self.r,
        };
        let largest = found.values.first().copied().unwrap_or(0.0);
        // A weight of zeros has no part to move; any bound above 0 keeps its factors finite.
        let least = if largest > 0.0 { RESOLVED * largest } else { 1.0 };
        let values = found.values[first..first + self.r].iter().map(|value| value.max(least)).collect();
        (values, found.right.narrow(1, first, self.r))
    }
}

/// C' with the least damping of 0.01, 0.02, 0.04, ... under which single precision can invert it.
fn damped(covariance: Tensor<2>, mean: f64, allowed: f64) -> Option<Tensor<2>> {
    let unit = Tensor::<2>::eye(covariance.dims()[0], &covariance.device()) * mean;
    (0..DOUBLINGS)
        .map(|doublings| covariance.clone() + unit.clone() * (DAMPING * f64::powi(2.0, doublings as i32)))
        .find(|damped| linalg::inverse_error(damped.clone()) < allowed)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::testing::{assert_near, device, normal, product, site, statistics, t, weight};
    use super::*;

    #[test]
    fn damping_doubles_until_single_precision_can_invert() {
        // One direction alone; to reach 0.05 takes thousands of inputs, so the test allows less.
        let x = normal("x", 1, 96);
        let covariance = product(&t(&x), &x);
        let mean = linalg::host(covariance.clone() * Tensor::eye(96, &device())).iter().sum::<f32>() / 96.0;
        let added = |allowed: f64| {
            let damped = damped(covariance.clone(), f64::from(mean), allowed)?;
            assert!(linalg::inverse_error(damped.clone()) < allowed);
            Some(linalg::host(damped - covariance.clone())[0] / mean)
        };
        assert!((added(INVERSE_ERROR).unwrap() - 0.01).abs() < 1e-4);
        let more = f64::from(added(1e-5).unwrap()) / DAMPING;
        assert!(more > 1.5 && (more.log2() - more.log2().round()).abs() < 1e-2, "{more} times the first damping");
        assert!(added(0.0).is_none());
    }

    #[test]
    fn a_randomised_slice_is_the_exact_one() {
        let (weight, covariance) = (weight(40, 30), statistics(40, 30).covariance.unwrap());
        let method = Corda { r: 4, scale: 1.0, dropout: 0.0, method: CordaMethod::Ipm };
        let slice = |is_exact| method.slice(&site(&weight, None, None), covariance.clone(), is_exact);
        let ((values, exact), (again, found)) = (slice(true), slice(false));
        assert!(values.iter().zip(&again).all(|(a, b)| (a / b - 1.0).abs() < 1e-4), "{values:?} {again:?}");
        assert_near("U U^T", &product(&found, &t(&found)), &product(&exact, &t(&exact)), 1e-3);
    }
}
