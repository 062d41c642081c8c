//! Adafactor on the gradient of a method (arXiv 1804.04235, algorithms 4 and 5), as GaLore's code has it: no relative
//! step size, no scaling by the parameter.
//!
//! With `b_t = 1 - t^-0.8` and `U = R^2 + 1e-30`: `a = b_t a + (1 - b_t) mean(U, over columns)` (one per row of R),
//! `b = b_t b + (1 - b_t) mean(U, over rows)` (one per column), `N = R / sqrt(a b / mean(b))`,
//! `N <- N / max(1, rms(N) / clip)`, step `eta N`. With a first moment, `M = b1 M + (1 - b1) eta N` is the step. The
//! product `a b / mean(b)` equals its mirror image `a b / mean(a)`, so the orientation of R does not matter.
//!
//! A change of basis is not followed: the factors of R's rows do not determine those of a rotation of them.
//!
//! State: one f32 per row and column of R; 4 bytes a value with a first moment.

use burn::tensor::Tensor;
use lowrank_kernels as kernels;

use super::{Rule, save_tensor};
use crate::optim::State;

/// The factors of one matrix.
#[derive(Debug)]
pub struct Adafactor {
    beta1: Option<f64>,
    decay: f64,
    eps: f64,
    clip: f64,
    /// Means of the squares: of each row `[p, 1]`, of each column `[1, q]`.
    factors: Option<(Tensor<2>, Tensor<2>)>,
    first: Option<Tensor<2>>,
    step: u64,
}

impl Adafactor {
    /// Without state.
    pub fn new(beta1: Option<f64>, decay: f64, eps: f64, clip: f64) -> Self {
        Self { beta1, decay, eps, clip, factors: None, first: None, step: 0 }
    }
}

impl Rule for Adafactor {
    fn step(&mut self, gradient: Tensor<2>, learning_rate: f64) -> Tensor<2> {
        let count = gradient.shape().num_elements() as f64;
        self.step += 1;
        let beta2 = 1.0 - (self.step as f64).powf(-self.decay);
        let squares = (gradient.clone() * gradient.clone()).add_scalar(self.eps);
        let (rows, cols) = (squares.clone().mean_dim(1), squares.mean_dim(0));
        let average = |old: Tensor<2>, new: Tensor<2>| old.mul_scalar(beta2) + new.mul_scalar(1.0 - beta2);
        let (rows, cols) = match self.factors.take() {
            Some((old_rows, old_cols)) => (average(old_rows, rows), average(old_cols, cols)),
            None => (rows, cols), // b_1 = 0
        };
        let mean = cols.clone().mean_dim(1);
        let update = gradient / rows.clone().sqrt() / (cols.clone() / mean).sqrt();
        self.factors = Some((rows, cols));
        let rms: Tensor<2> = kernels::sum_squares(update.clone()).mul_scalar(1.0 / count).sqrt().reshape([1, 1]);
        let update = update / rms.mul_scalar(1.0 / self.clip).clamp_min(1.0);
        let update = update.mul_scalar(learning_rate);
        let Some(beta1) = self.beta1 else { return update };
        let update = update.mul_scalar(1.0 - beta1);
        let first = match self.first.take() {
            Some(first) => first.mul_scalar(beta1) + update,
            None => update,
        };
        self.first = Some(first.clone());
        first
    }

    fn momentum(&self) -> Option<Tensor<2>> {
        self.first.clone()
    }

    fn save(&self, into: &mut State) {
        into.numbers.insert("rule.step".to_owned(), self.step);
        save_tensor(into, "rule.rows", self.factors.as_ref().map(|(rows, _)| rows));
        save_tensor(into, "rule.cols", self.factors.as_ref().map(|(_, cols)| cols));
        save_tensor(into, "rule.first", self.first.as_ref());
    }

    fn restore(&mut self, from: &mut State) -> Result<(), String> {
        self.step = from.number("rule.step")?;
        if self.step == 0 {
            (self.factors, self.first) = (None, None);
            return Ok(());
        }
        let mut take = |key: &str| from.tensors.remove(key).ok_or_else(|| format!("{key} is missing"));
        let (rows, cols) = (take("rule.rows")?, take("rule.cols")?);
        let ([p, one], [first_one, q]) = (rows.dims(), cols.dims());
        if (one, first_one) != (1, 1) {
            return Err(format!("rule.rows and rule.cols have the shapes {:?} and {:?}", rows.dims(), cols.dims()));
        }
        self.factors = Some((rows, cols));
        self.first = match self.beta1 {
            Some(_) => Some(from.tensor("rule.first", [p, q])?),
            None => None,
        };
        Ok(())
    }

    fn state_bytes(&self) -> usize {
        let parts = self.factors.iter().flat_map(|(rows, cols)| [rows, cols]).chain(&self.first);
        parts.map(|part| 4 * part.shape().num_elements()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_near, of};
    use super::*;

    #[test]
    fn two_steps_are_the_written_formula() {
        let gradients = [[0.5f32, -0.25, 0.1, 1.0, 2.0, -3.0], [-0.5, 0.75, 0.2, -0.4, 1.0, 1.0]];
        for beta1 in [None, Some(0.9)] {
            let mut rule = Adafactor::new(beta1, 0.8, 1e-30, 1.0);
            let (mut rows, mut cols, mut first) = ([0.0f64; 2], [0.0f64; 3], [0.0f64; 6]);
            for (t, gradient) in (1..).zip(gradients) {
                let rate = 1.0 - f64::from(t).powf(-0.8);
                let g = gradient.map(f64::from);
                for (row, mean) in rows.iter_mut().enumerate() {
                    let sum: f64 = (0..3).map(|col| g[3 * row + col].powi(2) + 1e-30).sum();
                    *mean = rate * *mean + (1.0 - rate) * sum / 3.0;
                }
                for (col, mean) in cols.iter_mut().enumerate() {
                    let sum: f64 = (0..2).map(|row| g[3 * row + col].powi(2) + 1e-30).sum();
                    *mean = rate * *mean + (1.0 - rate) * sum / 2.0;
                }
                let mean = rows.iter().sum::<f64>() / 2.0; // that of the columns is the same
                let mut update: Vec<f64> =
                    (0..6).map(|i| g[i] / (rows[i / 3] / mean).sqrt() / cols[i % 3].sqrt()).collect();
                let rms = (update.iter().map(|u| u * u).sum::<f64>() / 6.0).sqrt();
                for (u, m) in update.iter_mut().zip(&mut first) {
                    *u *= 0.1 / rms.max(1.0);
                    if let Some(beta1) = beta1 {
                        *m = beta1 * *m + (1.0 - beta1) * *u;
                        *u = *m;
                    }
                }
                assert_near(&rule.step(of(gradient.to_vec(), [2, 3]), 0.1), &update, 1e-6);
            }
            assert_eq!(rule.state_bytes(), if beta1.is_some() { 44 } else { 20 });
        }
    }

    #[test]
    fn the_scale_of_the_gradient_does_not_matter_and_zeros_are_zeros() {
        let values = [0.5f32, -0.25, 0.1, 1.0, 2.0, -3.0];
        let step = |scale: f32| {
            let mut rule = Adafactor::new(None, 0.8, 1e-30, 1.0);
            rule.step(of(values.iter().map(|value| value * scale).collect(), [2, 3]), 0.1)
        };
        let expected: Vec<f64> = crate::linalg::host(step(1.0)).into_iter().map(f64::from).collect();
        assert_near(&step(1e-3), &expected, 1e-6);
        assert_near(&step(0.0), &[0.0; 6], 0.0);
    }
}
