//! FLoRA: a low-rank Tucker core (arXiv 2405.14739), on a linear layer. Named `tucker`, for two other methods are called Flora.
//!
//! `y = x W + b + s ((D(x) P_0) G) P_1^T`
//!
//! | paper | field | shape |
//! | --- | --- | --- |
//! | `P_0` | `down` | `[d_in, r_in]` |
//! | `G` | `core` | `[r_in, r_out]` |
//! | `P_1` (transposed) | `up` | `[r_out, d_out]` |
//!
//! Trained: all three, `r_in d_in + r_in r_out + r_out d_out` values. Start: `G = 0`, `P_i ~ N(0, 0.5 / r_i)`, so the first
//! output is the base's to the bit and the first step moves G alone. `s` is a plain factor, 4 by default. Flops
//! `2 t (d_in r_in + r_in d_out)` and `2 r_in r_out d_out` to fold the core; the reference builds the dense update. Convolutions:
//! [`crate::conv`].

use burn::tensor::Tensor;

use super::{Site, StartError};
use crate::LowRank;
use crate::random::Stream;

/// What one projection gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tucker {
    /// Rank of the input side.
    pub r_in: usize,
    /// Rank of the output side.
    pub r_out: usize,
    /// s.
    pub scale: f32,
    /// Dropout of the delta's input.
    pub dropout: f64,
}

/// Standard deviation of a factor of rank r at the start.
pub(crate) fn deviation(r: usize) -> f64 {
    (0.5 / r as f64).sqrt()
}

/// Refuses ranks of 0.
pub(crate) fn check_ranks(module: &str, ranks: &[(&'static str, usize)]) -> Result<(), StartError> {
    match ranks.iter().find(|(_, r)| *r == 0) {
        Some((name, _)) => Err(StartError::ZeroRank { method: "tucker", module: module.to_owned(), name }),
        None => Ok(()),
    }
}

impl Tucker {
    /// The delta of a layer.
    ///
    /// # Errors
    /// A rank is 0.
    pub fn init(&self, site: &Site<'_>) -> Result<LowRank, StartError> {
        check_ranks(site.module, &[("r_in", self.r_in), ("r_out", self.r_out)])?;
        let [d_in, d_out] = site.dims();
        let device = site.weight.device();
        let stream = |factor: &str| Stream::new(site.seed, &format!("{}.tucker.{factor}", site.module));
        let down = stream("in").normal_tensor(d_in, self.r_in, deviation(self.r_in), &device);
        let up = stream("out").normal_tensor(self.r_out, d_out, deviation(self.r_out), &device);
        let core = Tensor::zeros([self.r_in, self.r_out], &device);
        Ok(LowRank::new(down, up, self.scale, self.dropout).with_core(core))
    }

    /// Trained values of a layer.
    pub fn parameters(&self, d_in: usize, d_out: usize) -> usize {
        self.r_in * (d_in + self.r_out) + self.r_out * d_out
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::module::{Module as _, Param};
    use lowrank_kernels as kernels;

    use super::*;
    use crate::adapters::checks::{assert_close, check_gradient, host, normal, site, trained_values};
    use crate::linalg;

    fn started(d_in: usize, d_out: usize, r_in: usize, r_out: usize) -> LowRank {
        let tucker = Tucker { r_in, r_out, scale: 4.0, dropout: 0.0 };
        let weight = normal("w", d_in, d_out);
        let delta = tucker.init(&site("a", &weight)).unwrap();
        assert_eq!(trained_values(&delta), tucker.parameters(d_in, d_out));
        delta
    }

    fn with_core(mut delta: LowRank, core: Tensor<2>) -> LowRank {
        delta.core = delta.core.map(|param| param.map(|_| core.clone()));
        delta
    }

    #[test]
    fn starts_as_the_base_and_follows_the_formula() {
        for (d_in, d_out, r_in, r_out) in [(12, 10, 4, 3), (7, 5, 1, 3), (5, 9, 3, 1), (6, 6, 1, 1), (4, 5, 4, 5)] {
            let delta = started(d_in, d_out, r_in, r_out);
            let (x, w) = (normal("x", 3, d_in), normal("w", d_out, d_in).transpose());
            let base = kernels::linear(x.clone(), w.clone(), None);
            assert_eq!(host(delta.forward(x.clone(), w.clone().into(), None, true)), host(base.clone()));
            let core = normal("core", r_in, r_out);
            let delta = with_core(delta, core.clone());
            let want = x.clone().matmul(delta.down.val()).matmul(core).matmul(delta.up.val()) * 4.0 + base;
            assert_close(delta.forward(x.clone(), w.clone().into(), None, false), want.clone(), 1e-5);
            assert_close(x.matmul(w + delta.delta()), want, 1e-5);
            let values = linalg::svd(delta.delta(), d_in.min(d_out)).values;
            let rank = values.iter().filter(|&&value| value > 1e-5 * values[0]).count();
            assert_eq!(rank, r_in.min(r_out));
        }
    }

    #[test]
    fn the_first_step_moves_the_core_alone() {
        let delta = started(12, 10, 4, 3).train();
        let (x, w) = (normal("x", 3, 12), normal("w", 12, 10));
        let gradients = delta.forward(x.clone(), w.into(), None, false).sum().backward();
        let gradient = |param: &Param<Tensor<2>>| param.val().grad(&gradients).unwrap();
        assert!([&delta.down, &delta.up].iter().all(|factor| host(gradient(factor)).iter().all(|&g| g == 0.0)));
        // s P_0^T (x^T dy) P_1 with dy = 1.
        let full = x.transpose().matmul(Tensor::ones([3, 10], &burn::tensor::Device::flex()));
        let want = delta.down.val().inner().transpose().matmul(full).matmul(delta.up.val().inner().transpose()) * 4.0;
        assert_close(gradient(delta.core.as_ref().unwrap()), want, 1e-5);
    }

    #[test]
    fn gradients_agree_with_differences() {
        let delta = with_core(started(12, 10, 4, 3), normal("core", 4, 3));
        let (x, w) = (normal("x", 3, 12), normal("w", 12, 10));
        let run = |delta: &LowRank| delta.forward(x.clone(), w.clone().into(), None, false);
        check_gradient(&delta, run, |d| d.core.clone().unwrap(), with_core);
        check_gradient(&delta, run, |d| d.down.clone(), |d, v| LowRank { down: d.down.map(|_| v), ..d });
        check_gradient(&delta, run, |d| d.up.clone(), |d, v| LowRank { up: d.up.map(|_| v), ..d });
    }

    #[test]
    fn the_start_has_the_deviation_of_the_reference_and_ranks_are_checked() {
        let delta = started(200, 300, 20, 10);
        for (factor, r) in [(&delta.down, 20.0), (&delta.up, 10.0)] {
            let values = host(factor.val());
            let variance = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / values.len() as f64;
            // Relative standard error sqrt(2 / n), four of them at n = 3000.
            assert!((variance / (0.5 / r) - 1.0).abs() < 0.11);
        }
        let weight = normal("w", 4, 4);
        let error = Tucker { r_in: 2, r_out: 0, scale: 4.0, dropout: 0.0 }.init(&site("q", &weight)).unwrap_err();
        assert_eq!(error.to_string(), "q: r_out of tucker is 0, expected at least 1");
    }
}
